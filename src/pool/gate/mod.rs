//! A fixed number of permits, given out in the order in which they were asked for, each with what its last holder left.
//!
//! A holder who finds nothing on his permit may let others work with it and line up again, before all who have none: he is
//! served by whatever is left first, or by what was made with his permit.
//!
//! Invariants: a permit is either free, or held by exactly one [`Permit`]. While the gate is open, what was left and a waiter never
//! coexist, nor a free permit and a waiter who has none, so nobody overtakes. What was left is dropped by none but the holder of a permit.

mod line;
mod overdue;
mod permit;

use std::collections::VecDeque;
use std::sync::Arc;

use super::ledger::{Holder, Holders};
use super::sync::{Condvar, Instant, Mutex, MutexGuard, ThreadId};
use super::waits::{Awaited, Waits};
pub(crate) use permit::Permit;

/// The queue in front of something of which there is only so much.
#[derive(Debug)]
pub(crate) struct Gate<T = ()> {
    state: Mutex<State<T>>,
    /// Told whenever a permit comes back to a closed gate.
    returned: Condvar,
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
    /// What the item of each seat is called, free or not; it stays while the item stays.
    labels: Vec<Option<u64>>,
    /// The free seats on which something was left; what was left last is taken first.
    warm: Vec<(usize, T)>,
    /// The other free seats.
    cold: Vec<usize>,
    size: usize,
    /// Those who line up again come first.
    waiters: VecDeque<Arc<Waiter<T>>>,
    /// When a permit was last given.
    latest: Option<Instant>,
    /// How many were given so far.
    grants: u64,
    closed: bool,
}

#[derive(Debug)]
struct Waiter<T> {
    thread: ThreadId,
    since: Instant,
    /// Its permit is being worked with: it needs no other, but what is left on one.
    lined_up: bool,
    /// It has its permit and waits for something else meanwhile; this ends that, and is called with the gate's lock.
    bell: Option<Bell>,
    wake: Condvar,
    answer: Mutex<Answer<T>>,
}

/// Tells who waits elsewhere.
pub(crate) struct Bell(pub(crate) Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bell")
    }
}

#[derive(Debug)]
enum Answer<T> {
    /// Still in the queue.
    Waiting(Holder),
    /// With whether somebody in line has worked for it.
    Granted(usize, Instant, Option<T>, bool),
    Closed,
    Taken,
}

impl<T> Gate<T> {
    pub(crate) fn new(size: usize, waits: Arc<Waits>) -> Self {
        Self {
            state: Mutex::new(State {
                seats: Vec::new(),
                labels: Vec::new(),
                warm: Vec::new(),
                cold: Vec::new(),
                size,
                waiters: VecDeque::new(),
                latest: None,
                grants: 0,
                closed: false,
            }),
            returned: Condvar::new(),
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
        let waiter = Arc::new(Waiter::new(holder, false, None));
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

    /// Waits until `done` says so, asking it again whenever a permit comes back to the closed gate.
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

    pub(crate) fn holders(&self) -> Holders {
        self.lock().holders()
    }

    /// How many permits were given so far, and who holds those that are out.
    pub(crate) fn grants(&self) -> (u64, Holders) {
        let state = self.lock();
        (state.grants, state.holders())
    }

    /// What the items are called, each with its holder if it has one.
    pub(crate) fn labels(&self) -> Vec<(u64, Option<Holder>)> {
        let state = self.lock();
        (0..state.seats.len()).filter_map(|seat| Some((state.labels[seat]?, state.holder(seat)))).collect()
    }

    /// When a permit was last given, where something is left on a free one.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        if state.warm.is_empty() { None } else { state.latest }
    }

    /// Since when the first in line has been waiting.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        self.lock().waiters.front().map(|waiter| waiter.since)
    }

