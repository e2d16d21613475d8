//! A stand-in for a connection, with which the library learns the SQL of a migration without a database.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::Migration;
use diesel::result::QueryResult;
use diesel_migrations::MigrationError;

use crate::kind::DatabaseKind;

/// The error text of `diesel_migrations` for a missing `down.sql`. The crate does not export the type of this error.
const MISSING_FILE: &str = "Missing `down.sql`";

/// The error text of `diesel_migrations` for an empty `up.sql` or `down.sql`.
pub(crate) const EMPTY_FILE: &str = "run an empty migration";

/// Records the SQL texts that a migration sends, and sends nothing.
#[derive(Default)]
pub(crate) struct RecordingConnection {
    pub(crate) sent: Vec<String>,
    /// The migration has asked for the type of the connection. It may then use the connection in ways that no SQL text
    /// shows.
    pub(crate) inspected: Cell<bool>,
}

impl SimpleConnection for RecordingConnection {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        self.sent.push(sql.to_owned());
        Ok(())
    }
}

impl<DB: Backend> BoxableConnection<DB> for RecordingConnection {
    fn as_any(&self) -> &dyn Any {
        self.inspected.set(true);
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self.inspected.set(true);
        self
    }
}

/// Whether a migration cannot be reverted: its error says so, or it sends only SQL without a statement.
///
/// A migration that is code of the program may need a real connection. It counts as reversible if it fails in another
/// way or panics.
pub(crate) fn is_irreversible<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> bool {
    let mut conn = RecordingConnection::default();
    let refused = catch_unwind(AssertUnwindSafe(|| {
        migration.revert(&mut conn).is_err_and(|error| {
            error
                .downcast_ref::<MigrationError>()
                .is_some_and(|error| matches!(error, MigrationError::NoMigrationRevertFile))
                || [MISSING_FILE, EMPTY_FILE].iter().any(|text| error.to_string().contains(text))
        })
    }));
    let is_blank = !conn.sent.is_empty() && !conn.inspected.get() && conn.sent.iter().all(|sql| kind.is_blank(sql));
    refused.is_ok_and(|refused| refused || is_blank)
}

/// Whether the SQL that reverts a migration ends its own transaction.
pub(crate) fn ends_its_transaction<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> bool {
    let mut conn = RecordingConnection::default();
    // The operation reports an error when it reverts the migration.
    let _ = catch_unwind(AssertUnwindSafe(|| migration.revert(&mut conn).is_ok()));
    conn.sent.iter().any(|sql| kind.effect(sql).ends.is_some())
}
