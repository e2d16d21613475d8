//! Who waits for what in this process, and whether such a wait can end.
//!
//! A thread waits for one thing at a time, and the return of any part of it ends the wait. So a wait can end as long as a thread
//! that runs can be reached from it: from what is waited for to those who hold it, from those to what they wait for, and so on. Where
//! only threads that wait can be reached, nothing will ever change. Deadlines are left out of this: a wait that only its deadline
//! can end is refused at once.
//!
//! Invariants: nobody begins to wait while the map is looked at, so the last thread of a circle finds it whole. A thread that
//! has been served while it is still in the map is told by what it waited for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::ledger::Holders;
use super::sync::{Mutex, ThreadId};
use crate::error::Place;

/// What threads wait for.
pub(super) trait Awaited: Send + Sync {
    /// Whether that thread is still in line.
    fn is_awaited_by(&self, thread: ThreadId) -> bool;

    /// The threads that have all of it between them; `None` where some of it is free, on its way, or in nobody's hands.
    fn holding_threads(&self) -> Option<Vec<ThreadId>>;
}

/// The waits of this process.
#[derive(Default)]
pub(crate) struct Waits(Mutex<HashMap<ThreadId, Wait>>);

struct Wait {
    place: Place,
    what: Arc<dyn Awaited>,
}

/// A thread that waits, as long as this lives.
pub(super) struct Waiting<'w> {
    waits: &'w Waits,
    thread: ThreadId,
}

/// A wait that cannot end: where each thread waits on whom it depends.
#[derive(Debug)]
pub(super) struct Hopeless(HashMap<ThreadId, Place>);

impl std::fmt::Debug for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waits")
    }
}

impl Waits {
    /// From here on `thread` waits for `what`, in whose line it is already.
    pub(super) fn begin(
        &self,
        thread: ThreadId,
        what: Arc<dyn Awaited>,
        place: Place,
    ) -> Result<Waiting<'_>, Hopeless> {
        let mut waits = self.0.lock();
        waits.insert(thread, Wait { place, what });
        match all_waiting(&waits, thread) {
            None => Ok(Waiting { waits: self, thread }),
            Some(threads) => {
                let places = threads.into_iter().filter_map(|thread| Some((thread, waits.get(&thread)?.place)));
                let hopeless = Hopeless(places.collect());
                waits.remove(&thread);
                Err(hopeless)
            }
        }
    }
}

/// Those on whom the wait of `thread` depends, if all of them wait.
fn all_waiting(waits: &HashMap<ThreadId, Wait>, thread: ThreadId) -> Option<HashSet<ThreadId>> {
    let mut reached = HashSet::from([thread]);
    let mut next = vec![thread];
    while let Some(thread) = next.pop() {
        let wait = waits.get(&thread)?;
        let holding = wait.what.holding_threads()?;
        if holding.is_empty() || !wait.what.is_awaited_by(thread) {
            return None;
        }
        next.extend(holding.into_iter().filter(|holder| reached.insert(*holder)));
    }
    Some(reached)
}

impl Hopeless {
    /// The holders, each with where its thread waits.
    pub(super) fn explain(&self, mut holders: Holders) -> Holders {
        for holder in &mut holders.0 {
            holder.waits_at = self.0.get(&holder.thread.id()).copied();
        }
        holders
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let ended = self.waits.0.lock().remove(&self.thread);
        // Without the lock: it may be the last to know of a pool.
        drop(ended);
    }
}
