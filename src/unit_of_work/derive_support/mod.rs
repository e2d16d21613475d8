//! Support of the derive macros. Only derived code names these items.

mod condition;
mod field;
mod many_rows;
mod read_back;
mod sql;

pub use super::entity::OneColumnKey;
pub use super::relations::{ForeignKey, Reference, Relations};
pub use condition::*;
pub use field::*;
pub use many_rows::*;
pub use read_back::*;
pub use sql::*;

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
