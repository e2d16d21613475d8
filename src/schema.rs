//! The schema: what migrations create and drop, one program at a time.
//!
//! Everything happens on one connection of the pool, under a lock that every other `create_all` and `drop_all` of this crate
//! asks for. The lock is polled, never waited for inside the server: PostgreSQL would count the waiting statement among those
//! that `CREATE INDEX CONCURRENTLY` has to wait for.

use std::collections::HashSet;
use std::fmt;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::time::{Duration, Instant};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{self, Migration, MigrationSource};
use diesel::result::QueryResult;
use diesel_migrations::MigrationError;

use crate::app::App;
use crate::backend::Kind;
use crate::connection::SessionConnection;
use crate::database::PerBackend;
use crate::error::{Error, Place, Result};
use crate::panic_message;
use crate::pool::{Lease, Permit};

/// How long a schema operation waits for another session's locks where the configuration does not say.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it waits for another `create_all` or `drop_all` to finish.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// What `diesel_migrations` says, in a type it does not export, of a missing and of an empty `down.sql`.
const NO_WAY_BACK: [&str; 2] = ["Missing `down.sql`", "run an empty migration"];

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
        write!(f, "app `{}`: {} failed at migration {}: {}. ", self.app, self.operation, self.migration, self.message)?;
        if self.left_behind.is_empty() {
            f.write_str("Nothing of it remains. ")?;
        } else {
            write!(
                f,
                "The database keeps what it had done of it: {}. Undo that by hand, as the migration would fail on it the next time. ",
                self.left_behind.join(", ")
            )?;
        }
        if !self.done.is_empty() {
            write!(f, "Done before it, and kept: {}. ", self.done.join(", "))?;
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
    /// [`Config::lock_timeout`](crate::Config::lock_timeout), 5 s by default, and then the schema is as it was.
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
        lease.give_back();
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
        let applied = conn.applied_migrations().map_err(|error| unexpected(error, at))?;
        Ok(applied.iter().map(ToString::to_string).collect())
    }
}

/// A schema operation under way: one connection, the lock held on it, and what has been done so far.
struct Change<'a, C: SessionConnection> {
    app: &'a App<C>,
    operation: &'static str,
    at: Place,
    kind: Kind,
    migrations: Migrations<C>,
    lease: Lease<C>,
    /// SQLite's writers of this process.
    _turn: Option<Permit>,
    lock_timeout: Duration,
    started: Instant,
    done: Vec<String>,
}

impl<'a, C: SessionConnection> Change<'a, C> {
    fn start(app: &'a App<C>, operation: &'static str, at: Place) -> Result<Self> {
        let mut migrations = app.known_migrations()?;
        migrations.sort_by_cached_key(|migration| version(&**migration));
        let pool = app.pool()?;
        let mine = pool.holders().on_this_thread();
        if !mine.is_empty() {
            return Err(Error::TransactionOpen { app: app.id().into(), operation, holders: mine });
        }
        let lease = pool.acquire(at, false, None)?;
        let turn = pool.turn_to_write(at, None)?;
        let spec = app.spec();
        let mut change = Change {
            app,
            operation,
            at,
            kind: spec.target.kind,
            migrations,
            lease,
            _turn: turn,
            lock_timeout: spec.config.lock_timeout.unwrap_or(LOCK_TIMEOUT),
            started: Instant::now(),
            done: Vec::new(),
        };
        // Until it is finished in order: with the connection, whatever it has locked goes too.
        change.lease.doom();
        change.lock()?;
        let limit = change.kind.lock_limit(change.lock_timeout);
        change.send(&limit)?;
        Ok(change)
    }

