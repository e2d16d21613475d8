//! The synchronisation primitives of the pool. The model of the pool (`tests/model`) replaces this file, so that a
//! scheduler can try many orders of events.

use std::time::Duration;

pub(crate) use std::sync::atomic::{AtomicUsize, Ordering};
pub(crate) use std::thread::{Thread, ThreadId, current as current_thread, yield_now};
pub(crate) use std::time::Instant;

pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

/// The wait of a caller before it looks for a deadlock. Most waits end earlier.
pub(crate) const BEFORE_DEADLOCK_CHECK: Duration = Duration::from_millis(10);

/// The number of times that a caller yields before it sleeps. Most connections are checked in soon, and waking a thread
/// takes longer.
pub(crate) const YIELDS: u32 = 10;
