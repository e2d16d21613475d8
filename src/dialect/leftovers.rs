//! Detects statements that may leave state on the connection after their transaction.
//!
//! An unknown statement counts as one that leaves state. A false alarm costs a connection or a round trip. A missed
//! statement would show the next holder the state of the previous holder.

use super::lexer::{Lexer, LexerSettings, Token, is_back_to_savepoint, tokens};
use crate::kind::DatabaseKind;

impl DatabaseKind {
    /// Whether a statement may leave state on the connection after its transaction. On PostgreSQL, where a reset is
    /// cheap, every raw statement counts, and a typed statement counts if it calls a function that is not in [`KNOWN`].
    /// On the other databases a statement counts that is not in [`HARMLESS`], or that calls a function that is known to
    /// leave state.
    pub(crate) fn leaves_state(self, sql: &str, raw: bool) -> bool {
        match self.known() {
            Self::Postgres => raw || calls_unknown_function(Lexer::new(sql, self).map(|(token, ..)| token)),
            Self::Mysql if sql.contains("/*!") || sql.contains("/*M!") => true,
            kind => LexerSettings::possible(sql, kind).any(|settings| leaves_state_with(settings, sql, kind)),
        }
    }
}

impl DatabaseKind {
    /// Whether a typed SELECT only reads: it calls no function that is not in [`KNOWN`], takes no lock and sets no
    /// variable.
    pub(crate) fn only_reads(self, sql: &str) -> bool {
        let acts = |token: &Token<'_>| match token {
            Token::Word(word) => is_one_of(word, "FOR INTO LOCK"),
            Token::Symbol(symbol) => *symbol == '@',
            Token::QuotedName(_) | Token::StringLiteral(_) | Token::DollarQuoted(_) => false,
        };
        LexerSettings::possible(sql, self).all(|settings| {
            let tokens = tokens(sql, self, settings);
            !tokens.iter().any(acts) && !calls_unknown_function(tokens.into_iter())
        })
    }
}

fn leaves_state_with(settings: LexerSettings, sql: &str, kind: DatabaseKind) -> bool {
    let tokens = tokens(sql, kind, settings);
    tokens.split(|token| *token == Token::Symbol(';')).any(|statement| {
        let is_parenthesis = |token: &&Token<'_>| **token == Token::Symbol('(');
        let is_harmless = match statement.iter().find(|token| !is_parenthesis(token)) {
            Some(Token::Word(verb)) => is_one_of(verb, HARMLESS) || is_back_to_savepoint(statement),
            first => first.is_none(),
        };
        !is_harmless || (0..statement.len()).any(|index| sets_state(statement, index, kind))
    })
}

/// Whether the expression at `index` of a statement leaves state.
fn sets_state(statement: &[Token<'_>], index: usize, kind: DatabaseKind) -> bool {
    let is_symbol = |index: usize, symbol: char| statement.get(index) == Some(&Token::Symbol(symbol));
    // A quoted name may be the name of a function too.
    let is = |name: &str| match statement[index] {
        Token::Word(word) | Token::QuotedName(word) => word.eq_ignore_ascii_case(name),
        _ => false,
    };
    if kind != DatabaseKind::Mysql {
        return is("LOAD_EXTENSION");
    }
    // A harmless statement only reads variables of the server (`@@name`), but it can set user variables (`@name`).
    let is_setting = is_symbol(index + 1, '@') || index > 0 && is_symbol(index - 1, '@');
    let sets_last_id = is("LAST_INSERT_ID") && is_symbol(index + 1, '(') && !is_symbol(index + 2, ')');
    is_symbol(index, '@') && !is_setting || sets_last_id || is("GET_LOCK") || is("NEXTVAL") || is("NEXT")
}

/// Whether a typed statement calls a function that is not in [`KNOWN`].
fn calls_unknown_function<'s>(tokens: impl Iterator<Item = Token<'s>>) -> bool {
    let mut before = [Token::Symbol(';'); 2];
    // Whether the token belongs to the name of the table of an INSERT. The parentheses behind this name contain
    // columns.
    let mut in_target = false;
    for token in tokens {
        if token == Token::Symbol('(') {
            let is_known = match before {
                [qualifier, Token::Word(word)] => qualifier != Token::Symbol('.') && is_one_of(word, KNOWN),
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
const HARMLESS: &str = "SELECT INSERT UPDATE DELETE REPLACE WITH VALUES SAVEPOINT RELEASE";

/// The words before a parenthesis that are keywords, or functions that leave no state.
const KNOWN: &str = "ALL AND ANY ARRAY AS BETWEEN BY CASE CAST CONFLICT DISTINCT ELSE EXCEPT EXISTS FILTER FROM GROUP HAVING \
                     ILIKE IN INTERSECT IS JOIN LATERAL LIKE LIMIT NOT OFFSET ON OR OVER RETURNING ROW SELECT SET SOME THEN \
                     UNION USING VALUES WHEN WHERE \
                     ARRAY_AGG AVG BOOL_AND BOOL_OR COALESCE COUNT DATE JSON_AGG JSONB_AGG LOWER MAX MIN NOW STRING_AGG SUM \
                     UPPER";

fn is_one_of(word: &str, list: &str) -> bool {
    list.split(' ').any(|known| word.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls_unknown(sql: &str) -> bool {
        calls_unknown_function(Lexer::new(sql, DatabaseKind::Postgres).map(|(token, ..)| token))
    }

    fn leaves_state(sql: &str, mysql: bool) -> bool {
        let kind = if mysql { DatabaseKind::Mysql } else { DatabaseKind::Sqlite };
        kind.leaves_state(sql, true)
    }

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
            assert!(!calls_unknown(sql), "{sql}");
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
            assert!(calls_unknown(sql), "{sql}");
        }
    }

    #[test]
    fn only_reads_is_false_for_functions_locks_and_variables() {
        let kinds = [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite];
        for sql in [
            "SELECT a, count(*) FROM t WHERE a IN (1, 2) AND lower(b) = 'for update' GROUP BY a",
            "SELECT \"for\" FROM \"into\" -- FOR UPDATE",
            "SELECT 1 FROM t AS x INNER JOIN (SELECT 2) AS y ON (1 = 1) ORDER BY 1 LIMIT 3 OFFSET 4",
        ] {
            assert!(kinds.iter().all(|kind| kind.only_reads(sql)), "{sql}");
        }
        for sql in [
            "SELECT nextval('numbers')",
            "SELECT \"lower\"('A')",
            "SELECT mine.count(a) FROM t",
            "SELECT a FROM t FOR UPDATE",
            "SELECT a FROM t WHERE b IN (SELECT c FROM u FOR SHARE)",
            "SELECT a FROM t LOCK IN SHARE MODE",
            "SELECT a INTO b FROM t",
        ] {
            assert!(kinds.iter().all(|kind| !kind.only_reads(sql)), "{sql}");
        }
        assert!(!DatabaseKind::Mysql.only_reads("SELECT @a := 1"));
    }
}
