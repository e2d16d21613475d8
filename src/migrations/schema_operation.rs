//! One running `create_all` or `drop_all`.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use diesel::QueryResult;
use diesel::migration::CREATE_MIGRATIONS_TABLE;
use diesel::result::Error as DieselError;

use super::migration_connection::MigrationConnection;
use super::recording_connection::{EMPTY_FILE, ends_its_transaction};
use super::schema_lock::Unlocked;
use super::step_failure::{Step, StepFailure, catch_failure, difference, list};
use super::{KnownMigration, applied_versions};
use crate::app::App;
use crate::connection::SessionConnection;
use crate::dialect::{BeginOptions, ConnectionSnapshot, is_connection_lost};
use crate::error::{Details, Error, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::{CheckedOut, OuterTransaction, SqlSource, WritePermit};
use crate::wording::{log_line, phrase};

/// The longest wait of a schema operation for another session's locks, unless the configuration sets a limit.
const DEFAULT_LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The names of the columns and indexes of a schema. The difference of two inventories shows the remains of a failed
/// migration.
pub(super) type Inventory = Vec<Option<String>>;

/// A `create_all` or `drop_all`, with its connection, its lock and its progress.
///
/// On PostgreSQL the connection is in a transaction from the lock to the unlock, because a commit and the next `BEGIN`
/// are one message. So a pooler in transaction mode never gives the server's session, which holds the lock, to another
/// client. Only a migration that must not run in a transaction needs a connection without a pooler.
pub(super) struct SchemaOperation<'a, C: SessionConnection> {
    pub(super) app: &'a App<C>,
    pub(super) operation: &'static str,
    pub(super) at: SourceLocation,
    pub(super) kind: DatabaseKind,
    /// The program's migrations, in the order of their versions.
    pub(super) migrations: Vec<KnownMigration<C>>,
    /// `None` after the connection was lost.
    pub(super) pooled: Option<CheckedOut<C>>,
    /// The permit of SQLite's writers in this process.
    _write_permit: Option<WritePermit>,
    pub(super) lock_timeout: Duration,
    pub(super) started: Instant,
    /// The versions that were applied or reverted.
    pub(super) done: Vec<String>,
    /// The open transaction may have changed the schema.
    pub(super) changed: bool,
    pub(super) needs_lock: bool,
    pub(super) has_lock: bool,
    /// The state of the connection at its checkout, if the operation has set its limits for the session.
    pub(super) original: Option<ConnectionSnapshot>,
    /// The state of the connection that every migration finds.
    pub(super) baseline: ConnectionSnapshot,
    /// The value of `search_path` for reverting a migration.
    pub(super) revert_search_path: Option<String>,
    /// The inventory before the current migration, if its failure may leave something behind.
    pub(super) before: Option<Inventory>,
    /// The SQL of the current migration names the bookkeeping table.
    names_bookkeeping_table: bool,
}

