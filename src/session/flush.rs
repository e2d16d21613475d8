//! When a session's unit of work is flushed, and who is told.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use diesel::result::QueryResult;

use super::Session;
use super::shared::Shared;
use super::statement::Statement;
use crate::backend::Kind;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::orm::{ChangeKind, Changes, Sender, Sending, Unit};
use crate::panic_message;
use crate::spec::UnitHook;

/// A hook of every flush of a session.
pub(super) type FlushHook<C> = Rc<dyn Fn(&Session<C>, &Changes) -> Result<()>>;

pub(crate) struct FlushHooks<C: SessionConnection> {
    pub(super) before: Vec<FlushHook<C>>,
    pub(super) after: Vec<FlushHook<C>>,
}

impl<C: SessionConnection> Default for FlushHooks<C> {
    fn default() -> Self {
        Self { before: Vec::new(), after: Vec::new() }
    }
}

impl<C: SessionConnection> std::fmt::Debug for FlushHooks<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FlushHooks({}, {})", self.before.len(), self.after.len())
    }
}

/// In the order in which they are sent.
const ALL: [ChangeKind; 3] = [ChangeKind::Insert, ChangeKind::Update, ChangeKind::Delete];

impl<C: SessionConnection> Shared<C> {
    pub(super) fn unit(&self) -> &Unit<C> {
        self.unit.get_or_init(|| {
            let unit = Unit::default();
            unit.set_level(self.levels.get());
            unit
        })
    }

