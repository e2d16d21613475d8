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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use scheduled_thread_pool::{OnPoolDropBehavior, ScheduledThreadPool};

use crate::process::PerProcess;

/// Threads that are kept for the next pools.
const KEPT: usize = 8;

/// No job is ever due then.
const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long the end of the program waits for a connect that is under way.
const EXIT: Duration = Duration::from_secs(1);

static THREADS: PerProcess<Threads> = PerProcess::new();

#[derive(Default)]
struct Threads {
    /// Threads that run.
    running: AtomicUsize,
    /// Pools that have a thread.
    pools: AtomicUsize,
    free: Mutex<Vec<Arc<ScheduledThreadPool>>>,
}

/// The thread of one pool.
pub(super) struct PoolThread {
    thread: Option<Arc<ScheduledThreadPool>>,
    /// Connects that run on it.
    busy: Arc<AtomicUsize>,
}

/// Lies in the queue of a thread, and is dropped with the queue when the thread has ended.
struct Mark;

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(threads) = THREADS.get() {
            threads.running.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Whether this process was forked from one that had such threads.
pub(crate) fn were_inherited() -> bool {
    THREADS.inherited().any(|threads| threads.running.load(Ordering::Acquire) > 0)
}

/// Ends the threads that no pool has, and waits for their end.
pub(crate) fn end_idle_threads(limit: Duration) {
    let Some(threads) = THREADS.get() else { return };
    let deadline = Instant::now() + limit;
    threads.free.lock().clear();
    let excess = || threads.running.load(Ordering::Acquire) > threads.pools.load(Ordering::Acquire);
    while excess() && Instant::now() < deadline {
        thread::sleep(Duration::from_micros(50));
    }
}

impl PoolThread {
    pub(super) fn take() -> Self {
        let threads = THREADS.get_or_init(Threads::default);
        threads.pools.fetch_add(1, Ordering::AcqRel);
        let free = threads.free.lock().pop();
        Self { thread: Some(free.unwrap_or_else(start)), busy: Arc::default() }
    }

    pub(super) fn scheduler(&self) -> &Arc<ScheduledThreadPool> {
        self.thread.as_ref().expect("only drop takes it")
    }

    pub(super) fn busy(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.busy)
    }
}

fn start() -> Arc<ScheduledThreadPool> {
    let thread = ScheduledThreadPool::builder()
        .num_threads(1)
        .thread_name_pattern("diesel-session-{}")
        .on_drop_behavior(OnPoolDropBehavior::DiscardPendingScheduled)
        .build();
    THREADS.get_or_init(Threads::default).running.fetch_add(1, Ordering::AcqRel);
    let mark = Mark;
    thread.execute_after(NEVER, move || drop(mark));
    Arc::new(thread)
}

impl Drop for PoolThread {
    fn drop(&mut self) {
        let (Some(threads), Some(thread)) = (THREADS.get(), self.thread.take()) else { return };
        {
            let mut free = threads.free.lock();
            // A thread whose connect hangs is not given to another pool.
            if self.busy.load(Ordering::Acquire) == 0 && free.len() < KEPT {
                free.push(thread);
            }
        }
        threads.pools.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Connects under way in this process.
#[derive(Default)]
struct Connects {
    under_way: Mutex<usize>,
    ended: Condvar,
    /// `main` is returning: no connect begins any more.
    exiting: AtomicBool,
}

static CONNECTS: PerProcess<Connects> = PerProcess::new();

/// A connect under way, as long as this lives.
pub(super) struct Connect(Arc<AtomicUsize>);

/// Begins a connect. `None`: the program is ending.
///
/// While `exit` tears down the libraries that a client library uses, a connect crashes in them.
pub(super) fn begin_connect(busy: &Arc<AtomicUsize>) -> Option<Connect> {
    let connects = CONNECTS.get_or_init(Connects::default);
    let mut under_way = connects.under_way.lock();
    if connects.exiting.load(Ordering::Acquire) {
        return None;
    }
    *under_way += 1;
    busy.fetch_add(1, Ordering::AcqRel);
    Some(Connect(Arc::clone(busy)))
}

impl Drop for Connect {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
        if let Some(connects) = CONNECTS.get() {
            *connects.under_way.lock() -= 1;
            connects.ended.notify_all();
        }
    }
}

/// The end of the main thread, which waits for connects under way.
struct MainEnd(bool);

impl Drop for MainEnd {
    fn drop(&mut self) {
        let Some(connects) = CONNECTS.get().filter(|_| self.0) else { return };
        let deadline = Instant::now() + EXIT;
        let mut under_way = connects.under_way.lock();
        connects.exiting.store(true, Ordering::Release);
        while *under_way > 0 && !connects.ended.wait_until(&mut under_way, deadline).timed_out() {}
    }
}

/// The calling thread, if it is the main thread, waits at its end for connects that are under way.
pub(crate) fn guard_exit() {
    thread_local! {
        static END: MainEnd = MainEnd(thread::current().name() == Some("main"));
    }
    // A thread that is ending guards nothing any more.
    let _ = END.try_with(|_| ());
}
