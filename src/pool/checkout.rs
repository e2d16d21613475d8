//! The checkout of a connection by a session: waits for an idle or new connection, and pings the connection if its
//! health is in doubt.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::admission::CheckoutGuard;
use super::connections::{Connections, managed};
use super::managed::Managed;
use super::manager::{ConnectFailure, Manager};
use super::options::ConnectionOwner;
use super::storage::Storage;
use super::waiter::Refused;
use super::{AppPool, CheckedOut};
use crate::behind::Behind;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{ConnectErrorKind, Details, Error, Holder, PoolOf, Result, Shortage, SourceLocation, WaitLimit};

/// A connection that was checked out less than this time ago is not pinged.
const TRUSTED_WITHOUT_PING: Duration = Duration::from_millis(500);

/// A connection that was checked out less than this time ago is not checked for a hang-up of the server.
const TRUSTED_WITHOUT_CHECK: Duration = Duration::from_millis(1);

/// The reason in the log line about a connection that was cut during a ping.
const PING: &str = "did not answer a ping in time";

/// A caller's request for a connection.
#[derive(Debug, Clone, Copy)]
struct CheckoutRequest {
    location: SourceLocation,
    since: Instant,
    deadline: Instant,
    /// The limit that ends a wait until the deadline.
    limit: WaitLimit,
}

impl<C: SessionConnection> AppPool<C> {
    /// Checks out a connection within the application's `acquire_timeout` and before `limit`.
    pub(crate) fn acquire(
        self: Arc<Self>,
        location: SourceLocation,
        in_transaction: bool,
        limit: Option<Instant>,
    ) -> Result<CheckedOut<C>> {
        loop {
            let mut checked_out = Arc::clone(&self).acquire_with_limit(location, in_transaction, limit)?;
            if checked_out.restore_limit(limit) {
                return Ok(checked_out);
            }
            checked_out.close();
        }
    }

    /// Like [`acquire`](Self::acquire). The connection may have the limit of a deadline, see [`Managed::limit`].
    pub(crate) fn acquire_with_limit(
        self: Arc<Self>,
        location: SourceLocation,
        in_transaction: bool,
        limit: Option<Instant>,
    ) -> Result<CheckedOut<C>> {
        self.acquire_within(location, in_transaction, limit, WaitLimit::Scope)
    }

    /// Like [`acquire`](Self::acquire). `kind_of_limit` says where `limit` comes from.
    pub(crate) fn acquire_within(
        mut self: Arc<Self>,
        location: SourceLocation,
        in_transaction: bool,
        limit: Option<Instant>,
        kind_of_limit: WaitLimit,
    ) -> Result<CheckedOut<C>> {
        let since = Instant::now();
        let config = &self.storage.options.config;
        let connect_timeout = config.connect_timeout;
        let deadline = since + config.acquire_timeout;
        let (deadline, wait_limit) = match limit {
            Some(limit) if limit < deadline => (limit, kind_of_limit),
            _ => (deadline, WaitLimit::Acquire),
        };
        let request = CheckoutRequest { location, since, deadline, limit: wait_limit };
        if let Some(owner) = &self.storage.options.owner {
            self.wait_for_owner(&**owner, &request)?;
        }
        let mut attempt_started = since;
        loop {
            let holder = Holder::new(Arc::clone(&self.storage.options.app), location, attempt_started, in_transaction);
            let assigned = match self.get_assigned(holder, deadline, connect_timeout) {
                Ok(assigned) => assigned,
                Err(refused) => return Err(self.error_of_refusal(refused, &request)),
            };
            let since = assigned.since;
            let mut checked_out = assigned.into_guard(self);
            let outcome = checked_out.prepare(since, deadline, limit);
            if let Ok(true) = outcome {
                return Ok(checked_out);
            }
            self = Arc::clone(&checked_out.pool);
            let missed_deadline = checked_out.managed().closes_at_checkin;
            checked_out.close();
            outcome?;
            attempt_started = Instant::now();
            // Without time for a ping, each further attempt would close another idle connection.
            if attempt_started >= deadline {
                return Err(self.error_of_refusal(Refused::Connecting { began: request.since, hangs: false }, &request));
            }
            if missed_deadline {
                // To wait for the ping of each idle connection in turn would use up the caller's time.
                let suspicion = self.storage.server.suspicion();
                self.close_idle_unless(|_, conn, _| (managed(conn).suspicion == suspicion, None));
            }
        }
    }