    /// Permits given out, and callers in line.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.seats.iter().flatten().count(), state.waiters.len())
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
        state.grants += 1;
        drop(state);
        Permit::new(self, seat, since, item)
    }

    fn wait(self: &Arc<Self>, waiter: &Arc<Waiter<T>>, deadline: Instant) -> Result<Permit<T>, Refused> {
        let mut answer = waiter.lock();
        loop {
            match std::mem::replace(&mut *answer, Answer::Taken) {
                Answer::Granted(seat, since, item, _) => return Ok(Permit::new(self, seat, since, item)),
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

    /// A permit comes back. Without anything on it, and with an heir, it goes to those in line, to the heir before all.
    fn release(&self, seat: usize, mut item: Option<T>, heir: Option<&Arc<Waiter<T>>>) {
        let mut state = self.lock();
        if state.closed {
            // Without the lock, and before the permit is free: whoever waits for its end waits for this too.
            MutexGuard::unlocked(&mut state, || drop(item.take()));
        }
        // Dropped at the end, without the lock.
        let left = state.seats[seat].take();
        if item.is_none() {
            state.labels[seat] = None;
        }
        match state.next(item.is_some(), heir) {
            Some(waiter) => {
                let (mut answer, since) = (waiter.lock(), Instant::now());
                if let Answer::Waiting(holder) =
                    std::mem::replace(&mut *answer, Answer::Granted(seat, since, item, heir.is_some()))
                {
                    state.seats[seat] = Some(Holder { since, ..holder });
                    state.latest = Some(since);
                    state.grants += 1;
                }
                drop(answer);
                waiter.wake.notify_one();
                if let Some(bell) = &waiter.bell {
                    bell.0();
                }
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
        if let Some(left) = left.filter(|left| left.overdue) {
            left.is_back();
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
    /// Takes out of the line who is served by a permit, on which there is something or not.
    fn next(&mut self, has_item: bool, heir: Option<&Arc<Waiter<T>>>) -> Option<Arc<Waiter<T>>> {
        if has_item {
            return self.waiters.pop_front();
        }
        let place_of = |is: &dyn Fn(&Arc<Waiter<T>>) -> bool| self.waiters.iter().position(is);
        let inherited = heir.and_then(|heir| {
            place_of(&|waiter| Arc::ptr_eq(heir, waiter))
                .or_else(|| place_of(&|waiter| waiter.lined_up && waiter.bell.is_none()))
        });
        let place = inherited.or_else(|| place_of(&|waiter| !waiter.lined_up))?;
        self.waiters.remove(place)
    }

    fn free_seat(&mut self) -> Option<(usize, Option<T>)> {
        if let Some((seat, item)) = self.warm.pop() {
            return Some((seat, Some(item)));
        }
        if let Some(seat) = self.cold.pop() {
            return Some((seat, None));
        }
        (self.seats.len() < self.size).then(|| {
            self.seats.push(None);
            self.labels.push(None);
            (self.seats.len() - 1, None)
        })
    }

    fn holders(&self) -> Holders {
        let mut holders: Vec<Holder> = (0..self.seats.len()).filter_map(|seat| self.holder(seat)).collect();
        holders.sort_by_key(|holder| holder.since);
        Holders(holders)
    }

    fn holder(&self, seat: usize) -> Option<Holder> {
        let holder = self.seats[seat].clone()?;
        Some(Holder { session: self.labels[seat], held: Some(holder.since.elapsed()), ..holder })
    }
}

impl<T> Waiter<T> {
    fn new(holder: Holder, lined_up: bool, bell: Option<Bell>) -> Self {
        let (thread, since) = (holder.thread.id(), holder.since);
        Self { thread, since, lined_up, bell, wake: Condvar::new(), answer: Mutex::new(Answer::Waiting(holder)) }
    }

    fn lock(&self) -> MutexGuard<'_, Answer<T>> {
        self.answer.lock()
    }

    fn answer(&self, answer: Answer<T>) {
        *self.lock() = answer;
        self.wake.notify_one();
    }
}
