//! Detects statements that may leave state on the connection after their transaction.
//!
//! An unknown statement counts as one that leaves state. A false alarm costs a connection or a round trip. A missed
//! statement would show the next holder the state of the previous holder.

use super::lexer::{Lexer, LexerSettings, Token};
use crate::kind::DatabaseKind;

/// Whether `sql` has a statement other than those of [`HARMLESS`], or calls a function that is known to leave state.
///
/// `mysql` is true for MySQL and MariaDB, and false for SQLite.
pub(super) fn leaves_state(sql: &str, mysql: bool) -> bool {
    let kind = if mysql { DatabaseKind::Mysql } else { DatabaseKind::Sqlite };
    mysql && (sql.contains("/*!") || sql.contains("/*M!"))
        || LexerSettings::possible(sql, kind).any(|settings| leaves_state_with(settings, sql, kind))
}

fn leaves_state_with(settings: LexerSettings, sql: &str, kind: DatabaseKind) -> bool {
    let mysql = kind == DatabaseKind::Mysql;
    let mut tokens = Lexer::with_settings(sql, kind, settings).map(|(token, ..)| token).peekable();
    let mut is_first = true;
    while let Some(token) = tokens.next() {
        match token {
            Token::Symbol(';') => is_first = true,
            Token::Symbol('(') if is_first => {}
            Token::Word(verb) if is_first => {
                is_first = false;
                if !HARMLESS.iter().any(|harmless| verb.eq_ignore_ascii_case(harmless))
                    && !is_back_to_savepoint(verb, &mut tokens)
                {
                    return true;
                }
            }
            _ if is_first => return true,
            // A harmless statement only reads variables of the server (`@@name`), but it can set user variables
            // (`@name`).
            Token::Symbol('@') if mysql && tokens.next_if_eq(&Token::Symbol('@')).is_none() => return true,
            // A quoted name may be the name of a function too.
            Token::Word(word) | Token::QuotedName(word) if mysql => {
                let is = |name| word.eq_ignore_ascii_case(name);
                let sets_last_id = is("LAST_INSERT_ID")
                    && tokens.next_if_eq(&Token::Symbol('(')).is_some()
                    && tokens.peek() != Some(&Token::Symbol(')'));
                if sets_last_id || is("GET_LOCK") || is("NEXTVAL") || is("NEXT") {
                    return true;
                }
            }
            Token::Word(word) | Token::QuotedName(word) if word.eq_ignore_ascii_case("LOAD_EXTENSION") => return true,
            _ => {}
        }
    }
    false
}

/// Whether a typed statement of PostgreSQL calls a function that is not in [`KNOWN`].
pub(super) fn calls_unknown_function(sql: &str) -> bool {
    let mut before = [Token::Symbol(';'); 2];
    // Whether the token belongs to the name of the table of an INSERT. The parentheses behind this name contain
    // columns.
    let mut in_target = false;
    for (token, ..) in Lexer::new(sql, DatabaseKind::Postgres) {
        if token == Token::Symbol('(') {
            let is_known = match before {
                [qualifier, Token::Word(word)] => {
                    qualifier != Token::Symbol('.') && KNOWN.iter().any(|known| word.eq_ignore_ascii_case(known))
                }
                [_, Token::QuotedName(_)] => in_target,
                [_, Token::StringLiteral(_) | Token::DollarQuoted(_) | Token::Symbol(_)] => true,
            };
            if !is_known {
                return true;
            }
        }
        in_target = match token {
            Token::Word(word) => word.eq_ignore_ascii_case("INTO"),
            Token::QuotedName(_) | Token::Symbol('.') => in_target,
            Token::StringLiteral(_) | Token::DollarQuoted(_) | Token::Symbol(_) => false,
        };
        before = [before[1], token];
    }
    false
}

/// The first words of the statements that leave no state.
const HARMLESS: [&str; 9] =
    ["SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE", "WITH", "VALUES", "SAVEPOINT", "RELEASE"];

/// The words before a parenthesis that are keywords, or functions that leave no state.
const KNOWN: [&str; 58] = [
    "ALL",
    "AND",
    "ANY",
    "ARRAY",
    "AS",
    "BETWEEN",
    "BY",
    "CASE",
    "CAST",
    "CONFLICT",
    "DISTINCT",
    "ELSE",
    "EXCEPT",
    "EXISTS",
    "FILTER",
    "FROM",
    "GROUP",
    "HAVING",
    "ILIKE",
    "IN",
    "INTERSECT",
    "IS",
    "JOIN",
    "LATERAL",
    "LIKE",
    "LIMIT",
    "NOT",
    "OFFSET",
    "ON",
    "OR",
    "OVER",
    "RETURNING",
    "ROW",
    "SELECT",
    "SET",
    "SOME",
    "THEN",
    "UNION",
    "USING",
    "VALUES",
    "WHEN",
    "WHERE",
    // Functions.
    "ARRAY_AGG",
    "AVG",
    "BOOL_AND",
    "BOOL_OR",
    "COALESCE",
    "COUNT",
    "DATE",
    "JSON_AGG",
    "JSONB_AGG",
    "LOWER",
    "MAX",
    "MIN",
    "NOW",
    "STRING_AGG",
    "SUM",
    "UPPER",
];