impl<'a, C: SessionConnection> SchemaOperation<'a, C> {
    pub(super) fn start(
        app: &'a App<C>,
        operation: &'static str,
        at: SourceLocation,
        needs_lock: bool,
    ) -> Result<Self> {
        let mut migrations = app.known_migrations()?;
        let pool = app.pool()?;
        let pooled = pool.acquire(at, false, None)?;
        let write_permit = pooled.pool.acquire_write_permit(at, None)?;
        let options = app.options();
        let kind = options.target.kind;
        if operation == "drop_all" && kind != DatabaseKind::Mysql && !options.transactions.is_nested() {
            // The `COMMIT` or `ROLLBACK` of such a migration also ends the settings of the transaction, such as
            // `search_path`.
            for known in migrations.iter_mut().filter(|known| known.in_transaction) {
                known.in_transaction = !ends_its_transaction(&*known.migration, kind);
            }
        }
        let mut this = Self {
            app,
            operation,
            at,
            kind,
            migrations,
            pooled: Some(pooled),
            _write_permit: write_permit,
            lock_timeout: options.config.lock_timeout.unwrap_or(DEFAULT_LOCK_TIMEOUT),
            started: Instant::now(),
            done: Vec::new(),
            changed: false,
            needs_lock,
            has_lock: false,
            original: None,
            baseline: ConnectionSnapshot::default(),
            revert_search_path: None,
            before: None,
            names_bookkeeping_table: false,
        };
        // Unless the operation ends regularly, the pool closes the connection, which releases all its locks.
        this.pooled().close_at_checkin();
        let mut limits = this.kind.dialect().set_limits(this.lock_timeout);
        if this.is_chained() {
            this.refuse_pooler()?;
            limits = vec![this.kind.set_local_limits(this.lock_timeout)];
        } else {
            this.original = Some(this.snapshot()?);
        }
        this.lock()?;
        for limit in limits {
            this.send(&limit)?;
        }
        if let Some(outer) = app.options().transactions.outer() {
            let result = outer.begin(this.conn(), BeginOptions::plain(), None);
            this.check(result)?;
        }
        this.baseline = this.snapshot()?;
        Ok(this)
    }

    /// Whether the operation runs inside the outer transaction of a test, which is never committed.
    pub(super) fn is_nested(&self) -> bool {
        self.app.options().transactions.is_nested()
    }

    /// Whether the connection stays in a transaction between two migrations.
    pub(super) fn is_chained(&self) -> bool {
        self.kind == DatabaseKind::Postgres && !self.is_nested()
    }

    pub(super) fn pooled(&mut self) -> &mut CheckedOut<C> {
        self.pooled.as_mut().expect("nothing is sent after the connection was lost")
    }

    pub(super) fn conn(&mut self) -> &mut C {
        self.pooled().conn()
    }

    /// SQL that begins a transaction of PostgreSQL with the limits of the operation.
    pub(super) fn begin_sql(&self) -> String {
        self.kind.begin_with_limits(self.lock_timeout)
    }

    /// Diesel's transaction depth between two migrations.
    pub(super) fn base_depth(&self) -> u32 {
        u32::from(self.is_nested() || self.is_chained())
    }

    pub(super) fn depth(&mut self) -> Option<u32> {
        self.conn().depth()
    }

    /// Converts the result of a statement that belongs to no migration.
    pub(super) fn check<T>(&mut self, result: QueryResult<T>) -> Result<T> {
        result.map_err(|error| match is_connection_lost(&error) {
            true => self.connection_loss(Step::Own("a statement of its own"), error.into()),
            false => Error::from_query(error, self.at),
        })
    }

    pub(super) fn send(&mut self, sql: &str) -> Result<()> {
        let result = self.conn().batch_execute(sql);
        self.check(result)
    }

    pub(super) fn texts(&mut self, sql: &str) -> Result<Inventory> {
        let result = self.conn().texts(sql);
        self.check(result)
    }

    pub(super) fn snapshot(&mut self) -> Result<ConnectionSnapshot> {
        let query = self.kind.texts().snapshot_query;
        self.texts(query).map(ConnectionSnapshot::from_rows)
    }

    pub(super) fn applied_versions(&mut self, snapshot: &ConnectionSnapshot) -> Result<Vec<String>> {
        let kind = self.kind;
        let result = applied_versions(self.conn(), kind, snapshot);
        self.check(result)
    }

    /// Refuses the operation inside the outer transaction of a test, because MySQL commits before every change of the
    /// schema. A `create_all` without pending migrations is allowed.
    pub(super) fn refuse_nested(&mut self) -> Result<()> {
        let baseline = self.baseline.clone();
        let applied = self.applied_versions(&baseline)?;
        if self.applies() && self.migrations.iter().all(|known| applied.contains(&known.version)) {
            return Ok(());
        }
        let app = self.app.id().into();
        let cause = format!(
            "{} would be committed, as {} commits every change of the schema",
            self.operation,
            self.kind.name()
        );
        self.app.options().transactions.invalidate_outer(&cause, Some(self.at));
        Err(Details::TestInvalidated { app, cause, at: Some(self.at) }.into())
    }

