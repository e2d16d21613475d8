//! The state of a session's transaction, from its beginning to its commit or rollback.
//!
//! Invariants: a connection is checked out in the phases `Reading` and `Begun`; in the phase `Idle` none is checked
//! out between two calls. While `invalidation` is set, only a rollback is sent. A connection is doomed if the code
//! that used it panicked.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;

use super::invalidation::Invalidation;
use super::statement::{Leftovers, Statement};
use super::transient_failure::TransientFailure;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::dialect::{self, BeginOptions, Poison};
use crate::error::{A_READ, A_WRITE, Blockers, Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::{CallDeadline, CheckedOut, GRACE, WritePermit, refuse_empty_statements};
use crate::recorder::CallSite;
use crate::settings::{Isolation, Mode, Settings};
use crate::wording::phrase;

/// The minimum and the maximum by which the statement limit of the server may exceed the remaining time.
const LIMIT_SLACK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// Why a session that sends something has a connection.
pub(super) const PREPARED: &str = "`prepare` or `begin` has checked out a connection";

/// What a statement may do to the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A typed SELECT: it only reads.
    Read,
    /// Any other typed statement.
    Write,
    /// Raw SQL, or code that has the connection itself: it may do anything.
    Raw,
}

impl Access {
    /// What an error calls it.
    fn operation(self) -> &'static str {
        match self {
            Self::Read => A_READ,
            Self::Write => A_WRITE,
            Self::Raw => "a statement",
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) enum TransactionPhase {
    Idle,
    /// SQLite only: a default scope has read outside of a transaction. Its first write begins the transaction.
    Reading(Place),
    Begun(Place),
}

#[derive(Debug)]
pub(crate) struct TransactionState<C: SessionConnection> {
    pub(super) app: Arc<AppCore<C>>,
    pub(super) settings: Settings,
    pub(super) connection: Option<CheckedOut<C>>,
    pub(super) write_permit: Option<WritePermit>,
    pub(super) phase: TransactionPhase,
    /// The number of open savepoints.
    pub(super) savepoints: u32,
    pub(super) invalidation: Option<Invalidation>,
    /// The statement limit that was last sent to the server.
    statement_limit_sent: Option<Duration>,
    /// The busy timeout that was last sent to SQLite.
    busy_timeout_sent: Option<Duration>,
    /// The SQL that lets the connection write again, if a read-only session has forbidden it.
    allow_writes: Option<&'static str>,
    /// The call that sent the last statement.
    pub(super) sent_at: Option<Place>,
    /// The number of transactions that this session has rolled back.
    rollbacks: u64,
    /// Whether this transaction had a failure after which another run may succeed.
    pub(super) transient: TransientFailure,
    /// Raw SQL or code of the program has used the connection in this transaction, so the session may not know all
    /// errors.
    pub(super) had_raw_access: bool,
    /// That code has set savepoints of its own.
    pub(super) has_raw_savepoint: bool,
    /// The first error that such code did not return, and the call that gave it the connection. The code may have
    /// handled the error.
    pub(super) swallowed: Option<(String, Place)>,
    /// On a pinned connection: the transaction is the savepoint of one statement, which has this access.
    pub(super) statement_savepoint: Option<Access>,
    /// The watch over the deadline while a `ConnectionGuard` owns the connection.
    pub(super) guard_watchdog: Option<CallDeadline>,
}

impl<C: SessionConnection> TransactionState<C> {
    pub(crate) fn new(app: Arc<AppCore<C>>, settings: Settings) -> Self {
        Self {
            app,
            settings,
            connection: None,
            write_permit: None,
            phase: TransactionPhase::Idle,
            savepoints: 0,
            invalidation: None,
            statement_limit_sent: None,
            busy_timeout_sent: None,
            allow_writes: None,
            sent_at: None,
            rollbacks: 0,
            transient: TransientFailure::default(),
            had_raw_access: false,
            has_raw_savepoint: false,
            swallowed: None,
            statement_savepoint: None,
            guard_watchdog: None,
        }
    }

