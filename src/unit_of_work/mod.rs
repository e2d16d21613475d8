#![doc = include_str!("guide.md")]

mod any_identity_map;
mod changes;
mod deletes;
#[doc(hidden)]
#[allow(missing_docs, missing_debug_implementations)]
pub mod derive_support;
mod entity;
mod entity_state;
mod executor;
mod fk;
mod flush;
mod identity_map;
mod key_comparison;
mod pending_inserts;
mod relations;
mod returned_rows;
mod savepoint_log;
mod track;
mod tracked;
mod tracked_row;
mod unit;
mod unit_state;
mod updates;

pub use crate::error::RowState;
pub use changes::{Change, ChangeKind, Changes};
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub(crate) use executor::{Executor, StatementKind};
pub use fk::Fk;
pub use track::{Plain, Track, Tracker};
pub use tracked::{Snapshot, Tracked, WriteGuard};
pub(crate) use tracked_row::Newest;
pub(crate) use unit::Unit;
