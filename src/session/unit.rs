//! The methods of a session that concern tracked rows.

use std::cell::Cell;
use std::panic::Location;

use diesel::query_builder::{AsQuery, QueryFragment};
use diesel::query_dsl::methods::{LimitDsl, LoadQuery};

use super::Session;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result};
use crate::kind::DatabaseKind;
use crate::unit_of_work::{ChangeKind, Changes, Insert, Newest, Persist, Track, Tracked, Tracker, Unit};

/// # Tracked rows: the unit of work
/// The session tracks rows, and a flush writes their changes. The module [`unit_of_work`](crate::unit_of_work) has the
/// guide.
impl<C: SessionConnection> Session<C> {
    /// Adds a new row, which the next flush inserts. Nothing is sent now, so the handle has no value yet. It has a
    /// [`key`](Tracked::key) for rows that refer to it.
    ///
    /// # Errors
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded): the row would never be inserted.
    #[track_caller]
    pub fn add<N: Insert<C>>(&self, new: N) -> Result<Tracked<N::Entity>> {
        let at = Location::caller();
        Ok(self.0.live_unit(at)?.map().add(new, at))
    }

    /// The row with this key. A row that the session has read in the current transaction is not read again.
    ///
    /// # Errors
    /// See [`Session`], and [`flush`](Self::flush), which may run before the query.
    #[track_caller]
    #[inline]
    pub fn get<T: Persist<C>>(&self, id: impl Into<T::Id>) -> Result<Option<Tracked<T>>> {
        let at = Location::caller();
        let id = id.into();
        let map = self.0.live_unit(at)?.map::<T>();
        if let Some(known) = map.fresh(&id) {
            return Ok(Some(known));
        }
        self.0.autoflush(at)?;
        match map.fresh(&id) {
            Some(known) => Ok(Some(known)),
            None => map.fetch(&id, at),
        }
    }

    /// The row with this key, which must exist.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound), which names entity and key; those of [`get`](Self::get).
    #[track_caller]
    pub fn find<T: Persist<C>>(&self, id: impl Into<T::Id>) -> Result<Tracked<T>> {
        let at = Location::caller();
        let id = id.into();
        // The text is built only for the error.
        match self.get::<T>(id.clone())? {
            Some(handle) => Ok(handle),
            None => Err(Details::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at }.into()),
        }
    }

    /// The rows with these keys, in the order of the keys. One query reads the rows that the session does not know
    /// yet.
    ///
    /// # Errors
    /// Those of [`get`](Self::get).
    #[track_caller]
    pub fn get_many<T: Persist<C>>(
        &self,
        ids: impl IntoIterator<Item = impl Into<T::Id>>,
    ) -> Result<Vec<Option<Tracked<T>>>> {
        let at = Location::caller();
        let ids: Vec<T::Id> = ids.into_iter().map(Into::into).collect();
        let map = self.0.live_unit(at)?.map::<T>();
        if !ids.iter().all(|id| map.fresh(id).is_some()) {
            self.0.autoflush(at)?;
        }
        map.get_many(&ids, at)
    }

    /// Reads the rows with these keys in one query, so that [`get`](Self::get) of each sends nothing in this
    /// transaction.
    ///
    /// # Errors
    /// Those of [`get`](Self::get).
    #[track_caller]
    pub fn preload<T: Persist<C>>(&self, ids: impl IntoIterator<Item = impl Into<T::Id>>) -> Result<()> {
        self.get_many::<T>(ids).map(drop)
    }

    /// Runs a query and tracks its rows: entities become handles, also in tuples and `Option`s, and plain values stay
    /// as they are. The identity map wins: for a tracked row the query gives the existing handle with its in-memory
    /// value, unless the row has expired.
    ///
    /// A query with a locking clause (such as `for_update()`), raw SQL, and an INSERT or UPDATE with `returning` give
    /// the newest row even if the session knows the row. Unflushed writes of the program to the row stay.
    ///
    /// If the compiler cannot infer the entity, name it: `session.track::<User>(users::table)`.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # use diesel_session::{Entity, NewEntity};
    /// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
    /// # struct User { #[entity(generated)] id: i32, name: String }
    /// # #[derive(Insertable, NewEntity)] #[diesel(table_name = users)] #[entity(User)]
    /// # struct NewUser { name: String }
    /// # let app = DB.init_app("track", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// session.add(NewUser { name: "Ada".into() })?;
    /// let users = session.track::<User>(users::table)?;      // the new row is flushed first
    /// users[0].write().name = "Augusta".into();
    /// let query = users::table.select((User::as_select(), users::name));
    /// let pairs = session.track::<(User, String)>(query)?;
    /// assert_eq!((&pairs[0].0, pairs[0].1.as_str()), (&users[0], "Augusta"));
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// See [`Session`], and [`flush`](Self::flush), which runs before the query.
    #[track_caller]
    pub fn track<'q, U: Track<C>>(
        &self,
        query: impl AsQuery<Query: LoadQuery<'q, C, U> + QueryFragment<C::Backend>>,
    ) -> Result<Vec<U::Out>> {
        let (at, query) = (Location::caller(), query.as_query());
        let unit = self.0.live_unit(at)?;
        let statement = self.0.judge(&query);
        let tracker = Tracker { unit, newest: statement.newest, has_entities: Cell::new(false) };
        self.0.autoflush_before(statement, at)?;
        if statement.expires_rows {
            // All tracked rows expire, except those that the statement returns as it has written them.
            self.0.expire_rows();
        }
        let rows: Result<Vec<U::Out>> = self.0.run_without_flush(statement, at, |conn| {
            query.internal_load(conn)?.map(|row| row.map(|row: U| row.track(&tracker))).collect()
        });
        let expires = match statement.newest {
            // The program takes a lock to read the newest rows afterwards.
            Newest::Locked => rows.as_ref().is_ok_and(|rows| !rows.is_empty()) && !tracker.has_entities.get(),
            // An unknown statement may return rows as they were before it. On MySQL and MariaDB these values are
            // kept: the rows may be locked, and a SELECT might find older ones.
            Newest::No | Newest::Perhaps => statement.access != Access::Read && self.0.kind() != DatabaseKind::Mysql,
        };
        if expires {
            self.0.expire_rows();
        }
        if self.0.kind() == DatabaseKind::Mysql && rows.is_ok() {
            unit.read_doubtful(at)?;
        }
        rows
    }

    /// The first row of a query, as [`track`](Self::track) gives it. The query asks for at most one row.
    ///
    /// # Errors
    /// Those of [`track`](Self::track); [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if there is no row.
    #[track_caller]
    pub fn track_first<'q, U: Track<C>>(
        &self,
        query: impl LimitDsl<Output: AsQuery<Query: LoadQuery<'q, C, U> + QueryFragment<C::Backend>>>,
    ) -> Result<U::Out> {
        let first = self.track::<U>(query.limit(1))?.into_iter().next();
        first.ok_or(Error::from(Details::NotFound { row: None, at: Location::caller() }))
    }

    /// Deletes a row with the next flush. A new row that was not flushed is not inserted.
    ///
    /// # Errors
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState) if the handle has no such row;
    /// [`ErrorKind::ForeignHandle`](crate::ErrorKind::ForeignHandle);
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn delete<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.live_unit(at)?.map::<T>().schedule_delete(&handle.0, at)
    }

    /// Sends all changes: new rows, updates and deletes. Queries of this session, `savepoint` and `commit` flush by
    /// themselves. A flush commits nothing, except in an autocommit scope, where each flush is a transaction of its
    /// own.
    ///
    /// # Errors
    /// Before anything is sent: [`ErrorKind::WriteInProgress`](crate::ErrorKind::WriteInProgress),
    /// [`ErrorKind::KeyChanged`](crate::ErrorKind::KeyChanged),
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed),
    /// [`ErrorKind::AlreadyFlushing`](crate::ErrorKind::AlreadyFlushing). After something was sent, the session needs a
    /// [`rollback`](Self::rollback), or the rollback of the savepoint that it is in:
    /// [`ErrorKind::Stale`](crate::ErrorKind::Stale), [`ErrorKind::UnresolvedKeys`](crate::ErrorKind::UnresolvedKeys),
    /// [`ErrorKind::UnmatchedRows`](crate::ErrorKind::UnmatchedRows),
    /// [`ErrorKind::NotReturned`](crate::ErrorKind::NotReturned),
    /// [`ErrorKind::NotUnique`](crate::ErrorKind::NotUnique),
    /// [`ErrorKind::RowTooLarge`](crate::ErrorKind::RowTooLarge); see [`Session`].
    #[track_caller]
    pub fn flush(&self) -> Result<()> {
        self.0.flush(Location::caller())
    }

    /// Flushes, and then reads a row again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) if the row no longer exists;
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState) if the row was never in the database;
    /// [`ErrorKind::ForeignHandle`](crate::ErrorKind::ForeignHandle); those of [`flush`](Self::flush).
    #[track_caller]
    pub fn refresh<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        let unit = self.0.live_unit(at)?;
        self.0.autoflush(at)?;
        unit.map::<T>().refresh(&handle.0, at)
    }

    /// Drops the unflushed writes to a row. The next access reads the row again.
    ///
    /// # Errors
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState);
    /// [`ErrorKind::ForeignHandle`](crate::ErrorKind::ForeignHandle);
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn expire<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.live_unit(at)?.map::<T>().expire_one(&handle.0, at)
    }

    /// Applies [`expire`](Self::expire) to every row. New rows and deletes stay.
    pub fn expire_all(&self) {
        self.0.with_unit(Unit::forget_writes);
    }

    /// Removes a row from the session: the handle becomes [`Detached`](crate::unit_of_work::RowState::Detached), and
    /// unflushed writes to the row are dropped. A new row that was not flushed is not inserted.
    ///
    /// # Errors
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState);
    /// [`ErrorKind::ForeignHandle`](crate::ErrorKind::ForeignHandle);
    /// [`ErrorKind::SessionEnded`](crate::ErrorKind::SessionEnded).
    #[track_caller]
    pub fn expunge<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.live_unit(at)?.map::<T>().expunge(&handle.0, at)
    }

    /// Removes all rows from the session, new ones included. Flushed changes stay in the transaction. It is meant for
    /// long jobs: otherwise the session keeps every row that it has read until the session ends or, if the program
    /// has no handle to the row, until a commit.
    pub fn expunge_all(&self) {
        self.0.with_unit(Unit::clear);
    }

    /// Runs `body` without a flush before each query.
    pub fn no_autoflush<R>(&self, body: impl FnOnce(&Self) -> R) -> R {
        let _no_autoflush = self.0.unit().disable_autoflush();
        body(self)
    }

    /// Whether a flush would send something.
    pub fn is_dirty(&self) -> bool {
        self.0.unit.get().is_some_and(Unit::is_dirty)
    }

    /// The rows that the next flush inserts.
    pub fn pending(&self) -> Changes {
        self.unflushed(ChangeKind::Insert)
    }

    /// The rows that the next flush updates.
    pub fn dirty(&self) -> Changes {
        self.unflushed(ChangeKind::Update)
    }

    /// The rows that the next flush deletes.
    pub fn deleted(&self) -> Changes {
        self.unflushed(ChangeKind::Delete)
    }

    fn unflushed(&self, kind: ChangeKind) -> Changes {
        self.0.unit.get().map(|unit| unit.unflushed(&[kind])).unwrap_or_default()
    }

    /// The changes that were flushed in this transaction and not rolled back. Each row appears once, as new if this
    /// transaction inserted it, and not at all if this transaction inserted and deleted it.
    ///
    /// After a commit or rollback there are no changes. Only the `after_commit` and `after_rollback` hooks still get
    /// the changes that were committed or rolled back, until a hook flushes a change of its own. In an autocommit scope
    /// each flush outside of a transaction is a transaction of its own, so after it there are no changes.
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel_session::{Config, Database, Entity, NewEntity, Error};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
    /// # struct User { #[entity(generated)] id: i32, name: String }
    /// # #[derive(Insertable, NewEntity)] #[diesel(table_name = users)] #[entity(User)]
    /// # struct NewUser { name: String }
    /// # let app = DB.init_app("changes", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
    /// #     "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL)"))?;
    /// session.add(NewUser { name: "Ada".into() })?;
    /// assert_eq!((session.pending().len(), session.changes().len()), (1, 0));
    /// session.flush()?;
    /// assert_eq!((session.pending().len(), session.changes().len()), (0, 1));
    /// session.commit()?;
    /// assert!(session.changes().is_empty());
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    pub fn changes(&self) -> Changes {
        self.0.unit.get().map(Unit::flushed).unwrap_or_default()
    }
}
