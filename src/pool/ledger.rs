//! Who holds what.

use std::fmt;
use std::thread::{Thread, ThreadId};
use std::time::{Duration, Instant};

use crate::error::Place;

/// Somebody who has a connection, or is connecting.
#[derive(Debug, Clone)]
pub struct Holder {
    pub(crate) app: std::sync::Arc<str>,
    pub(crate) place: Place,
    pub(crate) thread: Thread,
    pub(crate) since: Instant,
    pub(crate) in_transaction: bool,
    /// A helper thread has it, or will have it, for the thread that is named.
    pub(crate) lent: bool,
}

impl Holder {
    #[inline]
    pub(crate) fn new(app: std::sync::Arc<str>, place: Place, since: Instant, in_transaction: bool) -> Self {
        Self { app, place, thread: std::thread::current(), since, in_transaction, lent: false }
    }

    pub(crate) fn is_on(&self, thread: ThreadId) -> bool {
        !self.lent && self.thread.id() == thread
    }

    /// The application.
    pub fn app(&self) -> &str {
        &self.app
    }

    /// The first statement that took the connection.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The thread's name, or `unnamed`.
    pub fn thread_name(&self) -> &str {
        self.thread.name().unwrap_or("unnamed")
    }

    /// The thread.
    pub fn thread_id(&self) -> ThreadId {
        self.thread.id()
    }

    /// How long it has been held.
    pub fn held_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// Whether it was taken for a transaction.
    pub fn in_transaction(&self) -> bool {
        self.in_transaction
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "app `{}` at {} on thread {} ({:?}) for {:.3?}",
            self.app,
            self.place,
            crate::wording::name(self.thread_name()),
            self.thread.id(),
            self.held_for()
        )?;
        if self.in_transaction { f.write_str(", in a transaction") } else { Ok(()) }
    }
}

/// A list of [`Holder`]s, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Holders(pub(crate) Vec<Holder>);

impl Holders {
    pub(crate) fn on_this_thread(self) -> Self {
        let me = std::thread::current().id();
        Self(self.0.into_iter().filter(|holder| holder.is_on(me)).collect())
    }
}

impl std::ops::Deref for Holders {
    type Target = [Holder];

    fn deref(&self) -> &[Holder] {
        &self.0
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nobody");
        }
        for (n, holder) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("; ")?;
            }
            write!(f, "#{} {holder}", n + 1)?;
        }
        Ok(())
    }
}
