//! Foreign keys that may not be known yet.

use std::cell::{Cell, OnceCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::internal::derives::as_expression::Bound;
use diesel::serialize::{self, Output, ToSql};
use diesel::sql_types::SqlType;

use super::entity::{Entity, OneColumnKey};
use crate::error::{Decision, Verdict};

/// A foreign key to a row of `E`: a value, or the key of a row that was added and gets it when it is inserted.
///
/// It is the type of foreign keys in new rows. [`Tracked::key`](crate::Tracked::key) makes one of a handle, `into()` one of a key.
/// It fits every SQL type that the key itself fits, and is `Option<Fk<E>>` where the column may be NULL.
///
/// ```
/// # use diesel::prelude::*;
/// # use diesel_session::{Entity, Fk};
/// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
/// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
/// # struct User { #[entity(generated)] id: i32, name: String }
/// let author: Fk<User> = 7.into();
/// assert_eq!(author.id(), Some(&7));
/// ```
pub struct Fk<E: Entity>(Inner<E::Id>);

enum Inner<Id> {
    Known(Id),
    Awaited(Rc<KeyCell<Id>>),
}

/// The key of a row that was added: filled by its INSERT, void once that was rolled back.
#[derive(Debug)]
pub(crate) struct KeyCell<Id> {
    id: OnceCell<Id>,
    void: Cell<bool>,
    /// The answer to the commit of its INSERT, where that was lost.
    doubt: OnceCell<Arc<Verdict>>,
}

impl<Id> KeyCell<Id> {
    pub(crate) fn new() -> Self {
        Self { id: OnceCell::new(), void: Cell::new(false), doubt: OnceCell::new() }
    }

    pub(crate) fn fill(&self, id: Id) {
        let _ = self.id.set(id);
    }

    pub(crate) fn void(&self) {
        self.void.set(true);
    }

    pub(crate) fn doubt(&self, verdict: &Arc<Verdict>) {
        let _ = self.doubt.set(Arc::clone(verdict));
    }

    fn get(&self) -> Option<&Id> {
        let is_undone = || self.doubt.get().is_some_and(|verdict| verdict.decision() == Some(Decision::RolledBack));
        self.id.get().filter(|_| !self.void.get() && !is_undone())
    }
}

impl<E: Entity> Fk<E> {
    /// The key of a row.
    pub fn new(id: E::Id) -> Self {
        Self(Inner::Known(id))
    }

    /// The key, unless it belongs to a row that is not inserted yet or never will be.
    pub fn id(&self) -> Option<&E::Id> {
        match &self.0 {
            Inner::Known(id) => Some(id),
            Inner::Awaited(cell) => cell.get(),
        }
    }

    pub(crate) fn awaited(cell: Rc<KeyCell<E::Id>>) -> Self {
        Self(Inner::Awaited(cell))
    }
}

impl<E: Entity> Clone for Fk<E> {
    fn clone(&self) -> Self {
        Self(match &self.0 {
            Inner::Known(id) => Inner::Known(id.clone()),
            Inner::Awaited(cell) => Inner::Awaited(Rc::clone(cell)),
        })
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

/// Two that are not known are equal where they are the key of the same row.
impl<E: Entity> PartialEq for Fk<E> {
    fn eq(&self, other: &Self) -> bool {
        match (self.id(), other.id()) {
            (Some(one), Some(two)) => one == two,
            (None, None) => match (&self.0, &other.0) {
                (Inner::Awaited(one), Inner::Awaited(two)) => Rc::ptr_eq(one, two),
                _ => false,
            },
            _ => false,
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
