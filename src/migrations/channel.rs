//! The connection that a migration gets.

use std::any::Any;

use diesel::connection::{BoxableConnection, Connection, SimpleConnection};
use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use crate::connection::SessionConnection;
use crate::dialect;
use crate::kind::DatabaseKind;

/// A connection that skips SQL without a statement and keeps what the server said of an error, which the migration's own error may
/// not tell.
///
/// PostgreSQL and MySQL answer an empty text with an error, and MariaDB's client library reads a first character that is not
/// there.
pub(super) struct Channel<C> {
    pub(super) conn: C,
    pub(super) kind: DatabaseKind,
    pub(super) said: Option<Said>,
    /// What was sent as text.
    pub(super) sent: Vec<String>,
    /// What the schema consisted of before the first text that ends its transaction.
    pub(super) before_ending: Option<Vec<Option<String>>>,
}

/// What the server or the driver said of an error.
#[derive(Debug, Clone, Default)]
pub(super) struct Said {
    /// Details and hint, where there are any.
    pub(super) more: String,
    pub(super) lost: bool,
    /// The server has no room for more locks.
    pub(super) out_of_locks: bool,
}

impl Said {
    pub(super) fn of(error: &DieselError) -> Self {
        let mut said = Self { lost: dialect::is_connection_lost(error), ..Self::default() };
        let DieselError::DatabaseError(kind, information) = error else { return said };
        for (name, text) in [("Detail", information.details()), ("Hint", information.hint())] {
            if let Some(text) = text {
                said.more.push_str(&format!(" ({name}: {text})"));
            }
        }
        // The name of the setting is the same in every language.
        let names_it = information.hint().is_some_and(|hint| hint.contains("max_locks_per_transaction"));
        said.out_of_locks = matches!(kind, DatabaseErrorKind::Unknown) && names_it;
        said
    }
}

impl<C: SessionConnection> SimpleConnection for Channel<C> {
    fn batch_execute(&mut self, sql: &str) -> QueryResult<()> {
        if self.kind.is_blank(sql) {
            return Ok(());
        }
        if self.before_ending.is_none() && self.kind != DatabaseKind::Mysql && self.kind.effect(sql).ends.is_some() {
            self.before_ending = self.conn.texts(self.kind.inventory()).ok();
        }
        let sent = self.conn.batch_execute(sql);
        if let Err(error) = &sent {
            self.said = Some(Said::of(error));
        }
        self.sent.push(sql.to_owned());
        sent
    }
}

impl<C: SessionConnection> BoxableConnection<<C as Connection>::Backend> for Channel<C> {
    fn as_any(&self) -> &dyn Any {
        &self.conn
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        &mut self.conn
    }
}
