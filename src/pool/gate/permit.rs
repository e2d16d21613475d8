//! The right to one of the things behind a gate.

use std::sync::Arc;

use super::super::sync::{Instant, current_thread};
use super::line::Ticket;
use super::{Gate, State};

/// The right to one of so many; given back by drop.
#[derive(Debug)]
pub(crate) struct Permit<T = ()> {
    /// What the last holder left, and what this one leaves to the next.
    pub(in crate::pool) item: Option<T>,
    pub(super) gate: Arc<Gate<T>>,
    pub(super) seat: usize,
    pub(super) since: Instant,
    heir: Option<Ticket<T>>,
}

impl<T> Permit<T> {
    pub(super) fn new(gate: &Arc<Gate<T>>, seat: usize, since: Instant, item: Option<T>) -> Self {
        Self { item, gate: Arc::clone(gate), seat, since, heir: None }
    }

    /// Where it comes back with nothing on it, it goes to whoever lined up there or, where that was served, to another in line.
    pub(crate) fn bequeath(&mut self, line: Ticket<T>) {
        self.heir = Some(line);
    }

    /// Where it comes back with nothing on it, it goes to those who have none.
    pub(crate) fn disinherit(&mut self) {
        self.heir = None;
    }

    /// Takes what was left on another free seat, where nothing is left on this one.
    pub(crate) fn refill(&mut self) {
        if self.item.is_some() {
            return;
        }
        let mut state = self.gate.lock();
        if let Some((seat, item)) = state.warm.pop() {
            state.empty(seat, self.seat);
            state.found(self.seat);
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

    /// Its holder looks for an item elsewhere.
    pub(crate) fn seek(&self, seeking: bool) {
        if let Some(holder) = &mut self.gate.lock().seats[self.seat] {
            holder.seeking = seeking;
        }
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

impl<T> State<T> {
    /// The item of a free seat goes to another seat.
    pub(super) fn empty(&mut self, seat: usize, to: usize) {
        self.cold.push(seat);
        self.labels[to] = self.labels[seat].take();
    }

    /// The holder of that seat has an item now, and looks for none.
    pub(super) fn found(&mut self, seat: usize) {
        if let Some(holder) = &mut self.seats[seat] {
            holder.seeking = false;
        }
    }
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        let heir = self.heir.take();
        self.gate.release(self.seat, self.item.take(), heir.as_ref().map(Ticket::waiter));
    }
}
