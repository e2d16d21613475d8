//! Errors that poison a connection: it still answers, but it must not be used again.

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::error_texts::contains_any;
use super::lexer::{LexerSettings, Token, tokens};
use crate::error::advice;
use crate::kind::DatabaseKind;

/// Why later statements on a connection may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poison {
    /// The driver has cached plans or type OIDs of an older schema.
    Outdated,
    /// A type of the program has another OID than the one that the driver has cached, unless the statement itself is
    /// wrong.
    OtherType,
    /// The server has lost the statements that the driver has prepared on this connection, or has other statements with
    /// their names.
    Forgotten,
    /// The server or the file refuses writes of this connection. Most often the server has become a replica.
    ReadOnly,
}

/// The prefix of the statements that Diesel prepares.
const PREPARED: &str = "__diesel_stmt_";

/// Types whose OID never changes. An error that names one of them has another cause.
const BUILT_IN: &str = "integer bigint smallint text character boolean numeric real double date time timestamp interval \
     uuid json jsonb bytea unknown record oid inet xml";

impl DatabaseKind {
    /// How an error poisons the connection, if it does.
    pub(crate) fn poison(self, error: &DieselError) -> Option<Poison> {
        let DieselError::DatabaseError(kind, information) = error else { return None };
        let (texts, message) = (self.texts(), information.message());
        match kind {
            DatabaseErrorKind::ReadOnlyTransaction => Some(Poison::ReadOnly),
            DatabaseErrorKind::Unknown if contains_any(message, texts.outdated) => Some(Poison::Outdated),
            DatabaseErrorKind::Unknown if is_other_type(message, texts.other_type) => Some(Poison::OtherType),
            DatabaseErrorKind::Unknown if message.contains(PREPARED) => Some(Poison::Forgotten),
            DatabaseErrorKind::Unknown if contains_any(message, texts.read_only) => Some(Poison::ReadOnly),
            _ => None,
        }
    }

    /// Whether a raw statement removes the statements that the driver has prepared on the server.
    pub(crate) fn forgets_prepared(self, sql: &str) -> bool {
        if self != Self::Postgres {
            return false;
        }
        tokens(sql, self, LexerSettings::defaults(self)).split(|token| *token == Token::Symbol(';')).any(|statement| {
            let is = |index: usize, wanted: &str| statement.get(index).is_some_and(|token| token.is(wanted));
            let all_index = if is(1, "PREPARE") { 2 } else { 1 };
            is(0, "DISCARD") && is(1, "ALL") || is(0, "DEALLOCATE") && is(all_index, "ALL")
        })
    }

    /// Whether a new connection may reach a server that accepts writes.
    pub(crate) fn may_write_elsewhere(self) -> bool {
        self != Self::Sqlite
    }
}

/// Whether the server refused a value because its type has another OID than the one that the driver has cached. The
/// type was recreated, renamed or moved to another schema. The driver caches the OIDs of such types by name.
fn is_other_type(message: &str, texts: &[&str]) -> bool {
    let is_separator = |c: char| !c.is_alphanumeric() && c != '_';
    let is_built_in = |word: &str| BUILT_IN.split(' ').any(|name| name == word);
    contains_any(message, texts) && !message.split(is_separator).any(is_built_in)
}

/// Adds advice for the user, as a hint, to an error that poisons its connection.
pub(crate) fn with_poison_advice(error: DieselError, poison: Poison) -> DieselError {
    let advice = match poison {
        Poison::ReadOnly => advice::READ_ONLY,
        Poison::Outdated => advice::SCHEMA_CHANGED,
        Poison::OtherType => advice::TYPES_CHANGED,
        Poison::Forgotten => advice::STATEMENTS_FORGOTTEN,
    };
    advice::with_advice(error, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: DatabaseErrorKind, message: &str) -> DieselError {
        DieselError::DatabaseError(kind, Box::new(message.to_owned()))
    }

    #[test]
    fn poison_recognises_the_error_texts_of_each_database() {
        let unknown = |message| error(DatabaseErrorKind::Unknown, message);
        for (kind, message, poison) in [
            (DatabaseKind::Postgres, "cached plan must not change result type", Some(Poison::Outdated)),
            (DatabaseKind::Postgres, "cache lookup failed for type 16402", Some(Poison::Outdated)),
            (DatabaseKind::Postgres, "Typ mit OID 16402 existiert nicht", Some(Poison::Outdated)),
            (
                DatabaseKind::Postgres,
                "column \"mood\" is of type mood but expression is of type oldmood",
                Some(Poison::OtherType),
            ),
            (DatabaseKind::Postgres, "operator does not exist: mood = other.mood", Some(Poison::OtherType)),
            (DatabaseKind::Postgres, "Operator existiert nicht: mood = other.mood", Some(Poison::OtherType)),
            (DatabaseKind::Postgres, "operator does not exist: integer = mood", None),
            (DatabaseKind::Postgres, "column \"a\" is of type mood but expression is of type character varying", None),
            (DatabaseKind::Postgres, "prepared statement \"__diesel_stmt_3\" does not exist", Some(Poison::Forgotten)),
            (DatabaseKind::Postgres, "Prepared Statement »__diesel_stmt_3« existiert bereits", Some(Poison::Forgotten)),
            (DatabaseKind::Postgres, "prepared statement \"mine\" does not exist", None),
            (DatabaseKind::Mysql, "Prepared statement needs to be re-prepared", Some(Poison::Outdated)),
            (
                DatabaseKind::Mysql,
                "The MariaDB server is running with the --read-only option so it cannot execute this statement",
                Some(Poison::ReadOnly),
            ),
            (DatabaseKind::Mysql, "The MariaDB server is running with the --secure-file-priv option ..", None),
            (DatabaseKind::Sqlite, "attempt to write a readonly database", Some(Poison::ReadOnly)),
            (DatabaseKind::Sqlite, "database is locked", None),
        ] {
            assert_eq!(kind.poison(&unknown(message)), poison, "{message}");
        }
        let refused = error(DatabaseErrorKind::ReadOnlyTransaction, "in whatever language");
        assert_eq!(DatabaseKind::Postgres.poison(&refused), Some(Poison::ReadOnly));
        assert!(!advice::is_refused_write(&refused));
        let advised = with_poison_advice(refused, Poison::ReadOnly);
        assert!(advice::is_refused_write(&advised) && advised.to_string() == "in whatever language");
    }

    #[test]
    fn forgets_prepared_finds_discard_all_and_deallocate_all() {
        for sql in ["DISCARD ALL", "select 1; deallocate all", "DEALLOCATE PREPARE ALL", "/* a */ Discard /* b */ ALL"]
        {
            assert!(DatabaseKind::Postgres.forgets_prepared(sql), "{sql}");
            assert!(!DatabaseKind::Mysql.forgets_prepared(sql), "{sql}");
        }
        for sql in ["DISCARD PLANS", "DEALLOCATE mine", "SELECT 'DISCARD ALL'", "DISCARD; ALL", ""] {
            assert!(!DatabaseKind::Postgres.forgets_prepared(sql), "{sql}");
        }
    }
}
