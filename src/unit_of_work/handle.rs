//! Handles to rows that a session keeps.

use std::cell::RefMut;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::rc::Rc;

use super::entity::Entity;
use super::key::Fk;
use super::tracked_row::TrackedRow;
use crate::error::{Result, RowState};

/// A handle to a row that a session keeps: what [`Session::add`](crate::Session::add), [`get`](crate::Session::get) and
/// [`track`](crate::Session::track) give.
///
/// All handles to one row of one session are the same (`==`). What is written through one of them is written to the database by the next
/// flush, the columns that differ only. A handle belongs to its thread:
///
/// ```compile_fail,E0277
/// # use diesel::prelude::*;
/// # use diesel_session::{Entity, Tracked};
/// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
/// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
/// # struct User { #[entity(generated)] id: i32, name: String }
/// fn needs_send<T: Send>() {}
/// needs_send::<Tracked<User>>();
/// ```
pub struct Tracked<T: Entity>(pub(crate) Rc<TrackedRow<T>>);

/// The value of a row at the moment of [`Tracked::read`], for as long as it is wanted: later writes do not change it. Its
/// `clone()` is that of the value.
pub struct Snapshot<T>(Rc<T>);

/// The value of a row for writing. A flush while it lives is [`Error::WriteInProgress`](crate::Error::WriteInProgress).
pub struct WriteGuard<'h, T>(RefMut<'h, Option<Rc<T>>>);

impl<T: Entity> Tracked<T> {
    /// The row's value: what is known of it. Nothing is sent, except in an attempt of [`retry`](crate::Session::retry) for a row that
    /// the attempt has not read: such a row is read first.
    ///
    /// # Panics
    /// Where [`try_read`](Self::try_read) is an error.
    #[track_caller]
    #[inline]
    pub fn read(&self) -> Snapshot<T> {
        match self.try_read() {
            Ok(value) => value,
            Err(error) => panic!("{error}"),
        }
    }

    /// The row's value for writing: `user.write().name = ..`. The next flush sends what differs.
    ///
    /// A row that is [`RowState::Expired`] is read first, with one SELECT that no flush precedes. If the session cannot send that now, or
    /// the row is gone, the value is the one that was known. The flush then reads the row, and is
    /// [`Error::Stale`](crate::Error::Stale) if it has changed. If the row has a version and the version has changed, the value that was
    /// known stays, too, and the flush is `Stale`.
    ///
    /// # Panics
    /// Where [`try_write`](Self::try_write) is an error.
    #[track_caller]
    pub fn write(&self) -> WriteGuard<'_, T> {
        match self.try_write() {
            Ok(value) => value,
            Err(error) => panic!("{error}"),
        }
    }

    /// Writes several columns, or reads and writes: `account.update(|a| a.balance += 10)`.
    ///
    /// # Panics
    /// Where [`try_write`](Self::try_write) is an error.
    #[track_caller]
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.write())
    }

    /// The row's value; see [`read`](Self::read).
    ///
    /// # Errors
    /// [`Error::WrongState`](crate::Error::WrongState) where there is no value: [`RowState::Pending`], [`RowState::RolledBack`], [`RowState::Discarded`].
    /// [`Error::WriteInProgress`](crate::Error::WriteInProgress) while it is being written.
    #[track_caller]
    #[inline]
    pub fn try_read(&self) -> Result<Snapshot<T>> {
        let at = Location::caller();
        if self.0.is_from_before_attempt() {
            self.0.read_before_use(at);
        }
        self.0.read(at).map(Snapshot)
    }

    /// The row's value for writing; see [`write`](Self::write).
    ///
    /// # Errors
    /// [`Error::WrongState`](crate::Error::WrongState) where it could not be flushed: in every state but [`RowState::Persistent`] and [`RowState::Expired`].
    /// [`Error::WriteInProgress`](crate::Error::WriteInProgress) while it is being written.
    #[track_caller]
    pub fn try_write(&self) -> Result<WriteGuard<'_, T>> {
        self.0.touch(Location::caller())?;
        Ok(WriteGuard(self.0.value.borrow_mut()))
    }

    /// The key as a foreign key for other rows, also before this one has been inserted.
    pub fn key(&self) -> Fk<T> {
        self.0.fk()
    }

    /// What is known of the row.
    pub fn state(&self) -> RowState {
        self.0.state()
    }

    /// Whether the next flush would send something for this row.
    pub fn is_dirty(&self) -> bool {
        self.0.is_dirty()
    }
}

impl<T: Entity> Clone for Tracked<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T: Entity> PartialEq for Tracked<T> {
    fn eq(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }
}

impl<T: Entity> Eq for Tracked<T> {}

impl<T: Entity> fmt::Debug for Tracked<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.shown_key() {
            Some(key) => write!(f, "{} {key} ({:?})", T::NAME, self.state()),
            None => write!(f, "{} ({:?})", T::NAME, self.state()),
        }
    }
}

impl<T: Entity> From<&Tracked<T>> for Fk<T> {
    fn from(handle: &Tracked<T>) -> Self {
        handle.key()
    }
}

impl<T> Deref for Snapshot<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for Snapshot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: fmt::Display> fmt::Display for Snapshot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_deref().expect("given out for an entry with a value")
    }
}

impl<T: Clone> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        Rc::make_mut(self.0.as_mut().expect("given out for an entry with a value"))
    }
}

impl<T: fmt::Debug> fmt::Debug for WriteGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl RowState {
    /// Why `operation` is refused in this state, and what the program can do.
    pub(crate) fn told(self, operation: &str) -> &'static str {
        match self {
            Self::Detached if operation == "read" => {
                "its session has ended and rolled back a change of it, so its value is not known; `get` it in the present session"
            }
            Self::Undecided => {
                "its transaction's commit was not answered; call `resolve()` of that error, or `get` it in a session that goes on"
            }
            Self::Pending => "it has been added and not inserted yet; `flush()` first",
            Self::Persistent | Self::Expired => "it is in the database; `refresh` it or `get` it again",
            Self::RolledBack => "a change of it was rolled back; `refresh` it or `get` it again",
            Self::Deleted => "it is deleted; `add` a new row if there is to be one again",
            Self::Discarded => "its `add` was rolled back or taken back, or came after the session's end; add it again",
            Self::Detached => "the session has let go of it or has ended; `get` it in the present one",
        }
    }
}
