//! The right to one of the things behind a gate.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Gate, State};

/// The right to one of so many; given back by drop.
#[derive(Debug)]
pub(crate) struct Permit<T = ()> {
    /// What the last holder left, and what this one leaves to the next.
    pub(in crate::pool) item: Option<T>,
    pub(super) gate: Arc<Gate<T>>,
    pub(super) seat: usize,
    pub(super) since: Instant,
}

/// A holder that waits for an item from elsewhere, as long as this lives.
#[derive(Debug)]
pub(crate) struct Seeker<T>(Arc<Gate<T>>, usize);

impl<T> Permit<T> {
    /// From here on what others leave is not kept but dropped, and finds its way to the seeker from there. `None` where
    /// something is there already: the permit has it.
    pub(crate) fn seek(&mut self) -> Option<Seeker<T>> {
        let mut state = self.gate.lock();
        if let Some((seat, item)) = state.warm.pop() {
            state.empty(seat, self.seat);
            self.item = Some(item);
            return None;
        }
        if let Some(holder) = &mut state.seats[self.seat] {
            holder.seeking = true;
        }
        self.gate.seekers.fetch_add(1, Ordering::AcqRel);
        Some(Seeker(Arc::clone(&self.gate), self.seat))
    }

    /// Takes what was left on another free seat, where nothing is left on this one.
    pub(crate) fn refill(&mut self) {
        if self.item.is_some() {
            return;
        }
        let mut state = self.gate.lock();
        if let Some((seat, item)) = state.warm.pop() {
            state.empty(seat, self.seat);
            self.item = Some(item);
        }
    }

    /// What its item is called; an item from elsewhere has no name yet, and what was taken away has none any more.
    pub(crate) fn label(&self, label: Option<u64>) {
        self.gate.lock().labels[self.seat] = label;
    }

    /// When it was given.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// From here until a thread adopts it nobody's thread holds it.
    pub(crate) fn lend(&self) {
        if let Some(holder) = &mut self.gate.lock().seats[self.seat] {
            holder.lent = true;
        }
    }

    /// From here on it is the calling thread that holds it.
    pub(crate) fn adopt(&self) {
        if let Some(holder) = &mut self.gate.lock().seats[self.seat] {
            holder.thread = std::thread::current();
            holder.lent = false;
        }
    }
}

impl<T> State<T> {
    /// The item of a free seat goes to another seat.
    fn empty(&mut self, seat: usize, to: usize) {
        self.cold.push(seat);
        self.labels[to] = self.labels[seat].take();
    }
}

impl<T> Drop for Seeker<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        if let Some(holder) = &mut state.seats[self.1] {
            holder.seeking = false;
        }
        self.0.seekers.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        self.gate.release(self.seat, self.item.take());
    }
}
