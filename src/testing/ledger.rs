//! The running tests of this process, and the leftovers of the ended tests.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Details, Result, SourceLocation};
use crate::pool::AppStatus;
use crate::session::OpenSessions;
use crate::wording::is_unprintable;

/// The maximum length of the name of a test in the id of its application, in bytes.
const MAX_NAME_BYTES: usize = 180;

struct Ledger {
    running: Vec<RunningTest>,
    /// The names of ended tests whose sessions had not all ended, with these sessions.
    ended: Vec<(String, Arc<OpenSessions>)>,
    leftovers: Vec<String>,
}

struct RunningTest {
    database: u64,
    id: String,
    /// `None` until the application is created.
    app: Option<RunningApp>,
}

struct RunningApp {
    started_at: SourceLocation,
    open_sessions: Arc<OpenSessions>,
    status: Box<dyn Fn() -> AppStatus + Send>,
}

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { running: Vec::new(), ended: Vec::new(), leftovers: Vec::new() });

/// Keeps its test in the list of running tests until it is dropped. Until then, no other test of the database object has
/// the id.
pub(super) struct LedgerEntry {
    database: u64,
    /// The id of the test's application.
    pub(super) id: String,
}

/// Checks that no test of this process is running and that no test has left anything behind. Any harness can call it at
/// the end of a suite.
///
/// # Errors
/// [`ErrorKind::TestLeftovers`](crate::ErrorKind::TestLeftovers) lists
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
    let mut ledger = LEDGER.lock();
    let mut left = Vec::new();
    for RunningTest { id, app, .. } in &ledger.running {
        let Some(RunningApp { started_at, open_sessions, status }) = app else { continue };
        left.push(format!("test `{id}`, begun at {started_at}, is not finished"));
        left.extend(describe_sessions(id, open_sessions));
        let status = status();
        left.extend(status.holders.iter().map(|holder| format!("a connection of {holder}")));
        if status.idle > 0 {
            left.push(format!("{} idle connections of test `{id}`", status.idle));
        }
    }
    left.extend(ledger.ended.iter().flat_map(|(id, open_sessions)| describe_sessions(id, open_sessions)));
    left.append(&mut ledger.leftovers);
    match left.is_empty() {
        true => Ok(()),
        false => Err(Details::TestLeftovers { who: "the tests".into(), left }.into()),
    }
}

impl LedgerEntry {
    /// Reserves an id that begins with `name`, without the characters that an application id cannot contain. If the
    /// name is in use, the id ends with a number.
    pub(super) fn new(database: u64, name: &str) -> Self {
        let name: String = name.chars().map(|c| if is_unprintable(c) { '?' } else { c }).collect();
        let end = name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= MAX_NAME_BYTES).last();
        let name = match &name[..end.unwrap_or_default()] {
            "" => "test",
            name => name,
        };
        let mut ledger = LEDGER.lock();
        let is_used = |id: &str| ledger.running.iter().any(|test| test.database == database && test.id == id);
        let mut id = name.to_owned();
        for number in 2.. {
            if !is_used(&id) {
                break;
            }
            id = format!("{name}#{number}");
        }
        ledger.running.push(RunningTest { database, id: id.clone(), app: None });
        Self { database, id }
    }

    pub(super) fn set_app<C: SessionConnection>(&self, app: &App<C>, started_at: SourceLocation) {
        let app = app.clone();
        let open_sessions = app.open_sessions().unwrap_or_default();
        let running = RunningApp { started_at, open_sessions, status: Box::new(move || app.status()) };
        let mut ledger = LEDGER.lock();
        if let Some(test) = ledger.running.iter_mut().find(|test| self.is_of(test)) {
            test.app = Some(running);
        }
    }

    /// Records the leftovers of the test, for [`assert_clean`].
    pub(super) fn record_leftovers(&self, left: &[String]) {
        LEDGER.lock().leftovers.extend(left.iter().map(|left| format!("test `{}`: {left}", self.id)));
    }

    fn is_of(&self, test: &RunningTest) -> bool {
        test.database == self.database && test.id == self.id
    }
}

impl Drop for LedgerEntry {
    fn drop(&mut self) {
        let mut ledger = LEDGER.lock();
        let Some(index) = ledger.running.iter().position(|test| self.is_of(test)) else { return };
        let ended = ledger.running.remove(index);
        ledger.ended.retain(|(_, open_sessions)| !open_sessions.sessions().is_empty());
        if let Some(app) = &ended.app
            && !app.open_sessions.sessions().is_empty()
        {
            ledger.ended.push((ended.id.clone(), Arc::clone(&app.open_sessions)));
        }
        // `ended` may own the last handle of the application, and its drop may close a pool. The ledger must not be
        // locked then.
        drop(ledger);
        drop(ended);
    }
}

fn describe_sessions(test: &str, open_sessions: &OpenSessions) -> Vec<String> {
    open_sessions.sessions().iter().map(|session| format!("{session}, of test `{test}`")).collect()
}
