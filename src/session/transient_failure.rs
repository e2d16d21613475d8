//! Failures of a transaction that may succeed if the whole transaction is run again.

/// A serialization failure, a deadlock or a lock timeout, and whether it still matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum TransientFailure {
    #[default]
    Nothing,
    /// The failure was undone, or the code that saw it may have handled it. It matters until the next statement,
    /// which shows that the program has gone on.
    MaybeHandled,
    /// The failure matters unless the innermost of this number of savepoints is rolled back.
    Unhandled(u32),
}

impl TransientFailure {
    /// Notes a failure inside this number of savepoints, or with `None` a failure that may have been handled.
    pub(super) fn note(&mut self, savepoints: Option<u32>) {
        *self = match (*self, savepoints) {
            (Self::Unhandled(before), Some(savepoints)) => Self::Unhandled(before.min(savepoints)),
            (_, Some(savepoints)) => Self::Unhandled(savepoints),
            (Self::Nothing, None) => Self::MaybeHandled,
            (before, None) => before,
        }
    }

    /// The program sends another statement.
    pub(super) fn statement_follows(&mut self) {
        if *self == Self::MaybeHandled {
            *self = Self::Nothing;
        }
    }

    /// The innermost savepoint was released; `left` savepoints are open.
    pub(super) fn release_savepoint(&mut self, left: u32) {
        if let Self::Unhandled(savepoints) = self {
            *savepoints = left.min(*savepoints);
        }
    }

    /// The innermost savepoint was rolled back; `left` savepoints are open.
    pub(super) fn roll_back_savepoint(&mut self, left: u32) {
        if matches!(*self, Self::Unhandled(savepoints) if savepoints > left) {
            *self = Self::MaybeHandled;
        }
    }

    /// Whether there was a failure that asks for another run of the transaction.
    pub(super) fn is_relevant(self) -> bool {
        self != Self::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::TransientFailure::{self, MaybeHandled, Nothing, Unhandled};

    #[test]
    fn savepoint_rollback_marks_its_failures_as_handled() {
        let mut failure = TransientFailure::default();
        failure.note(Some(2));
        failure.release_savepoint(1);
        assert_eq!(failure, Unhandled(1));
        failure.statement_follows();
        assert_eq!(failure, Unhandled(1), "no rollback has undone the failure");
        failure.roll_back_savepoint(0);
        assert_eq!(failure, MaybeHandled);
        failure.statement_follows();
        assert_eq!(failure, Nothing);
    }

    #[test]
    fn outer_failure_outlives_the_rollback_of_an_inner_savepoint() {
        let mut failure = Unhandled(0);
        failure.note(Some(1));
        failure.note(None);
        failure.roll_back_savepoint(0);
        assert_eq!(failure, Unhandled(0));
    }
}
