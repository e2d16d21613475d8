//! What failed in a transaction and may succeed when all of it is run again.

/// A serialization failure, a deadlock or a lock that was not to be had, as far as it still matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Transient {
    #[default]
    Nothing,
    /// It has been undone, or was in the hands of code that may have dealt with it. It matters until something else is sent:
    /// then the program has gone on.
    Passing,
    /// It matters, unless the innermost of so many savepoints is undone.
    Standing(u32),
}

impl Transient {
    /// A failure inside of so many savepoints; `None` where it has perhaps been dealt with.
    pub(super) fn note(&mut self, levels: Option<u32>) {
        *self = match (*self, levels) {
            (Self::Standing(before), Some(levels)) => Self::Standing(before.min(levels)),
            (_, Some(levels)) => Self::Standing(levels),
            (Self::Nothing, None) => Self::Passing,
            (before, None) => before,
        }
    }

    /// Something else is sent.
    pub(super) fn go_on(&mut self) {
        if *self == Self::Passing {
            *self = Self::Nothing;
        }
    }

    /// The innermost savepoint was kept; so many are left.
    pub(super) fn keep_level(&mut self, left: u32) {
        if let Self::Standing(levels) = self {
            *levels = left.min(*levels);
        }
    }

    /// The innermost savepoint was undone; so many are left.
    pub(super) fn undo_level(&mut self, left: u32) {
        if matches!(*self, Self::Standing(levels) if levels > left) {
            *self = Self::Passing;
        }
    }

    pub(super) fn matters(self) -> bool {
        self != Self::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::Transient::{self, Nothing, Passing, Standing};

    #[test]
    fn an_undone_savepoint_takes_its_failures_with_it() {
        let mut failure = Transient::default();
        failure.note(Some(2));
        failure.keep_level(1);
        assert_eq!(failure, Standing(1));
        failure.go_on();
        assert_eq!(failure, Standing(1), "a failure that nobody undid is not forgotten");
        failure.undo_level(0);
        assert_eq!(failure, Passing);
        failure.go_on();
        assert_eq!(failure, Nothing);
    }

    #[test]
    fn an_outer_failure_outlives_the_inner_savepoint() {
        let mut failure = Standing(0);
        failure.note(Some(1));
        failure.note(None);
        failure.undo_level(0);
        assert_eq!(failure, Standing(0));
    }
}