    pub(super) fn create_all(&mut self) -> Result<()> {
        if self.kind == DatabaseKind::Mysql && self.is_nested() {
            return self.refuse_nested();
        }
        // SQLite has only its write lock, so there each transaction finds the next pending migration and applies it.
        let is_sqlite = self.kind == DatabaseKind::Sqlite;
        let mut applied = HashSet::new();
        loop {
            if is_sqlite {
                self.begin_write()?;
            }
            if is_sqlite || self.done.is_empty() {
                applied = self.applied_after_setup()?;
            }
            let is_pending = |version: &String| !applied.contains(version) && !self.done.contains(version);
            let Some(index) = self.migrations.iter().position(|known| is_pending(&known.version)) else {
                return if is_sqlite { self.commit() } else { Ok(()) };
            };
            if is_sqlite && !self.migrations[index].in_transaction {
                self.commit()?;
            }
            let outcome = self.run_step(index, true);
            outcome.map_err(|failure| self.failure(Step::Migration(index), failure))?;
        }
    }

    /// Whether the operation applies migrations. Otherwise it reverts them.
    pub(super) fn applies(&self) -> bool {
        self.operation == "create_all"
    }

    /// Applies or reverts a migration, in its own transaction or in the current one.
    pub(super) fn run_step(&mut self, index: usize, own_transaction: bool) -> Result<(), StepFailure> {
        let may_leave_something = self.kind == DatabaseKind::Mysql || !self.migrations[index].in_transaction;
        self.before = may_leave_something.then(|| self.inventory());
        self.announce_change();
        let begun = if own_transaction { self.begin_migration(index).map_err(StepFailure::from) } else { Ok(()) };
        let outcome = begun.and_then(|()| self.run_migration(index));
        self.announce_change();
        let outcome = outcome.and_then(|()| Ok(self.record(index, own_transaction)?));
        self.announce_change();
        outcome?;
        self.before = None;
        self.done.push(self.migrations[index].version.clone());
        Ok(())
    }

    /// The inventory of the schema. It is empty if the server does not answer.
    pub(super) fn inventory(&mut self) -> Inventory {
        let query = self.kind.texts().inventory;
        self.conn().texts(query).unwrap_or_default()
    }

    /// Begins the transaction of a migration, or leaves the current one if the migration must not run in a transaction.
    fn begin_migration(&mut self, index: usize) -> QueryResult<()> {
        match (self.is_chained(), self.migrations[index].in_transaction) {
            (true, true) => Ok(()),
            (true, false) => self.leave_chain(),
            (false, true) if self.depth() == Some(self.base_depth()) => self.begin_level(),
            (false, _) => Ok(()),
        }
    }

    /// Leaves the transaction, and sets the limits for the session until the operation ends.
    fn leave_chain(&mut self) -> QueryResult<()> {
        self.conn().leave_with("COMMIT")?;
        let limits = self.kind.dialect().set_limits(self.lock_timeout);
        limits.iter().try_for_each(|limit| self.conn().batch_execute(limit))
    }

    pub(super) fn begin_level(&mut self) -> QueryResult<()> {
        match self.kind {
            DatabaseKind::Sqlite if !self.is_nested() => self.conn().begin_with("BEGIN IMMEDIATE"),
            _ => self.conn().begin_level(),
        }
    }

