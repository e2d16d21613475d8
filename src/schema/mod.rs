//! The schema: what migrations create and drop, one program at a time.
//!
//! Everything happens on one connection of the pool, under a lock that every other `create_all` and `drop_all` of this crate
//! asks for. The lock is polled, never waited for inside the server: PostgreSQL would count the waiting statement among those
//! that `CREATE INDEX CONCURRENTLY` has to wait for.

mod change;
mod reversal;
mod script;

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};

use diesel::backend::Backend;
use diesel::migration::{self, Migration, MigrationSource};

use crate::app::App;
use crate::backend::Kind;
use crate::connection::SessionConnection;
use crate::database::PerBackend;
use crate::error::{Error, Place, Result};
use crate::panic_message;
use crate::pool::Lease;
use crate::wording::{name, phrase, sentence};
use change::Change;
pub(crate) use script::{Script, extensions, is_blank, leaves_schema, transaction};

/// A migration of an application.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationStatus {
    /// Its version.
    pub version: String,
    /// Its full name; the version where this program does not know it.
    pub name: String,
    /// Whether the database has it.
    pub applied: bool,
    /// Whether it is among this program's migrations.
    pub known: bool,
}

/// A migration that failed.
#[derive(Debug)]
#[non_exhaustive]
pub struct MigrationFailure {
    /// The application.
    pub app: String,
    /// `create_all` or `drop_all`.
    pub operation: &'static str,
    /// The migration's name.
    pub migration: String,
    /// What the database said.
    pub message: String,
    /// The versions that were applied or reverted before, and stay so.
    pub done: Vec<String>,
    /// Columns and indexes, each after its table, that the failed migration made (`+`) or removed (`-`) and that stay so: MySQL
    /// and MariaDB commit every such change by itself, and so does every database outside of a transaction.
    pub left_behind: Vec<String>,
}

impl fmt::Display for MigrationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = sentence(&self.message);
        write!(f, "app `{}`: {} failed at migration {}: {message} ", self.app, self.operation, name(&self.migration))?;
        if self.left_behind.is_empty() {
            f.write_str("Nothing of it remains. ")?;
        } else {
            write!(
                f,
                "The database keeps what it had done of it: {}. Undo that by hand, as the migration would fail on it the next time. ",
                phrase(self.left_behind.join(", "))
            )?;
        }
        if !self.done.is_empty() {
            write!(f, "Done before it, and kept: {}. ", phrase(self.done.join(", ")))?;
        }
        f.write_str("Correct the migration and call it again")
    }
}

/// A program's migrations, whatever their type.
pub(crate) trait MigrationSet<C: SessionConnection>: Send + Sync {
    /// Those for one kind of database, if there are any.
    fn migrations(&self, kind: Kind) -> Option<migration::Result<Migrations<C>>>;
}

type Migrations<C> = Vec<Box<dyn Migration<<C as diesel::Connection>::Backend>>>;

/// What a database object was given.
pub(crate) enum Sources<M> {
    None,
    One(M),
    PerBackend(PerBackend<M>),
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync> MigrationSet<C> for Sources<M> {
    fn migrations(&self, kind: Kind) -> Option<migration::Result<Migrations<C>>> {
        let source = match self {
            Self::None => None,
            Self::One(source) => Some(source),
            Self::PerBackend(sources) => match kind {
                Kind::Sqlite => sources.sqlite.as_ref(),
                Kind::Postgres => sources.postgres.as_ref(),
                Kind::Mysql => sources.mysql.as_ref(),
            },
        };
        source.map(MigrationSource::migrations)
    }
}

impl<C: SessionConnection> App<C> {
    /// Applies the pending migrations, in the order of their versions, and returns the versions applied. Of several programs
    /// and threads that call it at once, one applies and the others find nothing to do.
    ///
    /// # Errors
    /// [`Error::Migration`]; [`Error::NoMigrations`]; [`Error::TransactionOpen`] while this thread has a transaction open on
    /// the application; [`Error::LockTimeout`]; what can go wrong with getting a connection.
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        self.create_all_at(Location::caller())
    }

