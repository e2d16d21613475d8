//! Admission: decides which caller gets the next connection of a pool.
//!
//! Callers wait in the queue of the pool and nowhere else. A running caller may overtake the queue and take a
//! connection that was just checked in, because no thread has to be woken for it. After some time, the pool hands a
//! connection directly to the first waiter. This time is shorter if more callers wait, so no waiter is overtaken for
//! long. In between, the pool only notifies the first waiter: the waiter then checks for an idle connection and keeps
//! its position in the queue if there is none.
//!
//! Invariants: An entry of `holders` exists from the checkout of a connection until the connection is stored again or
//! closed. While a connection is idle, the first waiter is notified, or no caller waits. While callers wait, no
//! connection is idle and fewer than `max_size` connections are in use, the pool is growing (`growth.rs`). The lock of
//! the state is never held during a driver call or while a [`LimitPermit`](super::connection_limit::LimitPermit) is
//! acquired or released.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::connection_limit::ConnectionLimit;
use super::growth::Growth;
use super::storage::Storage;
use super::wait_graph::{Resource, WaitGraph};
use super::waiter::{Answer, Refused, Waiter, wake};
use crate::error::{Holder, Holders};
use crate::sync::{AtomicUsize, Condvar, Instant, Mutex, MutexGuard, Ordering, ThreadId, current_thread};

/// The time within which all waiters are served although other callers overtake them, if there are few waiters.
const OVERTAKING_TIME: Duration = Duration::from_micros(900);

/// The shortest time between two hand-offs. Each hand-off costs the wake-up of a thread.
const HAND_OFF_INTERVAL: Duration = Duration::from_micros(80);

/// The connections of one application, from its first use to its disposal.
pub(crate) struct Pool<S: Storage> {
    /// Identifies the pool among the pools under the same limit.
    pub(crate) number: u64,
    pub(super) storage: S,
    pub(super) max_size: usize,
    pub(super) state: Mutex<PoolState<S>>,
    /// 1 if the pool is closed, which happens under the lock of the state. A connection that is checked in then needs no
    /// reset.
    closed: AtomicUsize,
    /// Notified at each change in a closed pool, for the callers that drain it.
    pub(super) drain_changed: Condvar,
    /// The limits of which a connection needs a permit, in the order in which the permits are acquired.
    pub(super) limits: Vec<Arc<ConnectionLimit>>,
    pub(super) graph: Arc<WaitGraph>,
    pub(super) weak_self: Weak<Self>,
}

pub(super) struct PoolState<S: Storage> {
    /// The holder of each assigned connection. A connection refers to its holder by the index.
    holders: Vec<Option<Holder>>,
    /// The indices of `holders` that are free.
    free_indices: Vec<usize>,
    pub(super) in_use: usize,
    pub(super) waiters: VecDeque<Arc<Waiter<S>>>,
    /// The first waiter is notified and has not checked for an idle connection yet.
    pub(super) notified: bool,
    /// From this time on, a connection is handed to the first waiter.
    hand_off_at: Instant,
    /// The time of the last checkout by a caller. Before the first checkout: the time at which the first connection was
    /// opened.
    pub(super) last_checkout: Option<Instant>,
    pub(super) growth: Growth,
    /// The failure of a finished connect that is not reported to the waiters yet.
    pub(super) unreported_failure: Option<S::Failure>,
    /// The last failure, as long as another attempt may succeed, and the number of consecutive failures.
    pub(super) last_failure: Option<(S::Failure, u32)>,
}

/// A connection that is assigned to a holder and has no guard yet.
pub(super) struct AssignedConnection<S: Storage> {
    conn: S::Conn,
    /// The index of the holder in [`PoolState::holders`].
    index: usize,
    pub(super) since: Instant,
}

/// A connection that is checked out. Drop checks it in.
pub(crate) struct CheckoutGuard<S: Storage> {
    /// `None` only during drop.
    pub(super) conn: Option<S::Conn>,
    index: usize,
    pub(crate) pool: Arc<Pool<S>>,
    /// The deadline of the scope. The checkin waits for nothing beyond it.
    pub(crate) checkin_deadline: Option<Instant>,
}

impl<S: Storage> std::fmt::Debug for CheckoutGuard<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckoutGuard").field("index", &self.index).finish_non_exhaustive()
    }
}