    /// Whether the session on the server still exists. The connection is pinged if this is in doubt.
    fn is_alive(&self, managed: &mut Managed<C>, since: Instant, deadline: Instant) -> bool {
        let suspicion = self.storage.server.suspicion();
        let idle = since.saturating_duration_since(managed.last_used);
        let is_trusted = managed.suspicion == suspicion;
        if idle < TRUSTED_WITHOUT_CHECK && is_trusted {
            return true;
        }
        if dialect::detect_hang_up(managed.conn_mut()) {
            return false;
        }
        if idle < TRUSTED_WITHOUT_PING && is_trusted {
            return true;
        }
        if !self.storage.can_be_cut(managed) {
            return false;
        }
        let end = deadline.min(Instant::now() + self.storage.options.config.connect_timeout);
        let answer = self.storage.call(managed, end, PING, |managed| managed.ping());
        managed.observer.take();
        managed.suspicion = suspicion;
        matches!(answer, Some(Ok(())))
    }

    /// Waits until the owner has the connection: a pool that was disposed of may still have it checked out.
    fn wait_for_owner(&self, connection_owner: &dyn ConnectionOwner<C>, request: &CheckoutRequest) -> Result<()> {
        let options = &self.storage.options;
        if let Some(outer) = options.transactions.outer() {
            outer.check(&options.app)?;
        }
        if !connection_owner.is_in_use() || !self.is_empty() {
            return Ok(());
        }
        let holders = self.storage.owner.upgrade().map(|owner| owner.held_by_this_thread()).unwrap_or_default();
        if !holders.is_empty() {
            let (app, short, pool) = (options.app.to_string(), Shortage::TestConnection, options.pool_of);
            return Err(Details::WouldDeadlock { app, short, holders, at: request.location, pool }.into());
        }
        connection_owner.wait_until_unused(request.deadline);
        Ok(())
    }

    #[cold]
    fn error_of_refusal(&self, refused: Refused<Box<ConnectFailure>>, request: &CheckoutRequest) -> Error {
        if matches!(refused, Refused::Connecting { hangs: true, .. })
            && self.hangs()
            && let Some(owner) = self.storage.owner.upgrade()
        {
            // The driver may never return. A new pool with another thread serves the next caller.
            owner.abandon_hanging(self.number);
        }
        let options = &self.storage.options;
        let (app, at, waited) = (options.app.to_string(), request.location, request.since.elapsed());
        let server = options.target.shown.clone();
        match refused {
            Refused::Closed => self.closed_error(),
            Refused::Deadlock { holders, of_limit } => {
                let short = match (options.pool_of, of_limit) {
                    (PoolOf::RolledBackTest, _) => Shortage::TestConnection,
                    (_, true) => Shortage::Limit,
                    (_, false) => Shortage::Pool,
                };
                Error::from(Details::WouldDeadlock { app, short, holders, at, pool: options.pool_of })
            }
            Refused::Connecting { began, hangs } => {
                let limit = if hangs { WaitLimit::Connect } else { request.limit };
                let connecting = (began < request.since).then(|| began.elapsed());
                let is_pooled = options.config.behind != Behind::Nothing;
                Error::from(Details::ConnectTimeout { app, server, waited, connecting, at, limit, is_pooled })
            }
            Refused::Failed(failure) => {
                let ConnectFailure { kind, mut message, .. } = *failure;
                if kind == ConnectErrorKind::ServerFull {
                    message.push_str(&self.storage.server.session_counts_text());
                }
                Error::from(Details::Connect { app, server, kind, message, at })
            }
            Refused::Limited => {
                let limit = self.limits.iter().find_map(|limit| limit.limit);
                Error::from(Details::ConnectionLimitReached {
                    app,
                    waited,
                    max_connections: limit.unwrap_or_default(),
                    holders: self.holders_of_limit(),
                    at,
                    limit: request.limit,
                })
            }
            Refused::InUse { waiting, connecting_since, holders } => Error::from(Details::AcquireTimeout {
                app,
                waited,
                connecting_for: connecting_since.map(|since| since.elapsed()),
                max_size: options.config.max_size,
                waiting,
                holders,
                at,
                limit: request.limit,
                pool: options.pool_of,
            }),
        }
    }
}

