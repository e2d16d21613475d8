//! How a pool gets one more connection while callers wait: permits of the limits, then a connect, then a remedy if that has failed.
//!
//! A pool grows by one connection at a time, as one thread connects for it. Nobody waits for the growth itself: each step ends with
//! an event that begins the next one, and the callers wait in the queue of the pool for whatever comes first.
//!
//! Invariant: while callers wait, no connection is idle and not all slots are taken, the growth is not `None`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::admission::{Pool, PoolState};
use super::connection_limit::{EvictablePool, LimitPermit};
use super::storage::{Remedy, Storage};
use crate::error::{Holder, Holders};
use crate::sync::{Instant, MutexGuard, ThreadId};

/// How far a pool is on its way to one more connection.
#[derive(Debug)]
pub(super) enum Growth {
    None,
    /// It has these permits and waits for the next.
    Queued(Vec<LimitPermit>),
    Connecting(Instant),
    /// It tries again after a pause, or when another pool closes a connection.
    Pausing,
}

impl<S: Storage> Pool<S> {
    fn as_evictable(&self) -> Weak<dyn EvictablePool> {
        Weak::clone(&self.weak_self) as Weak<dyn EvictablePool>
    }

    /// Begins to grow if callers wait for a connection that is not on its way. Stops if nobody waits any more.
    pub(super) fn grow(&self, mut state: MutexGuard<'_, PoolState<S>>) {
        if state.waiters.is_empty() {
            return self.stop_growing(&mut state);
        }
        let wanted = !state.closed && state.in_use < self.max_size && self.storage.idle() == 0;
        if !wanted || !matches!(state.growth, Growth::None) {
            return;
        }
        state.growth = Growth::Queued(Vec::new());
        drop(state);
        // The others have to know of the pool before it opens anything.
        let evictable = self.as_evictable();
        self.limits.iter().for_each(|limit| limit.register(self.number, &evictable));
        self.storage.evict_above_threshold(self.number);
        self.take_permits();
    }

    /// Takes the permits that are still missing, and connects with all of them.
    fn take_permits(&self) {
        let mut state = self.state.lock();
        loop {
            let since = state.waiters.front().map(|waiter| waiter.since);
            let Growth::Queued(permits) = &mut state.growth else { return };
            let (Some(limit), Some(since)) = (self.limits.get(permits.len()), since) else {
                return self.connect(state);
            };
            match limit.acquire_or_enqueue(self.number, since, &self.as_evictable()) {
                Some(permit) => permits.push(permit),
                None => {
                    let limit = Arc::clone(limit);
                    drop(state);
                    return self.storage.run_closing(move || limit.evict_for_queue());
                }
            }
        }
    }

    /// Has the storage connect, unless nobody waits for it any more.
    fn connect(&self, mut state: MutexGuard<'_, PoolState<S>>) {
        let Growth::Queued(permits) = std::mem::replace(&mut state.growth, Growth::None) else { return };
        let wanted = !state.closed && !state.waiters.is_empty() && state.in_use < self.max_size;
        let idle = if wanted { self.take_idle(&mut state) } else { None };
        if let Some(conn) = idle {
            let served = state.hand_off(conn);
            self.after_change(state, Some(served));
        } else if wanted {
            state.growth = Growth::Connecting(Instant::now());
            let pool = Weak::clone(&self.weak_self);
            return self.storage.connect(permits, move || {
                if let Some(pool) = pool.upgrade() {
                    pool.connected();
                }
            });
        } else {
            drop(state);
        }
        // Without the lock: another pool may be waiting for them.
        drop(permits);
        self.unregister_if_empty();
    }

