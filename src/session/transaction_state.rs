//! The session's transaction: when it begins, what became of it, how it ends.
//!
//! Invariants: there is a pooled in `Reading` and `Begun`, and none in `Idle` between calls. While `invalidated` is set nothing
//! is sent but a rollback. A pooled whose statement did not return (a panic) is doomed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;

use super::invalidation::Invalidated;
use super::statement::{Statement, Traces};
use super::transient::Transient;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::dialect::{self, Beginning, Poison};
use crate::error::{A_READ, A_WRITE, Blockers, Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::{CheckedOut, GRACE, Watched, WritePermit, refuse_empty_statements};
use crate::recorder::For;
use crate::settings::{Isolation, Mode, Settings};
use crate::wording::phrase;

/// By how much the limit that the server was told may exceed the time that is left: at least and at most.
const LIMIT_SLACK: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));

/// What a statement may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A typed SELECT.
    Read,
    /// A typed statement.
    Write,
    /// Anything: raw SQL, or whatever code the connection is guarded to sends.
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
pub(super) enum Phase {
    Idle,
    /// SQLite: since then statements have been read outside of a transaction, as a default scope does there until it writes.
    Reading(Place),
    Begun(Place),
}

#[derive(Debug)]
pub(crate) struct TransactionState<C: SessionConnection> {
    pub(super) app: Arc<AppCore<C>>,
    pub(super) settings: Settings,
    pub(super) pooled: Option<CheckedOut<C>>,
    pub(super) turn_to_write: Option<WritePermit>,
    pub(super) phase: Phase,
    /// Savepoints inside the transaction.
    pub(super) levels: u32,
    pub(super) invalidated: Option<Invalidated>,
    /// The statement limit the server was told last.
    limit_sent: Option<Duration>,
    /// The time that SQLite was last told to wait for other writers at most.
    waits_limited: Option<Duration>,
    /// What lets the connection write again, where a read-only session had to forbid it.
    unguard: Option<&'static str>,
    /// Where the last statement was sent from.
    pub(super) sent_at: Option<Place>,
    /// Transactions rolled back so far.
    rollbacks: u64,
    /// What failed in the last transaction and may succeed in another.
    pub(super) transient: Transient,
    /// Code that may do anything has had the connection in this transaction: what it did with errors is not known.
    pub(super) had_raw_access: bool,
    /// It has set savepoints of its own.
    pub(super) has_raw_savepoint: bool,
    /// The first error that such code kept to itself, and where it had the connection. It may have dealt with it.
    pub(super) swallowed: Option<(String, Place)>,
    /// The transaction that has begun is that of one statement, in a test that is rolled back.
    pub(super) wrap: Option<Access>,
    /// The connection is out of the session, and is cut at the deadline.
    pub(super) guarded: Option<Watched>,
}

impl<C: SessionConnection> TransactionState<C> {
    pub(crate) fn new(app: Arc<AppCore<C>>, settings: Settings) -> Self {
        Self {
            app,
            settings,
            pooled: None,
            turn_to_write: None,
            phase: Phase::Idle,
            levels: 0,
            invalidated: None,
            limit_sent: None,
            waits_limited: None,
            unguard: None,
            sent_at: None,
            rollbacks: 0,
            transient: Transient::default(),
            had_raw_access: false,
            has_raw_savepoint: false,
            swallowed: None,
            wrap: None,
            guarded: None,
        }
    }

    pub(crate) fn rollbacks(&self) -> u64 {
        self.rollbacks
    }

    pub(crate) fn begun_at(&self) -> Option<Place> {
        match self.phase {
            Phase::Begun(at) => Some(at),
            Phase::Idle | Phase::Reading(_) => None,
        }
    }

    /// Where the session began to hold a connection.
    pub(super) fn active_since(&self) -> Option<Place> {
        match self.phase {
            Phase::Begun(at) | Phase::Reading(at) => Some(at),
            Phase::Idle => None,
        }
    }

