//! Errors that poison a connection: it still answers, but it must not be used again.

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::lexer::{Lexer, Token};
use super::translations::{NO_OPERATOR, OTHER_TYPE};
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

/// PostgreSQL's texts in all languages. PostgreSQL never translates `cache lookup failed`. `%` is a number.
const POSTGRES_OUTDATED: &[&str] = &[
    "cache lookup failed for type",
    "cached plan must not change result type",
    "gecachter Plan darf den Ergebnistyp nicht ändern",
    "el plan almacenado no debe cambiar el tipo de resultado",
    "le plan en cache ne doit pas modifier le type en résultat",
    "il cached plan non deve cambiare il tipo del risultato",
    "キャッシュした実行計画は結果型を変更してはなりません",
    "დაკეშილი გეგმა შედეგის ტიპს არ უნდა ცვლიდეს",
    "캐시된 계획에서 결과 형식을 바꾸지 않아야 함",
    "в кешированном плане не должен изменяться тип результата",
    "cache:ad plan får inte ändra resultattyp",
    "в кешованому плані не повинен змінюватись тип результату",
    "已缓冲的计划不能改变结果类型",
    "type with OID % does not exist",
    "Typ mit OID % existiert nicht",
    "no existe el tipo con OID %",
    "le type d'OID % n'existe pas",
    "il tipo con OID % non esiste",
    "OID %の型は存在しません",
    "ტიპი OID-ით % არ არსებობს",
    "OID % 자료형 없음",
    "тип с OID % не существует",
    "typ med OID % existerar inte",
    "тип з OID % не існує",
    "OID 为 % 的类型不存在",
];

/// The prefix of the statements that Diesel prepares.
const PREPARED: &str = "__diesel_stmt_";

/// Types whose OID never changes. An error that names one of them has another cause.
const BUILT_IN: [&str; 22] = [
    "integer",
    "bigint",
    "smallint",
    "text",
    "character",
    "boolean",
    "numeric",
    "real",
    "double",
    "date",
    "time",
    "timestamp",
    "interval",
    "uuid",
    "json",
    "jsonb",
    "bytea",
    "unknown",
    "record",
    "oid",
    "inet",
    "xml",
];

/// Error 1615, and the client library's text for a result that has changed.
const MYSQL_OUTDATED: &[&str] = &["Prepared statement needs to be re-prepared", "You must reset the statement"];

/// Errors 1290 and 1836.
const MYSQL_READ_ONLY: &[&str] = &["--read-only", "--super-read-only", "--read_only", "Running in read-only mode"];

const SQLITE_READ_ONLY: &[&str] = &["attempt to write a readonly database"];

impl DatabaseKind {
    /// How an error poisons the connection, if it does.
    pub(crate) fn poison(self, error: &DieselError) -> Option<Poison> {
        let DieselError::DatabaseError(kind, information) = error else { return None };
        let message = information.message();
        let contains_any = |texts: &[&str]| texts.iter().any(|text| contains(message, text));
        match (self, kind) {
            (Self::Postgres | Self::Mysql, DatabaseErrorKind::ReadOnlyTransaction) => Some(Poison::ReadOnly),
            (Self::Postgres, DatabaseErrorKind::Unknown) if contains_any(POSTGRES_OUTDATED) => Some(Poison::Outdated),
            (Self::Postgres, DatabaseErrorKind::Unknown) if is_other_type(message) => Some(Poison::OtherType),
            (Self::Postgres, DatabaseErrorKind::Unknown) if message.contains(PREPARED) => Some(Poison::Forgotten),
            (Self::Mysql, DatabaseErrorKind::Unknown) if contains_any(MYSQL_OUTDATED) => Some(Poison::Outdated),
            (Self::Mysql, DatabaseErrorKind::Unknown) if contains_any(MYSQL_READ_ONLY) => Some(Poison::ReadOnly),
            (Self::Sqlite, _) if contains_any(SQLITE_READ_ONLY) => Some(Poison::ReadOnly),
            _ => None,
        }
    }

    /// Whether a raw statement removes the statements that the driver has prepared on the server.
    pub(crate) fn forgets_prepared(self, sql: &str) -> bool {
        if self != Self::Postgres {
            return false;
        }
        let tokens: Vec<_> = Lexer::new(sql, self).map(|(token, ..)| token).collect();
        let is = |token: Option<&Token<'_>>, wanted: &str| matches!(token, Some(Token::Word(word)) if word.eq_ignore_ascii_case(wanted));
        tokens.split(|token| *token == Token::Symbol(';')).any(|statement| {
            let all_index = 1 + usize::from(is(statement.get(1), "PREPARE"));
            is(statement.first(), "DISCARD") && is(statement.get(1), "ALL")
                || is(statement.first(), "DEALLOCATE") && is(statement.get(all_index), "ALL")
        })
    }

    /// Whether a new connection may reach a server that accepts writes.
    pub(crate) fn may_write_elsewhere(self) -> bool {
        self != Self::Sqlite
    }
}

/// Whether the server refused a value because its type has another OID than the one that the driver has cached. The
/// type was recreated, renamed or moved to another schema. The driver caches the OIDs of such types by name.
fn is_other_type(message: &str) -> bool {
    let column = message.starts_with("column \"") && message.contains(" but expression is of type ");
    let is_mismatch = column
        || message.starts_with("operator does not exist: ")
        || super::contains_any(message, OTHER_TYPE)
        || super::contains_any(message, NO_OPERATOR);
    let is_separator = |c: char| !c.is_alphanumeric() && c != '_';
    is_mismatch && !message.split(is_separator).any(|word| BUILT_IN.contains(&word))
}

/// Whether `message` contains `text`. A `%` in `text` stands for any number.
fn contains(message: &str, text: &str) -> bool {
    let Some((before, after)) = text.split_once('%') else { return message.contains(text) };
    let Some((_, rest)) = message.split_once(before) else { return false };
    let rest_after_number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    rest_after_number.len() < rest.len() && rest_after_number.starts_with(after)
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
            (DatabaseKind::Postgres, "Typ mit OID x existiert nicht", None),
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
