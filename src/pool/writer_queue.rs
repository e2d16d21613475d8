//! The queue of writers of a database that allows one writer at a time.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::admission::{Pool, PooledConnection};
use super::connection_limit::LimitPermit;
use super::storage::{Remedy, Storage};
use crate::process::PerProcess;
use crate::sync::Ordering;
use crate::url::Target;

/// The queue of this process's writers of one database. SQLite itself polls for its write lock. This queue serves the
/// writers in order.
pub(crate) type WriterQueue = Pool<WriterStorage>;

/// The write permit of a database. Drop releases it.
pub(crate) type WritePermit = PooledConnection<WriterStorage>;

/// Stores the one write permit while no thread writes.
#[derive(Debug)]
pub(crate) struct WriterStorage(Mutex<Option<()>>);

impl WriterStorage {
    fn permit(&self) -> std::sync::MutexGuard<'_, Option<()>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn of(target: &Target) -> Arc<WriterQueue> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let new = || {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Pool::with_storage(number, 1, Vec::new(), super::wait_graph(), |_| WriterStorage(Mutex::new(Some(()))))
    };
    if target.in_memory {
        return new();
    }
    static QUEUES: PerProcess<Mutex<HashMap<String, Weak<WriterQueue>>>> = PerProcess::new();
    let mut queues = QUEUES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(queue) = queues.get(&target.database).and_then(Weak::upgrade) {
        return queue;
    }
    queues.retain(|_, queue| queue.strong_count() > 0);
    let queue = new();
    queues.insert(target.database.clone(), Arc::downgrade(&queue));
    queue
}

/// Nothing ever connects, because the one permit always exists.
impl Storage for WriterStorage {
    type Conn = ();
    type Failure = Infallible;
    type Closing = ();

    fn try_get(&self) -> Option<()> {
        self.permit().take()
    }

    fn put(&self, (): ()) {
        *self.permit() = Some(());
    }

    fn idle(&self) -> usize {
        usize::from(self.permit().is_some())
    }

    fn open(&self) -> usize {
        1
    }

    fn connect(&self, _: Vec<LimitPermit>, _: impl FnOnce() + Send + 'static) {}

    fn run_after(&self, _: Duration, _: impl FnOnce() + Send + 'static) {}

    fn run_closing(&self, _: impl FnOnce() + Send + 'static) {}

    fn failure((): &()) -> Option<Infallible> {
        None
    }

    fn remedy(&self, failure: &Infallible, _: u32) -> Remedy {
        match *failure {}
    }

    fn evict_another(&self, _: u64) {}

    fn evict_above_threshold(&self, _: u64) {}

    fn drop_if_empty(&self, _: u64) -> impl FnOnce() + 'static {
        || {}
    }

    fn sessions(&self) -> Vec<u64> {
        Vec::new()
    }

    fn session((): &()) -> Option<u64> {
        None
    }

    fn query(&self, (): &mut (), _: &str, _: Duration) -> Option<Vec<String>> {
        None
    }

    fn may_stay(&self, (): &mut (), _: Instant) -> (bool, Option<Instant>) {
        (true, None)
    }

    fn reset(&self, (): &mut (), _: Option<Instant>) -> bool {
        true
    }

    fn close(&self, (): (), _: Option<Instant>, _: bool) {}

    fn finish_closing(&self, (): ()) {}
}
