//! The threads of one process that wait for slots of one server, in the order of their arrival, and the lock files that
//! they share.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::lock_file::LockFile;

/// The first pause between two attempts. Each further pause is longer by this value.
const PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);

/// The queue of the waiting threads.
#[derive(Debug, Default)]
pub(super) struct SlotQueue {
    pub(super) state: Mutex<SlotQueueState>,
    /// Notified when a slot of this process is released.
    slot_released: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct SlotQueueState {
    /// The wakers of the waiting threads. The first thread may enter the turnstile.
    waiters: VecDeque<Arc<Condvar>>,
    /// The open files of slots that this process does not hold.
    pub(super) unlocked_files: BTreeMap<usize, LockFile>,
    /// The slots that this process holds.
    pub(super) held_here: BTreeSet<usize>,
    /// The time at which a thread of this process last left the turnstile.
    pub(super) left_turnstile_at: Option<Instant>,
}

/// A thread in the queue. Its drop removes the thread from the queue.
pub(super) struct SlotWaiter<'q> {
    queue: &'q SlotQueue,
    waker: Arc<Condvar>,
}

impl SlotQueue {
    /// Waits until a slot of this process is released, at most a little longer than the last pause. Returns `false` if
    /// the deadline has passed.
    pub(super) fn wait_for_release(&self, last: &mut Duration, deadline: Instant) -> bool {
        *last = (*last + PAUSE).min(LONGEST_PAUSE);
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        self.slot_released.wait_until(&mut self.state.lock(), deadline.min(now + *last));
        true
    }

    pub(super) fn release(&self, held: impl IntoIterator<Item = (usize, LockFile)>) {
        let mut state = self.state.lock();
        state.release(held);
        drop(state);
        self.slot_released.notify_all();
    }
}

impl SlotQueueState {
    pub(super) fn release(&mut self, held: impl IntoIterator<Item = (usize, LockFile)>) {
        for (number, file) in held {
            self.held_here.remove(&number);
            // If the unlock fails, the drop closes the file, which releases the lock.
            if file.unlock().is_ok() {
                self.unlocked_files.insert(number, file);
            }
        }
    }
}

impl<'q> SlotWaiter<'q> {
    /// Waits until this thread is the first of the queue. The result is `None` if the deadline passes before. The
    /// result is `None` if the deadline passes before.
    pub(super) fn wait_until_first(queue: &'q SlotQueue, deadline: Instant) -> Option<Self> {
        let mut state = queue.state.lock();
        let waiter = Self { queue, waker: Arc::default() };
        state.waiters.push_back(Arc::clone(&waiter.waker));
        let is_first =
            |state: &mut SlotQueueState| state.waiters.front().is_some_and(|first| Arc::ptr_eq(first, &waiter.waker));
        let mut timed_out = false;
        while !timed_out && !is_first(&mut state) {
            timed_out = waiter.waker.wait_until(&mut state, deadline).timed_out();
        }
        let is_first = is_first(&mut state);
        // The drop of `waiter` locks the state.
        drop(state);
        is_first.then_some(waiter)
    }
}

impl Drop for SlotWaiter<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state.lock();
        state.waiters.retain(|other| !Arc::ptr_eq(other, &self.waker));
        if let Some(first) = state.waiters.front() {
            first.notify_one();
        }
    }
}
