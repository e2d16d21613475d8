//! The handle to a session, with its queries and its transaction.

use std::panic::Location;
use std::rc::Rc;

use diesel::RunQueryDsl;
use diesel::expression::QueryMetadata;
use diesel::query_builder::{AsQuery, Query, QueryFragment, QueryId};
use diesel::query_dsl::methods::{ExecuteDsl, LimitDsl, LoadQuery};
use diesel::result::QueryResult;

use super::connection_guard::ConnectionGuard;
use super::invalidation::opaque_failure;
use super::session_inner::{SessionInner, TransactionScope};
use super::statement::Statement;
use super::subselect::{self, AtMostTwo, Counted, Same};
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result, SourceLocation};
use crate::unit_of_work::Unit;

/// A handle to a session: it sends statements, and has one transaction at a time, with hooks around it.
///
/// The session of a context comes from [`Database::session`](crate::Database::session) and ends with the context. The
/// session of [`App::open_session`](crate::App::open_session) ends when its last handle is dropped. In a
/// transaction the session holds a connection from the `BEGIN` to [`commit`](Self::commit) or
/// [`rollback`](Self::rollback). Before and after it costs the server nothing. Uncommitted work is rolled back.
///
/// A handle belongs to its thread:
///
/// ```compile_fail,E0277
/// fn needs_send<T: Send>() {}
/// needs_send::<diesel_session::Session<diesel::SqliteConnection>>();
/// ```
///
/// # Errors of every method that sends something
/// [`ErrorKind::Query`](crate::ErrorKind::Query) with Diesel's error,
/// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound),
/// [`ErrorKind::ConnectionLost`](crate::ErrorKind::ConnectionLost),
/// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired) after the database has aborted or ended the
/// transaction, [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded),
/// [`ErrorKind::SessionBusy`](crate::ErrorKind::SessionBusy),
/// [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded). The first statement also returns the errors of
/// a checkout: [`ErrorKind::AcquireTimeout`](crate::ErrorKind::AcquireTimeout),
/// [`ErrorKind::Connect`](crate::ErrorKind::Connect), [`ErrorKind::ConnectTimeout`](crate::ErrorKind::ConnectTimeout),
/// [`ErrorKind::ConnectionLimitReached`](crate::ErrorKind::ConnectionLimitReached),
/// [`ErrorKind::Disposed`](crate::ErrorKind::Disposed), [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock),
/// [`ErrorKind::Forked`](crate::ErrorKind::Forked), on SQLite
/// [`ErrorKind::LockTimeout`](crate::ErrorKind::LockTimeout), and
/// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of [`Database::on_checkout`](crate::Database::on_checkout).
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