impl<S: Storage> Pool<S> {
    /// Creates a pool that has no connection yet.
    pub(crate) fn with_storage(
        number: u64,
        max_size: usize,
        limits: Vec<Arc<ConnectionLimit>>,
        graph: Arc<WaitGraph>,
        storage: impl FnOnce(&Weak<Self>) -> S,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak_self| Self {
            number,
            storage: storage(weak_self),
            max_size,
            state: Mutex::new(PoolState {
                holders: Vec::new(),
                free_indices: Vec::new(),
                in_use: 0,
                waiters: VecDeque::new(),
                notified: false,
                hand_off_at: Instant::now(),
                last_checkout: None,
                growth: Growth::None,
                unreported_failure: None,
                last_failure: None,
            }),
            closed: AtomicUsize::new(0),
            drain_changed: Condvar::new(),
            limits,
            graph,
            weak_self: Weak::clone(weak_self),
        })
    }

    /// Checks out a connection for `holder` and waits for it until `deadline`. If no connection is in use, or if the
    /// caller is the first waiter, it waits for a running connect for at most `connect_timeout`.
    pub(crate) fn get(
        self: &Arc<Self>,
        holder: Holder,
        deadline: Instant,
        connect_timeout: Duration,
    ) -> Result<CheckoutGuard<S>, Refused<S::Failure>> {
        self.get_assigned(holder, deadline, connect_timeout).map(|assigned| assigned.into_guard(Arc::clone(self)))
    }

    /// Like [`get`](Self::get), but returns the connection without its guard.
    #[inline]
    pub(super) fn get_assigned(
        self: &Arc<Self>,
        holder: Holder,
        deadline: Instant,
        connect_timeout: Duration,
    ) -> Result<AssignedConnection<S>, Refused<S::Failure>> {
        let (since, location) = (holder.since, holder.location);
        let mut state = self.state.lock();
        if self.is_closed() {
            return Err(Refused::Closed);
        }
        if state.may_overtake(since)
            && let Some(conn) = self.take_idle(&mut state)
        {
            state.last_checkout = Some(since);
            return Ok(state.assign(holder, conn));
        }
        if state.waiters.is_empty() {
            state.hand_off_at = since + HAND_OFF_INTERVAL;
        }
        let waiter = Arc::new(Waiter::new(holder));
        state.waiters.push_back(Arc::clone(&waiter));
        self.grow(state);
        self.wait_for_answer(&waiter, location, deadline, connect_timeout)
    }

    /// Checks out an idle connection for the pool itself. This does not change the order of eviction.
    pub(crate) fn try_get(self: &Arc<Self>, holder: Holder) -> Option<CheckoutGuard<S>> {
        let mut state = self.state.lock();
        let conn = self.take_idle(&mut state)?;
        Some(state.assign(holder, conn).into_guard(Arc::clone(self)))
    }

    /// Takes an idle connection. If this finds the failure of a connect that is not reported yet, it keeps the failure
    /// for the report.
    #[inline]
    pub(super) fn take_idle(&self, state: &mut PoolState<S>) -> Option<S::Conn> {
        loop {
            let conn = self.storage.try_get()?;
            match S::failure(&conn) {
                None => return Some(conn),
                failure => state.unreported_failure = failure,
            }
        }
    }

    /// Stores a connection that is checked in, or hands it to the first waiter, and removes its holder. Without a
    /// connection it only removes the holder.
    #[inline]
    pub(super) fn release(&self, index: usize, mut conn: Option<S::Conn>) {
        let mut state = self.state.lock();
        while self.is_closed()
            && let Some(conn) = conn.take()
        {
            drop(state);
            drop(self.storage.close(conn, None, true));
            state = self.state.lock();
        }
        let overdue = state.unassign(index);
        let served = conn.and_then(|conn| self.store_or_hand_off(&mut state, conn));
        self.after_change(state, served);
        if let Some(holder) = overdue {
            holder.log_return();
        }
    }

    /// Has to follow each change of the number of connections. It wakes the waiters that the change concerns, grows
    /// the pool if necessary, and notifies the callers that drain it.
    #[inline]
    pub(super) fn after_change(&self, state: MutexGuard<'_, PoolState<S>>, served: Option<Arc<Waiter<S>>>) {
        let is_quiet = state.waiters.is_empty() && matches!(state.growth, Growth::None) && state.last_failure.is_none();
        if !is_quiet || served.is_some() || self.is_closed() {
            self.wake_and_grow(state, served);
        }
    }

    fn wake_and_grow(&self, mut state: MutexGuard<'_, PoolState<S>>, served: Option<Arc<Waiter<S>>>) {
        let notified = self.notify_if_idle(&mut state);
        self.grow(state);
        wake(served);
        wake(notified);
        if self.is_closed() {
            self.drain_changed.notify_all();
        }
    }

    /// Notifies the first waiter if a connection is idle. Returns the waiter, which the caller has to wake.
    #[inline]
    pub(super) fn notify_if_idle(&self, state: &mut PoolState<S>) -> Option<Arc<Waiter<S>>> {
        if state.waiters.is_empty() || state.notified || self.storage.idle() == 0 {
            return None;
        }
        let first = Arc::clone(state.waiters.front()?);
        let mut answer = first.answer.lock();
        *answer = match std::mem::replace(&mut *answer, Answer::Taken) {
            Answer::Waiting(holder) => Answer::Notified(holder),
            notified => notified,
        };
        drop(answer);
        state.notified = true;
        Some(first)
    }

    /// Stores an idle connection, or hands it to the first waiter. Returns the waiter, which the caller has to wake.
    #[inline]
    pub(super) fn store_or_hand_off(&self, state: &mut PoolState<S>, conn: S::Conn) -> Option<Arc<Waiter<S>>> {
        if !state.waiters.is_empty() && Instant::now() >= state.hand_off_at {
            return Some(state.hand_off(conn));
        }
        self.storage.put(conn);
        None
    }

    /// Closes the pool: refuses all waiters and all later callers, and closes the idle connections.
    pub(crate) fn close(self: &Arc<Self>, deadline: Instant) {
        let mut state = self.state.lock();
        self.closed.store(1, Ordering::Release);
        state.notified = false;
        let waiters: Vec<_> = state.waiters.drain(..).collect();
        self.stop_growing(&mut state);
        drop(state);
        for waiter in waiters {
            waiter.answer(Answer::Closed);
        }
        self.drain_changed.notify_all();
        self.close_idle(Some(deadline));
    }

    pub(super) fn close_idle(self: &Arc<Self>, until: Option<Instant>) {
        let idle = std::iter::from_fn(|| self.try_get(Holder::housekeeper()));
        self.close_all(idle.map(|mut guard| {
            guard.checkin_deadline = until;
            guard
        }));
    }

    /// Closes connections and removes their holders. The server ends all of the sessions at the same time.
    pub(super) fn close_all(&self, guards: impl IntoIterator<Item = CheckoutGuard<S>>) {
        let is_closed = self.is_closed();
        let mut closing = Vec::new();
        for mut guard in guards {
            let Some(conn) = guard.conn.take() else { continue };
            closing.push((guard.index, self.storage.close(conn, guard.checkin_deadline, is_closed)));
            if !is_closed {
                self.release(guard.index, None);
            }
        }
        for (index, closing) in closing {
            drop(closing);
            // A closed pool counts as drained only when the server has ended all of its sessions.
            if is_closed {
                self.release(index, None);
            }
        }
    }

    /// Waits until all connections are checked in and no connect is running. Connections that the calling thread holds
    /// do not count.
    pub(crate) fn wait_until_drained(&self, deadline: Instant) -> bool {
        let me = current_thread().id();
        let mut state = self.state.lock();
        loop {
            let others = state.holders.iter().flatten().any(|holder| !holder.is_on(me));
            if !others && matches!(state.growth, Growth::None) && (self.storage.idle() == 0) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            self.drain_changed.wait_until(&mut state, deadline);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) == 1
    }

    /// The holders of the connections, oldest first.
    pub(crate) fn holders(&self) -> Holders {
        self.state.lock().holders()
    }

    pub(super) fn holders_of_limit(&self) -> Holders {
        let limit = self.limits.iter().find(|limit| limit.limit.is_some());
        limit.map_or_else(Holders::default, |limit| limit.holders())
    }

    /// The numbers of connections in use, of running connects, and of waiting callers.
    pub(crate) fn counts(&self) -> (usize, usize, usize) {
        let state = self.state.lock();
        (state.in_use, usize::from(matches!(state.growth, Growth::Connecting(_))), state.waiters.len())
    }

    /// Whether the pool has a running connect and no open connection.
    pub(crate) fn hangs(&self) -> bool {
        let state = self.state.lock();
        matches!(state.growth, Growth::Connecting(_)) && self.storage.open() == 0
    }

    /// Whether the pool has no connection and no running connect.
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.in_use == 0 && matches!(state.growth, Growth::None) && self.storage.open() == 0
    }

    /// Whether a connection that is checked in has to be closed, so that another pool under the same limit can open
    /// one. This is so if a caller of that pool has waited longer than the first waiter of this pool.
    pub(super) fn is_needed_by_another_pool(&self) -> bool {
        self.storage.is_evictable()
            && self.limits.iter().filter(|limit| limit.has_queue()).any(|limit| {
                let since = self.state.lock().waiters.front().map(|waiter| waiter.since);
                limit.prefers_another(self.number, since)
            })
    }

    /// Evicts idle connections for other pools that wait for a permit.
    pub(super) fn evict_for_other_pools(&self) {
        self.limits.iter().filter(|limit| limit.has_queue()).for_each(|limit| limit.evict_for_queue());
    }

    pub(super) fn unregister_if_empty(&self) {
        if self.is_empty() {
            self.limits.iter().for_each(|limit| limit.unregister_if_empty(self.number));
        }
    }

    /// Closes the idle connections that are too old. Returns the time of the next check.
    pub(crate) fn close_aged(self: &Arc<Self>) -> Option<Instant> {
        self.close_idle_unless(|pool, conn, now| pool.storage.may_stay(conn, now))
    }

    /// Closes the idle connections for which `may_stay` returns `false`. Returns the earliest time of the next check.
    pub(super) fn close_idle_unless(
        self: &Arc<Self>,
        may_stay: impl Fn(&Self, &mut S::Conn, Instant) -> (bool, Option<Instant>),
    ) -> Option<Instant> {
        let now = Instant::now();
        let (mut next, mut kept, mut aged): (Option<Instant>, _, _) = (None, Vec::new(), Vec::new());
        let mut state = self.state.lock();
        while let Some(mut conn) = self.take_idle(&mut state) {
            let (stays, next_check) = may_stay(self, &mut conn, now);
            if stays {
                next = next.into_iter().chain(next_check).min();
                kept.push(conn);
            } else {
                aged.push(state.assign(Holder::housekeeper(), conn));
            }
        }
        // The storage gives the connection first that was stored last, so this keeps the order.
        while let Some(conn) = kept.pop() {
            self.storage.put(conn);
        }
        drop(state);
        self.close_all(aged.into_iter().map(|assigned| assigned.into_guard(Arc::clone(self))));
        self.unregister_if_empty();
        self.evict_for_other_pools();
        next
    }

    /// The holders that have held a connection for longer than `threshold` and were not returned before, and the time
    /// until the next check is due.
    pub(crate) fn overdue(&self, now: Instant, threshold: Duration) -> (Vec<Holder>, Duration) {
        let mut state = self.state.lock();
        let (mut overdue, mut pause) = (Vec::new(), threshold);
        for holder in state.holders.iter_mut().flatten().filter(|holder| !holder.overdue) {
            let left = threshold.saturating_sub(now.saturating_duration_since(holder.since));
            if left.is_zero() {
                holder.overdue = true;
                overdue.push(holder.snapshot());
            } else {
                pause = pause.min(left);
            }
        }
        (overdue, pause)
    }
}

