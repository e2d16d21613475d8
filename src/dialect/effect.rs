//! The effect of a raw statement on the transaction in which it runs, as far as its text shows the effect.

use super::lexer::{LexerSettings, Token, is_back_to_savepoint, outside_parentheses, tokens};
use crate::kind::DatabaseKind;

/// The effect of a text of one or more statements on the open transaction.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Effect {
    /// The first word of a statement that ends the transaction.
    pub(crate) ends: Option<String>,
    /// The first word of a statement after which the session has to ask the server whether the transaction still
    /// exists.
    pub(crate) may_end: Option<String>,
    /// A statement begins a transaction or sets a savepoint.
    pub(crate) begins: bool,
    /// A statement begins a transaction.
    pub(crate) begins_transaction: bool,
    /// A statement sets a savepoint that is not one of Diesel's.
    pub(crate) sets_savepoint: bool,
    /// The text names `standard_conforming_strings`, which decides how PostgreSQL reads strings.
    pub(crate) names_string_setting: bool,
    /// The writes of the statements and the savepoints around them, in the default reading of the text.
    pub(crate) write_steps: Vec<WriteStep>,
}

/// A statement that writes, or that opens or ends a savepoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteStep {
    Write,
    OpenSavepoint,
    ReleaseSavepoint,
    RollBackToSavepoint,
}

impl DatabaseKind {
    /// The effect of a raw statement on the open transaction. If a server may read the text in several ways, the result
    /// combines the effects of all readings.
    pub(crate) fn effect(self, sql: &str) -> Effect {
        let names_string_setting = contains_word(sql, "standard_conforming_strings");
        let mut effect = Effect { names_string_setting, ..Effect::default() };
        for settings in LexerSettings::possible(sql, self) {
            let mut reading = Effect::default();
            reading.read(sql, self.known(), settings);
            // This setting is rare, so the session asks the server for its value.
            if self == Self::Postgres && settings.has_unusual_backslash(self) {
                reading.may_end = reading.ends.take();
            }
            effect.ends = effect.ends.or(reading.ends);
            effect.may_end = effect.may_end.or(reading.may_end);
            effect.begins |= reading.begins || reading.begins_transaction;
            effect.begins_transaction |= reading.begins_transaction;
            effect.sets_savepoint |= reading.sets_savepoint;
            if settings == LexerSettings::defaults(self) {
                effect.write_steps = reading.write_steps;
            }
        }
        if self == Self::Mysql && (sql.contains("/*!") || sql.contains("/*M!")) {
            effect.may_end.get_or_insert_with(|| "/*!".into());
        }
        effect
    }
}

