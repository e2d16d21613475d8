//! The schema: what migrations create and drop, one program at a time.
//!
//! Everything happens on one connection of the pool, under a lock that every other `create_all` and `drop_all` of this crate
//! asks for. The lock is polled, never waited for inside the server: PostgreSQL would count the waiting statement among those
//! that `CREATE INDEX CONCURRENTLY` has to wait for.

mod change;
mod channel;
mod reversal;
mod script;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};

use diesel::migration::{self, Migration, MigrationSource};
use diesel::result::{Error as DieselError, QueryResult};
use diesel_migrations::EmbeddedMigrations;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::context;
use crate::dialect::{BEGIN, State, is_connection_lost};
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::panic::panic_message;
use crate::pool::CheckedOut;
use change::Change;
use channel::Said;
pub(crate) use script::{Script, extensions, leaves_schema, transaction};

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

/// A program's migrations, whatever their type.
pub(crate) trait MigrationSet<C: SessionConnection>: Send + Sync {
    /// Those for one kind of database, if there are any.
    fn migrations(&self, kind: DatabaseKind) -> Option<migration::Result<Migrations<C>>>;
}

type Migrations<C> = Vec<Box<dyn Migration<<C as diesel::Connection>::Backend>>>;

/// A migration, with what it says of itself: that is the program's own code, which is asked once.
pub(crate) struct Known<C: SessionConnection> {
    pub(crate) migration: Box<dyn Migration<<C as diesel::Connection>::Backend>>,
    pub(crate) version: String,
    pub(crate) name: String,
    pub(crate) in_transaction: bool,
}

/// One set of migrations per kind of database, for [`Database::per_backend`].
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

/// What a database object was given.
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

impl<C: SessionConnection> App<C> {
    /// Applies the pending migrations, in the order of their versions, and returns the versions applied. Of several programs
    /// and threads that call it at once, one applies and the others find nothing to do.
    ///
    /// Each migration runs without the application's [`statement_timeout`](crate::Config::statement_timeout), and with the
    /// settings, role and `search_path` that the connection had before the first one: what a migration sets for the session is
    /// put back before it is noted as applied. SQL without a statement is not sent.
    ///
    /// # Errors
    /// [`Error::Migration`]; [`Error::NoMigrations`]; [`Error::PooledConnection`]; [`Error::TransactionOpen`] while this thread has a transaction open on
    /// the application; [`Error::InvalidConfig`] inside of a scope with a [`search_path`](crate::Scope::search_path);
    /// [`Error::LockTimeout`]; what can go wrong with getting a connection.
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        self.create_all_at(Location::caller())
    }

    /// Reverts all applied migrations, the newest first, removes their bookkeeping table, and returns the versions reverted.
    ///
    /// It first makes sure that every applied version is known and has a way back: a `down.sql` without a statement is none.
    /// Another session's lock is waited for up to [`Config::lock_timeout`](crate::Config::lock_timeout), 5 s by default, and
    /// then the schema is as it was and the error names who was in the way.
    ///
    /// On PostgreSQL and SQLite everything is reverted in one transaction. Where that cannot be, each migration is reverted in
    /// a transaction of its own, as Diesel does it: if one of them does not run in a transaction or its SQL ends it (`COMMIT`), and on PostgreSQL if the
    /// schema is so large that one transaction would need more locks than the server has (`max_locks_per_transaction`).
    ///
    /// On PostgreSQL only the application's own schema counts, which is the first one of `search_path`. If that has no
    /// bookkeeping table there is nothing to revert, and if it does not exist `drop_all` is an error. While a migration is
    /// reverted, `search_path` is the own schema and those later ones in which everything belongs to extensions, so a name
    /// without a schema never means a table of another schema; a `down.sql` that needs something there names its schema.
    ///
    /// It asks for no confirmation. It logs a warning with the database and the caller's place before it reverts anything, and
    /// [`Config::protect_schema`](crate::Config::protect_schema) makes it refuse.
    ///
    /// No connection of before is checked out again, by any application of this process on that database. A transaction that is open
    /// meanwhile may get one error, such as PostgreSQL's `cached plan must not change result type`.
    ///
    /// # Errors
    /// [`Error::NotReversible`], [`Error::SchemaProtected`], and those of [`create_all`](Self::create_all).
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        self.drop_all_at(Location::caller())
    }

    /// The program's migrations and those the database has, in the order of their versions. It changes nothing.
    ///
    /// # Errors
    /// [`Error::NoMigrations`]; [`Error::Query`]; [`Error::InvalidConfig`] inside of a scope with a
    /// [`search_path`](crate::Scope::search_path); what can go wrong with getting a connection.
    #[track_caller]
    pub fn migrations(&self) -> Result<Vec<MigrationStatus>> {
        let at = Location::caller();
        self.refuse_search_path("migrations", at)?;
        let known = self.known_migrations()?;
        let mut pooled = self.pool()?.acquire(at, false, None)?;
        let applied = self.applied_alone(&mut pooled);
        let applied = applied.map_err(|error| match is_connection_lost(&error) {
            true => Error::lost(self.id(), error, false, at),
            false => Error::from_query(error, at),
        });
        if applied.is_err() {
            pooled.doom();
        }
        drop(pooled);
        let applied = applied?;
        let versions: HashSet<&str> = known.iter().map(|known| &*known.version).collect();
        let unknown = applied.iter().filter(|version| !versions.contains(version.as_str()));
        let mut all: Vec<MigrationStatus> = unknown
            .map(|version| MigrationStatus {
                version: version.clone(),
                name: version.clone(),
                applied: true,
                known: false,
            })
            .collect();
        all.extend(known.iter().map(|known| MigrationStatus {
            applied: applied.contains(&known.version),
            version: known.version.clone(),
            name: known.name.clone(),
            known: true,
        }));
        all.sort_by(|a, b| a.version.cmp(&b.version));
        Ok(all)
    }

    pub(crate) fn create_all_at(&self, at: Place) -> Result<Vec<String>> {
        self.refuse_search_path("create_all", at)?;
        let mut change = Change::start(self, "create_all", at)?;
        let outcome = change.create();
        change.finish(outcome)
    }

    pub(crate) fn drop_all_at(&self, at: Place) -> Result<Vec<String>> {
        self.may_be_dropped(at)?;
        self.refuse_search_path("drop_all", at)?;
        let mut change = Change::start(self, "drop_all", at)?;
        let outcome = change.drop_everything();
        change.finish(outcome)
    }

    /// A schema operation has a connection of its own. Inside of a tenant's scope it would change the
    /// schema of all others.
    fn refuse_search_path(&self, operation: &str, at: Place) -> Result<()> {
        if !context::has_search_path(self.id()) {
            return Ok(());
        }
        let reason = format!(
            "`{operation}` at {at} is inside of a scope with a `search_path`, which holds for the statements of its session only, \
             so `{operation}` would mean another schema. Nothing was done. Call it outside of the scope; for the schema of a tenant \
             call it on an application whose connections have that `search_path`, by `Config::on_connect`"
        );
        Err(Error::InvalidConfig { app: self.id().into(), reason })
    }

    fn may_be_dropped(&self, at: Place) -> Result<()> {
        let options = self.options();
        match options.config.protect_schema {
            true => Err(Error::SchemaProtected { app: self.id().into(), database: options.target.shown.clone(), at }),
            false => Ok(()),
        }
    }

    /// The program's migrations, in the order of their versions.
    fn known_migrations(&self) -> Result<Vec<Known<C>>> {
        let kind = self.options().target.kind;
        let read = || -> migration::Result<Option<Vec<Known<C>>>> {
            let Some(migrations) = self.migration_set().migrations(kind).transpose()? else { return Ok(None) };
            let known = migrations.into_iter().map(|migration| Known {
                version: migration.name().version().to_string(),
                name: migration.name().to_string(),
                in_transaction: migration.metadata().run_in_transaction(),
                migration,
            });
            Ok(Some(known.collect()))
        };
        let known = caught(read).map_err(|trouble| Error::InvalidConfig {
            app: self.id().into(),
            reason: format!("the migrations cannot be read: {}", trouble.message),
        })?;
        let mut known = known.ok_or_else(|| Error::NoMigrations { app: self.id().into(), backend: kind.name() })?;
        known.sort_by(|a, b| a.version.cmp(&b.version));
        Ok(known)
    }

    /// The applied versions, the newest first, without making the bookkeeping table. On PostgreSQL it is one transaction, as a
    /// pooler may give each transaction another session of the server.
    fn applied_alone(&self, pooled: &mut CheckedOut<C>) -> QueryResult<Vec<String>> {
        let kind = self.options().target.kind;
        let conn = pooled.conn();
        if kind != DatabaseKind::Postgres || self.options().pinned.is_some() {
            let state = State::read(conn.texts(kind.state())?);
            return applied(conn, kind, &state);
        }
        conn.begin_with(BEGIN)?;
        let state = State::read(conn.texts(kind.state())?);
        let applied = applied(conn, kind, &state)?;
        conn.leave_with("COMMIT")?;
        Ok(applied)
    }
}

