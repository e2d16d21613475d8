//! What the program wants to be told of.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};
use crate::panic::{drop_each_catching_panics, into_panic_message};
use crate::wording::phrase;

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

/// A hook that can only panic, `|| panic!(..)`, returns the type that has no name yet.
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

type Before = Box<dyn FnOnce() -> Result<()>>;
type After = Box<dyn FnOnce()>;

/// The hooks of one session, in the order in which they were registered.
#[derive(Default)]
pub(crate) struct Hooks {
    before_commit: Vec<Before>,
    after_commit: Vec<After>,
    after_rollback: Vec<After>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({}, {}, {})", self.before_commit.len(), self.after_commit.len(), self.after_rollback.len())
    }
}

/// How many hooks there were when a savepoint was opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark(usize, usize, usize);

impl Hooks {
    pub(crate) fn before_commit<R: HookOutcome>(&mut self, hook: impl FnOnce() -> R + 'static) {
        self.before_commit.push(Box::new(move || hook().outcome()));
    }

    pub(crate) fn after_commit(&mut self, hook: impl FnOnce() + 'static) {
        self.after_commit.push(Box::new(hook));
    }

    pub(crate) fn after_rollback(&mut self, hook: impl FnOnce() + 'static) {
        self.after_rollback.push(Box::new(hook));
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.before_commit.is_empty() && self.after_commit.is_empty() && self.after_rollback.is_empty()
    }

    pub(crate) fn has_before_commit(&self) -> bool {
        !self.before_commit.is_empty()
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark(self.before_commit.len(), self.after_commit.len(), self.after_rollback.len())
    }

    /// Takes away what was registered since `mark`, for the caller to drop once nothing is borrowed: a hook may own a
    /// session.
    #[must_use]
    pub(crate) fn since(&mut self, mark: Mark) -> Self {
        Self {
            before_commit: split(&mut self.before_commit, mark.0),
            after_commit: split(&mut self.after_commit, mark.1),
            after_rollback: split(&mut self.after_rollback, mark.2),
        }
    }

    pub(crate) fn take_before_commit(&mut self) -> Vec<Before> {
        std::mem::take(&mut self.before_commit)
    }

    /// Puts back those that were taken and have not run, before those registered since.
    pub(crate) fn put_back(&mut self, hooks: impl Iterator<Item = Before>) {
        self.before_commit.splice(..0, hooks);
    }

    /// Drops hooks that do not run. What they own may panic in its drop; that is nobody's business any more.
    pub(crate) fn discard(self) {
        if self.is_empty() {
            return;
        }
        let Self { before_commit, after_commit, after_rollback } = self;
        drop_each_catching_panics(before_commit);
        drop_each_catching_panics(after_commit);
        drop_each_catching_panics(after_rollback);
    }

    /// Runs what is to run after a commit; every hook runs, the first failure is returned.
    pub(crate) fn run_after_commit(mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let hooks = std::mem::take(&mut self.after_commit);
        self.discard();
        run_all("after_commit", true, hooks)
    }

    pub(crate) fn run_after_rollback(mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let hooks = std::mem::take(&mut self.after_rollback);
        self.discard();
        run_all("after_rollback", false, hooks)
    }
}

/// Runs one `before_commit` hook.
pub(crate) fn run_before_commit(hook: Before) -> Result<()> {
    match catch_unwind(AssertUnwindSafe(hook)) {
        Ok(outcome) => outcome,
        Err(panic) => {
            Err(Error::HookFailed { hook: "before_commit", committed: false, message: into_panic_message(panic) })
        }
    }
}

fn run_all(hook: &'static str, committed: bool, hooks: Vec<After>) -> Result<()> {
    let mut first = Ok(());
    for run in hooks {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            let message = into_panic_message(panic);
            crate::wording::log_line!(warn, "diesel_session::session", "a {hook} hook panicked: {}", phrase(&message));
            if first.is_ok() {
                first = Err(Error::HookFailed { hook, committed, message });
            }
        }
    }
    first
}

fn split<T>(hooks: &mut Vec<T>, at: usize) -> Vec<T> {
    hooks.split_off(at.min(hooks.len()))
}
