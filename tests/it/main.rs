//! The whole life of an application, on every database.

// Half of a test is in helpers, which the lint does not take for tests.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod connect;
mod dispose;
mod schema;
mod schema_races;
mod smoke;
