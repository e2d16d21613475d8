//! The failure of one step of a schema operation, and the error that it becomes.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use diesel::migration;
use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::applied_versions;
use super::drop_all::REMOVAL;
use super::schema_lock::wait_for_lock;
use super::schema_operation::{Inventory, SchemaOperation};
use crate::connection::SessionConnection;
use crate::dialect::{ConnectionSnapshot, is_connection_lost};
use crate::error::{Details, Error, MigrationFailure, MigrationOutcome};
use crate::panic::panic_message;

/// A step of a schema operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The migration with this index.
    Migration(usize),
    /// Another step, with its description.
    Own(&'static str),
}

/// The failure of a step.
#[derive(Debug, Default)]
pub(super) struct StepFailure {
    pub(super) message: String,
    /// The server's details and hint as text, or an empty text.
    details: String,
    pub(super) connection_lost: bool,
    /// The server's lock table is full.
    pub(super) out_of_locks: bool,
}

impl From<&DieselError> for StepFailure {
    fn from(error: &DieselError) -> Self {
        let connection_lost = is_connection_lost(error);
        let mut failure = Self { message: error.to_string(), connection_lost, ..Self::default() };
        let DieselError::DatabaseError(kind, information) = error else { return failure };
        for (name, text) in [("Detail", information.details()), ("Hint", information.hint())] {
            if let Some(text) = text {
                failure.details.push_str(&format!(" ({name}: {text})"));
            }
        }
        // The name of the setting is the same in every language.
        let names_lock_setting = information.hint().is_some_and(|hint| hint.contains("max_locks_per_transaction"));
        failure.out_of_locks = matches!(kind, DatabaseErrorKind::Unknown) && names_lock_setting;
        failure
    }
}

impl From<DieselError> for StepFailure {
    fn from(error: DieselError) -> Self {
        Self::from(&error)
    }
}

impl StepFailure {
    pub(super) fn new(message: String) -> Self {
        Self { message, ..Self::default() }
    }

    /// Adds the details of the migration's last error, which the migration's own error may omit.
    pub(super) fn or_details_of(self, last_error: Option<Self>) -> Self {
        let Self { details, connection_lost, out_of_locks, .. } = last_error.unwrap_or_default();
        Self {
            details,
            connection_lost: self.connection_lost || connection_lost,
            out_of_locks: self.out_of_locks || out_of_locks,
            ..self
        }
    }

    /// The whole text in one line.
    fn text(&self) -> String {
        let details = if self.message.contains(&self.details) { "" } else { &self.details };
        format!("{}{details}", self.message).trim_end().replace('\n', " ")
    }
}

/// Runs code of the program and converts its error or its panic. The text, the type and the drop of an error are code
/// of the program too, so they may also panic.
pub(super) fn catch_failure<T>(run: impl FnOnce() -> migration::Result<T>) -> Result<T, StepFailure> {
    let error = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(panic) => return Err(StepFailure::new(format!("it panicked: {}", panic_message(&*panic)))),
    };
    let failure = catch_unwind(AssertUnwindSafe(move || match error.downcast_ref::<DieselError>() {
        Some(error) => error.into(),
        None => StepFailure::new(format!("{error:#}")),
    }));
    Err(failure.unwrap_or_else(|panic| {
        StepFailure::new(format!("it failed, and the text of its error panicked: {}", panic_message(&*panic)))
    }))
}

