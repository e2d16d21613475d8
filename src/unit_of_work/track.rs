//! The conversion of query results into handles.

use std::cell::Cell;
use std::time::SystemTime;

use diesel::backend::Backend;
use diesel::deserialize::{self, FromStaticSqlRow, Queryable};

use super::entity::Persist;
use super::tracked::Tracked;
use super::tracked_row::Newest;
use super::unit::Unit;

/// A type that [`Session::track`](crate::Session::track) can convert. An entity becomes a handle, also inside `Option`
/// and tuples. A plain value stays as it is.
#[diagnostic::on_unimplemented(
    message = "a session on `{C}` cannot track rows of `{Self}`",
    label = "neither an entity nor made of entities and plain values",
    note = "`load` gives rows of any type as they are; for handles, `{Self}` needs `#[derive(Entity)]`; a plain value beside entities is \
            `Plain<{Self}>`"
)]
pub trait Track<C>: Sized {
    /// The result of the conversion: a [`Tracked`] handle for an entity.
    type Out;

    #[doc(hidden)]
    fn track(self, tracker: &Tracker<'_, C>) -> Self::Out;
}

/// A plain value in a query for [`Session::track`](crate::Session::track). `T` is any type that Diesel can read: a
/// UUID, a NUMERIC, a time, JSON, or a type of the program. Numbers, texts, `bool`, bytes, lists and `SystemTime` need
/// no `Plain`.
///
/// ```
/// # use diesel::prelude::*;
/// # use diesel_session::{Config, Database, Entity, Tracked};
/// # use diesel_session::unit_of_work::Plain;
/// # diesel::table! { users (id) { id -> Integer, name -> Text, born -> Date, } }
/// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
/// # struct User { #[entity(generated)] id: i32, name: String }
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// # fn pairs() -> diesel_session::Result<Vec<(Tracked<User>, chrono::NaiveDate)>> {
/// let session = DB.session()?;
/// let query = users::table.select((User::as_select(), users::born));
/// let pairs = session.track::<(User, Plain<chrono::NaiveDate>)>(query)?;      // Vec<(Tracked<User>, NaiveDate)>
/// # Ok(pairs)
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[allow(clippy::exhaustive_structs, reason = "a wrapper")]
pub struct Plain<T>(pub T);

impl<T, ST, DB> Queryable<ST, DB> for Plain<T>
where
    DB: Backend,
    T: FromStaticSqlRow<ST, DB>,
{
    type Row = T;

    fn build(row: T) -> deserialize::Result<Self> {
        Ok(Self(row))
    }
}

impl<C, T> Track<C> for Plain<T> {
    type Out = T;

    fn track(self, _: &Tracker<'_, C>) -> T {
        self.0
    }
}

impl<C, T> Track<C> for Vec<T> {
    type Out = Self;

    fn track(self, _: &Tracker<'_, C>) -> Self {
        self
    }
}

/// The session's identity map.
#[allow(missing_debug_implementations)]
pub struct Tracker<'u, C> {
    pub(crate) unit: &'u Unit<C>,
    pub(crate) newest: Newest,
    /// Whether the query has returned an entity.
    pub(crate) has_entities: Cell<bool>,
}

impl<C: 'static, T: Persist<C>> Track<C> for T {
    type Out = Tracked<T>;

    fn track(self, tracker: &Tracker<'_, C>) -> Tracked<T> {
        tracker.has_entities.set(true);
        tracker.unit.map().merge(self, tracker.newest)
    }
}

impl<C, T: Track<C>> Track<C> for Option<T> {
    type Out = Option<T::Out>;

    fn track(self, tracker: &Tracker<'_, C>) -> Self::Out {
        self.map(|row| row.track(tracker))
    }
}

macro_rules! plain {
    ($($value:ty),+ $(,)?) => { $(
        impl<C> Track<C> for $value {
            type Out = Self;

            fn track(self, _: &Tracker<'_, C>) -> Self {
                self
            }
        }
    )+ };
}

plain!(bool, i8, i16, i32, i64, u8, u16, u32, u64, f32, f64, String, SystemTime);

/// Implements `Track` for the tuple of these types, and for the shorter ones without the first types.
macro_rules! tuples {
    () => {};
    ($first:ident $($other:ident)*) => {
        impl<C, $first: Track<C>, $($other: Track<C>),*> Track<C> for ($first, $($other,)*) {
            type Out = ($first::Out, $($other::Out,)*);

            #[allow(non_snake_case)]
            fn track(self, tracker: &Tracker<'_, C>) -> Self::Out {
                let ($first, $($other,)*) = self;
                ($first.track(tracker), $($other.track(tracker),)*)
            }
        }

        tuples!($($other)*);
    };
}

tuples!(A B D E F G H I J K L M);
