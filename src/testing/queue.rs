//! The threads of one process that want slots of one server, in the order they came, and the openings that they share.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::lock_file::LockFile;

/// The first pause between two looks, and what it grows by.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// What those threads share.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) state: Mutex<State>,
    /// A slot of this process became free.
    freed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Those who wait, each with what wakes it; the first may go to the turnstile.
    queue: VecDeque<Arc<Condvar>>,
    /// Openings of slots that this process does not hold.
    pub(super) idle: BTreeMap<usize, LockFile>,
    pub(super) ours: BTreeSet<usize>,
    /// When one of this process last left the turnstile.
    pub(super) left: Option<Instant>,
}

/// A thread's place in the queue of its process.
pub(super) struct QueuePlace<'l> {
    queue: &'l Queue,
    me: Arc<Condvar>,
}

impl Queue {
    /// Waits a little longer than the last time; less where a slot of this process becomes free. `false`: the deadline is over.
    pub(super) fn pause(&self, last: &mut Duration, deadline: Instant) -> bool {
        *last = (*last + PAUSE).min(LONGEST_PAUSE);
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        self.freed.wait_until(&mut self.state.lock(), deadline.min(now + *last));
        true
    }

    pub(super) fn free(&self, held: impl IntoIterator<Item = (usize, LockFile)>) {
        let mut state = self.state.lock();
        state.put_back(held);
        drop(state);
        self.freed.notify_all();
    }
}

impl State {
    pub(super) fn put_back(&mut self, held: impl IntoIterator<Item = (usize, LockFile)>) {
        for (number, file) in held {
            self.ours.remove(&number);
            // One that cannot be unlocked is closed.
            if file.unlock().is_ok() {
                self.idle.insert(number, file);
            }
        }
    }
}

impl<'l> QueuePlace<'l> {
    /// Waits until this thread is the first of the queue.
    pub(super) fn first(queue: &'l Queue, deadline: Instant) -> Option<Self> {
        let mut state = queue.state.lock();
        let place = Self { queue, me: Arc::default() };
        state.queue.push_back(Arc::clone(&place.me));
        let is_first = |state: &mut State| state.queue.front().is_some_and(|first| Arc::ptr_eq(first, &place.me));
        let mut over = false;
        while !over && !is_first(&mut state) {
            over = place.me.wait_until(&mut state, deadline).timed_out();
        }
        let came = is_first(&mut state);
        // Leaving the queue takes the lock.
        drop(state);
        came.then_some(place)
    }
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.queue.retain(|other| !Arc::ptr_eq(other, &self.me));
        if let Some(first) = state.queue.front() {
            first.notify_one();
        }
    }
}
