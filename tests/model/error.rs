//! The part of the library's errors that the tested files use.

#[path = "../../src/error/holder.rs"]
mod holder;

pub(crate) use holder::{Holder, Holders};

pub(crate) type SourceLocation = &'static std::panic::Location<'static>;
