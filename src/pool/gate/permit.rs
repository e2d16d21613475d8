//! The right to one of the things behind a gate.

use std::sync::Arc;

use super::super::sync::{Instant, Ordering, current_thread};
use super::Gate;

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
pub(crate) struct Seeker<T>(Arc<Gate<T>>);

impl<T> Permit<T> {
    /// From here on what others leave is not kept but dropped, and finds its way to the seeker from there. `None` where
    /// something is there already: the permit has it.
    pub(crate) fn seek(&mut self) -> Option<Seeker<T>> {
        let mut state = self.gate.lock();
        if let Some((seat, item)) = state.warm.pop() {
            state.cold.push(seat);
            self.item = Some(item);
            return None;
        }
        self.gate.seekers.fetch_add(1, Ordering::AcqRel);
        Some(Seeker(Arc::clone(&self.gate)))
    }

    /// Takes what was left on another free seat, where nothing is left on this one.
    pub(crate) fn refill(&mut self) {
        if self.item.is_some() {
            return;
        }
        let mut state = self.gate.lock();
        if let Some((seat, item)) = state.warm.pop() {
            state.cold.push(seat);
            self.item = Some(item);
        }
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
            holder.thread = current_thread();
            holder.lent = false;
        }
    }
}

impl<T> Drop for Seeker<T> {
    fn drop(&mut self) {
        self.0.seekers.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        self.gate.release(self.seat, self.item.take());
    }
}
