//! Errors after which a connection is of no more use, although it answers.

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::sql_parts::{Part, Parts};
use super::translations::{NO_OPERATOR, OTHER_TYPE};
use crate::error::advice;
use crate::kind::DatabaseKind;

/// Why no later statement on a connection may succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Poison {
    /// What the driver keeps with the connection, plans and numbers of types, is of an older schema.
    Outdated,
    /// A type of the program's has another number than the driver remembers, unless the statement itself is wrong.
    OtherType,
    /// The server has forgotten the statements that the driver has prepared on this connection, or has others of their names.
    Forgotten,
    /// The server, or the file, takes no writes from it: most often the server has become a replica.
    ReadOnly,
}

/// PostgreSQL's texts; `cache lookup failed` is never translated. `%` is a number.
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

/// How Diesel names the statements that it prepares; only its own are named so.
const PREPARED: &str = "__diesel_stmt_";

/// Types whose number never changes: an error that names one of them has another cause.
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

/// 1615, and what the client library says of a result that has become another.
const MYSQL_OUTDATED: &[&str] = &["Prepared statement needs to be re-prepared", "You must reset the statement"];

/// 1290 and 1836.
const MYSQL_READ_ONLY: &[&str] = &["--read-only", "--super-read-only", "--read_only", "Running in read-only mode"];

const SQLITE_READ_ONLY: &[&str] = &["attempt to write a readonly database"];

impl DatabaseKind {
    /// Whether an error says that the connection is of no more use.
    pub(crate) fn poison(self, error: &DieselError) -> Option<Poison> {
        let DieselError::DatabaseError(kind, information) = error else { return None };
        let message = information.message();
        let says = |texts: &[&str]| texts.iter().any(|text| contains(message, text));
        match (self, kind) {
            (Self::Postgres | Self::Mysql, DatabaseErrorKind::ReadOnlyTransaction) => Some(Poison::ReadOnly),
            (Self::Postgres, DatabaseErrorKind::Unknown) if says(POSTGRES_OUTDATED) => Some(Poison::Outdated),
            (Self::Postgres, DatabaseErrorKind::Unknown) if is_other_type(message) => Some(Poison::OtherType),
            (Self::Postgres, DatabaseErrorKind::Unknown) if message.contains(PREPARED) => Some(Poison::Forgotten),
            (Self::Mysql, DatabaseErrorKind::Unknown) if says(MYSQL_OUTDATED) => Some(Poison::Outdated),
            (Self::Mysql, DatabaseErrorKind::Unknown) if says(MYSQL_READ_ONLY) => Some(Poison::ReadOnly),
            (Self::Sqlite, _) if says(SQLITE_READ_ONLY) => Some(Poison::ReadOnly),
            _ => None,
        }
    }

    /// Whether a raw statement makes the server forget the statements that the driver has prepared.
    pub(crate) fn forgets_prepared(self, sql: &str) -> bool {
        if self != Self::Postgres {
            return false;
        }
        let parts: Vec<_> = Parts::of(sql, self).map(|(part, ..)| part).collect();
        let is = |part: Option<&Part<'_>>, wanted: &str| matches!(part, Some(Part::Word(word)) if word.eq_ignore_ascii_case(wanted));
        parts.split(|part| *part == Part::Sign(';')).any(|statement| {
            let all_at = 1 + usize::from(is(statement.get(1), "PREPARE"));
            is(statement.first(), "DISCARD") && is(statement.get(1), "ALL")
                || is(statement.first(), "DEALLOCATE") && is(statement.get(all_at), "ALL")
        })
    }

    /// Whether a new connection may reach a server that takes writes.
    pub(crate) fn may_write_elsewhere(self) -> bool {
        self != Self::Sqlite
    }
}

/// Whether a value was refused because its type has another number than the driver remembers: the type was made anew, renamed or
/// moved. The driver knows such a type by its name alone.
fn is_other_type(message: &str) -> bool {
    let column = message.starts_with("column \"") && message.contains(" but expression is of type ");
    let is_one = column
        || message.starts_with("operator does not exist: ")
        || super::says(message, OTHER_TYPE)
        || super::says(message, NO_OPERATOR);
    let is_separator = |c: char| !c.is_alphanumeric() && c != '_';
    is_one && !message.split(is_separator).any(|word| BUILT_IN.contains(&word))
}

/// Whether a message has a text in it, of which `%` is any number.
fn contains(message: &str, text: &str) -> bool {
    let Some((before, after)) = text.split_once('%') else { return message.contains(text) };
    let Some((_, rest)) = message.split_once(before) else { return false };
    let rest_after_number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    rest_after_number.len() < rest.len() && rest_after_number.starts_with(after)
}

/// The error after which a connection is closed. Its hint says what can be done.
pub(crate) fn advised(error: DieselError, poison: Poison) -> DieselError {
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
    fn errors_that_poison_a_connection_are_known() {
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
        let advised = advised(refused, Poison::ReadOnly);
        assert!(advice::is_refused_write(&advised) && advised.to_string() == "in whatever language");
    }

    #[test]
    fn statements_that_forget_what_was_prepared_are_known() {
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
