//! The synchronisation primitives of the tested files: the scheduler's own locks, a clock that only the model
//! advances, and condition variables whose waits end by a notification or when a thread advances the clock.
//!
//! The scheduler runs all threads of a model on one system thread, so thread-local values are shared within the model.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::{Add, Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

pub(crate) use shuttle::sync::atomic::{AtomicUsize, Ordering};
pub(crate) use shuttle::thread::{Thread, ThreadId, current as current_thread, yield_now};

/// A wait that is shorter than this advances the clock by itself.
const MIN_WAIT: Duration = Duration::from_millis(1);

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static SLEEPERS: RefCell<Vec<Arc<Sleeper>>> = const { RefCell::new(Vec::new()) };
    /// The number of notifications before the one that is lost.
    static LOST: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Starts a model with a new clock. `lost` is the number of the notification that is lost.
pub(crate) fn reset(lost: Option<usize>) {
    NOW.set(Duration::ZERO);
    SLEEPERS.take();
    LOST.set(lost);
}

/// Advances the clock and ends every wait whose deadline has passed.
pub(crate) fn advance(time: Duration) {
    NOW.set(NOW.get() + time);
    let due: Vec<_> = SLEEPERS.with_borrow_mut(|sleepers| {
        let (due, others) = sleepers.drain(..).partition(|sleeper| sleeper.deadline <= Instant::now());
        *sleepers = others;
        due
    });
    for sleeper in due {
        sleeper.wake();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        Self(NOW.get())
    }

    pub(crate) fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0 + time)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: self, inner: Some(self.0.lock().unwrap()) }
    }
}

pub(crate) struct MutexGuard<'m, T> {
    mutex: &'m Mutex<T>,
    /// `None` during a wait and during [`unlocked`](Self::unlocked).
    inner: Option<shuttle::sync::MutexGuard<'m, T>>,
}

impl<T> MutexGuard<'_, T> {
    pub(crate) fn unlocked<U>(guard: &mut Self, run: impl FnOnce() -> U) -> U {
        guard.inner = None;
        let out = run();
        guard.inner = Some(guard.mutex.0.lock().unwrap());
        out
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.inner.as_ref().unwrap()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().unwrap()
    }
}

/// A thread that waits for a notification or for its deadline.
#[derive(Debug)]
struct Sleeper {
    deadline: Instant,
    woken: shuttle::sync::Mutex<bool>,
    changed: shuttle::sync::Condvar,
}

impl Sleeper {
    /// Wakes the thread. Returns `false` if it was woken before.
    fn wake(&self) -> bool {
        let woken_before = std::mem::replace(&mut *self.woken.lock().unwrap(), true);
        self.changed.notify_one();
        !woken_before
    }
}

#[derive(Debug, Default)]
pub(crate) struct Condvar(std::sync::Mutex<VecDeque<Arc<Sleeper>>>);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.wait_until(guard, Instant(Duration::MAX));
    }

    pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) {
        self.wait_until(guard, Instant::now() + time);
    }

    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant) {
        if deadline <= Instant::now() {
            return;
        }
        if deadline <= Instant::now() + MIN_WAIT {
            MutexGuard::unlocked(guard, || {
                shuttle::thread::yield_now();
                advance(deadline.saturating_duration_since(Instant::now()));
            });
            return;
        }
        let sleeper = Arc::new(Sleeper {
            deadline,
            woken: shuttle::sync::Mutex::new(false),
            changed: shuttle::sync::Condvar::new(),
        });
        // The sleeper is in both lists before the lock is released, so it misses no event.
        self.0.lock().unwrap().push_back(Arc::clone(&sleeper));
        SLEEPERS.with_borrow_mut(|sleepers| sleepers.push(Arc::clone(&sleeper)));
        MutexGuard::unlocked(guard, || {
            let mut woken = sleeper.woken.lock().unwrap();
            while !*woken {
                woken = sleeper.changed.wait(woken).unwrap();
            }
        });
    }

    pub(crate) fn notify_one(&self) {
        if self.has_sleepers() && loses_notification() {
            return;
        }
        while let Some(sleeper) = self.next() {
            if sleeper.wake() {
                return;
            }
        }
    }

    pub(crate) fn notify_all(&self) {
        if self.has_sleepers() && loses_notification() {
            return;
        }
        // Threads that start to wait from here on are not notified.
        let sleepers = std::mem::take(&mut *self.0.lock().unwrap());
        for sleeper in sleepers {
            sleeper.wake();
        }
    }

    fn has_sleepers(&self) -> bool {
        !self.0.lock().unwrap().is_empty()
    }

    fn next(&self) -> Option<Arc<Sleeper>> {
        self.0.lock().unwrap().pop_front()
    }
}

/// Counts a notification. Returns whether it is the one that is lost.
fn loses_notification() -> bool {
    let left = LOST.get();
    LOST.set(left.map(|left| left.wrapping_sub(1)));
    left == Some(0)
}

/// A caller checks for a deadlock at once.
pub(crate) const BEFORE_DEADLOCK_CHECK: Duration = Duration::ZERO;

/// A caller yields once before it sleeps.
pub(crate) const YIELDS: u32 = 1;
