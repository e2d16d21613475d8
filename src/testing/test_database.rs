//! The database of one test.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::database_url::{with_schema, without_password};
use super::owner::invalid;
use super::rollback_database::RollbackDatabase;
use super::sqlite_files;
use super::test_environment::{Reservation, TestEnvironment};
use crate::admin::with_database;
use crate::connection::SessionConnection;
use crate::error::Result;
use crate::url::Target;

/// How long the removal of a database waits until its last sessions have ended.
pub(super) const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// The database of one test, with the name under which it can be removed.
pub(super) enum TestDatabase<C: SessionConnection> {
    Database(String),
    Schema(String),
    File(PathBuf),
    Memory,
    Rollback(RollbackDatabase<C>),
}

impl<C: SessionConnection> TestDatabase<C> {
    /// Removes the database. The application of the test has no connection any more.
    pub(super) fn remove(self, environment: &TestEnvironment<C>, reservation: &mut Reservation<C>) -> Result<()> {
        match self {
            Self::Database(name) => environment.owner.with_open_session(|admin| {
                admin.wait_until_unused(&name, Instant::now() + LAST_SESSIONS)?;
                admin.execute(&environment.target.kind.drop_database(&name))
            }),
            Self::Schema(name) => environment.owner.with_open_session(|admin| admin.drop_schema(&name)),
            Self::File(path) => sqlite_files::remove(&path).map_err(invalid),
            Self::Rollback(database) => database.remove(environment, reservation),
            Self::Memory => Ok(()),
        }
    }

    /// The URL of the database without its password, or the path of the file. The result is `None` if the test leaves
    /// no database.
    pub(super) fn shown(&self, target: &Target) -> Option<String> {
        let shown = |url: String| Target::parse(&url, Some(target.kind)).ok().map(|target| without_password(&target));
        match self {
            Self::Database(name) => with_database(target, name).ok().and_then(shown),
            Self::Schema(name) => with_schema(target, name).ok().and_then(shown),
            Self::File(path) => Some(path.display().to_string()),
            Self::Memory | Self::Rollback(_) => None,
        }
    }
}
