//! The one connection of a test that is rolled back: it is inside a transaction that is never committed, and all pools that the
//! test's application ever has use it.
//!
//! Where a pool would close its connection it is parked here instead, and the next pool finds it. What ends the transaction, or leaves
//! the connection in a state nobody knows, breaks the lane: from then on nothing is lent, as a new connection would find an empty
//! database.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::socket::Socket;
use crate::backend::Kind;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

/// One connection, and what became of its transaction.
pub(crate) struct Lane<C> {
    parked: Mutex<Parked<C>>,
    /// It is parked again.
    back: Condvar,
    /// A query that answers `1` where no other process has the lane's database.
    claim: Option<String>,
    begun: AtomicBool,
    /// Why nothing is lent any more.
    broken: Mutex<Option<Break>>,
    is_broken: AtomicBool,
    /// Before the test there were rows that refer to none, or keys that cannot be looked at.
    had_orphans: AtomicBool,
    /// What Diesel keeps prepared on it may be of a schema that is undone.
    schema_changed: AtomicBool,
    /// Something was set on it that outlives the transaction.
    soiled: AtomicBool,
    /// The connection's socket, if that is known.
    socket: Mutex<Option<Socket>>,
}

/// Where the connection is.
pub(crate) enum Parked<C> {
    /// Nowhere: it has to be made.
    Nowhere,
    /// Here.
    Here(C),
    /// A pool has it.
    Lent,
}

/// What ended the transaction of a test.
#[derive(Debug, Clone)]
pub(crate) struct Break {
    pub(crate) cause: String,
    pub(crate) at: Option<Place>,
}

impl<C> fmt::Debug for Lane<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("broken", &self.broken()).finish_non_exhaustive()
    }
}

impl<C> Lane<C> {
    /// The first pool makes the connection.
    pub(crate) fn new(claim: Option<String>) -> Self {
        Self {
            parked: Mutex::new(Parked::Nowhere),
            back: Condvar::new(),
            claim,
            begun: AtomicBool::new(false),
            broken: Mutex::new(None),
            is_broken: AtomicBool::new(false),
            had_orphans: AtomicBool::new(false),
            schema_changed: AtomicBool::new(false),
            soiled: AtomicBool::new(false),
            socket: Mutex::default(),
        }
    }

    /// An error once it is broken.
    pub(crate) fn check(&self, app: &str) -> Result<()> {
        match self.broken() {
            None => Ok(()),
            Some(Break { cause, at }) => Err(Error::TestSpoiled { app: app.into(), cause, at }),
        }
    }

    /// The connection, or that it has to be made: then the caller has it, or says that it [failed](Self::not_made).
    pub(super) fn take(&self) -> Parked<C> {
        std::mem::replace(&mut *self.parked(), Parked::Lent)
    }

    pub(super) fn not_made(&self) {
        *self.parked() = Parked::Nowhere;
        self.back.notify_all();
    }

    pub(super) fn park(&self, conn: C) {
        *self.parked() = Parked::Here(conn);
        self.back.notify_all();
    }

    pub(super) fn is_lent(&self) -> bool {
        matches!(*self.parked(), Parked::Lent)
    }

    /// Waits until no pool has the connection: one that was disposed of has it until its borrower gives it back.
    pub(super) fn wait_until_parked(&self, deadline: Instant) {
        let mut parked = self.parked();
        while matches!(*parked, Parked::Lent) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            parked = self.back.wait_timeout(parked, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lends nothing from here on. What broke it first is what counts.
    pub(crate) fn break_off(&self, cause: impl Into<String>, at: Option<Place>) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        broken.get_or_insert_with(|| Break { cause: cause.into(), at });
        self.is_broken.store(true, Ordering::Release);
    }

    pub(crate) fn broken(&self) -> Option<Break> {
        if !self.is_broken.load(Ordering::Acquire) {
            return None;
        }
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn socket(&self) -> Option<Socket> {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection has that socket.
    pub(super) fn has_socket(&self, socket: Option<Socket>) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = socket;
    }

    pub(crate) fn schema_changes(&self) {
        self.schema_changed.store(true, Ordering::Release);
    }

    pub(crate) fn soil(&self) {
        self.soiled.store(true, Ordering::Release);
    }

    pub(crate) fn is_connected(&self) -> bool {
        matches!(*self.parked(), Parked::Here(_))
    }

    pub(crate) fn had_orphans(&self) -> bool {
        self.had_orphans.load(Ordering::Acquire)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether the connection is, after its transaction, as it was before.
    pub(crate) fn is_clean(&self) -> bool {
        !self.is_broken.load(Ordering::Acquire)
            && !self.schema_changed.load(Ordering::Acquire)
            && !self.soiled.load(Ordering::Acquire)
    }

    fn parked(&self) -> MutexGuard<'_, Parked<C>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> Lane<C> {
    /// Begins the transaction that is never committed, unless it has begun.
    pub(super) fn begin(&self, kind: Kind, conn: &mut C) -> Result<(), String> {
        if self.has_begun() {
            return Ok(());
        }
        kind.begin_outer(conn).map_err(|error| error.to_string())?;
        if let Some(claim) = &self.claim {
            let answer = conn.texts(claim).map_err(|error| error.to_string())?;
            if answer.first().and_then(Option::as_deref) != Some("1") {
                return Err(TAKEN.into());
            }
        }
        self.had_orphans.store(kind == Kind::Sqlite && !kind.has_no_orphans(conn), Ordering::Release);
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Undoes the transaction, when no pool has the connection any more. Whether the lane may serve another test: then the connection
    /// is as it was, or will be made anew.
    pub(crate) fn end(&self, kind: Kind) -> bool {
        let parked = std::mem::replace(&mut *self.parked(), Parked::Nowhere);
        let begun = self.begun.swap(false, Ordering::AcqRel);
        let sound = self.broken().is_none();
        match parked {
            Parked::Here(mut conn) => {
                let undone = begun && matches!(kind.end_outer(&mut conn), Ok(true)) && conn.depth() == Some(0);
                if undone && self.is_clean() {
                    *self.parked() = Parked::Here(conn);
                }
                self.schema_changed.store(false, Ordering::Release);
                self.soiled.store(false, Ordering::Release);
                sound && undone
            }
            Parked::Nowhere => sound,
            Parked::Lent => {
                *self.parked() = Parked::Lent;
                false
            }
        }
    }
}

/// How the cause begins if the connection was lost.
pub(crate) const LOST: &str = "its connection was lost";

/// What a connect says of a lane that another process has.
pub(crate) const TAKEN: &str = "another process runs a test in this database";
