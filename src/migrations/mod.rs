//! The migrations of a program: their state, and the failures of `create_all` and `drop_all`.
//!
//! [`Database::new`](crate::Database::new) takes the migrations of a program, and [`PerBackend`] those for each kind
//! of database. [`App::create_all`](crate::App::create_all) applies the pending ones,
//! [`App::drop_all`](crate::App::drop_all) reverts the applied ones, and [`App::migrations`](crate::App::migrations)
//! lists them. Each operation uses one connection of the pool, and holds a lock that excludes every other `create_all`
//! and `drop_all` of this crate, in any process.

// An operation polls for the lock and never waits inside the server, because PostgreSQL's `CREATE INDEX CONCURRENTLY`
// would wait for the waiting statement.

mod drop_all;
mod migration_connection;
mod recording_connection;
mod schema_lock;
mod schema_operation;
mod step_failure;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::panic::Location;

use diesel::migration::{self, Migration, MigrationSource};
use diesel::result::QueryResult;
use diesel_migrations::EmbeddedMigrations;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::context;
use crate::dialect::{BEGIN, ConnectionSnapshot, is_connection_lost};
pub use crate::error::{Blocker, Blockers, MigrationFailure, MigrationOutcome};
use crate::error::{Details, Error, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::CheckedOut;
use crate::wording::phrase;
#[cfg(feature = "testing")]
pub(crate) use recording_connection::RecordingConnection;
use schema_operation::SchemaOperation;
use step_failure::catch_failure;

/// A migration, known to the program or applied to the database.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationStatus {
    /// The version of the migration.
    pub version: String,
    /// The full name of the migration, or its version if this program does not know it.
    pub name: String,
    /// Whether the migration is applied to the database.
    pub applied: bool,
    /// Whether the migration is one of this program's migrations.
    pub known: bool,
}

/// The migrations of a program, with the type of their source erased.
pub(crate) trait MigrationSet<C: SessionConnection>: Send + Sync {
    /// The migrations for one kind of database, if there is a source for it.
    fn migrations(&self, kind: DatabaseKind) -> Option<migration::Result<Migrations<C>>>;
}

type Migrations<C> = Vec<Box<dyn Migration<<C as diesel::Connection>::Backend>>>;

/// A migration of the program with its metadata. The metadata may come from code of the program, so it is read once.
pub(crate) struct KnownMigration<C: SessionConnection> {
    pub(crate) migration: Box<dyn Migration<<C as diesel::Connection>::Backend>>,
    pub(crate) version: String,
    pub(crate) name: String,
    pub(crate) in_transaction: bool,
}

/// One set of migrations per kind of database, for [`Database::per_backend`](crate::Database::per_backend).
#[derive(Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "made by naming its fields")]
pub struct PerBackend<M = EmbeddedMigrations> {
    /// For SQLite.
    pub sqlite: Option<M>,
    /// For PostgreSQL.
    pub postgres: Option<M>,
    /// For MySQL and MariaDB.
    pub mysql: Option<M>,
}

/// The sources of migrations of a database object.
pub(crate) enum Sources<M> {
    None,
    One(M),
    PerBackend(PerBackend<M>),
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync> MigrationSet<C> for Sources<M> {
    fn migrations(&self, kind: DatabaseKind) -> Option<migration::Result<Migrations<C>>> {
        let source = match self {
            Self::None => None,
            Self::One(source) => Some(source),
            Self::PerBackend(sources) => match kind {
                DatabaseKind::Sqlite => sources.sqlite.as_ref(),
                DatabaseKind::Postgres => sources.postgres.as_ref(),
                DatabaseKind::Mysql => sources.mysql.as_ref(),
            },
        };
        source.map(MigrationSource::migrations)
    }
}

/// The application whose connections change the schema. A temporary one is disposed of by the drop.
struct SchemaApp<C: SessionConnection> {
    app: App<C>,
    is_temporary: bool,
}

impl<C: SessionConnection> Deref for SchemaApp<C> {
    type Target = App<C>;

    fn deref(&self) -> &App<C> {
        &self.app
    }
}

impl<C: SessionConnection> Drop for SchemaApp<C> {
    fn drop(&mut self) {
        if self.is_temporary {
            // A report that names a connection in use is logged.
            let _ = self.app.dispose();
        }
    }
}

impl<C: SessionConnection> App<C> {
    /// Applies the pending migrations in the order of their versions, and returns the applied versions. If several
    /// programs and threads call `create_all` at the same time, one of them applies the migrations and the others find
    /// no pending migrations.
    ///
    /// Each migration runs without the application's [`statement_timeout`](crate::Config::statement_timeout), and with
    /// the settings, the role and the `search_path` that the connection had before the first migration: the library
    /// restores the session's settings before it records a migration as applied. It does not send SQL without a
    /// statement.
    ///
    /// # Errors
    /// [`ErrorKind::Migration`](crate::ErrorKind::Migration);
    /// [`ErrorKind::NoMigrations`](crate::ErrorKind::NoMigrations);
    /// [`ErrorKind::PoolerInTransactionMode`](crate::ErrorKind::PoolerInTransactionMode);
    /// [`ErrorKind::TransactionOpen`](crate::ErrorKind::TransactionOpen) while this thread has an open transaction on
    /// the application; [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) inside a scope with a
    /// [`search_path`](crate::Scope::search_path); [`ErrorKind::LockTimeout`](crate::ErrorKind::LockTimeout); and the
    /// errors of a checkout.
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        self.create_all_at(Location::caller())
    }

