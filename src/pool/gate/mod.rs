//! A fixed number of permits, given out in the order in which they were asked for, each with what its last holder left.
//!
//! Invariant: a permit is either free, or held by exactly one [`Permit`]. A free permit and a waiter never coexist while
//! the gate is open, so nobody overtakes. What was left is dropped by none but the holder of a permit.

mod overdue;
mod permit;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::ledger::{Holder, Holders};
pub(crate) use permit::Permit;

/// The queue in front of something of which there is only so much.
#[derive(Debug)]
pub(crate) struct Gate<T = ()> {
    state: Mutex<State<T>>,
    /// Told whenever a permit comes back to a closed gate.
    returned: Condvar,
    /// Written under the lock of `state`.
    seekers: AtomicUsize,
}

/// Why no permit was given.
#[derive(Debug)]
pub(crate) enum Refused {
    Closed,
    /// Everything is held by the calling thread itself.
    HeldByCaller(Holders),
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
    waiters: VecDeque<Arc<Waiter<T>>>,
    /// When a permit was last given.
    latest: Option<Instant>,
    closed: bool,
}

#[derive(Debug)]
struct Waiter<T> {
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
    pub(crate) fn new(size: usize) -> Self {
        Self {
            state: Mutex::new(State {
                seats: Vec::new(),
                labels: Vec::new(),
                warm: Vec::new(),
                cold: Vec::new(),
                size,
                waiters: VecDeque::new(),
                latest: None,
                closed: false,
            }),
            returned: Condvar::new(),
            seekers: AtomicUsize::new(0),
        }
    }

