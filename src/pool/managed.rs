//! An open connection with the state that the pool keeps for it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::connection_limit::LimitPermit;
use super::pinned_connection::PinnedConnection;
use super::schema_version::SeenVersion;
use super::socket::Socket;
use super::statement_observer::StatementObserver;
use crate::dialect::Poison;
use crate::error::LOST;
use crate::kind::DatabaseKind;

/// The hook that runs before a connection is closed, and the function that runs it as a savepoint in a test's
/// transaction.
type OnClose<C> = (fn(&mut C), fn(DatabaseKind, &mut C, fn(&mut C)) -> bool);

/// An open connection with the state that the pool keeps for it.
pub(crate) struct Managed<C> {
    /// `None` only after `take_out` and during drop.
    conn: Option<C>,
    /// The pinned connection of the test, if this is its connection.
    pinned: Option<Arc<PinnedConnection<C>>>,
    pub(crate) observer: Arc<StatementObserver>,
    /// Code that may have left state on the connection has used it, whatever the observer has seen.
    pub(crate) marked_dirty: bool,
    pub(super) on_close: Option<OnClose<C>>,
    /// The time of the last checkout. Reading the clock at the checkin as well would add a tenth to the cost of a
    /// checkout.
    pub(super) last_used: Instant,
    /// The connection was checked in after the last call of [`may_stay`](Self::may_stay).
    pub(super) was_used: bool,
    /// An upper bound of the time of the last checkin.
    idle_since: Instant,
    pub(super) expires: Option<Instant>,
    pub(super) schema: SeenVersion,
    /// The id of the session on the server, if the server has reported it.
    pub(super) session: Option<u64>,
    /// The server was configured to check for its client while it runs a statement.
    pub(super) checks_client: bool,
    /// The socket of the connection, if it is known.
    pub(crate) socket: Option<Socket>,
    /// The socket was cut at the deadline of a scope.
    pub(crate) was_cut: bool,
    /// The connection was not checked out yet.
    pub(super) unused: bool,
    /// The number of suspicions about the server when the connection was last proven healthy.
    pub(super) suspicion: usize,
    /// The connection is outdated and is closed at its checkin.
    pub(super) retired: bool,
    /// The connection is known to be lost.
    pub(crate) lost: bool,
    /// The state of the connection is unknown, so it is closed at its checkin.
    pub(crate) closes_at_checkin: bool,
    /// r2d2 keeps the connection when it is put back. Otherwise r2d2 closes it.
    pub(super) kept_by_r2d2: bool,
    pub(super) sessions: Option<Arc<ServerSessions>>,
    pub(super) permits: Vec<LimitPermit>,
}

/// The session ids of the open connections of one pool.
#[derive(Debug, Default)]
pub(super) struct ServerSessions(Mutex<Vec<u64>>);

impl ServerSessions {
    pub(super) fn opened(&self, session: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(session);
    }

    fn closed(&self, session: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|open| *open != session);
    }

    pub(super) fn all(&self) -> Vec<u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl<C> fmt::Debug for Managed<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Managed").field("closes_at_checkin", &self.closes_at_checkin).finish_non_exhaustive()
    }
}

impl<C> Managed<C> {
    /// A connection that is being set up. Drop checks a pinned connection in, even if the setup fails.
    pub(super) fn new(
        conn: C,
        pinned: Option<Arc<PinnedConnection<C>>>,
        observer: Arc<StatementObserver>,
        schema: SeenVersion,
    ) -> Self {
        Self {
            conn: Some(conn),
            pinned,
            observer,
            marked_dirty: false,
            on_close: None,
            last_used: Instant::now(),
            was_used: false,
            idle_since: Instant::now(),
            expires: None,
            schema,
            unused: true,
            session: None,
            checks_client: false,
            socket: None,
            was_cut: false,
            suspicion: 0,
            retired: false,
            lost: false,
            closes_at_checkin: false,
            kept_by_r2d2: false,
            sessions: None,
            permits: Vec::new(),
        }
    }

    #[inline]
    pub(crate) fn conn(&self) -> &C {
        self.conn.as_ref().expect(TAKEN_OUT)
    }

    #[inline]
    pub(crate) fn conn_mut(&mut self) -> &mut C {
        self.conn.as_mut().expect(TAKEN_OUT)
    }

    /// Takes the connection out until [`put_back`](Self::put_back).
    pub(crate) fn take_out(&mut self) -> C {
        self.conn.take().expect(TAKEN_OUT)
    }

