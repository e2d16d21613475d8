//! The hooks around a flush, a commit and a rollback: those of a session and those of its database object.

use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use super::{Session, SessionInner};
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result, SourceLocation};
use crate::panic::{display_catching_panic, drop_each_catching_panics, into_panic_message};
use crate::unit_of_work::{Changes, Unit};
use crate::wording::{log_line, phrase};

/// What a `before_commit` hook may return: nothing, or a [`Result`] whose `Err` prevents the commit.
pub trait HookOutcome {
    #[doc(hidden)]
    fn outcome(self) -> Result<()>;
}

impl HookOutcome for () {
    fn outcome(self) -> Result<()> {
        Ok(())
    }
}

impl HookOutcome for Result<()> {
    fn outcome(self) -> Result<()> {
        self
    }
}

/// For a hook that can only panic: the closure `|| panic!(..)` returns the type `!`, which stable Rust cannot name.
impl HookOutcome for never::Never {
    fn outcome(self) -> Result<()> {
        self
    }
}

mod never {
    #[allow(unreachable_pub)]
    pub trait Returns {
        type Output;
    }

    impl<T> Returns for fn() -> T {
        type Output = T;
    }

    #[allow(unreachable_pub)]
    pub type Never = <fn() -> ! as Returns>::Output;
}

/// # Hooks
/// Each hook of a commit or rollback runs once, in the order of registration. Hooks that were registered inside a
/// savepoint are dropped if the savepoint is rolled back. All remaining hooks are dropped when the session is removed.
impl<C: SessionConnection> Session<C> {
    /// Runs `hook` before the next commit. The hook may use the session, and its `Err` or panic prevents the commit.
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn before_commit<R: HookOutcome>(&self, hook: impl FnOnce() -> R + 'static) -> Result<()> {
        self.0.add_hook(HookEvent::BeforeCommit, hook, Location::caller())
    }

    /// Runs `hook` after the next commit, when the connection has been checked in. A panic becomes
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of the commit, although the transaction is committed.
    /// Later hooks still run.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # let app = DB.init_app("after_commit", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// session.execute(diesel::insert_into(users::table).values(users::name.eq("Ada")))?;
    /// session.after_commit(|| println!("send a mail to Ada"))?;
    /// session.commit()?;                                      // COMMIT, and then the mail
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn after_commit(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.add_hook(HookEvent::AfterCommit, hook, Location::caller())
    }

    /// Runs `hook` after the next rollback of the whole transaction, when the connection has been checked in; also at
    /// the end of a context that did not commit.
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn after_rollback(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.add_hook(HookEvent::AfterRollback, hook, Location::caller())
    }

    /// Runs `hook` before every flush of this session that has something to send, with the changes. The hook may
    /// change rows; the same flush sends these changes. An `Err` or panic of the hook prevents the flush. The hook
    /// stays until the session is removed.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # use diesel_session::{Entity, NewEntity};
    /// # use diesel_session::unit_of_work::ChangeKind;
    /// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
    /// # struct User { #[entity(generated)] id: i32, name: String }
    /// # #[derive(Insertable, NewEntity)] #[diesel(table_name = users)] #[entity(User)]
    /// # struct NewUser { name: String }
    /// # let app = DB.init_app("before_flush", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// session.before_flush(|_, changes| {
    ///     for (_, user) in changes.of::<User>().filter(|(kind, _)| *kind == ChangeKind::Update) {
    ///         user.update(|user| user.name = user.name.trim().to_owned());
    ///     }
    /// })?;
    /// let ada = session.add(NewUser { name: "Ada".into() })?;
    /// session.flush()?;
    /// ada.write().name = " Augusta ".into();
    /// session.commit()?;
    /// assert_eq!(ada.read().name, "Augusta");
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn before_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.add_flush_hook(ChangeEvent::BeforeFlush, Rc::new(hook), Location::caller())
    }

    /// Runs `hook` after every flush of this session, with the changes that were sent. Rows that the hook changes
    /// wait for the next flush. The flush returns the `Err` of the hook, although the changes have been sent. The
    /// hook stays until the session is removed.
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn after_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.add_flush_hook(ChangeEvent::AfterFlush, Rc::new(hook), Location::caller())
    }
}

/// The event for which a hook of a session is registered. The hook runs once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HookEvent {
    BeforeCommit,
    AfterCommit,
    AfterRollback,
}