/// The versions in the bookkeeping table of the application's own schema, the newest first. Diesel's own look at it makes the table
/// where there is none, which MySQL commits even where there is one.
fn applied<C: SessionConnection>(conn: &mut C, kind: DatabaseKind, state: &State) -> QueryResult<Vec<String>> {
    let Some(schema) = state.schema() else { return Ok(Vec::new()) };
    if conn.texts(&kind.has_bookkeeping(schema))?.is_empty() {
        return Ok(Vec::new());
    }
    let table = kind.bookkeeping(Some(schema));
    let versions = conn.texts(&format!("SELECT version AS value FROM {table} ORDER BY version DESC"))?;
    Ok(versions.into_iter().flatten().collect())
}

/// Why something that was tried did not succeed.
#[derive(Debug, Default)]
struct Trouble {
    message: String,
    /// The connection was lost.
    lost: bool,
    /// The server has no room for more locks.
    out_of_locks: bool,
}

impl Trouble {
    fn of_query(error: &DieselError) -> Self {
        let Said { more, lost, out_of_locks } = Said::of(error);
        Self { message: format!("{error}{more}"), lost, out_of_locks }
    }

    fn panicked(panic: &(dyn std::any::Any + Send), whose: &str) -> Self {
        Self { message: format!("{whose}: {}", panic_message(panic)), ..Self::default() }
    }
}

/// What went wrong, also of a panic. An error's text, type and drop are the program's own code, so they may panic too.
fn caught<T>(run: impl FnOnce() -> migration::Result<T>) -> Result<T, Trouble> {
    let error = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(panic) => return Err(Trouble::panicked(&*panic, "it panicked")),
    };
    let told = catch_unwind(AssertUnwindSafe(move || match error.downcast_ref::<DieselError>() {
        Some(error) => Trouble::of_query(error),
        None => Trouble { message: error.to_string(), ..Trouble::default() },
    }));
    Err(told.unwrap_or_else(|panic| Trouble::panicked(&*panic, "it failed, and the text of its error panicked")))
}
