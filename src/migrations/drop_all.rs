//! The part of a schema operation that reverts migrations.

use diesel::result::QueryResult;

use super::recording_connection::is_irreversible;
use super::schema_operation::SchemaOperation;
use super::step_failure::{Step, StepFailure};
use crate::connection::SessionConnection;
use crate::dialect::{is_connection_lost, needs_too_many_locks};
use crate::error::{Details, PoolOf, Result};
use crate::kind::DatabaseKind;
use crate::wording::{log_line, phrase};

/// The last step of `drop_all`. After a lost connection its outcome decides whether everything is removed.
pub(super) const REMOVAL: Step = Step::Own("the removal of the bookkeeping table");

impl<C: SessionConnection> SchemaOperation<'_, C> {
    pub(super) fn drop_all(&mut self) -> Result<()> {
        if self.kind == DatabaseKind::Mysql && self.is_nested() {
            return self.refuse_nested();
        }
        if let Some(missing) = self.baseline.missing_schema().filter(|_| self.kind == DatabaseKind::Postgres) {
            let reason = format!(
                "drop_all reverts nothing, as `{}`, the first schema of search_path, does not exist or may not be used; {}",
                phrase(missing),
                match self.baseline.schema() {
                    Some(schema) => format!(
                        "the names of the migrations would mean the tables of `{}`. Correct search_path, or create the schema",
                        phrase(schema)
                    ),
                    None => "correct search_path, or create it".into(),
                }
            );
            return Err(Details::InvalidConfig { app: self.app.id().into(), reason }.into());
        }
        let is_sqlite = self.kind == DatabaseKind::Sqlite;
        if is_sqlite {
            self.begin_write()?;
        }
        let baseline = self.baseline.clone();
        let Some(schema) = baseline.schema().map(str::to_owned) else { return Ok(()) };
        let exists = self.texts(&self.kind.dialect().bookkeeping_table_query(&schema))?;
        if exists.is_empty() {
            return if is_sqlite { self.commit() } else { Ok(()) };
        }
        let applied = self.applied_versions(&baseline)?;
        let order = self.revert_order(&applied)?;
        self.log_warning(order.len());
        self.restrict_search_path(&schema)?;
        let in_transactions = order.iter().all(|&index| self.migrations[index].in_transaction);
        let atomic = match self.kind {
            DatabaseKind::Mysql => false,
            DatabaseKind::Sqlite => in_transactions,
            DatabaseKind::Postgres => in_transactions && (self.is_nested() || !self.may_exhaust_locks(&schema)?),
        };
        match (self.kind, atomic) {
            (DatabaseKind::Mysql, _) => self.detect_blockers()?,
            (DatabaseKind::Sqlite, false) => self.commit()?,
            (DatabaseKind::Postgres, true) if self.is_nested() => {
                let result = self.conn().begin_level();
                self.check(result)?;
            }
            _ => {}
        }
        if atomic {
            let Err((step, failure)) = self.revert_all(&order, true) else { return Ok(()) };
            // The single transaction of all migrations is rolled back. Separate transactions need fewer locks.
            self.done.clear();
            if self.is_nested() || !failure.out_of_locks || failure.connection_lost {
                return Err(self.failure(step, failure));
            }
            if self.roll_back().is_err() {
                return Err(self.failure(Step::Own("the rollback"), failure));
            }
        }
        self.revert_all(&order, false).map_err(|(step, failure)| self.failure(step, failure))
    }

    /// Reverts the migrations and drops the bookkeeping table. `atomic` means that a single transaction does this.
    fn revert_all(&mut self, order: &[usize], atomic: bool) -> Result<(), (Step, StepFailure)> {
        for &index in order {
            let reverted = self.run_step(index, !atomic);
            reverted.map_err(|failure| (Step::Migration(index), failure))?;
        }
        self.announce_change();
        let dropped = self.drop_bookkeeping_table(atomic);
        self.announce_change();
        dropped.map_err(|error| (REMOVAL, error.into()))
    }

    fn drop_bookkeeping_table(&mut self, atomic: bool) -> QueryResult<()> {
        let drop_table = format!("DROP TABLE {}", self.kind.bookkeeping_table(self.baseline.schema()));
        self.conn().batch_execute(&drop_table)?;
        self.announce_change();
        match (self.is_chained(), atomic) {
            (true, _) => {
                let next = format!("COMMIT; {}", self.begin_sql());
                self.conn().batch_execute(&next)
            }
            (false, true) => self.conn().commit_level(),
            (false, false) => Ok(()),
        }
    }

    /// Logs a warning with the caller and the database before the operation reverts anything.
    fn log_warning(&self, migrations: usize) {
        let options = self.app.options();
        if migrations == 0 || options.pool_of != PoolOf::Program || options.target.in_memory {
            return;
        }
        log_line!(
            warn,
            "diesel_session::schema",
            "app `{}`: drop_all, called at {}, reverts {migrations} migrations and removes their tables from {}",
            self.app.id(),
            self.at,
            options.target.shown
        );
    }

    /// Restricts `search_path` while migrations are reverted: an unqualified name means an object of the current schema
    /// or of an extension.
    fn restrict_search_path(&mut self, schema: &str) -> Result<()> {
        let Some(query) = self.kind.extension_schemas() else { return Ok(()) };
        let mut path = vec![self.kind.quote(schema)];
        path.extend(self.texts(query)?.into_iter().flatten().map(|name| self.kind.quote(&name)));
        path.push("pg_temp".into());
        self.revert_search_path = Some(path.join(", "));
        Ok(())
    }

    /// Whether the removal of the whole schema may need more locks than the server has.
    fn may_exhaust_locks(&mut self, schema: &str) -> Result<bool> {
        let Some(query) = self.kind.locks_of_schema(schema) else { return Ok(false) };
        let answer = self.texts(&query)?;
        Ok(answer.into_iter().flatten().any(|answer| needs_too_many_locks(&answer)))
    }

    /// The indices of the applied migrations, the newest first. The result is an error if one of them cannot be
    /// reverted.
    fn revert_order(&self, applied: &[String]) -> Result<Vec<usize>> {
        let (mut order, mut unknown, mut irreversible) = (Vec::new(), Vec::new(), Vec::new());
        for applied in applied {
            match self.migrations.iter().position(|known| known.version == *applied) {
                None => unknown.push(applied.clone()),
                Some(index) if is_irreversible(&*self.migrations[index].migration, self.kind) => {
                    irreversible.push(self.migrations[index].name.clone())
                }
                Some(index) => order.push(index),
            }
        }
        if unknown.is_empty() && irreversible.is_empty() {
            Ok(order)
        } else {
            Err(Details::NotReversible { app: self.app.id().into(), unknown, irreversible }.into())
        }
    }

    /// Locks and unlocks all tables, to detect blocking sessions before the first change: MySQL commits each statement
    /// of data definition. For an account that may not lock tables, the first statement that waits detects them.
    fn detect_blockers(&mut self) -> Result<()> {
        let kind = self.kind;
        let tables = self.texts(kind.texts().tables)?;
        let list: Vec<String> = tables.iter().flatten().map(|table| format!("{} WRITE", kind.quote(table))).collect();
        if list.is_empty() {
            return Ok(());
        }
        let Err(error) = self.conn().batch_execute(&format!("LOCK TABLES {}", list.join(", "))) else {
            return self.send("UNLOCK TABLES");
        };
        if is_connection_lost(&error) || kind.is_lock_timeout(&error.to_string()) {
            return Err(self.failure(Step::Own("locking all tables"), error.into()));
        }
        let app = self.app.id();
        log_line!(
            debug,
            "diesel_session::schema",
            "app `{app}`: the tables could not be locked first: {}",
            phrase(error)
        );
        Ok(())
    }
}
