//! The running tests of this process, and the leftovers of the ended tests.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::pool::AppStatus;
use crate::session::OpenSessions;

struct Ledger {
    last_number: u64,
    running: Vec<RunningTest>,
    /// The names of ended tests whose sessions had not all ended, with these sessions.
    ended: Vec<(String, Arc<OpenSessions>)>,
    leftovers: Vec<String>,
}

struct RunningTest {
    number: u64,
    test: String,
    started_at: Place,
    open_sessions: Arc<OpenSessions>,
    status: Box<dyn Fn() -> AppStatus + Send>,
}

static LEDGER: Mutex<Ledger> =
    Mutex::new(Ledger { last_number: 0, running: Vec::new(), ended: Vec::new(), leftovers: Vec::new() });

/// Keeps its test in the list of running tests until it is dropped.
pub(super) struct LedgerEntry(u64);

/// Checks that no test of this process is running and that no test has left anything behind. Any harness can call it at
/// the end of a suite.
///
/// # Errors
/// [`Error::TestLeftovers`] lists
///
/// * each [`TestApp`](super::TestApp) that is not finished, with the location at which it was created;
/// * each session of a test that has not ended, with the location at which it was opened;
/// * connections and transactions, with the statements that checked them out and their threads;
/// * the databases that tests could not remove. A second call does not list them again.
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
    for RunningTest { test, started_at, status, open_sessions, .. } in &ledger.running {
        left.push(format!("test `{test}`, begun at {started_at}, is not finished"));
        left.extend(describe_sessions(test, open_sessions));
        let status = status();
        left.extend(status.holders.iter().map(|holder| format!("a connection of {holder}")));
        if status.idle > 0 {
            left.push(format!("{} idle connections of test `{test}`", status.idle));
        }
    }
    left.extend(ledger.ended.iter().flat_map(|(test, open_sessions)| describe_sessions(test, open_sessions)));
    left.append(&mut ledger.leftovers);
    match left.is_empty() {
        true => Ok(()),
        false => Err(Error::TestLeftovers { who: "the tests".into(), left }),
    }
}

pub(super) fn record_start<C: SessionConnection>(test: &str, started_at: Place, app: &App<C>) -> LedgerEntry {
    let mut ledger = ledger();
    ledger.last_number += 1;
    let (number, app) = (ledger.last_number, app.clone());
    let open_sessions = app.open_sessions().unwrap_or_default();
    ledger.running.push(RunningTest {
        number,
        test: test.into(),
        started_at,
        open_sessions,
        status: Box::new(move || app.status()),
    });
    LedgerEntry(number)
}

/// Records the leftovers of a test, for [`assert_clean`].
pub(super) fn record_leftovers(test: &str, left: &[String]) {
    ledger().leftovers.extend(left.iter().map(|left| format!("{test}: {left}")));
}

impl Drop for LedgerEntry {
    fn drop(&mut self) {
        let mut ledger = ledger();
        let Some(index) = ledger.running.iter().position(|running| running.number == self.0) else { return };
        let RunningTest { test, open_sessions, status, .. } = ledger.running.remove(index);
        ledger.ended.retain(|(_, open_sessions)| !open_sessions.sessions().is_empty());
        if !open_sessions.sessions().is_empty() {
            ledger.ended.push((test, open_sessions));
        }
        // `status` may own the last handle of the application, and its drop may close a pool. The ledger must not be
        // locked then.
        drop(ledger);
        drop(status);
    }
}

fn describe_sessions(test: &str, open_sessions: &OpenSessions) -> Vec<String> {
    open_sessions.sessions().iter().map(|session| format!("{session}, of test `{test}`")).collect()
}

fn ledger() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(PoisonError::into_inner)
}