    /// Waits for other schema operations, of this process and of others.
    fn lock(&mut self) -> Result<()> {
        let Some(sql) = self.kind.try_lock_schema(&self.app.spec().target.database) else { return Ok(()) };
        let deadline = Instant::now() + TURN_TIMEOUT;
        let mut pause = Duration::from_millis(5);
        loop {
            let answer = self.lease.conn().texts(&sql).map_err(|error| Error::from_query(error, self.at))?;
            if answer.first().and_then(Option::as_deref) == Some("1") {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::LockTimeout {
                    app: self.app.id().into(),
                    operation: self.operation,
                    waited: TURN_TIMEOUT,
                    message: "another create_all or drop_all is at work on this database".into(),
                    left: "Nothing was changed.".into(),
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn create(&mut self) -> Result<()> {
        if self.kind == Kind::Sqlite {
            return self.create_one_by_one();
        }
        let applied = self.applied_after_setup()?;
        for index in 0..self.migrations.len() {
            if !applied.contains(&version(&*self.migrations[index])) {
                self.apply(index)?;
            }
        }
        Ok(())
    }

    /// SQLite has no lock but that of writing: each migration is looked for and applied in one transaction.
    fn create_one_by_one(&mut self) -> Result<()> {
        loop {
            self.begin_to_write()?;
            let applied = self.applied_after_setup()?;
            let next = (0..self.migrations.len()).find(|&index| !applied.contains(&version(&*self.migrations[index])));
            let Some(index) = next else {
                return self.commit();
            };
            if self.migrations[index].metadata().run_in_transaction() {
                self.apply(index)?;
                self.commit()?;
            } else {
                self.commit()?;
                self.apply(index)?;
            }
        }
    }

    fn apply(&mut self, index: usize) -> Result<()> {
        let before = self.inventory(index);
        let migration = &self.migrations[index];
        let conn = self.lease.conn();
        let outcome = caught(|| conn.run_migration(&**migration).map(drop));
        self.lease.schema_changed();
        match outcome {
            Ok(()) => {
                self.done.push(version(&*self.migrations[index]));
                Ok(())
            }
            Err(message) => Err(self.failed(index, message, &before)),
        }
    }

    fn drop_everything(&mut self) -> Result<()> {
        let atomic_start = self.kind == Kind::Sqlite;
        if atomic_start {
            self.begin_to_write()?;
        }
        let applied = self.app.applied(&mut self.lease, self.at)?;
        let order = self.order_of_reverting(&applied)?;
        let has_bookkeeping =
            self.lease.conn().texts(self.kind.has_bookkeeping()).map_err(|error| Error::from_query(error, self.at))?;
        if has_bookkeeping.is_empty() {
            return if atomic_start { self.commit() } else { Ok(()) };
        }
        let atomic = self.kind != Kind::Mysql
            && order.iter().all(|&index| self.migrations[index].metadata().run_in_transaction());
        match (self.kind, atomic) {
            (Kind::Mysql, _) => self.meet_blockers()?,
            (Kind::Postgres, true) => {
                self.lease.conn().begin_level().map_err(|error| Error::from_query(error, self.at))?
            }
            (Kind::Sqlite, false) => self.commit()?,
            _ => {}
        }
        for index in order {
            self.revert(index, atomic)?;
        }
        let bookkeeping = format!("DROP TABLE {}", self.kind.quote("__diesel_schema_migrations"));
        let dropped = self.lease.conn().batch_execute(&bookkeeping);
        self.lease.schema_changed();
        dropped.map_err(|error| self.explain("the bookkeeping table", &error.to_string(), Vec::new(), atomic))?;
        if atomic { self.commit() } else { Ok(()) }
    }

    /// The applied migrations, the newest first; an error where one of them cannot be reverted.
    fn order_of_reverting(&self, applied: &[String]) -> Result<Vec<usize>> {
        let (mut order, mut unknown, mut irreversible) = (Vec::new(), Vec::new(), Vec::new());
        for applied in applied {
            match self.migrations.iter().position(|migration| version(&**migration) == *applied) {
                None => unknown.push(applied.clone()),
                Some(index) if has_no_way_back(&*self.migrations[index]) => {
                    irreversible.push(self.migrations[index].name().to_string())
                }
                Some(index) => order.push(index),
            }
        }
        if unknown.is_empty() && irreversible.is_empty() {
            Ok(order)
        } else {
            Err(Error::NotReversible { app: self.app.id().into(), unknown, irreversible })
        }
    }

    /// MySQL commits each DDL statement, so it is met before the first one whether another session is in the way.
    fn meet_blockers(&mut self) -> Result<()> {
        let kind = self.kind;
        let tables = self.lease.conn().texts(kind.tables()).map_err(|error| Error::from_query(error, self.at))?;
        let list: Vec<String> = tables.iter().flatten().map(|table| format!("{} WRITE", kind.quote(table))).collect();
        if list.is_empty() {
            return Ok(());
        }
        let locked = self.lease.conn().batch_execute(&format!("LOCK TABLES {}", list.join(", ")));
        locked.map_err(|error| self.explain("locking all tables", &error.to_string(), Vec::new(), false))?;
        self.send("UNLOCK TABLES")
    }

    fn revert(&mut self, index: usize, atomic: bool) -> Result<()> {
        let before = self.inventory(index);
        let migration = &self.migrations[index];
        let conn = self.lease.conn();
        let outcome = caught(|| conn.revert_migration(&**migration).map(drop));
        self.lease.schema_changed();
        match outcome {
            Ok(()) => {
                self.done.push(version(&*self.migrations[index]));
                Ok(())
            }
            Err(message) => {
                if atomic {
                    // The transaction around all of them goes with the connection.
                    self.done.clear();
                }
                Err(self.failed(index, message, &before))
            }
        }
    }

    fn failed(&mut self, index: usize, message: String, before: &[Option<String>]) -> Error {
        let left_behind = difference(before, &self.inventory(index));
        let name = self.migrations[index].name().to_string();
        self.explain(&name, &message, left_behind, false)
    }

    /// What the schema consists of; nothing where a failure of that migration leaves nothing behind.
    fn inventory(&mut self, index: usize) -> Vec<Option<String>> {
        if self.kind != Kind::Mysql && self.migrations[index].metadata().run_in_transaction() {
            return Vec::new();
        }
        self.lease.conn().texts(self.kind.inventory()).unwrap_or_default()
    }

    /// A failure as an error: a lock that was not to be had, or the migration's own.
    fn explain(&mut self, migration: &str, message: &str, left_behind: Vec<String>, atomic: bool) -> Error {
        if atomic {
            self.done.clear();
        }
        let message = message.trim_end().replace('\n', " ");
        if self.kind.is_lock_timeout(&message) {
            let left = match (self.done.is_empty(), left_behind.is_empty()) {
                (true, true) => "The schema is as it was.".to_owned(),
                _ => format!(
                    "Done before it, and kept: {}. Left of {migration}: {}.",
                    list(&self.done),
                    list(&left_behind)
                ),
            };
            return Error::LockTimeout {
                app: self.app.id().into(),
                operation: self.operation,
                waited: self.started.elapsed(),
                message,
                left,
            };
        }
        Error::Migration(Box::new(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: migration.into(),
            message,
            done: self.done.clone(),
            left_behind,
        }))
    }

    fn begin_to_write(&mut self) -> Result<()> {
        let begun = self.lease.conn().begin_with("BEGIN IMMEDIATE");
        begun.map_err(|error| self.explain("the beginning", &error.to_string(), Vec::new(), false))
    }

    fn commit(&mut self) -> Result<()> {
        let committed = self.lease.conn().commit_level();
        committed.map_err(|error| self.explain("the commit", &error.to_string(), Vec::new(), true))
    }

    fn applied_after_setup(&mut self) -> Result<HashSet<String>> {
        let at = self.at;
        let applied = self.lease.conn().applied_migrations().map_err(|error| unexpected(error, at))?;
        Ok(applied.iter().map(ToString::to_string).collect())
    }

    fn send(&mut self, sql: &str) -> Result<()> {
        self.lease.conn().batch_execute(sql).map_err(|error| Error::from_query(error, self.at))
    }

    /// Gives the connection back as it was; after an error it is closed.
    fn finish(mut self, outcome: Result<()>) -> Result<Vec<String>> {
        let restored = outcome.is_ok() && {
            let spec = self.app.spec();
            let unlock = self.kind.unlock_schema(&spec.target.database);
            let limit = self.kind.lock_limit_of(&spec.config);
            let sound = self.lease.conn().depth() == Some(0);
            sound
                && unlock.is_none_or(|sql| self.lease.conn().texts(&sql).is_ok())
                && self.lease.conn().batch_execute(&limit).is_ok()
        };
        self.lease.live().doomed = !restored;
        self.lease.live().witness.take();
        self.lease.give_back();
        outcome.map(|()| self.done)
    }
}

/// Stands for a connection when a migration is only asked whether it has a way back.
struct DryRun;

impl SimpleConnection for DryRun {
    fn batch_execute(&mut self, _: &str) -> QueryResult<()> {
        Ok(())
    }
}

impl<DB: Backend> BoxableConnection<DB> for DryRun {
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

/// Whether a migration says that it cannot be reverted. One that is code of the program's own may not be able to tell without
/// a connection; then it is taken at its word when its turn comes.
fn has_no_way_back<DB: Backend>(migration: &dyn Migration<DB>) -> bool {
    let asked = catch_unwind(AssertUnwindSafe(|| migration.revert(&mut DryRun)));
    matches!(asked, Ok(Err(error)) if error.downcast_ref::<MigrationError>().is_some_and(|error| matches!(error, MigrationError::NoMigrationRevertFile))
        || NO_WAY_BACK.iter().any(|text| error.to_string().contains(text)))
}

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

/// What one list has and the other has not, with its sign.
fn difference(before: &[Option<String>], after: &[Option<String>]) -> Vec<String> {
    let (before, after): (HashSet<_>, HashSet<_>) =
        (before.iter().flatten().collect(), after.iter().flatten().collect());
    let mut changes: Vec<String> = after.difference(&before).map(|name| format!("+{name}")).collect();
    changes.extend(before.difference(&after).map(|name| format!("-{name}")));
    changes.sort();
    changes
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}
