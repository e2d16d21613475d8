//! What the core of the pool is synchronised with. The model of the pool replaces this file, so that a scheduler tries
//! many orders of events.

use std::time::Duration;

pub(crate) use std::sync::atomic::{AtomicUsize, Ordering};
pub(crate) use std::thread::{Thread, ThreadId, current as current_thread, yield_now};
pub(crate) use std::time::Instant;

pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long a caller waits before it looks whether its wait can end. Most waits are over by then.
pub(crate) const BEFORE_DEADLOCK_CHECK: Duration = Duration::from_millis(10);

/// How often a caller yields before it sleeps. Most connections come back soon, and to be woken takes longer.
pub(crate) const YIELDS: u32 = 10;
