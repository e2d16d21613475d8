//! The open sessions of a test's application, with the source locations at which they were opened.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

use crate::error::Place;
use crate::wording::name;

/// The open sessions of one application.
#[derive(Debug, Default)]
pub(crate) struct OpenSessions(Mutex<Vec<OpenSession>>);

/// A session that has not ended.
#[derive(Debug, Clone)]
pub(crate) struct OpenSession {
    number: u64,
    opened_at: Place,
    thread: Thread,
}

/// Keeps its session in the list until it is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    open_sessions: Arc<OpenSessions>,
    number: u64,
}

impl OpenSessions {
    pub(crate) fn register(self: &Arc<Self>, opened_at: Place) -> Registration {
        let mut sessions = self.lock();
        let number = sessions.last().map_or(0, |last| last.number + 1);
        sessions.push(OpenSession { number, opened_at, thread: std::thread::current() });
        Registration { open_sessions: Arc::clone(self), number }
    }

    #[cfg(feature = "testing")]
    pub(crate) fn sessions(&self) -> Vec<OpenSession> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenSession>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.open_sessions.lock().retain(|session| session.number != self.number);
    }
}

impl fmt::Display for OpenSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = name(self.thread.name().unwrap_or("unnamed"));
        write!(f, "a session opened at {} on thread {thread} ({:?})", self.opened_at, self.thread.id())
    }
}