    /// Whether there is something to flush.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unit.get().is_some_and(|unit| unit.unflushed_since().is_some())
    }

    pub(super) fn unflushed_since(&self) -> Option<Place> {
        self.unit.get()?.unflushed_since()
    }

    /// The flush before a query.
    #[inline]
    pub(super) fn autoflush(&self, at: Place) -> Result<()> {
        match self.unit.get() {
            Some(unit) if unit.autoflushes() => self.flush_before_query(at),
            _ => Ok(()),
        }
    }

    #[cold]
    fn flush_before_query(&self, at: Place) -> Result<()> {
        self.flush(at).map_err(|error| match error {
            // These are what the query itself would have got.
            Error::RollbackRequired { .. } | Error::SessionBusy { .. } | Error::SessionEnded { .. } => error,
            error => Error::Autoflush { source: Box::new(error), at },
        })
    }

    /// Sends what has changed. After a failure that came with something sent, the transaction has to be rolled back.
    pub(super) fn flush(&self, at: Place) -> Result<()> {
        self.not_ended(at)?;
        let Some(unit) = self.unit.get() else { return Ok(()) };
        if unit.unflushed_since().is_none() {
            return Ok(());
        }
        if unit.is_flushing() {
            return Err(Error::AlreadyFlushing { at });
        }
        // What is lent or in use cannot be sent through.
        self.enter(at)?.check(at)?;
        let _flushing = unit.begin_flush();
        let hooks = *self.app().hooks();
        if self.is_told_of_flushes(hooks.before_flush, |own| !own.before.is_empty()) {
            self.tell("before_flush", &unit.unflushed(&ALL), hooks.before_flush, |own| own.before.clone())?;
        }
        unit.check(at)?;
        if !unit.is_dirty() {
            unit.nothing_differs();
            return Ok(());
        }
        let mut core = self.enter(at)?;
        let by_itself = core.commits_by_itself();
        core.begin(at)?;
        drop(core);
        let told = self.is_told_of_flushes(hooks.after_flush, |own| !own.after.is_empty());
        let changes = if told { unit.unflushed(&ALL) } else { Changes::default() };
        // A panic comes from code of the rows' own types; nobody knows by then which of what was sent has been noted.
        let sent = catch_unwind(AssertUnwindSafe(|| unit.send(&Route { session: self, at })));
        let failed = match &sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(panic_message(&**panic)),
        };
        if let Some(cause) = failed {
            if let Ok(mut core) = self.enter(at) {
                if by_itself {
                    core.rollback();
                    drop(core);
                    self.unit_rolled_back();
                } else {
                    core.spoil(cause, at, false);
                }
            }
            return sent.unwrap_or_else(|panic| resume_unwind(panic));
        }
        let told = self.tell("after_flush", &changes, hooks.after_flush, |own| own.after.clone());
        if by_itself { self.end_of_its_own(told, at) } else { told }
    }

    /// The end of a flush that is a transaction of its own.
    fn end_of_its_own(&self, outcome: Result<()>, at: Place) -> Result<()> {
        let mut core = self.enter_at_end(at)?;
        let outcome = outcome.and_then(|()| core.commit(at));
        if outcome.is_err() {
            core.rollback();
        }
        drop(core);
        match &outcome {
            Ok(()) => self.unit_committed(),
            Err(error) if error.is_commit_unknown() => self.unit_in_doubt(),
            Err(_) => self.unit_rolled_back(),
        }
        outcome
    }

    fn is_told_of_flushes(&self, database: Option<UnitHook<C>>, own: impl FnOnce(&FlushHooks<C>) -> bool) -> bool {
        database.is_some() || own(&self.flush_hooks.borrow())
    }

    /// Runs the hook of the database object, then those of the session.
    fn tell(
        &self,
        name: &'static str,
        changes: &Changes,
        database: Option<UnitHook<C>>,
        own: impl FnOnce(&FlushHooks<C>) -> Vec<FlushHook<C>>,
    ) -> Result<()> {
        let Some(session) = self.handle() else { return Ok(()) };
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(hook) = database {
            contained(name, || hook(&session, changes))?;
        }
        let own = own(&self.flush_hooks.borrow());
        own.iter().try_for_each(|hook| contained(name, || hook(&session, changes)))
    }

    /// What the hooks of the database object are to be told at the end of the transaction.
    pub(super) fn changes_to_tell(&self) -> Option<Changes> {
        let hooks = self.app().hooks();
        let wanted = hooks.before_commit.is_some() || hooks.after_commit.is_some();
        wanted.then(|| self.unit.get()).flatten().map(Unit::flushed).filter(|changes| !changes.is_empty())
    }

    pub(super) fn tell_before_commit(&self, changes: &Changes) -> Result<()> {
        self.tell("before_commit", changes, self.app().hooks().before_commit, |_| Vec::new())
    }

    pub(super) fn tell_after_commit(&self, changes: &Changes) -> Result<()> {
        let told = self.tell("after_commit", changes, self.app().hooks().after_commit, |_| Vec::new());
        told.map_err(|error| match error {
            Error::HookFailed { hook, message, .. } => Error::HookFailed { hook, committed: true, message },
            error => Error::HookFailed { hook: "after_commit", committed: true, message: error.to_string() },
        })
    }

    pub(super) fn unit_committed(&self) {
        if let Some(unit) = self.unit.get() {
            unit.committed(!self.hooks.borrow().is_empty());
        }
    }

    pub(super) fn unit_rolled_back(&self) {
        let Some(unit) = self.unit.get() else { return };
        let hook = self.app().hooks().after_rollback;
        let changes = hook.map(|_| unit.flushed_now());
        unit.rolled_back(!self.hooks.borrow().is_empty());
        if let Some(changes) = changes
            && let Err(error) = self.tell("after_rollback", &changes, hook, |_| Vec::new())
        {
            crate::wording::log_line!(warn, "diesel_session::session", "after a rollback: {error}");
        }
    }

    /// After a commit whose answer was lost: what is in memory may not be in the database, but nobody is told of a rollback.
    pub(super) fn unit_in_doubt(&self) {
        if let Some(unit) = self.unit.get() {
            unit.rolled_back(false);
        }
    }

    pub(super) fn unit_level_opened(&self) {
        self.levels.set(self.levels.get() + 1);
        if let Some(unit) = self.unit.get() {
            unit.open_level();
        }
    }

    pub(super) fn unit_level_kept(&self) {
        self.levels.set(self.levels.get() - 1);
        if let Some(unit) = self.unit.get() {
            unit.keep_level();
        }
    }

    pub(super) fn unit_level_undone(&self) {
        self.levels.set(self.levels.get() - 1);
        if let Some(unit) = self.unit.get() {
            unit.undo_level();
        }
    }

    pub(super) fn unit_cleared(&self) {
        if let Some(unit) = self.unit.get() {
            unit.clear();
        }
    }

    pub(super) fn expire_rows(&self) {
        if let Some(unit) = self.unit.get() {
            unit.expire_all();
        }
    }
}

fn contained(hook: &'static str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Error::HookFailed { hook, committed: false, message: panic_message(&*panic) }))
}

/// The session as what a flush sends through.
pub(super) struct Route<'s, C: SessionConnection> {
    pub(super) session: &'s Shared<C>,
    pub(super) at: Place,
}

impl<C: SessionConnection> Sender<C> for Route<'_, C> {
    fn send(&self, what: Sending, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()> {
        self.session.run_now(Statement::of_entity(what), self.at, run)
    }

    fn returning(&self) -> bool {
        self.session.app().spec().target.kind != Kind::Mysql
    }

    fn at(&self) -> Place {
        self.at
    }
}