    /// Whether a statement sent now would be committed by itself.
    pub(crate) fn commits_by_itself(&self) -> bool {
        self.settings.mode == Mode::Autocommit && (self.wrap.is_some() || !matches!(self.phase, Phase::Begun(_)))
    }

    /// Whether rows may have been read outside of the transaction that begins now. In a test that is rolled back, what a default scope
    /// reads on a server is read outside too, where elsewhere the transaction would have begun.
    pub(crate) fn has_read_outside(&self) -> bool {
        match self.phase {
            Phase::Begun(_) => false,
            Phase::Idle | Phase::Reading(_) => {
                self.pinned().is_none() || self.settings.mode != Mode::Default || self.kind() == DatabaseKind::Sqlite
            }
        }
    }

    /// SQLite has read for a default scope, whose transaction has not begun.
    pub(crate) fn is_reading(&self) -> bool {
        matches!(self.phase, Phase::Reading(_))
    }

    /// Whether a statement of that kind is sent outside of the transaction that the first write of the scope begins.
    pub(crate) fn reads_before_transaction(&self, access: Access) -> bool {
        access == Access::Read
            && self.kind() == DatabaseKind::Sqlite
            && self.settings.mode == Mode::Default
            && !matches!(self.phase, Phase::Begun(_))
            && self.reads_outside()
    }

    pub(crate) fn is_active(&self) -> bool {
        !matches!(self.phase, Phase::Idle)
    }

    pub(crate) fn is_at_rest(&self) -> bool {
        !self.is_active() && self.pooled.is_none() && self.invalidated.is_none() && self.turn_to_write.is_none()
    }

    /// Sends one statement.
    pub(crate) fn run<T>(
        &mut self,
        statement: Statement,
        at: Place,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let access = statement.access;
        self.prepare(access, at)?;
        self.sent_at = Some(at);
        self.had_raw_access |= access == Access::Raw || statement.traces == Traces::Some;
        let sent_for = For::call_at(at);
        let sent = self.waiting_since();
        let outcome = match statement.leaves_nothing(|| self.kind()) {
            true => self.send(send),
            false => self.send_read(statement, |conn| refuse_empty_statements(|| send(conn))),
        };
        drop(sent_for);
        // What code that has the connection waited for is not known.
        let sent = sent.filter(|_| !statement.is_code());
        let waited = outcome.as_ref().err().and_then(|error| self.waited_for_lock(error, sent?));
        if access == Access::Raw {
            self.not_inherited(at)?;
        }
        self.settle(access, at, outcome.as_ref().err());
        let outcome = outcome.map_err(|error| {
            let error = self.explain(error, at);
            match waited {
                Some(waited) => self.explain_wait(error, access.operation(), waited),
                None => error,
            }
        });
        self.rest();
        outcome
    }

    /// Makes the connection ready for `access`: taken, begun where that is due, and sound.
    pub(crate) fn prepare(&mut self, access: Access, at: Place) -> Result<()> {
        self.check(at)?;
        self.applies_search_path(self.settings.mode != Mode::Autocommit || matches!(self.phase, Phase::Begun(_)))?;
        self.transient.go_on();
        let begins = match self.phase {
            Phase::Begun(_) => {
                self.not_inherited(at)?;
                self.renew_limit(at)?;
                self.limit_waits(at)?;
                return self.guard(access, at);
            }
            _ if self.is_wrapped(access) => {
                self.wrap = Some(access);
                true
            }
            _ if self.settings.mode == Mode::Autocommit => false,
            _ => !(access == Access::Read && self.kind() == DatabaseKind::Sqlite && self.reads_outside()),
        };
        if begins {
            let begun = self.begin(at);
            if begun.is_err() {
                self.wrap = None;
            }
            begun?;
            return self.guard(access, at);
        }
        if self.pooled.is_none() {
            self.pooled = Some(self.take(at, false)?);
        }
        if self.settings.mode == Mode::Autocommit {
            if access != Access::Read && self.turn_to_write.is_none() {
                let turn = match &self.pooled {
                    Some(pooled) => pooled.pool().turn_to_write(at, self.limit()),
                    None => Ok(None),
                };
                match turn {
                    Ok(turn) => self.turn_to_write = turn,
                    Err(error) => {
                        self.rest();
                        return Err(error);
                    }
                }
            }
            let limited = self.limit_session(at).and_then(|()| self.limit_waits(at));
            if limited.is_err() {
                self.rest();
            }
            limited
        } else {
            if !self.is_active() {
                self.phase = Phase::Reading(at);
            }
            self.limit_waits(at)
        }
    }

