//! The story this crate began with, told by doing it: `cargo run --example seed_story`.
//!
//! A test suite makes a new application, with a pool of its own, for every test, until PostgreSQL refuses. It is run three
//! times, with r2d2 as people use it, with pools of one connection, and with this crate.
//!
//! It takes the PostgreSQL that `DATABASE_URL` names, where it works in a schema of its own, or else starts a throw-away one.
//! What to read: `plain.rs` and `session.rs` are the suite in both worlds, `suite.rs` runs it, `server.rs` asks the server.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program tells its story, and errors")]

#[cfg(not(feature = "postgres"))]
mod rerun;

#[cfg(feature = "postgres")]
#[path = "../../tests/support/mod.rs"]
mod support;

#[cfg(feature = "postgres")]
mod bar;
#[cfg(feature = "postgres")]
mod entry;
#[cfg(feature = "postgres")]
mod outcome;
#[cfg(feature = "postgres")]
mod page;
#[cfg(feature = "postgres")]
mod plain;
#[cfg(feature = "postgres")]
mod schema;
#[cfg(feature = "postgres")]
mod server;
#[cfg(feature = "postgres")]
mod session;
#[cfg(feature = "postgres")]
mod slots;
#[cfg(feature = "postgres")]
mod story;
#[cfg(feature = "postgres")]
mod suite;
#[cfg(feature = "postgres")]
mod url;

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
