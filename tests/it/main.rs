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
mod commit_truth;
mod connect;
mod dispose;
mod fixture_migrations;
mod generation;
mod hidden_ends;
mod kit;
mod poisoned;
mod pool_hooks;
mod recorder;
mod round_trips;
mod schema;
mod schema_endings;
mod schema_races;
mod schema_safety;
mod server_settings;
mod tenants;
mod unit_model;
mod world;
