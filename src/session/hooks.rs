//! The hooks that a session runs around commit and rollback.

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

type BeforeCommitHook = Box<dyn FnOnce() -> Result<()>>;
type AfterHook = Box<dyn FnOnce()>;

/// The hooks of one session, in the order of their registration.
#[derive(Default)]
pub(crate) struct Hooks {
    before_commit: Vec<BeforeCommitHook>,
    after_commit: Vec<AfterHook>,
    after_rollback: Vec<AfterHook>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({}, {}, {})", self.before_commit.len(), self.after_commit.len(), self.after_rollback.len())
    }
}

/// The numbers of registered hooks at some moment, such as the start of a savepoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HookMark(usize, usize, usize);

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

    pub(crate) fn mark(&self) -> HookMark {
        HookMark(self.before_commit.len(), self.after_commit.len(), self.after_rollback.len())
    }

    /// Removes the hooks that were registered since `mark`. The caller drops them when nothing is borrowed, because a
    /// hook may own a session.
    #[must_use]
    pub(crate) fn split_off(&mut self, mark: HookMark) -> Self {
        Self {
            before_commit: split_off_at(&mut self.before_commit, mark.0),
            after_commit: split_off_at(&mut self.after_commit, mark.1),
            after_rollback: split_off_at(&mut self.after_rollback, mark.2),
        }
    }

    pub(crate) fn take_before_commit(&mut self) -> Vec<BeforeCommitHook> {
        std::mem::take(&mut self.before_commit)
    }

    /// Puts hooks back that were taken and have not run, before those that were registered since.
    pub(crate) fn put_back(&mut self, hooks: impl Iterator<Item = BeforeCommitHook>) {
        self.before_commit.splice(..0, hooks);
    }

    /// Drops hooks that do not run. A panic of a value that a hook owns is contained.
    pub(crate) fn discard(self) {
        if self.is_empty() {
            return;
        }
        let Self { before_commit, after_commit, after_rollback } = self;
        drop_each_catching_panics(before_commit);
        drop_each_catching_panics(after_commit);
        drop_each_catching_panics(after_rollback);
    }

    /// Runs the `after_commit` hooks and drops the other hooks. Every hook runs; the first failure is returned.
    pub(crate) fn run_after_commit(mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let hooks = std::mem::take(&mut self.after_commit);
        self.discard();
        run_all("after_commit", true, hooks)
    }

    /// Runs the `after_rollback` hooks and drops the other hooks. Every hook runs; the first failure is returned.
    pub(crate) fn run_after_rollback(mut self) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let hooks = std::mem::take(&mut self.after_rollback);
        self.discard();
        run_all("after_rollback", false, hooks)
    }
}

pub(crate) fn run_before_commit(hook: BeforeCommitHook) -> Result<()> {
    match catch_unwind(AssertUnwindSafe(hook)) {
        Ok(outcome) => outcome,
        Err(panic) => {
            Err(Error::HookFailed { hook: "before_commit", committed: false, message: into_panic_message(panic) })
        }
    }
}

fn run_all(hook: &'static str, committed: bool, hooks: Vec<AfterHook>) -> Result<()> {
    let mut outcome = Ok(());
    for run in hooks {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            let message = into_panic_message(panic);
            crate::wording::log_line!(warn, "diesel_session::session", "a {hook} hook panicked: {}", phrase(&message));
            if outcome.is_ok() {
                outcome = Err(Error::HookFailed { hook, committed, message });
            }
        }
    }
    outcome
}

fn split_off_at<T>(hooks: &mut Vec<T>, at: usize) -> Vec<T> {
    hooks.split_off(at.min(hooks.len()))
}
