//! Who has had an item for too long.

use std::time::Duration;

use super::super::ledger::Holder;
use super::super::sync::Instant;
use super::Gate;

/// The longest pause before a holder is looked at again that is overdue and may not have an item yet.
const SOON: Duration = Duration::from_secs(1);

impl<T> Gate<T> {
    /// Those who have held an item for `threshold` at `now`, each told once, and how long it takes until there can be more.
    pub(crate) fn overdue(&self, now: Instant, threshold: Duration) -> (Vec<Holder>, Duration) {
        let mut state = self.lock();
        let (mut overdue, mut pause) = (Vec::new(), threshold);
        for seat in 0..state.seats.len() {
            let Some(holder) = &mut state.seats[seat] else { continue };
            if holder.overdue {
                continue;
            }
            let left = threshold.saturating_sub(now.saturating_duration_since(holder.since));
            if !left.is_zero() {
                pause = pause.min(left);
            } else if holder.seeking || holder.lent {
                // It waits for a connect or for an answer, each of which has a deadline of its own.
                pause = pause.min(SOON);
            } else {
                holder.overdue = true;
                overdue.extend(state.holder(seat));
            }
        }
        (overdue, pause)
    }
}
