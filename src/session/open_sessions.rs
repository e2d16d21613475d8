//! The sessions of a test's application that there are, with where each was opened.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

use crate::error::Place;
use crate::wording::name;

/// The list.
#[derive(Debug, Default)]
pub(crate) struct OpenSessions(Mutex<Vec<OpenSession>>);

/// A session that has not ended.
#[derive(Debug, Clone)]
pub(crate) struct OpenSession {
    number: u64,
    place: Place,
    thread: Thread,
}

/// An entry of the list, as long as it lives.
#[derive(Debug)]
pub(crate) struct Listed {
    roll: Arc<OpenSessions>,
    number: u64,
}

impl OpenSessions {
    pub(crate) fn enter(self: &Arc<Self>, place: Place) -> Listed {
        let mut sessions = self.lock();
        let number = sessions.last().map_or(0, |last| last.number + 1);
        sessions.push(OpenSession { number, place, thread: std::thread::current() });
        Listed { roll: Arc::clone(self), number }
    }

    pub(crate) fn sessions(&self) -> Vec<OpenSession> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OpenSession>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.roll.lock().retain(|session| session.number != self.number);
    }
}

impl fmt::Display for OpenSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = name(self.thread.name().unwrap_or("unnamed"));
        write!(f, "a session opened at {} on thread {thread} ({:?})", self.place, self.thread.id())
    }
}
