//! Whole databases: create and drop them, for programs with a database for each tenant.
//!
//! Each function takes the database object, which knows how to connect, and a [`Config`], whose URL names the database.
//! The functions connect to another database of the same server: on PostgreSQL to `postgres` or `template1`, on MySQL
//! and MariaDB to no database. They use the URL and the timeouts of the configuration, and no hook of the database
//! object. A SQLite database is a file.
//!
//! ```
//! use diesel::prelude::*;
//! use diesel_session::{App, Config, Database, Result, admin};
//!
//! static DB: Database<SqliteConnection> = Database::without_migrations();
//!
//! fn tenant(name: &str, folder: &str) -> Result<App<SqliteConnection>> {
//!     let config = Config::new(format!("{folder}/{name}.sqlite"));
//!     let init = |app: &App<SqliteConnection>| {                          // runs once for each tenant
//!         admin::create_database_if_missing(&DB, &config)?;
//!         app.ping()                                                      // or `app.create_all()`
//!     };
//!     DB.get_or_init_app(name, || config.clone(), init)
//! }
//! # let folder = std::env::temp_dir().join(format!("diesel-session-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder).unwrap();
//! # let folder = folder.to_str().unwrap();
//! # let app = tenant("acme", folder)?;
//! # DB.remove_app("acme")?;
//! # admin::drop_database(&DB, &Config::new(format!("{folder}/acme.sqlite")), Some("acme.sqlite"))?;
//! # std::fs::remove_dir(folder).unwrap();
//! # Ok::<(), diesel_session::Error>(())
//! ```
//!
//! A name is used exactly as the URL has it, with quotes, blanks and letters of any script. A name that the server
//! would truncate or reject is refused with [`ErrorKind::InvalidConfig`]. On MySQL and
//! MariaDB every name with special characters is refused, because Diesel's driver does not decode the URL.

mod admin_connection;
mod database_url;
mod generated_name;

use std::fs::{self, File};
use std::io;
use std::panic::Location;
use std::path::Path;
use std::time::{Duration, Instant};

use diesel::migration::MigrationSource;

pub(crate) use admin_connection::{AdminConnection, admin_config, admin_urls};
#[cfg(feature = "testing")]
pub(crate) use database_url::with_database;
pub(crate) use generated_name::GeneratedName;
#[cfg(feature = "testing")]
pub(crate) use generated_name::PREFIX;

use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
pub use crate::error::DatabaseProblem;
use crate::error::{ConnectErrorKind, Details, Error, ErrorKind, NO_APP, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::url::Target;
use crate::wording::phrase;

/// How long the drop of a database waits until its last sessions have ended.
const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// How long a statement waits for locks of other sessions, if the configuration does not say it.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Creates the empty database that the URL of `config` names. For SQLite it creates an empty file; a database in memory
/// needs no creation.
///
/// ```no_run
/// # use diesel::prelude::*;
/// # use diesel_session::{Config, Database, admin};
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// let config = Config::from_env("DATABASE_URL")?;
/// admin::create_database(&DB, &config)?;
/// // ..
/// admin::drop_database(&DB, &config, Some("shop"))?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::DatabaseAdmin`] if the database exists already, if the account must
/// not create databases, or if PostgreSQL cannot copy `template1` because that has sessions;
/// [`ErrorKind::InvalidConfig`] if the name is invalid; the errors of a checkout;
/// [`ErrorKind::Query`] if the server refuses for another reason.
#[track_caller]
pub fn create_database<C, M>(database: &Database<C, M>, config: &Config) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let at = Location::caller();
    let config = &direct(config)?;
    let target = checked_target::<C>(config)?;
    let created = match target.kind {
        DatabaseKind::Sqlite => target.in_memory || create_file(&target)?,
        DatabaseKind::Postgres | DatabaseKind::Mysql => {
            with_connection(database, config, admin_urls(&target), at, |admin| create(admin, &target))?
        }
    };
    if created { Ok(()) } else { Err(failure(&target, DatabaseProblem::Exists, "")) }
}

/// Like [`create_database`], but it is no error if the database exists. Returns whether this call has created it. If
/// several processes or threads call it at once, one of them creates the database.
///
/// A new database is empty. Use [`App::create_all`](crate::App::create_all) for its schema; it runs under a lock, so
/// all processes may call it.
///
/// # Errors
/// The errors of [`create_database`]. An account that can connect to the database needs no right to create one.
#[track_caller]
pub fn create_database_if_missing<C, M>(database: &Database<C, M>, config: &Config) -> Result<bool>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let at = Location::caller();
    let config = &direct(config)?;
    let target = checked_target::<C>(config)?;
    if target.kind == DatabaseKind::Sqlite {
        return if target.in_memory { Ok(false) } else { create_file(&target) };
    }
    let urls = admin_urls(&target).map(|others| std::iter::once(config.url.clone()).chain(others).collect());
    with_connection(database, config, urls, at, |admin| {
        if exists(admin, &target)? { Ok(false) } else { create(admin, &target) }
    })
}

