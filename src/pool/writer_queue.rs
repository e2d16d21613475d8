//! The queue of writers of a database that allows one writer at a time.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use super::admission::{CheckoutGuard, Pool};
use super::connection_limit::LimitPermit;
use super::storage::{Remedy, Storage};
use crate::process::SharedByName;
use crate::sync::{Mutex, Ordering};
use crate::url::Target;

/// The queue of this process's writers of one database. SQLite itself polls for its write lock. This queue serves the
/// writers in order.
pub(crate) type WriterQueue = Pool<WriterStorage>;

/// The write permit of a database. Drop releases it.
pub(crate) type WritePermit = CheckoutGuard<WriterStorage>;

/// Stores the one write permit while no thread writes.
#[derive(Debug)]
pub(crate) struct WriterStorage(Mutex<Option<()>>);

pub(super) fn of(target: &Target) -> Arc<WriterQueue> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static QUEUES: SharedByName<WriterQueue> = SharedByName::new();
    let new = || {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Pool::with_storage(number, 1, Vec::new(), super::wait_graph(), |_| WriterStorage(Mutex::new(Some(()))))
    };
    if target.in_memory { new() } else { QUEUES.get_or_create(&target.database, new) }
}

/// Nothing ever connects, because the one permit always exists.
impl Storage for WriterStorage {
    type Conn = ();
    type Failure = Infallible;
    type Closing = ();

    fn try_get(&self) -> Option<()> {
        self.0.lock().take()
    }

    fn put(&self, (): ()) {
        *self.0.lock() = Some(());
    }

    fn idle(&self) -> usize {
        usize::from(self.0.lock().is_some())
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

    fn may_stay(&self, (): &mut (), _: Instant) -> (bool, Option<Instant>) {
        (true, None)
    }

    fn reset(&self, (): &mut (), _: Option<Instant>) -> bool {
        true
    }

    fn close(&self, (): (), _: Option<Instant>, _: bool) {}
}
