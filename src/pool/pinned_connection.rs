//! The one connection of a test that is rolled back. It is inside a transaction that is never committed, and all pools
//! of the test's application use it in turn.
//!
//! A pool that closes its connection checks it in here instead, and the next pool checks it out. An event that ends
//! the transaction, or leaves the connection in an unknown state, poisons the pinned connection. From then on it is
//! never checked out again, because a new connection would see an empty database.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::socket::Socket;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;

/// The one connection of a test, and the state of its transaction.
pub(crate) struct PinnedConnection<C> {
    state: Mutex<PinnedState<C>>,
    /// Notified when the connection is checked in.
    checked_in: Condvar,
    /// A query whose answer is `1` if no other process uses the database of the pinned connection.
    ownership_query: Option<String>,
    begun: AtomicBool,
    /// The reason why the connection is not checked out any more.
    poisoned: Mutex<Option<Poisoned>>,
    is_poisoned: AtomicBool,
    /// Before the test, rows violated their foreign keys, or the foreign keys could not be checked.
    had_orphans: AtomicBool,
    /// Diesel's prepared statements may refer to a schema that is rolled back.
    schema_changed: AtomicBool,
    /// A statement has set state that outlives the transaction.
    is_dirty: AtomicBool,
    /// The socket of the connection, if it is known.
    socket: Mutex<Option<Socket>>,
}

/// The state of the pinned connection.
pub(crate) enum PinnedState<C> {
    /// The connection is not open.
    NotOpen,
    /// The connection is open, and no pool uses it.
    Idle(C),
    /// A pool uses the connection.
    CheckedOut,
}

/// The reason why a pinned connection is poisoned.
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
    /// Opens nothing. The first pool opens the connection.
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

    /// Returns an error if the connection is poisoned.
    pub(crate) fn check(&self, app: &str) -> Result<()> {
        match self.poisoned() {
            None => Ok(()),
            Some(Poisoned { cause, at }) => Err(Error::TestSpoiled { app: app.into(), cause, at }),
        }
    }

    /// Checks the connection out. After `NotOpen` the caller has to open it, or call [`not_opened`](Self::not_opened)
    /// if that fails.
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

    /// Waits until no pool uses the connection. A pool that was disposed of uses it until its holder checks it in.
    pub(super) fn wait_for_checkin(&self, deadline: Instant) {
        let mut state = self.lock_state();
        while matches!(*state, PinnedState::CheckedOut) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            state = self.checked_in.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Poisons the connection. The first cause wins.
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

    /// Whether the transaction left no state on the connection.
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

    /// Rolls the transaction back after the last pool has checked the connection in. Returns whether the pinned
    /// connection may serve another test: its connection is then as it was before, or is closed and opened again.
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

/// The message of a connect whose database is in use by another process.
pub(crate) const TAKEN: &str = "another process runs a test in this database";
