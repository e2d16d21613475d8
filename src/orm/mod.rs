//! The identity map and the unit of work.

mod agenda;
mod derived;
mod entity;
mod entry;
mod handle;
mod key;

pub use derived::*;
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub use handle::{Snapshot, State, Tracked, WriteGuard};
pub use key::Fk;