    /// A permit, waiting for it in line until `deadline`.
    pub(crate) fn acquire(self: &Arc<Self>, holder: Holder, deadline: Instant) -> Result<Permit<T>, Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if let Some((seat, item)) = state.free_seat() {
            return Ok(self.seated(state, seat, item, holder));
        }
        let me = holder.thread.id();
        if state.seats.iter().flatten().all(|other| other.is_on(me)) {
            return Err(Refused::HeldByCaller(state.holders()));
        }
        let waiter = Arc::new(Waiter { wake: Condvar::new(), answer: Mutex::new(Answer::Waiting(holder)) });
        state.waiters.push_back(Arc::clone(&waiter));
        drop(state);
        self.wait(&waiter, deadline)
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
            // The gate's lock comes before a waiter's, as in `release`; whoever answered in between wins.
            let mut state = self.lock();
            if let Some(place) = state.waiters.iter().position(|other| Arc::ptr_eq(other, waiter)) {
                state.waiters.remove(place);
                return Err(Refused::TimedOut { waiting: state.waiters.len(), holders: state.holders() });
            }
            drop(state);
            answer = waiter.lock();
        }
    }

    fn release(&self, seat: usize, mut item: Option<T>) {
        let mut state = self.lock();
        if state.closed || self.seekers() > 0 {
            // Without the lock, and before the permit is free: whoever waits for its end waits for this too.
            MutexGuard::unlocked(&mut state, || drop(item.take()));
        }
        // Dropped at the end, without the lock.
        let left = state.seats[seat].take();
        if item.is_none() {
            state.labels[seat] = None;
        }
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
        if let Some(left) = left.filter(|left| left.overdue) {
            left.is_back();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock()
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
        Some(Holder { session: self.labels[seat], ..holder })
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

#[cfg(test)]
mod tests {
    use std::panic::Location;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[track_caller]
    fn holder() -> Holder {
        Holder::new("test".into(), Location::caller(), Instant::now(), false)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn until_waiting(gate: &Gate<u8>, waiting: usize) {
        while gate.counts().1 != waiting {
            std::thread::yield_now();
        }
    }

    #[test]
    fn waiters_are_served_in_order() {
        let gate = Arc::new(Gate::<u8>::new(1));
        let first = gate.acquire(holder(), soon()).expect("free");
        let (tell, served) = mpsc::channel();
        let threads: Vec<_> = (0..10)
            .map(|n| {
                let (gate, tell) = (Arc::clone(&gate), tell.clone());
                let waiting = gate.counts().1;
                let thread = std::thread::spawn({
                    let gate = Arc::clone(&gate);
                    move || {
                        let permit = gate.acquire(holder(), soon()).expect("in turn");
                        tell.send(n).expect("heard");
                        drop(permit);
                    }
                });
                until_waiting(&gate, waiting + 1);
                thread
            })
            .collect();
        drop(first);
        for thread in threads {
            thread.join().expect("no panic");
        }
        assert_eq!(served.try_iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
        assert_eq!(gate.counts(), (0, 0));
    }

    #[test]
    fn what_only_the_caller_holds_is_not_waited_for() {
        let gate = Arc::new(Gate::<u8>::new(1));
        let _held = gate.acquire(holder(), soon()).expect("free");
        assert!(matches!(gate.acquire(holder(), soon()), Err(Refused::HeldByCaller(holders)) if holders.len() == 1));
    }

    #[test]
    fn closing_wakes_waiters() {
        let gate = Arc::new(Gate::<u8>::new(1));
        let held = gate.acquire(holder(), soon()).expect("free");
        let waiter = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.acquire(holder(), soon()).map(drop)
        });
        until_waiting(&gate, 1);
        gate.close();
        assert!(matches!(waiter.join().expect("no panic"), Err(Refused::Closed)));
        assert!(!gate.wait_until(Instant::now(), |holders| holders.is_empty()));
        drop(held);
        assert!(gate.wait_until(soon(), |holders| holders.is_empty()));
    }

    #[test]
    fn no_permit_is_lost_when_waiters_give_up() {
        let gate = Arc::new(Gate::<u8>::new(2));
        std::thread::scope(|scope| {
            for n in 0..8_u64 {
                let gate = &gate;
                scope.spawn(move || {
                    for round in 0..500 {
                        let patience = Duration::from_micros((n * 37 + round * 13) % 200);
                        if let Ok(permit) = gate.acquire(holder(), Instant::now() + patience) {
                            std::thread::yield_now();
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert_eq!(gate.counts(), (0, 0));
        let both = [gate.try_acquire(holder()), gate.try_acquire(holder())];
        assert!(both.iter().all(Option::is_some));
    }

    #[test]
    fn what_is_left_is_dropped_while_somebody_seeks() {
        let gate = Arc::new(Gate::new(2));
        let item = Arc::new(());
        let (mut seeking, mut leaving) =
            (gate.acquire(holder(), soon()).expect("free"), gate.acquire(holder(), soon()).expect("free"));
        let seeker = seeking.seek().expect("nothing is there");
        leaving.item = Some(Arc::clone(&item));
        drop(leaving);
        assert_eq!((Arc::strong_count(&item), gate.seekers()), (1, 1));

        drop(seeker);
        let mut leaving = gate.acquire(holder(), soon()).expect("free");
        leaving.item = Some(Arc::clone(&item));
        drop(leaving);
        assert_eq!((Arc::strong_count(&item), gate.seekers()), (2, 0));
        assert!(seeking.seek().is_none() && seeking.item.is_some());
    }

    /// Notes how many permits are out when it is dropped.
    struct Noting(Arc<Gate<Noting>>, mpsc::Sender<usize>);

    impl Drop for Noting {
        fn drop(&mut self) {
            self.1.send(self.0.counts().0).expect("heard");
        }
    }

    #[test]
    fn what_is_not_kept_is_gone_before_its_permit_is_free() {
        let gate = Arc::new(Gate::new(2));
        let (tell, dropped) = mpsc::channel();
        let mut seeking = gate.acquire(holder(), soon()).expect("free");
        let mut leaving = gate.acquire(holder(), soon()).expect("free");
        leaving.item = Some(Noting(Arc::clone(&gate), tell.clone()));
        let seeker = seeking.seek().expect("nothing is there");
        drop(leaving);
        assert_eq!(dropped.try_recv(), Ok(2));

        drop(seeker);
        let mut leaving = gate.acquire(holder(), soon()).expect("free");
        leaving.item = Some(Noting(Arc::clone(&gate), tell));
        gate.close();
        drop(leaving);
        assert_eq!((dropped.try_recv(), gate.counts()), (Ok(2), (1, 0)));
    }

    #[test]
    fn what_is_left_goes_to_the_next() {
        let gate = Arc::new(Gate::new(3));
        let mut all: Vec<Permit<u8>> = (0..3).map(|_| gate.acquire(holder(), soon()).expect("free")).collect();
        assert!(all.iter().all(|permit| permit.item.is_none()));
        let (mut last, mut second) = (all.pop().expect("three"), all.pop().expect("three"));
        (second.item, last.item) = (Some(2), Some(3));
        drop((second, last));
        // Those with something come first, what was left last before all.
        drop(all);
        let mut three = gate.acquire(holder(), soon()).expect("free");
        assert_eq!(three.item, Some(3));
        three.item = None;
        three.refill();
        assert_eq!(three.item, Some(2));
        let empty = [gate.acquire(holder(), soon()), gate.acquire(holder(), soon())];
        assert!(empty.iter().flatten().all(|permit| permit.item.is_none()) && empty.iter().flatten().count() == 2);

        let waiter = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.acquire(holder(), soon()).expect("in turn").item
        });
        until_waiting(&gate, 1);
        drop(three);
        assert_eq!(waiter.join().expect("no panic"), Some(2));
    }
}