    pub(crate) fn rollbacks(&self) -> u64 {
        self.rollbacks
    }

    pub(super) fn begun_at(&self) -> Option<Place> {
        match self.phase {
            TransactionPhase::Begun(at) => Some(at),
            TransactionPhase::Idle | TransactionPhase::Reading(_) => None,
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        matches!(self.phase, TransactionPhase::Begun(_))
    }

    /// The call since which the session has held a connection.
    pub(super) fn active_since(&self) -> Option<Place> {
        match self.phase {
            TransactionPhase::Begun(at) | TransactionPhase::Reading(at) => Some(at),
            TransactionPhase::Idle => None,
        }
    }

    /// Whether the next statement is committed by itself.
    pub(crate) fn is_autocommitting(&self) -> bool {
        self.settings.mode == Mode::Autocommit && (self.statement_savepoint.is_some() || !self.has_begun())
    }

    /// Whether rows may have been read outside of the transaction that begins next. On a pinned connection to a
    /// server, the reads of a default scope have savepoints of their own. On an ordinary connection they would have
    /// begun the transaction.
    pub(crate) fn may_have_read_outside(&self) -> bool {
        match self.phase {
            TransactionPhase::Begun(_) => false,
            TransactionPhase::Idle | TransactionPhase::Reading(_) => {
                self.pinned().is_none() || self.settings.mode != Mode::Default || self.kind() == DatabaseKind::Sqlite
            }
        }
    }

    /// Whether a default scope on SQLite has read and its transaction has not begun.
    pub(crate) fn is_reading(&self) -> bool {
        matches!(self.phase, TransactionPhase::Reading(_))
    }

    /// Whether a statement with this access is sent outside of the transaction that the first write of the scope
    /// begins.
    pub(crate) fn reads_before_transaction(&self, access: Access) -> bool {
        access == Access::Read
            && self.kind() == DatabaseKind::Sqlite
            && self.settings.mode == Mode::Default
            && !self.has_begun()
            && self.may_read_outside()
    }

    pub(crate) fn is_active(&self) -> bool {
        !matches!(self.phase, TransactionPhase::Idle)
    }

    pub(crate) fn is_idle(&self) -> bool {
        !self.is_active() && self.connection.is_none() && self.invalidation.is_none() && self.write_permit.is_none()
    }

    pub(crate) fn run<T>(
        &mut self,
        statement: Statement,
        at: Place,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let access = statement.access;
        self.prepare(access, at)?;
        self.sent_at = Some(at);
        self.had_raw_access |= access == Access::Raw || statement.leftovers == Leftovers::Possible;
        let call_site = CallSite::enter(at);
        let sent = self.waiting_since();
        let outcome = match statement.leaves_nothing(|| self.kind()) {
            true => self.send(send),
            false => self.send_observed(statement, |conn| refuse_empty_statements(|| send(conn))),
        };
        drop(call_site);
        // What code that has the connection waited for is not known.
        let sent = sent.filter(|_| !statement.is_code());
        let waited = outcome.as_ref().err().and_then(|error| self.waited_for_lock(error, sent?));
        if access == Access::Raw {
            self.check_not_forked(at)?;
        }
        self.reconcile(access, at, outcome.as_ref().err());
        let outcome = outcome.map_err(|error| {
            let error = self.explain(error, at);
            match waited {
                Some(waited) => self.explain_wait(error, access.operation(), waited),
                None => error,
            }
        });
        self.release_if_idle();
        outcome
    }

    /// Prepares the connection for a statement: checks it out, begins the transaction if the statement needs one, and
    /// applies the limits of the scope.
    pub(crate) fn prepare(&mut self, access: Access, at: Place) -> Result<()> {
        self.check_usable(at)?;
        self.check_search_path(self.settings.mode != Mode::Autocommit || self.has_begun())?;
        self.transient.statement_follows();
        let begins = match self.phase {
            TransactionPhase::Begun(_) => {
                self.check_not_forked(at)?;
                self.renew_statement_limit(at)?;
                self.renew_busy_timeout(at)?;
                return self.forbid_writes(access, at);
            }
            _ if self.needs_statement_savepoint(access) => {
                self.statement_savepoint = Some(access);
                true
            }
            _ if self.settings.mode == Mode::Autocommit => false,
            _ => !(access == Access::Read && self.kind() == DatabaseKind::Sqlite && self.may_read_outside()),
        };
        if begins {
            let begun = self.begin(at);
            if begun.is_err() {
                self.statement_savepoint = None;
            }
            begun?;
            return self.forbid_writes(access, at);
        }
        self.check_out(at, false)?;
        if self.settings.mode == Mode::Autocommit {
            if access != Access::Read && self.write_permit.is_none() {
                let permit = match &self.connection {
                    Some(connection) => connection.pool().acquire_write_permit(at, self.deadline_end()),
                    None => Ok(None),
                };
                match permit {
                    Ok(permit) => self.write_permit = permit,
                    Err(error) => {
                        self.release_if_idle();
                        return Err(error);
                    }
                }
            }
            if self.settings.deadline.is_none() {
                return Ok(());
            }
            let limited = self.limit_session_statements(at).and_then(|()| self.renew_busy_timeout(at));
            if limited.is_err() {
                self.release_if_idle();
            }
            limited
        } else {
            if !self.is_active() {
                self.phase = TransactionPhase::Reading(at);
            }
            self.renew_busy_timeout(at)
        }
    }

    /// Whether a SELECT may be sent outside of a transaction. There it sees the committed rows, and the isolation level
    /// promises no more.
    pub(super) fn may_read_outside(&self) -> bool {
        self.settings.mode == Mode::Default
            && !matches!(self.settings.isolation, Some(Isolation::RepeatableRead | Isolation::Serializable))
    }

    pub(crate) fn begin(&mut self, at: Place) -> Result<()> {
        self.check_usable(at)?;
        self.check_not_forked(at)?;
        if self.has_begun() {
            return self.renew_statement_limit(at);
        }
        self.check_search_path(true)?;
        // The first statement shows whether an idle connection was lost. Nothing has been done yet, so another one is
        // tried.
        let mut attempts = 0;
        loop {
            self.check_out(at, true)?;
            let permit = match &self.connection {
                Some(connection) if self.settings.mode != Mode::ReadOnly => {
                    connection.pool().acquire_write_permit(at, self.deadline_end())
                }
                _ => Ok(None),
            };
            match permit {
                Ok(permit) => self.write_permit = permit,
                Err(error) => {
                    self.release_if_idle();
                    return Err(error);
                }
            }
            if let Err(error) = self.renew_busy_timeout(at) {
                self.release_if_idle();
                return Err(error);
            }
            let beginning = self.beginning();
            let kind = self.kind();
            let is_pinned = self.pinned().is_some();
            let schemas = self.settings.search_path.clone();
            let schemas = schemas.as_deref();
            let begin = |conn: &mut C| match is_pinned {
                true => kind.begin_nested(conn, beginning, schemas),
                false => kind.begin(conn, beginning, schemas),
            };
            let sent = self.waiting_since();
            match self.send(begin) {
                Ok(()) => {
                    self.phase = TransactionPhase::Begun(at);
                    (self.had_raw_access, self.has_raw_savepoint, self.swallowed) = (false, false, None);
                    self.transient = TransientFailure::default();
                    self.statement_limit_sent = beginning.remaining;
                    return Ok(());
                }
                Err(error) => {
                    let waited = sent.and_then(|sent| self.waited_for_lock(&error, sent));
                    let deadline_error = self.deadline_error(at);
                    self.close_at_checkin();
                    self.release();
                    attempts += 1;
                    let lost = dialect::is_connection_lost(&error);
                    if let Some(deadline_error) = deadline_error.filter(|_| lost) {
                        return Err(deadline_error);
                    }
                    if lost && attempts > self.app.options().config.max_size {
                        return Err(Error::lost(self.app.id(), error, true, at));
                    } else if !lost {
                        let error = self.explain(error, at);
                        return Err(match waited {
                            Some(waited) => self.explain_wait(error, A_WRITE, waited),
                            None => error,
                        });
                    }
                }
            }
        }
    }

    /// Checks that the scope's `search_path`, if it has one, can be applied to the next statement.
    fn check_search_path(&self, in_transaction: bool) -> Result<()> {
        let is_wanted = self.settings.search_path.is_some();
        let reason = match self.kind() {
            DatabaseKind::Postgres if in_transaction => return Ok(()),
            _ if !is_wanted => return Ok(()),
            DatabaseKind::Postgres => {
                "`Scope::search_path` holds for transactions, and this statement of an `autocommit` scope has none. \
                 Begin one with `Session::transaction`, or leave `autocommit` out"
            }
            DatabaseKind::Mysql | DatabaseKind::Sqlite => {
                "`Scope::search_path` is PostgreSQL's, and this database has no such thing. Enter a scope without it"
            }
        };
        Err(Error::InvalidConfig { app: self.app.id().into(), reason: reason.into() })
    }

    /// Ends the transaction without a commit. Afterwards the session is as new. If the rollback fails, the connection
    /// is closed, which rolls back too.
    pub(crate) fn rollback(&mut self) {
        self.rollbacks += u64::from(self.has_begun());
        self.revive_pinned();
        let _ = self.check_not_forked(self.sent_at.unwrap_or(std::panic::Location::caller()));
        if self.has_begun() && self.connection.is_some() && !self.is_doomed() {
            // One attempt more than there are levels (the savepoints and the transaction), so that one rollback may
            // fail.
            for _ in 0..=self.savepoints + 1 {
                match self.depth() {
                    Some(0) => break,
                    Some(depth) => drop(self.roll_back_level(depth)),
                    None => break,
                }
            }
            if self.depth() != Some(0) {
                self.close_at_checkin();
            }
            self.restore();
        }
        self.invalidation = None;
        // It is still set if a statement panicked.
        self.statement_savepoint = None;
        self.release();
    }

    pub(crate) fn open_savepoint(&mut self, at: Place) -> Result<()> {
        self.begin(at)?;
        self.transient.statement_follows();
        match self.send(C::begin_level) {
            Ok(()) => {
                self.savepoints += 1;
                Ok(())
            }
            Err(error) => {
                self.reconcile(Access::Write, at, Some(&error));
                Err(self.explain(error, at))
            }
        }
    }

    /// Releases the innermost savepoint. If that is impossible, the savepoint is rolled back and the error says why.
    pub(crate) fn release_savepoint(&mut self, at: Place) -> Result<()> {
        if let Err(error) = self.check_valid().and_then(|()| self.check_not_forked(at)) {
            self.roll_back_savepoint(at);
            return Err(error);
        }
        match self.send(C::commit_level) {
            Ok(()) => {
                self.savepoints -= 1;
                self.transient.release_savepoint(self.savepoints);
                Ok(())
            }
            // PostgreSQL refuses to release a savepoint of an aborted transaction.
            Err(error)
                if self.had_raw_access
                    && self.kind() == DatabaseKind::Postgres
                    && !dialect::is_connection_lost(&error) =>
            {
                self.invalidate_for_swallowed_error(at, false);
                let required = self.check_valid();
                self.roll_back_savepoint(at);
                required
            }
            Err(error) => {
                self.reconcile(Access::Write, at, Some(&error));
                let error = self.explain(error, at);
                self.roll_back_savepoint(at);
                Err(error)
            }
        }
    }

    /// Rolls back to the innermost savepoint and closes it.
    pub(crate) fn roll_back_savepoint(&mut self, at: Place) {
        if self.savepoints == 0 {
            return;
        }
        self.invalidate_after_panic(at);
        let _ = self.check_not_forked(at);
        if !self.invalidation.as_ref().is_some_and(|invalidation| invalidation.ended) && !self.is_doomed() {
            match self.send(C::rollback_level) {
                Ok(()) => {
                    self.invalidation = None;
                    self.transient.roll_back_savepoint(self.savepoints - 1);
                    self.discard_effects();
                }
                Err(error) => self.invalidate(format!("a savepoint could not be rolled back: {error}"), at, true),
            }
        }
        self.savepoints -= 1;
    }

    pub(super) fn send<T>(&mut self, send: impl FnOnce(&mut C) -> QueryResult<T>) -> QueryResult<T> {
        let watchdog = self.start_watchdog();
        let managed = self.connection.as_mut().expect(PREPARED).managed();
        // The connection counts as doomed until `send` returns: a panic leaves it in an unknown state.
        let doomed = std::mem::replace(&mut managed.closes_at_checkin, true);
        let outcome = send(managed.conn_mut());
        managed.closes_at_checkin = doomed;
        self.stop_watchdog(watchdog);
        outcome
    }

    /// Has the connection cut if the driver call that follows exceeds both the scope's deadline and the statement
    /// limit of the server by [`GRACE`].
    pub(super) fn start_watchdog(&mut self) -> Option<CallDeadline> {
        let deadline = self.settings.deadline?;
        let socket = self.connection.as_mut()?.managed().socket?;
        let now = Instant::now();
        let by_server = self.statement_limit_sent.and_then(|limit| now.checked_add(limit)).unwrap_or(now);
        let end = deadline.end.max(now).max(by_server.min(deadline.end.checked_add(LIMIT_SLACK.1)?));
        Some(CallDeadline::begin(socket, end.checked_add(GRACE)?))
    }

    /// [`reconcile_now`](Self::reconcile_now) under the watchdog, because it may ask the database.
    pub(super) fn reconcile(&mut self, access: Access, at: Place, failure: Option<&diesel::result::Error>) {
        let watchdog = self.start_watchdog();
        self.reconcile_now(access, at, failure);
        self.stop_watchdog(watchdog);
    }

    /// Ends what [`start_watchdog`](Self::start_watchdog) began, after the driver call. If the connection was cut,
    /// the transaction is lost.
    pub(super) fn stop_watchdog(&mut self, watchdog: Option<CallDeadline>) {
        if !watchdog.is_some_and(|watchdog| watchdog.was_cut()) {
            return;
        }
        let Some(connection) = self.connection.as_mut() else { return };
        let managed = connection.managed();
        (managed.was_cut, managed.lost, managed.closes_at_checkin) = (true, true, true);
        let at = self.sent_at.unwrap_or(std::panic::Location::caller());
        if self.has_begun() {
            self.invalidate("its connection was closed at the scope's deadline".into(), at, true);
        }
    }

    /// Checks the connection in if no transaction is open, so that an autocommit session holds none between two
    /// statements.
    pub(super) fn release_if_idle(&mut self) {
        if let Some(access) = self.statement_savepoint.take() {
            return self.end_statement_savepoint(access);
        }
        if self.is_active() {
            return;
        }
        if self.statement_limit_sent.is_some() && self.connection.is_some() && !self.is_doomed() {
            let limit = self.app.options().config.statement_timeout;
            let sql = self.kind().limit_session(limit).unwrap_or_default();
            if self.send(|conn| conn.batch_execute(&sql)).is_err() {
                self.close_at_checkin();
            }
        }
        self.release();
    }

    /// Checks a connection out, unless the session has one.
    fn check_out(&mut self, at: Place, in_transaction: bool) -> Result<()> {
        if self.connection.is_none() {
            let limit = self.deadline_end();
            let mut connection = self.app.pool_for(at)?.acquire(at, in_transaction, limit)?;
            if let Some(limit) = limit {
                connection.set_checkin_deadline(limit);
            }
            self.connection = Some(connection);
        }
        Ok(())
    }

    /// Checks the connection in, if there is one.
    pub(super) fn release(&mut self) {
        if self.busy_timeout_sent.take().is_some()
            && self.connection.is_some()
            && let Some(sql) = self.kind().limit_waits(None, &self.app.options().config)
        {
            self.send_restoring(&sql);
        }
        self.discard_effects();
        self.connection = None;
        // After the checkin, so that the next writer finds the file unlocked.
        self.write_permit = None;
        self.phase = TransactionPhase::Idle;
        self.savepoints = 0;
        self.statement_limit_sent = None;
        self.allow_writes = None;
    }

    /// Undoes the settings of the session that outlive its transaction.
    pub(super) fn restore(&mut self) {
        let beginning = self.beginning();
        let config = &self.app.options().config;
        let limit = match self.pinned().is_some() && self.statement_limit_sent.is_some() {
            true => self.kind().limit_after_nested(config),
            false => None,
        };
        let has_schemas = self.pinned().is_some() && self.settings.search_path.is_some();
        let schemas = has_schemas.then(|| self.kind().search_path_after_nested());
        let settings = limit.into_iter().chain(schemas).chain(self.kind().after_transaction(beginning, config));
        for sql in settings.collect::<Vec<_>>() {
            self.send_restoring(&sql);
        }
        if let Some(sql) = self.allow_writes.take() {
            self.send_restoring(sql);
        }
    }

    fn send_restoring(&mut self, sql: &str) {
        if !self.is_doomed() && self.send(|conn| conn.batch_execute(sql)).is_err() {
            self.close_at_checkin();
        }
    }

    /// Forbids a read-only session to write, if its transaction does not. A typed SELECT needs no protection.
    fn forbid_writes(&mut self, access: Access, at: Place) -> Result<()> {
        if access == Access::Read || self.settings.mode != Mode::ReadOnly || self.allow_writes.is_some() {
            return Ok(());
        }
        let Some((guard, allow_writes)) = self.kind().read_only_guard() else { return Ok(()) };
        self.allow_writes = Some(allow_writes);
        self.send_setting(guard, at)
    }

    pub(super) fn check_usable(&mut self, at: Place) -> Result<()> {
        self.invalidate_after_panic(at);
        self.check_valid()?;
        self.deadline_error(at).map_or(Ok(()), Err)
    }

    /// The error, if the scope's deadline has passed.
    fn deadline_error(&self, at: Place) -> Option<Error> {
        let deadline = self.settings.deadline.filter(|deadline| Instant::now() >= deadline.end)?;
        Some(Error::DeadlineExceeded { limit: deadline.limit, at })
    }

    /// Sends the remaining time to the server as the new statement limit, if it has become much shorter than the last
    /// one.
    fn renew_statement_limit(&mut self, at: Place) -> Result<()> {
        let (Some(sent), Some(remaining)) = (self.statement_limit_sent, self.remaining()) else { return Ok(()) };
        if sent.saturating_sub(remaining) <= (remaining / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1) {
            return Ok(());
        }
        let Some(sql) = self.kind().limit_statements(remaining) else { return Ok(()) };
        self.statement_limit_sent = Some(remaining);
        self.send_setting(&sql, at)
    }

    /// Sends the remaining time to SQLite as the new busy timeout, if it has become much shorter than the last one.
    pub(super) fn renew_busy_timeout(&mut self, at: Place) -> Result<()> {
        let Some(deadline) = self.settings.deadline else { return Ok(()) };
        let left = deadline.end.saturating_duration_since(Instant::now());
        let slack = (left / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1);
        if self.busy_timeout_sent.is_some_and(|sent| sent.saturating_sub(left) <= slack) {
            return Ok(());
        }
        let Some(sql) = self.kind().limit_waits(Some(left), &self.app.options().config) else { return Ok(()) };
        self.busy_timeout_sent = Some(left);
        self.send_setting(&sql, at)
    }

    fn limit_session_statements(&mut self, at: Place) -> Result<()> {
        let Some(remaining) = self.remaining() else { return Ok(()) };
        let Some(sql) = self.kind().limit_session(Some(remaining)) else { return Ok(()) };
        self.statement_limit_sent = Some(remaining);
        self.send_setting(&sql, at)
    }

    fn send_setting(&mut self, sql: &str, at: Place) -> Result<()> {
        let outcome = self.send(|conn| conn.batch_execute(sql));
        self.reconcile(Access::Write, at, outcome.as_ref().err());
        outcome.map_err(|error| self.explain(error, at))
    }

    /// Turns a driver's error into an error of this crate, which distinguishes a lost connection, a passed deadline and
    /// a refused statement. The caller calls [`reconcile`](Self::reconcile) before, which finds out whether the
    /// connection is lost.
    pub(super) fn explain(&mut self, error: diesel::result::Error, at: Place) -> Error {
        let (lost, cut) = self
            .connection
            .as_mut()
            .map_or((false, false), |connection| (connection.managed().lost, connection.managed().was_cut));
        if let Some(deadline) = self.settings.deadline.filter(|_| cut) {
            return Error::DeadlineExceeded { limit: deadline.limit, at };
        }
        if lost && dialect::is_connection_lost(&error) {
            return Error::lost(self.app.id(), error, self.has_begun(), at);
        }
        match self.settings.deadline {
            Some(deadline)
                if Instant::now() >= deadline.end && matches!(error, diesel::result::Error::DatabaseError(..)) =>
            {
                Error::DeadlineExceeded { limit: deadline.limit, at }
            }
            _ => Error::from_query(self.advised(error), at),
        }
    }

    /// The moment, if what is sent now may wait for the lock of the whole database.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.kind().has_one_writer().then(Instant::now)
    }

