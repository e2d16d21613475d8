//! The helper threads of one database server, shared by all applications on it.
//!
//! Every driver call that may hang without a statement of the caller's own (connecting, and the sign of life asked of an
//! idle connection) runs here, so that the caller can leave at its own deadline. At most [`HELPERS`] calls can hang per
//! server; from then on that server fails fast, and other servers notice nothing.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use super::budget::Budget;
use super::helpers::Helpers;
use super::outage::Presence;
use crate::process::PerProcess;

/// Helper threads per server, and so the number of calls that may hang there.
pub(crate) const HELPERS: usize = 4;

/// One database server as this process sees it. It lives while a pool uses it; then its threads end.
pub(crate) struct Server {
    threads: Arc<ScheduledThreadPool>,
    /// Where r2d2 makes empty slots: never in a line behind what may hang.
    slot_maker: Arc<ScheduledThreadPool>,
    helpers: Arc<Helpers>,
    running: Mutex<HashMap<u64, Instant>>,
    next: AtomicU64,
    room: Arc<Budget>,
    presence: Presence,
    census: Mutex<Option<Census>>,
    /// The connections an ordinary role may have there; 0 where that is not known.
    capacity: AtomicUsize,
    /// What it says it is; the same server may have another name.
    instance: Mutex<Option<String>>,
}

/// Who had the server at one moment.
struct Census {
    taken: Instant,
    occupants: Vec<String>,
}

/// How long one idle connection has for the answer to a question about its server, and all of them together.
const ASKING: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(600));

/// A census is taken again when a connection is opened after that time.
const CENSUS_AGE: Duration = Duration::from_secs(1);

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

static SERVERS: PerProcess<Mutex<HashMap<String, Weak<Server>>>> = PerProcess::new();

/// A driver call under way.
#[derive(Debug)]
pub(crate) struct Running<'s> {
    server: &'s Server,
    number: u64,
}

thread_local! {
    static HELPS: Cell<bool> = const { Cell::new(false) };
}

/// This is a helper thread, and will be one until it ends.
pub(super) fn begins_to_help() {
    HELPS.set(true);
}

/// Whether this is a helper thread, of whatever server.
pub(super) fn is_helper() -> bool {
    HELPS.get()
}

impl Server {
    /// The server of that name; two pools with equal names share it. A process that was forked has others than its parent, whose
    /// threads it does not have.
    pub(crate) fn named(name: &str) -> Arc<Self> {
        let mut servers = SERVERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(name).and_then(Weak::upgrade) {
            return server;
        }
        servers.retain(|_, server| server.strong_count() > 0);
        let made = |number: usize, names: &str| {
            let threads = ScheduledThreadPool::builder().num_threads(number).thread_name_pattern(names);
            Arc::new(threads.on_drop_behavior(OnPoolDropBehavior::DiscardPendingScheduled).build())
        };
        let (threads, slot_maker) = (made(HELPERS, "diesel-session-{}"), made(1, "diesel-session-slots"));
        let server = Arc::new(Self {
            helpers: Helpers::of([&threads, &slot_maker]),
            threads,
            slot_maker,
            running: Mutex::default(),
            next: AtomicU64::new(0),
            room: Arc::new(Budget::new(None, super::waits())),
            presence: Presence::default(),
            census: Mutex::default(),
            capacity: AtomicUsize::new(0),
            instance: Mutex::default(),
        });
        servers.insert(name.to_owned(), Arc::downgrade(&server));
        server
    }

    pub(super) fn helpers(&self) -> &Arc<Helpers> {
        &self.helpers
    }

    pub(crate) fn threads(&self) -> &Arc<ScheduledThreadPool> {
        &self.threads
    }

    pub(super) fn slot_maker(&self) -> &Arc<ScheduledThreadPool> {
        &self.slot_maker
    }

    /// The connections to it of this whole process, and who waits for one.
    pub(super) fn room(&self) -> &Arc<Budget> {
        &self.room
    }

    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    /// What an idle connection of this process answers, if there is one that does before `deadline`. Several that are frozen are
    /// not waited for one after the other for long.
    pub(super) fn ask(&self, question: &str, deadline: Instant) -> Option<Vec<String>> {
        let deadline = deadline.min(Instant::now() + ASKING.1);
        for (_, resident) in self.room.residents() {
            let patience = ASKING.0.min(deadline.saturating_duration_since(Instant::now()));
            if patience.is_zero() {
                return None;
            }
            if let Some(answer) = resident.ask(question, patience) {
                return Some(answer);
            }
        }
        None
    }

    /// It has told what it is.
    pub(super) fn is_instance(&self, instance: &str) {
        let mut known = self.instance();
        if known.as_deref() != Some(instance) {
            *known = Some(instance.to_owned());
        }
    }

    /// This server under all the names that it has in this process.
    pub(super) fn under_all_names(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let Some(instance) = self.instance().clone() else { return vec![Arc::clone(self)] };
        let servers: Vec<_> = {
            let servers = SERVERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            servers.values().filter_map(Weak::upgrade).collect()
        };
        servers.into_iter().filter(|server| server.instance().as_ref() == Some(&instance)).collect()
    }

    fn instance(&self) -> MutexGuard<'_, Option<String>> {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It lets an ordinary role have so many connections.
    pub(super) fn allows(&self, capacity: usize) {
        self.capacity.store(capacity, Ordering::Relaxed);
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn census_is_old(&self) -> bool {
        self.census().as_ref().is_none_or(|census| census.taken.elapsed() > CENSUS_AGE)
    }

    pub(super) fn note_census(&self, occupants: Vec<String>) {
        *self.census() = Some(Census { taken: Instant::now(), occupants });
    }

    /// A sentence on who has the server.
    pub(super) fn occupants(&self) -> String {
        let (mine, holders) = (self.room.open(), self.room.holders());
        let held = if holders.is_empty() { String::new() } else { format!(", held: {holders}") };
        match &*self.census() {
            Some(Census { taken, occupants }) => format!(
                ". This process has {mine} connections there{held}. Asked {:.1?} ago, the server had: {}",
                taken.elapsed(),
                occupants.join(", ")
            ),
            None => format!(". This process has {mine} connections there{held}, and could not ask who has the others"),
        }
    }

    fn census(&self) -> MutexGuard<'_, Option<Census>> {
        self.census.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `job` on a helper thread. One that is on a helper thread already, in a hook of the program that uses another database
    /// object, runs it at once: all of them may wait for such a job.
    pub(super) fn help(&self, job: impl FnOnce() + Send + 'static) {
        if is_helper() {
            return job();
        }
        self.threads.execute(move || {
            begins_to_help();
            job();
        });
    }

    /// Records a driver call until the returned value is dropped.
    pub(crate) fn call(&self) -> Running<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Instant::now());
        Running { server: self, number }
    }

    /// Whether every helper has been in one call for longer than `patience`, so that asking is useless.
    pub(crate) fn is_stuck(&self, patience: Duration) -> bool {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.values().filter(|since| since.elapsed() > patience).count() >= HELPERS
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.server.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}
