//! The failure of a migration.

use std::fmt;

use super::{Details, Error};
use crate::wording::{name, phrase, sentence};

/// The outcome of a migration that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MigrationOutcome {
    /// The migration is not recorded as done. Its changes were rolled back, except for
    /// [`MigrationFailure::left_behind`].
    NotDone,
    /// The connection was lost, but the server has reported on another connection that the migration is done.
    Done,
    /// The connection was lost, and the library could not ask the server.
    Unknown,
}

/// The failure of a migration, or of another step of `create_all` or `drop_all`.
#[derive(Debug)]
#[non_exhaustive]
pub struct MigrationFailure {
    /// The id of the application.
    pub app: String,
    /// `create_all` or `drop_all`.
    pub operation: &'static str,
    /// The name of the migration, or of another step of the operation.
    pub migration: String,
    /// The message of the database.
    pub message: String,
    /// The versions that were applied or reverted before the failure and stay so.
    pub done: Vec<String>,
    /// The columns and indexes, each prefixed with its table, that the failed migration has created (`+`) or removed
    /// (`-`) and that were not rolled back. MySQL and MariaDB commit every such change, and so does every database
    /// outside a transaction.
    pub left_behind: Vec<String>,
    /// The outcome of the migration.
    pub outcome: MigrationOutcome,
    /// Whether the connection was lost.
    pub connection_lost: bool,
    /// Whether the failed step is a migration.
    pub(crate) is_migration: bool,
    /// A lock kept every other program from an operation of its own, so `left_behind` is of this one.
    pub(crate) excluded_others: bool,
    /// The operation was to fill a database of the test kit, which the test kit removes after a failure.
    pub(crate) of_test_database: bool,
    /// Advice for the user, if it is neither to correct the migration nor to try again.
    pub(crate) advice: Option<String>,
}

impl MigrationFailure {
    /// The failure to fill a database of the test kit, of which nothing stays.
    #[cfg(feature = "testing")]
    pub(crate) fn in_test_database(mut self) -> Self {
        self.of_test_database = true;
        self.done.clear();
        self.left_behind.clear();
        self
    }

    /// Whether another call of the operation may succeed and does nothing twice.
    pub(crate) fn is_transient(&self) -> bool {
        self.connection_lost && self.outcome != MigrationOutcome::Unknown && self.left_behind.is_empty()
    }

    /// Recognises the texts of SQLite, the operating system and MariaDB.
    fn is_disk_full(&self) -> bool {
        ["disk is full", "No space left on device", "Disk full"].iter().any(|text| self.message.contains(text))
    }
}

impl Error {
    /// The error of an operation that has lost its lock.
    pub(crate) fn without_lock(mut self) -> Self {
        if let Details::Migration(failure) = self.details_mut() {
            failure.excluded_others = false;
        }
        self
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
            MigrationOutcome::NotDone if self.excluded_others => write!(
                f,
                "The database keeps what it had done of it: {}. Undo that by hand, as the migration would fail on it \
                 the next time. ",
                phrase(self.left_behind.join(", "))
            )?,
            MigrationOutcome::NotDone => write!(
                f,
                "Meanwhile the database has changed: {}. This is of the migration or of another program, as no lock \
                 excluded others. Find out which program has done it before you undo it. ",
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
        if let Some(advice) = self.advice.as_ref().filter(|_| self.of_test_database) {
            return f.write_str(advice);
        }
        let again = match self.of_test_database {
            true => "run the test".to_owned(),
            false => format!("call {}", self.operation),
        };
        match (self.connection_lost, self.is_migration) {
            (true, _) if self.of_test_database => write!(f, "Find out what ended the connection, and {again} again"),
            (true, _) if self.outcome == MigrationOutcome::Unknown => write!(
                f,
                "Call {} again: it looks which migrations the database has. If it fails because something exists or is \
                 missing, {}",
                self.operation,
                match self.excluded_others {
                    true => "undo by hand what there is of this one",
                    false => "find out first whether another program has done it",
                }
            ),
            (true, _) => write!(f, "Call {} again", self.operation),
            (false, _) if self.is_disk_full() => {
                write!(f, "Make room on the disk of the database, and {again} again")
            }
            (false, true) if self.operation == "create_all" || self.of_test_database => {
                write!(f, "Correct the migration and {again} again")
            }
            (false, true) => write!(f, "Correct the down.sql of the migration and {again} again"),
            (false, false) => write!(f, "Remove the cause and {again} again"),
        }
    }
}
