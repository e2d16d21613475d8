//! Handles to the tracked rows of a session.

use std::cell::RefMut;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::rc::Rc;

use super::entity::Entity;
use super::fk::Fk;
use super::tracked_row::TrackedRow;
use crate::error::{Result, RowState};

/// A handle to a tracked row of a session. [`Session::add`](crate::Session::add), [`get`](crate::Session::get) and
/// [`track`](crate::Session::track) return handles.
///
/// All handles to one row of one session are equal (`==`). The next flush writes the columns that the program has
/// changed through a handle. A handle belongs to its thread:
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

/// The value of a row at the moment of [`Tracked::read`]. Later writes to the row do not change the snapshot. `clone()`
/// clones the value.
pub struct Snapshot<T>(Rc<T>);

/// Write access to the value of a row. While the guard is alive, a flush fails with
/// [`ErrorKind::WriteInProgress`](crate::ErrorKind::WriteInProgress).
pub struct WriteGuard<'h, T>(RefMut<'h, Option<Rc<T>>>);

impl<T: Entity> Tracked<T> {
    /// The row's value in memory. `read` sends no statement, with one exception: inside an attempt of
    /// [`retry`](crate::Session::retry), a row that this attempt has not read is read from the database first.
    ///
    /// # Panics
    /// If [`try_read`](Self::try_read) returns an error.
    #[track_caller]
    #[inline]
    pub fn read(&self) -> Snapshot<T> {
        match self.try_read() {
            Ok(value) => value,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Write access to the row's value: `user.write().name = ..`. The next flush sends the columns that differ.
    ///
    /// If the row is [`RowState::Expired`], `write` first reads the row with one SELECT, without a flush. If the
    /// session cannot send the SELECT now, or the row is missing, the guard gives the value in memory. The flush then
    /// reads the row, and fails with [`ErrorKind::Stale`](crate::ErrorKind::Stale) if the row has changed. If the row
    /// has a version and the SELECT returns another version, the value in memory stays as well, and the flush fails
    /// with `Stale`.
    ///
    /// # Panics
    /// If [`try_write`](Self::try_write) returns an error.
    #[track_caller]
    pub fn write(&self) -> WriteGuard<'_, T> {
        match self.try_write() {
            Ok(value) => value,
            Err(error) => panic!("{error:#}"),
        }
    }

    /// Changes the row's value in a closure: `account.update(|a| a.balance += 10)`.
    ///
    /// # Panics
    /// If [`try_write`](Self::try_write) returns an error.
    #[track_caller]
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.write())
    }

    /// The row's value; see [`read`](Self::read).
    ///
    /// # Errors
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState) if the row has no value: [`RowState::Pending`],
    /// [`RowState::RolledBack`], [`RowState::Discarded`].
    /// [`ErrorKind::WriteInProgress`](crate::ErrorKind::WriteInProgress) while a write guard of the row is alive.
    #[track_caller]
    #[inline]
    pub fn try_read(&self) -> Result<Snapshot<T>> {
        let at = Location::caller();
        if self.0.was_read_before_attempt() {
            self.0.read_before_use(at);
        }
        self.0.read(at).map(Snapshot)
    }

    /// Write access to the row's value; see [`write`](Self::write).
    ///
    /// # Errors
    /// [`ErrorKind::WrongState`](crate::ErrorKind::WrongState) if a write could not be flushed: in every state except
    /// [`RowState::Persistent`] and [`RowState::Expired`].
    /// [`ErrorKind::WriteInProgress`](crate::ErrorKind::WriteInProgress) while a write guard of the row is alive.
    #[track_caller]
    pub fn try_write(&self) -> Result<WriteGuard<'_, T>> {
        self.0.begin_write(Location::caller())?;
        Ok(WriteGuard(self.0.value.borrow_mut()))
    }

    /// The key of this row as a foreign key for other rows. The row need not be inserted yet.
    pub fn key(&self) -> Fk<T> {
        self.0.fk()
    }

    /// The state of the row in the session.
    pub fn state(&self) -> RowState {
        self.0.state()
    }

    /// Whether the next flush would send a statement for this row.
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
        match self.0.key_text() {
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
        self.0.as_deref().expect("a write guard exists only for a row with a value")
    }
}

impl<T: Clone> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        Rc::make_mut(self.0.as_mut().expect("a write guard exists only for a row with a value"))
    }
}

impl<T: fmt::Debug> fmt::Debug for WriteGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl RowState {
    /// The reason why `operation` is refused in this state, and the remedy.
    pub(crate) fn refusal(self, operation: &str) -> &'static str {
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
            Self::Discarded => "its `add` was rolled back or taken back; add it again",
            Self::Detached => "the session has let go of it or has ended; `get` it in the present one",
        }
    }
}