impl<C: SessionConnection> SchemaOperation<'_, C> {
    /// Rolls back and converts the failure of a step to an error.
    pub(super) fn failure(&mut self, step: Step, failure: StepFailure) -> Error {
        let rolled_back = self.roll_back();
        if failure.connection_lost || rolled_back.is_err_and(|error| is_connection_lost(&error)) {
            return self.connection_loss(step, failure);
        }
        let before = self.before.take();
        let left_behind = before.map(|before| difference(&before, &self.inventory())).unwrap_or_default();
        let message = failure.text();
        if self.kind.is_lock_timeout(&message) {
            return self.lock_timeout_error(&self.name_of(step), message, &left_behind);
        }
        self.migration_failure(step, message, left_behind, MigrationOutcome::NotDone, false)
    }

    fn name_of(&self, step: Step) -> String {
        match step {
            Step::Migration(index) => self.migrations[index].name.clone(),
            Step::Own(name) => name.to_owned(),
        }
    }

    fn migration_failure(
        &self,
        step: Step,
        message: String,
        left_behind: Vec<String>,
        outcome: MigrationOutcome,
        connection_lost: bool,
    ) -> Error {
        Error::from(Details::Migration(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: self.name_of(step),
            message,
            done: self.kept_versions(),
            left_behind,
            outcome,
            connection_lost,
            is_migration: matches!(step, Step::Migration(_)),
            excluded_others: self.has_lock && !self.baseline.is_replicated(),
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
        let blockers = self.kind.dialect().blockers(self.lock_timeout);
        self.lock_timeout_of(self.started.elapsed(), message, &blockers, left.join(" "))
    }

    pub(super) fn lock_timeout_of(
        &mut self,
        waited: Duration,
        message: String,
        blockers: &[String],
        left: String,
    ) -> Error {
        let blockers = self.pooled().blockers(blockers);
        let (app, operation, at) = (self.app.id().into(), self.operation, self.at);
        Error::from(Details::LockTimeout { app, operation, waited, message, blockers, left, at })
    }

    /// The error for a lost connection. Another connection determines the outcome of the step.
    pub(super) fn connection_loss(&mut self, step: Step, failure: StepFailure) -> Error {
        if let Some(mut pooled) = self.pooled.take() {
            let managed = pooled.managed();
            managed.lost = true;
            managed.closes_at_checkin = true;
        }
        let before = self.before.take();
        // The outer transaction of a test is never committed, and other steps than the removal change nothing.
        let may_be_done = !self.is_nested() && (matches!(step, Step::Migration(_)) || step == REMOVAL);
        let (outcome, left_behind) = match may_be_done.then(|| self.resolve_step(step, before)) {
            None => (MigrationOutcome::NotDone, Vec::new()),
            Some(Some((true, _))) => (MigrationOutcome::Done, Vec::new()),
            Some(Some((false, left_behind))) => (MigrationOutcome::NotDone, left_behind),
            Some(None) => (MigrationOutcome::Unknown, Vec::new()),
        };
        self.migration_failure(step, failure.text(), left_behind, outcome, true)
    }

    /// Asks the server on another connection whether the step is done, and what it has changed since the inventory
    /// `before`. `None` if the server does not answer. The lost session has ended when its lock is free.
    fn resolve_step(&mut self, step: Step, before: Option<Inventory>) -> Option<(bool, Vec<String>)> {
        let mut pooled = self.app.pool().ok()?.acquire(self.at, false, None).ok()?;
        pooled.close_at_checkin();
        let (kind, options) = (self.kind, self.app.options());
        let deadline = Instant::now() + options.config.acquire_timeout;
        let conn = pooled.conn();
        wait_for_lock(conn, kind, &options.target.database, deadline)?;
        let snapshot = ConnectionSnapshot::from_rows(conn.texts(kind.texts().snapshot_query).ok()?);
        let applied = applied_versions(conn, kind, &snapshot).ok()?;
        let done = match step {
            Step::Migration(index) => applied.contains(&self.migrations[index].version) == self.applies(),
            Step::Own(_) => conn.texts(&kind.dialect().bookkeeping_table_query(snapshot.schema()?)).ok()?.is_empty(),
        };
        let changed = before.map(|before| Some(difference(&before, &conn.texts(kind.texts().inventory).ok()?)));
        Some((done, changed.unwrap_or_else(|| Some(Vec::new()))?))
    }
}

/// The entries that only one of the inventories has, each with a `+` or `-`.
pub(super) fn difference(before: &[Option<String>], after: &[Option<String>]) -> Vec<String> {
    let (before, after): (HashSet<_>, HashSet<_>) =
        (before.iter().flatten().collect(), after.iter().flatten().collect());
    let mut changes: Vec<String> = after.difference(&before).map(|name| format!("+{name}")).collect();
    changes.extend(before.difference(&after).map(|name| format!("-{name}")));
    changes.sort_unstable();
    changes
}

pub(super) fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}
