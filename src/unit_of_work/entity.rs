//! The traits of entities and new rows. The derive macros implement them.

use std::any::TypeId;
use std::fmt::Debug;
use std::hash::Hash;

use diesel::result::QueryResult;

use super::relations::{ForeignKey, Reference, Relations};

/// A set of columns: one bit for each field of the struct, in their order. Diesel's tables have at most 128 columns.
pub type Columns = u128;

/// A struct whose rows a session can track. `#[derive(Entity)]` implements it.
///
/// A session identifies a row by its key: until the session's context ends, [`Session::get`](crate::Session::get)
/// returns the same handle for the same key. The [module documentation](crate::unit_of_work) is the guide.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an entity",
    label = "not an entity",
    note = "add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `{Self}`"
)]
pub trait Entity: Clone + 'static {
    /// The primary key. If it has several columns, it is a tuple in the order of `#[diesel(primary_key(..))]`.
    type Id: Clone + Eq + Hash + Debug + 'static;

    /// The name of the struct, for error texts.
    const NAME: &'static str;

    /// Whether the entity has a version column, which counts the updates of a row.
    const VERSIONED: bool;

    /// Whether MySQL and MariaDB can make the key by AUTO_INCREMENT: the database makes one integer column of the key.
    #[doc(hidden)]
    fn is_auto_increment() -> bool;

    /// Whether each row is inserted and updated by a statement of its own.
    #[doc(hidden)]
    const ROW_BY_ROW: bool;

    /// The key of this row.
    fn id(&self) -> Self::Id;

    /// The type of the table. All entities of one table return the same type.
    #[doc(hidden)]
    fn table() -> TypeId {
        TypeId::of::<Self>()
    }

    /// Adds the foreign keys of this entity and of its parents.
    #[doc(hidden)]
    fn parents(found: &mut Relations);

    /// The columns that differ, without the key and the version.
    #[doc(hidden)]
    fn differences(old: &Self, new: &Self) -> Columns;

    /// Whether both rows have the same version. Always true without a version column.
    #[doc(hidden)]
    fn has_version_of(&self, _: &Self) -> bool {
        true
    }

    /// Swaps these columns with those of another value of the row. The version counts as a column, the key does not.
    #[doc(hidden)]
    fn swap_columns(&mut self, other: &mut Self, columns: Columns);

    /// The approximate size of these columns in a statement, in bytes.
    #[doc(hidden)]
    fn bytes(&self, columns: Columns) -> usize;

    /// Raises the version as an UPDATE does.
    #[doc(hidden)]
    fn bump_version(&mut self);

    /// The foreign keys of this row, in an order that is the same for all rows.
    #[doc(hidden)]
    fn foreign_keys(&self) -> Vec<ForeignKey>;

    /// Sets those of these columns to NULL that belong to a foreign key and can be NULL.
    #[doc(hidden)]
    fn set_null(&mut self, columns: Columns);

    /// The foreign keys of this row that are not NULL.
    #[doc(hidden)]
    fn references(&self) -> Vec<Reference> {
        self.foreign_keys().into_iter().filter_map(|key| key.reference).collect()
    }
}

/// An entity whose key has one column. The derive of [`Entity`] implements it.
#[diagnostic::on_unimplemented(
    message = "the key of `{Self}` has several columns, so `Fk<{Self}>` cannot be a foreign key of one column",
    label = "a foreign key of several columns",
    note = "name a foreign key of several columns on the struct: `#[entity(references({Self}, columns = (one, two)))]`. In new rows its columns are \
            plain values"
)]
#[doc(hidden)]
pub trait OneColumnKey: Entity {}

/// The SQL of an entity on connections of type `C`. `#[derive(Entity)]` implements it for each backend that this crate
/// is built with, and for the enum of connections that `#[entity(connection = ..)]` names.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an entity on `{C}`",
    label = "no entity on this connection",
    note = "add `#[derive(Entity)]` beside `#[derive(Queryable, Selectable)]` of `{Self}`; for an enum of connections also `#[entity(connection = ..)]`, \
            and for a database that `#[diesel(check_for_backend(..))]` leaves out name that one too"
)]
pub trait Persist<C>: Entity {
    /// Maximum number of keys of one `find_many`.
    #[doc(hidden)]
    const MAX_FIND_KEYS: usize;

    /// Maximum number of rows of one `delete`.
    #[doc(hidden)]
    const MAX_DELETE_ROWS: usize;

    /// The rows that the database finds for a key. There are several if the key is not unique.
    #[doc(hidden)]
    fn find(conn: &mut C, id: &Self::Id) -> QueryResult<Vec<Self>>;

    /// The newest row, locked, even if the snapshot of the transaction is older. Called if a plain SELECT may return an
    /// older row.
    #[doc(hidden)]
    fn find_newest(conn: &mut C, id: &Self::Id) -> QueryResult<Vec<Self>> {
        Self::find(conn, id)
    }

    #[doc(hidden)]
    fn find_many(conn: &mut C, ids: &[Self::Id]) -> QueryResult<Vec<Self>>;

