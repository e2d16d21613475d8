#![doc = include_str!("guide.md")]

mod changes;
mod condition;
mod derive_support;
mod entity;
mod executor;
mod flush;
mod handle;
mod identity_map;
mod key;
mod pending_inserts;
#[doc(hidden)]
#[allow(missing_docs)]
pub mod probe;
mod relation;
mod returned_rows;
mod savepoint_log;
mod track;
mod tracked_row;
mod unit;
mod unit_state;
mod update_many;
mod writes;

pub use changes::{Change, ChangeKind, Changes};
pub use condition::{ends_in_blanks, is_integer, is_rounded, numbered, rounded_key, text_key};
pub use derive_support::{ForUpdate, Returning, forget_counted, most_bytes, read_back, rows_of};
#[doc(hidden)]
pub use entity::OneColumnKey;
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub(crate) use executor::{Connected, Executor, StatementKind};
pub use handle::{Snapshot, Tracked, WriteGuard};
pub use key::Fk;
pub use relation::{Move, Reference, Relations};
pub use track::{Plain, Track, Tracker};
pub(crate) use tracked_row::Newest;
pub(crate) use unit::Unit;
pub use update_many::{LockRows, MayLock, UpdateMany, updates_of};
