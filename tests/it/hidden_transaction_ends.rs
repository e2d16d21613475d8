//! Raw SQL that ends a session's transaction where it is hard to see, and raw SQL that only looks like it. What really
//! happened is what a plain client finds.

use diesel::connection::SimpleConnection;
use diesel_session::{App, Error, Session};

use crate::fixtures::{AnyConnection, SessionExt, TestConnection, TestDatabase, connect_any};
use crate::for_each_database;

for_each_database!(every_database =>
    hidden_end_of_a_transaction_is_noticed,
    harmless_text_is_no_end_of_a_transaction,
    random_texts_are_read_as_the_server_reads_them,
    failed_text_does_not_hide_the_end_before_it,
);

/// An application, a plain client, and a row for each text.
struct Trial<'a, C: TestConnection> {
    app: &'a App<C>,
    plain: AnyConnection,
    number: usize,
}

/// What one text did.
#[derive(Debug)]
struct Seen {
    /// The error of the raw statement.
    failed: Option<String>,
    /// A plain client finds what the transaction had done before.
    was_committed: bool,
    /// The session refuses to go on.
    was_noticed: bool,
    committed: Result<(), Error>,
}

impl<C: TestConnection> Trial<'_, C> {
    fn is_stored(&mut self, message: &str) -> bool {
        let sql = format!("SELECT count(*) AS number FROM entries WHERE message = '{message}'");
        self.plain.number(&sql).unwrap() == 1
    }

    fn send(&mut self, send: impl FnOnce(&Session<C>) -> Result<(), Error>) -> Seen {
        self.number += 1;
        let message = format!("row {}", self.number);
        let session = self.app.open_session().unwrap();
        session.send(&format!("INSERT INTO entries (author, message) VALUES ('Ada', '{message}')")).unwrap();
        let failed = send(&session).err().map(|error| error.to_string());
        let was_committed = self.is_stored(&message);
        let was_noticed = session.send("SELECT 1").is_err_and(|error| error.is_rollback_required());
        let committed = session.commit();
        session.rollback().unwrap();
        if !was_committed && !was_noticed {
            assert_eq!(committed.is_ok(), self.is_stored(&message));
        }
        Seen { failed, was_committed, was_noticed, committed }
    }
}

