//! What a struct has to say of itself so that a session can keep its rows. Derived; nothing here is written by hand.

use std::any::TypeId;
use std::fmt::Debug;
use std::hash::Hash;

use diesel::result::QueryResult;

use super::relation::{Move, Reference, Relations};

/// Which columns of a row, a bit for each in the order of the struct's fields; Diesel's tables end at 128.
pub type Columns = u128;

/// A struct whose rows a session can keep; made by `#[derive(Entity)]`.
///
/// A row is known by its key: [`Session::get`](crate::Session::get) of one key is one handle for as long as the session's context
/// lasts. The [module documentation](crate::unit_of_work) has the whole of it.
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

    /// Whether databases count its key: one column of the key is made by the database, and it is an integer.
    #[doc(hidden)]
    fn is_counted() -> bool;

    /// Whether each row is inserted, and updated, by a statement of its own.
    #[doc(hidden)]
    const ROW_BY_ROW: bool;

    /// The key of this row.
    fn id(&self) -> Self::Id;

    /// The type of its table. Entities of one table have the same.
    #[doc(hidden)]
    fn table() -> TypeId {
        TypeId::of::<Self>()
    }

    /// Adds the foreign keys of this entity and of its parents.
    #[doc(hidden)]
    fn parents(found: &mut Relations);

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

    /// About how many bytes these columns have on their way to the database.
    #[doc(hidden)]
    fn bytes(&self, columns: Columns) -> usize;

    /// What an UPDATE does to the version.
    #[doc(hidden)]
    fn bump_version(&mut self);

    /// The rows that this row refers to.
    #[doc(hidden)]
    fn references(&self) -> Vec<Reference>;

    /// The foreign keys that differ.
    #[doc(hidden)]
    fn moves(old: &Self, new: &Self) -> Vec<Move>;

    /// Sets foreign keys to rows of these tables to NULL, if their columns can be NULL.
    #[doc(hidden)]
    fn unlink(&mut self, parents: &[TypeId]);

    /// Takes over the foreign keys of another value of the row.
    #[doc(hidden)]
    fn take_references(&mut self, other: &Self);
}

/// An entity whose key is one column; derived with [`Entity`].
#[diagnostic::on_unimplemented(
    message = "the key of `{Self}` has several columns, so `Fk<{Self}>` cannot be a foreign key of one column",
    label = "a foreign key of several columns",
    note = "name a foreign key of several columns on the struct: `#[entity(references({Self}, columns = (one, two)))]`. In new rows its columns are \
            plain values"
)]
#[doc(hidden)]
pub trait OneColumnKey: Entity {}

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

    /// The rows that the database finds for a key; more than one if the key is not unique.
    #[doc(hidden)]
    fn find(conn: &mut C, id: &Self::Id) -> QueryResult<Vec<Self>>;

    /// The newest row, locked, whatever the transaction sees. It is asked for where a plain SELECT may find an older row.
    #[doc(hidden)]
    fn find_newest(conn: &mut C, id: &Self::Id) -> QueryResult<Vec<Self>> {
        Self::find(conn, id)
    }

    #[doc(hidden)]
    fn find_many(conn: &mut C, ids: &[Self::Id]) -> QueryResult<Vec<Self>>;

    /// The rows with these numbers in the column of the key that the database counts, in the order of the numbers.
    #[doc(hidden)]
    fn find_counted(conn: &mut C, numbers: &[u64]) -> QueryResult<Vec<Self>> {
        let _ = (conn, numbers);
        Err(diesel::result::Error::QueryBuilderError("this backend gives the rows of an INSERT back".into()))
    }

    /// Makes the database forget the number that it has counted last, so that it is seen if the next INSERT is given none.
    #[doc(hidden)]
    fn forget_counted(conn: &mut C) -> QueryResult<()> {
        let _ = conn;
        Ok(())
    }

    /// The rows whose key is what a column makes of this one that keeps `digits` digits of a second.
    #[doc(hidden)]
    fn find_rounded(conn: &mut C, id: &Self::Id, digits: u8) -> QueryResult<Vec<Self>> {
        let _ = (conn, id, digits);
        Ok(Vec::new())
    }

    /// Sets the columns that differ, where key and version are the old ones; how many rows that were.
    #[doc(hidden)]
    fn update(conn: &mut C, old: &Self, new: &Self) -> QueryResult<usize>;

    /// Most rows of one `update_many`; 1 where this backend has no such statement.
    #[doc(hidden)]
    const UPDATES: usize = 1;

    /// The same for rows that differ in the same `columns`, in one statement that locks the rows in the order of their keys; the
    /// places of the rows that were there, once for each row that was changed.
    #[doc(hidden)]
    fn update_many(conn: &mut C, rows: &[(&Self, &Self)], columns: Columns) -> QueryResult<Vec<usize>> {
        let _ = (conn, rows, columns);
        Err(diesel::result::Error::QueryBuilderError("this backend updates row by row".into()))
    }

    /// Most bytes of one statement, if the server has a limit that programs reach.
    #[doc(hidden)]
    fn most_bytes(conn: &mut C) -> QueryResult<Option<usize>> {
        let _ = conn;
        Ok(None)
    }

    /// Whether a row has to be updated by a statement of its own, because of how its key is spelled.
    #[doc(hidden)]
    fn goes_alone(&self) -> bool {
        false
    }

    /// Most rows of one `lock`; 0 if the rows of a flush are not locked beforehand.
    #[doc(hidden)]
    const LOCKS: usize = 0;

    /// Whether the role may do that without an UPDATE.
    #[doc(hidden)]
    fn may_lock(conn: &mut C) -> QueryResult<bool> {
        let _ = conn;
        Ok(true)
    }

    /// Locks these rows in the order of their keys, as their UPDATE or DELETE will.
    #[doc(hidden)]
    fn lock(conn: &mut C, rows: &[&Self], for_delete: bool) -> QueryResult<()> {
        let _ = (conn, rows, for_delete);
        Ok(())
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
    fn in_batches() -> bool;

    /// The key, where the program makes it and all of it is known.
    #[doc(hidden)]
    fn key(&self) -> Option<<Self::Entity as Entity>::Id>;

    /// About how many bytes it has on its way to the database.
    #[doc(hidden)]
    fn bytes(&self) -> usize;

    /// The rows that it refers to, as far as their keys are known.
    #[doc(hidden)]
    fn references(&self) -> Vec<Reference> {
        Vec::new()
    }

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