/// Drops the database that the URL of `config` names. The caller has to repeat its exact name as a protection:
/// `Some("shop")`, for SQLite the name of the file without its folder. A database that the test kit has generated needs
/// no name.
///
/// The function ends no session of others. Dispose of the applications of the database first, for example with
/// [`Database::remove_app`]. If the database still has sessions after a second, it is not dropped. MySQL and MariaDB
/// show an account without the right `PROCESS` only its own sessions. A SQLite file without a write-ahead log is in use
/// only during a transaction, so an idle connection does not prevent the drop.
///
/// # Errors
/// [`ErrorKind::UnmanagedDatabase`] if the name is missing or different;
/// [`ErrorKind::DatabaseAdmin`] if the database does not exist, is in use, or the
/// account must not drop it; [`ErrorKind::InvalidConfig`] if the name is invalid, and
/// for a SQLite database in memory, which ends with its connections; the errors of a checkout;
/// [`ErrorKind::Query`] if the server refuses for another reason.
#[track_caller]
pub fn drop_database<C, M>(database: &Database<C, M>, config: &Config, name: Option<&str>) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let at = Location::caller();
    let config = &direct(config)?;
    let target = checked_target::<C>(config)?;
    if target.in_memory {
        return Err(invalid("`:memory:` goes with its connections; dispose of the application"));
    }
    let path = Path::new(&target.database);
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
        return Err(Details::UnmanagedDatabase { database: target.shown, advice }.into());
    }
    match target.kind {
        DatabaseKind::Sqlite if !path.is_file() => Err(failure(&target, DatabaseProblem::Missing, "")),
        DatabaseKind::Sqlite => {
            check_file_is_unused(database, config, &target, at)?;
            remove_sqlite_files(path).map_err(|error| file_failure(&target, &error))
        }
        DatabaseKind::Postgres | DatabaseKind::Mysql => {
            with_connection(database, config, admin_urls(&target), at, |admin| drop_on_server(admin, &target))
        }
    }
}

