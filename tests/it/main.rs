//! The whole life of an application, on every database.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod attacks;
mod blockers;
mod blog;

mod clean_hands;
mod connect;
mod dispose;
mod fixture_migrations;
mod generation;
mod kit;
mod pool_hooks;
mod recorder;
mod round_trips;
mod schema;
mod schema_races;
mod schema_safety;
mod unit_model;
mod world;
