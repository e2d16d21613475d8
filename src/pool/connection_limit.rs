//! How many connections several pools may have together, and which of them closes one for another.
//!
//! Each database server has a [`ConnectionLimit`] without a number, because only the server knows its limit. A `Database` with
//! `max_connections` has one with a number. An open connection holds a [`LimitPermit`] of each until it is closed. A pool without a
//! permit queues, in the order in which its callers began to wait. An idle connection is evicted for it: one of the least recently
//! used pool. A connection that is checked out is never evicted.
//!
//! No wake-up is lost: a pool queues before it looks for an idle connection, and a connection that is checked in is idle before
//! its holder looks at the queue.
//!
//! Lock order: `pools`, the state of a pool, `state`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::{Holder, Holders};
use crate::sync::{AtomicUsize, Instant, Mutex, Ordering, ThreadId};

/// A pool, as the pools see it that share a limit with it.
pub(crate) trait EvictablePool: Send + Sync {
    /// When the pool last checked out a connection. `None` if it has no idle connection to evict.
    fn idle_since(&self) -> Option<Instant>;

    /// Closes an idle connection. `false` if there is none any more.
    fn evict(self: Arc<Self>) -> bool;

    /// A permit has become free for which this pool has queued.
    fn accept_permit(&self, permit: LimitPermit);

    /// The rows that an idle connection answers. `None` if there is no idle connection, or no answer within `patience`.
    fn query_idle(&self, sql: &str, timeout: Duration) -> Option<Vec<String>>;

    /// The holders of its connections.
    fn holders(&self) -> Holders;

    /// The number of its open connections.
    fn open(&self) -> usize;

    /// The threads that hold its connections. `None` if one of its connections is idle or on its way.
    fn holding_threads(&self) -> Option<Vec<ThreadId>>;

    /// The server's numbers of its connections, with their holders.
    fn sessions(&self) -> Vec<(u64, Option<Holder>)>;

    /// Whether it has no connection and makes none.
    fn is_empty(&self) -> bool;
}

/// The connections that several pools may have together.
pub(crate) struct ConnectionLimit {
    /// `None`: only the server knows.
    limit: Option<usize>,
    state: Mutex<LimitState>,
    /// The length of the queue.
    queued: AtomicUsize,
    /// The pools with an open connection, by their numbers.
    pools: Mutex<BTreeMap<u64, Weak<dyn EvictablePool>>>,
}

#[derive(Default)]
struct LimitState {
    taken: usize,
    /// Connections that are being closed for pools in the queue.
    evicting: usize,
    queue: VecDeque<QueuedPool>,
}

struct QueuedPool {
    number: u64,
    since: Instant,
    pool: Weak<dyn EvictablePool>,
}

/// The right to one open connection. Drop frees it.
pub(crate) struct LimitPermit(Option<Arc<ConnectionLimit>>);

impl LimitPermit {
    pub(crate) fn is_of(&self, limit: &Arc<ConnectionLimit>) -> bool {
        self.0.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, limit))
    }

    /// Whether somebody waits for it, or the number of permits is limited.
    pub(crate) fn is_contended(&self) -> bool {
        self.0.as_ref().is_some_and(|limit| limit.limit.is_some() || limit.has_queue())
    }
}

impl std::fmt::Debug for LimitPermit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("LimitPermit").field(&self.0).finish()
    }
}

