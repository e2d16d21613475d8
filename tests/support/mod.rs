//! The test bench: real servers on throw-away clusters, a proxy that breaks connections on purpose, and eyes on this
//! process. Nothing here knows the crate under test.

// Not every test binary uses all of it.
#![allow(dead_code, unused_imports, unreachable_pub, clippy::print_stderr)]

pub mod keeper;
pub mod listeners;
pub mod process;
pub mod program;
pub mod proxy;
pub mod text;
pub mod wait;

mod account;
mod cluster;
mod database;
mod kind;
#[cfg(feature = "mysql")]
mod mariadb;
mod observer;
mod pgbouncer;
mod postgres;
mod sqlite;

pub use database::Database;
pub use kind::{Kind, browser_enabled, enabled};
#[cfg(feature = "mysql")]
pub use mariadb::{Mariadb, mariadb};
pub use pgbouncer::Pgbouncer;
pub use postgres::{Postgres, postgres};
pub use sqlite::TempSqlite;

/// The maximum of connections of the server that the tests of a process share. The tests of `it` run at the same time, as
/// many as the machine has CPUs. Other tests run one after the other, and some of them need a server that is soon full.
fn shared_max_connections() -> u32 {
    if env!("CARGO_CRATE_NAME") == "it" { 300 } else { 20 }
}

/// The ordinary role that the programs under test log in as, and the name of its first database.
pub const ROLE: &str = "app";

/// Its password, which no URL can carry without percent-encoding.
pub const PASSWORD: &str = "s3cret/pw@1";