    fn run_migration(&mut self, index: usize) -> Result<(), StepFailure> {
        let (kind, applies) = (self.kind, self.applies());
        if let Some(path) = &self.revert_search_path {
            let local = if self.migrations[index].in_transaction { "LOCAL " } else { "" };
            let set = format!("SET {local}search_path = {path}");
            self.conn().batch_execute(&set)?;
        }
        let others = if applies { Vec::new() } else { self.objects_of_other_databases()? };
        let migration = &*self.migrations[index].migration;
        let managed = self.pooled.as_mut().expect("nothing is sent after the connection was lost").managed();
        managed.observer.read_statements(SqlSource::Raw);
        let mut connection = MigrationConnection {
            conn: managed.take_out(),
            kind,
            last_error: None,
            sent: Vec::new(),
            inventory_before_end: None,
        };
        let result = catch_failure(|| match applies {
            true => migration.run(&mut connection),
            false => migration.revert(&mut connection),
        });
        let MigrationConnection { conn, last_error, sent, inventory_before_end, .. } = connection;
        managed.put_back(conn);
        managed.observer.stop_reading();
        self.names_bookkeeping_table = sent.iter().any(|sql| sql.to_lowercase().contains("__diesel_schema_migrations"));
        if inventory_before_end.is_some() {
            // The migration has ended its transaction, and so committed its earlier changes.
            self.before = inventory_before_end;
            if kind == DatabaseKind::Sqlite && self.migrations[index].in_transaction && !self.is_nested() {
                // The migration is recorded in a new transaction. This fails if it has begun one itself.
                let _ = self.conn().batch_execute("BEGIN IMMEDIATE");
            }
        }
        match result {
            // Diesel reports an empty file as an error.
            Err(failure) if applies && failure.message.contains(EMPTY_FILE) => Ok(()),
            Err(failure) => Err(failure.or_details_of(last_error)),
            Ok(()) => self.refuse_changes_of_other_databases(&others, &sent),
        }
    }

    /// The objects of SQLite's temporary and attached databases. An unqualified name means one of these objects if the
    /// main database has no object with this name.
    fn objects_of_other_databases(&mut self) -> QueryResult<Vec<(String, Inventory)>> {
        let Some(query) = self.kind.other_databases() else { return Ok(Vec::new()) };
        let kind = self.kind;
        let conn = self.conn();
        let mut databases = Vec::new();
        for name in conn.texts(query)?.into_iter().flatten() {
            let objects = conn.texts(&kind.objects_of(&name))?;
            databases.push((name, objects));
        }
        Ok(databases)
    }

    /// Returns an error if a migration has changed another database that its SQL does not name.
    fn refuse_changes_of_other_databases(
        &mut self,
        before: &[(String, Inventory)],
        sent: &[String],
    ) -> Result<(), StepFailure> {
        if before.is_empty() {
            return Ok(());
        }
        let now = self.objects_of_other_databases()?;
        for ((database, before), (_, now)) in before.iter().zip(&now) {
            let named = format!("{}.", database.to_lowercase());
            let is_named = sent.iter().any(|sql| sql.to_lowercase().replace(['"', '`', '[', ']'], "").contains(&named));
            if before != now && !is_named {
                let message = format!(
                    "it would change the database `{database}` of the connection, which its SQL does not name: {}",
                    list(&difference(before, now))
                );
                return Err(StepFailure::new(message));
            }
        }
        Ok(())
    }