/// A hook of a session that runs once.
pub(super) type Hook = (HookEvent, Box<dyn FnOnce() -> Result<()>>);

/// The event for which a hook is registered that receives changes of tracked rows. The hook runs each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChangeEvent {
    BeforeFlush,
    AfterFlush,
    BeforeCommit,
    AfterCommit,
    AfterRollback,
}

impl ChangeEvent {
    /// The name of the method that registers the hook.
    fn hook_name(self) -> &'static str {
        match self {
            Self::BeforeFlush => "before_flush",
            Self::AfterFlush => "after_flush",
            Self::BeforeCommit => "before_commit_of_changes",
            Self::AfterCommit => "after_commit_of_changes",
            Self::AfterRollback => "after_rollback_of_changes",
        }
    }
}

/// A hook that a session runs at every flush.
pub(super) type FlushHook<C> = Rc<dyn Fn(&Session<C>, &Changes) -> Result<()>>;

/// A function of the database object. The application that it receives is inside the closure, because the layer of the
/// application is above this one.
pub(crate) type RowHook<C> = Arc<dyn Fn(&Session<C>, &Changes) -> Result<()> + Send + Sync>;

/// The functions of a database object that run for the tracked rows of its sessions, indexed by [`ChangeEvent`].
pub(crate) type RowHooks<C> = [Option<RowHook<C>>; 5];

/// How much was lost until now: see [`SessionInner::has_lost_since`].
#[derive(Debug, Clone, Copy)]
pub(super) struct LossCounts {
    begun: bool,
    rollbacks: u64,
    losses: u64,
}

const HOOK_LOST_CHANGES: &str = "it took away what was to be written or committed, \
     by `rollback`, `remove`, `expunge_all` or `expire_all`. To refuse, return `Err` from the hook";

impl<C: SessionConnection> SessionInner<C> {
    fn add_hook<R: HookOutcome>(
        &self,
        event: HookEvent,
        hook: impl FnOnce() -> R + 'static,
        at: SourceLocation,
    ) -> Result<()> {
        self.check_not_ended(at)?;
        self.hooks.borrow_mut().push((event, Box::new(|| hook().outcome())));
        Ok(())
    }

    fn add_flush_hook(&self, event: ChangeEvent, hook: FlushHook<C>, at: SourceLocation) -> Result<()> {
        self.check_not_ended(at)?;
        self.flush_hooks.borrow_mut().push((event, hook));
        Ok(())
    }

    /// Takes the hooks that were registered after the first `mark` hooks.
    pub(super) fn take_hooks_since(&self, mark: usize) -> Vec<Hook> {
        let mut hooks = self.hooks.borrow_mut();
        let mark = mark.min(hooks.len());
        hooks.split_off(mark)
    }

    pub(super) fn discard_hooks_since(&self, mark: usize) {
        drop_each_catching_panics(self.take_hooks_since(mark));
    }

    fn row_hook(&self, event: ChangeEvent) -> Option<&RowHook<C>> {
        self.row_hooks()[event as usize].as_ref()
    }

    pub(super) fn has_change_hook(&self, event: ChangeEvent) -> bool {
        self.row_hook(event).is_some() || self.flush_hooks.borrow().iter().any(|(other, _)| *other == event)
    }

    /// Runs the hook of the database object and then those of the session, before the end of a transaction.
    pub(super) fn run_change_hooks(&self, event: ChangeEvent, changes: &Changes, at: SourceLocation) -> Result<()> {
        let Some(session) = self.handle().filter(|_| !changes.is_empty()) else { return Ok(()) };
        if let Some(hook) = self.row_hook(event) {
            self.run_checked_hook(event.hook_name(), at, || hook(&session, changes))?;
        }
        let hooks = self.flush_hooks.borrow().clone();
        let mut of_event = hooks.iter().filter(|(other, _)| *other == event);
        of_event.try_for_each(|(_, hook)| self.run_checked_hook(event.hook_name(), at, || hook(&session, changes)))
    }