impl<S: Storage> PoolState<S> {
    /// Whether a running caller may take an idle connection before the waiters.
    #[inline]
    fn may_overtake(&self, now: Instant) -> bool {
        self.waiters.is_empty() || now < self.hand_off_at
    }

    /// Assigns a connection to a holder.
    #[inline(always)]
    fn assign(&mut self, mut holder: Holder, conn: S::Conn) -> AssignedConnection<S> {
        let since = holder.since;
        holder.session = S::session(&conn);
        self.in_use += 1;
        let index = match self.free_indices.pop() {
            Some(index) => {
                self.holders[index] = Some(holder);
                index
            }
            None => {
                self.holders.push(Some(holder));
                self.holders.len() - 1
            }
        };
        AssignedConnection { conn, index, since }
    }

    /// Removes a holder. Returns the holder if it was reported as overdue.
    #[inline]
    fn unassign(&mut self, index: usize) -> Option<Holder> {
        self.in_use -= 1;
        self.free_indices.push(index);
        let overdue = self.holders[index].take_if(|holder| holder.overdue);
        self.holders[index] = None;
        overdue
    }

    /// Assigns a connection to a waiter that was removed from the queue.
    pub(super) fn serve(&mut self, waiter: &Waiter<S>, conn: S::Conn) {
        let mut answer = waiter.answer.lock();
        let holder = match std::mem::replace(&mut *answer, Answer::Taken) {
            Answer::Notified(holder) => {
                self.notified = false;
                holder
            }
            Answer::Waiting(holder) => holder,
            _ => unreachable!("a waiter in the queue has no answer yet"),
        };
        let since = Instant::now();
        self.last_checkout = Some(since);
        *answer = Answer::Served(self.assign(Holder { since, ..holder }, conn));
    }

