//! The connection on which a migration runs.

use std::any::Any;

use diesel::connection::{BoxableConnection, Connection, SimpleConnection};
use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use crate::connection::SessionConnection;
use crate::dialect;
use crate::kind::DatabaseKind;

/// A connection that skips SQL without a statement, records the SQL texts, and keeps the details of the last error,
/// which the migration's own error may omit.
///
/// PostgreSQL and MySQL report an error for an empty text, and MariaDB's client library reads beyond its end.
pub(super) struct MigrationConnection<C> {
    pub(super) conn: C,
    pub(super) kind: DatabaseKind,
    /// The details of the last error.
    pub(super) error_details: Option<ErrorDetails>,
    /// The SQL texts that were sent.
    pub(super) sent: Vec<String>,
    /// The inventory of the schema before the first text that ends its transaction.
    pub(super) inventory_before_end: Option<Vec<Option<String>>>,
}

/// The details of an error of the server or the driver.
#[derive(Debug, Clone, Default)]
pub(super) struct ErrorDetails {
    /// The server's details and hint as text, or an empty text.
    pub(super) text: String,
    pub(super) connection_lost: bool,
    /// The server's lock table is full.
    pub(super) out_of_locks: bool,
}

impl ErrorDetails {
    pub(super) fn of(error: &DieselError) -> Self {
        let mut details = Self { connection_lost: dialect::is_connection_lost(error), ..Self::default() };
        let DieselError::DatabaseError(kind, information) = error else { return details };
        for (name, text) in [("Detail", information.details()), ("Hint", information.hint())] {
            if let Some(text) = text {
                details.text.push_str(&format!(" ({name}: {text})"));
            }
        }
        // The name of the setting is the same in every language.
        let names_lock_setting = information.hint().is_some_and(|hint| hint.contains("max_locks_per_transaction"));
        details.out_of_locks = matches!(kind, DatabaseErrorKind::Unknown) && names_lock_setting;
        details
    }
}

impl<C: SessionConnection> SimpleConnection for MigrationConnection<C> {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        if self.kind.is_blank(sql) {
            return Ok(());
        }
        let may_end = self.inventory_before_end.is_none() && self.kind != DatabaseKind::Mysql;
        if may_end && self.kind.effect(sql).ends.is_some() {
            self.inventory_before_end = self.conn.texts(self.kind.inventory()).ok();
        }
        let result = self.conn.batch_execute(sql);
        if let Err(error) = &result {
            self.error_details = Some(ErrorDetails::of(error));
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
