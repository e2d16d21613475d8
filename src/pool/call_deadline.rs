//! Cuts the connection of a driver call that does not return by its deadline.
//!
//! A driver call blocks its thread in C code, and a statement timeout of the server has no effect if the server hangs.
//! So a watchdog thread shuts down the socket under the call, and the call returns with a lost connection. The thread
//! runs only while calls with a deadline are made.
//!
//! The thread may sleep while the process is forked. It sleeps in the standard library, whose condition variables have
//! no queue that the whole process shares. A forked process would inherit the thread's place in such a queue.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::socket::Socket;
use crate::process::PerProcess;

/// The time after a deadline in which the server can end the statement itself, before the connection is cut.
pub(crate) const GRACE: Duration = Duration::from_millis(250);

/// The time for which the thread waits for another call to watch.
const LINGER: Duration = Duration::from_secs(1);

static WATCHDOG: PerProcess<Arc<Watchdog>> = PerProcess::new();

#[derive(Debug, Default)]
struct Watchdog {
    state: Mutex<WatchdogState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct WatchdogState {
    calls: BTreeMap<(Instant, u64), (Socket, Arc<AtomicBool>)>,
    next: u64,
    runs: bool,
    /// The time at which the thread wakes without a notification.
    wakes_at: Option<Instant>,
}

/// The deadline of a driver call. It is in force until this value is dropped.
#[derive(Debug)]
pub(crate) struct CallDeadline {
    key: (Instant, u64),
    cut: Arc<AtomicBool>,
    watchdog: Arc<Watchdog>,
}

impl CallDeadline {
    /// Starts the watch: the socket is cut at `end`.
    pub(crate) fn begin(socket: Socket, end: Instant) -> Self {
        let watchdog = Arc::clone(WATCHDOG.get_or_init(Arc::default));
        let cut = Arc::new(AtomicBool::new(false));
        let mut state = watchdog.lock();
        let key = (end, state.next);
        state.next += 1;
        state.calls.insert(key, (socket, Arc::clone(&cut)));
        if !state.runs {
            let spawned = Arc::clone(&watchdog);
            let thread = std::thread::Builder::new().name("diesel-session-deadlines".into());
            state.runs = thread.spawn(move || spawned.run()).is_ok();
        } else if state.wakes_at.is_none_or(|wakes_at| end < wakes_at) {
            watchdog.changed.notify_one();
        }
        drop(state);
        Self { key, cut, watchdog }
    }

    /// Whether the socket was cut. The lock is needed because the call may return before the watchdog has set the
    /// flag.
    pub(crate) fn was_cut(&self) -> bool {
        let _state = self.watchdog.lock();
        self.cut.load(Ordering::Acquire)
    }
}

impl Drop for CallDeadline {
    fn drop(&mut self) {
        self.watchdog.lock().calls.remove(&self.key);
    }
}

impl Watchdog {
    fn lock(&self) -> MutexGuard<'_, WatchdogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            // No call ends while the lock is held, so the socket still belongs to the call.
            while let Some(due) = state.calls.first_entry().filter(|due| due.key().0 <= now) {
                let (socket, cut) = due.remove();
                cut.store(socket.cut(), Ordering::Release);
            }
            let wakes_at = state.calls.first_key_value().map_or(now + LINGER, |((end, _), _)| *end);
            state.wakes_at = Some(wakes_at);
            let left = wakes_at.saturating_duration_since(now);
            let (woken, wait) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if wait.timed_out() && state.calls.is_empty() {
                state.runs = false;
                return;
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn call_deadline_does_not_cut_a_call_that_ends_in_time() {
        let socket = Socket::none();
        let call = CallDeadline::begin(socket, Instant::now() + Duration::from_secs(3600));
        assert!(!call.was_cut());
        let watchdog = Arc::clone(&call.watchdog);
        assert!(watchdog.lock().calls.contains_key(&call.key));
        let key = call.key;
        drop(call);
        assert!(!watchdog.lock().calls.contains_key(&key));
    }
}
