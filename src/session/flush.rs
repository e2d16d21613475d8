//! When a session's unit of work is flushed, and which hooks run around the flush.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Weak;

use diesel::result::QueryResult;

use super::hooks::ChangeEvent;
use super::session_inner::SessionInner;
use super::statement::Statement;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::error::{Details, Error, ErrorKind, Result, SourceLocation, Undo};
use crate::kind::DatabaseKind;
use crate::panic::{display_catching_panic, panic_message};
use crate::unit_of_work::{ChangeKind, Changes, Executor, StatementKind, Unit};

/// The kinds of changes, in the order in which a flush sends them.
const SEND_ORDER: [ChangeKind; 3] = [ChangeKind::Insert, ChangeKind::Update, ChangeKind::Delete];

impl<C: SessionConnection> SessionInner<C> {
    pub(super) fn unit(&self) -> &Unit<C> {
        self.unit.get_or_init(|| {
            let weak_self: Weak<Self> = Weak::clone(&self.weak_self);
            let unit = Unit::new(weak_self, self.kind() == DatabaseKind::Mysql);
            let savepoints = self.open_scopes.borrow().iter().filter(|scope| scope.is_savepoint).count();
            unit.state.level.set(savepoints as u32);
            if self.in_transaction() {
                // The transaction may have sent statements before the unit of work existed.
                unit.state.expire();
            }
            // The transaction may have changed rows before the session tracked any.
            unit.state.note_changing();
            unit
        })
    }

    /// The unit of work, unless the session has ended.
    #[inline]
    pub(super) fn live_unit(&self, at: SourceLocation) -> Result<&Unit<C>> {
        self.check_not_ended(at)?;
        Ok(self.unit())
    }

    /// Whether there are changes to flush.
    pub(crate) fn has_unflushed(&self) -> bool {
        self.unflushed_since().is_some()
    }

    pub(super) fn unflushed_since(&self) -> Option<SourceLocation> {
        self.unit.get()?.unflushed_since()
    }

    /// Flushes before a query, unless autoflush is off or nothing has changed.
    #[inline]
    pub(super) fn autoflush(&self, at: SourceLocation) -> Result<()> {
        match self.unit.get() {
            Some(unit) if unit.autoflushes() => self.flush_before_query(at),
            _ => Ok(()),
        }
    }

    /// Flushes before a statement. A statement that may change rows is refused while a write guard lives, because a
    /// later flush would compare the guard's value with the row as it was before the statement.
    pub(super) fn autoflush_before(&self, statement: Statement, at: SourceLocation) -> Result<()> {
        self.autoflush(at)?;
        match self.unit.get() {
            Some(unit) if statement.expires_rows || statement.access == Access::Raw => unit.check_writers(at),
            _ => Ok(()),
        }
    }

    #[cold]
    fn flush_before_query(&self, at: SourceLocation) -> Result<()> {
        self.flush(at).map_err(|error| match error.kind() {
            // The query itself would have failed with the same error.
            ErrorKind::RollbackRequired | ErrorKind::SessionBusy | ErrorKind::SessionEnded => error,
            _ => self.with_undo(Error::from(Details::Autoflush { source: error, at, undo: Undo::default() })),
        })
    }

    /// Sends all changes. If it fails after it has sent something, the transaction must be rolled back.
    pub(super) fn flush(&self, at: SourceLocation) -> Result<()> {
        self.flush_now(at).map_err(|error| self.with_undo(error))
    }

    fn flush_now(&self, at: SourceLocation) -> Result<()> {
        self.check_not_ended(at)?;
        let Some(unit) = self.unit.get() else { return Ok(()) };
        if unit.unflushed_since().is_none() {
            return Ok(());
        }
        if unit.is_flushing() {
            return Err(Details::AlreadyFlushing { at }.into());
        }
        // A flush needs the connection: a guard must not own it, and no statement may be running.
        let mut transaction = self.borrow_transaction(at)?;
        transaction.check_usable(at)?;
        let autocommits = transaction.is_autocommitting();
        drop(transaction);
        let _flushing = unit.begin_flush();
        if self.has_change_hook(ChangeEvent::BeforeFlush) {
            self.run_change_hooks(ChangeEvent::BeforeFlush, &unit.unflushed(&SEND_ORDER), at)?;
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
            return Err(Details::HookFailed { hook: "before_flush", committed: false, message }.into());
        }
        transaction.begin(at)?;
        drop(transaction);
        let before = self.loss_counts(at)?;
        let has_after_flush = self.has_change_hook(ChangeEvent::AfterFlush);
        let changes = if has_after_flush { unit.unflushed(&SEND_ORDER) } else { Changes::default() };
        // A panic comes from code of the rows' types and leaves open which of the sent changes have been noted.
        let mut sent = catch_unwind(AssertUnwindSafe(|| unit.send(at)));
        if matches!(sent, Ok(Ok(()))) && self.has_lost_since(before) {
            sent = Ok(Err(Details::RollbackRequired { cause: ROLLED_BACK_DURING_FLUSH.into(), at }.into()));
        }
        let cause = match &mut sent {
            Ok(Ok(())) => {
                let outcome = self.run_change_hooks(ChangeEvent::AfterFlush, &changes, at);
                return if autocommits { self.end_own_transaction(outcome, at) } else { outcome };
            }
            Ok(Err(error)) => {
                // The error becomes the cause of other errors, and those say how to undo the transaction.
                error.set_undo(&|_| Undo::Unsaid);
                match (error.details(), error.database_error()) {
                    (Details::RollbackRequired { cause, .. }, _) => cause.clone(),
                    (Details::Query { .. }, Some(cause)) => display_catching_panic(cause),
                    _ => display_catching_panic(error),
                }
            }
            Err(panic) => panic_message(&**panic),
        };
        if autocommits {
            self.roll_back_at_end(usize::MAX, at);
        } else if let Ok(mut transaction) = self.borrow_transaction_at_end(at) {
            transaction.invalidate(cause, at, false);
        }
        sent.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Commits or rolls back after a flush that is a transaction of its own.
    fn end_own_transaction(&self, outcome: Result<()>, at: SourceLocation) -> Result<()> {
        let outcome = outcome.and_then(|()| self.commit_transaction(at, |_| Vec::new()));
        match &outcome {
            Ok(()) => self.with_unit(Unit::committed),
            Err(_) if self.in_transaction() => self.roll_back_at_end(usize::MAX, at),
            Err(_) => {}
        }
        outcome
    }
}

const HOOK_LEFT_TRANSACTION_OPEN: &str = "it began a transaction in an autocommit scope and left it open. \
     Use `session.transaction(..)`, or begin before the flush";

const ROLLED_BACK_DURING_FLUSH: &str =
    "code of a row's type rolled back the session's transaction while a flush was under way";

impl<C: SessionConnection> Executor<C> for SessionInner<C> {
    fn send(
        &self,
        what: StatementKind,
        at: SourceLocation,
        run: &mut dyn FnMut(&mut C) -> QueryResult<()>,
    ) -> Result<()> {
        self.run_without_flush(Statement::of_entity(what), at, run)
    }
}
