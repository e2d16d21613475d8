//! What a struct has to say of itself so that a session can keep its rows. Derived; nothing here is written by hand.

use std::any::TypeId;
use std::fmt::Debug;
use std::hash::Hash;

use diesel::result::QueryResult;

/// Which columns of a row, a bit for each in the order of the struct's fields; Diesel's tables end at 128.
pub type Columns = u128;

/// A struct whose rows a session can keep; made by `#[derive(Entity)]`.
///
/// A row is known by its key: [`Session::get`](crate::Session::get) of one key is one handle for as long as the session's context
/// lasts. The [module documentation](crate::orm) has the whole of it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an entity",
    label = "not an entity",
    note = "add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `{Self}`"
)]
pub trait Entity: Clone + 'static {
    /// The primary key; a tuple, in the order of `#[diesel(primary_key(..))]`, where it has several columns.
    type Id: Clone + Eq + Hash + Debug + 'static;

    /// The struct's name, for error texts.
    const NAME: &'static str;

    /// Whether a version column counts its updates.
    const VERSIONED: bool;

    /// Whether its key is one that databases count.
    #[doc(hidden)]
    const COUNTED: bool;

    /// Whether each row is inserted, and updated, by a statement of its own.
    #[doc(hidden)]
    const ROW_BY_ROW: bool;

    /// The key of this row.
    fn id(&self) -> Self::Id;

    /// The entities that this one has foreign keys to.
    #[doc(hidden)]
    fn parents() -> Vec<TypeId>;

    /// The columns that differ, without key and version.
    #[doc(hidden)]
    fn differences(old: &Self, new: &Self) -> Columns;

    /// Whether both have the same version; always, where there is none.
    #[doc(hidden)]
    fn has_version_of(&self, other: &Self) -> bool {
        let _ = other;
        true
    }

    /// Gives `value` what `newest` has in the columns in which it is as `base`, and its version.
    #[doc(hidden)]
    fn take_unwritten(base: &Self, value: &mut Self, newest: &mut Self) {
        let _ = (base, value, newest);
    }

    /// What an UPDATE does to the version.
    #[doc(hidden)]
    fn bump_version(&mut self);

    /// Whether a foreign key to rows of `parent` differs.
    #[doc(hidden)]
    fn refers_anew(old: &Self, new: &Self, parent: TypeId) -> bool;

    /// The keys of rows of its own type that it refers to.
    #[doc(hidden)]
    fn own_parents(&self) -> Vec<Self::Id>;

    /// The key of that number, where the database makes integers of this type.
    #[doc(hidden)]
    fn id_of_number(number: u64) -> Option<Self::Id>;
}

/// An entity on connections of type `C`: the SQL of it. `#[derive(Entity)]` writes it for each backend that this crate is built
/// with, and for the enum that `#[entity(connection = ..)]` names.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an entity on `{C}`",
    label = "no entity on this connection",
    note = "add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `{Self}`; for an enum of connections also `#[entity(connection = ..)]`, \
            and for a database that `#[diesel(check_for_backend(..))]` leaves out name that one too"
)]
pub trait Persist<C>: Entity {
    /// Most keys of one `find_many`.
    #[doc(hidden)]
    const FINDS: usize;

    /// Most rows of one `delete`.
    #[doc(hidden)]
    const DELETES: usize;

    #[doc(hidden)]
    fn find(conn: &mut C, id: &Self::Id) -> QueryResult<Option<Self>>;

    /// Whether a plain SELECT may find an older row than a locking one, and `find_newest` is a locking one.
    #[doc(hidden)]
    const LOCKS: bool = false;

    /// The newest row, whatever the transaction sees.
    #[doc(hidden)]
    fn find_newest(conn: &mut C, id: &Self::Id) -> QueryResult<Option<Self>> {
        Self::find(conn, id)
    }

    #[doc(hidden)]
    fn find_many(conn: &mut C, ids: &[Self::Id]) -> QueryResult<Vec<Self>>;

    /// Sets the columns that differ, where key and version are the old ones; how many rows that were.
    #[doc(hidden)]
    fn update(conn: &mut C, old: &Self, new: &Self) -> QueryResult<usize>;

    /// Most rows of one `update_many`; 1 where this backend has no such statement.
    #[doc(hidden)]
    const UPDATES: usize = 1;

    /// The same for rows that differ in the same `columns`, in one statement; the keys of those that were there.
    #[doc(hidden)]
    fn update_many(conn: &mut C, rows: &[(&Self, &Self)], columns: Columns) -> QueryResult<Vec<Self::Id>> {
        let _ = (conn, rows, columns);
        Err(diesel::result::Error::QueryBuilderError("this backend updates row by row".into()))
    }

    /// Deletes the rows of these keys and versions; how many those were.
    #[doc(hidden)]
    fn delete(conn: &mut C, rows: &[&Self]) -> QueryResult<usize>;
}

/// A new row of an entity; made by `#[entity(new = ..)]` or `#[derive(NewEntity)]`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a new row of an entity",
    label = "not a new row",
    note = "`#[entity(new = New..)]` beside `#[derive(Entity)]` makes such a struct, and `#[derive(Insertable, NewEntity)]` with `#[entity(..)]` makes one of `{Self}`"
)]
pub trait NewEntity: 'static {
    /// What it is a row of.
    type Entity: Entity;

    /// How many columns it sets.
    #[doc(hidden)]
    const COLUMNS: usize;

    /// Whether several rows of one INSERT can be told apart: the program makes the key, or the database counts.
    #[doc(hidden)]
    const IN_BATCHES: bool;

    /// The key, where the program makes it and all of it is known.
    #[doc(hidden)]
    fn key(&self) -> Option<<Self::Entity as Entity>::Id>;

    /// Whether every row that it refers to has its key.
    #[doc(hidden)]
    fn is_ready(&self) -> bool;

    /// The columns in which the row has another value than was sent, a bit for each field of the new row. One that cannot be compared
    /// is none of them.
    #[doc(hidden)]
    fn disagreements(&self, row: &Self::Entity) -> Columns;
}

/// A new row on connections of type `C`; derived with [`NewEntity`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be added to a session on `{C}`",
    label = "not a new row of an entity on this connection",
    note = "`#[entity(new = New..)]` beside `#[derive(Entity)]` makes such a struct, and `#[derive(Insertable, NewEntity)]` with `#[entity(..)]` makes one of \
            `{Self}`; an enum of connections is named by `#[entity(connection = ..)]`"
)]
pub trait Insert<C>: NewEntity<Entity: Persist<C>> {
    /// Most rows of one INSERT.
    #[doc(hidden)]
    const ROWS: usize;

    /// Inserts the rows and reads them back; in the order of the rows as far as the database keeps it. `returning` is whether the
    /// database behind an enum of connections has `RETURNING`.
    #[doc(hidden)]
    fn insert(conn: &mut C, rows: &[&Self], returning: bool) -> QueryResult<Vec<Self::Entity>>;
}