    /// Reverts all applied migrations, the newest first, removes the bookkeeping table, and returns the reverted
    /// versions.
    ///
    /// `drop_all` first checks that the program knows every applied version and that every applied migration is
    /// reversible. A `down.sql` without a statement is not reversible. `drop_all` waits for another session's lock for
    /// up to [`Config::lock_timeout`](crate::Config::lock_timeout), 5 s by default. After that the schema is unchanged,
    /// and the error names the sessions that hold the lock.
    ///
    /// On PostgreSQL and SQLite a single transaction reverts all migrations. Otherwise each migration is reverted in
    /// its own transaction, as Diesel does it: if a migration does not run in a transaction, if its SQL ends the
    /// transaction (`COMMIT`), and on PostgreSQL if the schema is so large that a single transaction would need more
    /// locks than the server has (`max_locks_per_transaction`).
    ///
    /// On PostgreSQL `drop_all` concerns only the application's own schema, which is the first schema of `search_path`.
    /// If this schema has no bookkeeping table, there is nothing to revert. If the schema does not exist, `drop_all`
    /// returns an error. While a migration is reverted, `search_path` consists of the own schema and the later schemas
    /// in which every object belongs to an extension. So an unqualified name never means a table of another schema, and
    /// a `down.sql` that needs such a table has to qualify its name.
    ///
    /// `drop_all` does not ask for confirmation. Before it reverts anything, it logs a warning with the database and
    /// the source location of the caller. With [`Config::protect_schema`](crate::Config::protect_schema) it returns an
    /// error.
    ///
    /// After `drop_all`, no application of this process checks out a connection again that was opened to the database
    /// before it. A transaction that is open during `drop_all` may get one error, such as PostgreSQL's `cached plan
    /// must not change result type`.
    ///
    /// # Errors
    /// [`ErrorKind::NotReversible`](crate::ErrorKind::NotReversible),
    /// [`ErrorKind::SchemaProtected`](crate::ErrorKind::SchemaProtected), and those of
    /// [`create_all`](Self::create_all).
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        self.drop_all_at(Location::caller())
    }

    /// The program's migrations and the applied migrations, in the order of their versions. The method changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NoMigrations`](crate::ErrorKind::NoMigrations); [`ErrorKind::Query`](crate::ErrorKind::Query);
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) inside a scope with a
    /// [`search_path`](crate::Scope::search_path); and the errors of a checkout.
    #[track_caller]
    pub fn migrations(&self) -> Result<Vec<MigrationStatus>> {
        let at = Location::caller();
        self.refuse_search_path("migrations", at)?;
        let known = self.known_migrations()?;
        let schema_app = self.schema_app(at)?;
        let mut pooled = schema_app.pool()?.acquire(at, false, None)?;
        let applied = schema_app.applied_migrations(&mut pooled);
        let applied = applied.map_err(|error| match is_connection_lost(&error) {
            true => Error::lost(self.id(), error, false, at),
            false => Error::from_query(error, at),
        });
        if applied.is_err() {
            pooled.close_at_checkin();
        }
        drop(pooled);
        let applied = applied?;
        let unknown = |version: String| {
            let status =
                MigrationStatus { version: version.clone(), name: version.clone(), applied: true, known: false };
            (version, status)
        };
        let mut all: BTreeMap<String, MigrationStatus> = applied.into_iter().map(unknown).collect();
        for KnownMigration { version, name, .. } in known {
            let applied = all.contains_key(&version);
            all.insert(version.clone(), MigrationStatus { version, name, applied, known: true });
        }
        Ok(all.into_values().collect())
    }

    pub(crate) fn create_all_at(&self, at: SourceLocation) -> Result<Vec<String>> {
        self.refuse_search_path("create_all", at)?;
        self.refuse_open_transaction("create_all")?;
        let schema_app = self.schema_app(at)?;
        SchemaOperation::start(&schema_app, "create_all", at, true)?.run(SchemaOperation::create_all)
    }

    /// [`create_all`](Self::create_all) in a new schema or database, which no other program uses.
    #[cfg(feature = "testing")]
    pub(crate) fn create_all_unlocked(&self, at: SourceLocation) -> Result<()> {
        self.refuse_open_transaction("create_all")?;
        SchemaOperation::start(self, "create_all", at, false)?.run(SchemaOperation::create_all).map(drop)
    }

    pub(crate) fn drop_all_at(&self, at: SourceLocation) -> Result<Vec<String>> {
        let options = self.options();
        if options.config.protect_schema {
            let (app, database) = (self.id().into(), options.target.shown.clone());
            return Err(Details::SchemaProtected { app, database, at }.into());
        }
        self.refuse_search_path("drop_all", at)?;
        self.refuse_open_transaction("drop_all")?;
        let schema_app = self.schema_app(at)?;
        SchemaOperation::start(&schema_app, "drop_all", at, true)?.run(SchemaOperation::drop_all)
    }

    /// An operation would wait for the locks of a transaction of its own thread.
    fn refuse_open_transaction(&self, operation: &'static str) -> Result<()> {
        let holders = self.pool()?.holders().on_this_thread();
        match holders.is_empty() {
            true => Ok(()),
            false => Err(Details::TransactionOpen { app: self.id().into(), operation, holders }.into()),
        }
    }

    /// The application whose connections change the schema: this one, or one with
    /// [`Config::schema_url`](crate::Config::schema_url), which has to lead to the same database.
    fn schema_app(&self, at: SourceLocation) -> Result<SchemaApp<C>> {
        let invalid = |reason| Error::from(Details::InvalidConfig { app: self.id().into(), reason });
        let Some(options) = self.options().for_schema().transpose().map_err(invalid)? else {
            return Ok(SchemaApp { app: self.clone(), is_temporary: false });
        };
        let schema_app = SchemaApp { app: self.with_options(options), is_temporary: true };
        let database = |app: &Self| -> Result<Option<String>> {
            Ok(app.pool()?.acquire(at, false, None)?.managed().database.clone())
        };
        match (database(self)?, database(&schema_app)?) {
            (Some(own), Some(other)) if own != other => Err(invalid(format!(
                "`Config::schema_url` leads to the database `{}`, and the URL of the application to `{}`. Nothing was \
                 done. Correct one of them",
                phrase(other),
                phrase(own)
            ))),
            _ => Ok(schema_app),
        }
    }

    /// A schema operation uses its own connection, without the `search_path` of the scope. Inside a tenant's scope it
    /// would change the default schema.
    fn refuse_search_path(&self, operation: &str, at: SourceLocation) -> Result<()> {
        if !context::has_search_path(self.id()) {
            return Ok(());
        }
        let reason = format!(
            "`{operation}` at {at} is inside of a scope with a `search_path`, which holds for the statements of its session only, \
             so `{operation}` would mean another schema. Nothing was done. Call it outside of the scope; for the schema of a tenant \
             call it on an application whose connections have that `search_path`, by `Config::connection_init_sql`"
        );
        Err(Details::InvalidConfig { app: self.id().into(), reason }.into())
    }

    /// The program's migrations, in the order of their versions.
    pub(crate) fn known_migrations(&self) -> Result<Vec<KnownMigration<C>>> {
        let kind = self.options().target.kind;
        let read = || -> migration::Result<Option<Vec<KnownMigration<C>>>> {
            let Some(migrations) = self.migration_set().migrations(kind).transpose()? else { return Ok(None) };
            let known = migrations.into_iter().map(|migration| KnownMigration {
                version: migration.name().version().to_string(),
                name: migration.name().to_string(),
                in_transaction: migration.metadata().run_in_transaction(),
                migration,
            });
            Ok(Some(known.collect()))
        };
        let known = catch_failure(read).map_err(|failure| {
            Error::from(Details::InvalidConfig {
                app: self.id().into(),
                reason: format!("the migrations cannot be read: {}", failure.message),
            })
        })?;
        let mut known =
            known.ok_or_else(|| Error::from(Details::NoMigrations { app: self.id().into(), backend: kind.name() }))?;
        known.sort_unstable_by(|a, b| a.version.cmp(&b.version));
        Ok(known)
    }

    /// The applied versions, the newest first. On PostgreSQL the queries run in one transaction, because a pooler may
    /// use another session of the server for each transaction.
    fn applied_migrations(&self, pooled: &mut CheckedOut<C>) -> QueryResult<Vec<String>> {
        let kind = self.options().target.kind;
        let conn = pooled.conn();
        if kind != DatabaseKind::Postgres || self.options().transactions.is_nested() {
            let snapshot = ConnectionSnapshot::from_rows(conn.texts(kind.texts().snapshot_query)?);
            return applied_versions(conn, kind, &snapshot);
        }
        conn.begin_with(BEGIN)?;
        let snapshot = ConnectionSnapshot::from_rows(conn.texts(kind.texts().snapshot_query)?);
        let applied = applied_versions(conn, kind, &snapshot)?;
        conn.leave_with("COMMIT")?;
        Ok(applied)
    }
}

/// The versions in the bookkeeping table of the application's own schema, the newest first.
///
/// Diesel's own query first creates the table if it does not exist. On MySQL this commits the open transaction even if
/// the table exists.
fn applied_versions<C: SessionConnection>(
    conn: &mut C,
    kind: DatabaseKind,
    snapshot: &ConnectionSnapshot,
) -> QueryResult<Vec<String>> {
    let Some(schema) = snapshot.schema() else { return Ok(Vec::new()) };
    if conn.texts(&kind.dialect().bookkeeping_table_query(schema))?.is_empty() {
        return Ok(Vec::new());
    }
    let table = kind.bookkeeping_table(Some(schema));
    let versions = conn.texts(&format!("SELECT version AS value FROM {table} ORDER BY version DESC"))?;
    Ok(versions.into_iter().flatten().collect())
}
