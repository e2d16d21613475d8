//! The queues of writers, where a database has one writer at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::gate::Gate;
use crate::process::PerProcess;
use crate::url::Target;

/// The queue of this process's writers of one database file. SQLite's own waiting polls; this one is in order.
pub(super) fn of(target: &Target) -> Arc<Gate> {
    if target.in_memory {
        return Arc::new(Gate::new(1, super::waits()));
    }
    let database = target.database.as_str();
    static QUEUES: PerProcess<Mutex<HashMap<String, Weak<Gate>>>> = PerProcess::new();
    let mut queues = QUEUES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queues.get(database).and_then(Weak::upgrade) {
        return queue;
    }
    queues.retain(|_, queue| queue.strong_count() > 0);
    let queue = Arc::new(Gate::new(1, super::waits()));
    queues.insert(database.to_owned(), Arc::downgrade(&queue));
    queue
}
