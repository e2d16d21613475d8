//! Functions that create and drop whole databases.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::migration::MigrationSource;

use super::connection_slots::ConnectionSlots;
use super::generated_name::GeneratedName;
use super::owner::{AdminConnection, Owner};
use super::sqlite_files::SqliteFiles;
use super::test_database::LAST_SESSIONS;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::url::Target;

/// How long a function waits for a connection slot of the server.
const PATIENCE: Duration = Duration::from_secs(60);

/// Creates the empty database that the URL of `config` names. For SQLite the function does nothing: the first
/// connection creates the file.
///
/// The name is used exactly as written, with quotes, blanks and letters of any script. A name that the server would
/// truncate or reject is refused. On MySQL and MariaDB every name with special characters is refused, because Diesel's
/// driver does not decode the URL.
///
/// ```no_run
/// # use diesel::prelude::*;
/// # use diesel_session::{Config, Database, testing};
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// let config = Config::from_env("DATABASE_URL")?;
/// testing::create_database(&DB, &config)?;
/// // ..
/// testing::drop_database(&DB, &config, Some("shop_test"))?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// # Errors
/// [`Error::InvalidConfig`] if the name is invalid; [`Error::Query`] if the server refuses, for example because the
/// database exists already; the errors of getting a connection.
pub fn create_database<C, M>(database: &'static Database<C, M>, config: &Config) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let target = checked_target::<C>(config)?;
    match target.kind {
        DatabaseKind::Sqlite => Ok(()),
        kind => on_other_database(database, config, &target, |admin| {
            admin.execute(&kind.create_database(&target.database, None, ""))
        }),
    }
}

/// Drops the database that the URL of `config` names, if the database exists. If this crate did not create the database
/// for a test, the caller has to repeat its exact name: `Some("shop")`.
///
/// The function ends no other session. If the database has other sessions, PostgreSQL refuses to drop it; MySQL and
/// MariaDB do not check that.
///
/// # Errors
/// [`Error::NotOurs`] if the name is missing or different; [`Error::InvalidConfig`], also for `:memory:`, which ends
/// with its connections; [`Error::Query`] if the server refuses; the errors of getting a connection.
pub fn drop_database<C, M>(database: &'static Database<C, M>, config: &Config, name: Option<&str>) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let target = checked_target::<C>(config)?;
    let path = std::path::Path::new(&target.database);
    // The name of a file is its name without the folder.
    let name_of_database = match target.kind {
        DatabaseKind::Sqlite => path.file_name().and_then(|name| name.to_str()).unwrap_or_default(),
        DatabaseKind::Postgres | DatabaseKind::Mysql => target.database.as_str(),
    };
    if GeneratedName::parse(name_of_database).is_none() && name != Some(name_of_database) {
        let advice = match target.kind {
            DatabaseKind::Sqlite => "give the file's name, without its folder, as the last argument",
            DatabaseKind::Postgres | DatabaseKind::Mysql => "give its name as the last argument",
        };
        return Err(Error::NotOurs { database: target.shown, advice });
    }
    match target.kind {
        DatabaseKind::Sqlite if target.in_memory => {
            Err(invalid("`:memory:` goes with its connections; dispose of the application"))
        }
        DatabaseKind::Sqlite => SqliteFiles::default().remove(path).map_err(invalid),
        kind => on_other_database(database, config, &target, |admin| {
            admin.wait_until_unused(&target.database, Instant::now() + LAST_SESSIONS)?;
            admin.execute(&kind.drop_database(&target.database))
        }),
    }
}

/// Drops the databases that the test kit keeps between runs on the server of `config`: the templates, and the databases
/// of tests that are rolled back. Databases with sessions remain. Returns the number of dropped databases. The next run
/// creates the databases that it needs.
///
/// # Errors
/// The errors of [`drop_database`].
pub fn remove_templates<C, M>(database: &'static Database<C, M>, config: &Config) -> Result<usize>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let target = checked_target::<C>(config)?;
    match target.kind {
        DatabaseKind::Sqlite => SqliteFiles::default().remove_templates().map_err(invalid),
        _ => on_other_database(database, config, &target, AdminConnection::remove_kept),
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::InvalidConfig { app: "tests".into(), reason: reason.into() }
}

/// The target of the URL, if its database has a valid name.
fn checked_target<C: SessionConnection>(config: &Config) -> Result<Target> {
    let target = Target::parse(&config.url, DatabaseKind::of_type::<C>()).map_err(invalid)?;
    let refusal = target.kind.name_problem(&target.database).or_else(|| {
        let is_plain = target.kind != DatabaseKind::Mysql || encode(&target.database) == target.database;
        (!is_plain).then(|| {
            "Diesel's MySQL driver does not decode it, so that it can be reached only without special characters".into()
        })
    });
    match refusal {
        Some(reason) => Err(invalid(format!("the URL's database cannot have its name: {reason}"))),
        None => Ok(target),
    }
}

/// Calls `work` with a session of the server that is connected to another database.
fn on_other_database<C, M, T>(
    database: &'static Database<C, M>,
    config: &Config,
    target: &Target,
    work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
) -> Result<T>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let slots = ConnectionSlots::of_server(&target.server).map_err(invalid)?;
    let mut held_slots = Arc::clone(&slots)
        .acquire(1, "databases", Instant::now() + PATIENCE)
        .map_err(|unavailable| invalid(format!("{unavailable}. Wait until those tests have ended")))?;
    let owner = Owner::outside_configured_database(database, config, target)?;
    let outcome = owner.with_session(&slots, &mut held_slots, 0, PATIENCE, work);
    owner.close();
    outcome
}
