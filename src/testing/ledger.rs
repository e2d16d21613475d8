//! Which tests of this process are under way, and what those that have ended have left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::pool::AppStatus;
use crate::session::OpenSessions;

/// What is known, in the order in which it came about.
struct Ledger {
    next: u64,
    running: Vec<Running>,
    /// Of tests that have ended, with sessions that had not.
    ended: Vec<(String, Arc<OpenSessions>)>,
    left: Vec<String>,
}

struct Running {
    number: u64,
    test: String,
    place: Place,
    roll: Arc<OpenSessions>,
    status: Box<dyn Fn() -> AppStatus + Send>,
}

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { next: 0, running: Vec::new(), ended: Vec::new(), left: Vec::new() });

/// A test that is under way, as long as it lives.
pub(super) struct TrackedRow(u64);

/// Makes sure that no test of this process is under way, and that none has left anything: for the end of a suite, in whatever harness.
///
/// # Errors
/// [`Error::TestLeftovers`] lists every [`TestApp`](super::TestApp) that has not been finished, with where it was made;
/// every session of a test that has not ended, with where it was opened; connections and transactions, with the statements that took them
/// and their threads; and the databases that tests could not remove. A second call lists the latter no more.
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
    for Running { test, place, status, roll, .. } in &ledger.running {
        left.push(format!("test `{test}`, begun at {place}, is not finished"));
        left.extend(sessions(test, roll));
        let status = status();
        left.extend(status.holders.iter().map(|holder| format!("a connection of {holder}")));
        if status.idle > 0 {
            left.push(format!("{} idle connections of test `{test}`", status.idle));
        }
    }
    left.extend(ledger.ended.iter().flat_map(|(test, roll)| sessions(test, roll)));
    left.append(&mut ledger.left);
    match left.is_empty() {
        true => Ok(()),
        false => Err(Error::TestLeftovers { who: "the tests".into(), left }),
    }
}

pub(super) fn enter<C: SessionConnection>(test: &str, place: Place, app: &App<C>) -> TrackedRow {
    let mut ledger = ledger();
    ledger.next += 1;
    let (number, app) = (ledger.next, app.clone());
    let roll = app.open_sessions().unwrap_or_default();
    ledger.running.push(Running { number, test: test.into(), place, roll, status: Box::new(move || app.status()) });
    TrackedRow(number)
}

/// Remembers what a test has left.
pub(super) fn note(who: &str, left: &[String]) {
    ledger().left.extend(left.iter().map(|left| format!("{who}: {left}")));
}

impl Drop for TrackedRow {
    fn drop(&mut self) {
        let mut ledger = ledger();
        let Some(at) = ledger.running.iter().position(|running| running.number == self.0) else { return };
        let Running { test, roll, status, .. } = ledger.running.remove(at);
        ledger.ended.retain(|(_, roll)| !roll.sessions().is_empty());
        if !roll.sessions().is_empty() {
            ledger.ended.push((test, roll));
        }
        // The last handle of an application may end a pool.
        drop(ledger);
        drop(status);
    }
}

fn sessions(test: &str, roll: &OpenSessions) -> Vec<String> {
    roll.sessions().iter().map(|session| format!("{session}, of test `{test}`")).collect()
}

fn ledger() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(PoisonError::into_inner)
}
