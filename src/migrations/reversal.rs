//! Whether a migration can be reverted, asked before anything is.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::Migration;
use diesel::result::QueryResult;
use diesel_migrations::MigrationError;

use crate::kind::DatabaseKind;

/// What `diesel_migrations` says, in a type it does not export, of a missing `down.sql`.
const NO_FILE: &str = "Missing `down.sql`";

/// The same of an empty `up.sql` or `down.sql`.
pub(super) const EMPTY_FILE: &str = "run an empty migration";

/// Stands for a connection when a migration is only asked whether it has a way back.
struct DryRun {
    kind: DatabaseKind,
    /// Texts that were sent, with and without a statement.
    statements: usize,
    blanks: usize,
    /// One of them ends the transaction in which it is sent.
    ends: bool,
    /// The migration asked which connection it is: it may do anything with it, which no text tells.
    looked_into: Cell<bool>,
}

impl DryRun {
    fn new(kind: DatabaseKind) -> Self {
        Self { kind, statements: 0, blanks: 0, ends: false, looked_into: Cell::new(false) }
    }
}

impl SimpleConnection for DryRun {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        if self.kind.is_blank(sql) {
            self.blanks += 1;
        } else {
            self.statements += 1;
            self.ends |= self.kind.effect(sql).ends.is_some();
        }
        Ok(())
    }
}

impl<DB: Backend> BoxableConnection<DB> for DryRun {
    fn as_any(&self) -> &dyn std::any::Any {
        self.looked_into.set(true);
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self.looked_into.set(true);
        self
    }
}

/// Whether a migration cannot be reverted: it says so, or all that it would send is SQL without a statement. One that is code of
/// the program's own may not be able to tell without a connection; then it is taken at its word when its turn comes.
pub(super) fn has_no_way_back<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> bool {
    let mut asked = DryRun::new(kind);
    let refused = catch_unwind(AssertUnwindSafe(|| {
        migration.revert(&mut asked).is_err_and(|error| {
            error
                .downcast_ref::<MigrationError>()
                .is_some_and(|error| matches!(error, MigrationError::NoMigrationRevertFile))
                || [NO_FILE, EMPTY_FILE].iter().any(|text| error.to_string().contains(text))
        })
    }));
    let is_blank = asked.blanks > 0 && asked.statements == 0 && !asked.looked_into.get();
    refused.is_ok_and(|refused| refused || is_blank)
}

/// Whether the text that reverts a migration ends the transaction in which it is sent.
pub(super) fn ends_its_transaction<DB: Backend>(migration: &dyn Migration<DB>, kind: DatabaseKind) -> bool {
    let mut asked = DryRun::new(kind);
    // An error is told when its turn comes.
    let _ = catch_unwind(AssertUnwindSafe(|| migration.revert(&mut asked).is_ok()));
    asked.ends
}
