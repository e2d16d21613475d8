//! The one connection of a test that is rolled back: it is inside a transaction that is never committed, and all pools that the
//! test's application ever has use it.
//!
//! Where a pool would close its connection it is parked here instead, and the next pool finds it. What ends the transaction, or leaves
//! the connection in a state nobody knows, breaks the pinned connection: from then on nothing is checked out, as a new connection would find an empty
//! database.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::socket::Socket;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;

/// One connection, and what became of its transaction.
pub(crate) struct PinnedConnection<C> {
    state: Mutex<PinnedState<C>>,
    /// It is parked again.
    checked_in: Condvar,
    /// A query that answers `1` where no other process has the pinned connection's database.
    ownership_query: Option<String>,
    begun: AtomicBool,
    /// Why nothing is checked out any more.
    poisoned: Mutex<Option<Poisoned>>,
    is_poisoned: AtomicBool,
    /// Before the test there were rows that refer to none, or keys that cannot be looked at.
    had_orphans: AtomicBool,
    /// What Diesel keeps prepared on it may be of a schema that is undone.
    schema_changed: AtomicBool,
    /// Something was set on it that outlives the transaction.
    is_dirty: AtomicBool,
    /// The connection's socket, if that is known.
    socket: Mutex<Option<Socket>>,
}

/// Where the connection is.
pub(crate) enum PinnedState<C> {
    /// NotOpen: it has to be made.
    NotOpen,
    /// Idle.
    Idle(C),
    /// A pool has it.
    CheckedOut,
}

/// What ended the transaction of a test.
#[derive(Debug, Clone)]
pub(crate) struct Poisoned {
    pub(crate) cause: String,
    pub(crate) at: Option<Place>,
}

impl<C> fmt::Debug for PinnedConnection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinnedConnection").field("poisoned", &self.poisoned()).finish_non_exhaustive()
    }
}

impl<C> PinnedConnection<C> {
    /// The first pool makes the connection.
    #[cfg(feature = "testing")]
    pub(crate) fn new(ownership_query: Option<String>) -> Self {
        Self {
            state: Mutex::new(PinnedState::NotOpen),
            checked_in: Condvar::new(),
            ownership_query,
            begun: AtomicBool::new(false),
            poisoned: Mutex::new(None),
            is_poisoned: AtomicBool::new(false),
            had_orphans: AtomicBool::new(false),
            schema_changed: AtomicBool::new(false),
            is_dirty: AtomicBool::new(false),
            socket: Mutex::default(),
        }
    }

    /// An error once it is poisoned.
    pub(crate) fn check(&self, app: &str) -> Result<()> {
        match self.poisoned() {
            None => Ok(()),
            Some(Poisoned { cause, at }) => Err(Error::TestSpoiled { app: app.into(), cause, at }),
        }
    }

    /// The connection, or that it has to be made: then the caller has it, or says that it [failed](Self::not_opened).
    pub(super) fn check_out(&self) -> PinnedState<C> {
        std::mem::replace(&mut *self.lock_state(), PinnedState::CheckedOut)
    }

    pub(super) fn not_opened(&self) {
        *self.lock_state() = PinnedState::NotOpen;
        self.checked_in.notify_all();
    }

    pub(super) fn check_in(&self, conn: C) {
        *self.lock_state() = PinnedState::Idle(conn);
        self.checked_in.notify_all();
    }

    pub(super) fn is_checked_out(&self) -> bool {
        matches!(*self.lock_state(), PinnedState::CheckedOut)
    }

    /// Waits until no pool has the connection: one that was disposed of has it until its holder gives it back.
    pub(super) fn wait_for_checkin(&self, deadline: Instant) {
        let mut state = self.lock_state();
        while matches!(*state, PinnedState::CheckedOut) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            state = self.checked_in.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lends nothing from here on. What broke it first is what counts.
    pub(crate) fn poison(&self, cause: impl Into<String>, at: Option<Place>) {
        let mut poisoned = self.poisoned.lock().unwrap_or_else(PoisonError::into_inner);
        poisoned.get_or_insert_with(|| Poisoned { cause: cause.into(), at });
        self.is_poisoned.store(true, Ordering::Release);
    }

    pub(crate) fn poisoned(&self) -> Option<Poisoned> {
        if !self.is_poisoned.load(Ordering::Acquire) {
            return None;
        }
        self.poisoned.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn socket(&self) -> Option<Socket> {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection has that socket.
    pub(super) fn set_socket(&self, socket: Option<Socket>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    pub(crate) fn note_schema_change(&self) {
        self.schema_changed.store(true, Ordering::Release);
    }

    pub(crate) fn mark_dirty(&self) {
        self.is_dirty.store(true, Ordering::Release);
    }

    #[cfg(feature = "testing")]
    pub(crate) fn is_connected(&self) -> bool {
        matches!(*self.lock_state(), PinnedState::Idle(_))
    }

    pub(crate) fn had_orphans(&self) -> bool {
        self.had_orphans.load(Ordering::Acquire)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether the connection is, after its transaction, as it was before.
    #[cfg(feature = "testing")]
    pub(crate) fn is_clean(&self) -> bool {
        !self.is_poisoned.load(Ordering::Acquire)
            && !self.schema_changed.load(Ordering::Acquire)
            && !self.is_dirty.load(Ordering::Acquire)
    }

    fn lock_state(&self) -> MutexGuard<'_, PinnedState<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> PinnedConnection<C> {
    /// Begins the transaction that is never committed, unless it has begun.
    pub(super) fn begin(&self, kind: DatabaseKind, conn: &mut C) -> Result<(), String> {
        if self.has_begun() {
            return Ok(());
        }
        kind.begin_outer(conn).map_err(|error| error.to_string())?;
        if let Some(ownership_query) = &self.ownership_query {
            let answer = conn.texts(ownership_query).map_err(|error| error.to_string())?;
            if answer.first().and_then(Option::as_deref) != Some("1") {
                return Err(TAKEN.into());
            }
        }
        self.had_orphans.store(kind == DatabaseKind::Sqlite && !kind.has_no_orphans(conn), Ordering::Release);
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Undoes the transaction, when no pool has the connection any more. Whether the pinned connection may serve another test: then the connection
    /// is as it was, or will be made anew.
    #[cfg(feature = "testing")]
    pub(crate) fn end(&self, kind: DatabaseKind) -> bool {
        let state = std::mem::replace(&mut *self.lock_state(), PinnedState::NotOpen);
        let begun = self.begun.swap(false, Ordering::AcqRel);
        let sound = self.poisoned().is_none();
        match state {
            PinnedState::Idle(mut conn) => {
                let undone = begun && matches!(kind.end_outer(&mut conn), Ok(true)) && conn.depth() == Some(0);
                if undone && self.is_clean() {
                    *self.lock_state() = PinnedState::Idle(conn);
                }
                self.schema_changed.store(false, Ordering::Release);
                self.is_dirty.store(false, Ordering::Release);
                sound && undone
            }
            PinnedState::NotOpen => sound,
            PinnedState::CheckedOut => {
                *self.lock_state() = PinnedState::CheckedOut;
                false
            }
        }
    }
}

/// What a connect says of a pinned connection that another process has.
pub(crate) const TAKEN: &str = "another process runs a test in this database";
