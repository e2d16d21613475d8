//! Support of the derive macros. Only derived code names these items.

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

/// Maximum number of rows of one INSERT. A statement of more than a thousand rows is not faster.
#[doc(hidden)]
pub const fn max_insert_rows(columns: usize, binds: usize) -> usize {
    match binds.checked_div(columns) {
        Some(rows) if rows < 1000 => rows,
        _ => 1000,
    }
}

macro_rules! backend_gates {
    ($dollar:tt $($feature:literal $name:ident),+) => { $(
        /// Expands to its tokens, because the library is built with this backend.
        #[doc(hidden)]
        #[cfg(feature = $feature)]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => { $dollar($dollar tokens)* };
        }

        /// Expands to nothing, because the library is built without this backend.
        #[doc(hidden)]
        #[cfg(not(feature = $feature))]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => {};
        }
    )+ };
}

backend_gates!($ "postgres" __if_postgres, "mysql" __if_mysql, "sqlite" __if_sqlite);
