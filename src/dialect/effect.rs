//! What a raw statement does to the transaction in which it is sent, as far as its text tells.

use super::sql_parts::{Dialect, Part, Parts};
use crate::kind::DatabaseKind;

/// What the text of a statement says about transactions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Effect {
    /// The first word of a statement that ends the transaction.
    pub(crate) ends: Option<String>,
    /// The first word of a statement after which the server has to be asked whether the transaction still exists.
    pub(crate) may_end: Option<String>,
    /// Something in it begins a transaction, or sets a savepoint.
    pub(crate) begins: bool,
    /// Something in it begins a transaction.
    pub(crate) begins_transaction: bool,
    /// It sets a savepoint that is not one of Diesel's own.
    pub(crate) sets_savepoint: bool,
    /// It names the setting by which PostgreSQL reads strings.
    pub(crate) names_string_setting: bool,
}

impl Effect {
    /// Where a server may read the text in more than one way it is told what any of these does.
    pub(super) fn of(sql: &str, kind: DatabaseKind) -> Self {
        let mut effect =
            Self { names_string_setting: contains_word(sql, "standard_conforming_strings"), ..Self::default() };
        for dialect in Dialect::possible(sql, kind) {
            let mut read = Self::default();
            read.read(sql, kind, dialect);
            // That other setting of strings is rare: then the server is asked for it.
            if kind == DatabaseKind::Postgres && dialect.has_unusual_backslash(kind) {
                read.may_end = read.ends.take();
            }
            effect.ends = effect.ends.or(read.ends);
            effect.may_end = effect.may_end.or(read.may_end);
            effect.begins |= read.begins || read.begins_transaction;
            effect.begins_transaction |= read.begins_transaction;
            effect.sets_savepoint |= read.sets_savepoint;
        }
        if kind == DatabaseKind::Mysql && (sql.contains("/*!") || sql.contains("/*M!")) {
            effect.may_end.get_or_insert_with(|| "/*!".into());
        }
        effect
    }

    fn read(&mut self, sql: &str, kind: DatabaseKind, dialect: Dialect) {
        // Inside of the body of a trigger or function, whose `END` ends no transaction.
        let mut in_body = false;
        let parts: Vec<_> = Parts::read(sql, kind, dialect).map(|(part, ..)| part).collect();
        for statement in parts.split(|part| *part == Part::Sign(';')) {
            let word = |at: usize| match statement.get(at) {
                Some(Part::Word(word)) => word.to_ascii_uppercase(),
                _ => String::new(),
            };
            let first = word(0);
            if first.is_empty() && (statement.is_empty() || statement[0] == Part::Sign('(')) {
                continue;
            }
            if in_body {
                in_body = first != "END";
                continue;
            }
            match &*first {
                "BEGIN" => self.begins_transaction = true,
                "START" => self.begins_transaction |= word(1) == "TRANSACTION",
                "SAVEPOINT" => {
                    self.begins = true;
                    self.sets_savepoint |= !word(1).starts_with("DIESEL_");
                }
                _ => {}
            }
            let is_back_to_savepoint = first == "ROLLBACK" && (word(1) == "TO" || word(2) == "TO");
            if kind == DatabaseKind::Mysql {
                let is_plain = PLAIN.contains(&&*first) || first == "SET" && sets_own_variables(statement);
                if !is_plain && !is_back_to_savepoint {
                    self.may_end.get_or_insert(first);
                }
                continue;
            }
            let ends = match &*first {
                "COMMIT" | "END" => true,
                "ROLLBACK" => !is_back_to_savepoint,
                "ABORT" => kind == DatabaseKind::Postgres,
                "PREPARE" => kind == DatabaseKind::Postgres && word(1) == "TRANSACTION",
                _ => false,
            };
            if ends {
                self.begins_transaction |= chains(statement);
                self.ends.get_or_insert(first);
            } else if first == "CREATE" {
                in_body = match kind {
                    DatabaseKind::Sqlite => word(1) == "TRIGGER" || word(2) == "TRIGGER",
                    DatabaseKind::Postgres | DatabaseKind::Mysql => opens_atomic_body(statement),
                };
            }
        }
    }
}

/// What does not end a transaction of MySQL or MariaDB, whatever it names. Everything else may: data definition, maintenance,
/// procedures, prepared texts, compound statements, and what the next version brings.
const PLAIN: [&str; 18] = [
    "SELECT",
    "INSERT",
    "UPDATE",
    "DELETE",
    "REPLACE",
    "WITH",
    "VALUES",
    "TABLE",
    "SAVEPOINT",
    "RELEASE",
    "SHOW",
    "EXPLAIN",
    "DESCRIBE",
    "DESC",
    "USE",
    "DO",
    "PREPARE",
    "DEALLOCATE",
];

