//! Without the feature `postgres`: builds and runs the program again with the feature.

use std::env;
use std::process::{Command, ExitCode};

use crate::Result;

pub(crate) fn main_of() -> Result<ExitCode> {
    eprintln!(
        "seed_story: this needs PostgreSQL's client, libpq (`scripts/setup` installs it); \
         running `cargo run --features postgres --example seed_story`"
    );
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let mut command = Command::new(cargo);
    command.args(["run", "--features", "postgres", "--example", "seed_story", "--manifest-path", manifest]);
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let status = command.status().map_err(|error| format!("cargo cannot be run: {error}"))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
