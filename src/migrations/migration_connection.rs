//! The connection on which a migration runs.

use std::any::Any;

use diesel::connection::{BoxableConnection, Connection, SimpleConnection};
use diesel::result::QueryResult;

use super::step_failure::StepFailure;
use crate::connection::SessionConnection;
use crate::kind::DatabaseKind;

/// A connection that skips SQL without a statement, records the SQL texts, and keeps the details of the last error,
/// which the migration's own error may omit.
///
/// PostgreSQL and MySQL report an error for an empty text, and MariaDB's client library reads beyond its end.
pub(super) struct MigrationConnection<C> {
    pub(super) conn: C,
    pub(super) kind: DatabaseKind,
    pub(super) last_error: Option<StepFailure>,
    /// The SQL texts that were sent.
    pub(super) sent: Vec<String>,
    /// The inventory of the schema before the first text that ends its transaction.
    pub(super) inventory_before_end: Option<Vec<Option<String>>>,
}

impl<C: SessionConnection> SimpleConnection for MigrationConnection<C> {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        if self.kind.is_blank(sql) {
            return Ok(());
        }
        let may_end = self.inventory_before_end.is_none() && self.kind != DatabaseKind::Mysql;
        if may_end && self.kind.effect(sql).ends.is_some() {
            self.inventory_before_end = self.conn.texts(self.kind.texts().inventory).ok();
        }
        let result = self.conn.batch_execute(sql);
        if let Err(error) = &result {
            self.last_error = Some(error.into());
        }
        self.sent.push(sql.to_owned());
        result
    }
}

impl<C: SessionConnection> BoxableConnection<<C as Connection>::Backend> for MigrationConnection<C> {
    fn as_any(&self) -> &dyn Any {
        &self.conn
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        &mut self.conn
    }
}
