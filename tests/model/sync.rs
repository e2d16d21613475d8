//! What the parts under test are synchronised with: the scheduler's own locks, condition variables built on them whose waits
//! end by a notification or by an event that any thread may fire, and a clock that stands still otherwise.
//!
//! All threads of a model take turns on one thread of the system, so what is thread-local here is the model's.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::{Add, Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

pub(crate) use shuttle::sync::atomic::{AtomicUsize, Ordering};
pub(crate) use shuttle::thread::{Thread, ThreadId, current as current_thread, yield_now};

/// Whoever waits for so short a time lets it pass.
const MIN_WAIT: Duration = Duration::from_millis(1);

thread_local! {
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static SLEEPERS: RefCell<Vec<Arc<Sleeper>>> = const { RefCell::new(Vec::new()) };
    /// Notifications until the one that is lost.
    static LOST: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A model begins anew; where there is a number, the notification of that number is lost.
pub(crate) fn reset(lost: Option<usize>) {
    NOW.set(Duration::ZERO);
    SLEEPERS.take();
    LOST.set(lost);
}

/// Time passes, and every wait whose deadline has come ends.
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
    /// Not there while a wait, or [`unlocked`](Self::unlocked), has let go of it.
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
    /// `false` where it has been woken before.
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
        // In both lists before the lock is free: from then on no event is missed.
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
        // Those who begin to wait meanwhile are not meant.
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

/// Whether this is the notification that gets lost.
fn loses_notification() -> bool {
    let left = LOST.get();
    LOST.set(left.map(|left| left.wrapping_sub(1)));
    left == Some(0)
}

/// A caller looks at once whether its wait can end.
pub(crate) const BEFORE_DEADLOCK_CHECK: Duration = Duration::ZERO;

/// A caller yields once before it sleeps.
pub(crate) const YIELDS: u32 = 1;
