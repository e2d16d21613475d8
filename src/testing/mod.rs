//! A database for every test: made in milliseconds, gone when the test has ended in whatever way.
#![doc = include_str!("guide.md")]

mod address;
mod content;
mod databases;
mod environment;
mod files;
mod fixture;
mod folder;
mod isolation;
mod ledger;
mod leftovers;
mod lock_file;
mod names;
mod owner;
mod pinned_connections;
mod queue;
mod registrar;
mod script;
mod setup;
mod slots;
mod surroundings;
mod test_app;
mod test_database;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

pub use databases::{create_database, drop_database, remove_templates};
pub use fixture::Fixture;
pub use isolation::TestIsolation;
pub use ledger::assert_clean;
pub use setup::TestSetup;
pub use test_app::TestApp;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::recorder::Recorder;

/// What a test function returns: nothing, or a `Result`.
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

/// Runs `body` in a context of a test's application: what [`#[diesel_session::test]`](macro@crate::test) does with a function.
///
/// # Panics
/// Where the application cannot be made, where `body` panics, and where a test that succeeded has left something.
#[track_caller]
pub fn run<C: SessionConnection, R: TestOutcome>(setup: TestSetup<C>, body: impl FnOnce(App<C>) -> R) -> R {
    let repeats = setup.warn_repeats;
    // Not in closures: what is said there is said of their own place, here of the test's.
    let mut test = match setup.start() {
        Ok(test) => test,
        Err(error) => panic!("{error}"),
    };
    let app = test.app().clone();
    let outcome = catch_unwind(AssertUnwindSafe(|| app.context(|| watched(repeats, || body(app.clone())))));
    drop(app);
    if !matches!(&outcome, Ok(outcome) if !outcome.has_failed()) {
        test.fail();
        if let Err(error) = test.finish() {
            test_app::say(&error.to_string());
        }
        return outcome.unwrap_or_else(|panic| resume_unwind(panic));
    }
    if let Err(error) = test.finish() {
        panic!("{error}");
    }
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Says at the end what was sent more often than it should.
fn watched<R>(repeats: Option<usize>, body: impl FnOnce() -> R) -> R {
    let Some(times) = repeats else { return body() };
    let (out, recording) = Recorder::new().run(body);
    for (statement, count) in recording.repeated(times) {
        test_app::say(&format!("sent {count} times, most often that is a query in a loop: {statement}"));
    }
    out
}
