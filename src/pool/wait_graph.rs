//! The wait-for graph of this process: which thread waits for which resource. It detects deadlocks.
//!
//! A thread waits for one resource at a time, and the release of any part of the resource ends the wait. So a wait can
//! end if a running thread is reachable from it: from the resource to its holders, from each holder to the resource
//! for which it waits, and so on. Deadlines do not count: a wait that only its deadline can end is a deadlock.
//!
//! The graph is locked during the search, so the last thread that closes a cycle finds the whole cycle. A thread that
//! was served but is still in the graph is recognised because it is not in the queue of its resource.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::error::{Holders, SourceLocation};
use crate::sync::{Mutex, ThreadId};

/// A resource for which threads wait.
pub(crate) trait Resource: Send + Sync {
    /// Whether the thread is still in the queue.
    fn has_waiter(&self, thread: ThreadId) -> bool;

    /// The threads that hold the whole resource. `None` if a part of it is free or about to become free.
    fn holding_threads(&self) -> Option<Vec<ThreadId>>;
}

/// The waits of this process.
#[derive(Default)]
pub(crate) struct WaitGraph(Mutex<HashMap<ThreadId, Wait>>);

struct Wait {
    location: SourceLocation,
    resource: Arc<dyn Resource>,
}

/// A wait in the graph. Drop removes it.
pub(crate) struct Waiting {
    graph: Arc<WaitGraph>,
    thread: ThreadId,
}

/// A deadlock: for each thread of the cycle, the location at which it waits, and whether it waits for the same
/// resource as the thread that found the cycle.
#[derive(Debug)]
pub(crate) struct Deadlock(HashMap<ThreadId, (SourceLocation, bool)>);

impl WaitGraph {
    /// Adds a wait of `thread` for `resource`. The thread has to be in the queue of the resource already.
    pub(crate) fn begin(
        self: &Arc<Self>,
        thread: ThreadId,
        resource: Arc<dyn Resource>,
        location: SourceLocation,
    ) -> Waiting {
        self.0.lock().insert(thread, Wait { location, resource });
        Waiting { graph: Arc::clone(self), thread }
    }
}

impl Waiting {
    /// Searches for a deadlock. If this wait is in one, the search removes the wait from the graph.
    pub(crate) fn deadlock(&self) -> Option<Deadlock> {
        let mut waits = self.graph.0.lock();
        let threads = all_waiting(&waits, self.thread)?;
        let own_resource = Arc::clone(&waits.get(&self.thread)?.resource);
        let locations = threads.into_iter().filter_map(|thread| {
            let wait = waits.get(&thread)?;
            Some((thread, (wait.location, Arc::ptr_eq(&wait.resource, &own_resource))))
        });
        let locations = locations.collect();
        // The other threads of the cycle can go on, because this thread will not wait any more.
        let ended = waits.remove(&self.thread);
        drop(waits);
        // Not under the lock, because this may be the last reference to a pool.
        drop((ended, own_resource));
        Some(Deadlock(locations))
    }
}

/// The threads on which the wait of `thread` depends, if all of them wait.
fn all_waiting(waits: &HashMap<ThreadId, Wait>, thread: ThreadId) -> Option<HashSet<ThreadId>> {
    let mut reached = HashSet::from([thread]);
    let mut next = vec![thread];
    while let Some(thread) = next.pop() {
        let wait = waits.get(&thread)?;
        let holding = wait.resource.holding_threads()?;
        if holding.is_empty() || !wait.resource.has_waiter(thread) {
            return None;
        }
        next.extend(holding.into_iter().filter(|holder| reached.insert(*holder)));
    }
    Some(reached)
}

impl Deadlock {
    /// Adds to each holder the location at which its thread waits.
    pub(crate) fn explain(&self, mut holders: Holders) -> Holders {
        for holder in &mut holders.0 {
            let wait = self.0.get(&holder.thread.id()).copied();
            holder.waits_at = wait.map(|(location, _)| location);
            holder.waits_for_same_resource = wait.is_some_and(|(_, is_same)| is_same);
        }
        holders
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let ended = self.graph.0.lock().remove(&self.thread);
        // Not under the lock, because this may be the last reference to a pool.
        drop(ended);
    }
}
