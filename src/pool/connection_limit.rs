//! The limit on the connections that several pools have together, and the eviction of an idle connection of one pool
//! for another.
//!
//! Each database server has a [`ConnectionLimit`] without a number, because only the server knows its limit. A
//! `Database` with `max_connections` has a limit with a number. An open connection holds a [`LimitPermit`] of each
//! limit until it is closed. A pool that gets no permit joins the queue, in the order in which the callers began to
//! wait. The limit then evicts an idle connection of the least recently used pool. A connection that is checked out is
//! never evicted.
//!
//! No wake-up is lost: a pool joins the queue before it looks for an idle connection, and a checkin makes the
//! connection idle before it looks at the queue.
//!
//! Lock order: `pools`, then the state of a pool, then `state`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::{Holder, Holders};
use crate::sync::{AtomicUsize, Instant, Mutex, Ordering, ThreadId};

/// A pool as seen by the other pools under the same limit.
pub(crate) trait EvictablePool: Send + Sync {
    /// The time of the last checkout. `None` if the pool has no idle connection to evict.
    fn idle_since(&self) -> Option<Instant>;

    /// Closes an idle connection. Returns `false` if there is none any more.
    fn evict(self: Arc<Self>) -> bool;

    /// Hands over a permit for which this pool is in the queue.
    fn accept_permit(&self, permit: LimitPermit);

    /// The rows of `sql` on an idle connection. `None` if no connection is idle, or if it has not answered within
    /// `timeout`.
    fn query_idle(&self, sql: &str, timeout: Duration) -> Option<Vec<String>>;

    /// The holders of the connections.
    fn holders(&self) -> Holders;

    /// The number of open connections.
    fn open(&self) -> usize;

    /// The threads that hold the connections. `None` if a connection is idle or a connect is running.
    fn holding_threads(&self) -> Option<Vec<ThreadId>>;

    /// The session ids of the open connections on the server, with the holders of the connections.
    fn sessions(&self) -> Vec<(u64, Option<Holder>)>;

    /// Whether the pool has no connection and no running connect.
    fn is_empty(&self) -> bool;
}

/// A limit on the connections that several pools have together.
pub(crate) struct ConnectionLimit {
    /// `None` if only the server knows the limit.
    pub(crate) limit: Option<usize>,
    state: Mutex<LimitState>,
    /// The length of the queue.
    queued: AtomicUsize,
    /// The pools that have or open a connection, by their numbers.
    pools: Mutex<BTreeMap<u64, Weak<dyn EvictablePool>>>,
}

#[derive(Default)]
struct LimitState {
    taken: usize,
    /// The number of connections that are being closed for pools in the queue.
    evicting: usize,
    queue: VecDeque<QueuedPool>,
}

struct QueuedPool {
    number: u64,
    since: Instant,
    pool: Weak<dyn EvictablePool>,
}

/// A permit for one open connection. Drop releases it.
pub(crate) struct LimitPermit(Arc<ConnectionLimit>);

impl LimitPermit {
    pub(crate) fn is_of(&self, limit: &Arc<ConnectionLimit>) -> bool {
        Arc::ptr_eq(&self.0, limit)
    }

    /// Whether a pool waits for a permit, or the number of permits is limited.
    pub(crate) fn is_contended(&self) -> bool {
        self.0.limit.is_some() || self.0.has_queue()
    }
}

impl ConnectionLimit {
    pub(crate) fn new(limit: Option<usize>) -> Self {
        Self { limit, state: Mutex::default(), queued: AtomicUsize::new(0), pools: Mutex::default() }
    }

    /// The number of permits of open connections and running connects.
    pub(crate) fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// Acquires a permit if the limit has no number, or if a permit is free and the queue is empty. Otherwise, and if the
    /// server has refused another session, the pool joins the queue at the position of `since`.
    pub(crate) fn acquire_or_enqueue(
        self: &Arc<Self>,
        number: u64,
        since: Instant,
        pool: &Weak<dyn EvictablePool>,
        is_refused: bool,
    ) -> Option<LimitPermit> {
        let mut state = self.state.lock();
        if !is_refused && self.limit.is_none_or(|limit| state.taken < limit && state.queue.is_empty()) {
            state.taken += 1;
            return Some(LimitPermit(Arc::clone(self)));
        }
        let position = state.queue.partition_point(|other| other.since <= since);
        state.queue.insert(position, QueuedPool { number, since, pool: Weak::clone(pool) });
        self.queued.fetch_add(1, Ordering::SeqCst);
        None
    }