/// Whether a `SET` of MySQL or MariaDB sets variables of the program's own and no other.
fn sets_own_variables(statement: &[Part<'_>]) -> bool {
    let is_setting = |two: &[Part<'_>]| two == [Part::Sign('@'), Part::Sign('@')];
    // One that follows a comma and has no sign is a setting too. `autocommit` alone ends a transaction.
    let names_autocommit = |part: &Part<'_>| matches!(part, Part::Word(name) | Part::Name(name) if name.eq_ignore_ascii_case("autocommit"));
    statement.get(1) == Some(&Part::Sign('@'))
        && !statement.windows(2).any(is_setting)
        && !statement.iter().any(names_autocommit)
}

/// Whether `COMMIT AND CHAIN` or the like begins the next transaction at once.
fn chains(statement: &[Part<'_>]) -> bool {
    let is = |part: &Part<'_>, wanted: &str| matches!(part, Part::Word(word) if word.eq_ignore_ascii_case(wanted));
    let chain = statement.iter().position(|part| is(part, "CHAIN"));
    chain.is_some_and(|at| !is(&statement[at - 1], "NO"))
}

/// Whether a function of PostgreSQL has a body that goes on behind the next `;`. What is in parentheses is no body.
fn opens_atomic_body(statement: &[Part<'_>]) -> bool {
    let is = |part: Option<&Part<'_>>, wanted: &str| matches!(part, Some(Part::Word(word)) if word.eq_ignore_ascii_case(wanted));
    let mut depth = 0_usize;
    for (at, part) in statement.iter().enumerate() {
        match part {
            Part::Sign('(') => depth += 1,
            Part::Sign(')') => depth = depth.saturating_sub(1),
            _ if depth == 0 && is(Some(part), "BEGIN") && is(statement.get(at + 1), "ATOMIC") => {
                return !is(statement.get(at + 2), "END");
            }
            _ => {}
        }
    }
    false
}

fn contains_word(sql: &str, wanted: &str) -> bool {
    sql.as_bytes().windows(wanted.len()).any(|found| found.eq_ignore_ascii_case(wanted.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::Effect;
    use crate::kind::DatabaseKind;

    fn effect(sql: &str, kind: DatabaseKind) -> Effect {
        Effect::of(sql, kind)
    }

    #[test]
    fn statements_that_end_nothing_are_read_as_such() {
        for sql in [
            "",
            " ; -- nothing",
            "SELECT 1",
            "(SELECT 1)",
            "INSERT INTO t VALUES ('COMMIT; ROLLBACK')",
            "-- COMMIT\nSELECT 1",
            "/* COMMIT; */ UPDATE t SET a = 1",
            "ROLLBACK TO SAVEPOINT a",
            "ROLLBACK TRANSACTION TO a",
            "SAVEPOINT a; RELEASE SAVEPOINT a",
            "PREPARE p AS SELECT 1",
            "SELECT \"; COMMIT; \"",
        ] {
            for kind in [DatabaseKind::Postgres, DatabaseKind::Sqlite, DatabaseKind::Mysql] {
                let Effect { ends, may_end, .. } = effect(sql, kind);
                assert_eq!((ends, may_end), (None, None), "{sql}");
            }
        }
        for sql in [
            "CREATE FUNCTION f() RETURNS void AS $b$ BEGIN; COMMIT; END $b$ LANGUAGE plpgsql",
            "INSERT INTO t VALUES (E'it\\'s; COMMIT')",
            "SELECT E'a' -- b\n '\\'; COMMIT'",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END; SELECT 2",
            "CREATE FUNCTION f() RETURNS void BEGIN ATOMIC END; SELECT 2",
            "/* /* */ COMMIT; */ SELECT 1",
            "SELECT 1 AS a$b$; SELECT 1 AS c$b$",
            "SELECT $1$a$; COMMIT; $a$",
        ] {
            let Effect { ends, may_end, .. } = effect(sql, DatabaseKind::Postgres);
            assert_eq!((ends, may_end), (None, None), "{sql}");
        }
        for sql in [
            "CREATE TRIGGER a AFTER INSERT ON b BEGIN SELECT 1; UPDATE b SET c = CASE WHEN 1 THEN 2 END; END",
            "CREATE TEMP TRIGGER begin AFTER INSERT ON b BEGIN SELECT 1; END; SELECT 2",
            "SELECT [; COMMIT; ], `; COMMIT; `, $a(;COMMIT;)",
        ] {
            let Effect { ends, may_end, .. } = effect(sql, DatabaseKind::Sqlite);
            assert_eq!((ends, may_end), (None, None), "{sql}");
        }
        for sql in [
            "INSERT INTO t VALUES ('it''s; COMMIT')",
            "SELECT 1 # it's; COMMIT",
            "SET @a = 'COMMIT'; SELECT 1 --\u{1}; COMMIT",
            "SELECT `; COMMIT; `",
        ] {
            assert_eq!(effect(sql, DatabaseKind::Mysql).may_end, None, "{sql}");
        }
    }

    #[test]
    fn endings_are_found_wherever_they_are() {
        for sql in [
            "COMMIT",
            " commit;",
            "SELECT ';'; rollback",
            "/* x */ END",
            "INSERT INTO t VALUES (1); COMMIT; BEGIN",
            "ROLLBACK AND CHAIN",
            "INSERT INTO t VALUES ('\\'); COMMIT",
            "CREATE TABLE a (b INT); END",
            "ROLLBACK; TO",
        ] {
            for kind in [DatabaseKind::Postgres, DatabaseKind::Sqlite] {
                assert!(effect(sql, kind).ends.is_some(), "{sql}");
            }
            assert!(effect(sql, DatabaseKind::Mysql).may_end.is_some(), "{sql}");
        }
        for sql in [
            "/* /* */ */ COMMIT; BEGIN",
            "SELECT 1 AS a$b$; COMMIT; BEGIN; SELECT 1 AS c$b$",
            "SELECT 1 /* ' /* */ ' */; COMMIT; BEGIN",
            "CREATE TABLE zz (\"BEGIN\" int); END; BEGIN",
            "INSERT INTO t VALUES (E'\\''); COMMIT",
            "SELECT E'a'\n'\\'' ; COMMIT; BEGIN; SELECT '",
            "SELECT a$E'\\'; COMMIT; SELECT '",
            "SELECT 1 -- a\rCOMMIT; COMMIT",
            "CREATE FUNCTION f(begin atomic) RETURNS int LANGUAGE sql AS ''; END; BEGIN",
            "CREATE FUNCTION f() RETURNS void BEGIN ATOMIC END; END; BEGIN",
            "SELECT 1$a$; $a$; COMMIT",
            "ABORT",
            "PREPARE TRANSACTION 'a'",
            "SELECT '\u{a0}'; COMMIT",
        ] {
            assert!(effect(sql, DatabaseKind::Postgres).ends.is_some(), "{sql}");
        }
        for sql in [
            "SELECT 1 AS [a'b]; COMMIT; BEGIN; SELECT 1 AS [c'd]",
            "SELECT $a$b; COMMIT; BEGIN",
            "SELECT $a('); COMMIT; BEGIN; SELECT $a(')",
            "SELECT $a::b('); COMMIT; SELECT @c(')",
            "CREATE TABLE yy ([BEGIN] int); END; BEGIN",
            "CREATE TRIGGER a AFTER INSERT ON b BEGIN SELECT 1; END; COMMIT",
            "/* /* */ COMMIT",
        ] {
            assert!(effect(sql, DatabaseKind::Sqlite).ends.is_some(), "{sql}");
        }
        for sql in [
            "CREATE TABLE t (a INT)",
            "START TRANSACTION",
            "TRUNCATE t",
            "SET autocommit = 1",
            "SET @@autocommit = 1",
            "SET @@session.autocommit = 1",
            "SET @a = 1, `autocommit` = 1",
            "SET DEFAULT ROLE NONE",
            "CHECK TABLE t",
            "CALL p()",
            "BEGIN NOT ATOMIC COMMIT; END",
            "/*!50000 COMMIT */ # it's",
            "SELECT 1 /*M! ; COMMIT */",
            "INSERT INTO t VALUES ('\\''); CHECK TABLE t",
            "SELECT '\\'; COMMIT; BEGIN; SELECT '",
            "SELECT \"a'b\"; COMMIT; BEGIN; SELECT \"c'd\"",
            "SELECT '\\'' , \"'; COMMIT; -- \"'",
            "SELECT 1 --\u{a0}; COMMIT",
        ] {
            assert!(effect(sql, DatabaseKind::Mysql).may_end.is_some(), "{sql}");
        }
    }

    #[test]
    fn strings_that_depend_on_a_setting_are_told_apart() {
        let sql = "SELECT 'C:\\', '; COMMIT; BEGIN; SELECT '";
        let Effect { ends, may_end, .. } = effect(sql, DatabaseKind::Postgres);
        assert_eq!((ends, may_end.as_deref()), (None, Some("COMMIT")));
        assert!(effect("SET Standard_Conforming_Strings = off", DatabaseKind::Postgres).names_string_setting);
    }

    #[test]
    fn beginnings_are_found() {
        for sql in ["BEGIN", "x; START TRANSACTION", "/* */ SAVEPOINT a", "COMMIT AND CHAIN"] {
            assert!(effect(sql, DatabaseKind::Postgres).begins, "{sql}");
        }
        for sql in ["SELECT 1", "COMMIT AND NO CHAIN", "'BEGIN'", "START REPLICA"] {
            assert!(!effect(sql, DatabaseKind::Postgres).begins, "{sql}");
        }
        assert!(effect("SAVEPOINT mine", DatabaseKind::Mysql).sets_savepoint);
        assert!(!effect("SAVEPOINT diesel_savepoint_1", DatabaseKind::Mysql).sets_savepoint);
    }
}