    /// Whether SQLite's reads need no transaction: each then sees what is committed, which is all that was promised.
    pub(super) fn reads_outside(&self) -> bool {
        self.settings.mode == Mode::Default
            && !matches!(self.settings.isolation, Some(Isolation::RepeatableRead | Isolation::Serializable))
    }

    /// Begins the transaction unless it has begun.
    pub(crate) fn begin(&mut self, at: Place) -> Result<()> {
        self.check(at)?;
        self.not_inherited(at)?;
        if matches!(self.phase, Phase::Begun(_)) {
            return self.renew_limit(at);
        }
        self.applies_search_path(true)?;
        // A connection that was lost while it was idle shows it here, when nothing has been done yet: another is tried.
        let mut tries = 0;
        loop {
            let pooled = match self.pooled.take() {
                Some(pooled) => pooled,
                None => self.take(at, true)?,
            };
            let turn = match self.settings.mode {
                Mode::ReadOnly => Ok(None),
                Mode::Default | Mode::Autocommit => pooled.pool().turn_to_write(at, self.limit()),
            };
            self.pooled = Some(pooled);
            match turn {
                Ok(turn) => self.turn_to_write = turn,
                Err(error) => {
                    self.rest();
                    return Err(error);
                }
            }
            if let Err(error) = self.limit_waits(at) {
                self.rest();
                return Err(error);
            }
            let how = self.beginning();
            let kind = self.kind();
            let inside = self.pinned().is_some();
            let schemas = self.settings.search_path.clone();
            let schemas = schemas.as_deref();
            let begin = |conn: &mut C| match inside {
                true => kind.begin_inside(conn, how, schemas),
                false => kind.begin(conn, how, schemas),
            };
            let sent = self.waiting_since();
            match self.send(begin) {
                Ok(()) => {
                    self.phase = Phase::Begun(at);
                    (self.had_raw_access, self.has_raw_savepoint, self.swallowed) = (false, false, None);
                    self.transient = Transient::default();
                    self.limit_sent = how.remaining;
                    return Ok(());
                }
                Err(error) => {
                    let waited = sent.and_then(|sent| self.waited_for_lock(&error, sent));
                    let late = self.deadline_passed(at);
                    self.doom();
                    self.release();
                    tries += 1;
                    let lost = dialect::is_connection_lost(&error);
                    if let Some(late) = late.filter(|_| lost) {
                        return Err(late);
                    }
                    if lost && tries > self.app.options().config.max_size {
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

    /// An error if the scope wants a `search_path` that cannot be had here.
    fn applies_search_path(&self, in_transaction: bool) -> Result<()> {
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

    /// Ends the transaction without committing; afterwards the session is as new. A connection on which that fails is
    /// closed, which rolls back too.
    pub(crate) fn rollback(&mut self) {
        self.rollbacks += u64::from(matches!(self.phase, Phase::Begun(_)));
        self.recover();
        let _ = self.not_inherited(self.sent_at.unwrap_or(std::panic::Location::caller()));
        if matches!(self.phase, Phase::Begun(_)) && self.pooled.is_some() && !self.is_doomed() {
            // One more than there are levels: a failed rollback of a level leaves the next to try.
            for _ in 0..=self.levels + 1 {
                match self.depth() {
                    Some(0) => break,
                    Some(depth) => drop(self.roll_level_back(depth)),
                    None => break,
                }
            }
            if self.depth() != Some(0) {
                self.doom();
            }
            self.restore();
        }
        self.invalidated = None;
        // A statement that panicked has left it.
        self.wrap = None;
        self.release();
    }

    /// Opens a savepoint.
    pub(crate) fn open_level(&mut self, at: Place) -> Result<()> {
        self.begin(at)?;
        self.transient.go_on();
        match self.send(C::begin_level) {
            Ok(()) => {
                self.levels += 1;
                Ok(())
            }
            Err(error) => {
                self.settle(Access::Write, at, Some(&error));
                Err(self.explain(error, at))
            }
        }
    }

    /// Keeps what was done since the savepoint. Where that cannot be, it is rolled back and the error says why.
    pub(crate) fn keep_level(&mut self, at: Place) -> Result<()> {
        if let Err(error) = self.check_invalidated().and_then(|()| self.not_inherited(at)) {
            self.undo_level(at);
            return Err(error);
        }
        match self.send(C::commit_level) {
            Ok(()) => {
                self.levels -= 1;
                self.transient.keep_level(self.levels);
                Ok(())
            }
            // A savepoint of an aborted transaction cannot be released.
            Err(error)
                if self.had_raw_access
                    && self.kind() == DatabaseKind::Postgres
                    && !dialect::is_connection_lost(&error) =>
            {
                self.invalidate_silently(at, false);
                let required = self.check_invalidated();
                self.undo_level(at);
                required
            }
            Err(error) => {
                self.settle(Access::Write, at, Some(&error));
                let error = self.explain(error, at);
                self.undo_level(at);
                Err(error)
            }
        }
    }

    /// Undoes what was done since the savepoint.
    pub(crate) fn undo_level(&mut self, at: Place) {
        if self.levels == 0 {
            return;
        }
        self.notice_panic(at);
        let _ = self.not_inherited(at);
        if !self.invalidated.as_ref().is_some_and(|invalidated| invalidated.ended) && !self.is_doomed() {
            match self.send(C::rollback_level) {
                Ok(()) => {
                    self.invalidated = None;
                    self.transient.undo_level(self.levels - 1);
                    self.forget_effects();
                }
                Err(error) => self.invalidate(format!("a savepoint could not be rolled back: {error}"), at, true),
            }
        }
        self.levels -= 1;
    }

    pub(super) fn send<T>(&mut self, send: impl FnOnce(&mut C) -> QueryResult<T>) -> QueryResult<T> {
        let watched = self.watch_call();
        let managed = self.pooled.as_mut().expect("prepared: there is a pooled").managed();
        // Until it returns: code that panics leaves a connection in a state nobody knows.
        let doomed = std::mem::replace(&mut managed.doomed, true);
        let outcome = send(managed.conn_mut());
        managed.doomed = doomed;
        self.call_returned(watched);
        outcome
    }

    /// Cuts the connection if the driver call that follows goes on beyond the scope's deadline, and beyond the limit that the
    /// server was told.
    pub(super) fn watch_call(&mut self) -> Option<Watched> {
        let deadline = self.settings.deadline?;
        let socket = self.pooled.as_mut()?.managed().socket?;
        let now = Instant::now();
        let by_server = self.limit_sent.and_then(|limit| now.checked_add(limit)).unwrap_or(now);
        let end = deadline.end.max(now).max(by_server.min(deadline.end.checked_add(LIMIT_SLACK.1)?));
        Some(Watched::begin(socket, end.checked_add(GRACE)?))
    }

    /// [`settle_now`](Self::settle_now), which may ask the database.
    pub(super) fn settle(&mut self, access: Access, at: Place, failure: Option<&diesel::result::Error>) {
        let watched = self.watch_call();
        self.settle_now(access, at, failure);
        self.call_returned(watched);
    }

    /// After the driver call that [`watch_call`](Self::watch_call) watches.
    pub(super) fn call_returned(&mut self, watched: Option<Watched>) {
        if !watched.is_some_and(|watched| watched.was_cut()) {
            return;
        }
        let Some(pooled) = self.pooled.as_mut() else { return };
        let managed = pooled.managed();
        (managed.cut, managed.lost, managed.doomed) = (true, true, true);
        let at = self.sent_at.unwrap_or(std::panic::Location::caller());
        if matches!(self.phase, Phase::Begun(_)) {
            self.invalidate("its connection was closed at the scope's deadline".into(), at, true);
        }
    }

    /// Between two statements of an autocommit session it holds nothing.
    pub(super) fn rest(&mut self) {
        if let Some(access) = self.wrap.take() {
            return self.unwrap_statement(access);
        }
        if !matches!(self.phase, Phase::Idle) {
            return;
        }
        if self.limit_sent.is_some() && self.pooled.is_some() && !self.is_doomed() {
            let limit = self.app.options().config.statement_timeout;
            let sql = self.kind().limit_session(limit).unwrap_or_default();
            if self.send(|conn| conn.batch_execute(&sql)).is_err() {
                self.doom();
            }
        }
        self.release();
    }

    fn take(&self, at: Place, in_transaction: bool) -> Result<CheckedOut<C>> {
        let now = Instant::now();
        let mut pooled = self.app.pool_at(now)?.acquire_since(now, at, in_transaction, self.limit())?;
        if let Some(limit) = self.limit() {
            pooled.returns_by(limit);
        }
        Ok(pooled)
    }

    /// After [`not_inherited`](Self::not_inherited).
    pub(super) fn release(&mut self) {
        if self.waits_limited.take().is_some()
            && self.pooled.is_some()
            && let Some(sql) = self.kind().limit_waits(None, &self.app.options().config)
        {
            self.send_restoring(&sql);
        }
        self.forget_effects();
        if let Some(pooled) = self.pooled.take() {
            pooled.check_in();
        }
        // After the connection is back: the next writer finds the lock free.
        self.turn_to_write = None;
        self.phase = Phase::Idle;
        self.levels = 0;
        self.limit_sent = None;
        self.unguard = None;
    }

    /// Undoes the settings that outlive the transaction.
    pub(super) fn restore(&mut self) {
        let how = self.beginning();
        let config = &self.app.options().config;
        let limit = match self.pinned().is_some() && self.limit_sent.is_some() {
            true => self.kind().limit_after_inside(config),
            false => None,
        };
        let has_schemas = self.pinned().is_some() && self.settings.search_path.is_some();
        let schemas = has_schemas.then(|| self.kind().search_path_after_inside());
        let settings = limit.into_iter().chain(schemas).chain(self.kind().after_transaction(how, config));
        for sql in settings.collect::<Vec<_>>() {
            self.send_restoring(&sql);
        }
        if let Some(sql) = self.unguard.take() {
            self.send_restoring(sql);
        }
    }

    fn send_restoring(&mut self, sql: &str) {
        if !self.is_doomed() && self.send(|conn| conn.batch_execute(sql)).is_err() {
            self.doom();
        }
    }

    /// Forbids a read-only session to write where its transaction does not. A typed SELECT needs no guard.
    fn guard(&mut self, access: Access, at: Place) -> Result<()> {
        if access == Access::Read || self.settings.mode != Mode::ReadOnly || self.unguard.is_some() {
            return Ok(());
        }
        let Some((guard, unguard)) = self.kind().read_only_guard() else { return Ok(()) };
        self.unguard = Some(unguard);
        self.send_setting(guard, at)
    }

    pub(super) fn check(&mut self, at: Place) -> Result<()> {
        self.notice_panic(at);
        self.check_invalidated()?;
        self.deadline_passed(at).map_or(Ok(()), Err)
    }

    /// The error if the scope's time is over.
    fn deadline_passed(&self, at: Place) -> Option<Error> {
        let deadline = self.settings.deadline.filter(|deadline| Instant::now() >= deadline.end)?;
        Some(Error::DeadlineExceeded { limit: deadline.limit, at })
    }

    /// Tells the server anew how much time is left, once that has become much less than it was told.
    fn renew_limit(&mut self, at: Place) -> Result<()> {
        let (Some(sent), Some(remaining)) = (self.limit_sent, self.remaining()) else { return Ok(()) };
        if sent.saturating_sub(remaining) <= (remaining / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1) {
            return Ok(());
        }
        let Some(sql) = self.kind().limit_statements(remaining) else { return Ok(()) };
        self.limit_sent = Some(remaining);
        self.send_setting(&sql, at)
    }

    /// Tells SQLite how long it may wait for other writers, once much less time is left than it was told.
    pub(super) fn limit_waits(&mut self, at: Place) -> Result<()> {
        let Some(deadline) = self.settings.deadline else { return Ok(()) };
        let left = deadline.end.saturating_duration_since(Instant::now());
        let slack = (left / 10).clamp(LIMIT_SLACK.0, LIMIT_SLACK.1);
        if self.waits_limited.is_some_and(|told| told.saturating_sub(left) <= slack) {
            return Ok(());
        }
        let Some(sql) = self.kind().limit_waits(Some(left), &self.app.options().config) else { return Ok(()) };
        self.waits_limited = Some(left);
        self.send_setting(&sql, at)
    }

    fn limit_session(&mut self, at: Place) -> Result<()> {
        let Some(remaining) = self.remaining() else { return Ok(()) };
        let Some(sql) = self.kind().limit_session(Some(remaining)) else { return Ok(()) };
        self.limit_sent = Some(remaining);
        self.send_setting(&sql, at)
    }

    fn send_setting(&mut self, sql: &str, at: Place) -> Result<()> {
        let outcome = self.send(|conn| conn.batch_execute(sql));
        self.settle(Access::Write, at, outcome.as_ref().err());
        outcome.map_err(|error| self.explain(error, at))
    }

    /// The driver's error, or what is behind it: the connection was lost, or the deadline ended the statement. After
    /// [`settle`](Self::settle), which knows of the connection whether it is lost.
    pub(super) fn explain(&mut self, error: diesel::result::Error, at: Place) -> Error {
        let (lost, cut) =
            self.pooled.as_mut().map_or((false, false), |pooled| (pooled.managed().lost, pooled.managed().cut));
        if let Some(deadline) = self.settings.deadline.filter(|_| cut) {
            return Error::DeadlineExceeded { limit: deadline.limit, at };
        }
        if lost && dialect::is_connection_lost(&error) {
            return Error::lost(self.app.id(), error, matches!(self.phase, Phase::Begun(_)), at);
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
            Phase::Begun(_) if self.wrap.is_none() => "The transaction is open, and nothing of it is committed.",
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

    /// The error, with what can be done if it is one after which the connection is closed.
    fn advised(&self, error: diesel::result::Error) -> diesel::result::Error {
        let kind = self.kind();
        match kind.poison(&error) {
            // The one connection of a test is kept.
            _ if self.pinned().is_some() => error,
            Some(Poison::ReadOnly) if self.settings.mode == Mode::ReadOnly || !kind.may_write_elsewhere() => error,
            Some(poison) => dialect::advised(error, poison),
            None => error,
        }
    }

    fn beginning(&self) -> Beginning {
        Beginning { mode: self.settings.mode, isolation: self.settings.isolation, remaining: self.remaining() }
    }

    /// What is left of the deadline, and no more than the application gives any statement.
    fn remaining(&self) -> Option<Duration> {
        let left = self.settings.deadline?.end.saturating_duration_since(Instant::now());
        Some(self.app.options().config.statement_timeout.map_or(left, |most| most.min(left)))
    }

    pub(super) fn limit(&self) -> Option<Instant> {
        self.settings.deadline.map(|deadline| deadline.end)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app.options().target.kind
    }

    pub(super) fn depth(&mut self) -> Option<u32> {
        self.pooled.as_mut().and_then(|pooled| pooled.conn().depth())
    }

    pub(super) fn is_doomed(&mut self) -> bool {
        self.pooled.as_mut().is_some_and(|pooled| pooled.managed().doomed)
    }

    pub(super) fn doom(&mut self) {
        if let Some(pooled) = &mut self.pooled {
            pooled.doom();
        }
    }

    pub(super) fn with_observer(&mut self, with: impl FnOnce(&crate::pool::StatementObserver)) {
        if let Some(pooled) = &mut self.pooled {
            with(&pooled.managed().observer);
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
