//! A schema on the user's server that is dropped when the story ends, however it ends.
//!
//! A second process of this program, the keeper, waits for its pipe to close and then drops the schema. The keeper has its own
//! process group, so that Ctrl-C at a terminal does not reach it.

use std::env;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use super::support::wait;
use crate::Result;

const KEEPER: &str = "--keep-schema";

/// Maximum wait of the keeper for a free slot. The server ends the sessions of a killed story soon.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Schema {
    keeper: Child,
}

impl Schema {
    pub(crate) fn create(conn: &mut PgConnection, url: &str, name: &str) -> Result<Self> {
        let mut keeper = Command::new(env::current_exe()?)
            .arg(KEEPER)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("the keeper of the schema cannot be started: {error}"))?;
        // Other users of this machine may see arguments and the environment, so a pipe carries the URL.
        let told = writeln!(keeper.stdin.as_mut().expect("piped"), "{name}\n{url}");
        // From here on the drop of `Schema` drops the schema.
        let schema = Self { keeper };
        told?;
        let created = conn.batch_execute(&format!("CREATE SCHEMA {name}"));
        created.map_err(|error| format!("the schema {name} cannot be created: {error}"))?;
        Ok(schema)
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // The keeper reports its own failure.
        let _ = self.keeper.wait();
    }
}

/// Runs the keeper, if this process is one.
pub(crate) fn keep() -> Option<ExitCode> {
    if env::args().nth(1).as_deref() != Some(KEEPER) {
        return None;
    }
    // The input ends when the story ends.
    let told = io::read_to_string(io::stdin()).unwrap_or_default();
    let (name, url) = told.split_once('\n')?;
    let mut dropped = Ok(());
    wait::until(PATIENCE, || {
        dropped = drop_schema(url.trim_end(), name);
        dropped.is_ok()
    });
    if let Err(error) = dropped {
        eprintln!("seed_story: the schema {name} is still there: {error}");
        return Some(ExitCode::FAILURE);
    }
    Some(ExitCode::SUCCESS)
}

fn drop_schema(url: &str, name: &str) -> Result<()> {
    let mut conn = PgConnection::establish(url)?;
    Ok(conn.batch_execute(&format!("SET client_min_messages = warning; DROP SCHEMA IF EXISTS {name} CASCADE"))?)
}
