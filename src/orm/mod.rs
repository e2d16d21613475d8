//! The identity map and the unit of work.

mod derived;
mod entity;
mod key;

pub use derived::*;
pub use entity::{Columns, Entity, Insert, NewEntity, Persist};
pub use key::Fk;
