//! Callers that wait in the queue of a pool, and the answers to them.

use std::sync::Arc;
use std::time::Duration;

use super::admission::{AssignedConnection, Pool, PoolState};
use super::growth::Growth;
use super::storage::Storage;
use super::wait_graph::Resource;
use crate::error::{Holder, Holders, SourceLocation};
use crate::sync::{BEFORE_DEADLOCK_CHECK, Condvar, Instant, Mutex, MutexGuard, ThreadId, YIELDS, yield_now};

/// The pause between two deadlock checks of a waiter.
const DEADLOCK_CHECK_INTERVAL: Duration = Duration::from_millis(100);

pub(super) struct Waiter<S: Storage> {
    pub(super) thread: ThreadId,
    pub(super) since: Instant,
    wake: Condvar,
    pub(super) answer: Mutex<Answer<S>>,
}

pub(super) enum Answer<S: Storage> {
    Waiting(Holder),
    /// A connection may be idle: the waiter has to check.
    Notified(Holder),
    Served(AssignedConnection<S>),
    Failed(S::Failure),
    Closed,
    Taken,
}

/// The reason why a caller got no connection.
#[derive(Debug)]
pub(crate) enum Refused<F> {
    Closed,
    /// No connection can be opened, or none could be opened until the deadline.
    Failed(F),
    /// Threads that are waiting themselves hold all connections, and none of these waits can end.
    Deadlock {
        holders: Holders,
        of_limit: bool,
    },
    /// At the deadline a connect was still running, or a connect has run for longer than `connect_timeout`.
    Connecting {
        began: Instant,
        hangs: bool,
    },
    /// No permit of the limit was free until the deadline.
    Limited,
    /// All connections were in use until the deadline, or all except one whose connect was running.
    InUse {
        waiting: usize,
        connecting_since: Option<Instant>,
        holders: Holders,
    },
}

impl<S: Storage> Waiter<S> {
    pub(super) fn new(holder: Holder) -> Self {
        let (thread, since) = (holder.thread.id(), holder.since);
        Self { thread, since, wake: Condvar::new(), answer: Mutex::new(Answer::Waiting(holder)) }
    }

    pub(super) fn answer(&self, answer: Answer<S>) {
        *self.answer.lock() = answer;
        self.wake.notify_one();
    }
}

pub(super) fn wake<S: Storage>(waiter: Option<Arc<Waiter<S>>>) {
    if let Some(waiter) = waiter {
        waiter.wake.notify_one();
    }
}

impl<S: Storage> Pool<S> {
    pub(super) fn wait_for_answer(
        self: &Arc<Self>,
        waiter: &Arc<Waiter<S>>,
        location: SourceLocation,
        deadline: Instant,
        connect_timeout: Duration,
    ) -> Result<AssignedConnection<S>, Refused<S::Failure>> {
        let (mut in_graph, mut yields) = (None, 0);
        let mut until = deadline.min(waiter.since + BEFORE_DEADLOCK_CHECK);
        loop {
            let mut answer = waiter.answer.lock();
            match std::mem::replace(&mut *answer, Answer::Taken) {
                Answer::Served(assigned) => return Ok(assigned),
                Answer::Failed(failure) => return Err(Refused::Failed(failure)),
                Answer::Closed | Answer::Taken => return Err(Refused::Closed),
                Answer::Notified(holder) => {
                    *answer = Answer::Waiting(holder);
                    drop(answer);
                    self.check_for_idle(waiter);
                    continue;
                }
                waiting => *answer = waiting,
            }
            let now = Instant::now();
            if now < until && yields < YIELDS {
                drop(answer);
                yields += 1;
                yield_now();
                continue;
            }
            if now < until {
                waiter.wake.wait_until(&mut answer, until);
                continue;
            }
            drop(answer);
            if now >= deadline {
                if let Some(state) = self.remove_waiter(waiter) {
                    return Err(self.refuse_at_deadline(state));
                }
                continue;
            }
            let waiting = in_graph.get_or_insert_with(|| {
                self.graph.begin(waiter.thread, Arc::clone(self) as Arc<dyn Resource>, location)
            });
            if let Some(deadlock) = waiting.deadlock() {
                let Some(state) = self.remove_waiter(waiter) else { continue };
                let of_limit = matches!(state.growth, Growth::Queued(_));
                self.grow(state);
                let holders = if of_limit { self.holders_of_limit() } else { self.holders() };
                return Err(Refused::Deadlock { holders: deadlock.explain(holders), of_limit });
            }
            until = deadline.min(now + DEADLOCK_CHECK_INTERVAL);
            if let Some((began, end)) = self.connect_hangs_at(waiter, connect_timeout) {
                if end <= now {
                    let Some(state) = self.remove_waiter(waiter) else { continue };
                    self.grow(state);
                    return Err(Refused::Connecting { began, hangs: true });
                }
                until = until.min(end);
            }
        }
    }

    /// The start of the running connect, and the time at which it has taken too long for this waiter. `None` if the
    /// waiter may be served before by a connection that is checked in.
    fn connect_hangs_at(&self, waiter: &Arc<Waiter<S>>, connect_timeout: Duration) -> Option<(Instant, Instant)> {
        let state = self.state.lock();
        let Growth::Connecting(began) = state.growth else { return None };
        let is_first = state.waiters.front().is_some_and(|first| Arc::ptr_eq(first, waiter));
        (state.in_use == 0 || is_first).then(|| (began, began.max(waiter.since) + connect_timeout))
    }

    /// A notified waiter takes an idle connection, if there still is one.
    fn check_for_idle(&self, waiter: &Arc<Waiter<S>>) {
        let mut state = self.state.lock();
        state.notified = false;
        if let Some(position) = state.waiters.iter().position(|other| Arc::ptr_eq(other, waiter))
            && let Some(conn) = self.take_idle(&mut state)
        {
            state.waiters.remove(position);
            state.serve(waiter, conn);
        }
        let next = self.notify_if_idle(&mut state);
        self.grow(state);
        wake(next);
    }

    /// Removes a waiter from the queue. Returns `None` if the waiter is already answered.
    fn remove_waiter(&self, waiter: &Arc<Waiter<S>>) -> Option<MutexGuard<'_, PoolState<S>>> {
        let mut state = self.state.lock();
        let position = state.waiters.iter().position(|other| Arc::ptr_eq(other, waiter))?;
        state.waiters.remove(position);
        if matches!(*waiter.answer.lock(), Answer::Notified(_)) {
            state.notified = false;
            wake(self.notify_if_idle(&mut state));
        }
        Some(state)
    }

    /// The reason for a caller whose deadline has passed. The pool grows for the remaining waiters.
    fn refuse_at_deadline(&self, state: MutexGuard<'_, PoolState<S>>) -> Refused<S::Failure> {
        let reason = match (&state.last_failure, &state.growth) {
            (Some((failure, _)), _) => Refused::Failed(failure.clone()),
            (None, Growth::Queued(_)) if self.limits.iter().any(|limit| limit.limit.is_some()) => Refused::Limited,
            (None, Growth::Connecting(began)) if state.in_use == 0 => {
                Refused::Connecting { began: *began, hangs: false }
            }
            (None, growth) => {
                let connecting_since = match growth {
                    Growth::Connecting(began) => Some(*began),
                    _ => None,
                };
                Refused::InUse { waiting: state.waiters.len(), connecting_since, holders: state.holders() }
            }
        };
        self.grow(state);
        reason
    }
}
