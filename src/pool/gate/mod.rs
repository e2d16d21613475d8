//! A fixed number of permits, given out in the order in which they were asked for, each with what its last holder left.
//!
//! Invariant: a permit is either free, or held by exactly one [`Permit`]. A free permit and a waiter never coexist while
//! the gate is open, so nobody overtakes. What was left is dropped by none but the holder of a permit.

mod permit;

use std::collections::VecDeque;
use std::sync::Arc;

use super::ledger::{Holder, Holders};
use super::sync::{AtomicUsize, Condvar, Instant, Mutex, MutexGuard, Ordering, ThreadId};
use super::waits::{Awaited, Waits};
pub(crate) use permit::Permit;

/// The queue in front of something of which there is only so much.
#[derive(Debug)]
pub(crate) struct Gate<T = ()> {
    state: Mutex<State<T>>,
    /// Told whenever a permit comes back to a closed gate.
    returned: Condvar,
    /// Written under the lock of `state`.
    seekers: AtomicUsize,
    waits: Arc<Waits>,
}

/// Why no permit was given.
#[derive(Debug)]
pub(crate) enum Refused {
    Closed,
    /// Everything is held by threads that wait themselves, and none of those waits can end.
    Hopeless(Holders),
    TimedOut {
        waiting: usize,
        holders: Holders,
    },
}

#[derive(Debug)]
struct State<T> {
    /// One seat a permit.
    seats: Vec<Option<Holder>>,
    /// The free seats on which something was left; what was left last is taken first.
    warm: Vec<(usize, T)>,
    /// The other free seats.
    cold: Vec<usize>,
    size: usize,
    waiters: VecDeque<Arc<Waiter<T>>>,
    /// When a permit was last given.
    latest: Option<Instant>,
    closed: bool,
}

#[derive(Debug)]
struct Waiter<T> {
    thread: ThreadId,
    wake: Condvar,
    answer: Mutex<Answer<T>>,
}

#[derive(Debug)]
enum Answer<T> {
    /// Still in the queue.
    Waiting(Holder),
    Granted(usize, Instant, Option<T>),
    Closed,
    Taken,
}

impl<T> Gate<T> {
    pub(crate) fn new(size: usize, waits: Arc<Waits>) -> Self {
        Self {
            state: Mutex::new(State {
                seats: Vec::new(),
                warm: Vec::new(),
                cold: Vec::new(),
                size,
                waiters: VecDeque::new(),
                latest: None,
                closed: false,
            }),
            returned: Condvar::new(),
            seekers: AtomicUsize::new(0),
            waits,
        }
    }

    /// A permit, waiting for it in line until `deadline`.
    pub(crate) fn acquire(self: &Arc<Self>, holder: Holder, deadline: Instant) -> Result<Permit<T>, Refused>
    where
        T: Send + 'static,
    {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if let Some((seat, item)) = state.free_seat() {
            return Ok(self.seated(state, seat, item, holder));
        }
        let (thread, place) = (holder.thread.id(), holder.place);
        let waiter = Arc::new(Waiter { thread, wake: Condvar::new(), answer: Mutex::new(Answer::Waiting(holder)) });
        state.waiters.push_back(Arc::clone(&waiter));
        drop(state);
        let what: Arc<Self> = Arc::clone(self);
        let waiting = match self.waits.begin(thread, what, place) {
            Ok(waiting) => Some(waiting),
            Err(hopeless) => match self.withdraw(&waiter) {
                Some(state) => return Err(Refused::Hopeless(hopeless.explain(state.holders()))),
                None => None,
            },
        };
        let outcome = self.wait(&waiter, deadline);
        drop(waiting);
        outcome
    }

    /// A permit that is free now and that nobody waits for; those with something on them come first. A closed gate gives
    /// it too: its holder is the one who clears up.
    pub(crate) fn try_acquire(self: &Arc<Self>, holder: Holder) -> Option<Permit<T>> {
        let mut state = self.lock();
        let (seat, item) = state.free_seat()?;
        Some(self.seated(state, seat, item, holder))
    }

