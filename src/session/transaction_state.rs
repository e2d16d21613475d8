//! The state of a session's transaction, from its beginning to its commit or rollback.
//!
//! The phases: `Idle` until the first statement; `Reading` while a default scope only reads, if the kind of database
//! lets its reads precede the transaction; `Begun` from the `BEGIN` to the commit or rollback, which leads back to `Idle`.
//! `prepare_connection` decides before each statement which phase comes next.
//!
//! Invariants: a connection is checked out in the phases `Reading` and `Begun`; in the phase `Idle` none is checked
//! out between two calls. While `invalidation` is set, only a rollback is sent. A connection is doomed if the code
//! that used it panicked.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;

use super::invalidation::Invalidation;
use super::statement::{Leftovers, Statement};
use super::transaction_history::TransactionHistory;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::dialect::{self, BeginOptions, Poison};
use crate::error::{A_READ, A_WRITE, Blockers, Details, Error, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::{
    CallDeadline, CheckedOut, GRACE, Managed, SqlSource, StatementObserver, WritePermit, refuse_empty_statements,
};
use crate::recorder::CallSite;
use crate::settings::{Deadline, Isolation, Mode, Settings};
use crate::wording::phrase;

/// The minimum and the maximum by which the limit that was sent last may exceed the remaining time.
const LIMIT_SLACK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// Why a session that sends something has a connection.
const PREPARED: &str = "`prepare` or `begin` has checked out a connection";

/// What an error calls a commit.
pub(super) const A_COMMIT: &str = "a commit";

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
enum TransactionPhase {
    Idle,
    /// SQLite only: a default scope has read outside of a transaction. Its first write begins the transaction.
    Reading(SourceLocation),
    Begun(SourceLocation),
}

/// An operation that may wait for the lock of the whole database, and its start.
pub(super) type LockWait = (&'static str, Instant);

pub(crate) struct TransactionState<C: SessionConnection> {
    pub(super) app: Arc<AppCore<C>>,
    pub(super) settings: Settings,
    pub(super) connection: Option<CheckedOut<C>>,
    pub(super) write_permit: Option<WritePermit>,
    phase: TransactionPhase,
    pub(super) invalidation: Option<Invalidation>,
    /// The savepoints, writes and failures since the transaction began.
    pub(super) history: TransactionHistory,
    /// The limit that was last sent to the server, or to SQLite as its busy timeout.
    limit_sent: Option<Duration>,
    /// The SQL that lets the connection write again, if a read-only session has forbidden it.
    allow_writes: Option<&'static str>,
    /// The call that sent the last statement.
    pub(super) sent_at: Option<SourceLocation>,
    /// The number of transactions that this session has rolled back.
    pub(super) rollbacks: u64,
    /// In an outer transaction: the transaction is the savepoint of one statement, which has this access.
    pub(super) statement_savepoint: Option<Access>,
    /// The watch over the deadline while a `ConnectionGuard` owns the connection.
    guard_watchdog: Option<CallDeadline>,
}

impl<C: SessionConnection> TransactionState<C> {
    pub(crate) fn new(app: Arc<AppCore<C>>, settings: Settings) -> Self {
        Self {
            app,
            settings,
            connection: None,
            write_permit: None,
            phase: TransactionPhase::Idle,
            invalidation: None,
            history: TransactionHistory::default(),
            limit_sent: None,
            allow_writes: None,
            sent_at: None,
            rollbacks: 0,
            statement_savepoint: None,
            guard_watchdog: None,
        }
    }

    pub(super) fn begun_at(&self) -> Option<SourceLocation> {
        match self.phase {
            TransactionPhase::Begun(at) => Some(at),
            TransactionPhase::Idle | TransactionPhase::Reading(_) => None,
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun_at().is_some()
    }

    /// The call since which the session has held a connection.
    pub(super) fn active_since(&self) -> Option<SourceLocation> {
        match self.phase {
            TransactionPhase::Begun(at) | TransactionPhase::Reading(at) => Some(at),
            TransactionPhase::Idle => None,
        }
    }

    pub(crate) fn is_active(&self) -> bool {
        self.active_since().is_some()
    }

    pub(crate) fn is_idle(&self) -> bool {
        !self.is_active() && self.connection.is_none() && self.invalidation.is_none() && self.write_permit.is_none()
    }

    /// The call that began the transaction and the call that sent its first write, unless the transaction has ended
    /// in the database.
    pub(super) fn uncommitted_write(&self) -> Option<(SourceLocation, SourceLocation)> {
        let has_ended = self.invalidation.as_ref().is_some_and(|invalidation| invalidation.ended);
        Some((self.begun_at()?, self.history.first_write().filter(|_| !has_ended)?))
    }

    /// Whether the next statement is committed by itself.
    pub(crate) fn is_autocommitting(&self) -> bool {
        self.settings.mode == Mode::Autocommit && (self.statement_savepoint.is_some() || !self.has_begun())
    }

    /// Whether a default scope on SQLite may have read, and its transaction has not begun. In an outer transaction each of
    /// these reads had a savepoint of its own.
    pub(crate) fn has_read_before(&self) -> bool {
        matches!(self.phase, TransactionPhase::Reading(_))
            || self.style().is_nested() && self.reads_before_transaction(Access::Read)
    }

    /// Whether a statement with this access is sent outside of the transaction that the first write of the scope
    /// begins.
    pub(crate) fn reads_before_transaction(&self, access: Access) -> bool {
        self.kind() == DatabaseKind::Sqlite && !self.has_begun() && self.may_read_outside(access)
    }

    /// Whether the statement may be sent outside of a transaction. There it sees the committed rows, and the isolation
    /// level promises no more.
    pub(super) fn may_read_outside(&self, access: Access) -> bool {
        access == Access::Read
            && self.settings.mode == Mode::Default
            && !matches!(self.settings.isolation, Some(Isolation::RepeatableRead | Isolation::Serializable))
    }

    pub(crate) fn run<T>(
        &mut self,
        statement: Statement,
        at: SourceLocation,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let access = statement.access;
        self.prepare(access, at)?;
        self.sent_at = Some(at);
        self.history.had_raw_access |= access == Access::Raw || statement.leftovers == Leftovers::Possible;
        let call_site = CallSite::enter(at);
        // What code that has the connection waits for is not known.
        let lock_wait = self.lock_wait(access.operation()).filter(|_| !statement.is_code());
        let outcome = match statement.leaves_nothing(|| self.kind()) {
            true => self.send(send),
            false => self.send_observed(statement, |conn| refuse_empty_statements(|| send(conn))),
        };
        drop(call_site);
        if access == Access::Raw {
            self.check_not_forked(at)?;
        }
        if statement.writes && matches!(outcome, Ok(_) | Err(diesel::result::Error::DeserializationError(_))) {
            self.history.note_write(at);
        }
        self.reconcile(access, at, outcome.as_ref().err());
        let outcome = outcome.map_err(|error| self.explain(error, at, lock_wait));
        self.release_if_idle();
        outcome
    }

    /// Prepares the connection for a statement: checks it out, begins the transaction if the statement needs one, and
    /// applies the limits of the scope.
    pub(crate) fn prepare(&mut self, access: Access, at: SourceLocation) -> Result<()> {
        self.check_usable(at)?;
        self.check_search_path(self.settings.mode != Mode::Autocommit || self.has_begun())?;
        self.history.statement_follows();
        let outcome = self.prepare_connection(access, at);
        if outcome.is_err() {
            self.release_if_idle();
        }
        outcome
    }

    fn prepare_connection(&mut self, access: Access, at: SourceLocation) -> Result<()> {
        let is_outside = !self.has_begun();
        if is_outside && self.needs_statement_savepoint(access) {
            self.begin_unless_begun(at)?;
            self.statement_savepoint = Some(access);
            return Ok(());
        }
        if is_outside && self.settings.mode == Mode::Autocommit {
            self.check_out(at, false)?;
            if access != Access::Read {
                self.take_write_permit(at)?;
            }
            return self.renew_limit(at);
        }
        if self.reads_before_transaction(access) {
            self.check_out(at, false)?;
            if !self.is_active() {
                self.phase = TransactionPhase::Reading(at);
            }
            return self.renew_limit(at);
        }
        self.begin_unless_begun(at)?;
        self.forbid_writes(access, at)
    }

    pub(crate) fn begin(&mut self, at: SourceLocation) -> Result<()> {
        self.check_usable(at)?;
        self.begin_unless_begun(at)
    }

    fn begin_unless_begun(&mut self, at: SourceLocation) -> Result<()> {
        self.check_not_forked(at)?;
        if self.has_begun() {
            return self.renew_limit(at);
        }
        self.check_search_path(true)?;
        self.begin_now(at).inspect_err(|_| self.release_if_idle())
    }

    fn begin_now(&mut self, at: SourceLocation) -> Result<()> {
        // The first statement shows whether an idle connection was lost. Nothing has been done yet, so another one is
        // tried.
        let mut attempts = 0;
        loop {
            self.check_out(at, true)?;
            if self.settings.mode != Mode::ReadOnly {
                self.take_write_permit(at)?;
            }
            self.renew_busy_timeout(at)?;
            let Settings { mode, isolation, .. } = self.settings;
            let beginning = BeginOptions { mode, isolation, remaining: self.remaining() };
            let kind = self.kind();
            let style = self.style().clone();
            let schemas = self.settings.search_path.clone();
            let schemas = schemas.as_deref();
            let lock_wait = self.lock_wait(A_WRITE);
            let Err(error) = self.send(|conn| style.begin(kind, conn, beginning, schemas)) else {
                self.phase = TransactionPhase::Begun(at);
                self.history = TransactionHistory::default();
                self.limit_sent = self.limit_sent.or(beginning.remaining);
                return Ok(());
            };
            self.close_at_checkin();
            self.release();
            attempts += 1;
            if !dialect::is_connection_lost(&error) {
                return Err(self.explain(error, at, lock_wait));
            }
            self.check_deadline(at)?;
            if attempts > self.app.options().config.max_size {
                return Err(Error::lost(self.app.id(), error, true, at));
            }
        }
    }

    /// Checks that the scope's `search_path`, if it has one, can be applied to the next statement.
    fn check_search_path(&self, in_transaction: bool) -> Result<()> {
        if self.settings.search_path.is_none() {
            return Ok(());
        }
        let reason = match self.kind() {
            DatabaseKind::Postgres if in_transaction => return Ok(()),
            DatabaseKind::Postgres => {
                "`Scope::search_path` holds for transactions, and this statement of an `autocommit` scope has none. \
                 Begin one with `Session::transaction`, or leave `autocommit` out"
            }
            DatabaseKind::Mysql | DatabaseKind::Sqlite => {
                "`Scope::search_path` is PostgreSQL's, and this database has no such thing. Enter a scope without it"
            }
        };
        Err(Details::InvalidConfig { app: self.app.id().into(), reason: reason.into() }.into())
    }

    /// Ends the transaction without a commit. Afterwards the session is as new. If the rollback fails, the connection
    /// is closed, which rolls back too.
    pub(crate) fn rollback(&mut self) {
        self.rollbacks += u64::from(self.has_begun());
        self.revive_connection();
        let _ = self.check_not_forked(self.last_call());
        if self.has_begun() && self.is_sound() {
            // One attempt more than there are levels (the savepoints and the transaction), so that one rollback may
            // fail.
            for _ in 0..=self.history.savepoints() + 1 {
                match self.depth() {
                    Some(depth @ 1..) => drop(self.roll_back_level(depth)),
                    Some(0) | None => break,
                }
            }
            if self.depth() != Some(0) {
                self.close_at_checkin();
            }
        }
        self.invalidation = None;
        // It is still set if a statement panicked.
        self.statement_savepoint = None;
        self.release();
    }

    pub(crate) fn open_savepoint(&mut self, at: SourceLocation) -> Result<()> {
        self.begin(at)?;
        self.history.statement_follows();
        self.send_own(at, C::begin_level)?;
        self.history.open_savepoint();
        Ok(())
    }

    /// Releases the innermost savepoint. If that fails, the caller rolls it back.
    pub(crate) fn release_savepoint(&mut self, at: SourceLocation) -> Result<()> {
        self.check_valid()?;
        self.check_not_forked(at)?;
        let outcome = self.send(C::commit_level);
        if let Err(error) = &outcome
            && self.history.had_raw_access
            && self.kind() == DatabaseKind::Postgres
            && !dialect::is_connection_lost(error)
        {
            // PostgreSQL refuses to release a savepoint of an aborted transaction.
            self.invalidate_for_swallowed_error(at, false);
            return self.check_valid();
        }
        self.after_own(at, outcome)?;
        self.history.release_savepoint();
        Ok(())
    }

    /// Rolls back to the innermost savepoint and closes it.
    pub(crate) fn roll_back_savepoint(&mut self, at: SourceLocation) {
        if self.history.savepoints() == 0 {
            return;
        }
        self.invalidate_after_panic(at);
        let _ = self.check_not_forked(at);
        if !self.invalidation.as_ref().is_some_and(|invalidation| invalidation.ended) && self.is_sound() {
            match self.send(C::rollback_level) {
                Ok(()) => {
                    self.invalidation = None;
                    self.discard_effects();
                }
                Err(error) => self.invalidate(format!("a savepoint could not be rolled back: {error}"), at, true),
            }
        }
        self.history.roll_back_savepoint();
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

    /// Sends a statement of the library.
    fn send_own(&mut self, at: SourceLocation, send: impl FnOnce(&mut C) -> QueryResult<()>) -> Result<()> {
        let outcome = self.send(send);
        self.after_own(at, outcome)
    }

    fn after_own(&mut self, at: SourceLocation, outcome: QueryResult<()>) -> Result<()> {
        outcome.map_err(|error| {
            self.reconcile(Access::Write, at, Some(&error));
            self.explain(error, at, None)
        })
    }

    /// Sends a statement that may leave something on the connection.
    fn send_observed<T>(
        &mut self,
        statement: Statement,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> QueryResult<T> {
        self.observe(statement);
        let outcome = self.send(send);
        let kind = self.kind();
        if let Some(observer) = self.observer() {
            observer.stop_reading();
            if outcome.is_ok() && !observer.has_seen_leftovers() {
                statement.remember_clean(kind);
            }
        }
        outcome
    }

    /// Has the observer read the texts of the following statements. If a typed statement may leave something and a
    /// reset can remove it, the connection is only marked for the reset.
    fn observe(&mut self, Statement { access, leftovers, .. }: Statement) {
        let can_reset = self.kind().can_reset();
        let Some(managed) = self.managed() else { return };
        match (access, leftovers) {
            (Access::Raw, _) => managed.observer.read_statements(SqlSource::Raw),
            (_, Leftovers::Possible) if can_reset => managed.marked_dirty = true,
            _ => managed.observer.read_statements(SqlSource::Typed),
        }
    }

    /// Moves the connection out of the session, into a `ConnectionGuard`.
    pub(crate) fn take_connection(&mut self) -> CheckedOut<C> {
        self.observe(Statement::RAW);
        self.history.had_raw_access = true;
        self.guard_watchdog = self.start_watchdog();
        self.connection.take().expect(PREPARED)
    }

    /// Moves the connection back that [`take_connection`](Self::take_connection) has moved out.
    pub(crate) fn return_connection(&mut self, connection: CheckedOut<C>, at: SourceLocation) {
        self.connection = Some(connection);
        let guard_watchdog = self.guard_watchdog.take();
        self.stop_watchdog(guard_watchdog);
        if self.check_not_forked(at).is_err() {
            return;
        }
        if let Some(observer) = self.observer() {
            observer.stop_reading();
        }
        self.sent_at = Some(at);
        self.reconcile(Access::Raw, at, None);
        self.release_if_idle();
    }

    /// Has the connection cut if the driver call that follows exceeds both the scope's deadline and the limit of the
    /// server by [`GRACE`].
    fn start_watchdog(&mut self) -> Option<CallDeadline> {
        let deadline = self.settings.deadline?;
        let socket = self.managed()?.socket?;
        let now = Instant::now();
        let by_server = self.limit_sent.and_then(|limit| now.checked_add(limit)).unwrap_or(now);
        let end = deadline.end.max(now).max(by_server.min(deadline.end.checked_add(LIMIT_SLACK.1)?));
        Some(CallDeadline::begin(socket, end.checked_add(GRACE)?))
    }

    /// Ends what [`start_watchdog`](Self::start_watchdog) began, after the driver call. If the connection was cut,
    /// the transaction is lost.
    fn stop_watchdog(&mut self, watchdog: Option<CallDeadline>) {
        if !watchdog.is_some_and(|watchdog| watchdog.was_cut()) {
            return;
        }
        let Some(managed) = self.managed() else { return };
        (managed.was_cut, managed.lost, managed.closes_at_checkin) = (true, true, true);
        if self.has_begun() {
            self.invalidate("its connection was closed at the scope's deadline".into(), self.last_call(), true);
        }
    }

    /// Checks the connection in if no transaction is open, so that an autocommit session holds none between two
    /// statements.
    fn release_if_idle(&mut self) {
        if let Some(access) = self.statement_savepoint.take() {
            self.end_statement_savepoint(access);
        } else if !self.is_active() {
            self.release();
        }
    }

    /// Checks a connection out, unless the session has one.
    fn check_out(&mut self, at: SourceLocation, in_transaction: bool) -> Result<()> {
        if self.connection.is_none() {
            let limit = self.deadline_end();
            let mut connection = self.app.pool_for(at)?.acquire(at, in_transaction, limit)?;
            connection.checkin_deadline = limit;
            self.connection = Some(connection);
        }
        Ok(())
    }

    /// Waits for the other writers of this process, if the database has one writer at a time.
    fn take_write_permit(&mut self, at: SourceLocation) -> Result<()> {
        if let (Some(connection), None) = (&self.connection, &self.write_permit) {
            self.write_permit = connection.pool.acquire_write_permit(at, self.deadline_end())?;
        }
        Ok(())
    }

    /// Checks the connection in, if there is one, without the settings of the session.
    pub(super) fn release(&mut self) {
        let had_begun = self.has_begun();
        self.phase = TransactionPhase::Idle;
        if self.limit_sent.take().is_some() {
            let is_local = had_begun && !self.style().is_nested();
            let limit = self.kind().restore_limit(is_local, &self.app.options().config);
            limit.into_iter().for_each(|sql| self.send_restoring(&sql));
        }
        if had_begun
            && self.settings.search_path.is_some()
            && let Some(sql) = self.style().outer().map(|outer| outer.restore_search_path())
        {
            self.send_restoring(&sql);
        }
        if let Some(sql) = self.allow_writes.take() {
            self.send_restoring(sql);
        }
        self.discard_effects();
        self.connection = None;
        // After the checkin, so that the next writer finds the file unlocked.
        self.write_permit = None;
        self.history.close_savepoints();
    }

    fn send_restoring(&mut self, sql: &str) {
        if self.is_sound() && self.send(|conn| conn.batch_execute(sql)).is_err() {
            self.close_at_checkin();
        }
    }

    /// Forbids a read-only session to write, if its transaction does not. A typed SELECT needs no protection.
    fn forbid_writes(&mut self, access: Access, at: SourceLocation) -> Result<()> {
        if access == Access::Read || self.settings.mode != Mode::ReadOnly || self.allow_writes.is_some() {
            return Ok(());
        }
        let Some((guard, allow_writes)) = self.kind().texts().read_only_guard else { return Ok(()) };
        self.allow_writes = Some(allow_writes);
        self.send_own(at, |conn| conn.batch_execute(guard))
    }

    pub(super) fn check_usable(&mut self, at: SourceLocation) -> Result<()> {
        self.invalidate_after_panic(at);
        self.check_valid()?;
        self.check_deadline(at)
    }

    fn check_deadline(&self, at: SourceLocation) -> Result<()> {
        match self.settings.deadline {
            Some(Deadline { end, limit }) if Instant::now() >= end => {
                Err(Details::DeadlineExceeded { limit, at }.into())
            }
            _ => Ok(()),
        }
    }

    /// Sends the remaining time to the database as the new limit, if it has become much shorter than the last one.
    fn renew_limit(&mut self, at: SourceLocation) -> Result<()> {
        let Some(remaining) = self.remaining() else { return Ok(()) };
        let slack = (remaining / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1);
        if self.limit_sent.is_some_and(|sent| sent.saturating_sub(remaining) <= slack) {
            return Ok(());
        }
        let sql = self.kind().limit(remaining, self.has_begun(), &self.app.options().config);
        self.limit_sent = Some(remaining);
        self.send_own(at, |conn| conn.batch_execute(&sql))
    }

    /// Renews the limit before a `BEGIN` or `COMMIT`, which may wait for the lock of the whole database.
    pub(super) fn renew_busy_timeout(&mut self, at: SourceLocation) -> Result<()> {
        if self.kind().has_one_writer() { self.renew_limit(at) } else { Ok(()) }
    }

    /// Turns a driver's error into an error of this crate, which distinguishes a lost connection, a passed deadline,
    /// a lock that was not free in time, and a refused statement. The caller calls [`reconcile`](Self::reconcile)
    /// before, which finds out whether the connection is lost.
    pub(super) fn explain(
        &mut self,
        error: diesel::result::Error,
        at: SourceLocation,
        lock_wait: Option<LockWait>,
    ) -> Error {
        let (lost, cut) = self.managed().map_or((false, false), |managed| (managed.lost, managed.was_cut));
        let is_lost = lost && dialect::is_connection_lost(&error);
        let is_refused = !is_lost && matches!(error, diesel::result::Error::DatabaseError(..));
        if let Some(Deadline { end, limit }) = self.settings.deadline
            && (cut || is_refused && Instant::now() >= end)
        {
            return Details::DeadlineExceeded { limit, at }.into();
        }
        match lock_wait {
            _ if is_lost => Error::lost(self.app.id(), error, self.has_begun(), at),
            Some(lock_wait) if self.kind().is_busy(&error) => self.lock_timeout(error, at, lock_wait),
            _ => Error::from_query(self.advised(error), at),
        }
    }

    /// Begins to measure how long an operation waits for the lock of the whole database.
    pub(super) fn lock_wait(&self, operation: &'static str) -> Option<LockWait> {
        self.kind().has_one_writer().then(|| (operation, Instant::now()))
    }

    fn lock_timeout(&self, error: diesel::result::Error, at: SourceLocation, (operation, since): LockWait) -> Error {
        let options = self.app.options();
        let stays_open = self.has_begun() && self.statement_savepoint.is_none() && operation != A_COMMIT;
        let left = match operation {
            _ if stays_open => "The transaction is open, and nothing of it is committed.",
            A_READ => "Nothing was read.",
            _ => "Nothing was written.",
        };
        Error::from(Details::LockTimeout {
            app: self.app.id().into(),
            operation,
            waited: since.elapsed(),
            message: phrase(error),
            blockers: Blockers::unknown(DatabaseKind::possible_blocker(&options.target, &options.config)),
            left: left.into(),
            at,
        })
    }

    /// The error, with advice if the connection is closed because of it.
    fn advised(&self, error: diesel::result::Error) -> diesel::result::Error {
        let kind = self.kind();
        match kind.poison(&error) {
            _ if self.app.options().owner.is_some() => error,
            Some(Poison::ReadOnly) if self.settings.mode == Mode::ReadOnly || !kind.may_write_elsewhere() => error,
            Some(poison) => dialect::with_poison_advice(error, poison),
            None => error,
        }
    }

    /// The time until the deadline. A server gets at most the application's `statement_timeout`.
    fn remaining(&self) -> Option<Duration> {
        let left = self.deadline_end()?.saturating_duration_since(Instant::now());
        let most = self.app.options().config.statement_timeout.filter(|_| self.kind() != DatabaseKind::Sqlite);
        Some(most.map_or(left, |most| most.min(left)))
    }

    pub(super) fn deadline_end(&self) -> Option<Instant> {
        self.settings.deadline.map(|deadline| deadline.end)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app.options().target.kind.known()
    }

    /// The call that sent the last statement.
    fn last_call(&self) -> SourceLocation {
        self.sent_at.unwrap_or(Location::caller())
    }

    pub(super) fn managed(&mut self) -> Option<&mut Managed<C>> {
        self.connection.as_mut().map(|connection| connection.managed())
    }

    pub(super) fn depth(&mut self) -> Option<u32> {
        self.managed().and_then(|managed| managed.conn_mut().depth())
    }

    pub(super) fn is_doomed(&mut self) -> bool {
        self.managed().is_some_and(|managed| managed.closes_at_checkin)
    }

    /// Whether the session has a connection that is not doomed.
    fn is_sound(&mut self) -> bool {
        self.managed().is_some_and(|managed| !managed.closes_at_checkin)
    }

    pub(super) fn close_at_checkin(&mut self) {
        if let Some(managed) = self.managed() {
            managed.closes_at_checkin = true;
        }
    }

    pub(super) fn observer(&mut self) -> Option<&StatementObserver> {
        self.managed().map(|managed| &*managed.observer)
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
        let began = Instant::now();
        let error = body(&app).expect_err("it is locked");
        let took = began.elapsed();
        DB.remove_app(app.id()).expect("nothing is open");
        let Details::LockTimeout { waited, .. } = error.details() else { panic!("{error}") };
        assert!((LOCK_TIMEOUT..=took).contains(waited), "{waited:?} of {took:?}");
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
