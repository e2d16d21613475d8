//! The whole life of an application, on every database.

#[path = "../support/mod.rs"]
mod support;

mod world;