    /// Restores the connection's settings and records the migration as applied or reverted.
    fn record(&mut self, index: usize, commit: bool) -> QueryResult<()> {
        let (kind, in_transaction) = (self.kind, self.migrations[index].in_transaction);
        let begin = self.begin_sql();
        if self.is_chained() && in_transaction {
            if self.depth() == Some(0) {
                // The migration has ended its transaction, so its changes are committed.
                self.conn().begin_with(&begin)?;
            }
            // Deferred constraints and triggers must still run with the migration's settings.
            self.conn().batch_execute("SET CONSTRAINTS ALL IMMEDIATE")?;
            if !commit {
                self.restore_deferred_constraints()?;
            }
        }
        let now = ConnectionSnapshot::from_rows(self.conn().texts(kind.texts().snapshot_query)?);
        for sql in kind.dialect().restore(&self.baseline, &now) {
            self.conn().batch_execute(&sql)?;
        }
        let table = kind.bookkeeping_table(self.baseline.schema());
        let version = kind.literal(&self.migrations[index].version);
        let equals = if kind == DatabaseKind::Postgres { "OPERATOR(pg_catalog.=)" } else { "=" };
        let record = match self.applies() {
            true => format!("INSERT INTO {table} (version) VALUES ({version})"),
            false => format!("DELETE FROM {table} WHERE version {equals} {version}"),
        };
        if kind == DatabaseKind::Mysql && self.names_bookkeeping_table {
            // A temporary table hides the bookkeeping table, even if the name is qualified with the database.
            self.conn().batch_execute(&format!("DROP TEMPORARY TABLE IF EXISTS {table}"))?;
        }
        match (self.is_chained(), in_transaction) {
            (true, true) if commit => self.conn().batch_execute(&format!("{record}; COMMIT; {begin}")),
            (true, false) => {
                self.conn().batch_execute(&record)?;
                if self.depth() != Some(0) {
                    self.conn().leave_with("COMMIT")?;
                }
                self.conn().begin_with(&begin)
            }
            (is_chained, _) => {
                self.conn().batch_execute(&record)?;
                if commit && in_transaction && !is_chained { self.conn().commit_level() } else { Ok(()) }
            }
        }
    }

    /// Restores the initial modes of constraints for the next migration that is reverted in the same transaction.
    fn restore_deferred_constraints(&mut self) -> QueryResult<()> {
        let query = self.kind.deferred_constraints(self.baseline.schema().unwrap_or_default());
        let names: Vec<String> = self.conn().texts(&query)?.into_iter().flatten().collect();
        match names.is_empty() {
            true => Ok(()),
            false => self.conn().batch_execute(&format!("SET CONSTRAINTS {} DEFERRED", names.join(", "))),
        }
    }

    /// Advances the schema version of the database, so that no connection of an older version is checked out again. The
    /// operation calls this before a change, for checkouts while the change takes effect, and after it, for connections
    /// that were opened in between.
    pub(super) fn announce_change(&mut self) {
        self.changed = true;
        if let Some(pooled) = &mut self.pooled {
            pooled.note_schema_change();
        }
    }

    /// Rolls back the open transaction. On PostgreSQL the next transaction begins.
    pub(super) fn roll_back(&mut self) -> QueryResult<()> {
        let (base_depth, begin) = (self.base_depth(), self.begin_sql());
        if self.is_chained() {
            return match self.depth() {
                Some(0) => self.conn().begin_with(&begin),
                Some(_) => self.conn().batch_execute(&format!("ROLLBACK; {begin}")),
                None => Err(DieselError::BrokenTransactionManager),
            };
        }
        while self.depth().ok_or(DieselError::BrokenTransactionManager)? > base_depth {
            self.conn().rollback_level()?;
        }
        Ok(())
    }

    /// The versions that were applied or reverted and stay so. Inside the outer transaction of a test, a failed
    /// operation is rolled back.
    pub(super) fn kept_versions(&self) -> Vec<String> {
        if self.is_nested() { Vec::new() } else { self.done.clone() }
    }

    pub(super) fn begin_write(&mut self) -> Result<()> {
        let result = self.begin_level();
        result.map_err(|error| self.failure(Step::Own("the beginning of a transaction"), error.into()))
    }

    pub(super) fn commit(&mut self) -> Result<()> {
        let result = self.conn().commit_level();
        // The change takes effect only now.
        if self.changed {
            self.announce_change();
        }
        result.map_err(|error| self.failure(Step::Own("the commit"), error.into()))
    }

