//! Random programs, and a plain model of what the database and the session's memory must have after each step.
//!
//! The test itself is `unit/model.rs`, in each world. `DIESEL_SESSION_MODEL_CASES` says how many programs it runs, and
//! `DIESEL_SESSION_MODEL_SEED` which.

#![allow(unreachable_pub, reason = "the worlds use it")]

pub mod handles;
pub mod model;
pub mod program;
pub mod rows;
pub mod tables;

/// The number in an environment variable.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}