/// # Queries
/// Diesel's queries, and the connection for code that needs it. Each method sends its statement in the session's
/// transaction.
impl<C: SessionConnection> Session<C> {
    /// Runs a query and returns all its rows.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn load<'q, U>(
        &self,
        query: impl AsQuery<Query: LoadQuery<'q, C, U> + QueryFragment<C::Backend>>,
    ) -> Result<Vec<U>> {
        let (at, query) = (Location::caller(), query.as_query());
        self.0.run(self.0.judge(&query), at, |conn| query.internal_load(conn)?.collect())
    }

    /// Runs a query with `LIMIT 1` and returns its first row. To read a row by its key,
    /// [`get_result`](Self::get_result) does the same and costs less, because SQLite prepares a statement with a
    /// bound `LIMIT` anew each time.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no row; see [`Session`].
    #[track_caller]
    pub fn first<'q, U>(
        &self,
        query: impl LimitDsl<Output: AsQuery<Query: LoadQuery<'q, C, U> + QueryFragment<C::Backend>>>,
    ) -> Result<U> {
        let (at, query) = (Location::caller(), query.limit(1).as_query());
        self.0.run(self.0.judge(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a query that must give exactly one row, and returns the row.
    ///
    /// The database is asked for at most two rows, whatever limit the query has of its own. A SELECT is sent as
    /// `SELECT * FROM (query) LIMIT 2`; an `INSERT .. RETURNING` and raw SQL are sent as they are.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no row,
    /// [`ErrorKind::TooManyRows`](crate::ErrorKind::TooManyRows) if there are several; see [`Session`].
    #[track_caller]
    pub fn one<'q, U, Q>(&self, query: Q) -> Result<U>
    where
        Q: AsQuery<Query: QueryFragment<C::Backend>>,
        AtMostTwo<Q::Query>: LoadQuery<'q, C, U>,
        Same<Q::Query>: LoadQuery<'q, C, U>,
    {
        let at = Location::caller();
        self.one_or_none(query)?.ok_or(Error::from(Details::NotFound { row: None, at }))
    }

    /// Runs a query that must give at most one row, and returns the row or `None`; otherwise like [`one`](Self::one).
    ///
    /// # Errors
    /// [`ErrorKind::TooManyRows`](crate::ErrorKind::TooManyRows) if there are several rows; see [`Session`].
    #[track_caller]
    pub fn one_or_none<'q, U, Q>(&self, query: Q) -> Result<Option<U>>
    where
        Q: AsQuery<Query: QueryFragment<C::Backend>>,
        AtMostTwo<Q::Query>: LoadQuery<'q, C, U>,
        Same<Q::Query>: LoadQuery<'q, C, U>,
    {
        let at = Location::caller();
        let (query, kind) = (query.as_query(), self.0.kind());
        let statement = self.0.judge(&query);
        let rows = self.0.run(statement, at, |conn| subselect::at_most_two(conn, query, statement.access, kind))?;
        let mut rows = rows.into_iter();
        match (rows.next(), rows.next()) {
            (_, Some(_)) => Err(Details::TooManyRows { at }.into()),
            (row, None) => Ok(row),
        }
    }

    /// Runs a query that gives one row, such as a count or an `INSERT .. RETURNING`. If there are several rows, it
    /// returns the first one and ignores the others; [`one`](Self::one) checks that there is only one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no row; see [`Session`].
    #[track_caller]
    pub fn get_result<'q, U>(
        &self,
        query: impl AsQuery<Query: LoadQuery<'q, C, U> + QueryFragment<C::Backend>>,
    ) -> Result<U> {
        let (at, query) = (Location::caller(), query.as_query());
        self.0.run(self.0.judge(&query), at, |conn| query.get_result(conn))
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
        diesel::dsl::select<diesel::dsl::exists<Q::Query>>:
            AsQuery<Query: LoadQuery<'q, C, bool> + QueryFragment<C::Backend>>,
    {
        let at = Location::caller();
        let query = diesel::select(diesel::dsl::exists(query.as_query())).as_query();
        self.0.run(self.0.judge(&query), at, |conn| query.get_result(conn))
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
        let kind = self.0.kind();
        let query = query.as_query();
        self.0.run(self.0.judge(&query), Location::caller(), |conn| subselect::count(conn, query, kind))
    }

    /// Runs any Diesel code on the session's connection, inside its transaction. Use it for code that takes a
    /// connection and returns a [`QueryResult`]. [`with_connection`](Self::with_connection) takes code with any other
    /// error type.
    ///
    /// Inside the closure, the connection's own `transaction` is a savepoint. The closure must not end the session's
    /// transaction, and it must not replace the connection or its instrumentation: both lead to
    /// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired). It must not use this session: that is
    /// [`ErrorKind::SessionBusy`](crate::ErrorKind::SessionBusy).
    ///
    /// An error that the closure does not return may have aborted (PostgreSQL) or ended the transaction. The session
    /// notices that at once or at the next commit, and returns
    /// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired), never `Ok`.
    ///
    /// A setting that outlives the transaction (`SET`, `PRAGMA`, an advisory lock, a temporary table) stays on the
    /// connection until commit or rollback, when the connection is checked in. The next holder never sees the
    /// setting: on PostgreSQL the checkin then costs one more round trip; on the other databases the connection is
    /// closed if something may have been set. [`Reset`](crate::pool::Reset) describes the reset and the settings
    /// that it does not cover.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # let app = DB.init_app("with", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// let names: Vec<String> = session.with(|conn| {
    ///     diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(conn)?;
    ///     users::table.select(users::name).load(conn)
    /// })?;
    /// assert_eq!(names, ["Ada"]);
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn with<T>(&self, run: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T> {
        self.0.run(Statement::RAW, Location::caller(), run)
    }

    /// Runs any code on the session's connection, like [`with`](Self::with), for functions with an error type of their
    /// own. The type needs a `From<Error>`, for the errors of the session itself. A closure that returns Diesel's
    /// [`QueryResult`] belongs into [`with`](Self::with), because Diesel's error has no such conversion.
    ///
    /// An `Err` of the closure comes back as it is. The session cannot look into the error, and it may be no error of
    /// the database at all. The session therefore finds out by itself whether the transaction can go on, as it does for
    /// an error that the closure of [`with`](Self::with) does not return. If the transaction cannot go on, the next use
    /// of the session, at the latest the commit, is
    /// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired).
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { stock (id) { id -> Integer, left -> Integer, } }
    /// # let app = DB.init_app("with_connection", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// # DB.session()?.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE stock (id INTEGER PRIMARY KEY, left INTEGER NOT NULL); INSERT INTO stock VALUES (7, 0)"))?;
    /// #[derive(Debug)]
    /// enum OrderError {
    ///     SoldOut,
    ///     Query(diesel::result::Error),
    ///     Session(diesel_session::Error),
    /// }
    /// # impl From<diesel::result::Error> for OrderError {
    /// #     fn from(error: diesel::result::Error) -> Self { Self::Query(error) }
    /// # }
    /// # impl From<Error> for OrderError {
    /// #     fn from(error: Error) -> Self { Self::Session(error) }
    /// # }
    ///
    /// fn take_one(conn: &mut SqliteConnection, id: i32) -> Result<i32, OrderError> {
    ///     let left: i32 = stock::table.find(id).select(stock::left).first(conn)?;
    ///     if left == 0 {
    ///         return Err(OrderError::SoldOut);
    ///     }
    ///     diesel::update(stock::table.find(id)).set(stock::left.eq(left - 1)).execute(conn)?;
    ///     Ok(left - 1)
    /// }
    ///
    /// let session = DB.session()?;
    /// let outcome = session.with_connection(|conn| take_one(conn, 7));
    /// assert!(matches!(outcome, Err(OrderError::SoldOut)));
    /// assert_eq!(session.count(stock::table)?, 1);            // the session goes on
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `run`; see [`Session`] for those of the session, which are turned into `E`.
    #[track_caller]
    pub fn with_connection<T, E: From<Error>>(&self, run: impl FnOnce(&mut C) -> Result<T, E>) -> Result<T, E> {
        let mut failure = None;
        let outcome = self.0.run(Statement::RAW, Location::caller(), |conn| {
            run(conn).map_err(|error| {
                failure = Some(error);
                opaque_failure()
            })
        });
        outcome.map_err(|error| failure.unwrap_or_else(|| error.into()))
    }

    /// The session's connection as an owned guard, for code that [`with`](Self::with) does not fit:
    /// `query.load(&mut *guard)`. While the guard lives, the session itself answers
    /// [`ErrorKind::SessionBusy`](crate::ErrorKind::SessionBusy).
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

/// # The transaction
/// The first statement that does more than read begins it (see
/// [`Scope::begin_eagerly`](crate::Scope::begin_eagerly)), and [`commit`](Self::commit) or
/// [`rollback`](Self::rollback) ends it. Closures of
/// [`transaction`](Self::transaction), [`savepoint`](Self::savepoint) and [`retry`](Self::retry) end it by their
/// result.
impl<C: SessionConnection> Session<C> {
    /// Begins the transaction now instead of at the first write. In an autocommit scope, a transaction begins
    /// only in this way or with a closure. Tracked rows that were read before the transaction are read again.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyBegun`](crate::ErrorKind::AlreadyBegun); see [`Session`].
    #[track_caller]
    pub fn begin(&self) -> Result<()> {
        let at = Location::caller();
        let begun_at = self.0.borrow_transaction(at)?.begun_at();
        match begun_at {
            Some(begun_at) => Err(Details::AlreadyBegun { begun_at, at }.into()),
            None => self.0.begin(at),
        }
    }

    /// Commits everything since the session began, and checks the connection in. If there is nothing to commit, only
    /// the hooks run.
    ///
    /// # Errors
    /// The database's error if it refuses the commit; everything is then rolled back.
    /// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired) if the transaction was aborted before;
    /// nothing is then sent. [`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown) if the connection was lost.
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed).
    /// [`ErrorKind::InsideTransaction`](crate::ErrorKind::InsideTransaction) in a closure of
    /// [`transaction`](Self::transaction).
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
    /// [`ErrorKind::InsideTransaction`](crate::ErrorKind::InsideTransaction) in a closure of
    /// [`transaction`](Self::transaction); [`ErrorKind::SessionBusy`](crate::ErrorKind::SessionBusy);
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of an `after_rollback` hook, although the transaction is
    /// rolled back.
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
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # let app = DB.init_app("transaction", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// let id: i32 = session.transaction(|session| {
    ///     let insert = diesel::insert_into(users::table).values(users::name.eq("Ada"));
    ///     session.get_result(insert.returning(users::id))
    /// })?;
    /// assert!(!session.in_transaction());                     // it is committed
    /// let refused = session.transaction(|session| {
    ///     session.execute(diesel::delete(users::table))?;
    ///     session.first::<i32>(users::table.select(users::id))      // `NotFound`
    /// });
    /// assert!(refused.is_err());
    /// assert_eq!(session.one::<i32, _>(users::table.select(users::id))?, id);
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    #[track_caller]
    pub fn transaction<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if !self.0.open_scopes.borrow().is_empty() {
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
    /// Those of `body`, and those of [`begin`](Self::begin) turned into `E`.
    /// [`ErrorKind::RollbackRequired`](crate::ErrorKind::RollbackRequired) if `body` returned `Ok` after an error that
    /// aborted the savepoint; the session can be used all the same.
    #[track_caller]
    pub fn savepoint<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.borrow_transaction(at)?.is_autocommitting() {
            return self.transaction_at("savepoint", at, body);
        }
        self.savepoint_at("savepoint", at, body)
    }

    /// Whether a transaction has begun on the server and not ended. It is also `true` while a closure of
    /// [`with`](Self::with) runs.
    pub fn in_transaction(&self) -> bool {
        self.0.in_transaction()
    }

    /// Ends the session: rolls back, checks the connection in and drops the hooks. The handle can be used again, as
    /// new, until its context ends. A second call does nothing more.
    ///
    /// # Errors
    /// [`ErrorKind::InsideTransaction`](crate::ErrorKind::InsideTransaction),
    /// [`ErrorKind::SessionBusy`](crate::ErrorKind::SessionBusy).
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of an `after_rollback` hook, although the session has
    /// been removed.
    #[track_caller]
    pub fn remove(&self) -> Result<()> {
        let at = Location::caller();
        if self.0.ended.get() {
            return Ok(());
        }
        self.0.check_outside_scopes("remove", at)?;
        drop(self.0.borrow_transaction(at)?);
        let outcome = self.0.rollback(at);
        // A failure of a hook does not keep the other hooks.
        self.0.discard_hooks_since(0);
        self.0.drop_rows_and_flush_hooks();
        outcome
    }

    fn transaction_at<T, E: From<Error>>(
        &self,
        name: &'static str,
        at: SourceLocation,
        body: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        self.0.begin(at)?;
        let scope = TransactionScope::open(&self.0, name, at, false);
        let value = body(self)?;
        scope.close();
        if let Err(error) = self.0.commit(at) {
            self.0.roll_back_after(&error, at);
            return Err(self.0.with_undo(error).into());
        }
        Ok(value)
    }

    fn savepoint_at<T, E: From<Error>>(
        &self,
        name: &'static str,
        at: SourceLocation,
        body: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        // The savepoint must not undo changes from before it.
        self.0.flush(at)?;
        self.0.open_savepoint(at)?;
        let scope = TransactionScope::open(&self.0, name, at, true);
        let value = body(self)?;
        let release = || self.0.borrow_transaction_at_end(at)?.release_savepoint(at);
        if let Err(error) = self.0.flush(at).and_then(|()| release()) {
            drop(scope);
            return Err(self.0.with_undo_after_savepoint(error).into());
        }
        scope.close();
        self.0.with_unit(Unit::release_savepoint);
        Ok(value)
    }
}
