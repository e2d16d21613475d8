//! Rows that a session keeps.

use std::cell::Cell;
use std::panic::Location;

use diesel::query_builder::AsQuery;
use diesel::query_dsl::methods::{LimitDsl, LoadQuery};

use super::Session;
use super::flush::Route;
use super::hooks::HookOutcome;
use super::statement::Statement;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::unit_of_work::{ChangeKind, Changes, Entity, Insert, Newest, Persist, Track, Tracked, Tracker};

/// The unit of work: rows that the session keeps, and writes when it is flushed. [`unit_of_work`](crate::unit_of_work) has the guide.
impl<C: SessionConnection> Session<C> {
    /// Adds a new row; the next flush inserts it. Nothing is sent now, so the handle has no value yet, but it has a
    /// [`key`](Tracked::key) for rows that refer to it.
    ///
    /// Where the session's context has ended, the handle is [`Discarded`](crate::RowState::Discarded).
    #[track_caller]
    pub fn add<N: Insert<C>>(&self, new: N) -> Tracked<N::Entity> {
        let at = Location::caller();
        match self.0.not_ended(at) {
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

    /// The row of a key. One that the session has read in the present transaction is not read again.
    ///
    /// # Errors
    /// See [`Session`], and [`flush`](Self::flush), which may come before.
    #[track_caller]
    #[inline]
    pub fn get<T: Persist<C>>(&self, id: impl Into<T::Id>) -> Result<Option<Tracked<T>>> {
        let at = Location::caller();
        let id = id.into();
        self.0.not_ended(at)?;
        let unit = self.0.unit();
        if let Some(known) = unit.fresh(&id) {
            return Ok(Some(known));
        }
        self.0.autoflush(at)?;
        if let Some(known) = unit.fresh(&id) {
            return Ok(Some(known));
        }
        unit.fetch(&id, &Route { session: &self.0, at })
    }

    /// The row of a key, where there must be one.
    ///
    /// # Errors
    /// [`Error::NotFound`] that names entity and key; those of [`get`](Self::get).
    #[track_caller]
    pub fn find<T: Persist<C>>(&self, id: impl Into<T::Id>) -> Result<Tracked<T>> {
        let at = Location::caller();
        let id = id.into();
        // The text is made where it is needed.
        match self.get::<T>(id.clone())? {
            Some(handle) => Ok(handle),
            None => Err(Error::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at }),
        }
    }

    /// The rows of several keys, in their order, with one query for those that are not known yet.
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

    /// Reads the rows of several keys with one query, so that [`get`](Self::get) of each sends nothing in this transaction.
    ///
    /// # Errors
    /// Those of [`get`](Self::get).
    #[track_caller]
    pub fn preload<T: Persist<C>>(&self, ids: impl IntoIterator<Item = impl Into<T::Id>>) -> Result<()> {
        self.read_many::<T>(ids.into_iter().map(Into::into).collect(), Location::caller()).map(drop)
    }

    fn read_many<T: Persist<C>>(&self, ids: Vec<T::Id>, at: Place) -> Result<Vec<Option<Tracked<T>>>> {
        self.0.not_ended(at)?;
        let unit = self.0.unit();
        if !ids.iter().all(|id| unit.fresh::<T>(id).is_some()) {
            self.0.autoflush(at)?;
        }
        unit.get_many::<T>(&ids, &Route { session: &self.0, at })
    }

    /// Runs a query and keeps its rows: entities come as handles, also in tuples and `Option`s, plain values as they are. A row
    /// that the session knows is the handle it has, with the value it has, unless that has expired.
    ///
    /// A query with a locking clause (`for_update()` and its like), raw SQL, and an INSERT or UPDATE with `returning` give the newest
    /// row whatever is known. What the program has written to it and not flushed stays.
    ///
    /// Where the query does not say what its rows are, name it: `session.track::<User>(users::table)`.
    ///
    /// # Errors
    /// See [`Session`], and [`flush`](Self::flush), which comes before.
    #[track_caller]
    pub fn track<'q, U: Track<C>>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<Vec<U::Out>> {
        let at = Location::caller();
        self.0.not_ended(at)?;
        let statement = Statement::of_query(&query);
        let tracker = Tracker { unit: self.0.unit(), newest: statement.newest, has_entities: Cell::new(false) };
        self.0.autoflush_before(statement, at)?;
        if statement.outdates {
            // All but the rows that come back, where those are what the statement has made of them.
            self.0.expire_rows();
        }
        let rows: Result<Vec<U::Out>> = self.0.run_now(statement, at, |conn| {
            query.internal_load(conn)?.map(|row| row.map(|row: U| row.track(&tracker))).collect()
        });
        let expires = match statement.newest {
            // Locked for what is read afterwards.
            Newest::Locked => rows.as_ref().is_ok_and(|rows| !rows.is_empty()) && !tracker.has_entities.get(),
            // Of a statement that is not known the rows may be from before it. On MySQL and MariaDB they are kept: they may be locked,
            // and a SELECT might find older ones.
            Newest::No | Newest::Perhaps => statement.access != Access::Read && self.0.kind() != DatabaseKind::Mysql,
        };
        if expires {
            self.0.expire_rows();
        }
        if self.0.kind() == DatabaseKind::Mysql && rows.is_ok() {
            self.0.unit().read_doubtful(&Route { session: &self.0, at })?;
        }
        rows
    }