    pub(crate) fn put_back(&mut self, conn: C) {
        self.conn = Some(conn);
    }

    pub(crate) fn pinned(&self) -> Option<&Arc<PinnedConnection<C>>> {
        self.pinned.as_ref()
    }

    /// Whether the observer is still installed as the instrumentation of the connection.
    pub(crate) fn is_observed(&mut self) -> bool
    where
        C: diesel::Connection,
    {
        let Self { conn, observer, .. } = self;
        conn.as_mut().is_some_and(|conn| observer.is_installed_as(conn.instrumentation()))
    }

    /// Whether the connection may carry state that the next holder must not see.
    #[inline]
    pub(super) fn may_have_leftovers(&self) -> bool {
        self.marked_dirty || self.observer.has_seen_leftovers()
    }

    /// Whether the connection may be checked out. A new connection serves once even if its lifetime is over, because
    /// another one would not be younger.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.unused && self.schema.is_current() || self.is_current(now)
    }

    /// Whether the connection is young enough and has seen the current schema.
    fn is_current(&self, now: Instant) -> bool {
        self.schema.is_current() && self.expires.is_none_or(|expires| now < expires)
    }

    /// Closes the connection at its checkin, because the driver's plans and types belong to an older schema or the
    /// server accepts no writes any more. If this concerns all connections of this process to the database, those that
    /// are as old are closed too.
    pub(crate) fn retire(&mut self, poison: Poison) {
        if let Some(pinned) = &self.pinned {
            // This is the test's one connection. Its prepared statements must not reach another test.
            pinned.note_schema_change();
            return;
        }
        self.retired = true;
        // A connection that was never checked in is new, so no other connection is newer.
        let is_of_all = match poison {
            Poison::Outdated => true,
            Poison::ReadOnly | Poison::OtherType => !self.unused,
            Poison::Forgotten => false,
        };
        if is_of_all && self.schema.is_current() {
            self.schema.change(false);
        }
    }

    /// Whether an idle connection may stay in the pool, and until when it may stay if it is not checked out.
    pub(super) fn may_stay(&mut self, now: Instant, idle_timeout: Option<Duration>) -> (bool, Option<Instant>) {
        if std::mem::take(&mut self.was_used) {
            self.idle_since = now;
        }
        let idle_until = idle_timeout.and_then(|timeout| self.idle_since.checked_add(timeout));
        let stays = self.is_current(now) && idle_until.is_none_or(|end| now < end);
        (stays, idle_until.into_iter().chain(self.expires).min())
    }
}

impl<C> Drop for Managed<C> {
    fn drop(&mut self) {
        self.before_close();
        let conn = self.conn.take();
        match (&self.pinned, conn) {
            (Some(pinned), Some(conn)) => pinned.check_in(conn),
            (_, conn) => drop(conn),
        }
        if let (Some(sessions), Some(session)) = (&self.sessions, self.session) {
            sessions.closed(session);
        }
    }
}

impl<C> Managed<C> {
    fn before_close(&mut self) {
        if let Some(socket) = self.socket.filter(|_| self.pinned.is_none()) {
            socket.forget();
        }
        if let Some(pinned) = &self.pinned {
            if self.closes_at_checkin || self.lost {
                pinned.poison(if self.lost { LOST } else { "its connection was left in an unknown state" }, None);
            }
            if self.may_have_leftovers() {
                pinned.mark_dirty();
            }
            if self.observer.may_have_changed_schema() {
                pinned.note_schema_change();
            }
        }
        let (Some((hook, run_nested)), Some(conn)) = (self.on_close.take(), &mut self.conn) else { return };
        let pinned = self.pinned.as_ref().filter(|pinned| pinned.has_begun());
        let outcome = catch_unwind(AssertUnwindSafe(|| match pinned {
            None => hook(conn),
            Some(_) if run_nested(self.observer.kind(), conn, hook) => {}
            Some(pinned) => pinned.poison("hook `on_close` ended its transaction", None),
        }));
        if let Err(panic) = outcome {
            let message = crate::panic::panic_message(&*panic);
            crate::wording::log_line!(
                warn,
                "diesel_session::pool",
                "hook `on_close` panicked: {message}; the connection is closed all the same"
            );
        }
    }
}

const TAKEN_OUT: &str = "the connection was taken out and not put back";
