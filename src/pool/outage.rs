//! Whether the server is there, as far as this process has seen, and who finds out when it is back.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::manager::ConnectFailure;

/// The pause between two tries to reach a server that is away; it doubles up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));

/// What this process knows about the presence of one server.
#[derive(Default)]
pub(super) struct Presence {
    /// It has let this process in before.
    reached: AtomicBool,
    /// Raised when there is reason to distrust connections that were sound a moment ago.
    doubts: AtomicUsize,
    is_away: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    away: Option<Outage>,
    probing: bool,
}

struct Outage {
    last: ConnectFailure,
    next_try: Instant,
    pause: Duration,
}

/// The right to try whether the server is back; one caller at a time has it.
pub(super) struct Probe<'p>(&'p Presence);

/// How the wait for the server ended.
pub(super) enum Turn<'p> {
    Back,
    Try(Probe<'p>),
    /// The deadline; with what the last try was told.
    TimedOut(ConnectFailure),
}

impl Presence {
    /// The number of doubts so far: a connection that was proven sound at that number is not doubted.
    #[inline]
    pub(super) fn doubts(&self) -> usize {
        self.doubts.load(Ordering::Acquire)
    }

    /// A connection was lost: others may be too.
    pub(super) fn doubt(&self) {
        self.doubts.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn was_reached(&self) -> bool {
        self.reached.load(Ordering::Acquire)
    }

    pub(super) fn is_away(&self) -> bool {
        self.is_away.load(Ordering::Acquire)
    }

    /// It has answered; whether it was away.
    pub(super) fn is_back(&self) -> bool {
        self.reached.store(true, Ordering::Release);
        if !self.is_away() {
            return false;
        }
        let mut state = self.state.lock();
        let was_away = state.away.take().is_some();
        self.is_away.store(false, Ordering::Release);
        drop(state);
        self.changed.notify_all();
        was_away
    }

    /// It could not be reached, or does not accept connections yet; whether that is news.
    pub(super) fn went_away(&self, last: ConnectFailure) -> bool {
        let mut state = self.state.lock();
        let pause = state.away.as_ref().map_or(PAUSES.0, |outage| (outage.pause * 2).min(PAUSES.1));
        let is_news = state.away.is_none();
        if is_news {
            self.doubt();
        }
        state.away = Some(Outage { last, next_try: Instant::now() + super::manager::shortened(pause), pause });
        self.is_away.store(true, Ordering::Release);
        is_news
    }

    /// Waits until the server is back, or it is this caller's turn to try.
    pub(super) fn turn(&self, deadline: Instant, gone: impl Fn() -> bool) -> Turn<'_> {
        let mut state = self.state.lock();
        loop {
            let State { away: Some(outage), probing } = &*state else { return Turn::Back };
            let now = Instant::now();
            if now >= deadline || gone() {
                return Turn::TimedOut(outage.last.clone());
            }
            if *probing {
                self.changed.wait_until(&mut state, deadline);
            } else if now < outage.next_try {
                let until = outage.next_try.min(deadline);
                self.changed.wait_until(&mut state, until);
            } else {
                state.probing = true;
                return Turn::Try(Probe(self));
            }
        }
    }

    /// The same without waiting; `None` where it is not this caller's turn.
    pub(super) fn turn_now(&self) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        match &*state {
            State { away: None, .. } => Some(Turn::Back),
            State { away: Some(outage), probing: false } if Instant::now() >= outage.next_try => {
                state.probing = true;
                Some(Turn::Try(Probe(self)))
            }
            State { .. } => None,
        }
    }

    /// Makes everybody who waits look again.
    pub(super) fn nudge(&self) {
        drop(self.state.lock());
        self.changed.notify_all();
    }
}

impl Drop for Probe<'_> {
    fn drop(&mut self) {
        self.0.state.lock().probing = false;
        self.0.changed.notify_all();
    }
}
