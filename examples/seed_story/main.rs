//! The story this crate began with, told by doing it: `cargo run --example seed_story`.
//!
//! A test suite makes a new application, with a pool of its own, for every test, until PostgreSQL refuses. It is run three
//! times, with r2d2 as people use it, with pools of one connection, and with this crate.
//!
//! It takes the PostgreSQL that `DATABASE_URL` names, where it works in a schema of its own, or else starts a throw-away one.
//! What to read: in `story/`, `plain.rs` and `session.rs` are the suite in both worlds, `suite.rs` runs it, and `server.rs`
//! asks the server.
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
