//! The outcome of a commit after raw statements: a plain client checks what the server stored.

use std::io::{BufRead, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel::connection::{DefaultLoadingMode, SimpleConnection};
use diesel::pg::{CopyFormat, PgRowByRowLoadingMode};
use diesel::prelude::*;
use diesel::sql_types::BigInt;
use diesel_session::{Error, OptionalExt, Session};

use crate::fixtures::{AnyConnection, SessionExt, TestConnection, TestDatabase, connect_any};
use crate::for_each_database;

for_each_database!(every_database =>
    commit_is_ok_exactly_if_the_server_stored_the_rows,
    commit_of_a_scope_is_ok_exactly_if_the_server_stored_the_rows,
);

diesel::table! {
    entries (id) { id -> Integer, author -> Text, message -> Text, }
}

diesel::table! {
    flawed (id) { id -> BigInt, }
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    #[allow(dead_code)]
    number: i64,
}

/// Something that a program may do with a connection, and how it is named in a failure.
type Raw<C> = (&'static str, fn(&mut C, &Texts) -> QueryResult<()>);

/// Statements that succeed, that fail at once, and that fail after their first row.
struct Texts {
    query: [&'static str; 3],
    command: [&'static str; 3],
    outcome: usize,
}

impl Texts {
    fn of(test_db: &TestDatabase, outcome: usize) -> Self {
        let after_a_row = match test_db {
            TestDatabase::Postgres(_) => "SELECT (10 / (3 - g))::bigint AS number FROM generate_series(1, 5) g",
            TestDatabase::Mariadb(_) => {
                "SELECT 1 AS number UNION ALL SELECT (SELECT 1 UNION ALL SELECT 2) UNION ALL SELECT 3"
            }
            TestDatabase::Sqlite(_) => "SELECT 1 AS number UNION ALL SELECT abs(-9223372036854775807 - 1)",
        };
        let good = "INSERT INTO entries (author, message) VALUES ('raw', 'raw')";
        let bad = "INSERT INTO entries (author, message) VALUES ('', 'raw')";
        let both = "INSERT INTO entries (author, message) VALUES ('raw', 'raw'), ('', 'raw')";
        Self {
            query: ["SELECT 7 AS number", "SELECT number FROM nowhere", after_a_row],
            command: [good, bad, both],
            outcome,
        }
    }

    fn query(&self) -> diesel::query_builder::SqlQuery {
        diesel::sql_query(self.query[self.outcome])
    }

    fn command(&self) -> &'static str {
        self.command[self.outcome]
    }
}

/// Sends texts through the session itself.
type InSession<C> = fn(&Session<C>, &Texts) -> Result<(), Error>;

trait RawConn: TestConnection {
    fn all() -> Vec<Raw<Self>>;
    fn in_session() -> Vec<(&'static str, InSession<Self>)>;
}

macro_rules! everywhere {
    ($connection:ty) => {{
        let all: Vec<Raw<$connection>> = vec![
            ("execute", |conn, texts| diesel::sql_query(texts.command()).execute(conn).map(drop)),
            ("batch_execute", |conn, texts| conn.batch_execute(texts.command())),
            ("batch of two", |conn, texts| conn.batch_execute(&format!("SELECT 1; {}", texts.command()))),
            ("load", |conn, texts| texts.query().load::<Number>(conn).map(drop)),
            ("get_result", |conn, texts| texts.query().get_result::<Number>(conn).map(drop)),
            ("get_results", |conn, texts| texts.query().get_results::<Number>(conn).map(drop)),
            ("load_iter", |conn, texts| {
                texts.query().load_iter::<Number, DefaultLoadingMode>(conn)?.try_for_each(|row| row.map(drop))
            }),
            ("load_iter, one row read", |conn, texts| {
                texts.query().load_iter::<Number, DefaultLoadingMode>(conn)?.next().transpose().map(drop)
            }),
            ("transaction", |conn, texts| {
                conn.transaction(|conn| diesel::sql_query(texts.command()).execute(conn).map(drop))
            }),
            ("transaction that swallows", |conn, texts| {
                conn.transaction(|conn| {
                    let _ = diesel::sql_query(texts.command()).execute(conn);
                    Ok(())
                })
            }),
            ("typed", |conn, texts| {
                let author = if texts.outcome == 0 { "typed" } else { "" };
                let values = (entries::author.eq(author), entries::message.eq("typed"));
                diesel::insert_into(entries::table).values(values).execute(conn).map(drop)
            }),
        ];
        all
    }};
}

macro_rules! sessions {
    ($connection:ty) => {
        fn in_session() -> Vec<(&'static str, InSession<Self>)> {
            vec![
                ("session.execute", |session, texts| session.execute(diesel::sql_query(texts.command())).map(drop)),
                ("session.load", |session, texts| session.load::<Number>(texts.query()).map(drop)),
                ("session.get_result", |session, texts| {
                    session.get_result::<Number>(texts.query()).optional().map(drop)
                }),
                ("session.savepoint", |session, texts| {
                    session.savepoint(|session| session.execute(diesel::sql_query(texts.command())).map(drop))
                }),
            ]
        }
    };
}

impl RawConn for MysqlConnection {
    fn all() -> Vec<Raw<Self>> {
        everywhere!(MysqlConnection)
    }

    sessions!(MysqlConnection);
}

impl RawConn for SqliteConnection {
    fn all() -> Vec<Raw<Self>> {
        everywhere!(SqliteConnection)
    }

    sessions!(SqliteConnection);
}

impl RawConn for PgConnection {
    fn all() -> Vec<Raw<Self>> {
        let mut all = everywhere!(PgConnection);
        all.extend(ONLY_POSTGRES);
        all
    }

    sessions!(PgConnection);
}

impl RawConn for AnyConnection {
    fn all() -> Vec<Raw<Self>> {
        let mut all = everywhere!(AnyConnection);
        // What only one kind of connection can do is done on the connection inside of the enum.
        all.push(("row by row, through the enum", |conn, texts| inner(conn, texts, row_by_row)));
        all.push(("COPY OUT, through the enum", |conn, texts| inner(conn, texts, copy_out)));
        all.push(("COPY IN that has no end, through the enum", |conn, texts| inner(conn, texts, copy_in_without_end)));
        all
    }

    sessions!(AnyConnection);
}

fn inner(
    conn: &mut AnyConnection,
    texts: &Texts,
    run: fn(&mut PgConnection, &Texts) -> QueryResult<()>,
) -> QueryResult<()> {
    match conn {
        AnyConnection::Postgres(conn) => run(conn, texts),
        AnyConnection::Mysql(_) | AnyConnection::Sqlite(_) => Ok(()),
    }
}

const ONLY_POSTGRES: [Raw<PgConnection>; 12] = [
    ("row by row", row_by_row),
    ("row by row, one row read", |conn, texts| {
        texts.query().load_iter::<Number, PgRowByRowLoadingMode>(conn)?.next().transpose().map(drop)
    }),
    ("row by row, never ended", |conn, texts| {
        let mut rows = texts.query().load_iter::<Number, PgRowByRowLoadingMode>(conn)?;
        let first = rows.next().transpose().map(drop);
        std::mem::forget(rows);
        first
    }),
    ("COPY OUT", copy_out),
    ("COPY OUT, of which the first bytes are read", |conn, texts| {
        let mut rows = diesel::copy_to(flawed_of(texts)).with_format(CopyFormat::Text).load_raw(conn)?;
        rows.fill_buf().map(drop).map_err(|error| diesel::result::Error::DeserializationError(Box::new(error)))
    }),
    ("COPY OUT, never ended", |conn, texts| {
        let rows = diesel::copy_to(flawed_of(texts)).with_format(CopyFormat::Text).load_raw(conn)?;
        std::mem::forget(rows);
        Ok(())
    }),
    ("COPY IN", |conn, texts| {
        let rows = if texts.outcome == 0 { "copied\tcopied\n" } else { "copied\tcopied\n\tcopied\n" };
        let columns = (entries::author, entries::message);
        let copied = diesel::copy_from(entries::table).from_raw_data(columns, |copy| {
            copy.write_all(rows.as_bytes())
                .map_err(|error| diesel::result::Error::SerializationError(Box::new(error)))?;
            if texts.outcome == 1 { Err(diesel::result::Error::RollbackTransaction) } else { Ok(()) }
        });
        copied.execute(conn).map(drop)
    }),
    ("COPY IN that has no end", copy_in_without_end),
    ("COPY as a batch that goes on", |conn, texts| {
        conn.batch_execute(&format!("COPY entries (author, message) FROM STDIN; {}", texts.command()))
    }),
    ("DO", |conn, texts| conn.batch_execute(&format!("DO $do$ BEGIN {}; END $do$", texts.command()))),
    ("a cursor of SQL", |conn, texts| {
        conn.batch_execute(&format!("DECLARE c CURSOR FOR {}", texts.query[texts.outcome]))?;
        conn.batch_execute("FETCH 1 FROM c")?;
        conn.batch_execute("FETCH ALL FROM c")
    }),
    ("LISTEN and NOTIFY", |conn, texts| {
        conn.batch_execute("LISTEN heard; NOTIFY heard, 'something'")?;
        let heard = conn.notifications_iter().filter_map(Result::ok).count();
        let _ = (heard, diesel::sql_query(texts.command()).execute(conn)?);
        Ok(())
    }),
];

fn row_by_row(conn: &mut PgConnection, texts: &Texts) -> QueryResult<()> {
    texts.query().load_iter::<Number, PgRowByRowLoadingMode>(conn)?.try_for_each(|row| row.map(drop))
}

/// The third outcome is that of a policy for rows, which fails at one of them.
fn copy_out(conn: &mut PgConnection, texts: &Texts) -> QueryResult<()> {
    let mut rows = diesel::copy_to(flawed_of(texts)).with_format(CopyFormat::Text).load_raw(conn)?;
    let read = rows.read_to_end(&mut Vec::new());
    read.map(drop).map_err(|error| diesel::result::Error::DeserializationError(Box::new(error)))
}

fn copy_in_without_end(conn: &mut PgConnection, texts: &Texts) -> QueryResult<()> {
    // Diesel's `execute` never returns from such a statement.
    match texts.outcome {
        0 => conn.batch_execute("COPY entries (author, message) FROM STDIN"),
        _ => conn.batch_execute("SELECT 1; COPY entries (author, message) FROM STDIN"),
    }
}

/// All rows of the table, of which the policy refuses none, all, or one.
fn flawed_of(texts: &Texts) -> flawed::table {
    assert!(texts.outcome < 3);
    flawed::table
}

fn prepare(conn: &mut impl SimpleConnection, test_db: &TestDatabase, outcome: usize) {
    if let TestDatabase::Postgres(_) = test_db {
        let condition = ["true", "id / (id - id) = 0", "10 / (3 - id) < 100"][outcome];
        conn.batch_execute(&format!(
            "DROP TABLE IF EXISTS flawed; CREATE TABLE flawed AS SELECT g::bigint AS id FROM generate_series(1, 5) g; \
             ALTER TABLE flawed ENABLE ROW LEVEL SECURITY; ALTER TABLE flawed FORCE ROW LEVEL SECURITY; \
             CREATE POLICY flaw ON flawed USING ({condition})"
        ))
        .unwrap();
    }
}

/// What the code around a raw statement does with its error.
#[derive(Debug, Clone, Copy)]
enum Handling {
    HandsOn,
    Swallows,
    Panics,
}

fn handle<C>(conn: &mut C, run: impl FnOnce(&mut C) -> QueryResult<()>, handling: Handling) -> QueryResult<()> {
    let outcome = run(conn);
    match handling {
        Handling::HandsOn => outcome,
        Handling::Swallows => Ok(()),
        Handling::Panics => panic!("after {outcome:?}"),
    }
}

/// How the connection is got at.
const FRAMES: [&str; 6] =
    ["with", "a guard", "a savepoint", "Diesel's own transaction", "with_connection", "with_connection in a savepoint"];

/// An error into which the session cannot look.
#[derive(Debug)]
struct Hidden(Option<Error>);

impl From<Error> for Hidden {
    fn from(error: Error) -> Self {
        Self(Some(error))
    }
}

/// What the session itself has returned.
fn uncover(outcome: Result<(), Hidden>) -> Result<(), Error> {
    outcome.or_else(|Hidden(error)| error.map_or(Ok(()), Err))
}

fn send<C: RawConn>(
    session: &Session<C>,
    raw: Raw<C>,
    texts: &Texts,
    handling: Handling,
    frame: &str,
) -> Result<(), Error> {
    let run = |conn: &mut C| handle(conn, |conn| (raw.1)(conn, texts), handling);
    match frame {
        "with" => session.with(run),
        "a guard" => Ok(run(&mut *session.connection()?)?),
        "a savepoint" => session.savepoint(|session| session.with(run)),
        "with_connection" => uncover(session.with_connection(|conn| run(conn).map_err(|_| Hidden(None)))),
        "with_connection in a savepoint" => {
            uncover(session.savepoint(|session| session.with_connection(|conn| run(conn).map_err(|_| Hidden(None)))))
        }
        _ => session.with(|conn| conn.transaction(run)),
    }
}

/// Asked by a client that has nothing to do with the session.
#[track_caller]
fn stored(plain: &mut AnyConnection, message: &str) -> bool {
    plain.number(&format!("SELECT count(*) AS number FROM entries WHERE message = '{message}'")).unwrap() == 1
}

fn insert(message: &str) -> String {
    format!("INSERT INTO entries (author, message) VALUES ('Ada', '{message}')")
}

fn commit_is_ok_exactly_if_the_server_stored_the_rows<C: RawConn>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let mut plain = connect_any(&test_db.url()).unwrap();
    let (mut number, mut refused) = (0, 0);
    for outcome in 0..3 {
        prepare(&mut plain, test_db, outcome);
        let texts = Texts::of(test_db, outcome);
        for handling in [Handling::HandsOn, Handling::Swallows, Handling::Panics] {
            for raw in C::all() {
                for frame in FRAMES {
                    number += 1;
                    let message = format!("row {number}");
                    let session = app.open_session().unwrap();
                    session.send(&insert(&message)).unwrap();
                    let sent = catch_unwind(AssertUnwindSafe(|| send(&session, raw, &texts, handling, frame)));
                    let committed = session.commit();
                    session.rollback().unwrap();
                    let is_stored = stored(&mut plain, &message);
                    let case = format!("{} with outcome {outcome} {handling:?} in {frame}: {sent:?}", raw.0);
                    assert_eq!(committed.is_ok(), is_stored, "{case}, then {committed:?}");
                    assert!(committed.as_ref().err().is_none_or(Error::is_rollback_required), "{case}: {committed:?}");
                    refused += usize::from(committed.is_err());
                    // Nothing of it is left for the next.
                    session.send(&insert(&format!("after {number}"))).unwrap();
                    session.commit().unwrap();
                    assert!(stored(&mut plain, &format!("after {number}")), "{case}");
                }
            }
            for (name, run) in C::in_session() {
                number += 1;
                let message = format!("row {number}");
                let session = app.open_session().unwrap();
                session.send(&insert(&message)).unwrap();
                let sent = run(&session, &texts);
                let committed = session.commit();
                session.rollback().unwrap();
                let is_stored = stored(&mut plain, &message);
                assert_eq!(committed.is_ok(), is_stored, "{name} with outcome {outcome}: {sent:?}, then {committed:?}");
            }
        }
    }
    assert!(refused > 50, "{refused} of {number} commits were refused");
}

fn commit_of_a_scope_is_ok_exactly_if_the_server_stored_the_rows<C: RawConn>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let mut plain = connect_any(&test_db.url()).unwrap();
    let mut number = 0;
    for outcome in 0..3 {
        prepare(&mut plain, test_db, outcome);
        let texts = Texts::of(test_db, outcome);
        for raw in C::all() {
            for end in ["transaction", "retry", "run", "resolvable", "savepoint around all", "read again"] {
                number += 1;
                let message = format!("row {number}");
                let work = |session: &Session<C>| -> Result<(), Error> {
                    session.send(&insert(&message))?;
                    session.with(|conn| handle(conn, |conn| (raw.1)(conn, &texts), Handling::Swallows))
                };
                let committed = match end {
                    "transaction" => app.context(|| C::db().session()?.transaction(work)),
                    "retry" => app.context(|| C::db().session()?.retry(1, work)),
                    "run" => app.run(|| work(&C::db().session()?)),
                    "resolvable" => app.scope().resolvable().run_and_commit(|| work(&C::db().session()?)),
                    "savepoint around all" => app.run(|| C::db().session()?.savepoint(work)),
                    _ => app.context(|| {
                        let session = C::db().session()?;
                        work(&session)?;
                        // The next statement is refused, or all is well.
                        session.number("SELECT count(*) AS number FROM entries")?;
                        session.commit()
                    }),
                };
                let is_stored = stored(&mut plain, &message);
                let case = format!("{} with outcome {outcome}, {end}: {committed:?}", raw.0);
                assert_eq!(committed.is_ok(), is_stored, "{case}");
                assert!(!committed.as_ref().is_err_and(Error::is_commit_unknown), "{case}");
            }
        }
    }
}