    /// Runs a hook before a flush or a commit. The hook fails if it has dropped the changes that were to follow.
    pub(super) fn run_checked_hook(
        &self,
        hook: &'static str,
        at: SourceLocation,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let before = self.loss_counts(at)?;
        let outer = self.running_hook.replace(Some((hook, self.open_scopes.borrow().len())));
        let outcome = run_contained(hook, run);
        self.running_hook.set(outer);
        if !self.has_lost_since(before) {
            return outcome;
        }
        let message = HOOK_LOST_CHANGES.to_owned();
        // The rest is not what the program wanted to commit. After a rollback nothing is left.
        if let Ok(mut transaction) = self.transaction.try_borrow_mut()
            && (transaction.has_begun() || transaction.rollbacks == before.rollbacks)
            && !transaction.is_autocommitting()
        {
            transaction.invalidate(format!("the `{hook}` hook failed: {message}"), at, true);
        }
        outcome.and(Err(Details::HookFailed { hook, committed: false, message }.into()))
    }

    /// The counts by which [`has_lost_since`](Self::has_lost_since) recognises a loss.
    pub(super) fn loss_counts(&self, at: SourceLocation) -> Result<LossCounts> {
        let transaction = self.borrow_transaction(at)?;
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        Ok(LossCounts { begun: transaction.has_begun(), rollbacks: transaction.rollbacks, losses })
    }

    /// Whether a begun transaction was rolled back or unflushed changes were dropped since `before`.
    pub(super) fn has_lost_since(&self, before: LossCounts) -> bool {
        let rollbacks = self.transaction.try_borrow().map_or(before.rollbacks, |transaction| transaction.rollbacks);
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        before.begun && rollbacks != before.rollbacks || losses != before.losses
    }

    /// Ends the transaction of the rows after a commit or a rollback, and runs the hook of the database object and
    /// those hooks of the session that were registered for the event. While they run, the session shows the changes of
    /// the ended transaction.
    pub(super) fn end_transaction_of_rows(&self, committed: bool, hooks: Vec<Hook>) -> Result<()> {
        let Some(unit) = self.unit.get() else { return run_after(committed, hooks) };
        let event = if committed { ChangeEvent::AfterCommit } else { ChangeEvent::AfterRollback };
        let row_hook = self.row_hook(event);
        let changes = (row_hook.is_some() || !hooks.is_empty()).then(|| unit.flushed_now());
        if committed {
            unit.committed()
        } else {
            unit.rolled_back()
        }
        let Some(changes) = changes else { return Ok(()) };
        let _kept = unit.keep_ended_changes(changes.clone());
        let row_hook_outcome = match (self.handle(), row_hook) {
            (Some(session), Some(hook)) if !changes.is_empty() => {
                let outcome = run_contained(event.hook_name(), || hook(&session, &changes));
                outcome.map_err(|error| into_hook_failure(event.hook_name(), committed, error))
            }
            _ => Ok(()),
        };
        if let (false, Err(error)) = (committed, &row_hook_outcome) {
            log_line!(warn, "diesel_session::session", "after a rollback: {error:#}");
        }
        run_after(committed, hooks).and(row_hook_outcome)
    }
}

/// Runs the hooks that were registered for this end of a transaction, even if earlier ones panic, and drops the others.
pub(super) fn run_after(committed: bool, hooks: Vec<Hook>) -> Result<()> {
    let (event, hook) = match committed {
        true => (HookEvent::AfterCommit, "after_commit"),
        false => (HookEvent::AfterRollback, "after_rollback"),
    };
    let (due, others): (Vec<_>, Vec<_>) = hooks.into_iter().partition(|(other, _)| *other == event);
    drop_each_catching_panics(others);
    let mut outcome = Ok(());
    for (_, run) in due {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            let message = into_panic_message(panic);
            log_line!(warn, "diesel_session::session", "a {hook} hook panicked: {}", phrase(&message));
            outcome = outcome.and(Err(Details::HookFailed { hook, committed, message }.into()));
        }
    }
    outcome
}

/// The failure of a hook that has run after the end of its transaction.
fn into_hook_failure(hook: &'static str, committed: bool, error: Error) -> Error {
    let details = match error.into_details() {
        Details::HookFailed { hook, message, .. } => Details::HookFailed { hook, committed, message },
        other => Details::HookFailed { hook, committed, message: display_catching_panic(&Error::from(other)) },
    };
    details.into()
}

fn run_contained(hook: &'static str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        Err(Details::HookFailed { hook, committed: false, message: into_panic_message(panic) }.into())
    })
}