    /// Removes a pool from the queue.
    pub(crate) fn leave_queue(&self, number: u64) {
        let mut state = self.state.lock();
        let before = state.queue.len();
        state.queue.retain(|queued| queued.number != number);
        self.queued.fetch_sub(before - state.queue.len(), Ordering::SeqCst);
    }

    /// Whether a pool is in the queue.
    #[inline]
    pub(crate) fn has_queue(&self) -> bool {
        self.queued.load(Ordering::SeqCst) > 0
    }

    /// Whether the first pool in the queue is another one whose caller has waited since before `since`.
    pub(crate) fn prefers_another(&self, number: u64, since: Option<Instant>) -> bool {
        let state = self.state.lock();
        state.queue.front().is_some_and(|first| first.number != number && since.is_none_or(|since| first.since < since))
    }

    /// Evicts one idle connection for each pool in the queue, as long as there are idle connections. A pool never
    /// evicts a connection of its own, because its first waiter is notified of it.
    pub(crate) fn evict_for_queue(&self) {
        loop {
            let queued: Vec<u64> = {
                let state = self.state.lock();
                state.queue.iter().skip(state.evicting).map(|queued| queued.number).collect()
            };
            let idle = queued.into_iter().find_map(|number| self.least_recently_used(number));
            let Some((_, pool)) = idle else { return };
            {
                let mut state = self.state.lock();
                if state.queue.len() <= state.evicting {
                    return;
                }
                state.evicting += 1;
            }
            pool.evict();
            self.state.lock().evicting -= 1;
        }
    }

    /// The least recently used pool with an idle connection, except for the pool with the number `except`.
    pub(crate) fn least_recently_used(&self, except: u64) -> Option<(Instant, Arc<dyn EvictablePool>)> {
        let others = self.pools().into_iter().filter(|(number, _)| *number != except);
        let idle = others.filter_map(|(_, pool)| Some((pool.idle_since()?, pool)));
        idle.min_by_key(|(since, _)| *since)
    }

    /// The pools that have or open a connection.
    pub(crate) fn pools(&self) -> Vec<(u64, Arc<dyn EvictablePool>)> {
        let pools = self.pools.lock();
        pools.iter().filter_map(|(number, pool)| Some((*number, pool.upgrade()?))).collect()
    }

    pub(crate) fn register(&self, number: u64, pool: &Weak<dyn EvictablePool>) {
        self.pools.lock().entry(number).or_insert_with(|| Weak::clone(pool));
    }

    /// Removes a pool if it is empty. The check runs under the lock of [`register`](Self::register), which a pool
    /// calls before it connects.
    pub(crate) fn unregister_if_empty(&self, number: u64) {
        let mut pools = self.pools.lock();
        let pool = pools.get(&number).map(Weak::upgrade);
        if pool.as_ref().is_some_and(|pool| pool.as_ref().is_none_or(|pool| pool.is_empty())) {
            pools.remove(&number);
        }
        drop(pools);
        // Not under the lock, because this may be the last reference to the pool.
        drop(pool);
    }

    /// The holders of the connections of all pools under this limit.
    pub(crate) fn holders(&self) -> Holders {
        Holders::new(self.pools().into_iter().flat_map(|(_, pool)| pool.holders().0).collect())
    }

    /// The threads that hold all of these connections. `None` if a permit is free, a connect is running, or a
    /// connection is idle.
    pub(crate) fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        let taken = self.taken();
        if self.limit.is_none_or(|limit| taken < limit) {
            return None;
        }
        let mut threads = Vec::new();
        for (_, pool) in self.pools() {
            threads.extend(pool.holding_threads()?);
        }
        // A thread may hold several connections.
        (taken <= threads.len()).then_some(threads)
    }

    /// A connection was closed, or a connect has failed.
    fn release(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.taken -= 1;
        let first = match self.limit {
            Some(limit) if state.taken >= limit => None,
            _ => state.queue.pop_front(),
        };
        let Some(first) = first else { return };
        self.queued.fetch_sub(1, Ordering::SeqCst);
        state.taken += 1;
        drop(state);
        let permit = LimitPermit(Arc::clone(self));
        if let Some(pool) = first.pool.upgrade() {
            pool.accept_permit(permit);
        }
    }
}

impl Drop for LimitPermit {
    fn drop(&mut self) {
        self.0.release();
    }
}
