//! The thread of a pool. r2d2 connects on it, and scheduled jobs run on it.
//!
//! Each pool has a thread of its own, so a connect that hangs delays no other pool. The thread of a dropped pool
//! serves a later pool.
//!
//! A fork does not copy the threads, but it copies the queues in which they wait: r2d2 and its threads sleep in queues
//! of parking_lot that belong to the whole process. The child reuses the memory of the missing threads for new
//! threads, and the queues then refer to threads that do not exist. So a process that was forked while such threads
//! existed does not start any. SQLite is another reason: it tracks a file's locks per process, and the child inherits
//! these records but not the locks. A connection that the child opens relies on locks that it does not hold, and the
//! parent removes the log to which the child writes.

use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use crate::panic::into_panic_message;
use crate::process::PerProcess;

/// The maximum number of threads that are kept for later pools.
const MAX_FREE_THREADS: usize = 8;

/// A delay after which no job is ever due.
const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The time for which the end of the program waits for a running connect.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

static THREADS: PerProcess<Threads> = PerProcess::new();

#[derive(Default)]
struct Threads {
    /// The number of running threads.
    running: AtomicUsize,
    /// The number of running threads that a pool uses or that hang in a connect for a dropped pool.
    in_use: AtomicUsize,
    free: Mutex<Vec<FreeThread>>,
}

/// A thread, and whether it hangs in a connect for a dropped pool.
type FreeThread = (Arc<ScheduledThreadPool>, Arc<AtomicBool>);

/// The thread of a pool.
pub(super) struct PoolThread {
    pub(super) scheduler: Arc<ScheduledThreadPool>,
    is_abandoned: Arc<AtomicBool>,
    /// The number of connects that are running on the thread.
    pub(super) connects_running: Arc<AtomicUsize>,
}

/// Lies in the job queue of a thread, and is dropped with the queue when the thread has ended.
struct EndMark {
    is_abandoned: Arc<AtomicBool>,
}

impl Drop for EndMark {
    fn drop(&mut self) {
        let Some(threads) = THREADS.get() else { return };
        threads.running.fetch_sub(1, Ordering::AcqRel);
        if self.is_abandoned.load(Ordering::Acquire) {
            threads.in_use.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether this process was forked from a process that had such threads.
pub(crate) fn were_inherited() -> bool {
    THREADS.inherited().any(|threads| threads.running.load(Ordering::Acquire) > 0)
}

/// Ends the threads that no pool uses, and waits until they have ended. While `is_in_use` returns `true`, a thread may
/// still be finishing a job of a dropped pool.
pub(crate) fn end_idle_threads(limit: Duration, is_in_use: impl Fn() -> bool) {
    let Some(threads) = THREADS.get() else { return };
    let deadline = Instant::now() + limit;
    let runs = || {
        threads.free.lock().clear();
        is_in_use() || threads.running.load(Ordering::Acquire) > threads.in_use.load(Ordering::Acquire)
    };
    while runs() && Instant::now() < deadline {
        thread::sleep(Duration::from_micros(50));
    }
}

impl PoolThread {
    /// Takes a free thread or starts a new one. Fails if the system cannot start a thread.
    pub(super) fn take() -> Result<Self, String> {
        let threads = THREADS.get_or_init(Threads::default);
        let free = threads.free.lock().pop();
        let (scheduler, is_abandoned) = free.map_or_else(start, Ok)?;
        threads.in_use.fetch_add(1, Ordering::AcqRel);
        Ok(Self { scheduler, is_abandoned, connects_running: Arc::default() })
    }
}

fn start() -> Result<FreeThread, String> {
    let build = || {
        ScheduledThreadPool::builder()
            .num_threads(1)
            .thread_name_pattern("diesel-session-{}")
            .on_drop_behavior(OnPoolDropBehavior::DiscardPendingScheduled)
            .build()
    };
    let thread = catch_unwind(build).map_err(into_panic_message)?;
    THREADS.get_or_init(Threads::default).running.fetch_add(1, Ordering::AcqRel);
    let is_abandoned = Arc::new(AtomicBool::new(false));
    let mark = EndMark { is_abandoned: Arc::clone(&is_abandoned) };
    thread.execute_after(NEVER, move || drop(mark));
    Ok((Arc::new(thread), is_abandoned))
}

impl Drop for PoolThread {
    fn drop(&mut self) {
        let Some(threads) = THREADS.get() else { return };
        if self.connects_running.load(Ordering::Acquire) > 0 {
            // A thread that hangs in a connect cannot serve another pool, and counts as used until it ends.
            self.is_abandoned.store(true, Ordering::Release);
            return;
        }
        let mut free = threads.free.lock();
        if free.len() < MAX_FREE_THREADS {
            free.push((Arc::clone(&self.scheduler), Arc::clone(&self.is_abandoned)));
        }
        threads.in_use.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The running connects of this process.
#[derive(Default)]
struct ConnectsInProgress {
    under_way: Mutex<usize>,
    ended: Condvar,
    /// `main` is returning, so no connect may start any more.
    exiting: AtomicBool,
}

static CONNECTS_IN_PROGRESS: PerProcess<ConnectsInProgress> = PerProcess::new();

/// A running connect. It counts until this value is dropped.
pub(super) struct ConnectInProgress(Arc<AtomicUsize>);

/// Starts a connect. Returns `None` if the program is ending.
///
/// A connect crashes in the libraries of the driver while `exit` tears them down.
pub(super) fn begin_connect(connects_running: &Arc<AtomicUsize>) -> Option<ConnectInProgress> {
    let connects = CONNECTS_IN_PROGRESS.get_or_init(ConnectsInProgress::default);
    let mut under_way = connects.under_way.lock();
    if connects.exiting.load(Ordering::Acquire) {
        return None;
    }
    *under_way += 1;
    connects_running.fetch_add(1, Ordering::AcqRel);
    Some(ConnectInProgress(Arc::clone(connects_running)))
}

impl Drop for ConnectInProgress {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
        if let Some(connects) = CONNECTS_IN_PROGRESS.get() {
            *connects.under_way.lock() -= 1;
            connects.ended.notify_all();
        }
    }
}

/// Makes the end of the main thread wait for running connects.
struct MainThreadGuard(bool);

impl Drop for MainThreadGuard {
    fn drop(&mut self) {
        let Some(connects) = CONNECTS_IN_PROGRESS.get().filter(|_| self.0) else { return };
        let deadline = Instant::now() + EXIT_TIMEOUT;
        let mut under_way = connects.under_way.lock();
        connects.exiting.store(true, Ordering::Release);
        while *under_way > 0 && !connects.ended.wait_until(&mut under_way, deadline).timed_out() {}
    }
}

/// Makes the calling thread, if it is the main thread, wait at its end for running connects.
pub(crate) fn guard_exit() {
    thread_local! {
        static END: MainThreadGuard = MainThreadGuard(thread::current().name() == Some("main"));
    }
    // A thread that is already ending cannot be guarded.
    let _ = END.try_with(|_| ());
}
