//! A separate database for each test. It is created in milliseconds, and removed when the test ends, also after a
//! failure.
#![doc = include_str!("guide.md")]

mod connection_slots;
mod database_properties;
mod database_url;
mod databases;
mod fixture;
mod ledger;
mod leftovers;
mod lock_file;
mod owner;
mod pinned_connection;
mod provisioner;
mod registrar;
mod rollback_database;
mod script;
mod shared_folder;
mod sqlite_files;
mod template_contents;
mod test_app;
mod test_database;
mod test_environment;
mod test_isolation;
mod test_setup;

use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};

pub use databases::remove_templates;
pub use fixture::Fixture;
pub use ledger::assert_clean;
pub use test_app::TestApp;
pub use test_isolation::TestIsolation;
pub use test_setup::TestSetup;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::recorder::Recorder;

/// The return type of a test function: `()` or a `Result`.
pub trait TestOutcome {
    #[doc(hidden)]
    fn has_failed(&self) -> bool;
}

impl TestOutcome for () {
    fn has_failed(&self) -> bool {
        false
    }
}

impl<T, E> TestOutcome for Result<T, E> {
    fn has_failed(&self) -> bool {
        self.is_err()
    }
}

/// Runs `body` in a context of the application of a new test. [`#[diesel_session::test]`](macro@crate::test) calls this
/// function.
///
/// # Panics
/// The function panics if the application cannot be created, if `body` panics, and if a successful test leaves
/// something behind.
#[track_caller]
pub fn run<C: SessionConnection, R: TestOutcome>(setup: TestSetup<C>, body: impl FnOnce(App<C>) -> R) -> R {
    let (repeats, at) = (setup.warn_repeats, Location::caller());
    // This is not `unwrap_or_else`: a closure panics at its own location, and this panic has to be at that of the
    // caller.
    let mut test = match setup.start() {
        Ok(test) => test,
        Err(error) => panic!("{error:#}"),
    };
    let app = test.app().clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        app.enter_and_discard(at, || warn_about_repeats(repeats, || body(app.clone())))
    }));
    drop(app);
    let has_failed = outcome.as_ref().map_or(true, TestOutcome::has_failed);
    if has_failed {
        test.fail();
    }
    match test.finish() {
        Err(error) if has_failed => test_app::print_message(&format!("{error:#}")),
        Err(error) => panic!("{error:#}"),
        Ok(()) => {}
    }
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Runs `body` and then prints the statements that `body` sent more than `repeats` times.
fn warn_about_repeats<R>(repeats: Option<usize>, body: impl FnOnce() -> R) -> R {
    let Some(times) = repeats else { return body() };
    let (out, recording) = Recorder::new().run(body);
    for (statement, count) in recording.repeated(times) {
        test_app::print_message(&format!("sent {count} times, most often that is a query in a loop: {statement}"));
    }
    out
}