fn trial<C: TestConnection>(test_db: &TestDatabase, run: impl FnOnce(Trial<'_, C>)) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    run(Trial { app: &app, plain: connect_any(&test_db.url()).unwrap(), number: 0 });
}

fn hidden_end_of_a_transaction_is_noticed<C: TestConnection>(test_db: &TestDatabase) {
    let setup: &[&str] = match test_db {
        TestDatabase::Postgres(_) => &["CREATE DOMAIN atomic AS int"],
        TestDatabase::Mariadb(_) => &[
            "CREATE PROCEDURE ends() BEGIN COMMIT; START TRANSACTION; END",
            "CREATE PROCEDURE ends_deeply() BEGIN IF 1 THEN CALL ends(); END IF; END",
            "CREATE PROCEDURE defines() BEGIN CREATE TABLE IF NOT EXISTS defined (id INT); START TRANSACTION; END",
        ],
        TestDatabase::Sqlite(_) => &[],
    };
    let texts: &[&str] = match test_db {
        TestDatabase::Postgres(_) => &[
            "COMMIT; BEGIN",
            "/* /* */ */ COMMIT; BEGIN",
            "SELECT 1 AS a$b$; COMMIT; BEGIN; SELECT 1 AS c$b$",
            "SELECT 1 /* ' /* */ ' */; COMMIT; BEGIN",
            "CREATE TABLE zz (\"BEGIN\" int); END; BEGIN",
            "SELECT 1 AS \"a'b\"; COMMIT; BEGIN; SELECT 1 AS \"c'd\"",
            "SELECT E'\\''; COMMIT; BEGIN; SELECT E'\\''",
            "SELECT 1 AS b$E; COMMIT; BEGIN; SELECT 'C:\\'",
            "SELECT E'a'\n'\\'' ; COMMIT; BEGIN; SELECT 'x'",
            "SELECT 1 -- a\r; COMMIT; BEGIN",
            "CREATE FUNCTION named(begin atomic) RETURNS int LANGUAGE sql AS 'SELECT 1'; END; BEGIN",
            "CREATE FUNCTION whole() RETURNS void LANGUAGE sql BEGIN ATOMIC END; END; BEGIN",
            "CREATE FUNCTION body() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END; COMMIT; BEGIN",
            "COMMIT AND CHAIN",
            "END TRANSACTION; START TRANSACTION",
            "COMMIT WORK; BEGIN WORK",
            "SELECT $a$ ' $a$; COMMIT; BEGIN; SELECT $a$ ' $a$",
            "SET standard_conforming_strings = off; COMMIT; BEGIN",
        ],
        TestDatabase::Mariadb(_) => &[
            "SET @@autocommit = 0; SET @@autocommit = 1; BEGIN",
            "SET @a = 1, autocommit = 0; SET @a = 2, autocommit = 1; BEGIN",
            "COMMIT; BEGIN",
            "CALL ends()",
            "CALL ends_deeply()",
            "CALL defines()",
            "SET DEFAULT ROLE NONE; BEGIN",
            "EXECUTE IMMEDIATE 'COMMIT'; BEGIN",
            "PREPARE hidden FROM 'COMMIT'; EXECUTE hidden; BEGIN",
            "BEGIN NOT ATOMIC COMMIT; START TRANSACTION; END",
            "IF 1 THEN COMMIT; START TRANSACTION; END IF",
            "/*!50000 COMMIT */; BEGIN",
            "/*M! COMMIT */; BEGIN",
            "SELECT '\\''; COMMIT; BEGIN; SELECT '\\''",
            "SELECT 1 -- '\n; COMMIT; BEGIN",
            "SELECT 1 # '\n; COMMIT; BEGIN",
            "SELECT 1 AS `a'b`; COMMIT; BEGIN; SELECT 1 AS `c'd`",
            "SET sql_mode = 'ANSI_QUOTES'; SELECT 1 AS \"a'b\"; COMMIT; BEGIN; SELECT 1 AS \"c'd\"",
            "SET sql_mode = 'NO_BACKSLASH_ESCAPES'; SELECT '\\'; COMMIT; BEGIN; SELECT '\\'",
            "SET autocommit = 1, autocommit = 0; BEGIN",
            "START TRANSACTION",
            "SET STATEMENT max_statement_time = 9 FOR COMMIT; BEGIN",
            "CREATE TABLE made (id INT); BEGIN",
            "COMMIT AND CHAIN",
            "ANALYZE TABLE entries; BEGIN",
        ],
        TestDatabase::Sqlite(_) => &[
            "COMMIT; BEGIN",
            "SELECT 1 AS [a'b]; COMMIT; BEGIN; SELECT 1 AS [c'd]",
            "SELECT $a$b; COMMIT; BEGIN",
            "SELECT $a('); COMMIT; BEGIN; SELECT $a(')",
            "SELECT @a::b('); COMMIT; BEGIN; SELECT #a(')",
            "CREATE TABLE yy ([BEGIN] int); END; BEGIN",
            "CREATE TABLE xx (begin int); END; BEGIN",
            "CREATE TRIGGER tt AFTER INSERT ON entries BEGIN SELECT 1; END; COMMIT; BEGIN",
            "SELECT 1 AS `a'b`; COMMIT; BEGIN; SELECT 1 AS `c'd`",
            "/* /* */ COMMIT; BEGIN",
            "SELECT '\\'; COMMIT; BEGIN; SELECT '\\'",
            "END; BEGIN EXCLUSIVE",
        ],
    };
    trial::<C>(test_db, |mut trial| {
        setup.iter().for_each(|sql| trial.plain.batch_execute(sql).unwrap());
        for text in texts {
            let seen = trial.send(|session| session.send(text));
            assert!(seen.failed.is_none() && seen.was_committed, "{text}: {seen:?}");
            assert!(seen.was_noticed && seen.committed.is_err(), "{text}: {seen:?}");
            // The same where savepoints of the session's and of the program's are open.
            let seen = trial.send(|session| {
                session
                    .savepoint(|session| session.with(|conn| conn.batch_execute(&text.replace("TABLE ", "TABLE n"))))
                    .map(drop)
            });
            assert!(
                !seen.was_committed || seen.was_noticed && seen.committed.is_err(),
                "{text} in a savepoint: {seen:?}"
            );
            let seen = trial.send(|session| {
                session.send("SAVEPOINT mine")?;
                session.send(
                    &text
                        .replace("TABLE ", "TABLE m")
                        .replace("FUNCTION ", "FUNCTION m")
                        .replace("TRIGGER ", "TRIGGER m"),
                )
            });
            assert!(!seen.was_committed || seen.committed.is_err(), "{text} after a savepoint of its own: {seen:?}");
        }
    });
}

fn harmless_text_is_no_end_of_a_transaction<C: TestConnection>(test_db: &TestDatabase) {
    let texts: &[&str] = match test_db {
        TestDatabase::Postgres(_) => &[
            "SELECT '; COMMIT; BEGIN; '",
            "SELECT $$; COMMIT; BEGIN; $$",
            "SELECT $a$; COMMIT; $b$ BEGIN; $a$",
            "/* /* */ ; COMMIT; BEGIN; */ SELECT 1",
            "SELECT 1 -- ; COMMIT; BEGIN",
            "SELECT E'\\'; COMMIT; BEGIN; '",
            "SELECT E'a' -- b\n '\\'; COMMIT; BEGIN; '",
            "SELECT 'C:\\', '; COMMIT; BEGIN; SELECT '",
            "SELECT 1 AS \"; COMMIT; BEGIN; \"",
            "CREATE TABLE one (\"END\" int, \"COMMIT\" int)",
            "CREATE FUNCTION two() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END",
            "DO $$ BEGIN PERFORM 1; END $$",
            "SAVEPOINT mine; ROLLBACK TO mine; RELEASE mine",
            "BEGIN",
            "CREATE TABLE three (id int); DROP TABLE three",
            "EXPLAIN SELECT 1; SHOW transaction_isolation",
        ],
        TestDatabase::Mariadb(_) => &[
            "SELECT '; COMMIT; BEGIN; '",
            "SELECT \"; COMMIT; BEGIN; \"",
            "SELECT 1 AS `; COMMIT; BEGIN; `",
            "SELECT '\\'; COMMIT; BEGIN; '",
            "SELECT 1 # ; COMMIT; BEGIN",
            "SELECT 1 -- ; COMMIT; BEGIN",
            "SELECT 1 /* ; COMMIT; BEGIN; */",
            "SELECT 1 /*!99999 ; COMMIT; BEGIN; */",
            "CREATE TEMPORARY TABLE one (id INT); DROP TEMPORARY TABLE one",
            "CREATE OR REPLACE TEMPORARY TABLE two (id INT)",
            "SET @a = 'COMMIT'",
            "SET SESSION sort_buffer_size = DEFAULT",
            "PREPARE harmless FROM 'SELECT 1'; EXECUTE harmless; DEALLOCATE PREPARE harmless",
            "EXECUTE IMMEDIATE 'SELECT 1'",
            "SAVEPOINT mine; ROLLBACK TO mine; RELEASE SAVEPOINT mine",
            "DO 1; SHOW TABLES; EXPLAIN SELECT 1",
            "BEGIN NOT ATOMIC SELECT 1; END",
        ],
        TestDatabase::Sqlite(_) => &[
            "SELECT '; COMMIT; BEGIN; '",
            "SELECT 1 AS [; COMMIT; BEGIN; ]",
            "SELECT 1 AS `; COMMIT; BEGIN; `",
            "SELECT $a(;COMMIT;BEGIN;)",
            "SELECT 1 -- ; COMMIT; BEGIN",
            "SELECT 1 /* ; COMMIT; BEGIN; */",
            "SELECT 1 /* ; COMMIT; BEGIN",
            "CREATE TABLE one (\"END\" int, [COMMIT] int)",
            "CREATE TRIGGER begin AFTER INSERT ON entries BEGIN SELECT 1; SELECT CASE WHEN 1 THEN 2 END; END",
            "SAVEPOINT mine; ROLLBACK TO mine; RELEASE mine",
            "EXPLAIN COMMIT",
        ],
    };
    trial::<C>(test_db, |mut trial| {
        for text in texts {
            let seen = trial.send(|session| session.send(text));
            assert!(seen.failed.is_none() && !seen.was_committed, "{text}: {seen:?}");
            assert!(!seen.was_noticed && seen.committed.is_ok(), "{text}: {seen:?}");
        }
    });
}

/// A text of several statements may fail after one that ended the transaction.
fn failed_text_does_not_hide_the_end_before_it<C: TestConnection>(test_db: &TestDatabase) {
    let texts: &[&str] = match test_db {
        TestDatabase::Mariadb(_) => &[
            "COMMIT; BEGIN; SELECT nothing FROM nowhere",
            "CREATE TABLE entries (id INT)",
            "TRUNCATE entries_that_are_not_there",
            "COMMIT; SELECT nothing FROM nowhere",
        ],
        TestDatabase::Postgres(_) | TestDatabase::Sqlite(_) => &[
            "COMMIT; BEGIN; SELECT nothing FROM nowhere",
            "COMMIT; BEGIN; INSERT INTO entries (author, message) VALUES ('', '')",
            "COMMIT; SELECT nothing FROM nowhere",
        ],
    };
    trial::<C>(test_db, |mut trial| {
        for text in texts {
            let seen = trial.send(|session| session.send(text));
            assert!(seen.failed.is_some(), "{text}: {seen:?}");
            assert!(!seen.was_committed || seen.was_noticed && seen.committed.is_err(), "{text}: {seen:?}");
            // With a savepoint around it, which must not heal what is gone.
            let seen = trial.send(|session| session.savepoint(|session| session.send(text)));
            assert!(!seen.was_committed || seen.was_noticed && seen.committed.is_err(), "{text}: {seen:?}");
            let seen = trial.send(|session| {
                session.with(|conn| {
                    let _ = conn.batch_execute(text);
                    Ok(())
                })
            });
            assert!(!seen.was_committed || seen.was_noticed && seen.committed.is_err(), "{text}, swallowed: {seen:?}");
        }
    });
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn of<'t>(&mut self, choices: &[&'t str]) -> &'t str {
        choices[self.below(choices.len())]
    }
}