fn is_back_to_savepoint<'s>(verb: &str, tokens: &mut impl Iterator<Item = Token<'s>>) -> bool {
    let is_to = |token: Option<Token<'_>>| matches!(token, Some(Token::Word(word)) if word.eq_ignore_ascii_case("TO"));
    // `ROLLBACK TO ..`, or `ROLLBACK TRANSACTION TO ..` and `ROLLBACK WORK TO ..`.
    verb.eq_ignore_ascii_case("ROLLBACK") && (is_to(tokens.next()) || is_to(tokens.next()))
}

#[cfg(test)]
mod tests {
    use super::{calls_unknown_function, leaves_state};

    #[test]
    fn leaves_state_is_false_for_rows_and_savepoints() {
        for sql in [
            "",
            "-- nothing\n ;",
            "SELECT 1",
            "select * from t where a = 'SET x = 1; PRAGMA y'",
            "(SELECT 1) UNION (SELECT 2)",
            "INSERT INTO t VALUES ('it''s; SET a = 1'); UPDATE t SET a = 1; DELETE FROM t",
            "REPLACE INTO t VALUES (1)",
            "WITH a AS (SELECT 1) SELECT * FROM a",
            "VALUES (1)",
            "SAVEPOINT diesel_savepoint_1",
            "RELEASE SAVEPOINT diesel_savepoint_1",
            "ROLLBACK TO SAVEPOINT diesel_savepoint_1; ROLLBACK WORK TO a",
            "/* SET */ SELECT 1 -- PRAGMA\n",
        ] {
            assert!(!leaves_state(sql, true), "{sql}");
            assert!(!leaves_state(sql, false), "{sql}");
        }
        for sql in [
            "SELECT 'it\\\\s @a := 1', \"@b\", `@c`",
            "SELECT @@in_transaction",
            "SELECT LAST_INSERT_ID()",
            "SELECT LAST_INSERT_ID",
            "SELECT 1 # @a := GET_LOCK('a', 0)",
        ] {
            assert!(!leaves_state(sql, true), "{sql}");
        }
    }

    #[test]
    fn leaves_state_finds_a_statement_at_any_position() {
        for sql in [
            "SET a = 1",
            "CREATE TEMPORARY TABLE t (a INT)",
            "SELECT 1; SET a = 1",
            "SELECT ';'; /* x */ PRAGMA foreign_keys = 0",
            "ATTACH ':memory:' AS other",
            "DROP TABLE t",
            "ROLLBACK",
            "EXPLAIN SELECT 1",
            "'?'",
        ] {
            assert!(leaves_state(sql, true), "{sql}");
            assert!(leaves_state(sql, false), "{sql}");
        }
        for sql in [
            "SELECT GET_LOCK('a', 0)",
            "SELECT get_lock ('a', 0)",
            "SELECT @a := 1",
            "SELECT 1 INTO @a",
            "SELECT 1, @a",
            "INSERT INTO t SELECT @a := a FROM t",
            "UPDATE t SET a = LAST_INSERT_ID(a + 1)",
            "SELECT NEXT VALUE FOR s",
            "SET STATEMENT max_statement_time = 1 FOR SELECT 1",
            "SELECT 1 /*!50000 INTO @a */",
            "/*M!100100 SET a = 1 */",
            "SELECT '\\''; SET a = 1",
            "DO GET_LOCK('a', 0)",
            "SELECT `get_lock`('a', 0)",
            "SELECT '\\', @a := '1",
        ] {
            assert!(leaves_state(sql, true), "{sql}");
        }
        assert!(leaves_state("SELECT Load_Extension('x')", false));
        assert!(leaves_state("SELECT [load_extension]('x')", false));
        assert!(leaves_state("SELECT '\\'; SET a = 1; SELECT ''", false));
    }

    #[test]
    fn calls_unknown_function_accepts_known_functions_only() {
        for sql in [
            r#"SELECT "users"."id" FROM "users" WHERE (("users"."id" = $1) AND "users"."name" IN ($2, $3))"#,
            r#"SELECT COUNT(*), lower("users"."name") FROM ("users" INNER JOIN "posts" ON ("a"."b" = "c"."d"))"#,
            r#"INSERT INTO "users" ("name") VALUES ($1) ON CONFLICT ("name") DO NOTHING"#,
            r#"INSERT INTO "shop"."users" ("name") VALUES (DEFAULT)"#,
            r#"SELECT "a"."b" = ANY($1), CAST(1 AS bigint), EXISTS (SELECT 1) FROM "a""#,
            "SELECT 'pg_advisory_lock(1)', $$set_config()$$ -- f(1)",
        ] {
            assert!(!calls_unknown_function(sql), "{sql}");
        }
        for sql in [
            "SELECT pg_advisory_lock(1)",
            "SELECT pg_advisory_lock (1)",
            r#"SELECT "set_config"('a', 'b', false)"#,
            r#"SELECT "f" ($1)"#,
            r#"SELECT "s"."f"($1)"#,
            "SELECT s.lower('A')",
            r#"SELECT "users"."id" FROM "users" WHERE (set_config('a', 'b', false) = $1)"#,
            r#"INSERT INTO "t" SELECT "s"."f"($1)"#,
            "SELECT E'\\'', nextval('s')",
        ] {
            assert!(calls_unknown_function(sql), "{sql}");
        }
    }
}