    /// The first row of a query, as [`track`](Self::track) would give it; asks for no more than one.
    ///
    /// # Errors
    /// Those of [`track`](Self::track); [`Error::NotFound`] where there is none.
    #[track_caller]
    pub fn track_first<'q, U, Q>(&self, query: Q) -> Result<U::Out>
    where
        U: Track<C>,
        Q: LimitDsl<Output: LoadQuery<'q, C, U> + AsQuery>,
    {
        let first = self.track::<U>(query.limit(1))?.into_iter().next();
        first.ok_or(Error::NotFound { row: None, at: Location::caller() })
    }

    /// Deletes a row with the next flush. A new one is taken back.
    ///
    /// # Errors
    /// [`Error::WrongState`] where there is no such row; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn delete<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.not_ended(at)?;
        self.0.unit().delete(handle, at)
    }

    /// Sends what has changed: new rows, what was written, what is deleted. Queries of this session, `savepoint` and `commit` do so
    /// themselves. It is not committed by that, except in an autocommit scope, where each flush is a transaction of its own.
    ///
    /// # Errors
    /// Before anything is sent: [`Error::WriteInProgress`], [`Error::KeyChanged`], [`Error::HookFailed`],
    /// [`Error::AlreadyFlushing`]. Afterwards the session wants a [`rollback`](Self::rollback), or that of the savepoint it is in:
    /// [`Error::Stale`], [`Error::UnresolvedKeys`], [`Error::Unpaired`], [`Error::NotReturned`], [`Error::NotUnique`],
    /// [`Error::RowTooLarge`]; see [`Session`].
    #[track_caller]
    pub fn flush(&self) -> Result<()> {
        self.0.flush(Location::caller())
    }

    /// Reads a row again, now, after a flush.
    ///
    /// # Errors
    /// [`Error::NotFound`] where it is gone; [`Error::WrongState`] for a row that was never there; [`Error::NotMine`]; those of
    /// [`flush`](Self::flush).
    #[track_caller]
    pub fn refresh<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.not_ended(at)?;
        self.0.autoflush(at)?;
        self.0.unit().refresh(handle, &Route { session: &self.0, at })
    }

    /// Forgets what was written to a row since the last flush, and reads it again when it is got the next time.
    ///
    /// # Errors
    /// [`Error::WrongState`]; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn expire<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.not_ended(at)?;
        self.0.unit().expire(handle, at)
    }

    /// [`expire`](Self::expire) of every row. New rows and deletes stay.
    pub fn expire_all(&self) {
        if let Some(unit) = self.0.unit.get() {
            unit.forget_writes();
        }
    }

    /// Lets go of a row: the handle is [`Detached`](crate::RowState::Detached), what was written to it is forgotten. A new row is taken
    /// back.
    ///
    /// # Errors
    /// [`Error::WrongState`]; [`Error::NotMine`]; [`Error::SessionEnded`].
    #[track_caller]
    pub fn expunge<T: Persist<C>>(&self, handle: &Tracked<T>) -> Result<()> {
        let at = Location::caller();
        self.0.not_ended(at)?;
        self.0.unit().expunge(handle, at)
    }

    /// Lets go of all rows, new ones included. What was flushed stays in the transaction. For long jobs, as the session otherwise keeps
    /// every row it has read until it ends or, where nobody has a handle to it, until a commit.
    pub fn expunge_all(&self) {
        self.0.unit_cleared();
    }

    /// Runs `body` without a flush before its queries.
    pub fn no_autoflush<R>(&self, body: impl FnOnce(&Self) -> R) -> R {
        let _quiet = self.0.unit().disable_autoflush();
        body(self)
    }

    /// Whether a flush would send something.
    pub fn is_dirty(&self) -> bool {
        self.0.unit.get().is_some_and(|unit| unit.is_dirty())
    }

    /// Rows that the next flush inserts.
    #[allow(clippy::new_ret_no_self, reason = "the field's own name")]
    pub fn new(&self) -> Changes {
        self.unflushed(ChangeKind::Insert)
    }

    /// Rows that the next flush updates.
    pub fn dirty(&self) -> Changes {
        self.unflushed(ChangeKind::Update)
    }

    /// Rows that the next flush deletes.
    pub fn deleted(&self) -> Changes {
        self.unflushed(ChangeKind::Delete)
    }

    fn unflushed(&self, kind: ChangeKind) -> Changes {
        self.0.unit.get().map_or_else(Changes::default, |unit| unit.unflushed(&[kind]))
    }

    /// What has been flushed in this transaction and not been rolled back: each row once, as new if it was inserted in it, and not at
    /// all if it was inserted and deleted. In an `after_commit` or `after_rollback` hook it is what was committed or rolled back.
    pub fn changes(&self) -> Changes {
        self.0.unit.get().map_or_else(Changes::default, |unit| unit.flushed())
    }

    /// Runs `hook` before every flush of this session that has something to send, with what that is; it may change rows, which go with
    /// the same flush. Its `Err` or panic prevents the flush. It stays until the session is removed.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn before_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.flush_hooks.borrow_mut().before.push(std::rc::Rc::new(hook));
        Ok(())
    }

    /// Runs `hook` after every flush of this session, with what was sent; rows that it changes wait for the next flush. Its `Err` is that
    /// of the flush, which has happened all the same. It stays until the session is removed.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_flush<R: HookOutcome>(&self, hook: impl Fn(&Self, &Changes) -> R + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        let hook = move |session: &Self, changes: &Changes| hook(session, changes).outcome();
        self.0.flush_hooks.borrow_mut().after.push(std::rc::Rc::new(hook));
        Ok(())
    }
}