/// A text in which an end of the transaction may be hidden, in some way of quoting, that may be closed and opened again
/// around it.
fn text(random: &mut Random, test_db: &TestDatabase) -> String {
    let quotes: &[(&str, &str)] = match test_db {
        TestDatabase::Postgres(_) => &[
            ("'", "'"),
            ("E'", "'"),
            ("e'a'\n'", "'"),
            ("'a' -- '\n '", "'"),
            ("$$", "$$"),
            ("$a$", "$a$"),
            ("1 AS \"a", "\""),
            ("1 AS a$b$", "$b$"),
            ("1 AS a$b$, 2 AS c$b$", "$b$"),
            ("1 /* ", " */"),
            ("1 /* /* */ ", " */"),
            ("1 -- ", "\n"),
            ("U&'", "'"),
            ("1 + $q$1$q$::int, $a$", "$a$"),
        ],
        TestDatabase::Mariadb(_) => &[
            ("'", "'"),
            ("\"", "\""),
            ("1 AS `a", "`"),
            ("_utf8mb4'", "'"),
            ("1 # ", "\n"),
            ("1 -- ", "\n"),
            ("1 --", "\n"),
            ("1 /* ", " */"),
            ("1 /*! ", " */"),
            ("1 /*!99999 ", " */"),
            ("@a, @'", "'"),
            ("@`", "`"),
        ],
        TestDatabase::Sqlite(_) => &[
            ("'", "'"),
            ("1 AS \"a", "\""),
            ("1 AS `a", "`"),
            ("1 AS [a", "]"),
            ("1 -- ", "\n"),
            ("1 /* ", " */"),
            ("$a(", ")"),
            (":a::b(", ")"),
            ("@a", ""),
            ("$a$b", ""),
            ("#a(", ")"),
            ("x'00' || '", "'"),
        ],
    };
    const SOUP: [&str; 20] = [
        "'", "\"", "`", "[", "]", "\\", "\\'", "''", "\"\"", "$a$", "$$", "/*", "*/", "--", "#", "\n", "a", "E", "$b",
        "é",
    ];
    let mut text = String::from("SELECT ");
    for item in 0..=random.below(3) {
        if item > 0 {
            text.push_str(", ");
        }
        let (open, close) = quotes[random.below(quotes.len())];
        text.push_str(open);
        for _ in 0..random.below(3) {
            text.push_str(random.of(&SOUP));
        }
        if random.below(2) == 0 {
            // Closed before it, in the right way or in one that is right elsewhere.
            let close = if random.below(3) == 0 { random.of(&SOUP) } else { close };
            text.push_str(close);
        }
        text.push_str(random.of(&[
            "; COMMIT; BEGIN; SELECT ",
            ";\nCOMMIT;BEGIN;SELECT ",
            "; END; BEGIN; SELECT ",
            " x ",
            "",
        ]));
        let open = if random.below(3) == 0 { quotes[random.below(quotes.len())].0 } else { open };
        text.push_str(open);
        for _ in 0..random.below(2) {
            text.push_str(random.of(&SOUP));
        }
        text.push_str(close);
    }
    text
}

fn random_texts_are_read_as_the_server_reads_them<C: TestConnection>(test_db: &TestDatabase) {
    const TEXTS: usize = 300;
    let seed = std::env::var("DIESEL_SESSION_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_130);
    let mut random = Random(seed);
    trial::<C>(test_db, |mut trial| {
        let (mut ends, mut harmless, mut alarms) = (0, 0, 0);
        for _ in 0..TEXTS {
            let text = text(&mut random, test_db);
            let seen = trial.send(|session| session.send(&text));
            if seen.was_committed {
                ends += 1;
                assert!(seen.was_noticed && seen.committed.is_err(), "seed {seed}, not noticed: {text:?}: {seen:?}");
            } else if seen.failed.is_none() {
                harmless += 1;
                assert!(!seen.was_noticed && seen.committed.is_ok(), "seed {seed}, a false alarm: {text:?}: {seen:?}");
            } else {
                // PostgreSQL has aborted it; elsewhere a text that failed counts as what its words say.
                alarms += usize::from(seen.was_noticed);
            }
        }
        assert!(ends > 20 && harmless > 20, "{ends} ends, {harmless} harmless texts, {alarms} alarms");
    });
}
