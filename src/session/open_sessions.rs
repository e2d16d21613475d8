//! The open sessions of a test's application, with the source locations at which they were opened.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Thread;

use crate::error::SourceLocation;
use crate::wording::name;

#[derive(Debug, Default)]
pub(crate) struct OpenSessions(Mutex<Vec<Weak<OpenSession>>>);

/// The report of the test kit about a session. The session owns the report until the session ends.
#[derive(Debug)]
pub(crate) struct OpenSession {
    opened_at: SourceLocation,
    thread: Thread,
}

impl OpenSessions {
    pub(crate) fn register(&self, opened_at: SourceLocation) -> Arc<OpenSession> {
        let session = Arc::new(OpenSession { opened_at, thread: std::thread::current() });
        let mut sessions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(&session));
        session
    }

    #[cfg(feature = "testing")]
    pub(crate) fn sessions(&self) -> Vec<Arc<OpenSession>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }
}

impl fmt::Display for OpenSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = name(self.thread.name().unwrap_or("unnamed"));
        write!(f, "a session opened at {} on thread {thread} ({:?})", self.opened_at, self.thread.id())
    }
}
