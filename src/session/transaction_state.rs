//! The state of a session's transaction, from its beginning to its commit or rollback.
//!
//! The phases: `Idle` until the first statement; `Reading` while a default scope only reads, if the isolation level
//! lets its reads precede the transaction; `Begun` from the `BEGIN` to the commit or rollback, which leads back to `Idle`.
//! `prepare_connection` decides before each statement which phase comes next.
//!
//! Invariants: a connection is checked out in the phase `Begun`; in the other phases none is checked out between two
//! calls. While `invalidation` is set, only a rollback is sent. A connection is doomed if the code that used it
//! panicked.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;

use super::invalidation::Invalidation;
use super::statement::{Leftovers, Statement};
use super::transaction_history::TransactionHistory;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::dialect::{self, Poison};
use crate::error::{A_READ, A_WRITE, Blockers, Details, Error, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::{
    CallDeadline, CheckedOut, Managed, SqlSource, StatementObserver, WritePermit, refuse_empty_statements,
};
use crate::recorder::CallSite;
use crate::settings::{Deadline, Isolation, Mode, Settings};
use crate::wording::{log_line, phrase};

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
    /// The session has only read, outside of a transaction.
    Reading,
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
    /// The limit that the following statements have on the server, or on SQLite for their waits. `None`: that of the
    /// connection.
    pub(super) limit_sent: Option<Duration>,
    /// The SQL that lets the connection write again, if a read-only session has forbidden it.
    allow_writes: Option<&'static str>,
    /// The call that sent the last statement.
    pub(super) sent_at: Option<SourceLocation>,
    /// The number of transactions that this session has rolled back.
    pub(super) rollbacks: u64,
    /// The transaction is that of one statement, which has this access. In an outer transaction it is a savepoint.
    pub(super) statement_savepoint: Option<Access>,
    /// The server has refused to write, and `retry` has not begun again since.
    pub(super) refused_write: bool,
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
            refused_write: false,
        }
    }

    pub(super) fn begun_at(&self) -> Option<SourceLocation> {
        match self.phase {
            TransactionPhase::Begun(at) => Some(at),
            TransactionPhase::Idle | TransactionPhase::Reading => None,
        }
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun_at().is_some()
    }

    /// Whether a commit or a rollback would end something: a transaction, or the reads that preceded it.
    pub(super) fn is_used(&self) -> bool {
        !matches!(self.phase, TransactionPhase::Idle)
    }

    /// Whether the session has read, and its transaction has not begun.
    pub(super) fn has_only_read(&self) -> bool {
        matches!(self.phase, TransactionPhase::Reading)
    }

    /// Whether the session holds nothing: no transaction, no connection and no failure.
    pub(super) fn is_at_rest(&self) -> bool {
        !self.has_begun() && self.connection.is_none() && self.invalidation.is_none() && self.write_permit.is_none()
    }

    pub(super) fn note_reading(&mut self) {
        self.phase = TransactionPhase::Reading;
    }

    /// The rows and hooks of a session that only reads have ended too.
    pub(super) fn end_reading(&mut self) {
        self.phase = TransactionPhase::Idle;
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

    /// Whether the statement is sent outside of the transaction that a later statement begins. There it sees the
    /// committed rows, and the isolation level promises no more.
    pub(super) fn is_sent_outside(&self, statement: &Statement) -> bool {
        self.may_read_outside() && self.reads_committed() && statement.only_reads(self.kind()) == Some(true)
    }

    /// Whether the scope may send a statement that only reads outside of a transaction, if the default isolation level
    /// permits it.
    #[inline]
    pub(super) fn may_read_outside(&self) -> bool {
        let Settings { mode, isolation, begins_eagerly, search_path, .. } = &self.settings;
        let is_permitted = match isolation {
            None | Some(Isolation::ReadCommitted) => true,
            // Outside of a transaction, MySQL and MariaDB would not show what is not committed.
            Some(Isolation::ReadUncommitted) => self.kind() != DatabaseKind::Mysql,
            Some(Isolation::RepeatableRead | Isolation::Serializable) => false,
        };
        *mode == Mode::Default
            && is_permitted
            && !begins_eagerly
            && search_path.is_none()
            && !self.has_begun()
            && !self.has_limit_of_transaction()
    }

    /// Whether a transaction of the scope would see at each statement what is committed at that moment.
    #[inline]
    pub(super) fn reads_committed(&self) -> bool {
        self.settings.isolation.is_some() || !self.app.options().has_strict_isolation()
    }

    pub(crate) fn run<T>(
        &mut self,
        statement: Statement,
        at: SourceLocation,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let access = statement.access;
        self.prepare(&statement, at)?;
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
        let outcome = outcome.map_err(|error| {
            let mut error = self.explain(error, at, lock_wait);
            if statement.only_reads(self.kind()) == Some(true) {
                error.note_lost_read();
            }
            error
        });
        let ended = self.release_if_idle(outcome.is_ok(), at);
        outcome.and_then(|out| ended.map(|()| out))
    }

    /// Prepares the connection for a statement: checks it out, begins the transaction if the statement needs one, and
    /// applies the limits of the scope.
    pub(crate) fn prepare(&mut self, statement: &Statement, at: SourceLocation) -> Result<()> {
        self.check_usable(at)?;
        self.check_search_path(self.settings.mode != Mode::Autocommit || self.has_begun())?;
        self.history.statement_follows();
        let outcome = self.prepare_connection(statement, at);
        if outcome.is_err() {
            // The error that leads to the end matters more to the caller.
            let _ = self.release_if_idle(false, at);
        }
        outcome
    }

    fn prepare_connection(&mut self, statement: &Statement, at: SourceLocation) -> Result<()> {
        let (is_outside, access) = (!self.has_begun(), statement.access);
        if is_outside && self.needs_statement_savepoint(statement) {
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
        if self.is_sent_outside(statement) {
            self.check_out(at, false)?;
            if self.is_sent_outside(statement) {
                self.note_reading();
                return self.renew_limit(at);
            }
            // The first connection of the pool has told that the default isolation level is stricter.
            self.release();
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
        self.begin_now(at).inspect_err(|_| drop(self.release_if_idle(false, at)))
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
            let beginning = self.begin_options();
            let kind = self.kind();
            let style = self.style().clone();
            let schemas = self.settings.search_path.clone();
            let schemas = schemas.as_deref();
            let lock_wait = self.lock_wait(A_WRITE);
            let Err(error) = self.send(|conn| style.begin(kind, conn, beginning, schemas)) else {
                self.phase = TransactionPhase::Begun(at);
                self.history = TransactionHistory::default();
                self.note_limit_of_begin(beginning.remaining);
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
    #[inline]
    fn check_search_path(&self, in_transaction: bool) -> Result<()> {
        match self.settings.search_path {
            Some(_) => self.check_search_path_applies(in_transaction),
            None => Ok(()),
        }
    }

    fn check_search_path_applies(&self, in_transaction: bool) -> Result<()> {
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
                    Some(1) if self.needs_reset_in_transaction() => drop(self.roll_back_and_reset()),
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
        self.end_reading();
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
    pub(super) fn send_own(&mut self, at: SourceLocation, send: impl FnOnce(&mut C) -> QueryResult<()>) -> Result<()> {
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

    /// Moves the connection out of the session, into a `ConnectionGuard`, with the watch over the deadline.
    pub(crate) fn take_connection(&mut self) -> (CheckedOut<C>, Option<CallDeadline>) {
        self.observe(Statement::RAW);
        self.history.had_raw_access = true;
        let watchdog = self.start_watchdog();
        (self.connection.take().expect(PREPARED), watchdog)
    }

    /// Moves the connection back that [`take_connection`](Self::take_connection) has moved out.
    pub(crate) fn return_connection(
        &mut self,
        connection: CheckedOut<C>,
        watchdog: Option<CallDeadline>,
        at: SourceLocation,
    ) {
        self.connection = Some(connection);
        self.stop_watchdog(watchdog);
        if self.check_not_forked(at).is_err() {
            return;
        }
        if let Some(observer) = self.observer() {
            observer.stop_reading();
        }
        self.sent_at = Some(at);
        self.reconcile(Access::Raw, at, None);
        if let Err(error) = self.release_if_idle(true, at) {
            log_line!(
                warn,
                "diesel_session::session",
                "app `{}`: the changes of the code that had the connection at {at} are rolled back: {error}",
                self.app.id()
            );
        }
    }

    /// Checks the connection in if no transaction is open, so that a session without a transaction holds none between
    /// two statements. The transaction of one statement ends: `keep` says whether the statement has succeeded.
    fn release_if_idle(&mut self, keep: bool, at: SourceLocation) -> Result<()> {
        if let Some(access) = self.statement_savepoint.take() {
            return self.end_statement_savepoint(access, keep, at);
        }
        if !self.has_begun() {
            self.release();
        }
        Ok(())
    }

    /// Checks a connection out, unless the session has one.
    fn check_out(&mut self, at: SourceLocation, in_transaction: bool) -> Result<()> {
        if self.connection.is_none() {
            let limit = self.deadline_end();
            let pool = self.app.pool_for(at)?;
            let mut connection = match limit {
                Some(_) => pool.acquire_with_limit(at, in_transaction, limit)?,
                None => pool.acquire(at, in_transaction, None)?,
            };
            connection.checkin_deadline = limit;
            self.limit_sent = connection.managed().limit;
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

    /// Checks the connection in, if there is one, without the settings of the session. The transaction has ended.
    pub(super) fn release(&mut self) {
        let had_begun = self.has_begun();
        if had_begun {
            self.phase = TransactionPhase::Idle;
        }
        self.release_limit();
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

    pub(super) fn send_restoring(&mut self, sql: &str) {
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

    /// Turns a driver's error into an error of this crate, which distinguishes a lost connection, a passed deadline,
    /// a lock that was not free in time, and a refused statement. The caller calls [`reconcile`](Self::reconcile)
    /// before, which finds out whether the connection is lost.
    #[cold]
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

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app.options().target.kind.known()
    }

    /// The call that sent the last statement.
    pub(super) fn last_call(&self) -> SourceLocation {
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
