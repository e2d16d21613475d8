//! What has a bound in time, counts what the whole process has open, or breaks servers: one test after the other.

// Half of a test is in helpers, which the lint does not take for tests.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod absurd;
mod aftermath;
mod attack;
mod clean_hands;
mod commit_unknown;
mod connect;
mod crowd;
mod deadline;
mod fork;
mod hopeless;
mod kit;
mod kit_clean;
mod leak;
mod lost;
mod outage;
mod pool;
mod room;
mod schema;
mod secrets;
mod seed;
mod seed_story;
mod settings;
mod sqlite;
mod stress;
mod translated;
mod turn;
