//! An open connection with the state that the pool keeps for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::connection_limit::LimitPermit;
use super::manager::Connector;
use super::options::{OwnedConnection, PoolOptions};
use super::reset::ResetFailure;
use super::schema_version::SeenVersion;
use super::socket::Socket;
use super::statement_observer::StatementObserver;
use super::transaction_style::TransactionStyle;
use crate::connection::SessionConnection;
use crate::dialect::Poison;
use crate::error::LOST;

/// An open connection with the state that the pool keeps for it.
pub(crate) struct Managed<C: SessionConnection> {
    /// `None` only after `take_out` and during drop.
    conn: Option<C>,
    connector: Arc<Connector<C>>,
    pub(crate) observer: Arc<StatementObserver>,
    /// The setup of the connection is complete.
    pub(super) is_set_up: bool,
    /// Code that may have left state on the connection has used it, whatever the observer has seen.
    pub(crate) marked_dirty: bool,
    /// The driver may keep statements that were prepared for another schema.
    pub(super) has_old_statements: bool,
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
    /// The name of the database, as the server has reported it.
    pub(crate) database: Option<String>,
    /// A process of the server, and the identity that the server has reported in it, if any.
    pub(crate) identity: Option<(String, Option<String>)>,
    /// The server was configured to check for its client while it runs a statement.
    pub(super) checks_client: bool,
    /// The limit of a deadline that the server session has in place of the connection's own limit. On SQLite it limits
    /// waits.
    pub(crate) limit: Option<Duration>,
    /// SQL that restores the limit that the setup of the program has left.
    pub(super) own_limit: Option<String>,
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
    pub(super) permits: Vec<LimitPermit>,
}

impl<C: SessionConnection> Managed<C> {
    /// A connection that is being set up.
    pub(super) fn new(connection: OwnedConnection<C>, connector: Arc<Connector<C>>, suspicion: usize) -> Self {
        let listener = connector.options.owner.as_ref().map(|owner| owner.statement_listener());
        Self {
            conn: Some(connection.conn),
            observer: Arc::new(StatementObserver::new(connector.options.target.kind, listener)),
            is_set_up: connection.is_set_up,
            marked_dirty: false,
            has_old_statements: false,
            last_used: Instant::now(),
            was_used: false,
            idle_since: Instant::now(),
            expires: None,
            schema: SeenVersion::now(Arc::clone(&connector.version)),
            unused: true,
            session: None,
            database: None,
            identity: None,
            checks_client: false,
            limit: None,
            own_limit: None,
            socket: connection.socket,
            was_cut: false,
            suspicion,
            retired: false,
            lost: false,
            closes_at_checkin: false,
            kept_by_r2d2: false,
            permits: Vec::new(),
            connector,
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

    /// SQL that restores the connection's own limit after the limit of a deadline.
    pub(crate) fn sql_restoring_limit(&self) -> Option<String> {
        let PoolOptions { target, config, .. } = &*self.connector.options;
        self.own_limit.clone().or_else(|| target.kind.restore_limit(config))
    }

    pub(super) fn ping(&mut self) -> QueryResult<()> {
        match self.connector.options.target.kind.texts().ping {
            Some(sql) => self.conn_mut().batch_execute(sql),
            None => self.conn_mut().ping(),
        }
    }

    /// Whether the observer is still installed as the instrumentation of the connection.
    pub(crate) fn is_observed(&mut self) -> bool {
        let Self { conn, observer, .. } = self;
        conn.as_mut().is_some_and(|conn| observer.is_installed_as(conn.instrumentation()))
    }

    /// Runs statements of the library itself, which no instrumentation sees.
    pub(crate) fn suppressed<T>(&mut self, run: impl FnOnce(&mut C) -> T) -> T {
        self.observer.suppress(true);
        let outcome = run(self.conn_mut());
        self.observer.suppress(false);
        outcome
    }

    /// Rolls back the levels above `depth` that Diesel knows.
    pub(crate) fn roll_back_levels(&mut self, depth: u32) -> QueryResult<()> {
        loop {
            match self.conn_mut().depth() {
                Some(open) if open > depth => self.conn_mut().rollback_level()?,
                Some(_) => return Ok(()),
                None => return Err(diesel::result::Error::BrokenTransactionManager),
            }
        }
    }

    pub(super) fn style(&self) -> &TransactionStyle<C> {
        &self.connector.options.transactions
    }

    /// The socket, if the drop closes the connection.
    pub(super) fn closing_socket(&self) -> Option<Socket> {
        self.socket.filter(|_| !self.has_owner())
    }

    /// Whether the drop gives the connection back to an owner.
    pub(super) fn has_owner(&self) -> bool {
        self.is_set_up && self.connector.options.owner.is_some()
    }

    /// Whether the connection may carry state that the next holder must not see.
    #[inline]
    pub(crate) fn may_have_leftovers(&self) -> bool {
        self.marked_dirty || self.observer.has_seen_leftovers()
    }

    /// The state that a holder has left was removed, or is beyond reach.
    pub(crate) fn forget_leftovers(&mut self) {
        self.observer.forget_leftovers();
        self.marked_dirty = false;
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
        self.has_old_statements = true;
        if self.has_owner() {
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

impl<C: SessionConnection> Drop for Managed<C> {
    fn drop(&mut self) {
        let connector = Arc::clone(&self.connector);
        let options = &connector.options;
        if self.closes_at_checkin || self.lost {
            let cause = if self.lost { LOST } else { "its connection was left in an unknown state" };
            options.transactions.invalidate_outer(cause, None);
        }
        if let Some(socket) = self.closing_socket() {
            socket.forget();
        }
        if let Some(hook) = options.on_close.as_ref().filter(|_| self.is_set_up && self.conn.is_some())
            && let Err(ResetFailure { panic: Some(message), .. }) = self.run_hook("hook `on_close`", hook)
        {
            log_pool!(warn, "hook `on_close` panicked: {message}; the connection is closed all the same");
        }
        if let Some(owner) = &options.owner {
            let conn = self.conn.take().filter(|_| self.is_set_up);
            let connection = conn.map(|conn| OwnedConnection { conn, socket: self.socket, is_set_up: true });
            owner.give_back(connection, !self.has_old_statements && !self.may_have_leftovers());
        }
        self.conn = None;
        if let Some(session) = self.session {
            connector.sessions.lock().retain(|open| *open != session);
        }
    }
}

const TAKEN_OUT: &str = "the connection was taken out and not put back";
