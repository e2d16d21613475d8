//! The session, through which a program sends its statements.

mod commit;
mod connection_guard;
mod factory;
mod flush;
mod fork_guard;
mod hooks;
mod invalidation;
mod nested;
mod observation;
mod open_sessions;
mod retry;
mod row_hooks;
mod session_inner;
mod statement;
mod subselect;
mod transaction_scope;
mod transaction_state;
mod transient_failure;
mod unit;

use std::panic::Location;
use std::rc::Rc;

use diesel::RunQueryDsl;
use diesel::expression::QueryMetadata;
use diesel::query_builder::{AsQuery, Query, QueryFragment, QueryId};
use diesel::query_dsl::methods::{ExecuteDsl, LimitDsl, LoadQuery};
use diesel::result::QueryResult;

pub use connection_guard::ConnectionGuard;
pub(crate) use factory::SessionFactory;
pub use hooks::HookOutcome;
#[cfg(feature = "testing")]
pub(crate) use open_sessions::OpenSessions;
pub use retry::Retry;
pub(crate) use row_hooks::RowHooks;
pub(crate) use session_inner::SessionInner;
#[doc(hidden)]
pub use subselect::{AtMostTwo, Counted, Same};

use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use statement::Statement;
use transaction_scope::TransactionScope;

/// A handle to a session: it sends statements, and has one transaction at a time, with hooks around it.
///
/// The session of a context comes from [`Database::session`](crate::Database::session) and ends with the context. The
/// session of [`App::open_session`](crate::App::open_session) ends when its last handle is dropped. A session begins
/// at its first statement, holds a connection from there to [`commit`](Self::commit) or
/// [`rollback`](Self::rollback), and costs the server nothing in between. Uncommitted work is rolled back.
///
/// A handle belongs to its thread:
///
/// ```compile_fail,E0277
/// fn needs_send<T: Send>() {}
/// needs_send::<diesel_session::Session<diesel::SqliteConnection>>();
/// ```
///
/// # Errors of every method that sends something
/// [`Error::Query`] with Diesel's error, [`Error::NotFound`], [`Error::ConnectionLost`], [`Error::RollbackRequired`]
/// after the database has aborted or ended the transaction, [`Error::SessionEnded`], [`Error::SessionBusy`],
/// [`Error::DeadlineExceeded`]. The first statement also returns the errors of a checkout: [`Error::AcquireTimeout`],
/// [`Error::Connect`], [`Error::ConnectTimeout`], [`Error::BudgetExhausted`], [`Error::Disposed`],
/// [`Error::WouldDeadlock`], [`Error::Forked`], on SQLite [`Error::LockTimeout`], and [`Error::HookFailed`] of
/// [`Database::on_checkout`](crate::Database::on_checkout).
pub struct Session<C: SessionConnection>(pub(crate) Rc<SessionInner<C>>);

impl<C: SessionConnection> Clone for Session<C> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<C: SessionConnection> std::fmt::Debug for Session<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("app", &self.0.app().id())
            .field("ended", &self.0.ended.get())
            .finish_non_exhaustive()
    }
}

