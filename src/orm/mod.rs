#![doc = include_str!("guide.md")]

mod agenda;
mod changes;
mod condition;
mod derived;
mod entity;
mod entry;
mod flush;
mod handle;
mod history;
mod identity;
mod key;
mod pairing;
#[doc(hidden)]
#[allow(missing_docs)]
pub mod probe;
mod queue;
mod relation;
mod sender;
mod track;
mod unit;
mod update_many;
mod writes;

pub use changes::{Change, ChangeKind, Changes};
pub use condition::{ends_in_blanks, is_integer, is_rounded, numbered, rounded_key, text_key};
pub use derived::{ForUpdate, Returning, forget_counted, most_bytes, read_back, rows_of};
#[doc(hidden)]
pub use entity::OneColumnKey;
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub(crate) use entry::Newest;
pub use handle::{Snapshot, State, Tracked, WriteGuard};
pub use key::Fk;
pub use relation::{Move, Reference, Relations};
pub(crate) use sender::{Connected, Sender, Sending};
pub use track::{Plain, Track, Tracker};
pub(crate) use unit::Unit;
pub use update_many::{LockRows, MayLock, UpdateMany, updates_of};
