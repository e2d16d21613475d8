#![doc = include_str!("guide.md")]

mod agenda;
mod changes;
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
mod sender;
mod track;
mod unit;
mod update_many;
mod writes;

pub use changes::{Change, ChangeKind, Changes};
pub use derived::{Returning, read_back, rows_of};
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub(crate) use entry::Newest;
pub use handle::{Snapshot, State, Tracked, WriteGuard};
pub use key::Fk;
pub(crate) use sender::{Connected, Sender, Sending};
pub use track::{Track, Tracker};
pub(crate) use unit::Unit;
pub use update_many::{UpdateMany, updates_of};