    /// How long something waited for the lock of the whole database, if it did not get the lock.
    pub(super) fn waited_for_lock(&self, error: &diesel::result::Error, sent: Instant) -> Option<Duration> {
        self.kind().is_busy(error).then(|| sent.elapsed())
    }

    /// The explained error of something that did not get the lock of the whole database. The deadline of the scope goes before.
    pub(super) fn explain_wait(&self, error: Error, operation: &'static str, waited: Duration) -> Error {
        let Error::Query { source, at } = error else { return error };
        let options = self.app.options();
        let left = match self.phase {
            TransactionPhase::Begun(_) if self.statement_savepoint.is_none() => {
                "The transaction is open, and nothing of it is committed."
            }
            _ if operation == A_READ => "Nothing was read.",
            _ => "Nothing was written.",
        };
        Error::LockTimeout {
            app: self.app.id().into(),
            operation,
            waited,
            message: phrase(source),
            blockers: Blockers::unknown(DatabaseKind::possible_blocker(&options.target, &options.config)),
            left: left.into(),
            at,
        }
    }

    /// The error, with advice if the connection is closed because of it.
    fn advised(&self, error: diesel::result::Error) -> diesel::result::Error {
        let kind = self.kind();
        match kind.poison(&error) {
            // A pinned connection stays open.
            _ if self.pinned().is_some() => error,
            Some(Poison::ReadOnly) if self.settings.mode == Mode::ReadOnly || !kind.may_write_elsewhere() => error,
            Some(poison) => dialect::with_poison_advice(error, poison),
            None => error,
        }
    }

