//! The story that this crate began with: `cargo run --example seed_story`.
//!
//! A test suite makes a new application with its own pool for every test, until PostgreSQL refuses. The program runs the suite
//! three times: with r2d2's defaults, with pools of one connection, and with this crate.
//!
//! It uses the PostgreSQL that `DATABASE_URL` names, in a schema of its own, or starts a throw-away server. In `story/`,
//! `plain.rs` and `session.rs` are the suite with r2d2 and with this crate, `suite.rs` runs the suite, and `server.rs` queries
//! the server.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program tells its story, and errors")]

#[cfg(not(feature = "postgres"))]
mod rerun;

#[cfg(feature = "postgres")]
mod story;

use std::process::ExitCode;

#[cfg(not(feature = "postgres"))]
use crate::rerun::main_of;
#[cfg(feature = "postgres")]
use crate::story::main_of;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match main_of() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("seed_story: {error}");
            ExitCode::FAILURE
        }
    }
}
