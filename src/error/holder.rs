//! Who holds a connection.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::Place;
use crate::sync::{Instant, Thread, ThreadId, current_thread};

/// Instead of an application's id: no id has a line break.
const HOUSEKEEPER: &str = "the pool\n";

/// The holder of a connection.
#[derive(Debug, Clone)]
pub struct Holder {
    pub(crate) app: Arc<str>,
    pub(crate) location: Place,
    pub(crate) thread: Thread,
    pub(crate) since: Instant,
    /// How long it had been held when it was listed, so that the text of an error does not depend on
    /// when it is read.
    pub(crate) held_at_snapshot: Option<Duration>,
    pub(crate) in_transaction: bool,
    /// Where its thread itself waits for a connection, in the error of a wait that cannot end.
    pub(crate) waits_at: Option<Place>,
    /// Its thread waits for the same as the caller that got that error.
    pub(crate) waits_for_same_resource: bool,
    /// The thread that listed it holds the connection itself: an error may be read in another thread.
    pub(crate) is_caller: bool,
    /// It was logged that it holds the connection for too long.
    pub(crate) overdue: bool,
    /// The server's number of the connection.
    pub(crate) session: Option<u64>,
}

impl Holder {
    #[inline]
    pub(crate) fn new(app: Arc<str>, location: Place, since: Instant, in_transaction: bool) -> Self {
        let thread = current_thread();
        Self {
            app,
            location,
            thread,
            since,
            held_at_snapshot: None,
            in_transaction,
            waits_at: None,
            waits_for_same_resource: false,
            is_caller: false,
            overdue: false,
            session: None,
        }
    }

    /// The pool itself, which closes an idle connection or asks the server something on it.
    #[track_caller]
    pub(crate) fn housekeeper() -> Self {
        static NAME: OnceLock<Arc<str>> = OnceLock::new();
        let name = Arc::clone(NAME.get_or_init(|| HOUSEKEEPER.into()));
        Self::new(name, std::panic::Location::caller(), Instant::now(), false)
    }

    /// For a list: how long it has held the connection does not change any more.
    pub(crate) fn snapshot(&self) -> Self {
        let is_caller = self.is_on(current_thread().id());
        Self { held_at_snapshot: Some(self.since.elapsed()), is_caller, ..self.clone() }
    }

    pub(crate) fn is_on(&self, thread: ThreadId) -> bool {
        self.thread.id() == thread
    }

    /// The application.
    pub fn app(&self) -> &str {
        self.app.trim_end()
    }

    /// The first statement that took the connection.
    pub fn place(&self) -> Place {
        self.location
    }

    /// The thread's name, or `unnamed`.
    pub fn thread_name(&self) -> &str {
        self.thread.name().unwrap_or("unnamed")
    }

    /// The thread.
    pub fn thread_id(&self) -> ThreadId {
        self.thread.id()
    }

    /// How long it had been held when the error or the status was made that names it.
    pub fn held_for(&self) -> Duration {
        self.held_at_snapshot.unwrap_or_else(|| self.since.elapsed())
    }

    /// Where its thread waits itself; told by [`Error::WouldDeadlock`](crate::Error::WouldDeadlock) only.
    pub fn waits_at(&self) -> Option<Place> {
        self.waits_at
    }

    /// The database server's number of the connection: PostgreSQL's backend process, the connection id of MySQL and MariaDB.
    /// `None` where it has none, as with SQLite, where the server has not told it, or while it is being made.
    pub fn session(&self) -> Option<u64> {
        self.session
    }

    /// Whether it was taken for a transaction.
    pub fn in_transaction(&self) -> bool {
        self.in_transaction
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if &*self.app == HOUSEKEEPER {
            return write!(f, "the pool itself, which closes an idle connection, for {:.3?}", self.held_for());
        }
        write!(
            f,
            "app `{}` at {} on thread {} ({:?}) for {:.3?}",
            self.app,
            self.location,
            crate::wording::name(self.thread_name()),
            self.thread.id(),
            self.held_for()
        )?;
        if self.in_transaction {
            f.write_str(", in a transaction")?;
        }
        if let Some(session) = self.session {
            write!(f, ", server session {session}")?;
        }
        match self.waits_at {
            Some(location) => write!(f, ", itself waiting at {location}"),
            None => Ok(()),
        }
    }
}

/// A list of [`Holder`]s, oldest first.
#[derive(Debug, Clone, Default)]
pub struct Holders(pub(crate) Vec<Holder>);

impl Holders {
    /// Whether the thread that listed them is all of them.
    pub(crate) fn are_all_the_caller(&self) -> bool {
        self.0.iter().all(|holder| holder.is_caller)
    }

    /// Whether all of them wait for the same as the caller.
    pub(crate) fn wait_for_same_resource(&self) -> bool {
        self.0.iter().all(|holder| holder.waits_for_same_resource)
    }

    pub(crate) fn on_this_thread(self) -> Self {
        let me = current_thread().id();
        Self(self.0.into_iter().filter(|holder| holder.is_on(me)).collect())
    }
}

impl<'a> IntoIterator for &'a Holders {
    type Item = &'a Holder;
    type IntoIter = std::slice::Iter<'a, Holder>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
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