    /// Reverts all applied migrations, the newest first, removes their bookkeeping table, and returns the versions reverted.
    ///
    /// It first makes sure that every applied version is known and has a way back. Another session's lock is waited for up to
    /// [`Config::lock_timeout`](crate::Config::lock_timeout), 5 s by default, and then the schema is as it was and the error
    /// names who was in the way.
    ///
    /// No connection of before is lent again, by any application of this process on that database. A transaction that is open
    /// meanwhile may get one error, such as PostgreSQL's `cached plan must not change result type`.
    ///
    /// # Errors
    /// [`Error::NotReversible`], and those of [`create_all`](Self::create_all).
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        self.drop_all_at(Location::caller())
    }

    /// The program's migrations and those the database has, in the order of their versions. It changes nothing.
    ///
    /// # Errors
    /// [`Error::NoMigrations`], [`Error::Query`], and what can go wrong with getting a connection.
    #[track_caller]
    pub fn migrations(&self) -> Result<Vec<MigrationStatus>> {
        let at = Location::caller();
        let known = self.known_migrations()?;
        let mut lease = self.pool()?.acquire(at, false, None)?;
        let applied = self.applied(&mut lease, at);
        drop(lease);
        let applied = applied?;
        let versions: HashSet<String> = known.iter().map(|migration| version(&**migration)).collect();
        let unknown = applied.iter().filter(|version| !versions.contains(*version));
        let mut all: Vec<MigrationStatus> = unknown
            .map(|version| MigrationStatus {
                version: version.clone(),
                name: version.clone(),
                applied: true,
                known: false,
            })
            .collect();
        all.extend(known.iter().map(|migration| {
            let version = version(&**migration);
            let applied = applied.contains(&version);
            MigrationStatus { version, name: migration.name().to_string(), applied, known: true }
        }));
        all.sort_by(|a, b| a.version.cmp(&b.version));
        Ok(all)
    }

    pub(crate) fn create_all_at(&self, at: Place) -> Result<Vec<String>> {
        let mut change = Change::start(self, "create_all", at)?;
        let outcome = change.create();
        change.finish(outcome)
    }

    pub(crate) fn drop_all_at(&self, at: Place) -> Result<Vec<String>> {
        let mut change = Change::start(self, "drop_all", at)?;
        let outcome = change.drop_everything();
        change.finish(outcome)
    }

    fn known_migrations(&self) -> Result<Migrations<C>> {
        let kind = self.spec().target.kind;
        let known = caught(|| self.migration_set().migrations(kind).transpose());
        let known = known.map_err(|message| Error::InvalidConfig {
            app: self.id().into(),
            reason: format!("the migrations cannot be read: {message}"),
        })?;
        known.ok_or_else(|| Error::NoMigrations { app: self.id().into(), backend: kind.name() })
    }

    /// The applied versions, the newest first, without making the bookkeeping table.
    fn applied(&self, lease: &mut Lease<C>, at: Place) -> Result<Vec<String>> {
        let kind = self.spec().target.kind;
        let conn = lease.conn();
        let exists = conn.texts(kind.has_bookkeeping()).map_err(|error| Error::from_query(error, at))?;
        if exists.is_empty() {
            return Ok(Vec::new());
        }
        // Diesel's own look at it makes the table where there is none, which MySQL commits even where there is one.
        let applied = conn.texts(APPLIED).map_err(|error| Error::from_query(error, at))?;
        Ok(applied.into_iter().flatten().collect())
    }
}

const APPLIED: &str = "SELECT version AS value FROM __diesel_schema_migrations ORDER BY version DESC";

fn version<DB: Backend>(migration: &dyn Migration<DB>) -> String {
    migration.name().version().to_string()
}

/// The error's text, also of a panic.
fn caught<T>(run: impl FnOnce() -> migration::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("it panicked: {}", panic_message(&*panic))),
    }
}

fn unexpected(error: Box<dyn std::error::Error + Send + Sync>, at: Place) -> Error {
    match error.downcast::<diesel::result::Error>() {
        Ok(error) => Error::from_query(*error, at),
        Err(error) => Error::from_query(diesel::result::Error::QueryBuilderError(error), at),
    }
}
