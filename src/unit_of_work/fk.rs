//! Foreign keys whose value may not be known yet.

use std::fmt;
use std::rc::Rc;

use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::internal::derives::as_expression::Bound;
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::SqlType;

use super::entity::{Entity, OneColumnKey};
use super::tracked_row::TrackedRow;

/// A foreign key to a row of `E`: a known value, or the key of an added row, which gets its value from the INSERT.
///
/// New rows have foreign keys of this type, or `Option<Fk<E>>` if the column may be NULL.
/// [`Tracked::key`](crate::Tracked::key) makes an `Fk` from a handle, and `into()` makes one from a key. An `Fk` fits
/// every SQL type that the key fits.
///
/// ```
/// # use diesel::prelude::*;
/// # use diesel_session::Entity;
/// # use diesel_session::unit_of_work::Fk;
/// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
/// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
/// # struct User { #[entity(generated)] id: i32, name: String }
/// let author: Fk<User> = 7.into();
/// assert_eq!(author.id(), Some(&7));
/// ```
pub struct Fk<E: Entity>(Inner<E>);

enum Inner<E: Entity> {
    Known(E::Id),
    /// The key of an added row. The INSERT sets it.
    Added(Rc<TrackedRow<E>>),
}

impl<E: Entity> Fk<E> {
    /// A foreign key with a known value.
    pub fn new(id: E::Id) -> Self {
        Self(Inner::Known(id))
    }

    /// The value of the key. None if the row is not inserted yet, or if its INSERT was rolled back.
    pub fn id(&self) -> Option<&E::Id> {
        match &self.0 {
            Inner::Known(id) => Some(id),
            Inner::Added(tracked) => tracked.inserted_key(),
        }
    }

    pub(super) fn added(tracked: &Rc<TrackedRow<E>>) -> Self {
        Self(Inner::Added(Rc::clone(tracked)))
    }
}

impl<E: Entity> Clone for Fk<E> {
    fn clone(&self) -> Self {
        match &self.0 {
            Inner::Known(id) => Self::new(id.clone()),
            Inner::Added(tracked) => Self::added(tracked),
        }
    }
}

impl<E: Entity> fmt::Debug for Fk<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id() {
            Some(id) => write!(f, "{}({id:?})", E::NAME),
            None => write!(f, "{}(not inserted)", E::NAME),
        }
    }
}

/// Two keys without a value are equal if they belong to the same row.
impl<E: Entity> PartialEq for Fk<E> {
    fn eq(&self, other: &Self) -> bool {
        match (self.id(), other.id(), &self.0, &other.0) {
            (None, None, Inner::Added(one), Inner::Added(two)) => Rc::ptr_eq(one, two),
            (one, two, ..) => one.is_some() && one == two,
        }
    }
}

impl<E: Entity> Eq for Fk<E> {}

macro_rules! from_keys {
    ($($key:ty),+) => { $(
        impl<E: Entity<Id = $key>> From<$key> for Fk<E> {
            fn from(id: $key) -> Self {
                Self::new(id)
            }
        }
    )+ };
}

from_keys!(i16, i32, i64, u8, u16, u32, u64, String, Vec<u8>);

impl<E: Entity<Id = String>> From<&str> for Fk<E> {
    fn from(id: &str) -> Self {
        Self::new(id.to_owned())
    }
}

impl<E, ST> AsExpression<ST> for Fk<E>
where
    E: OneColumnKey,
    ST: SqlType + TypedExpressionType,
{
    type Expression = Bound<ST, Self>;

    fn as_expression(self) -> Self::Expression {
        Bound::new(self)
    }
}

impl<'f, E, ST> AsExpression<ST> for &'f Fk<E>
where
    E: OneColumnKey,
    ST: SqlType + TypedExpressionType,
{
    type Expression = Bound<ST, &'f Fk<E>>;

    fn as_expression(self) -> Self::Expression {
        Bound::new(self)
    }
}

impl<E, ST, DB> ToSql<ST, DB> for Fk<E>
where
    E: OneColumnKey,
    DB: Backend,
    E::Id: ToSql<ST, DB>,
{
    fn to_sql<'b>(&'b self, out: &mut Output<'b, '_, DB>) -> serialize::Result {
        match self.id() {
            Some(id) => id.to_sql(out),
            None => Err(format!("the row of `{}` that this foreign key belongs to is not inserted", E::NAME).into()),
        }
    }
}
