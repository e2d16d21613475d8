//! When a session's unit of work is flushed, and who is told.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;

use diesel::result::QueryResult;

use super::Session;
use super::row_hooks::RowHook;
use super::session_inner::SessionInner;
use super::statement::Statement;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::contain::{message_of, text_of};
use crate::error::Verdict;
use crate::error::{Error, Place, Result, Undo};
use crate::kind::DatabaseKind;
use crate::panic::panic_message;
use crate::unit_of_work::{ChangeKind, Changes, Executor, SessionReader, StatementKind, Unit};

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

impl<C: SessionConnection> SessionInner<C> {
    pub(super) fn unit(&self) -> &Unit<C> {
        self.unit.get_or_init(|| {
            let unit = Unit::new(self.weak());
            unit.set_level(self.levels.get());
            if self.has_begun() {
                // The transaction may have sent what the unit has not seen.
                unit.expire_all();
            }
            // The transaction may have changed rows before the session kept any.
            unit.note_changing();
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

    /// The flush before a statement. A statement that may change rows is refused while a write guard lives: a later flush would compare the
    /// guard's value with the row from before the statement.
    pub(super) fn autoflush_before(&self, statement: Statement, at: Place) -> Result<()> {
        self.autoflush(at)?;
        match self.unit.get() {
            Some(unit) if statement.outdates || statement.access == Access::Raw => unit.check_writers(at),
            _ => Ok(()),
        }
    }

    #[cold]
    fn flush_before_query(&self, at: Place) -> Result<()> {
        self.flush(at).map_err(|error| match error {
            // These are what the query itself would have got.
            Error::RollbackRequired { .. } | Error::SessionBusy { .. } | Error::SessionEnded { .. } => error,
            error => self.with_undo(Error::Autoflush { source: Box::new(error), at, undo: Undo::default() }),
        })
    }

    /// Sends what has changed. After a failure that came with something sent, the transaction has to be rolled back.
    pub(super) fn flush(&self, at: Place) -> Result<()> {
        self.flush_now(at).map_err(|error| self.with_undo(error))
    }

    fn flush_now(&self, at: Place) -> Result<()> {
        self.not_ended(at)?;
        let Some(unit) = self.unit.get() else { return Ok(()) };
        if unit.unflushed_since().is_none() {
            return Ok(());
        }
        if unit.is_flushing() {
            return Err(Error::AlreadyFlushing { at });
        }
        // What is guarded or in use cannot be sent through.
        let mut core = self.enter(at)?;
        core.check(at)?;
        let by_itself = core.commits_by_itself();
        drop(core);
        let _flushing = unit.begin_flush();
        let hooks = *self.row_hooks();
        if self.is_told_of_flushes(hooks.before_flush, |own| !own.before.is_empty()) {
            let own = |own: &FlushHooks<C>| own.before.clone();
            self.tell_watched("before_flush", &unit.unflushed(&ALL), hooks.before_flush, own, at)?;
        }
        unit.check(at)?;
        if !unit.is_dirty() {
            unit.forget_unchanged_writes();
            return Ok(());
        }
        let mut core = self.enter(at)?;
        if by_itself && !core.commits_by_itself() {
            core.invalidate(LEFT_OPEN.into(), at, true);
            let message = LEFT_OPEN.into();
            return Err(Error::HookFailed { hook: "before_flush", committed: false, message });
        }
        if core.is_reading() {
            // What was read before the transaction may have changed since.
            unit.expire_all();
        }
        core.begin(at)?;
        let before = Pending { begun: true, rollbacks: core.rollbacks(), losses: unit.lost_changes() };
        drop(core);
        let told = self.is_told_of_flushes(hooks.after_flush, |own| !own.after.is_empty());
        let changes = if told { unit.unflushed(&ALL) } else { Changes::default() };
        // Until all is sent and noted, whatever ends this flush makes a rollback necessary. A panic comes from code of the rows' own types:
        // nobody knows by then which of what was sent has been noted.
        let unfinished = Unfinished { session: self, by_itself, at };
        let mut sent = catch_unwind(AssertUnwindSafe(|| unit.send(&Route { session: self, at })));
        if let Ok(Err(error)) = &mut sent {
            // It becomes the cause of others, which say what has to be done.
            error.set_undo(&|_| Undo::Unsaid);
        }
        let taken = self.has_lost(before);
        let failed = match &sent {
            Ok(Ok(())) if taken => Some(ROLLED_BACK_MEANWHILE.into()),
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(text_of(error)),
            Err(panic) => Some(panic_message(&**panic)),
        };
        let Some(cause) = failed else {
            std::mem::forget(unfinished);
            let own = |own: &FlushHooks<C>| own.after.clone();
            let told = self.tell_watched("after_flush", &changes, hooks.after_flush, own, at);
            return if by_itself { self.end_of_its_own(told, at) } else { told };
        };
        std::mem::forget(unfinished);
        self.flush_failed(by_itself, cause, at);
        match sent {
            Ok(Ok(())) => Err(Error::RollbackRequired { cause: ROLLED_BACK_MEANWHILE.into(), at }),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// What was sent cannot be kept.
    fn flush_failed(&self, by_itself: bool, cause: String, at: Place) {
        let Ok(mut core) = self.enter_at_end(at) else { return };
        if by_itself {
            core.rollback();
            drop(core);
            self.unit_rolled_back();
        } else {
            core.invalidate(cause, at, false);
        }
    }

    /// What a hook could take away.
    pub(super) fn pending(&self, at: Place) -> Result<Pending> {
        let core = self.enter(at)?;
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        Ok(Pending { begun: core.begun_at().is_some(), rollbacks: core.rollbacks(), losses })
    }

    /// Whether something of it is gone: a transaction was rolled back, or unflushed changes were dropped.
    fn has_lost(&self, before: Pending) -> bool {
        let rollbacks = self.core.try_borrow().map_or(before.rollbacks, |core| core.rollbacks());
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        before.begun && rollbacks != before.rollbacks || losses != before.losses
    }

    /// Runs a hook that comes before a commit. It fails where it took away what was to be flushed or committed.
    pub(super) fn watched(&self, hook: &'static str, at: Place, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.pending(at)?;
        let outer = self.hook.replace(Some((hook, self.blocks.borrow().len())));
        let outcome = run();
        self.hook.set(outer);
        if !self.has_lost(before) {
            return outcome;
        }
        let message = TOOK_AWAY.to_owned();
        // What is left is not what the program wanted to commit. After a rollback nothing is left.
        if let Ok(mut core) = self.core.try_borrow_mut()
            && (core.is_active() || core.rollbacks() == before.rollbacks)
            && !core.commits_by_itself()
        {
            core.invalidate(format!("the `{hook}` hook failed: {message}"), at, true);
        }
        outcome.and(Err(Error::HookFailed { hook, committed: false, message }))
    }

    /// The end of a flush that is a transaction of its own.
    fn end_of_its_own(&self, outcome: Result<()>, at: Place) -> Result<()> {
        let mut core = self.enter_at_end(at)?;
        let outcome = match outcome.map(|()| self.commit_core(&mut core, at)) {
            Ok(Ok(committed)) => committed,
            Ok(Err(panic)) => {
                drop(core);
                self.unit_undecided(&Arc::default());
                resume_unwind(panic)
            }
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            core.rollback();
        }
        drop(core);
        match &outcome {
            Ok(()) => self.unit_committed(),
            Err(Error::CommitUnknown(unknown)) => self.unit_undecided(&unknown.verdict),
            Err(_) => self.unit_rolled_back(),
        }
        outcome
    }

    fn is_told_of_flushes(&self, database: Option<RowHook<C>>, own: impl FnOnce(&FlushHooks<C>) -> bool) -> bool {
        database.is_some() || own(&self.flush_hooks.borrow())
    }

    /// Runs the hook of the database object, after the end of a transaction.
    fn tell(&self, name: &'static str, changes: &Changes, database: Option<RowHook<C>>) -> Result<()> {
        match (self.handle(), database) {
            (Some(session), Some(hook)) if !changes.is_empty() => contained(name, || hook(&session, changes)),
            _ => Ok(()),
        }
    }

    /// Runs the hook of the database object, then those of the session, before the end of a transaction.
    fn tell_watched(
        &self,
        name: &'static str,
        changes: &Changes,
        database: Option<RowHook<C>>,
        own: impl FnOnce(&FlushHooks<C>) -> Vec<FlushHook<C>>,
        at: Place,
    ) -> Result<()> {
        let Some(session) = self.handle() else { return Ok(()) };
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(hook) = database {
            self.watched(name, at, || contained(name, || hook(&session, changes)))?;
        }
        let own = own(&self.flush_hooks.borrow());
        own.iter().try_for_each(|hook| self.watched(name, at, || contained(name, || hook(&session, changes))))
    }

    /// What the hooks of the database object are to be told at the end of the transaction.
    pub(super) fn changes_to_tell(&self) -> Option<Changes> {
        let hooks = self.row_hooks();
        let wanted = hooks.before_commit.is_some() || hooks.after_commit.is_some();
        wanted.then(|| self.unit.get()).flatten().map(Unit::flushed).filter(|changes| !changes.is_empty())
    }

    pub(super) fn tell_before_commit(&self, changes: &Changes, at: Place) -> Result<()> {
        self.tell_watched("before_commit", changes, self.row_hooks().before_commit, |_| Vec::new(), at)
    }

    pub(super) fn tell_after_commit(&self, changes: &Changes) -> Result<()> {
        let told = self.tell("after_commit", changes, self.row_hooks().after_commit);
        told.map_err(|error| match error {
            Error::HookFailed { hook, message, .. } => Error::HookFailed { hook, committed: true, message },
            error => Error::HookFailed { hook: "after_commit", committed: true, message: text_of(&error) },
        })
    }

    pub(super) fn unit_committed(&self) {
        if let Some(unit) = self.unit.get() {
            unit.committed(!self.hooks.borrow().is_empty());
        }
    }

    pub(super) fn unit_rolled_back(&self) {
        let Some(unit) = self.unit.get() else { return };
        let hook = self.row_hooks().after_rollback;
        let changes = hook.map(|_| unit.flushed_now());
        unit.rolled_back(!self.hooks.borrow().is_empty());
        if let Some(changes) = changes
            && let Err(error) = self.tell("after_rollback", &changes, hook)
        {
            crate::wording::log_line!(warn, "diesel_session::session", "after a rollback: {}", text_of(&error));
        }
    }

    /// After a commit whose answer was lost. Nobody is told of a rollback.
    pub(super) fn unit_undecided(&self, verdict: &Arc<Verdict>) {
        if let Some(unit) = self.unit.get() {
            unit.undecided(verdict);
        }
    }

    pub(super) fn unit_level_opened(&self) {
        self.levels.set(self.levels.get() + 1);
        if let Some(unit) = self.unit.get() {
            unit.open_savepoint();
        }
    }

    pub(super) fn unit_level_kept(&self) {
        self.levels.set(self.levels.get() - 1);
        if let Some(unit) = self.unit.get() {
            unit.release_savepoint();
        }
    }

    pub(super) fn unit_level_undone(&self) {
        self.levels.set(self.levels.get() - 1);
        if let Some(unit) = self.unit.get() {
            unit.roll_back_savepoint();
        }
    }

    pub(super) fn unit_begin_attempt(&self) {
        if let Some(unit) = self.unit.get() {
            unit.begin_attempt();
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
        .unwrap_or_else(|panic| Err(Error::HookFailed { hook, committed: false, message: message_of(panic) }))
}

const TOOK_AWAY: &str = "it took away what was to be written or committed, by `rollback`, `remove`, `expunge_all` or `expire_all`. \
    To refuse, return `Err` from the hook";

const LEFT_OPEN: &str = "it began a transaction in an autocommit scope and left it open. Use `session.transaction(..)`, or begin before the flush";

const ROLLED_BACK_MEANWHILE: &str =
    "code of a row's type rolled back the session's transaction while a flush was under way";

/// What a hook could take away.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pending {
    begun: bool,
    rollbacks: u64,
    losses: u64,
}

/// A flush of which not everything is sent and noted. Dropped, it makes a rollback necessary.
struct Unfinished<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    by_itself: bool,
    at: Place,
}

impl<C: SessionConnection> Drop for Unfinished<'_, C> {
    fn drop(&mut self) {
        self.session.flush_failed(self.by_itself, "code of the program panicked in a flush".into(), self.at);
    }
}

impl<C: SessionConnection> SessionReader<C> for SessionInner<C> {
    fn has_snapshot(&self) -> bool {
        self.kind() == DatabaseKind::Mysql
    }

    fn read(&self, what: StatementKind, at: Place, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()> {
        self.run_now(Statement::of_entity(what), at, run)
    }
}

/// The session as what a flush sends through.
pub(super) struct Route<'s, C: SessionConnection> {
    pub(super) session: &'s SessionInner<C>,
    pub(super) at: Place,
}

impl<C: SessionConnection> Executor<C> for Route<'_, C> {
    fn send(&self, what: StatementKind, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()> {
        self.session.run_now(Statement::of_entity(what), self.at, run)
    }

    fn has_returning(&self) -> bool {
        self.session.kind() != DatabaseKind::Mysql
    }

    fn at(&self) -> Place {
        self.at
    }
}