    fn beginning(&self) -> BeginOptions {
        BeginOptions { mode: self.settings.mode, isolation: self.settings.isolation, remaining: self.remaining() }
    }

    /// The time until the deadline, at most the application's `statement_timeout`.
    fn remaining(&self) -> Option<Duration> {
        let left = self.settings.deadline?.end.saturating_duration_since(Instant::now());
        Some(self.app.options().config.statement_timeout.map_or(left, |most| most.min(left)))
    }

    pub(super) fn deadline_end(&self) -> Option<Instant> {
        self.settings.deadline.map(|deadline| deadline.end)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app.options().target.kind
    }

    pub(super) fn depth(&mut self) -> Option<u32> {
        self.connection.as_mut().and_then(|connection| connection.conn().depth())
    }

    pub(super) fn is_doomed(&mut self) -> bool {
        self.connection.as_mut().is_some_and(|connection| connection.managed().closes_at_checkin)
    }

    pub(super) fn close_at_checkin(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.close_at_checkin();
        }
    }

    pub(super) fn with_observer(&mut self, with: impl FnOnce(&crate::pool::StatementObserver)) {
        if let Some(connection) = &mut self.connection {
            with(&connection.managed().observer);
        }
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use diesel::connection::SimpleConnection;
    use diesel::prelude::*;
    use diesel::sql_query;

    use super::*;
    use crate::{App, Config, Database, Result};

    static DB: Database<SqliteConnection> = Database::without_migrations();

    const LOCK_TIMEOUT: Duration = Duration::from_millis(200);

    diesel::table! {
        t (id) { id -> Integer, }
    }

    /// The error of `body`, which waits for the lock that a connection has got by `lock`.
    #[track_caller]
    fn refused(
        config: fn(Config) -> Config,
        lock: &str,
        body: impl FnOnce(&App<SqliteConnection>) -> Result<()>,
    ) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("shop.sqlite");
        let url = path.to_str().expect("UTF-8");
        let config = config(Config::new(url).lock_timeout(LOCK_TIMEOUT));
        let app = DB.init_app(format!("{}", path.display()), config).expect("a new name");
        let mut stranger = SqliteConnection::establish(url).expect("a file");
        stranger.batch_execute("CREATE TABLE t (id INTEGER PRIMARY KEY)").expect("a table");
        // It knows the table before that is locked.
        app.context(|| DB.session()?.count(t::table)).expect("a table");
        stranger.batch_execute(lock).expect("the lock");
        let error = body(&app).expect_err("it is locked");
        DB.remove_app(app.id()).expect("nothing is open");
        let Error::LockTimeout { waited, .. } = &error else { panic!("{error}") };
        assert!(*waited >= LOCK_TIMEOUT && *waited < 10 * LOCK_TIMEOUT, "{waited:?}");
        assert!(error.is_transient() && error.is_timeout(), "{error}");
        error.to_string()
    }

