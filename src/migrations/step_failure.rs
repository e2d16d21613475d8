//! The failure of one step of a schema operation, and the error that it becomes.

use std::any::Any;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use diesel::migration;
use diesel::result::Error as DieselError;

use super::applied_versions;
use super::drop_all::REMOVAL;
use super::migration_connection::ErrorDetails;
use super::schema_lock::wait_for_lock;
use super::schema_operation::{Inventory, SchemaOperation};
use crate::connection::SessionConnection;
use crate::dialect::{ConnectionSnapshot, is_connection_lost};
use crate::error::{Error, MigrationFailure, MigrationOutcome};
use crate::kind::DatabaseKind;
use crate::panic::panic_message;

/// The failure of a migration, or of another step of a schema operation.
#[derive(Debug, Default)]
pub(super) struct StepFailure {
    pub(super) message: String,
    pub(super) connection_lost: bool,
    /// The server's lock table is full.
    pub(super) out_of_locks: bool,
}

impl StepFailure {
    pub(super) fn of_query(error: &DieselError) -> Self {
        let ErrorDetails { text, connection_lost, out_of_locks } = ErrorDetails::of(error);
        Self { message: format!("{error}{text}"), connection_lost, out_of_locks }
    }

    fn of_panic(panic: &(dyn Any + Send), context: &str) -> Self {
        Self { message: format!("{context}: {}", panic_message(panic)), ..Self::default() }
    }
}

/// Runs code of the program and converts its error or its panic. The text, the type and the drop of an error are code
/// of the program too, so they may also panic.
pub(super) fn catch_failure<T>(run: impl FnOnce() -> migration::Result<T>) -> Result<T, StepFailure> {
    let error = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(panic) => return Err(StepFailure::of_panic(&*panic, "it panicked")),
    };
    let failure = catch_unwind(AssertUnwindSafe(move || match error.downcast_ref::<DieselError>() {
        Some(error) => StepFailure::of_query(error),
        None => StepFailure { message: error.to_string(), ..StepFailure::default() },
    }));
    Err(failure.unwrap_or_else(|panic| StepFailure::of_panic(&*panic, "it failed, and the text of its error panicked")))
}

