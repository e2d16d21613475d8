//! The holder of a connection.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::error::SourceLocation;
use crate::sync::{Instant, Thread, ThreadId, current_thread};

/// Replaces the application's id. An id has no line break.
const HOUSEKEEPER: &str = "the pool\n";

/// The holder of a connection.
#[derive(Debug, Clone)]
pub struct Holder {
    pub(crate) app: Arc<str>,
    pub(crate) location: SourceLocation,
    pub(crate) thread: Thread,
    pub(crate) since: Instant,
    /// The time for which the connection was held when the holder was listed. It keeps the text of an error from
    /// changing later.
    pub(crate) held_at_snapshot: Option<Duration>,
    pub(crate) in_transaction: bool,
    /// The location at which the holder's thread waits, in the error of a deadlock.
    pub(crate) waits_at: Option<SourceLocation>,
    /// In the error of a deadlock: whether the holder's thread waits for the same resource as the caller.
    pub(crate) waits_for_same_resource: bool,
    /// Whether the thread that listed the holder is the holder. Another thread may read the error.
    pub(crate) is_caller: bool,
    /// Whether the holder was logged because it holds the connection for too long.
    pub(crate) overdue: bool,
    /// The id of the connection's session on the server.
    pub(crate) session: Option<u64>,
    /// The connection may move to another thread. `thread` is then the thread that used the connection last.
    pub(crate) is_movable: bool,
}

impl Holder {
    #[inline]
    pub(crate) fn new(app: Arc<str>, location: SourceLocation, since: Instant, in_transaction: bool) -> Self {
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
            is_movable: false,
        }
    }

    /// The pool itself, which closes an idle connection or sends a query of its own.
    #[track_caller]
    pub(crate) fn housekeeper() -> Self {
        static NAME: OnceLock<Arc<str>> = OnceLock::new();
        let name = Arc::clone(NAME.get_or_init(|| HOUSEKEEPER.into()));
        Self::new(name, std::panic::Location::caller(), Instant::now(), false)
    }

    /// The holder for a list, with the time for which it has held the connection.
    pub(crate) fn snapshot(&self) -> Self {
        let is_caller = self.is_on(current_thread().id());
        Self { held_at_snapshot: Some(self.since.elapsed()), is_caller, ..self.clone() }
    }

    pub(crate) fn is_on(&self, thread: ThreadId) -> bool {
        self.thread.id() == thread
    }

    /// The id of the application.
    pub fn app(&self) -> &str {
        self.app.trim_end()
    }

    /// The source location of the first statement that needed the connection.
    pub fn location(&self) -> SourceLocation {
        self.location
    }

    /// The name of the thread, or `unnamed`. For a connection of [`App::checkout`](crate::App::checkout) this is the
    /// thread that used the connection last.
    pub fn thread_name(&self) -> &str {
        self.thread.name().unwrap_or("unnamed")
    }

    /// The id of the thread.
    pub fn thread_id(&self) -> ThreadId {
        self.thread.id()
    }

    /// The time for which the connection was held when the error or the status was created.
    pub fn held_for(&self) -> Duration {
        self.held_at_snapshot.unwrap_or_else(|| self.since.elapsed())
    }

    /// The source location at which the holder's thread itself waits. Only
    /// [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock) has it.
    pub fn waits_at(&self) -> Option<SourceLocation> {
        self.waits_at
    }

    /// The id of the connection's session on the server: the process id of the backend on PostgreSQL, the connection
    /// id on MySQL and MariaDB. `None` on SQLite, if the server has not reported the id, and while the connection is
    /// being opened.
    pub fn session(&self) -> Option<u64> {
        self.session
    }

    /// Whether the connection was checked out for a transaction.
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
    pub(crate) fn new(mut holders: Vec<Holder>) -> Self {
        holders.sort_unstable_by_key(|holder| holder.since);
        Self(holders)
    }

    /// Whether the thread that listed the holders holds all of the connections.
    pub(crate) fn are_all_the_caller(&self) -> bool {
        self.0.iter().all(|holder| holder.is_caller)
    }

    /// Whether all holders wait for the same resource as the caller.
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
        write_list(f, self)
    }
}

/// Writes the items of a list as `#1 first; #2 second`.
pub(super) fn write_list(f: &mut fmt::Formatter<'_>, items: &[impl fmt::Display]) -> fmt::Result {
    items
        .iter()
        .enumerate()
        .try_for_each(|(index, item)| write!(f, "{}#{} {item}", if index == 0 { "" } else { "; " }, index + 1))
}
