//! Whether a migration can be reverted, asked before anything is.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::Migration;
use diesel::result::QueryResult;
use diesel_migrations::MigrationError;

/// What `diesel_migrations` says, in a type it does not export, of a missing and of an empty `down.sql`.
const NO_WAY_BACK: [&str; 2] = ["Missing `down.sql`", "run an empty migration"];

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
pub(super) fn has_no_way_back<DB: Backend>(migration: &dyn Migration<DB>) -> bool {
    let asked = catch_unwind(AssertUnwindSafe(|| migration.revert(&mut DryRun)));
    matches!(asked, Ok(Err(error)) if error.downcast_ref::<MigrationError>().is_some_and(|error| matches!(error, MigrationError::NoMigrationRevertFile))
        || NO_WAY_BACK.iter().any(|text| error.to_string().contains(text)))
}
