//! Just enough reading of SQL to see what may leave something on the connection that outlives its transaction.
//!
//! What is not known may: a statement too many costs a connection or a round trip, one too few shows the next holder what
//! the last one has set.

use super::sql_parts::{Dialect, Part, Parts};
use crate::kind::DatabaseKind;

/// Whether `sql` is anything but plain reading and writing of rows and savepoints, or calls what is known to leave something.
///
/// `mysql` is for MySQL and MariaDB, otherwise it is SQLite's.
pub(super) fn leaves_something(sql: &str, mysql: bool) -> bool {
    let kind = if mysql { DatabaseKind::Mysql } else { DatabaseKind::Sqlite };
    mysql && (sql.contains("/*!") || sql.contains("/*M!"))
        || Dialect::possible(sql, kind).any(|dialect| leaves_something_as(sql, kind, dialect))
}

fn leaves_something_as(sql: &str, kind: DatabaseKind, dialect: Dialect) -> bool {
    let mysql = kind == DatabaseKind::Mysql;
    let mut tokens = Parts::read(sql, kind, dialect).map(|(part, ..)| part).peekable();
    let mut is_first = true;
    while let Some(token) = tokens.next() {
        match token {
            Part::Sign(';') => is_first = true,
            Part::Sign('(') if is_first => {}
            Part::Word(verb) if is_first => {
                is_first = false;
                if !PLAIN.iter().any(|plain| verb.eq_ignore_ascii_case(plain))
                    && !is_back_to_savepoint(verb, &mut tokens)
                {
                    return true;
                }
            }
            _ if is_first => return true,
            // Of the server's own variables, `@@name`, a plain statement only reads.
            Part::Sign('@') if mysql && tokens.next_if_eq(&Part::Sign('@')).is_none() => return true,
            // The name of a function may be quoted.
            Part::Word(word) | Part::Name(word) if mysql => {
                let is = |name| word.eq_ignore_ascii_case(name);
                let sets_last_id = is("LAST_INSERT_ID")
                    && tokens.next_if_eq(&Part::Sign('(')).is_some()
                    && tokens.peek() != Some(&Part::Sign(')'));
                if sets_last_id || is("GET_LOCK") || is("NEXTVAL") || is("NEXT") {
                    return true;
                }
            }
            Part::Word(word) | Part::Name(word) if word.eq_ignore_ascii_case("LOAD_EXTENSION") => return true,
            _ => {}
        }
    }
    false
}

/// Whether a typed statement of PostgreSQL calls a function that is not known to leave nothing.
pub(super) fn calls_unknown_function(sql: &str) -> bool {
    let mut before = [Part::Sign(';'); 2];
    // In the name of a table that is written to: what stands after it in parentheses are its columns.
    let mut in_target = false;
    for (token, ..) in Parts::of(sql, DatabaseKind::Postgres) {
        if token == Part::Sign('(') {
            let is_known = match before {
                [qualifier, Part::Word(word)] => {
                    qualifier != Part::Sign('.') && KNOWN.iter().any(|known| word.eq_ignore_ascii_case(known))
                }
                [_, Part::Name(_)] => in_target,
                [_, Part::Text(_) | Part::Body(_) | Part::Sign(_)] => true,
            };
            if !is_known {
                return true;
            }
        }
        in_target = match token {
            Part::Word(word) => word.eq_ignore_ascii_case("INTO"),
            Part::Name(_) | Part::Sign('.') => in_target,
            Part::Text(_) | Part::Body(_) | Part::Sign(_) => false,
        };
        before = [before[1], token];
    }
    false
}

/// Statements that leave nothing.
const PLAIN: [&str; 9] = ["SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE", "WITH", "VALUES", "SAVEPOINT", "RELEASE"];

/// What stands before a parenthesis and is either no function, or one that leaves nothing.
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

fn is_back_to_savepoint<'s>(verb: &str, tokens: &mut impl Iterator<Item = Part<'s>>) -> bool {
    let is_to = |token: Option<Part<'_>>| matches!(token, Some(Part::Word(word)) if word.eq_ignore_ascii_case("TO"));
    // `ROLLBACK TO ..`, or `ROLLBACK TRANSACTION TO ..` and `ROLLBACK WORK TO ..`.
    verb.eq_ignore_ascii_case("ROLLBACK") && (is_to(tokens.next()) || is_to(tokens.next()))
}

#[cfg(test)]
mod tests {
    use super::{calls_unknown_function, leaves_something};

    #[test]
    fn rows_and_savepoints_leave_nothing() {
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
            assert!(!leaves_something(sql, true), "{sql}");
            assert!(!leaves_something(sql, false), "{sql}");
        }
        for sql in [
            "SELECT 'it\\\\s @a := 1', \"@b\", `@c`",
            "SELECT @@in_transaction",
            "SELECT LAST_INSERT_ID()",
            "SELECT LAST_INSERT_ID",
            "SELECT 1 # @a := GET_LOCK('a', 0)",
        ] {
            assert!(!leaves_something(sql, true), "{sql}");
        }
    }

    #[test]
    fn what_leaves_something_is_found_wherever_it_stands() {
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
            assert!(leaves_something(sql, true), "{sql}");
            assert!(leaves_something(sql, false), "{sql}");
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
            assert!(leaves_something(sql, true), "{sql}");
        }
        assert!(leaves_something("SELECT Load_Extension('x')", false));
        assert!(leaves_something("SELECT [load_extension]('x')", false));
        assert!(leaves_something("SELECT '\\'; SET a = 1; SELECT ''", false));
    }

    #[test]
    fn functions_that_are_not_known_are_found() {
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