    #[track_caller]
    fn assert_text(text: &str, operation: &str, blocker: &str, left: &str) {
        assert!(text.starts_with("DS405 ") && text.contains(&format!(": {operation} (at ")), "{text}");
        let rest = format!(
            "for a lock that another session holds: database is locked. In the way: #1 {blocker}. {left} End that session's \
             transaction, or raise `Config::lock_timeout`, and run this transaction again."
        );
        assert!(text.ends_with(&rest), "{text}");
    }

    #[test]
    fn a_begin_that_waits_for_another_process_is_a_lock_timeout() {
        let text = refused(|config| config, "BEGIN IMMEDIATE", |app| app.context(|| DB.session()?.begin()));
        assert_text(&text, "a write", "another process", "Nothing was written.");
    }

    #[test]
    fn a_statement_that_waits_for_a_lock_is_a_lock_timeout() {
        let text = refused(
            |config| config,
            "BEGIN IMMEDIATE",
            |app| {
                app.scope()
                    .autocommit()
                    .run(|| DB.session()?.execute(diesel::insert_into(t::table).values(t::id.eq(1))).map(drop))
            },
        );
        assert_text(&text, "a write", "another process", "Nothing was written.");
        let text = refused(
            |config| config,
            "BEGIN IMMEDIATE",
            |app| {
                app.scope().autocommit().run(|| DB.session()?.execute(sql_query("INSERT INTO t VALUES (1)")).map(drop))
            },
        );
        assert_text(&text, "a statement", "another process", "Nothing was written.");
    }

    /// Without a write-ahead log a writer that commits keeps readers out, and readers keep a commit waiting.
    #[test]
    fn a_read_and_a_commit_that_wait_for_a_lock_are_lock_timeouts() {
        const BLOCKER: &str = "another process, or another connection of this one";
        let text = refused(
            |config| config.wal(false),
            "BEGIN EXCLUSIVE",
            |app| app.context(|| DB.session()?.count(t::table).map(drop)),
        );
        assert_text(&text, "a read", BLOCKER, "Nothing was read.");
        let text = refused(
            |config| config.wal(false),
            "BEGIN; SELECT * FROM t",
            |app| {
                app.context(|| {
                    DB.session()?.execute(diesel::insert_into(t::table).values(t::id.eq(1)))?;
                    DB.session()?.commit()
                })
            },
        );
        assert_text(&text, "a commit", BLOCKER, "Nothing was written.");
    }
}