    /// Gives no more permits, except by [`try_acquire`](Self::try_acquire), and sends all waiters away.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for waiter in state.waiters.drain(..) {
            waiter.answer(Answer::Closed);
        }
        drop(state);
        self.returned.notify_all();
    }

    /// Waits until `done` says so, asking it again whenever a permit comes back or [`nudge`](Self::nudge) is called.
    pub(crate) fn wait_until(&self, deadline: Instant, mut done: impl FnMut(&Holders) -> bool) -> bool {
        let mut state = self.lock();
        loop {
            if done(&state.holders()) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.returned.wait_for(&mut state, left);
        }
    }

    /// Makes [`wait_until`](Self::wait_until) ask again. Taking the lock orders this after its last look.
    pub(crate) fn nudge(&self) {
        drop(self.lock());
        self.returned.notify_all();
    }

    pub(crate) fn holders(&self) -> Holders {
        self.lock().holders()
    }

    /// When a permit was last given, where something is left on a free one.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        if state.warm.is_empty() { None } else { state.latest }
    }

    /// Since when the first in line has been waiting.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        let state = self.lock();
        let first = state.waiters.front()?;
        match &*first.lock() {
            Answer::Waiting(holder) => Some(holder.since),
            _ => None,
        }
    }

    /// Permits given out, and callers in line.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.seats.iter().flatten().count(), state.waiters.len())
    }

    /// Holders that wait for an item from elsewhere.
    pub(crate) fn seekers(&self) -> usize {
        self.seekers.load(Ordering::Acquire)
    }

    fn seated(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State<T>>,
        seat: usize,
        item: Option<T>,
        holder: Holder,
    ) -> Permit<T> {
        let since = holder.since;
        state.seats[seat] = Some(holder);
        state.latest = Some(since);
        drop(state);
        Permit { item, gate: Arc::clone(self), seat, since }
    }

    fn wait(self: &Arc<Self>, waiter: &Arc<Waiter<T>>, deadline: Instant) -> Result<Permit<T>, Refused> {
        let mut answer = waiter.lock();
        loop {
            match std::mem::replace(&mut *answer, Answer::Taken) {
                Answer::Granted(seat, since, item) => return Ok(Permit { item, gate: Arc::clone(self), seat, since }),
                Answer::Closed => return Err(Refused::Closed),
                waiting => *answer = waiting,
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                waiter.wake.wait_for(&mut answer, left);
                continue;
            }
            drop(answer);
            if let Some(state) = self.withdraw(waiter) {
                return Err(Refused::TimedOut { waiting: state.waiters.len(), holders: state.holders() });
            }
            answer = waiter.lock();
        }
    }

    /// Takes a waiter out of the line; `None` where it has been answered.
    fn withdraw(&self, waiter: &Arc<Waiter<T>>) -> Option<MutexGuard<'_, State<T>>> {
        // The gate's lock comes before a waiter's, as in `release`; whoever answered in between wins.
        let mut state = self.lock();
        let place = state.waiters.iter().position(|other| Arc::ptr_eq(other, waiter))?;
        state.waiters.remove(place);
        Some(state)
    }

    fn release(&self, seat: usize, mut item: Option<T>) {
        let mut state = self.lock();
        if state.closed || self.seekers() > 0 {
            // Without the lock, and before the permit is free: whoever waits for its end waits for this too.
            MutexGuard::unlocked(&mut state, || drop(item.take()));
        }
        // Dropped at the end, without the lock.
        let _left = state.seats[seat].take();
        match state.waiters.pop_front() {
            Some(waiter) => {
                let (mut answer, since) = (waiter.lock(), Instant::now());
                if let Answer::Waiting(holder) = std::mem::replace(&mut *answer, Answer::Granted(seat, since, item)) {
                    state.seats[seat] = Some(Holder { since, ..holder });
                    state.latest = Some(since);
                }
                drop(answer);
                waiter.wake.notify_one();
            }
            None => match item {
                Some(item) => state.warm.push((seat, item)),
                None => state.cold.push(seat),
            },
        }
        let closed = state.closed;
        drop(state);
        if closed {
            self.returned.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock()
    }
}

impl<T: Send> Awaited for Gate<T> {
    fn is_awaited_by(&self, thread: ThreadId) -> bool {
        self.lock().waiters.iter().any(|waiter| waiter.thread == thread)
    }

    fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        let state = self.lock();
        if state.seats.len() < state.size {
            return None;
        }
        state.seats.iter().map(|seat| seat.as_ref()?.on_thread()).collect()
    }
}

impl<T> State<T> {
    fn free_seat(&mut self) -> Option<(usize, Option<T>)> {
        if let Some((seat, item)) = self.warm.pop() {
            return Some((seat, Some(item)));
        }
        if let Some(seat) = self.cold.pop() {
            return Some((seat, None));
        }
        (self.seats.len() < self.size).then(|| {
            self.seats.push(None);
            (self.seats.len() - 1, None)
        })
    }

    fn holders(&self) -> Holders {
        let mut holders: Vec<Holder> = self.seats.iter().flatten().cloned().collect();
        holders.sort_by_key(|holder| holder.since);
        Holders(holders)
    }
}

impl<T> Waiter<T> {
    fn lock(&self) -> MutexGuard<'_, Answer<T>> {
        self.answer.lock()
    }

    fn answer(&self, answer: Answer<T>) {
        *self.lock() = answer;
        self.wake.notify_one();
    }
}
