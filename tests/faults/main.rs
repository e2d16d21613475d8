//! Tests with a bound in time, tests that count what the whole process has open, and tests that break servers: one
//! after the other.

// The lint does not take the functions that tests call for tests.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod applications_in_turn;
mod assert_clean;
mod checkout;
mod clusters;
mod commit_unknown;
mod connect;
mod connection_limit;
mod contention;
mod deadline;
mod error_texts;
mod extreme_values;
mod fairness;
mod fork;
mod kit;
mod leak_threshold;
mod lost_connection;
mod pool;
mod pool_upkeep;
mod pooler;
mod reset;
mod schema;
mod schema_lock;
mod secrets;
mod seed_story;
mod server_health;
mod settings;
mod sqlite;
mod stress;
mod wait_graph;
