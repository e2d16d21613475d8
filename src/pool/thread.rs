//! The thread of each pool: r2d2 connects on it, and what is due later is done on it.
//!
//! A pool has one thread of its own, so a connect that hangs delays no other pool. The thread of a pool that has ended serves the
//! next pool.
//!
//! Threads do not come along in a fork, but what they were waiting in does: r2d2 and its threads sleep in queues of parking_lot
//! that are the whole process's. A new process gives the memory of the threads that it does not have to those it starts, and the
//! queues then hold what is no longer there. So a process that was forked while there were such threads starts none. For SQLite
//! there is another reason: it keeps an account of a file's locks for the process, which is inherited although the locks are not.
//! A connection opened beside it believes in locks that nobody holds, and the parent removes the log that it writes to.

use std::panic::catch_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use crate::panic::into_panic_message;
use crate::process::PerProcess;

/// Threads that are kept for the next pools.
const MAX_FREE_THREADS: usize = 8;

/// No job is ever due then.
const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long the end of the program waits for a connect that is under way.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

static THREADS: PerProcess<Threads> = PerProcess::new();

#[derive(Default)]
struct Threads {
    /// Threads that run.
    running: AtomicUsize,
    /// Of these, threads whose connect hangs, and that no pool has any more.
    abandoned: AtomicUsize,
    /// Pools that have a thread.
    pools: AtomicUsize,
    free: Mutex<Vec<FreeThread>>,
}

/// A thread, and whether it is abandoned.
type FreeThread = (Arc<ScheduledThreadPool>, Arc<AtomicBool>);

/// The thread of one pool.
pub(super) struct PoolThread {
    thread: Option<Arc<ScheduledThreadPool>>,
    is_abandoned: Arc<AtomicBool>,
    /// ConnectsInProgress that run on it.
    connects_running: Arc<AtomicUsize>,
}

/// Lies in the queue of a thread, and is dropped with the queue when the thread has ended.
struct EndMark {
    is_abandoned: Arc<AtomicBool>,
}

impl Drop for EndMark {
    fn drop(&mut self) {
        let Some(threads) = THREADS.get() else { return };
        threads.running.fetch_sub(1, Ordering::AcqRel);
        if self.is_abandoned.load(Ordering::Acquire) {
            threads.abandoned.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether this process was forked from one that had such threads.
pub(crate) fn were_inherited() -> bool {
    THREADS.inherited().any(|threads| threads.running.load(Ordering::Acquire) > 0)
}

/// Ends the threads that no pool has, and waits for their end. A thread may still be at the end of a job of a pool that `is_in_use`.
pub(crate) fn end_idle_threads(limit: Duration, is_in_use: impl Fn() -> bool) {
    let Some(threads) = THREADS.get() else { return };
    let deadline = Instant::now() + limit;
    let runs = || {
        threads.free.lock().clear();
        let others = threads.pools.load(Ordering::Acquire) + threads.abandoned.load(Ordering::Acquire);
        is_in_use() || threads.running.load(Ordering::Acquire) > others
    };
    while runs() && Instant::now() < deadline {
        thread::sleep(Duration::from_micros(50));
    }
}

impl PoolThread {
    /// A thread that is free, or a new one. An error if the system has no thread to give.
    pub(super) fn take() -> Result<Self, String> {
        let threads = THREADS.get_or_init(Threads::default);
        let free = threads.free.lock().pop();
        let (thread, is_abandoned) = match free {
            Some(free) => free,
            None => start()?,
        };
        threads.pools.fetch_add(1, Ordering::AcqRel);
        Ok(Self { thread: Some(thread), is_abandoned, connects_running: Arc::default() })
    }

    pub(super) fn scheduler(&self) -> &Arc<ScheduledThreadPool> {
        self.thread.as_ref().expect("only drop takes it")
    }

    pub(super) fn connects_running(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.connects_running)
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
        let (Some(threads), Some(thread)) = (THREADS.get(), self.thread.take()) else { return };
        if self.connects_running.load(Ordering::Acquire) > 0 {
            // A thread whose connect hangs is not given to another pool.
            threads.abandoned.fetch_add(1, Ordering::AcqRel);
            self.is_abandoned.store(true, Ordering::Release);
        } else {
            let mut free = threads.free.lock();
            if free.len() < MAX_FREE_THREADS {
                free.push((thread, Arc::clone(&self.is_abandoned)));
            }
        }
        threads.pools.fetch_sub(1, Ordering::AcqRel);
    }
}

/// ConnectsInProgress under way in this process.
#[derive(Default)]
struct ConnectsInProgress {
    under_way: Mutex<usize>,
    ended: Condvar,
    /// `main` is returning: no connect begins any more.
    exiting: AtomicBool,
}

static CONNECTS_IN_PROGRESS: PerProcess<ConnectsInProgress> = PerProcess::new();

/// A connect under way, as long as this lives.
pub(super) struct ConnectInProgress(Arc<AtomicUsize>);

/// Begins a connect. `None`: the program is ending.
///
/// While `exit` tears down the libraries that a client library uses, a connect crashes in them.
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

/// The end of the main thread, which waits for connects under way.
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

/// The calling thread, if it is the main thread, waits at its end for connects that are under way.
pub(crate) fn guard_exit() {
    thread_local! {
        static END: MainThreadGuard = MainThreadGuard(thread::current().name() == Some("main"));
    }
    // A thread that is ending guards nothing any more.
    let _ = END.try_with(|_| ());
}