    /// The rows with these numbers in the AUTO_INCREMENT column of the key, in the order of the numbers.
    #[doc(hidden)]
    fn find_auto_increment(_: &mut C, _: &[u64]) -> QueryResult<Vec<Self>> {
        Err(diesel::result::Error::QueryBuilderError("this backend gives the rows of an INSERT back".into()))
    }

    /// Resets LAST_INSERT_ID, so that an INSERT that generates no AUTO_INCREMENT number is detected.
    #[doc(hidden)]
    fn reset_last_insert_id(_: &mut C) -> QueryResult<()> {
        Ok(())
    }

    /// The rows whose key equals `id`, rounded to `digits` fractional digits of a second.
    #[doc(hidden)]
    fn find_rounded(_: &mut C, _: &Self::Id, _: u8) -> QueryResult<Vec<Self>> {
        Ok(Vec::new())
    }

    /// Updates the columns that differ in the row with the key and version of `old`. Returns the number of updated
    /// rows.
    #[doc(hidden)]
    fn update(conn: &mut C, old: &Self, new: &Self) -> QueryResult<usize>;

    /// Maximum number of rows of one `update_many`; 1 if this backend has no such statement.
    #[doc(hidden)]
    const MAX_UPDATE_ROWS: usize = 1;

    /// Updates rows that differ in the same `columns` by one statement, which locks the rows in the order of their
    /// keys. Returns the index of each row that was found, once for each updated row of the table.
    #[doc(hidden)]
    fn update_many(_: &mut C, _: &[(&Self, &Self)], _: Columns) -> QueryResult<Vec<usize>> {
        Err(diesel::result::Error::QueryBuilderError("this backend updates row by row".into()))
    }

    /// Maximum size of a statement in bytes, if the server has a limit that programs reach.
    #[doc(hidden)]
    fn max_statement_bytes(_: &mut C) -> QueryResult<Option<usize>> {
        Ok(None)
    }

    /// Whether the spelling of its key requires that the row is updated by a statement of its own.
    #[doc(hidden)]
    fn goes_alone(&self) -> bool {
        false
    }

    /// Maximum number of rows of one `lock`; 0 if a flush locks no rows beforehand.
    #[doc(hidden)]
    const MAX_LOCK_ROWS: usize = 0;

    /// Whether the role has the privilege to lock rows.
    #[doc(hidden)]
    fn may_lock(_: &mut C) -> QueryResult<bool> {
        Ok(true)
    }

    /// Locks these rows in the order of their keys, with the lock that their UPDATE or DELETE takes.
    #[doc(hidden)]
    fn lock(_: &mut C, _: &[&Self], _: bool) -> QueryResult<()> {
        Ok(())
    }

    /// Deletes the rows with these keys and versions. Returns the number of deleted rows.
    #[doc(hidden)]
    fn delete(conn: &mut C, rows: &[&Self]) -> QueryResult<usize>;
}

/// A new row of an entity. `#[entity(new = ..)]` and `#[derive(NewEntity)]` implement it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a new row of an entity",
    label = "not a new row",
    note = "`#[entity(new = New..)]` beside `#[derive(Entity)]` makes such a struct, and `#[derive(Insertable, NewEntity)]` with `#[entity(..)]` makes one of `{Self}`"
)]
pub trait NewEntity: 'static {
    /// The entity of the new row.
    type Entity: Entity;

    /// Whether one INSERT may have several rows. Their keys must be known: the program makes them, or AUTO_INCREMENT
    /// does.
    #[doc(hidden)]
    fn in_batches() -> bool;

    /// The key, if the program makes the key and all its columns are known.
    #[doc(hidden)]
    fn key(&self) -> Option<<Self::Entity as Entity>::Id>;

    /// The approximate size of the row in a statement, in bytes.
    #[doc(hidden)]
    fn bytes(&self) -> usize;

    /// The foreign keys of the row whose values are known.
    #[doc(hidden)]
    fn references(&self) -> Vec<Reference> {
        Vec::new()
    }

    /// Whether the values of all foreign keys are known.
    #[doc(hidden)]
    fn is_ready(&self) -> bool;

    /// The columns in which a returned row differs from the sent values, one bit for each field of the new row. Columns
    /// that cannot be compared are not included.
    #[doc(hidden)]
    fn disagreements(&self, row: &Self::Entity) -> Columns;
}

/// The INSERT of a new row on connections of type `C`. The derive of [`NewEntity`] implements it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be added to a session on `{C}`",
    label = "not a new row of an entity on this connection",
    note = "`#[entity(new = New..)]` beside `#[derive(Entity)]` makes such a struct, and `#[derive(Insertable, NewEntity)]` with `#[entity(..)]` makes one of \
            `{Self}`; an enum of connections is named by `#[entity(connection = ..)]`"
)]
pub trait Insert<C>: NewEntity<Entity: Persist<C>> {
    /// Maximum number of rows of one INSERT.
    #[doc(hidden)]
    const MAX_INSERT_ROWS: usize;

    /// Inserts the rows and returns them as the database has stored them, in their order if the database keeps it.
    /// `returning`: the database behind an enum of connections supports `RETURNING`.
    #[doc(hidden)]
    fn insert(conn: &mut C, rows: &[&Self], returning: bool) -> QueryResult<Vec<Self::Entity>>;
}
