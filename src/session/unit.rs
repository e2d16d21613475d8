//! The methods of a session that concern tracked rows.

use std::cell::Cell;
use std::panic::Location;

use diesel::query_builder::AsQuery;
use diesel::query_dsl::methods::{LimitDsl, LoadQuery};

use super::Session;
use super::flush::SessionExecutor;
use super::hooks::HookOutcome;
use super::statement::Statement;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::unit_of_work::{ChangeKind, Changes, Entity, Insert, Newest, Persist, Track, Tracked, Tracker};

/// The unit of work: the session tracks rows and writes their changes when it is flushed. The module
/// [`unit_of_work`](crate::unit_of_work) has the guide.
impl<C: SessionConnection> Session<C> {
    /// Adds a new row, which the next flush inserts. Nothing is sent now, so the handle has no value yet. It has a
    /// [`key`](Tracked::key) for rows that refer to it.
    ///
    /// If the session's context has ended, the handle is [`Discarded`](crate::RowState::Discarded).
    #[track_caller]
    pub fn add<N: Insert<C>>(&self, new: N) -> Tracked<N::Entity> {
        let at = Location::caller();
        match self.0.check_not_ended(at) {
            Ok(()) => self.0.unit().add(new, at),
            Err(error) => {
                crate::wording::log_line!(
                    warn,
                    "diesel_session::session",
                    "a new row of `{}` is lost: {error}",
                    N::Entity::NAME
                );
                self.0.unit().discarded()
            }
        }
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
        self.0.check_not_ended(at)?;
        let unit = self.0.unit();
        if let Some(known) = unit.fresh(&id) {
            return Ok(Some(known));
        }
        self.0.autoflush(at)?;
        if let Some(known) = unit.fresh(&id) {
            return Ok(Some(known));
        }
        unit.fetch(&id, &SessionExecutor { session: &self.0, at })
    }

    /// The row with this key, which must exist.
    ///
    /// # Errors
    /// [`Error::NotFound`], which names entity and key; those of [`get`](Self::get).
    #[track_caller]
    pub fn find<T: Persist<C>>(&self, id: impl Into<T::Id>) -> Result<Tracked<T>> {
        let at = Location::caller();
        let id = id.into();
        // The text is built only for the error.
        match self.get::<T>(id.clone())? {
            Some(handle) => Ok(handle),
            None => Err(Error::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at }),
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
        self.read_many(ids.into_iter().map(Into::into).collect(), Location::caller())
    }

    /// Reads the rows with these keys in one query, so that [`get`](Self::get) of each sends nothing in this
    /// transaction.
    ///
    /// # Errors
    /// Those of [`get`](Self::get).
    #[track_caller]
    pub fn preload<T: Persist<C>>(&self, ids: impl IntoIterator<Item = impl Into<T::Id>>) -> Result<()> {
        self.read_many::<T>(ids.into_iter().map(Into::into).collect(), Location::caller()).map(drop)
    }

