//! What the parts under test need of the library's errors.

#[path = "../../src/error/holder.rs"]
mod holder;

pub(crate) use holder::{Holder, Holders};

pub(crate) type Place = &'static std::panic::Location<'static>;
