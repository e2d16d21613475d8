//! Whole databases, by name: made, and removed with care.

use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::migration::MigrationSource;

use super::connection_slots::ConnectionSlots;
use super::generated_name::GeneratedName;
use super::owner::{AdminConnection, Owner};
use super::sqlite_files::SqliteFiles;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::url::Target;

/// How long other test processes are waited for that have the server's connections.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long sessions that are ending are waited for.
const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// Makes the database that the URL of `config` names, empty. For SQLite there is nothing to do: a file is made by the first connection.
///
/// The name is taken exactly as it is, with quotes, blanks and letters of any script; one that the server would cut, or could not
/// have, is refused. On MySQL and MariaDB every name with special characters is, as Diesel's driver takes them as they stand in the URL.
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
/// [`Error::InvalidConfig`] for a name that cannot be; [`Error::Query`] where the server refuses, as when it is there already; what can
/// go wrong with getting a connection.
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

/// Removes the database that the URL of `config` names, if it is there. One that this crate has made for a test needs no more; every other has to
/// be named once more, exactly: `Some("shop")`.
///
/// Nobody is thrown out: where other sessions are in it the server refuses, except MySQL and MariaDB, which do not look.
///
/// # Errors
/// [`Error::NotOurs`] where it was not named, or by another name; [`Error::InvalidConfig`], also for `:memory:`, which goes with its
/// connections; [`Error::Query`] where the server refuses; what can go wrong with getting a connection.
pub fn drop_database<C, M>(database: &'static Database<C, M>, config: &Config, name: Option<&str>) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let target = checked_target::<C>(config)?;
    let path = std::path::Path::new(&target.database);
    // A file is known by its own name, in whatever folder.
    let known = match target.kind {
        DatabaseKind::Sqlite => path.file_name().and_then(|name| name.to_str()).unwrap_or_default(),
        DatabaseKind::Postgres | DatabaseKind::Mysql => target.database.as_str(),
    };
    if GeneratedName::parse(known).is_none() && name != Some(known) {
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

/// Removes the databases that are kept between runs on the server of `config`: templates, and those in which tests run that are rolled
/// back. Those that somebody is in stay. Returns how many were removed. The next run makes what it needs anew.
///
/// # Errors
/// Those of [`drop_database`].
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

/// What the URL names, if a database can be called so.
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

/// Works on a session of the server that is in another database.
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
    let mut taken = Arc::clone(&slots)
        .acquire(1, "databases", Instant::now() + PATIENCE)
        .map_err(|busy| invalid(format!("{busy}. Wait until those tests have ended")))?;
    let owner = Owner::outside_configured_database(database, config, target)?;
    let outcome = owner.with_session(&slots, &mut taken, 0, PATIENCE, work);
    owner.close();
    outcome
}