/// Queries.
impl<C: SessionConnection> Session<C> {
    /// Runs a query and returns all its rows.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn load<'q, U>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<Vec<U>> {
        let at = Location::caller();
        self.0.run(Statement::of_query(&query), at, |conn| query.internal_load(conn)?.collect())
    }

    /// Runs a query with `LIMIT 1` and returns its first row. To read a row by its key,
    /// [`get_result`](Self::get_result) does the same and costs less, because SQLite prepares a statement with a
    /// bound `LIMIT` anew each time.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no row; see [`Session`].
    #[track_caller]
    pub fn first<'q, U>(&self, query: impl LimitDsl<Output: LoadQuery<'q, C, U> + AsQuery>) -> Result<U> {
        let at = Location::caller();
        let query = query.limit(1);
        self.0.run(Statement::of_query(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a query that must give exactly one row, and returns the row.
    ///
    /// The database is asked for at most two rows, whatever limit the query has of its own. A SELECT is sent as
    /// `SELECT * FROM (query) LIMIT 2`; an `INSERT .. RETURNING` and raw SQL are sent as they are.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no row, [`Error::TooManyRows`] if there are several; see [`Session`].
    #[track_caller]
    pub fn one<'q, U, Q>(&self, query: Q) -> Result<U>
    where
        Q: AsQuery,
        AtMostTwo<Q::Query>: LoadQuery<'q, C, U>,
        Same<Q::Query>: LoadQuery<'q, C, U>,
    {
        let at = Location::caller();
        self.at_most_one(query, at)?.ok_or(Error::NotFound { row: None, at })
    }

    /// Runs a query that must give at most one row, and returns the row or `None`; otherwise like [`one`](Self::one).
    ///
    /// # Errors
    /// [`Error::TooManyRows`] if there are several rows; see [`Session`].
    #[track_caller]
    pub fn one_or_none<'q, U, Q>(&self, query: Q) -> Result<Option<U>>
    where
        Q: AsQuery,
        AtMostTwo<Q::Query>: LoadQuery<'q, C, U>,
        Same<Q::Query>: LoadQuery<'q, C, U>,
    {
        self.at_most_one(query, Location::caller())
    }

    fn at_most_one<'q, U, Q>(&self, query: Q, at: Place) -> Result<Option<U>>
    where
        Q: AsQuery,
        AtMostTwo<Q::Query>: LoadQuery<'q, C, U>,
        Same<Q::Query>: LoadQuery<'q, C, U>,
    {
        let (statement, kind) = (Statement::of_query(&query), self.0.app().options().target.kind);
        let rows =
            self.0.run(statement, at, |conn| subselect::at_most_two(conn, query.as_query(), statement.access, kind))?;
        let mut rows = rows.into_iter();
        match (rows.next(), rows.next()) {
            (_, Some(_)) => Err(Error::TooManyRows { at }),
            (row, None) => Ok(row),
        }
    }

    /// Runs a query that gives one row, such as a count or an `INSERT .. RETURNING`. If there are several rows, it
    /// returns the first one and ignores the others; [`one`](Self::one) checks that there is only one.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no row; see [`Session`].
    #[track_caller]
    pub fn get_result<'q, U>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<U> {
        let at = Location::caller();
        self.0.run(Statement::of_query(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a statement and returns the number of rows that it changed.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn execute<Q: ExecuteDsl<C> + RunQueryDsl<C>>(&self, statement: Q) -> Result<usize> {
        let at = Location::caller();
        self.0.run(Statement::of_command::<Q>(), at, |conn| RunQueryDsl::execute(statement, conn))
    }

    /// Whether a query gives at least one row.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn exists<'q, Q>(&self, query: Q) -> Result<bool>
    where
        Q: AsQuery,
        diesel::dsl::exists<Q::Query>: diesel::expression::Expression,
        diesel::dsl::select<diesel::dsl::exists<Q::Query>>: LoadQuery<'q, C, bool> + AsQuery,
    {
        let at = Location::caller();
        let query = diesel::select(diesel::dsl::exists(query.as_query()));
        self.0.run(Statement::of_query(&query), at, |conn| query.get_result(conn))
    }

    /// The number of rows that [`load`](Self::load) of the query would give; its limit, offset, `DISTINCT`, `GROUP
    /// BY` and unions apply. It is sent as `SELECT COUNT(*) FROM (query)`.
    ///
    /// MySQL and MariaDB refuse that if the query has two columns of the same name, as a join may have. In this case
    /// the query runs as it is, and its rows are counted as they arrive; `query.select(table::id)` avoids that.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn count<'q, Q>(&self, query: Q) -> Result<i64>
    where
        Q: AsQuery<Query: Query + QueryFragment<C::Backend> + QueryId + 'q>,
        Counted<Q::Query>: LoadQuery<'q, C, i64>,
        C::Backend: QueryMetadata<<Q::Query as Query>::SqlType>,
    {
        let kind = self.0.app().options().target.kind;
        let statement = Statement::of_query(&query);
        self.0.run(statement, Location::caller(), |conn| subselect::count(conn, query.as_query(), kind))
    }

    /// Runs any Diesel code on the session's connection, inside its transaction. Use it for code that takes a
    /// connection.
    ///
    /// Inside the closure, the connection's own `transaction` is a savepoint. The closure must not end the session's
    /// transaction, and it must not replace the connection or its instrumentation: both lead to
    /// [`Error::RollbackRequired`]. It must not use this session: that is [`Error::SessionBusy`].
    ///
    /// An error that the closure does not return may have aborted (PostgreSQL) or ended the transaction. The session
    /// notices that at once or at the next commit, and returns [`Error::RollbackRequired`], never `Ok`.
    ///
    /// A setting that outlives the transaction (`SET`, `PRAGMA`, an advisory lock, a temporary table) stays on the
    /// connection until commit or rollback, when the connection is checked in. The next holder never sees the
    /// setting: on PostgreSQL the checkin then costs one more round trip; on the other databases the connection is
    /// closed if something may have been set. [`Reset`](crate::Reset) describes how, and what is not covered.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn with<T>(&self, run: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T> {
        self.0.run(Statement::RAW, Location::caller(), run)
    }

    /// The session's connection as an owned guard, for code that [`with`](Self::with) does not fit. While the guard
    /// lives, the session itself answers [`Error::SessionBusy`].
    ///
    /// On MySQL and MariaDB a statement with an empty text panics before it is sent, because MariaDB's client library
    /// would crash. In [`with`](Self::with) an empty text is an error.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn connection(&self) -> Result<ConnectionGuard<C>> {
        ConnectionGuard::take(&self.0, Location::caller())
    }
}

/// The transaction.
impl<C: SessionConnection> Session<C> {
    /// Begins the transaction now instead of at the first statement. In an autocommit scope, a transaction begins
    /// only in this way or with a closure. Tracked rows that were read before the transaction are read again.
    ///
    /// # Errors
    /// [`Error::AlreadyBegun`]; see [`Session`].
    #[track_caller]
    pub fn begin(&self) -> Result<()> {
        let at = Location::caller();
        let begun_at = self.0.borrow_transaction(at)?.begun_at();
        match begun_at {
            Some(begun_at) => Err(Error::AlreadyBegun { begun_at, at }),
            None => self.0.begin(at),
        }
    }

    /// Commits everything since the session began, and checks the connection in. If there is nothing to commit, only
    /// the hooks run.
    ///
    /// # Errors
    /// The database's error if it refuses the commit; everything is then rolled back. [`Error::RollbackRequired`] if
    /// the transaction was aborted before; nothing is then sent. [`Error::CommitUnknown`] if the connection was lost.
    /// [`Error::HookFailed`]. [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction).
    #[track_caller]
    pub fn commit(&self) -> Result<()> {
        let at = Location::caller();
        self.0.check_outside_scopes("commit", at)?;
        self.0.commit(at)
    }

    /// Rolls back everything since the session began, and checks the connection in. The session can be used again as
    /// new.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction); [`Error::SessionBusy`];
    /// [`Error::SessionEnded`]; [`Error::HookFailed`].
    #[track_caller]
    pub fn rollback(&self) -> Result<()> {
        let at = Location::caller();
        self.0.check_outside_scopes("rollback", at)?;
        self.0.rollback(at)
    }

    /// Runs `body` and commits if it returns `Ok`; `Err` and a panic roll back. The outermost call joins the
    /// transaction that the session has begun, if there is one, and ends all of it. Inside another call it is a
    /// [`savepoint`](Self::savepoint). Tracked rows that were read before the transaction are read again.
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    #[track_caller]
    pub fn transaction<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.is_in_scope() {
            return self.savepoint_at("transaction", at, body);
        }
        self.transaction_at("transaction", at, body)
    }

    /// Runs `body` in a savepoint: `Err` and a panic undo only what `body` did. This is the portable way to continue
    /// after a statement that may fail. In an autocommit scope without a transaction it is a
    /// [`transaction`](Self::transaction).
    ///
    /// ```
    /// # use diesel_session::{Config, Database};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # let app = DB.init_app("savepoint", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # use diesel::connection::SimpleConnection;
    /// # session.with(|conn| conn.batch_execute("CREATE TABLE users (id INTEGER PRIMARY KEY)"))?;
    /// session.execute(diesel::insert_into(users::table).values(users::id.eq(1)))?;
    /// let twice = session.savepoint(|s| s.execute(diesel::insert_into(users::table).values(users::id.eq(1))));
    /// assert!(twice.is_err());
    /// assert_eq!(session.count(users::table)?, 1);            // the session goes on, on every database
    /// session.commit()
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) turned into `E`. [`Error::RollbackRequired`] if `body`
    /// returned `Ok` after an error that aborted the savepoint; the session can be used all the same.
    #[track_caller]
    pub fn savepoint<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.borrow_transaction(at)?.is_autocommitting() {
            return self.transaction_at("savepoint", at, body);
        }
        self.savepoint_at("savepoint", at, body)
    }

    /// Whether a transaction has begun and not ended.
    pub fn in_transaction(&self) -> bool {
        self.0.is_active()
    }

    /// Ends the session: rolls back, checks the connection in and drops the hooks. The handle can be used again, as
    /// new, until its context ends. A second call does nothing more.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`], [`Error::SessionBusy`].
    #[track_caller]
    pub fn remove(&self) -> Result<()> {
        let at = Location::caller();
        if self.0.ended.get() {
            return Ok(());
        }
        self.0.check_outside_scopes("remove", at)?;
        drop(self.0.borrow_transaction(at)?);
        self.0.clear(at);
        Ok(())
    }

    fn transaction_at<T, E: From<Error>>(
        &self,
        name: &'static str,
        at: Place,
        body: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        self.0.begin(at)?;
        let scope = TransactionScope::open(&self.0, name, at, false);
        let outcome = body(self);
        scope.close();
        match outcome {
            Ok(value) => match self.0.commit(at) {
                Ok(()) => Ok(value),
                Err(error) => {
                    self.0.roll_back_after(&error, at);
                    Err(self.0.with_undo(error).into())
                }
            },
            Err(error) => {
                // Errors of the rollback are dropped: the error of `body` matters more to the caller.
                self.0.roll_back_scope(at);
                Err(error)
            }
        }
    }

    fn savepoint_at<T, E: From<Error>>(
        &self,
        name: &'static str,
        at: Place,
        body: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        // The savepoint must not undo changes from before it.
        self.0.flush(at)?;
        let mut transaction = self.0.borrow_transaction(at)?;
        let was_reading = transaction.is_reading();
        let opened = transaction.open_savepoint(at);
        drop(transaction);
        opened.map_err(|error| self.0.with_undo(error))?;
        if was_reading {
            self.0.expire_rows();
        }
        self.0.unit_savepoint_opened();
        let scope = TransactionScope::open(&self.0, name, at, true);
        let mark = scope.mark;
        let outcome = body(self).map_err(SavepointFailure::Body);
        let outcome = outcome.and_then(|value| self.0.flush(at).map(|()| value).map_err(SavepointFailure::End));
        scope.close();
        let result = match (outcome, self.0.borrow_transaction_at_end(at)) {
            (Ok(value), Ok(mut transaction)) => {
                transaction.release_savepoint(at).map(|()| value).map_err(SavepointFailure::End)
            }
            (Err(error), Ok(mut transaction)) => {
                transaction.roll_back_savepoint(at);
                Err(error)
            }
            (outcome, Err(busy)) => outcome.and(Err(SavepointFailure::End(busy))),
        };
        match &result {
            Ok(_) => self.0.unit_savepoint_released(),
            Err(_) => {
                self.0.unit_savepoint_rolled_back();
                self.0.discard_hooks_since(mark);
            }
        }
        result.map_err(|failed| match failed {
            SavepointFailure::Body(error) => error,
            SavepointFailure::End(error) => self.0.with_undo_after_savepoint(error).into(),
        })
    }
}

/// What failed in a savepoint.
enum SavepointFailure<E> {
    /// The program's closure.
    Body(E),
    /// The flush or the release after the closure.
    End(Error),
}

/// Hooks. Each hook runs once, in the order of registration. Hooks that were registered inside a savepoint are
/// dropped if the savepoint is rolled back, and the remaining hooks are dropped when the session is removed.
impl<C: SessionConnection> Session<C> {
    /// Runs `hook` before the next commit. The hook may use the session, and its `Err` or panic prevents the commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn before_commit<R: HookOutcome>(&self, hook: impl FnOnce() -> R + 'static) -> Result<()> {
        self.0.check_not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().before_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next commit, when the connection has been checked in. A panic becomes
    /// [`Error::HookFailed`] of the commit, although the transaction is committed. Later hooks still run.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_commit(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.check_not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next rollback of the whole transaction, when the connection has been checked in; also at
    /// the end of a context that did not commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_rollback(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.check_not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_rollback(hook);
        Ok(())
    }
}
