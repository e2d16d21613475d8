//! What gate, budget and ledger are synchronised with, in one place: the model of them puts other things here, which try every
//! order of events.

pub(super) use std::sync::atomic::{AtomicUsize, Ordering};
pub(super) use std::thread::{Thread, ThreadId, current as current_thread, sleep};
pub(super) use std::time::Instant;

pub(super) use parking_lot::{Condvar, Mutex, MutexGuard};
/// Does something later.
pub(super) use scheduled_thread_pool::ScheduledThreadPool as Timer;
