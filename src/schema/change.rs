//! A `create_all` or `drop_all` under way.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::reversal::has_no_way_back;
use super::{MigrationFailure, Migrations, caught, unexpected, version};
use crate::app::App;
use crate::backend::{Beginning, Kind};
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::pool::{Lease, Permit};

/// How long a schema operation waits for another session's locks where the configuration does not say.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it waits for another `create_all` or `drop_all` to finish.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection, the lock held on it, and what has been done so far.
pub(super) struct Change<'a, C: SessionConnection> {
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
    /// Something may have been changed in the transaction that is open.
    changed: bool,
}

impl<'a, C: SessionConnection> Change<'a, C> {
    pub(super) fn start(app: &'a App<C>, operation: &'static str, at: Place) -> Result<Self> {
        let mut migrations = app.known_migrations()?;
        migrations.sort_by_cached_key(|migration| version(&**migration));
        let pool = app.pool()?;
        let mine = pool.holders().on_this_thread();
        if !mine.is_empty() {
            return Err(Error::TransactionOpen { app: app.id().into(), operation, holders: mine });
        }
        let lease = pool.acquire(at, false, None)?;
        let turn = lease.pool().turn_to_write(at, None)?;
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
            changed: false,
        };
        // Until it is finished in order: with the connection, whatever it has locked goes too.
        change.lease.doom();
        change.lock()?;
        let limit = change.kind.lock_limit(change.lock_timeout);
        change.send(&limit)?;
        if change.is_inside() {
            let begun = change.kind.begin_inside(change.lease.conn(), Beginning::plain(), None);
            begun.map_err(|error| Error::from_query(error, at))?;
        }
        Ok(change)
    }

    /// Whether everything is inside of a transaction that a test never commits.
    fn is_inside(&self) -> bool {
        self.app.spec().lane.is_some()
    }

    /// MySQL commits every change of the schema, and the look whether there is a bookkeeping table too.
    fn refuse_inside(&mut self) -> Result<()> {
        let applied = self.app.applied(&mut self.lease, self.at)?;
        let pending = self.migrations.iter().map(|migration| version(&**migration));
        let pending: Vec<String> = pending.filter(|version| !applied.contains(version)).collect();
        if self.operation == "create_all" && pending.is_empty() {
            return Ok(());
        }
        let app = self.app.id().into();
        let cause = format!(
            "{} would be committed, as {} commits every change of the schema",
            self.operation,
            self.kind.name()
        );
        if let Some(lane) = &self.app.spec().lane {
            lane.break_off(&cause, Some(self.at));
        }
        Err(Error::TestSpoiled { app, cause, at: Some(self.at) })
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
                    blockers: self.lease.blockers(&self.kind.schema_lock_holders(&self.app.spec().target.database)),
                    left: "Nothing was changed.".into(),
                });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    pub(super) fn create(&mut self) -> Result<()> {
        if self.kind == Kind::Mysql && self.is_inside() {
            return self.refuse_inside();
        }
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
        self.changes();
        let migration = &self.migrations[index];
        let conn = self.lease.conn();
        let outcome = caught(|| conn.run_migration(&**migration).map(drop));
        self.changes();
        match outcome {
            Ok(()) => {
                self.done.push(version(&*self.migrations[index]));
                Ok(())
            }
            Err(message) => Err(self.failed(index, message, &before)),
        }
    }

    pub(super) fn drop_everything(&mut self) -> Result<()> {
        if self.kind == Kind::Mysql && self.is_inside() {
            return self.refuse_inside();
        }
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
        self.changes();
        let dropped = self.lease.conn().batch_execute(&bookkeeping);
        self.changes();
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
        self.changes();
        let migration = &self.migrations[index];
        let conn = self.lease.conn();
        let outcome = caught(|| conn.revert_migration(&**migration).map(drop));
        self.changes();
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

    /// Before a change, so that no connection of the old schema is lent while it takes effect, and after it, for those that were
    /// opened meanwhile.
    fn changes(&mut self) {
        self.changed = true;
        self.lease.schema_changes();
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
                blockers: self.lease.blockers(&self.kind.blockers(self.lock_timeout)),
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
        let begun = match self.is_inside() {
            true => self.lease.conn().begin_level(),
            false => self.lease.conn().begin_with("BEGIN IMMEDIATE"),
        };
        begun.map_err(|error| self.explain("the beginning", &error.to_string(), Vec::new(), false))
    }

    fn commit(&mut self) -> Result<()> {
        let committed = self.lease.conn().commit_level();
        // Nobody saw the change before this.
        if self.changed {
            self.changes();
        }
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

    /// Keeps what was done inside of a test's transaction, or undoes it.
    fn leave(&mut self, outcome: Result<()>) -> Result<()> {
        let kind = self.kind;
        let had_orphans = self.app.spec().lane.as_ref().is_some_and(|lane| lane.had_orphans());
        let conn = self.lease.conn();
        let kept = outcome
            .and_then(|()| kind.commit_inside(conn, had_orphans).map_err(|error| Error::from_query(error, self.at)));
        if kept.is_err() {
            self.done.clear();
            kind.undo_inside(self.lease.conn());
        }
        kept
    }

    /// Gives the connection back as it was; after an error it is closed.
    pub(super) fn finish(mut self, outcome: Result<()>) -> Result<Vec<String>> {
        let outcome = if self.is_inside() { self.leave(outcome) } else { outcome };
        let restored = (outcome.is_ok() || self.is_inside()) && {
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
        drop(self.lease);
        let (app, done) = (self.app.id(), list(&self.done));
        match &outcome {
            Ok(()) => crate::wording::log_line!(
                info,
                "diesel_session::schema",
                "app `{app}`: {} is done: {done}",
                self.operation
            ),
            Err(error) => crate::wording::log_line!(warn, "diesel_session::schema", "{error}"),
        }
        outcome.map(|()| self.done)
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