    /// Hands a connection to the first waiter. The caller has to wake the waiter.
    pub(super) fn hand_off(&mut self, conn: S::Conn) -> Arc<Waiter<S>> {
        let waiter = self.waiters.pop_front().expect("a caller waits");
        self.serve(&waiter, conn);
        let waiters = u32::try_from(self.waiters.len()).unwrap_or(u32::MAX).max(1);
        self.hand_off_at = Instant::now() + (OVERTAKING_TIME / waiters).max(HAND_OFF_INTERVAL);
        waiter
    }

    /// Refuses the first waiter, or `all` waiters, with the failure of a connect.
    pub(super) fn fail_waiters(&mut self, failure: &S::Failure, all: bool) {
        let number = if all { self.waiters.len() } else { self.waiters.len().min(1) };
        for waiter in self.waiters.drain(..number) {
            if matches!(*waiter.answer.lock(), Answer::Notified(_)) {
                self.notified = false;
            }
            waiter.answer(Answer::Failed(failure.clone()));
        }
    }

    pub(super) fn holders(&self) -> Holders {
        Holders::new(self.holders.iter().flatten().map(Holder::snapshot).collect())
    }

    /// The threads of the holders. `None` if a connection may have moved to another thread, which can check it in.
    pub(super) fn threads(&self) -> Option<Vec<ThreadId>> {
        let holders = self.holders.iter().flatten();
        holders.map(|holder| (!holder.is_movable).then(|| holder.thread.id())).collect()
    }
}

