//! The whole life of an application, on every database.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod admin;
mod blockers;
mod blog;
mod misuse;

mod checkout;
mod commit_outcome;
mod connect;
mod connection_replacement;
mod dispose;
mod fixture_migrations;
mod hidden_transaction_ends;
mod kit;
mod per_database;
mod pool_hooks;
mod recorder;
mod reset;
mod round_trips;
mod schema;
mod schema_endings;
mod schema_races;
mod schema_safety;
mod schema_version;
mod server_settings;
mod tenants;
mod unit_model;
