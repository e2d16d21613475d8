//! A schema on the user's server that is gone when the story ends, in whatever way it ends.
//!
//! Its keeper is a second process of this program, which waits for its pipe to close and then drops the schema. It is in a
//! process group of its own, so that Ctrl-C at a terminal does not reach it.

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

/// The sessions of a story that was killed give their slots back within moments.
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
        // Not as arguments or environment, which others on this machine may see.
        let told = writeln!(keeper.stdin.as_mut().expect("piped"), "{name}\n{url}");
        // From here on dropping it drops the schema.
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
        // Where it fails, it says so itself.
        let _ = self.keeper.wait();
    }
}

/// The whole life of the keeper, if this process is one.
pub(crate) fn keep() -> Option<ExitCode> {
    if env::args().nth(1).as_deref() != Some(KEEPER) {
        return None;
    }
    // Ends when the story ends.
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
