//! Whether the helper threads of a server run, and whether a process was forked beside them.
//!
//! Threads do not come along in a fork, but what they were waiting in does: r2d2 and its threads sleep in queues of parking_lot
//! that are the whole process's. A new process gives the memory of the threads that it does not have to those it starts, and the
//! queues then hold what is no longer there. So a process that was forked while there were helper threads starts none. For SQLite
//! there is another reason: it keeps an account of a file's locks for the process, which is inherited although the locks are not.
//! A connection opened beside it believes in locks that nobody holds, and the parent removes the log that it writes to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use scheduled_thread_pool::ScheduledThreadPool;

use crate::process::PerProcess;

/// Groups of helper threads that run.
static RUNNING: PerProcess<AtomicUsize> = PerProcess::new();

/// Whether this process was forked from one that had helper threads.
pub(crate) fn were_inherited() -> bool {
    RUNNING.inherited().any(|running| running.load(Ordering::Acquire) > 0)
}

/// What is known of the helper threads of one server.
#[derive(Debug, Default)]
pub(crate) struct Helpers {
    pools: AtomicUsize,
    running: AtomicUsize,
}

/// Lies in the queue of the threads, and is dropped with it when the last of them has left it.
struct Mark(Arc<Helpers>);

/// No job is ever due then.
const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Helpers {
    /// Those of `threads`, which discard what is pending when they end.
    pub(super) fn of<const N: usize>(threads: [&Arc<ScheduledThreadPool>; N]) -> Arc<Self> {
        let helpers = Arc::new(Self::default());
        for threads in threads {
            helpers.running.fetch_add(1, Ordering::AcqRel);
            RUNNING.get_or_init(AtomicUsize::default).fetch_add(1, Ordering::AcqRel);
            let mark = Mark(Arc::clone(&helpers));
            threads.execute_after(NEVER, move || drop(mark));
        }
        helpers
    }

    /// By one pool more.
    pub(super) fn used(&self) {
        self.pools.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn left(&self) {
        self.pools.fetch_sub(1, Ordering::AcqRel);
    }

    /// Waits until they have ended, unless a pool uses them.
    pub(crate) fn wait_for_their_end(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let running = || self.running.load(Ordering::Acquire) > 0 && self.pools.load(Ordering::Acquire) == 0;
        while running() && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
        if let Some(running) = RUNNING.get() {
            running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
