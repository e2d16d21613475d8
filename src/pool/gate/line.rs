//! A holder's place in line while others work with its permit.

use std::sync::Arc;

use super::super::ledger::Holder;
use super::super::sync::Instant;
use super::{Answer, Bell, Gate, Permit, Refused, Waiter};

/// A place in line; left by drop.
#[derive(Debug)]
pub(crate) struct Line<T> {
    gate: Arc<Gate<T>>,
    waiter: Arc<Waiter<T>>,
}

/// Names a place in line.
#[derive(Debug)]
pub(crate) struct Ticket<T>(Arc<Waiter<T>>);

impl<T> Ticket<T> {
    pub(super) fn waiter(&self) -> &Arc<Waiter<T>> {
        &self.0
    }
}

impl<T> Permit<T> {
    /// Lines up again for what others leave, before all who have no permit, so that others can work with this one. `None` where
    /// something was left: it is on the permit.
    pub(crate) fn line_up(&mut self, holder: Holder) -> Result<Option<Line<T>>, Refused> {
        self.line_up_with(holder, None)
    }

    /// The same for who keeps this permit and waits for something else too: `bell` ends that wait when there is something left.
    pub(crate) fn line_up_beside(&mut self, holder: Holder, bell: Bell) -> Result<Option<Line<T>>, Refused> {
        self.line_up_with(holder, Some(bell))
    }

    fn line_up_with(&mut self, holder: Holder, bell: Option<Bell>) -> Result<Option<Line<T>>, Refused> {
        let mut state = self.gate.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if let Some((seat, item)) = state.warm.pop() {
            state.empty(seat, self.seat);
            state.found(self.seat);
            self.item = Some(item);
            return Ok(None);
        }
        let waiter = Arc::new(Waiter::new(holder, true, bell));
        let comes_later = |other: &Arc<Waiter<T>>| !other.lined_up || other.since > waiter.since;
        let place = state.waiters.iter().position(comes_later).unwrap_or(state.waiters.len());
        state.waiters.insert(place, Arc::clone(&waiter));
        drop(state);
        Ok(Some(Line { gate: Arc::clone(&self.gate), waiter }))
    }
}

impl<T> Line<T> {
    pub(crate) fn ticket(&self) -> Ticket<T> {
        Ticket(Arc::clone(&self.waiter))
    }

    /// A permit: with what was left on it, or with nothing, from who worked with the one that was given away.
    pub(crate) fn wait(self, deadline: Instant) -> Result<Permit<T>, Refused> {
        self.gate.wait(&self.waiter, deadline)
    }
}

impl<T> Line<T> {
    /// Puts what was left meanwhile, with a permit of its own, in the place of `mine`; `false` where there is nothing. Where another
    /// in line has worked for it, that one gets mine.
    pub(crate) fn leave(self, mine: &mut Permit<T>) -> bool {
        if self.gate.withdraw(&self.waiter).is_some() {
            return false;
        }
        let answer = std::mem::replace(&mut *self.waiter.lock(), Answer::Taken);
        let Answer::Granted(seat, since, item, owed) = answer else { return false };
        if owed {
            mine.bequeath(self.ticket());
        }
        *mine = Permit::new(&self.gate, seat, since, item);
        true
    }
}

impl<T> Drop for Line<T> {
    fn drop(&mut self) {
        let left = self.gate.withdraw(&self.waiter).is_some();
        if !left {
            // It has been served and nobody has taken that.
            let answer = std::mem::replace(&mut *self.waiter.lock(), Answer::Taken);
            if let Answer::Granted(seat, since, item, _) = answer {
                drop(Permit::new(&self.gate, seat, since, item));
            }
        }
    }
}
