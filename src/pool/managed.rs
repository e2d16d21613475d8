//! One open connection with its state: age, suspicion, leftovers, permits.

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

/// A hook that runs before a connection is closed, and how it is run in the transaction around a test.
type OnClose<C> = (fn(&mut C), fn(DatabaseKind, &mut C, fn(&mut C)) -> bool);

/// An open connection with the state that the pool keeps for it.
pub(crate) struct Managed<C> {
    /// Only `take_out` and drop take it.
    conn: Option<C>,
    /// Of the one connection of a test.
    pinned: Option<Arc<PinnedConnection<C>>>,
    pub(crate) observer: Arc<StatementObserver>,
    /// Code had it that may have left something on it, whatever the observer has seen.
    pub(crate) marked_dirty: bool,
    pub(super) on_close: Option<OnClose<C>>,
    /// When it was last checked out. To read the clock at the checkin too would cost a tenth of the checkout.
    pub(super) last_used: Instant,
    /// It was checked in since [`may_stay`](Self::may_stay) was last asked.
    pub(super) was_used: bool,
    /// The latest time at which it can have been checked in.
    idle_since: Instant,
    pub(super) expires: Option<Instant>,
    pub(super) schema: SeenVersion,
    /// The server's number of it, if the server has told.
    pub(super) session: Option<u64>,
    /// The server was told to look for its client while it runs a statement.
    pub(super) checks_client: bool,
    /// The socket under it, if that is known.
    pub(crate) socket: Option<Socket>,
    /// Its socket was cut at the end of a scope's time.
    pub(crate) was_cut: bool,
    /// It has not been checked out yet.
    pub(super) unused: bool,
    /// The suspicions about its server when it was last proven sound.
    pub(super) suspicion: usize,
    /// It is closed when it is checked in.
    pub(super) retired: bool,
    /// It is known to be lost.
    pub(crate) lost: bool,
    /// Its state is not known: it is closed instead of pooled.
    pub(crate) closes_at_checkin: bool,
    /// r2d2 keeps it when it is put back. Otherwise r2d2 closes it.
    pub(super) kept_by_r2d2: bool,
    pub(super) sessions: Option<Arc<OpenSessions>>,
    pub(super) permits: Vec<LimitPermit>,
}

/// The server's numbers of the open connections of one pool.
#[derive(Debug, Default)]
pub(super) struct OpenSessions(Mutex<Vec<u64>>);

impl OpenSessions {
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
    /// A connection that is being set up. In a pinned connection it is parked wherever this ends.
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

    /// Whether its observer is still the instrumentation of the connection.
    pub(crate) fn is_observed(&mut self) -> bool
    where
        C: diesel::Connection,
    {
        let Self { conn, observer, .. } = self;
        conn.as_mut().is_some_and(|conn| observer.is_installed_as(conn.instrumentation()))
    }

    /// Whether there may be something on it that the next holder must not find.
    #[inline]
    pub(super) fn may_have_leftovers(&self) -> bool {
        self.marked_dirty || self.observer.has_seen_leftovers()
    }

    /// Whether it may be checked out. However short its lifetime, a new one serves once: another would be no younger.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.unused && self.schema.is_current() || self.is_fit(now)
    }

    /// Whether it is neither too old nor from before a change of the schema.
    fn is_fit(&self, now: Instant) -> bool {
        self.schema.is_current() && self.expires.is_none_or(|expires| now < expires)
    }

    /// Has the connection closed when it is checked in: the driver's plans and types are of an older schema, or the server takes no writes any more.
    /// The other connections of this process to the database are no better, if they are as old.
    pub(crate) fn retire(&mut self, poison: Poison) {
        if let Some(pinned) = &self.pinned {
            // It is the test's one connection. What it remembers must not reach another test.
            pinned.note_schema_change();
            return;
        }
        self.retired = true;
        // A connection that was never checked in is new: another would be no newer.
        let is_of_all = match poison {
            Poison::Outdated => true,
            Poison::ReadOnly | Poison::OtherType => !self.unused,
            Poison::Forgotten => false,
        };
        if is_of_all && self.schema.is_current() {
            self.schema.change(false);
        }
    }

    /// Whether an idle connection may stay in the pool, and until when if nobody checks it out.
    pub(super) fn may_stay(&mut self, now: Instant, idle_timeout: Option<Duration>) -> (bool, Option<Instant>) {
        if std::mem::take(&mut self.was_used) {
            self.idle_since = now;
        }
        let idle_until = idle_timeout.and_then(|timeout| self.idle_since.checked_add(timeout));
        let stays = self.is_fit(now) && idle_until.is_none_or(|end| now < end);
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