impl Effect {
    fn read(&mut self, sql: &str, kind: DatabaseKind, settings: LexerSettings) {
        // Whether the statement is inside the body of a trigger or function, whose `END` does not end a transaction.
        let mut in_body = false;
        for statement in tokens(sql, kind, settings).split(|token| *token == Token::Symbol(';')) {
            let word = |index: usize| match statement.get(index) {
                Some(Token::Word(word)) => word.to_ascii_uppercase(),
                _ => String::new(),
            };
            let first = word(0);
            if first.is_empty() && (statement.is_empty() || statement[0] == Token::Symbol('(')) {
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
            let is_back_to_savepoint = is_back_to_savepoint(statement);
            self.write_steps.extend(match &*first {
                "SAVEPOINT" => Some(WriteStep::OpenSavepoint),
                "RELEASE" => Some(WriteStep::ReleaseSavepoint),
                _ if is_back_to_savepoint => Some(WriteStep::RollBackToSavepoint),
                first => writes(first, statement).then_some(WriteStep::Write),
            });
            if kind == DatabaseKind::Mysql {
                let is_harmless =
                    HARMLESS.split(' ').any(|word| word == first) || first == "SET" && sets_own_variables(statement);
                if !is_harmless && !is_back_to_savepoint {
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

/// The statements that never end a transaction of MySQL or MariaDB. All other statements may: data definition,
/// maintenance, procedures, prepared statements, compound statements, and the statements of future versions.
const HARMLESS: &str = "SELECT INSERT UPDATE DELETE REPLACE WITH VALUES TABLE SAVEPOINT RELEASE SHOW EXPLAIN DESCRIBE DESC \
                        USE DO PREPARE DEALLOCATE";

/// Whether a statement certainly writes. The effect of a function, a procedure or an anonymous block is not known.
/// `first` is the first word of the statement.
fn writes(first: &str, statement: &[Token<'_>]) -> bool {
    let is = |index: usize, wanted: &str| statement.get(index).is_some_and(|token| token.is(wanted));
    match first {
        "INSERT" | "UPDATE" | "DELETE" | "REPLACE" | "MERGE" | "LOAD" | "TRUNCATE" | "ALTER" | "DROP" | "REFRESH"
        | "GRANT" | "REVOKE" | "COMMENT" | "NOTIFY" => true,
        // A commit would not keep a temporary table either.
        "CREATE" => !(1..=2).any(|index| is(index, "TEMP") || is(index, "TEMPORARY")),
        "COPY" => outside_parentheses(statement).any(|(_, token)| token.is("FROM")),
        "WITH" => (1..statement.len()).any(|index| {
            let is_update = is(index, "UPDATE") && matches!(statement[index - 1], Token::Symbol('(' | ')'));
            let has_into = is(index, "INSERT") || is(index, "REPLACE") || is(index, "MERGE");
            is_update || has_into && is(index + 1, "INTO") || is(index, "DELETE") && is(index + 1, "FROM")
        }),
        _ => false,
    }
}

/// Whether a `SET` of MySQL or MariaDB sets user variables only.
fn sets_own_variables(statement: &[Token<'_>]) -> bool {
    let is_setting = |two: &[Token<'_>]| two == [Token::Symbol('@'), Token::Symbol('@')];
    // A name that follows a comma and has no `@` is a setting too. Of these settings, only `autocommit` ends a
    // transaction.
    let names_autocommit = |token: &Token<'_>| matches!(token, Token::Word(name) | Token::QuotedName(name) if name.eq_ignore_ascii_case("autocommit"));
    statement.get(1) == Some(&Token::Symbol('@'))
        && !statement.windows(2).any(is_setting)
        && !statement.iter().any(names_autocommit)
}

/// Whether the statement, such as `COMMIT AND CHAIN`, also begins the next transaction.
fn chains(statement: &[Token<'_>]) -> bool {
    let chain = statement.iter().position(|token| token.is("CHAIN"));
    chain.is_some_and(|index| !statement[index - 1].is("NO"))
}

/// Whether the statement begins a function of PostgreSQL whose body continues behind the next `;`. Text in parentheses
/// is not a body.
fn opens_atomic_body(statement: &[Token<'_>]) -> bool {
    let is = |index: usize, wanted: &str| statement.get(index).is_some_and(|token| token.is(wanted));
    let mut begins = outside_parentheses(statement).filter(|(_, token)| token.is("BEGIN"));
    begins.find(|(index, _)| is(index + 1, "ATOMIC")).is_some_and(|(index, _)| !is(index + 2, "END"))
}

fn contains_word(sql: &str, wanted: &str) -> bool {
    sql.as_bytes().windows(wanted.len()).any(|found| found.eq_ignore_ascii_case(wanted.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::{Effect, WriteStep};
    use crate::kind::DatabaseKind;

    fn effect(sql: &str, kind: DatabaseKind) -> Effect {
        kind.effect(sql)
    }

    #[test]
    fn effect_of_a_statement_without_an_ending_is_empty() {
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
    fn effect_finds_every_end_of_a_transaction() {
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
    fn effect_may_end_if_the_ending_depends_on_the_string_setting() {
        let sql = "SELECT 'C:\\', '; COMMIT; BEGIN; SELECT '";
        let Effect { ends, may_end, .. } = effect(sql, DatabaseKind::Postgres);
        assert_eq!((ends, may_end.as_deref()), (None, Some("COMMIT")));
        assert!(effect("SET Standard_Conforming_Strings = off", DatabaseKind::Postgres).names_string_setting);
    }

    #[test]
    fn effect_finds_the_beginning_of_a_transaction_or_savepoint() {
        for sql in ["BEGIN", "x; START TRANSACTION", "/* */ SAVEPOINT a", "COMMIT AND CHAIN"] {
            assert!(effect(sql, DatabaseKind::Postgres).begins, "{sql}");
        }
        for sql in ["SELECT 1", "COMMIT AND NO CHAIN", "'BEGIN'", "START REPLICA"] {
            assert!(!effect(sql, DatabaseKind::Postgres).begins, "{sql}");
        }
        assert!(effect("SAVEPOINT mine", DatabaseKind::Mysql).sets_savepoint);
        assert!(!effect("SAVEPOINT diesel_savepoint_1", DatabaseKind::Mysql).sets_savepoint);
    }

    #[test]
    fn effect_lists_writes_and_savepoints() {
        use WriteStep::{OpenSavepoint, ReleaseSavepoint, RollBackToSavepoint, Write};
        for (sql, steps) in [
            ("SELECT 1", &[][..]),
            ("SELECT 'INSERT INTO t'; EXPLAIN DELETE FROM t; SHOW x; SET a = 1", &[]),
            ("SELECT * FROM t FOR UPDATE", &[]),
            ("WITH a AS (SELECT 1 FROM t FOR UPDATE) SELECT * FROM a FOR NO KEY UPDATE", &[]),
            ("CREATE TEMP TABLE t AS SELECT 1; create local temporary table t (a int)", &[]),
            ("COPY (SELECT * FROM t) TO STDOUT; CALL p(); DO 1; TABLE t; VALUES (1); PRAGMA a", &[]),
            ("insert into t values (1)", &[Write]),
            ("/* a */ UPDATE t SET a = 1; DELETE FROM t", &[Write, Write]),
            ("REPLACE INTO t VALUES (1)", &[Write]),
            ("WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", &[Write]),
            ("WITH a AS (UPDATE t SET a = 1 RETURNING a) SELECT * FROM a", &[Write]),
            ("WITH a AS (SELECT 1) UPDATE t SET a = 1", &[Write]),
            ("WITH a AS (DELETE FROM t RETURNING a) SELECT * FROM a", &[Write]),
            ("COPY t (a, b) FROM STDIN", &[Write]),
            ("CREATE TABLE t (a int); ALTER TABLE t ADD b int; DROP TABLE t", &[Write; 3]),
            (
                "SAVEPOINT a; INSERT INTO t VALUES (1); ROLLBACK TO SAVEPOINT a; RELEASE SAVEPOINT a",
                &[OpenSavepoint, Write, RollBackToSavepoint, ReleaseSavepoint],
            ),
        ] {
            for kind in [DatabaseKind::Postgres, DatabaseKind::Sqlite, DatabaseKind::Mysql] {
                assert_eq!(effect(sql, kind).write_steps, steps, "{sql}");
            }
        }
        let trigger = "CREATE TRIGGER a AFTER INSERT ON b BEGIN DELETE FROM b; END; SELECT 2";
        assert_eq!(effect(trigger, DatabaseKind::Sqlite).write_steps, [Write]);
    }
}
