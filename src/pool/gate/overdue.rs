//! Who has had an item for too long.

use std::time::{Duration, Instant};

use super::Gate;
use crate::pool::ledger::Holder;

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

#[cfg(test)]
mod tests {
    use std::panic::Location;
    use std::sync::Arc;

    use super::*;
    use crate::pool::gate::Permit;

    #[track_caller]
    fn take(gate: &Arc<Gate<u8>>, since: Instant) -> Permit<u8> {
        let holder = Holder::new("test".into(), Location::caller(), since, false);
        gate.acquire(holder, since + Duration::from_secs(60)).expect("free")
    }

    #[test]
    fn each_is_told_once_and_the_next_is_known() {
        let (gate, start) = (Arc::new(Gate::new(4)), Instant::now());
        let after = |millis| start + Duration::from_millis(millis);
        let threshold = Duration::from_millis(100);
        let look = |now| {
            let (told, pause) = gate.overdue(after(now), threshold);
            (told.len(), pause.as_millis())
        };
        assert_eq!(look(0), (0, 100));
        let (_first, second) = (take(&gate, start), take(&gate, after(30)));
        assert_eq!(look(99), (0, 1));
        assert_eq!(look(100), (1, 30));
        assert_eq!(look(131), (1, 100));
        assert_eq!(look(500), (0, 100));
        drop(second);
        let mut third = take(&gate, after(500));
        let seeker = third.seek().expect("nothing is there");
        assert_eq!(look(700), (0, 100), "it has none yet");
        drop(seeker);
        assert_eq!(look(700), (1, 100));
    }

    #[test]
    fn a_label_stays_with_its_item() {
        let (gate, now) = (Arc::new(Gate::new(3)), Instant::now());
        let (mut first, mut second) = (take(&gate, now), take(&gate, now));
        for (permit, label) in [(&mut first, 10), (&mut second, 20)] {
            permit.item = Some(0);
            permit.label(Some(label));
        }
        let labels = || {
            let held = |(label, holder): (u64, Option<Holder>)| (label, holder.is_some());
            let mut all: Vec<_> = gate.labels().into_iter().map(held).collect();
            all.sort_unstable();
            all
        };
        assert_eq!(labels(), [(10, true), (20, true)]);
        drop(second);
        assert_eq!(labels(), [(10, true), (20, false)]);
        // Its own item is gone, and it takes the one of the free seat.
        first.item = None;
        first.refill();
        assert_eq!((labels(), gate.holders()[0].session), (vec![(20, true)], Some(20)));
        drop(first);
        let mut last = take(&gate, now);
        assert_eq!((last.item, labels()), (Some(0), vec![(20, true)]));
        last.item = None;
        drop(last);
        assert_eq!(labels(), []);
    }
}