impl<C: SessionConnection> CheckoutGuard<Connections<C>> {
    /// Prepares the connection for its holder. Returns `false` if the connection cannot be used.
    #[inline]
    fn prepare(&mut self, since: Instant, deadline: Instant, limit: Option<Instant>) -> Result<bool> {
        let (pool, managed) = (&self.pool, managed(self.conn.as_mut().expect(ONLY_DROP)));
        if !managed.is_usable(since) {
            return Ok(false);
        }
        if pool.storage.kind().can_go_stale() && !pool.is_alive(managed, since, deadline) {
            pool.storage.server.suspect();
            return Ok(false);
        }
        managed.last_used = since;
        match &pool.storage.options.on_checkout {
            Some(hook) => pool.on_checkout(managed, hook, limit),
            None => Ok(true),
        }
    }

    /// Restores the connection's own limit, if the last holder has left the limit of a deadline. Returns `false` if the
    /// connection cannot be used.
    #[inline]
    fn restore_limit(&mut self, deadline: Option<Instant>) -> bool {
        if self.managed().limit.is_none() {
            return true;
        }
        let (pool, managed) = (Arc::clone(&self.pool), self.managed());
        managed.limit = None;
        let Some(sql) = managed.sql_restoring_limit() else { return true };
        let end = pool.storage.call_deadline(deadline);
        let restore = |managed: &mut Managed<C>| managed.suppressed(|conn| conn.batch_execute(&sql));
        matches!(pool.storage.call(managed, end, "did not restore its limit in time", restore), Some(Ok(())))
    }

    #[inline]
    pub(crate) fn managed(&mut self) -> &mut Managed<C> {
        managed(self.conn.as_mut().expect(ONLY_DROP))
    }

    #[inline]
    pub(crate) fn conn(&mut self) -> &mut C {
        self.managed().conn_mut()
    }

    pub(crate) fn conn_ref(&self) -> &C {
        let pooled: Option<&r2d2::PooledConnection<Manager<C>>> = self.conn.as_deref();
        match pooled.map(|pooled| &**pooled) {
            Some(Ok(managed)) => managed.conn(),
            _ => unreachable!("{ONLY_DROP}"),
        }
    }

    /// Pings the connection. Returns `None` if the server did not answer until `end`; the connection is then closed. If
    /// the socket is not known, `end` does not end the ping.
    pub(crate) fn ping(&mut self, end: Option<Instant>) -> Option<QueryResult<()>> {
        let (pool, managed) = (Arc::clone(&self.pool), self.managed());
        match end {
            Some(end) => pool.storage.call(managed, end, PING, |managed| managed.ping()),
            None => Some(managed.ping()),
        }
    }

    /// Marks the connection: it is closed when it is checked in.
    pub(crate) fn close_at_checkin(&mut self) {
        self.managed().closes_at_checkin = true;
    }

    /// Has to be called before a change of the schema. All older connections are closed at their checkin, except for
    /// this one if it has prepared no statement yet.
    pub(crate) fn note_schema_change(&mut self) {
        let prepared_nothing = self.pool.storage.options.on_connect.is_none();
        let managed = self.managed();
        managed.has_old_statements = true;
        // A migration can run any SQL.
        managed.marked_dirty = true;
        managed.schema.change(managed.unused && prepared_nothing);
    }

    /// Whether another process, the parent of a fork, has checked out this connection. This process must not send
    /// anything on it.
    pub(crate) fn is_inherited(&self) -> bool {
        self.pool.storage.is_inherited()
    }
}

const ONLY_DROP: &str = "only drop takes the connection";
