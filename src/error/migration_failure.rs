//! A migration that failed, and what is left of it.

use std::fmt;

use crate::wording::{name, phrase, sentence};

/// What became of a migration that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MigrationOutcome {
    /// It is not noted as done. What it had changed was rolled back, except for [`MigrationFailure::left_behind`].
    NotDone,
    /// The connection was lost, and the server, asked on another one, says that it is done.
    Done,
    /// The connection was lost, and the server could not be asked.
    Unknown,
}

/// A migration that failed.
#[derive(Debug)]
#[non_exhaustive]
pub struct MigrationFailure {
    /// The application.
    pub app: String,
    /// `create_all` or `drop_all`.
    pub operation: &'static str,
    /// The migration's name, or the step of the operation that is none.
    pub migration: String,
    /// What the database said.
    pub message: String,
    /// The versions that were applied or reverted before, and stay so.
    pub done: Vec<String>,
    /// Columns and indexes, each after its table, that the failed migration made (`+`) or removed (`-`) and that stay so: MySQL
    /// and MariaDB commit every such change by itself, and so does every database outside of a transaction.
    pub left_behind: Vec<String>,
    /// What became of it.
    pub outcome: MigrationOutcome,
    /// Whether the connection was lost.
    pub connection_lost: bool,
    /// Whether it is a migration and not another step of the operation.
    pub(crate) is_migration: bool,
    /// It was to fill a database that the test kit makes, and removes again after a failure.
    pub(crate) of_test_database: bool,
    /// What can be done about it, if that is neither to correct the migration nor to try again.
    pub(crate) advice: Option<String>,
}

impl MigrationFailure {
    /// One of every form.
    #[cfg(test)]
    pub(crate) fn example(
        app: &str,
        operation: &'static str,
        outcome: MigrationOutcome,
        done: &[String],
        left_behind: &[String],
        connection_lost: bool,
        is_migration: bool,
    ) -> Self {
        Self {
            app: app.into(),
            operation,
            migration: if is_migration { "2024_posts" } else { "the commit" }.into(),
            message: "it says no.".into(),
            done: done.to_vec(),
            left_behind: left_behind.to_vec(),
            outcome,
            connection_lost,
            is_migration,
            of_test_database: false,
            advice: None,
        }
    }

    /// The failure of filling a test's database: nothing of that stays.
    pub(crate) fn in_test_database(mut self) -> Self {
        self.of_test_database = true;
        self.done.clear();
        self.left_behind.clear();
        self
    }
}

impl MigrationFailure {
    /// Whether calling the operation again may succeed, and does nothing twice.
    pub(crate) fn is_transient(&self) -> bool {
        self.connection_lost && self.outcome != MigrationOutcome::Unknown && self.left_behind.is_empty()
    }
}

impl MigrationFailure {
    /// SQLite's, the operating system's, and MariaDB's words for it.
    fn is_disk_full(&self) -> bool {
        ["disk is full", "No space left on device", "Disk full"].iter().any(|text| self.message.contains(text))
    }
}

impl fmt::Display for MigrationFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = sentence(&self.message);
        let (kind, step) = (if self.is_migration { "migration " } else { "" }, name(&self.migration));
        write!(f, "app `{}`: {} failed at {kind}{step}: {message} ", self.app, self.operation)?;
        let verb = if self.operation == "create_all" { "applied" } else { "reverted" };
        match self.outcome {
            _ if self.of_test_database => f.write_str("The test's database is removed. ")?,
            MigrationOutcome::NotDone if !self.is_migration && self.connection_lost => {
                write!(f, "No migration was {verb} by that. ")?
            }
            MigrationOutcome::NotDone if self.left_behind.is_empty() => f.write_str("Nothing of it remains. ")?,
            MigrationOutcome::NotDone => write!(
                f,
                "The database keeps what it had done of it: {}. Undo that by hand, as the migration would fail on it the next time. ",
                phrase(self.left_behind.join(", "))
            )?,
            MigrationOutcome::Done => {
                write!(f, "The server, asked on another connection, says that it was {verb} all the same. ")?
            }
            MigrationOutcome::Unknown => write!(
                f,
                "The server could not be asked on another connection, so it is not known whether it was {verb}. "
            )?,
        }
        if !self.done.is_empty() {
            write!(f, "Done before it, and kept: {}. ", phrase(self.done.join(", ")))?;
        }
        let again = self.operation;
        if self.of_test_database {
            return match (self.connection_lost, self.is_migration) {
                _ if let Some(advice) = &self.advice => f.write_str(advice),
                (true, _) => f.write_str("Find out what ended the connection, and run the test again"),
                (false, true) => f.write_str("Correct the migration and run the test again"),
                (false, false) => f.write_str("Remove the cause and run the test again"),
            };
        }
        match (self.connection_lost, self.outcome) {
            (true, MigrationOutcome::Unknown) => write!(
                f,
                "Call {again} again: it looks which migrations the database has. If it fails because something exists or is \
                 missing, undo by hand what there is of this one"
            ),
            (true, _) => write!(f, "Call {again} again"),
            (false, _) if self.is_disk_full() => {
                write!(f, "Make room on the disk of the database, and call {again} again")
            }
            (false, _) if self.is_migration && self.operation == "create_all" => {
                write!(f, "Correct the migration and call {again} again")
            }
            (false, _) if self.is_migration => {
                write!(f, "Correct the down.sql of the migration and call {again} again")
            }
            (false, _) => write!(f, "Remove the cause and call {again} again"),
        }
    }
}
