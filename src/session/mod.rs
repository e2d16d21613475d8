//! The session: what a program sends its statements through.

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
mod transient;
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

/// A handle to a session: statements, one transaction at a time, and what happens around it.
///
/// The session of a context comes from [`Database::session`](crate::Database::session) and ends with the context; the one of
/// [`App::open_session`](crate::App::open_session) ends when its last handle is dropped. It begins by itself at the first
/// statement, holds a connection from there to [`commit`](Self::commit) or [`rollback`](Self::rollback), and costs the
/// server nothing in between. What is not committed is rolled back.
///
/// A handle belongs to its thread:
///
/// ```compile_fail,E0277
/// fn needs_send<T: Send>() {}
/// needs_send::<diesel_session::Session<diesel::SqliteConnection>>();
/// ```
///
/// # Errors of every method that sends something
/// [`Error::Query`] with Diesel's error, [`Error::NotFound`], [`Error::ConnectionLost`], [`Error::RollbackRequired`] after the database has aborted or
/// ended the transaction, [`Error::SessionEnded`], [`Error::SessionBusy`], [`Error::DeadlineExceeded`]; for the first
/// statement also what can go wrong with getting a connection: [`Error::AcquireTimeout`], [`Error::Connect`],
/// [`Error::ConnectTimeout`], [`Error::BudgetExhausted`], [`Error::Disposed`], [`Error::WouldDeadlock`], [`Error::Forked`], on
/// SQLite [`Error::LockTimeout`], and [`Error::HookFailed`] of
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

    /// Runs a query and returns its first row, asking for no more than one. For a row by its key
    /// [`get_result`](Self::get_result) does the same and costs less: SQLite prepares a statement with a bound `LIMIT` anew
    /// each time.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none; see [`Session`].
    #[track_caller]
    pub fn first<'q, U, Q>(&self, query: Q) -> Result<U>
    where
        Q: LimitDsl<Output: LoadQuery<'q, C, U> + AsQuery>,
    {
        let at = Location::caller();
        let query = query.limit(1);
        self.0.run(Statement::of_query(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a query whose one row is wanted and returns it.
    ///
    /// At most two rows are asked for, whatever limit the query has of its own. A SELECT is sent as `SELECT * FROM (query) LIMIT 2`; an
    /// `INSERT .. RETURNING` and raw SQL are sent as they are.
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

    /// The same if there may be no row.
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

    /// Runs a query that gives one row, such as a count or an `INSERT .. RETURNING`. Of several rows it takes the first without a word;
    /// [`one`](Self::one) makes sure that there is only one.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none; see [`Session`].
    #[track_caller]
    pub fn get_result<'q, U>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<U> {
        let at = Location::caller();
        self.0.run(Statement::of_query(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a statement and returns the number of rows it changed.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn execute<Q: ExecuteDsl<C> + RunQueryDsl<C>>(&self, statement: Q) -> Result<usize> {
        let at = Location::caller();
        self.0.run(Statement::of_command::<Q>(), at, |conn| RunQueryDsl::execute(statement, conn))
    }

    /// Whether a query has any row.
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

    /// How many rows [`load`](Self::load) of a query would give: its limit, offset, `DISTINCT`, `GROUP BY` and unions count. It is sent as
    /// `SELECT COUNT(*) FROM (query)`.
    ///
    /// MySQL and MariaDB refuse that for a query with two columns of one name, as that of a join may be. There such a query is run as it is, and its
    /// rows are counted as they arrive; `query.select(table::id)` avoids that.
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

    /// Runs any Diesel code on the session's connection, inside its transaction. This is the way to use code that takes a
    /// connection.
    ///
    /// The closure may use the connection's own `transaction`, which is a savepoint here. It must not end the session's
    /// transaction, replace the connection or its instrumentation (that is [`Error::RollbackRequired`] afterwards), and it must
    /// not use this session: that is [`Error::SessionBusy`].
    ///
    /// An error that the closure keeps to itself may have aborted the transaction (PostgreSQL) or ended it. The session notices that at
    /// once or at the next commit, which is [`Error::RollbackRequired`] then and never `Ok`.
    ///
    /// What it sets on the connection for longer than the transaction (`SET`, `PRAGMA`, advisory locks, temporary tables) stays
    /// until the connection goes back, at commit and rollback, and does not reach the next who gets it: on PostgreSQL that costs
    /// one more round trip, elsewhere the connection is closed where something may have been set. [`Reset`](crate::Reset) says
    /// how, and what is not covered.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn with<T>(&self, run: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T> {
        self.0.run(Statement::RAW, Location::caller(), run)
    }

    /// The session's connection as an owned guard, for code that [`with`](Self::with) does not fit. While it lives, the
    /// session itself answers [`Error::SessionBusy`].
    ///
    /// On MySQL and MariaDB a statement whose text is empty panics before it is sent, as MariaDB's client library would crash;
    /// in [`with`](Self::with) it is an error.
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
    /// Begins the transaction now instead of at the first statement; in an autocommit scope it begins one at all. Tracked rows that
    /// were read before it are read again.
    ///
    /// # Errors
    /// [`Error::AlreadyBegun`]; see [`Session`].
    #[track_caller]
    pub fn begin(&self) -> Result<()> {
        let at = Location::caller();
        let begun_at = self.0.enter(at)?.begun_at();
        match begun_at {
            Some(begun_at) => Err(Error::AlreadyBegun { begun_at, at }),
            None => self.0.begin(at),
        }
    }

    /// Commits what was done since the session began, and gives the connection back. Without anything to commit it only runs
    /// the hooks.
    ///
    /// # Errors
    /// What the database says, where it refuses: then everything is rolled back. [`Error::RollbackRequired`] where the
    /// transaction was aborted before: then nothing is sent. [`Error::CommitUnknown`] where the connection was lost.
    /// [`Error::HookFailed`]. [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction).
    #[track_caller]
    pub fn commit(&self) -> Result<()> {
        let at = Location::caller();
        self.0.outside_blocks("commit", at)?;
        self.0.commit(at)
    }

    /// Rolls back what was done since the session began, and gives the connection back. The session goes on as new.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction); [`Error::SessionBusy`];
    /// [`Error::SessionEnded`]; [`Error::HookFailed`].
    #[track_caller]
    pub fn rollback(&self) -> Result<()> {
        let at = Location::caller();
        self.0.outside_blocks("rollback", at)?;
        self.0.rollback(at)
    }

    /// Runs `body` and commits when it returns `Ok`; `Err` and a panic roll back. The outermost one joins what the session
    /// has already begun and ends all of it; inside another one it is a [`savepoint`](Self::savepoint). Tracked rows that were read
    /// outside of it are read again.
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    #[track_caller]
    pub fn transaction<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.is_in_block() {
            return self.savepoint_at("transaction", at, body);
        }
        self.transaction_at("transaction", at, body)
    }

    /// Runs `body` in a savepoint: `Err` and a panic undo what it did, and nothing else. This is the portable way to go on
    /// after a statement that may fail. In an autocommit scope, where there is no transaction around it, it is a
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
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn, "CREATE TABLE users (id INTEGER PRIMARY KEY)"))?;
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
    /// Those of `body`, and those of [`begin`](Self::begin) turned into `E`. Where `body` returned `Ok` after an error that
    /// aborted the savepoint, [`Error::RollbackRequired`]; the session goes on all the same.
    #[track_caller]
    pub fn savepoint<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.enter(at)?.commits_by_itself() {
            return self.transaction_at("savepoint", at, body);
        }
        self.savepoint_at("savepoint", at, body)
    }

    /// Whether a transaction has begun and not ended.
    pub fn in_transaction(&self) -> bool {
        self.0.has_begun()
    }

    /// Ends the session: rolls back, gives the connection back and drops its hooks. The handle can be used again, as new,
    /// until its context ends. Calling it twice is the same as once.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`], [`Error::SessionBusy`].
    #[track_caller]
    pub fn remove(&self) -> Result<()> {
        let at = Location::caller();
        if self.0.ended.get() {
            return Ok(());
        }
        self.0.outside_blocks("remove", at)?;
        drop(self.0.enter(at)?);
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
        let block = TransactionScope::open(&self.0, name, at, false);
        let outcome = body(self);
        block.close();
        match outcome {
            Ok(value) => match self.0.commit(at) {
                Ok(()) => Ok(value),
                Err(error) => {
                    self.0.roll_back_for(&error, at);
                    Err(self.0.with_undo(error).into())
                }
            },
            Err(error) => {
                // Its hooks have been told; the caller gets the error that matters more.
                self.0.undo(at);
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
        // What it undoes is what was done inside.
        self.0.flush(at)?;
        let mut core = self.0.enter(at)?;
        let was_reading = core.is_reading();
        let opened = core.open_level(at);
        drop(core);
        opened.map_err(|error| self.0.with_undo(error))?;
        if was_reading {
            self.0.expire_rows();
        }
        self.0.unit_level_opened();
        let block = TransactionScope::open(&self.0, name, at, true);
        let mark = block.mark;
        let outcome = body(self).map_err(Failed::Body);
        let outcome = outcome.and_then(|value| self.0.flush(at).map(|()| value).map_err(Failed::End));
        block.close();
        let kept = match (outcome, self.0.enter_at_end(at)) {
            (Ok(value), Ok(mut core)) => core.keep_level(at).map(|()| value).map_err(Failed::End),
            (Err(error), Ok(mut core)) => {
                core.undo_level(at);
                Err(error)
            }
            (outcome, Err(busy)) => outcome.and(Err(Failed::End(busy))),
        };
        match &kept {
            Ok(_) => self.0.unit_level_kept(),
            Err(_) => {
                self.0.unit_level_undone();
                self.0.forget_hooks(mark);
            }
        }
        kept.map_err(|failed| match failed {
            Failed::Body(error) => error,
            Failed::End(error) => self.0.after_savepoint(error).into(),
        })
    }
}

/// What failed in a savepoint.
enum Failed<E> {
    /// The program's closure.
    Body(E),
    /// What came after it.
    End(Error),
}

/// Hooks. Each runs once, in the order of registration; those registered inside a savepoint that was rolled back, and those
/// left when the session is removed, are dropped.
impl<C: SessionConnection> Session<C> {
    /// Runs `hook` before the next commit; it may use the session, and its `Err` or panic prevents the commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn before_commit<R: HookOutcome>(&self, hook: impl FnOnce() -> R + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().before_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next commit, when the connection has gone back. A panic becomes [`Error::HookFailed`] of the
    /// commit, which happened all the same; later hooks still run.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_commit(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next rollback of the whole transaction, when the connection has gone back; also at the end of a
    /// context that did not commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_rollback(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_rollback(hook);
        Ok(())
    }
}
