//! The removal of the databases that the test kit keeps between runs.

use std::time::{Duration, Instant};

use diesel::migration::MigrationSource;

use super::connection_slots::ConnectionSlots;
use super::owner::{Owner, OwnerConnection, invalid};
use super::sqlite_files;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::Result;
use crate::kind::DatabaseKind;
use crate::url::Target;

/// How long the removal waits for a connection slot of the server.
const PATIENCE: Duration = Duration::from_secs(60);

/// Drops the databases that the test kit keeps between runs on the server of `config`: the templates, and the databases
/// of tests that are rolled back. Databases with sessions remain. Returns the number of dropped databases. The next run
/// creates the databases that it needs.
///
/// # Errors
/// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the URL is invalid;
/// [`ErrorKind::Query`](crate::ErrorKind::Query) if the server refuses; the errors of getting a connection.
pub fn remove_templates<C, M>(database: &'static Database<C, M>, config: &Config) -> Result<usize>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let config = &config.clone().for_tests()?;
    let target = Target::parse(&config.url, DatabaseKind::of_type::<C>()).map_err(invalid)?;
    if target.kind == DatabaseKind::Sqlite {
        return sqlite_files::remove_templates().map_err(invalid);
    }
    let slots = ConnectionSlots::of_server(&target.server).map_err(invalid)?;
    let deadline = Instant::now() + PATIENCE;
    let mut held_slots =
        slots.acquire(1, "databases", deadline, "Wait until those tests have ended").map_err(invalid)?;
    // The session must not be connected to a database that it is to remove.
    let owner = Owner::new(database, config, &target, false)?;
    let outcome = owner.with_session(&slots, &mut held_slots, 0, PATIENCE, OwnerConnection::remove_kept);
    owner.close_if(|| true);
    outcome
}