impl<C: SessionConnection> SchemaOperation<'_, C> {
    /// The inventory of the schema. It is empty if a failure of the migration leaves nothing behind.
    pub(super) fn inventory(&mut self, index: usize) -> Inventory {
        if self.kind != DatabaseKind::Mysql && self.migrations[index].in_transaction {
            return Vec::new();
        }
        self.texts_or_empty(self.kind.inventory())
    }

    /// Rolls back and converts the failure of a step to an error. `index` is the index of the migration, or `None` for
    /// another step. `before` is the inventory before the step.
    pub(super) fn failure(
        &mut self,
        index: Option<usize>,
        step: &str,
        mut failure: StepFailure,
        before: &[Option<String>],
    ) -> Error {
        let rolled_back = self.roll_back();
        // A migration that has ended its transaction has committed its earlier changes.
        let inventory_before_end = self.inventory_before_end.take();
        let before = inventory_before_end.as_deref().unwrap_or(before);
        if failure.connection_lost || rolled_back.is_err_and(|error| is_connection_lost(&error)) {
            return self.connection_loss(index, step, failure, before);
        }
        let has_ended = inventory_before_end.is_some();
        let left_behind = index.map(|index| match has_ended {
            true => difference(before, &self.texts_or_empty(self.kind.inventory())),
            false => difference(before, &self.inventory(index)),
        });
        let left_behind = left_behind.unwrap_or_default();
        let name = index.map_or_else(|| step.to_owned(), |index| self.migrations[index].name.clone());
        failure.message = failure.message.trim_end().replace('\n', " ");
        if self.kind.is_lock_timeout(&failure.message) {
            return self.lock_timeout_error(&name, failure.message, &left_behind);
        }
        Error::Migration(Box::new(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: name,
            message: failure.message,
            done: self.kept_versions(),
            left_behind,
            outcome: MigrationOutcome::NotDone,
            connection_lost: false,
            is_migration: index.is_some(),
            of_test_database: false,
            advice: None,
        }))
    }

    fn lock_timeout_error(&mut self, name: &str, message: String, left_behind: &[String]) -> Error {
        let done = self.kept_versions();
        let mut left = Vec::new();
        if !done.is_empty() {
            left.push(format!("Done before it, and kept: {}.", list(&done)));
        }
        if !left_behind.is_empty() {
            left.push(format!("Left of {name}: {}.", list(left_behind)));
        }
        if left.is_empty() {
            left.push("The schema is as it was.".into());
        }
        // `blockers` ends the open transaction, in which the operation has to release its lock.
        if self.is_chained() && self.unlock().is_err() {
            self.pooled().close_at_checkin();
        }
        let blockers = self.kind.blockers(self.lock_timeout);
        Error::LockTimeout {
            app: self.app.id().into(),
            operation: self.operation,
            waited: self.started.elapsed(),
            message,
            blockers: self.pooled().blockers(&blockers),
            left: left.join(" "),
            at: self.at,
        }
    }

    /// The error for a lost connection. Another connection determines the outcome of the step.
    pub(super) fn connection_loss(
        &mut self,
        index: Option<usize>,
        step: &str,
        failure: StepFailure,
        before: &[Option<String>],
    ) -> Error {
        if let Some(mut pooled) = self.pooled.take() {
            let managed = pooled.managed();
            managed.lost = true;
            managed.closes_at_checkin = true;
        }
        // The outer transaction of a test is never committed, and other steps than the removal change nothing.
        let may_be_done = !self.is_nested() && (index.is_some() || step == REMOVAL);
        let (outcome, left_behind) = match may_be_done.then(|| self.resolve_step(index)) {
            None => (MigrationOutcome::NotDone, Vec::new()),
            Some(Some((true, _))) => (MigrationOutcome::Done, Vec::new()),
            Some(Some((false, now))) => (MigrationOutcome::NotDone, difference(before, &now)),
            Some(None) => (MigrationOutcome::Unknown, Vec::new()),
        };
        let name = index.map_or_else(|| step.to_owned(), |index| self.migrations[index].name.clone());
        Error::Migration(Box::new(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: name,
            message: failure.message.trim_end().replace('\n', " "),
            done: self.kept_versions(),
            left_behind,
            outcome,
            connection_lost: true,
            is_migration: index.is_some(),
            of_test_database: false,
            advice: None,
        }))
    }

    /// Asks the server on another connection whether the step is done. The result has also the current inventory.
    /// `None` if the server does not answer. The lost session has ended when its lock is free.
    fn resolve_step(&mut self, index: Option<usize>) -> Option<(bool, Inventory)> {
        let mut pooled = self.app.pool().ok()?.acquire(self.at, false, None).ok()?;
        pooled.close_at_checkin();
        let (kind, options) = (self.kind, self.app.options());
        let deadline = Instant::now() + options.config.acquire_timeout;
        let conn = pooled.conn();
        wait_for_lock(conn, kind, &options.target.database, deadline)?;
        let snapshot = ConnectionSnapshot::from_rows(conn.texts(kind.snapshot_query()).ok()?);
        let applied = applied_versions(conn, kind, &snapshot).ok()?;
        let done = match index.map(|index| applied.contains(&self.migrations[index].version)) {
            Some(is_applied) => is_applied == (self.operation == "create_all"),
            None => conn.texts(&kind.bookkeeping_table_query(snapshot.schema()?)).ok()?.is_empty(),
        };
        let needs_inventory =
            index.is_some_and(|index| kind == DatabaseKind::Mysql || !self.migrations[index].in_transaction);
        let now = if needs_inventory { conn.texts(kind.inventory()).ok()? } else { Vec::new() };
        Some((done, now))
    }
}

/// The entries that only one of the inventories has, each with a `+` or `-`.
pub(super) fn difference(before: &[Option<String>], after: &[Option<String>]) -> Vec<String> {
    let (before, after): (HashSet<_>, HashSet<_>) =
        (before.iter().flatten().collect(), after.iter().flatten().collect());
    let mut changes: Vec<String> = after.difference(&before).map(|name| format!("+{name}")).collect();
    changes.extend(before.difference(&after).map(|name| format!("-{name}")));
    changes.sort();
    changes
}

pub(super) fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}