    fn read_many<T: Persist<C>>(&self, ids: Vec<T::Id>, at: Place) -> Result<Vec<Option<Tracked<T>>>> {
        self.0.check_not_ended(at)?;
        let unit = self.0.unit();
        if !ids.iter().all(|id| unit.fresh::<T>(id).is_some()) {
            self.0.autoflush(at)?;
        }
        unit.get_many::<T>(&ids, &SessionExecutor { session: &self.0, at })
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
    /// # Errors
    /// See [`Session`], and [`flush`](Self::flush), which runs before the query.
    #[track_caller]
    pub fn track<'q, U: Track<C>>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<Vec<U::Out>> {
        let at = Location::caller();
        self.0.check_not_ended(at)?;
        let statement = Statement::of_query(&query);
        let tracker = Tracker { unit: self.0.unit(), newest: statement.newest, has_entities: Cell::new(false) };
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
            self.0.unit().read_doubtful(&SessionExecutor { session: &self.0, at })?;
        }
        rows
    }

    /// The first row of a query, as [`track`](Self::track) gives it. The query asks for at most one row.
    ///
    /// # Errors
    /// Those of [`track`](Self::track); [`Error::NotFound`] if there is no row.
    #[track_caller]
    pub fn track_first<'q, U: Track<C>>(
        &self,
        query: impl LimitDsl<Output: LoadQuery<'q, C, U> + AsQuery>,
    ) -> Result<U::Out> {
        let first = self.track::<U>(query.limit(1))?.into_iter().next();
        first.ok_or(Error::NotFound { row: None, at: Location::caller() })
    }

    /// Deletes a row with the next flush. A new row that was not flushed is not inserted.
    ///
    /// # Errors
    /// [`Error::WrongState`] if the handle has no such row; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn delete<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.check_not_ended(at)?;
        self.0.unit().delete(handle, at)
    }

    /// Sends all changes: new rows, updates and deletes. Queries of this session, `savepoint` and `commit` flush by
    /// themselves. A flush commits nothing, except in an autocommit scope, where each flush is a transaction of its
    /// own.
    ///
    /// # Errors
    /// Before anything is sent: [`Error::WriteInProgress`], [`Error::KeyChanged`], [`Error::HookFailed`],
    /// [`Error::AlreadyFlushing`]. After something was sent, the session needs a [`rollback`](Self::rollback), or the
    /// rollback of the savepoint that it is in: [`Error::Stale`], [`Error::UnresolvedKeys`], [`Error::Unpaired`],
    /// [`Error::NotReturned`], [`Error::NotUnique`], [`Error::RowTooLarge`]; see [`Session`].
    #[track_caller]
    pub fn flush(&self) -> Result<()> {
        self.0.flush(Location::caller())
    }

    /// Flushes, and then reads a row again.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the row no longer exists; [`Error::WrongState`] if the row was never in the database;
    /// [`Error::NotMine`]; those of [`flush`](Self::flush).
    #[track_caller]
    pub fn refresh<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.check_not_ended(at)?;
        self.0.autoflush(at)?;
        self.0.unit().refresh(handle, &SessionExecutor { session: &self.0, at })
    }

    /// Drops the unflushed writes to a row. The next access reads the row again.
    ///
    /// # Errors
    /// [`Error::WrongState`]; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn expire<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.check_not_ended(at)?;
        self.0.unit().expire(handle, at)
    }

    /// Applies [`expire`](Self::expire) to every row. New rows and deletes stay.
    pub fn expire_all(&self) {
        if let Some(unit) = self.0.unit.get() {
            unit.forget_writes();
        }
    }

    /// Removes a row from the session: the handle becomes [`Detached`](crate::RowState::Detached), and unflushed
    /// writes to the row are dropped. A new row that was not flushed is not inserted.
    ///
    /// # Errors
    /// [`Error::WrongState`]; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn expunge<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.check_not_ended(at)?;
        self.0.unit().expunge(handle, at)
    }

    /// Removes all rows from the session, new ones included. Flushed changes stay in the transaction. It is meant for
    /// long jobs: otherwise the session keeps every row that it has read until the session ends or, if the program
    /// has no handle to the row, until a commit.
    pub fn expunge_all(&self) {
        self.0.unit_cleared();
    }

    /// Runs `body` without a flush before each query.
    pub fn no_autoflush<R>(&self, body: impl FnOnce(&Self) -> R) -> R {
        let _no_autoflush = self.0.unit().disable_autoflush();
        body(self)
    }

    /// Whether a flush would send something.
    pub fn is_dirty(&self) -> bool {
        self.0.unit.get().is_some_and(|unit| unit.is_dirty())
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
        self.0.unit.get().map_or_else(Changes::default, |unit| unit.unflushed(&[kind]))
    }

    /// The changes that were flushed in this transaction and not rolled back. Each row appears once, as new if this
    /// transaction inserted it, and not at all if this transaction inserted and deleted it. In an `after_commit` or
    /// `after_rollback` hook these are the changes that were committed or rolled back.
    pub fn changes(&self) -> Changes {
        self.0.unit.get().map_or_else(Changes::default, |unit| unit.flushed())
    }

    /// Runs `hook` before every flush of this session that has something to send, with the changes. The hook may
    /// change rows; the same flush sends these changes. An `Err` or panic of the hook prevents the flush. The hook
    /// stays until the session is removed.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn before_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        self.0.check_not_ended(Location::caller())?;
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.flush_hooks.borrow_mut().before.push(std::rc::Rc::new(hook));
        Ok(())
    }

    /// Runs `hook` after every flush of this session, with the changes that were sent. Rows that the hook changes
    /// wait for the next flush. The flush returns the `Err` of the hook, although the changes have been sent. The
    /// hook stays until the session is removed.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        self.0.check_not_ended(Location::caller())?;
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.flush_hooks.borrow_mut().after.push(std::rc::Rc::new(hook));
        Ok(())
    }
}
