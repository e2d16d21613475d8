//! Which tests of this process are under way, and what those that have ended have left.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::pool::AppStatus;

/// What is known, in the order in which it came about.
struct Ledger {
    next: u64,
    running: Vec<Running>,
    left: Vec<String>,
}

struct Running {
    number: u64,
    test: String,
    place: Place,
    status: Box<dyn Fn() -> AppStatus + Send>,
}

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { next: 0, running: Vec::new(), left: Vec::new() });

/// A test that is under way, as long as it lives.
pub(super) struct Entry(u64);

/// Makes sure that no test of this process is under way, and that none has left anything: for the end of a suite, in whatever harness.
///
/// # Errors
/// [`Error::TestLeftovers`] lists every [`TestApp`](super::TestApp) that has not been finished, with where it was made; the
/// connections and transactions that it has, with the statements that took them and their threads; and what tests that have ended
/// could not remove. A second call lists the latter no more.
///
/// ```
/// # fn teardown() -> diesel_session::Result<()> {
/// diesel_session::testing::assert_clean()
/// # }
/// # teardown()?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
pub fn assert_clean() -> Result<()> {
    let mut ledger = ledger();
    let mut left = Vec::new();
    for Running { test, place, status, .. } in &ledger.running {
        left.push(format!("test `{test}`, begun at {place}, is not finished"));
        let status = status();
        left.extend(status.holders.iter().map(|holder| format!("a connection of {holder}")));
        if status.idle > 0 {
            left.push(format!("{} idle connections of test `{test}`", status.idle));
        }
    }
    left.append(&mut ledger.left);
    match left.is_empty() {
        true => Ok(()),
        false => Err(Error::TestLeftovers { who: "the tests".into(), left }),
    }
}

pub(super) fn enter<C: SessionConnection>(test: &str, place: Place, app: &App<C>) -> Entry {
    let mut ledger = ledger();
    ledger.next += 1;
    let (number, app) = (ledger.next, app.clone());
    ledger.running.push(Running { number, test: test.into(), place, status: Box::new(move || app.status()) });
    Entry(number)
}

/// Remembers what a test has left.
pub(super) fn note(who: &str, left: &[String]) {
    ledger().left.extend(left.iter().map(|left| format!("{who}: {left}")));
}

impl Drop for Entry {
    fn drop(&mut self) {
        ledger().running.retain(|running| running.number != self.0);
    }
}

fn ledger() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(PoisonError::into_inner)
}