impl std::fmt::Debug for ConnectionLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionLimit").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl ConnectionLimit {
    pub(crate) fn new(limit: Option<usize>) -> Self {
        Self { limit, state: Mutex::default(), queued: AtomicUsize::new(0), pools: Mutex::default() }
    }

    pub(crate) fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Open connections, and those that are being made.
    pub(crate) fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// A permit, if one is free and nobody waits for it. Otherwise the pool queues, as of `since`.
    pub(crate) fn acquire_or_enqueue(
        self: &Arc<Self>,
        number: u64,
        since: Instant,
        pool: &Weak<dyn EvictablePool>,
    ) -> Option<LimitPermit> {
        let mut state = self.state.lock();
        if self.limit.is_none_or(|limit| state.taken < limit && state.queue.is_empty()) {
            state.taken += 1;
            return Some(LimitPermit(Some(Arc::clone(self))));
        }
        self.enqueue_locked(&mut state, number, since, pool);
        None
    }

    /// Queues for the next connection that is closed: the server has refused one more.
    pub(crate) fn enqueue(&self, number: u64, since: Instant, pool: &Weak<dyn EvictablePool>) {
        self.enqueue_locked(&mut self.state.lock(), number, since, pool);
    }

    fn enqueue_locked(&self, state: &mut LimitState, number: u64, since: Instant, pool: &Weak<dyn EvictablePool>) {
        let position = state.queue.partition_point(|other| other.since <= since);
        state.queue.insert(position, QueuedPool { number, since, pool: Weak::clone(pool) });
        self.queued.fetch_add(1, Ordering::SeqCst);
    }

    /// Takes a pool out of the queue.
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

    /// Whether another pool is in the queue whose caller waits for longer than `since`.
    pub(crate) fn prefers_another(&self, number: u64, since: Option<Instant>) -> bool {
        let state = self.state.lock();
        state.queue.front().is_some_and(|first| first.number != number && since.is_none_or(|since| first.since < since))
    }

    /// Evicts one idle connection for each pool in the queue, as far as there are idle connections. A pool evicts none of its own: its
    /// waiter has been called for it.
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

    /// The least recently used pool that has an idle connection, except for the pool of that number.
    pub(crate) fn least_recently_used(&self, except: u64) -> Option<(Instant, Arc<dyn EvictablePool>)> {
        let others = self.pools().into_iter().filter(|(number, _)| *number != except);
        let idle = others.filter_map(|(_, pool)| Some((pool.idle_since()?, pool)));
        idle.min_by_key(|(since, _)| *since)
    }

    /// The pools with an open connection.
    pub(crate) fn pools(&self) -> Vec<(u64, Arc<dyn EvictablePool>)> {
        let pools = self.pools.lock();
        pools.iter().filter_map(|(number, pool)| Some((*number, pool.upgrade()?))).collect()
    }

    pub(crate) fn register(&self, number: u64, pool: &Weak<dyn EvictablePool>) {
        self.pools.lock().entry(number).or_insert_with(|| Weak::clone(pool));
    }

    /// Forgets a pool that is empty. That is asked under the lock of [`register`](Self::register), which a pool calls before it connects.
    pub(crate) fn unregister_if_empty(&self, number: u64) {
        let mut pools = self.pools.lock();
        let pool = pools.get(&number).map(Weak::upgrade);
        if pool.as_ref().is_some_and(|pool| pool.as_ref().is_none_or(|pool| pool.is_empty())) {
            pools.remove(&number);
        }
        drop(pools);
        // Without the lock: this may be the last reference to the pool.
        drop(pool);
    }

    /// The holders of the connections of all its pools.
    pub(crate) fn holders(&self) -> Holders {
        let mut holders: Vec<_> = self.pools().into_iter().flat_map(|(_, pool)| pool.holders().0).collect();
        holders.sort_by_key(|holder| holder.since);
        Holders(holders)
    }

    /// The threads that hold all of its connections. `None` if a permit is free or on its way, or a connection is idle.
    pub(crate) fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        let taken = self.taken();
        if self.limit.is_none_or(|limit| taken < limit) {
            return None;
        }
        let mut threads = Vec::new();
        for (_, pool) in self.pools() {
            threads.extend(pool.holding_threads()?);
        }
        // One thread may hold several.
        (taken <= threads.len()).then_some(threads)
    }

    /// A connection was closed, or not made.
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
        let permit = LimitPermit(Some(Arc::clone(self)));
        if let Some(pool) = first.pool.upgrade() {
            pool.accept_permit(permit);
        }
    }
}

impl Drop for LimitPermit {
    fn drop(&mut self) {
        if let Some(limit) = self.0.take() {
            limit.release();
        }
    }
}
