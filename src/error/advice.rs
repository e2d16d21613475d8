//! Advice for errors after which the connection is closed.

use diesel::result::{DatabaseErrorInformation, Error as DieselError};

/// The server accepts no writes.
pub(crate) const READ_ONLY: &str = "The server that this connection reached takes no writes, so the connection is \
    closed; run the transaction again, on a new connection";

/// Another program has changed the schema.
pub(crate) const SCHEMA_CHANGED: &str = "Another program has changed the schema, so the connection is closed; run the \
    transaction again, on a new connection";

/// The types in a statement may have changed.
pub(crate) const TYPES_CHANGED: &str = "The types may have changed since the connection was opened, so it is closed; \
    run the transaction again, on a new connection. If that fails too, correct the types in the statement";

/// The server has lost the prepared statements.
pub(crate) const STATEMENTS_FORGOTTEN: &str = "The prepared statements of this connection are not those on the server: \
    other code has removed them, or a pooler in transaction mode mixes those of its clients. The connection is closed; \
    run the transaction again, on a new connection. Behind such a pooler set \
    `Config::behind(Behind::TransactionPooler { keeps_prepared: false })`";

const ALL: [&str; 4] = [READ_ONLY, SCHEMA_CHANGED, TYPES_CHANGED, STATEMENTS_FORGOTTEN];

/// An error with one of these texts as its hint.
struct WithAdvice(Box<dyn DatabaseErrorInformation + Send + Sync>, &'static str);

impl DatabaseErrorInformation for WithAdvice {
    fn message(&self) -> &str {
        self.0.message()
    }

    fn details(&self) -> Option<&str> {
        self.0.details()
    }

    fn hint(&self) -> Option<&str> {
        Some(self.1)
    }

    fn table_name(&self) -> Option<&str> {
        self.0.table_name()
    }

    fn column_name(&self) -> Option<&str> {
        self.0.column_name()
    }

    fn constraint_name(&self) -> Option<&str> {
        self.0.constraint_name()
    }

    fn statement_position(&self) -> Option<i32> {
        self.0.statement_position()
    }
}

/// Adds `advice` to the error as its hint.
pub(crate) fn with_advice(error: DieselError, advice: &'static str) -> DieselError {
    match error {
        DieselError::DatabaseError(kind, information) => {
            DieselError::DatabaseError(kind, Box::new(WithAdvice(information, advice)))
        }
        error => error,
    }
}

/// The advice in the error, if it has one.
pub(crate) fn advice_of(error: &DieselError) -> Option<&'static str> {
    let DieselError::DatabaseError(_, information) = error else { return None };
    let hint = information.hint()?;
    ALL.into_iter().find(|advice| *advice == hint)
}

/// Whether a read-only server has refused a session that was to write.
pub(crate) fn is_refused_write(error: &DieselError) -> bool {
    advice_of(error) == Some(READ_ONLY)
}
