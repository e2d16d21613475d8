//! Support of the derive macros: every item here is named by derived code only.

mod condition;
mod field;
mod fragments;
mod read_back;
mod update_many;

pub use super::entity::OneColumnKey;
pub use super::relations::{Move, Reference, Relations};
pub use condition::{auto_increment_keys, ends_in_blanks, has_time_of_day, is_integer, rounded_key, text_key};
pub use field::{
    BytesField, ComparablePair, EntityParent, Field, FieldPair, ForeignKeyField, ForeignKeyPair, IncomparablePair,
    OptionalBytesField, OptionalForeignKeyField, OptionalForeignKeyPair, OtherParent, Parent, SizedField, ValueField,
};
pub use fragments::{ForUpdate, Returning};
pub use read_back::{max_statement_bytes, read_back, reset_last_insert_id};
pub use update_many::{LockRows, MayLock, UpdateMany, max_update_rows};

/// Most rows of one INSERT: beyond a thousand a longer statement gains nothing.
#[doc(hidden)]
pub const fn max_insert_rows(columns: usize, binds: usize) -> usize {
    match binds.checked_div(columns) {
        Some(rows) if rows < 1000 => rows,
        _ => 1000,
    }
}

macro_rules! gates {
    ($dollar:tt $($feature:literal $name:ident),+) => { $(
        /// Its tokens, where the library is built with that backend.
        #[doc(hidden)]
        #[cfg(feature = $feature)]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => { $dollar($dollar tokens)* };
        }

        /// Nothing, as the library is built without that backend.
        #[doc(hidden)]
        #[cfg(not(feature = $feature))]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => {};
        }
    )+ };
}

gates!($ "postgres" __if_postgres, "mysql" __if_mysql, "sqlite" __if_sqlite);