    /// The applied versions. The function creates the bookkeeping table if it does not exist.
    fn applied_after_setup(&mut self) -> Result<HashSet<String>> {
        let baseline = self.baseline.clone();
        let exists = match baseline.schema() {
            Some(schema) => !self.texts(&self.kind.dialect().bookkeeping_table_query(schema))?.is_empty(),
            None => false,
        };
        if !exists {
            let table = match self.kind {
                // SQLite creates an unqualified table in the main database, even if a temporary table has the same
                // name. `sqlite_master` then has the same text as with Diesel.
                DatabaseKind::Sqlite => "__diesel_schema_migrations".to_owned(),
                kind => kind.bookkeeping_table(baseline.schema()),
            };
            self.send(&CREATE_MIGRATIONS_TABLE.replacen("__diesel_schema_migrations", &table, 1))?;
            if self.is_chained() {
                self.send(&format!("COMMIT; {}", self.begin_sql()))?;
            }
        }
        Ok(self.applied_versions(&baseline)?.into_iter().collect())
    }

    /// Ends the nested transaction: with a commit after success, and with a rollback after an error.
    fn end_nested(&mut self, outer: &dyn OuterTransaction<C>, outcome: Result<()>) -> Result<()> {
        if self.pooled.is_none() {
            return outcome;
        }
        let committed = outcome.and_then(|()| {
            let result = outer.commit(self.conn());
            result.map_err(|error| Error::from_query(error, self.at))
        });
        if committed.is_err() {
            self.done.clear();
            outer.undo(self.conn());
        }
        committed
    }

    /// Calls `work`, releases the lock and checks the connection in. The pool closes the connection after an error.
    pub(super) fn run(mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<Vec<String>> {
        let outcome = work(&mut self);
        let mut outcome = match self.app.options().transactions.outer() {
            Some(outer) => self.end_nested(outer, outcome),
            None => outcome,
        };
        if self.pooled.is_some() {
            let unlocked = self.unlock();
            if let Ok(Unlocked::NotHeld(process)) = &unlocked {
                outcome = self.after_lost_lock(process.as_deref(), outcome);
            }
            let restored = (outcome.is_ok() || self.is_nested())
                && matches!(unlocked, Ok(Unlocked::Released))
                && self.depth() == Some(0)
                && self.restore_limits();
            let managed = self.pooled().managed();
            managed.closes_at_checkin = !restored;
            managed.observer.take();
        }
        drop(self.pooled.take());
        let (app, done) = (self.app.id(), phrase(list(&self.done)));
        match &outcome {
            Ok(()) if self.needs_lock => {
                log_line!(info, "diesel_session::schema", "app `{app}`: {} is done: {done}", self.operation);
            }
            // The test kit fills a database.
            Ok(()) => {}
            Err(error) => log_line!(warn, "diesel_session::schema", "{error:#}"),
        }
        outcome.map(|()| self.done)
    }

    /// The outcome of an operation whose session did not hold the lock at the end. `process` is the server's process of
    /// this session.
    fn after_lost_lock(&self, process: Option<&str>, outcome: Result<()>) -> Result<()> {
        let locked = self.baseline.process();
        let lost = match locked {
            locked if locked == process => {
                "Its lock was gone at the end, because a migration has released it.".to_owned()
            }
            None => "Its lock stays with the pooler until that closes its connection.".to_owned(),
            Some(process) => format!(
                "Its lock stays with the pooler until that closes its connection to the server's process {process}."
            ),
        };
        match outcome {
            Ok(()) => Err(self.pooler_error(format!("{lost} Done: {}.", phrase(list(&self.done))))),
            Err(error) => {
                log_line!(warn, "diesel_session::schema", "app `{}`: {}: {lost}", self.app.id(), self.operation);
                Err(error.without_lock())
            }
        }
    }

    /// Restores the limits of the session, if the operation has changed them.
    fn restore_limits(&mut self) -> bool {
        let Some(original) = self.original.take() else { return true };
        let limits = self.kind.dialect().restore_limits(&original);
        limits.iter().all(|limit| self.conn().batch_execute(limit).is_ok())
    }
}
