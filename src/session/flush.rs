//! When a session's unit of work is flushed, and which hooks run around the flush.

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
use crate::error::Verdict;
use crate::error::{Error, Place, Result, Undo};
use crate::kind::DatabaseKind;
use crate::panic::{display_catching_panic, into_panic_message, panic_message};
use crate::unit_of_work::{ChangeKind, Changes, Executor, SessionReader, StatementKind, Unit};

/// A hook that runs at every flush of a session.
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

/// The kinds of changes, in the order in which a flush sends them.
const SEND_ORDER: [ChangeKind; 3] = [ChangeKind::Insert, ChangeKind::Update, ChangeKind::Delete];

impl<C: SessionConnection> SessionInner<C> {
    pub(super) fn unit(&self) -> &Unit<C> {
        self.unit.get_or_init(|| {
            let unit = Unit::new(self.weak());
            unit.set_level(self.savepoints.get());
            if self.is_active() {
                // The transaction may have sent statements before the unit of work existed.
                unit.expire_all();
            }
            // The transaction may have changed rows before the session tracked any.
            unit.note_changing();
            unit
        })
    }

    /// Whether there are changes to flush.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unit.get().is_some_and(|unit| unit.unflushed_since().is_some())
    }

    pub(super) fn unflushed_since(&self) -> Option<Place> {
        self.unit.get()?.unflushed_since()
    }

    /// Flushes before a query, unless autoflush is off or nothing has changed.
    #[inline]
    pub(super) fn autoflush(&self, at: Place) -> Result<()> {
        match self.unit.get() {
            Some(unit) if unit.autoflushes() => self.flush_before_query(at),
            _ => Ok(()),
        }
    }

    /// Flushes before a statement. A statement that may change rows is refused while a write guard lives, because a
    /// later flush would compare the guard's value with the row as it was before the statement.
    pub(super) fn autoflush_before(&self, statement: Statement, at: Place) -> Result<()> {
        self.autoflush(at)?;
        match self.unit.get() {
            Some(unit) if statement.expires_rows || statement.access == Access::Raw => unit.check_writers(at),
            _ => Ok(()),
        }
    }

    #[cold]
    fn flush_before_query(&self, at: Place) -> Result<()> {
        self.flush(at).map_err(|error| match error {
            // The query itself would have failed with the same error.
            Error::RollbackRequired { .. } | Error::SessionBusy { .. } | Error::SessionEnded { .. } => error,
            error => self.with_undo(Error::Autoflush { source: Box::new(error), at, undo: Undo::default() }),
        })
    }

    /// Sends all changes. If it fails after it has sent something, the transaction must be rolled back.
    pub(super) fn flush(&self, at: Place) -> Result<()> {
        self.flush_now(at).map_err(|error| self.with_undo(error))
    }

    fn flush_now(&self, at: Place) -> Result<()> {
        self.check_not_ended(at)?;
        let Some(unit) = self.unit.get() else { return Ok(()) };
        if unit.unflushed_since().is_none() {
            return Ok(());
        }
        if unit.is_flushing() {
            return Err(Error::AlreadyFlushing { at });
        }
        // A flush needs the connection: a guard must not own it, and no statement may be running.
        let mut transaction = self.borrow_transaction(at)?;
        transaction.check_usable(at)?;
        let autocommits = transaction.is_autocommitting();
        drop(transaction);
        let _flushing = unit.begin_flush();
        let row_hooks = *self.row_hooks();
        if self.has_flush_hooks(row_hooks.before_flush, |hooks| !hooks.before.is_empty()) {
            let session_hooks = |hooks: &FlushHooks<C>| hooks.before.clone();
            self.run_checked_hooks(
                "before_flush",
                &unit.unflushed(&SEND_ORDER),
                row_hooks.before_flush,
                session_hooks,
                at,
            )?;
        }
        unit.check(at)?;
        if !unit.is_dirty() {
            unit.forget_unchanged_writes();
            return Ok(());
        }
        let mut transaction = self.borrow_transaction(at)?;
        if autocommits && !transaction.is_autocommitting() {
            transaction.invalidate(HOOK_LEFT_TRANSACTION_OPEN.into(), at, true);
            let message = HOOK_LEFT_TRANSACTION_OPEN.into();
            return Err(Error::HookFailed { hook: "before_flush", committed: false, message });
        }
        if transaction.is_reading() {
            // Rows that were read before the transaction may have changed since.
            unit.expire_all();
        }
        transaction.begin(at)?;
        let before = LossCounts { begun: true, rollbacks: transaction.rollbacks(), losses: unit.lost_changes() };
        drop(transaction);
        let has_after_flush = self.has_flush_hooks(row_hooks.after_flush, |hooks| !hooks.after.is_empty());
        let changes = if has_after_flush { unit.unflushed(&SEND_ORDER) } else { Changes::default() };
        // Until all changes are sent and noted, any other end of this flush forces a rollback. A panic comes from
        // code of the rows' types and leaves open which of the sent changes have been noted.
        let unfinished = UnfinishedFlush { session: self, autocommits, at };
        let mut sent = catch_unwind(AssertUnwindSafe(|| unit.send(&SessionExecutor { session: self, at })));
        if let Ok(Err(error)) = &mut sent {
            // The error becomes the cause of other errors, and those say how to undo the transaction.
            error.set_undo(&|_| Undo::Unsaid);
        }
        let lost = self.has_lost_since(before);
        let failure = match &sent {
            Ok(Ok(())) if lost => Some(ROLLED_BACK_DURING_FLUSH.into()),
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(display_catching_panic(error)),
            Err(panic) => Some(panic_message(&**panic)),
        };
        let Some(cause) = failure else {
            std::mem::forget(unfinished);
            let session_hooks = |hooks: &FlushHooks<C>| hooks.after.clone();
            let outcome = self.run_checked_hooks("after_flush", &changes, row_hooks.after_flush, session_hooks, at);
            return if autocommits { self.end_own_transaction(outcome, at) } else { outcome };
        };
        std::mem::forget(unfinished);
        self.flush_failed(autocommits, cause, at);
        match sent {
            Ok(Ok(())) => Err(Error::RollbackRequired { cause: ROLLED_BACK_DURING_FLUSH.into(), at }),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Undoes the statements of a failed flush: rolls back, or invalidates the transaction.
    fn flush_failed(&self, autocommits: bool, cause: String, at: Place) {
        let Ok(mut transaction) = self.borrow_transaction_at_end(at) else { return };
        if autocommits {
            transaction.rollback();
            drop(transaction);
            self.unit_rolled_back();
        } else {
            transaction.invalidate(cause, at, false);
        }
    }

    /// The counts by which [`has_lost_since`](Self::has_lost_since) recognises a loss.
    pub(super) fn loss_counts(&self, at: Place) -> Result<LossCounts> {
        let transaction = self.borrow_transaction(at)?;
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        Ok(LossCounts { begun: transaction.has_begun(), rollbacks: transaction.rollbacks(), losses })
    }

    /// Whether a begun transaction was rolled back or unflushed changes were dropped since `before`.
    fn has_lost_since(&self, before: LossCounts) -> bool {
        let rollbacks = self.transaction.try_borrow().map_or(before.rollbacks, |transaction| transaction.rollbacks());
        let losses = self.unit.get().map_or(0, Unit::lost_changes);
        before.begun && rollbacks != before.rollbacks || losses != before.losses
    }

    /// Runs a hook before a flush or a commit. The hook fails if it has dropped what was to be flushed or committed.
    pub(super) fn run_checked_hook(
        &self,
        hook: &'static str,
        at: Place,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let before = self.loss_counts(at)?;
        let outer = self.running_hook.replace(Some((hook, self.open_scopes.borrow().len())));
        let outcome = run();
        self.running_hook.set(outer);
        if !self.has_lost_since(before) {
            return outcome;
        }
        let message = HOOK_LOST_CHANGES.to_owned();
        // The rest is not what the program wanted to commit. After a rollback nothing is left.
        if let Ok(mut transaction) = self.transaction.try_borrow_mut()
            && (transaction.is_active() || transaction.rollbacks() == before.rollbacks)
            && !transaction.is_autocommitting()
        {
            transaction.invalidate(format!("the `{hook}` hook failed: {message}"), at, true);
        }
        outcome.and(Err(Error::HookFailed { hook, committed: false, message }))
    }

    /// Commits or rolls back after a flush that is a transaction of its own.
    fn end_own_transaction(&self, outcome: Result<()>, at: Place) -> Result<()> {
        let mut transaction = self.borrow_transaction_at_end(at)?;
        let outcome = match outcome.map(|()| self.commit_transaction(&mut transaction, at)) {
            Ok(Ok(committed)) => committed,
            Ok(Err(panic)) => {
                drop(transaction);
                self.unit_undecided(&Arc::default());
                resume_unwind(panic)
            }
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            transaction.rollback();
        }
        drop(transaction);
        match &outcome {
            Ok(()) => self.unit_committed(),
            Err(Error::CommitUnknown(unknown)) => self.unit_undecided(&unknown.verdict),
            Err(_) => self.unit_rolled_back(),
        }
        outcome
    }

    fn has_flush_hooks(&self, database_hook: Option<RowHook<C>>, is_any: impl FnOnce(&FlushHooks<C>) -> bool) -> bool {
        database_hook.is_some() || is_any(&self.flush_hooks.borrow())
    }

    /// Runs the hook of the database object after the end of a transaction.
    fn run_row_hook(&self, name: &'static str, changes: &Changes, database_hook: Option<RowHook<C>>) -> Result<()> {
        match (self.handle(), database_hook) {
            (Some(session), Some(hook)) if !changes.is_empty() => run_contained(name, || hook(&session, changes)),
            _ => Ok(()),
        }
    }

    /// Runs the hook of the database object and then those of the session, before the end of a transaction.
    fn run_checked_hooks(
        &self,
        name: &'static str,
        changes: &Changes,
        database_hook: Option<RowHook<C>>,
        session_hooks: impl FnOnce(&FlushHooks<C>) -> Vec<FlushHook<C>>,
        at: Place,
    ) -> Result<()> {
        let Some(session) = self.handle() else { return Ok(()) };
        if changes.is_empty() {
            return Ok(());
        }
        if let Some(hook) = database_hook {
            self.run_checked_hook(name, at, || run_contained(name, || hook(&session, changes)))?;
        }
        let session_hooks = session_hooks(&self.flush_hooks.borrow());
        session_hooks
            .iter()
            .try_for_each(|hook| self.run_checked_hook(name, at, || run_contained(name, || hook(&session, changes))))
    }

    /// The changes for the hooks of the database object around a commit; `None` without hooks or changes.
    pub(super) fn changes_for_commit_hooks(&self) -> Option<Changes> {
        let hooks = self.row_hooks();
        let has_hooks = hooks.before_commit.is_some() || hooks.after_commit.is_some();
        has_hooks.then(|| self.unit.get()).flatten().map(Unit::flushed).filter(|changes| !changes.is_empty())
    }

    pub(super) fn run_before_commit_row_hook(&self, changes: &Changes, at: Place) -> Result<()> {
        self.run_checked_hooks("before_commit", changes, self.row_hooks().before_commit, |_| Vec::new(), at)
    }

    pub(super) fn run_after_commit_row_hook(&self, changes: &Changes) -> Result<()> {
        let outcome = self.run_row_hook("after_commit", changes, self.row_hooks().after_commit);
        outcome.map_err(|error| match error {
            Error::HookFailed { hook, message, .. } => Error::HookFailed { hook, committed: true, message },
            error => {
                Error::HookFailed { hook: "after_commit", committed: true, message: display_catching_panic(&error) }
            }
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
            && let Err(error) = self.run_row_hook("after_rollback", &changes, hook)
        {
            crate::wording::log_line!(
                warn,
                "diesel_session::session",
                "after a rollback: {}",
                display_catching_panic(&error)
            );
        }
    }

    /// Handles a commit whose answer was lost. No `after_rollback` hook runs.
    pub(super) fn unit_undecided(&self, verdict: &Arc<Verdict>) {
        if let Some(unit) = self.unit.get() {
            unit.undecided(verdict);
        }
    }

    pub(super) fn unit_savepoint_opened(&self) {
        self.savepoints.set(self.savepoints.get() + 1);
        if let Some(unit) = self.unit.get() {
            unit.open_savepoint();
        }
    }

    pub(super) fn unit_savepoint_released(&self) {
        self.savepoints.set(self.savepoints.get() - 1);
        if let Some(unit) = self.unit.get() {
            unit.release_savepoint();
        }
    }

    pub(super) fn unit_savepoint_rolled_back(&self) {
        self.savepoints.set(self.savepoints.get() - 1);
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

fn run_contained(hook: &'static str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Error::HookFailed { hook, committed: false, message: into_panic_message(panic) }))
}

const HOOK_LOST_CHANGES: &str = "it took away what was to be written or committed, \
     by `rollback`, `remove`, `expunge_all` or `expire_all`. To refuse, return `Err` from the hook";

const HOOK_LEFT_TRANSACTION_OPEN: &str = "it began a transaction in an autocommit scope and left it open. \
     Use `session.transaction(..)`, or begin before the flush";

const ROLLED_BACK_DURING_FLUSH: &str =
    "code of a row's type rolled back the session's transaction while a flush was under way";

/// How much was lost until now: see [`SessionInner::has_lost_since`].
#[derive(Debug, Clone, Copy)]
pub(super) struct LossCounts {
    begun: bool,
    rollbacks: u64,
    losses: u64,
}

/// A flush whose changes are not all sent and noted. Its drop forces a rollback.
struct UnfinishedFlush<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    autocommits: bool,
    at: Place,
}

impl<C: SessionConnection> Drop for UnfinishedFlush<'_, C> {
    fn drop(&mut self) {
        self.session.flush_failed(self.autocommits, "code of the program panicked in a flush".into(), self.at);
    }
}

impl<C: SessionConnection> SessionReader<C> for SessionInner<C> {
    fn has_snapshot(&self) -> bool {
        self.kind() == DatabaseKind::Mysql
    }

    fn read(&self, what: StatementKind, at: Place, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()> {
        self.run_without_flush(Statement::of_entity(what), at, run)
    }
}

/// Sends the statements of a flush through the session.
pub(super) struct SessionExecutor<'s, C: SessionConnection> {
    pub(super) session: &'s SessionInner<C>,
    pub(super) at: Place,
}

impl<C: SessionConnection> Executor<C> for SessionExecutor<'_, C> {
    fn send(&self, what: StatementKind, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()> {
        self.session.run_without_flush(Statement::of_entity(what), self.at, run)
    }

    fn has_returning(&self) -> bool {
        self.session.kind() != DatabaseKind::Mysql
    }

    fn at(&self) -> Place {
        self.at
    }
}