impl<S: Storage> AssignedConnection<S> {
    pub(super) fn into_guard(self, pool: Arc<Pool<S>>) -> CheckoutGuard<S> {
        CheckoutGuard { conn: Some(self.conn), index: self.index, pool, checkin_deadline: None }
    }
}

impl<S: Storage> CheckoutGuard<S> {
    /// Closes the connection and removes its holder.
    pub(crate) fn close(self) {
        Arc::clone(&self.pool).close_all([self]);
    }

    /// Records that this thread uses the connection, and that the connection may move to another thread.
    pub(crate) fn note_movable(&self) {
        if let Some(holder) = &mut self.pool.state.lock().holders[self.index] {
            holder.is_movable = true;
            holder.thread = current_thread();
        }
    }

    /// Stores the connection again without a reset. Only the pool itself has used the connection and left no state on
    /// it.
    pub(super) fn store_again(mut self) {
        if let Some(conn) = self.conn.take() {
            self.pool.release(self.index, Some(conn));
            self.pool.evict_for_other_pools();
        }
    }
}

impl<S: Storage> Drop for CheckoutGuard<S> {
    /// Checks the connection in.
    fn drop(&mut self) {
        let Some(mut conn) = self.conn.take() else { return };
        let pool = &self.pool;
        if pool.storage.is_inherited() {
            // The connection and its pool belong to the parent process. A thread that does not exist in this process
            // may hold the lock of the pool.
            std::mem::forget((conn, Arc::clone(pool)));
            return;
        }
        if pool.is_closed() || pool.is_needed_by_another_pool() || !pool.storage.reset(&mut conn, self.checkin_deadline)
        {
            let closing = Self { conn: Some(conn), pool: Arc::clone(pool), ..*self };
            pool.close_all([closing]);
            pool.unregister_if_empty();
        } else {
            pool.release(self.index, Some(conn));
        }
        pool.evict_for_other_pools();
    }
}

impl<S: Storage> Resource for Pool<S> {
    fn has_waiter(&self, thread: ThreadId) -> bool {
        self.state.lock().waiters.iter().any(|waiter| waiter.thread == thread)
    }

    fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        let state = self.state.lock();
        if state.in_use >= self.max_size {
            return state.threads();
        }
        let Growth::Queued(permits) = &state.growth else { return None };
        let limit = Arc::clone(self.limits.get(permits.len())?);
        drop(state);
        limit.holding_threads()
    }
}

impl<S: Storage> Drop for Pool<S> {
    fn drop(&mut self) {
        self.limits.iter().for_each(|limit| limit.unregister_if_empty(self.number));
    }
}
