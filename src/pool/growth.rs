//! The growth of a pool by one connection while callers wait: acquire the permits of the limits, then connect, then
//! recover if the connect has failed.
//!
//! A pool grows by one connection at a time, because one thread connects for it. No thread waits for the growth
//! itself: each step ends with an event that starts the next step, and the callers wait in the queue of the pool.
//!
//! Invariant: while callers wait, no connection is idle and fewer than `max_size` connections are in use, the growth
//! is not `None`.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::admission::{Pool, PoolState};
use super::connection_limit::{EvictablePool, LimitPermit};
use super::storage::{Remedy, Storage};
use crate::error::{Holder, Holders};
use crate::sync::{Instant, MutexGuard, ThreadId};

/// The progress of a pool towards one more connection.
pub(super) enum Growth {
    None,
    /// The pool has these permits and waits for the next one.
    Queued(Vec<LimitPermit>),
    Connecting(Instant),
    /// The pool makes another attempt after a pause, or when a permit is released.
    Pausing,
}

impl<S: Storage> Pool<S> {
    fn as_evictable(&self) -> Weak<dyn EvictablePool> {
        Weak::clone(&self.weak_self) as Weak<dyn EvictablePool>
    }

    /// A job that runs unless the pool is dropped before.
    fn job(&self, run: impl FnOnce(Arc<Self>) + Send + 'static) -> impl FnOnce() + Send + 'static {
        let pool = Weak::clone(&self.weak_self);
        move || {
            if let Some(pool) = pool.upgrade() {
                run(pool);
            }
        }
    }

    /// Starts to grow if callers wait and no connection is idle. Stops the growth if no caller waits any more.
    pub(super) fn grow(&self, mut state: MutexGuard<'_, PoolState<S>>) {
        if state.waiters.is_empty() {
            return self.stop_growing(&mut state);
        }
        let wanted = !self.is_closed() && state.in_use < self.max_size && self.storage.idle() == 0;
        if !wanted || !matches!(state.growth, Growth::None) {
            return;
        }
        state.growth = Growth::Queued(Vec::new());
        drop(state);
        // The limits have to know the pool before it opens a connection.
        let evictable = self.as_evictable();
        self.limits.iter().for_each(|limit| limit.register(self.number, &evictable));
        self.storage.evict_above_threshold(self.number);
        self.take_permits();
    }

    /// Acquires the missing permits and then connects.
    fn take_permits(&self) {
        let mut state = self.state.lock();
        loop {
            let since = state.waiters.front().map(|waiter| waiter.since);
            let Growth::Queued(permits) = &mut state.growth else { return };
            let (Some(limit), Some(since)) = (self.limits.get(permits.len()), since) else {
                return self.connect(state);
            };
            match limit.acquire_or_enqueue(self.number, since, &self.as_evictable(), false) {
                Some(permit) => permits.push(permit),
                None => {
                    let limit = Arc::clone(limit);
                    drop(state);
                    return self.storage.run_closing(move || limit.evict_for_queue());
                }
            }
        }
    }

    /// Starts a connect, unless no caller needs the connection any more.
    fn connect(&self, mut state: MutexGuard<'_, PoolState<S>>) {
        let Growth::Queued(permits) = std::mem::replace(&mut state.growth, Growth::None) else { return };
        let wanted = !self.is_closed() && !state.waiters.is_empty() && state.in_use < self.max_size;
        let idle = if wanted { self.take_idle(&mut state) } else { None };
        if let Some(conn) = idle {
            let served = state.hand_off(conn);
            self.after_change(state, Some(served));
        } else if wanted {
            state.growth = Growth::Connecting(Instant::now());
            return self.storage.connect(permits, self.job(|pool| pool.connected()));
        } else {
            drop(state);
        }
        // Not under the lock, because another pool may wait for the permits.
        drop(permits);
        self.unregister_if_empty();
    }

    /// Called when the storage has the outcome of a connect.
    fn connected(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if self.is_closed() {
            drop(state);
            self.close_idle(None);
            state = self.state.lock();
        }
        let conn = self.take_idle(&mut state);
        if conn.is_some() {
            // The caller may have left. Then the connection becomes idle and can be evicted.
            state.last_checkout.get_or_insert_with(Instant::now);
        }
        state.growth = Growth::None;
        match state.unreported_failure.take() {
            Some(failure) => self.connect_failed(&mut state, failure),
            None => state.last_failure = None,
        }
        let served = conn.and_then(|conn| self.store_or_hand_off(&mut state, conn));
        self.after_change(state, served);
        self.unregister_if_empty();
        self.evict_for_other_pools();
    }

    /// Recovers from a failure, or reports it to the waiters.
    fn connect_failed(&self, state: &mut PoolState<S>, failure: S::Failure) {
        let failures = state.last_failure.take().map_or(0, |(_, failures)| failures);
        if self.is_closed() {
            return;
        }
        let (pause, evicts) = match self.storage.remedy(&failure, failures) {
            // If a connection is in use, its checkin serves the remaining waiters.
            Remedy::Fail => return state.fail_waiters(&failure, state.in_use == 0),
            _ if state.waiters.is_empty() => return,
            Remedy::Retry(pause) => (pause, false),
            Remedy::Evict(pause) => (pause, true),
        };
        state.last_failure = Some((failure, failures + 1));
        state.growth = Growth::Pausing;
        if evicts && let (Some(limit), Some(first)) = (self.limits.first(), state.waiters.front()) {
            let no_permit = limit.acquire_or_enqueue(self.number, first.since, &self.as_evictable(), true);
            debug_assert!(no_permit.is_none());
            self.storage.run_after(Duration::ZERO, self.job(|pool| pool.storage.evict_another(pool.number)));
        }
        self.storage.run_after(pause, self.job(|pool| pool.retry()));
    }

    /// Makes another attempt after a failure.
    fn retry(&self) {
        let mut state = self.state.lock();
        if !matches!(state.growth, Growth::Pausing) {
            return;
        }
        self.limits.iter().for_each(|limit| limit.leave_queue(self.number));
        state.growth = Growth::None;
        self.grow(state);
    }

    /// Called when no caller waits any more.
    pub(super) fn stop_growing(&self, state: &mut PoolState<S>) {
        state.last_failure = None;
        if matches!(state.growth, Growth::None | Growth::Connecting(_)) {
            return;
        }
        if let Growth::Queued(permits) = std::mem::replace(&mut state.growth, Growth::None) {
            // Their drop may call another pool, which must not happen under the lock.
            self.storage.run_after(Duration::ZERO, move || drop(permits));
        }
        self.limits.iter().for_each(|limit| limit.leave_queue(self.number));
    }
}

impl<S: Storage> EvictablePool for Pool<S> {
    fn idle_since(&self) -> Option<Instant> {
        let state = self.state.lock();
        if self.storage.is_evictable() && self.storage.idle() > 0 { state.last_checkout } else { None }
    }

    fn evict(self: Arc<Self>) -> bool {
        let idle = self.try_get(Holder::housekeeper());
        let evicted = idle.is_some();
        self.close_all(idle);
        self.unregister_if_empty();
        let drop_if_empty = self.storage.drop_if_empty(self.number);
        // The pool can be dropped only if there is no other reference to it.
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
            // The growth has continued in another way.
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
        let state = self.state.lock();
        let moving = self.storage.idle() > 0 || matches!(state.growth, Growth::Connecting(_));
        if moving { None } else { state.threads() }
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