/// Removes a database file with its journal, write-ahead log and shared-memory file.
pub(crate) fn remove_sqlite_files(path: &Path) -> io::Result<()> {
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        match fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The configuration with the URL for changes of the schema. A database is created outside of a transaction, where a
/// pooler in transaction mode would give the settings of the connection to other clients.
fn direct(config: &Config) -> Result<Config> {
    match config.for_schema() {
        Some(config) => Ok(config),
        None if config.behind.is_transaction_pooler() => Err(invalid(
            "behind a pooler in transaction mode this needs the URL of the server: set `Config::schema_url`",
        )),
        None => Ok(config.clone()),
    }
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

/// Calls `work` with a connection to the first of the databases that exists.
fn with_connection<C, M, T>(
    database: &Database<C, M>,
    config: &Config,
    urls: std::result::Result<Vec<String>, String>,
    at: SourceLocation,
    work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
) -> Result<T>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let app = |url: String| {
        let admin_config = admin_config(url, config)
            .acquire_timeout(config.acquire_timeout)
            .lock_timeout(config.lock_timeout.unwrap_or(LOCK_TIMEOUT));
        database.new_bare_app("diesel_session::admin".into(), admin_config)
    };
    let apps = urls.map_err(invalid)?.into_iter().map(app).collect::<Result<Vec<_>>>()?;
    let outcome = AdminConnection::connect(&apps, at, None).and_then(|mut admin| work(&mut admin));
    apps.iter().for_each(|app| drop(app.dispose()));
    outcome
}

/// Whether the database exists, as far as the server shows it to the account.
fn exists<C: SessionConnection>(admin: &mut AdminConnection<C>, target: &Target) -> Result<bool> {
    Ok(!admin.query_texts(&target.kind.database_query(&target.database))?.is_empty())
}

/// Creates the database. Returns `false` if it exists.
fn create<C: SessionConnection>(admin: &mut AdminConnection<C>, target: &Target) -> Result<bool> {
    let kind = target.kind;
    let Err(error) = admin.execute(&kind.create_database(&target.database, None, "")) else { return Ok(true) };
    if admin.is_lost() {
        return Err(error);
    }
    // Another process may have created it in the meantime.
    if exists(admin, target)? {
        return Ok(false);
    }
    let message = message(&error, target);
    if is_refused(kind, &message)
        || !admin.query_bool(&kind.may_create_database_query(&target.database)).unwrap_or(true)
    {
        let detail = format!("{message}. The account needs {}", kind.right_to_create_databases());
        return Err(failure(target, DatabaseProblem::NotPermitted, &detail));
    }
    if kind == DatabaseKind::Postgres {
        let sessions = admin.query_texts(&kind.sessions_in("template1")).unwrap_or_default();
        if !sessions.is_empty() {
            let detail = format!("`template1`, which it would be a copy of, has the sessions {}", sessions.join(", "));
            return Err(failure(target, DatabaseProblem::InUse, &detail));
        }
    }
    Err(error)
}

fn drop_on_server<C: SessionConnection>(admin: &mut AdminConnection<C>, target: &Target) -> Result<()> {
    let (kind, name) = (target.kind, target.database.as_str());
    let in_use = |admin: &mut AdminConnection<C>| {
        let sessions = admin.query_texts(&kind.sessions_in(name)).unwrap_or_default();
        let detail = format!("session {} uses it", sessions.join(", "));
        (!sessions.is_empty()).then(|| failure(target, DatabaseProblem::InUse, &detail))
    };
    if !admin.wait_until_unused(name, Instant::now() + LAST_SESSIONS)?
        && let Some(error) = in_use(admin)
    {
        return Err(error);
    }
    let Err(error) = admin.execute(&kind.drop_existing_database(name)) else { return Ok(()) };
    if admin.is_lost() {
        return Err(error);
    }
    let message = message(&error, target);
    // MySQL and MariaDB hide a database from an account without rights on it.
    if is_refused(kind, &message) {
        return Err(failure(target, DatabaseProblem::NotPermitted, &message));
    }
    if !exists(admin, target)? {
        return Err(failure(target, DatabaseProblem::Missing, ""));
    }
    if !admin.query_bool(&kind.may_drop_database_query(name)).unwrap_or(true) {
        return Err(failure(target, DatabaseProblem::NotPermitted, &message));
    }
    Err(in_use(admin).unwrap_or(error))
}

/// Whether MySQL or MariaDB has refused the statement because of the rights of the account.
fn is_refused(kind: DatabaseKind, message: &str) -> bool {
    kind == DatabaseKind::Mysql && kind.classify_connect_error(message) == ConnectErrorKind::Authentication
}

/// Creates an empty file. Returns `false` if there is one.
fn create_file(target: &Target) -> Result<bool> {
    match File::create_new(&target.database) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && Path::new(&target.database).is_file() => {
            Ok(false)
        }
        Err(error) => Err(file_failure(target, &error)),
    }
}

/// Checks that no connection uses the file. Every open connection prevents that the write-ahead log ends, and every
/// transaction prevents the exclusive one.
fn check_file_is_unused<C, M>(
    database: &Database<C, M>,
    config: &Config,
    target: &Target,
    at: SourceLocation,
) -> Result<()>
where
    C: SessionConnection,
    M: MigrationSource<C::Backend> + Send + Sync + 'static,
{
    let config = config.clone().lock_timeout(LAST_SESSIONS);
    // Parameters such as `nolock` or `immutable` would leave out the locks that the check relies on.
    let url = match config.url.starts_with("file:") {
        true => config.url.split(['?', '#']).next().unwrap_or_default().to_owned(),
        false => config.url.clone(),
    };
    let checked = with_connection(database, &config, Ok(vec![url]), at, |admin| {
        admin.execute("PRAGMA journal_mode = DELETE")?;
        admin.execute("BEGIN EXCLUSIVE; ROLLBACK")
    });
    match checked {
        Err(error) if error.kind() == ErrorKind::Query && error.is_transient() => {
            Err(failure(target, DatabaseProblem::InUse, &message(&error, target)))
        }
        // A file that is no database can be removed too.
        Err(error) if message(&error, target).contains("file is not a database") => Ok(()),
        // Only a check that has succeeded shows that the file is unused.
        checked => checked,
    }
}

/// The text of the error without its code and its place in the program.
fn message(error: &Error, target: &Target) -> String {
    target.redact(&match error.details() {
        Details::Query { source, .. } => phrase(source),
        _ => phrase(error),
    })
}

fn file_failure(target: &Target, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied => failure(target, DatabaseProblem::NotPermitted, &error.to_string()),
        _ => {
            let cause = target.missing_file_reason().unwrap_or_else(|| error.to_string());
            invalid(format!("{}: {cause}", target.shown))
        }
    }
}

fn failure(target: &Target, problem: DatabaseProblem, detail: &str) -> Error {
    Error::from(Details::DatabaseAdmin { database: target.shown.clone(), problem, detail: detail.into() })
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::from(Details::InvalidConfig { app: NO_APP.into(), reason: reason.into() })
}
