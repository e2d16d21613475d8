//! What the parts under test need of the library's errors.

pub(crate) type Place = &'static std::panic::Location<'static>;