    /// The outcome of a connect is in the storage.
    fn connected(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            self.close_idle(None);
            state = self.state.lock();
        }
        let conn = self.take_idle(&mut state);
        if conn.is_some() {
            // Its caller may have left: then it is idle, and can be evicted.
            state.last_checkout.get_or_insert_with(Instant::now);
        }
        state.growth = Growth::None;
        match state.unreported_failure.take() {
            Some(failure) => self.connect_failed(&mut state, failure),
            None => state.last_failure = None,
        }
        let served = match conn {
            Some(conn) if !state.waiters.is_empty() && !state.closed => Some(state.hand_off(conn)),
            Some(conn) => {
                self.storage.put(conn);
                None
            }
            None => None,
        };
        self.after_change(state, served);
        self.unregister_if_empty();
        self.evict_for_other_pools();
    }

    /// Finds a remedy for a failure, or tells it to those that wait.
    fn connect_failed(&self, state: &mut PoolState<S>, failure: S::Failure) {
        let failures = state.last_failure.take().map_or(0, |(_, failures)| failures);
        if state.closed {
            return;
        }
        let (pause, evicts) = match self.storage.remedy(&failure, failures) {
            // A connection in use will come back and serve those that wait behind the first waiter.
            Remedy::Fail => return state.fail_waiters(&failure, state.in_use == 0),
            _ if state.waiters.is_empty() => return,
            Remedy::Retry(pause) => (pause, false),
            Remedy::Evict(pause) => (pause, true),
        };
        state.last_failure = Some((failure, failures + 1));
        state.growth = Growth::Pausing;
        if evicts && let (Some(limit), Some(first)) = (self.limits.first(), state.waiters.front()) {
            limit.enqueue(self.number, first.since, &self.as_evictable());
            let pool = Weak::clone(&self.weak_self);
            self.storage.run_after(Duration::ZERO, move || {
                if let Some(pool) = pool.upgrade() {
                    pool.storage.evict_another(pool.number);
                }
            });
        }
        let pool = Weak::clone(&self.weak_self);
        self.storage.run_after(pause, move || {
            if let Some(pool) = pool.upgrade() {
                pool.retry();
            }
        });
    }

    /// Tries again after a failure.
    fn retry(&self) {
        let mut state = self.state.lock();
        if !matches!(state.growth, Growth::Pausing) {
            return;
        }
        self.limits.iter().for_each(|limit| limit.leave_queue(self.number));
        state.growth = Growth::None;
        self.grow(state);
    }

    /// Nobody waits any more.
    pub(super) fn stop_growing(&self, state: &mut PoolState<S>) {
        state.last_failure = None;
        if matches!(state.growth, Growth::None | Growth::Connecting(_)) {
            return;
        }
        match std::mem::replace(&mut state.growth, Growth::None) {
            Growth::None | Growth::Connecting(_) | Growth::Pausing => {}
            Growth::Queued(permits) => {
                // Their drop may call another pool, which must not happen with the lock.
                self.storage.run_after(Duration::ZERO, move || drop(permits));
            }
        }
        self.limits.iter().for_each(|limit| limit.leave_queue(self.number));
    }
}

impl<S: Storage> EvictablePool for Pool<S> {
    fn idle_since(&self) -> Option<Instant> {
        if self.storage.is_evictable() { self.last_used_if_idle() } else { None }
    }

    fn evict(self: Arc<Self>) -> bool {
        let evicted = self.close_one_idle();
        let drop_if_empty = self.storage.drop_if_empty(self.number);
        // The pool is let go of if nobody else has it.
        drop(self);
        drop_if_empty();
        evicted
    }

    fn accept_permit(&self, permit: LimitPermit) {
        let mut state = self.state.lock();
        if matches!(state.growth, Growth::Pausing) {
            state.growth = Growth::Queued(Vec::new());
        }
        match &mut state.growth {
            Growth::Queued(permits) if self.limits.get(permits.len()).is_some_and(|limit| permit.is_of(limit)) => {
                permits.push(permit);
                self.limits.iter().for_each(|limit| limit.leave_queue(self.number));
                drop(state);
                self.take_permits();
            }
            // It has gone another way meanwhile.
            _ => {
                drop(state);
                drop(permit);
            }
        }
    }

    fn query_idle(&self, sql: &str, timeout: Duration) -> Option<Vec<String>> {
        let pool = self.weak_self.upgrade()?;
        let mut idle = pool.try_get(Holder::housekeeper())?;
        let answer = idle.conn.as_mut().and_then(|conn| self.storage.query(conn, sql, timeout));
        match answer {
            Some(_) => idle.store_again(),
            None => idle.close(),
        }
        answer
    }

    fn holders(&self) -> Holders {
        Pool::holders(self)
    }

    fn open(&self) -> usize {
        self.storage.open()
    }

    fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        self.threads_in_use()
    }

    fn sessions(&self) -> Vec<(u64, Option<Holder>)> {
        let holders = self.holders();
        let holder = |session| holders.iter().find(|holder| holder.session == Some(session)).cloned();
        self.storage.sessions().into_iter().map(|session| (session, holder(session))).collect()
    }

    fn is_empty(&self) -> bool {
        Pool::is_empty(self)
    }
}
