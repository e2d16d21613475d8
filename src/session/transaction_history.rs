//! The history of a transaction: its savepoints, its writes and its failures.

use crate::dialect::WriteStep;
use crate::error::SourceLocation;

#[derive(Debug, Default)]
pub(super) struct TransactionHistory {
    /// The first call that wrote something that was not rolled back.
    first_write: Option<SourceLocation>,
    transient: TransientFailure,
    savepoints: Vec<OpenSavepoint>,
    /// Raw SQL or code of the program has used the connection in this transaction, so the session may not know all
    /// errors.
    pub(super) had_raw_access: bool,
    /// That code has set savepoints of its own.
    pub(super) has_raw_savepoint: bool,
    /// The first error that such code did not return, and the call that gave it the connection. The code may have
    /// handled the error.
    pub(super) swallowed: Option<(String, SourceLocation)>,
}

/// A serialization failure, a deadlock or a lock timeout, after which another run of the whole transaction may succeed,
/// and whether it still matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TransientFailure {
    #[default]
    Nothing,
    /// The failure was undone, or the code that saw it may have handled it. It matters until the next statement,
    /// which shows that the program has gone on.
    MaybeHandled,
    /// The failure matters unless a savepoint that was opened before it is rolled back.
    Unhandled,
}

/// An open savepoint, with the history as it was when the savepoint was opened.
#[derive(Debug)]
struct OpenSavepoint {
    /// Whether the session has opened it, and not raw SQL.
    is_own: bool,
    first_write: Option<SourceLocation>,
    transient: TransientFailure,
}

impl TransactionHistory {
    pub(super) fn first_write(&self) -> Option<SourceLocation> {
        self.first_write
    }

    /// Notes a typed write.
    pub(super) fn note_write(&mut self, at: SourceLocation) {
        self.first_write.get_or_insert(at);
    }

    /// Notes a write or a savepoint of raw SQL.
    pub(super) fn note_raw(&mut self, step: WriteStep, at: SourceLocation) {
        match step {
            WriteStep::Write => self.note_write(at),
            WriteStep::OpenSavepoint => self.push_savepoint(false),
            WriteStep::ReleaseSavepoint => drop(self.savepoints.pop_if(|savepoint| !savepoint.is_own)),
            WriteStep::RollBackToSavepoint => {
                // If the history does not know the savepoint, nothing may be left of the writes.
                let savepoint = self.savepoints.pop_if(|savepoint| !savepoint.is_own);
                self.first_write = savepoint.and_then(|savepoint| savepoint.first_write);
            }
        }
    }

    /// Whether there was a failure that asks for another run of the transaction.
    pub(super) fn has_transient_failure(&self) -> bool {
        self.transient != TransientFailure::Nothing
    }

    pub(super) fn note_transient_failure(&mut self, failure: TransientFailure) {
        self.transient = self.transient.max(failure);
    }

    /// The program sends another statement.
    pub(super) fn statement_follows(&mut self) {
        if self.transient == TransientFailure::MaybeHandled {
            self.transient = TransientFailure::Nothing;
        }
    }

    /// The number of open savepoints of the session.
    pub(super) fn savepoints(&self) -> u32 {
        self.savepoints.iter().map(|savepoint| u32::from(savepoint.is_own)).sum()
    }

    pub(super) fn open_savepoint(&mut self) {
        self.push_savepoint(true);
    }

    pub(super) fn release_savepoint(&mut self) {
        self.close_savepoint();
    }

    pub(super) fn roll_back_savepoint(&mut self) {
        if let Some(before) = self.close_savepoint() {
            self.first_write = before.first_write;
            self.transient = self.transient.min(TransientFailure::MaybeHandled).max(before.transient);
        }
    }

    /// The transaction has ended.
    pub(super) fn close_savepoints(&mut self) {
        self.savepoints.clear();
    }

    fn push_savepoint(&mut self, is_own: bool) {
        let Self { first_write, transient, .. } = *self;
        self.savepoints.push(OpenSavepoint { is_own, first_write, transient });
    }

    /// Closes the session's innermost savepoint, and those of raw SQL inside it.
    fn close_savepoint(&mut self) -> Option<OpenSavepoint> {
        let index = self.savepoints.iter().rposition(|savepoint| savepoint.is_own)?;
        self.savepoints.drain(index..).next()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::Location;

    use super::TransientFailure::{MaybeHandled, Nothing, Unhandled};
    use super::*;

    #[test]
    fn savepoint_rollback_marks_its_failures_as_handled() {
        let mut history = TransactionHistory::default();
        history.open_savepoint();
        history.open_savepoint();
        history.note_transient_failure(Unhandled);
        history.release_savepoint();
        history.statement_follows();
        assert_eq!(history.transient, Unhandled, "no rollback has undone the failure");
        history.roll_back_savepoint();
        assert_eq!(history.transient, MaybeHandled);
        history.statement_follows();
        assert_eq!(history.transient, Nothing);
    }

    #[test]
    fn outer_failure_outlives_the_rollback_of_an_inner_savepoint() {
        let mut history = TransactionHistory::default();
        history.note_transient_failure(Unhandled);
        history.open_savepoint();
        history.note_transient_failure(Unhandled);
        history.note_transient_failure(MaybeHandled);
        history.roll_back_savepoint();
        assert_eq!(history.transient, Unhandled);
    }

    #[test]
    fn history_forgets_the_writes_of_a_savepoint_that_was_rolled_back() {
        let mut history = TransactionHistory::default();
        history.open_savepoint();
        history.note_write(Location::caller());
        history.roll_back_savepoint();
        assert_eq!(history.first_write(), None);
        history.open_savepoint();
        history.open_savepoint();
        history.note_write(Location::caller());
        history.release_savepoint();
        assert!(history.first_write().is_some());
        history.roll_back_savepoint();
        assert_eq!(history.first_write(), None);
    }

    #[test]
    fn history_keeps_the_writes_before_a_raw_savepoint() {
        use WriteStep::{OpenSavepoint, ReleaseSavepoint, RollBackToSavepoint, Write};
        for (steps, has_written) in [
            (&[Write][..], true),
            (&[OpenSavepoint, Write, RollBackToSavepoint], false),
            (&[OpenSavepoint, Write, ReleaseSavepoint], true),
            (&[Write, OpenSavepoint, Write, RollBackToSavepoint], true),
            (&[OpenSavepoint, Write, OpenSavepoint, Write, RollBackToSavepoint, RollBackToSavepoint], false),
            (&[OpenSavepoint, Write, RollBackToSavepoint, Write, RollBackToSavepoint], false),
        ] {
            let mut history = TransactionHistory::default();
            steps.iter().for_each(|&step| history.note_raw(step, Location::caller()));
            assert_eq!(history.first_write().is_some(), has_written, "{steps:?}");
        }
    }
}
