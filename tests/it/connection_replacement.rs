//! Connections that answer and have to be replaced: another program has changed the schema, or the server refuses
//! writes.

use std::cell::Cell;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::{App, Config, Error, Result, Session};

use crate::fixtures::{INSERT, SessionExt, TestConnection, TestDatabase, connect_any};
use crate::for_each_database;
use crate::schema_version::{Good, pages};

for_each_database!(only postgres =>
    schema_changed_by_another_program_costs_one_error_a_connection_at_most,
    one_error_about_the_schema_replaces_all_idle_connections,
    retry_gets_a_new_connection_after_a_change_of_the_schema,
    connection_whose_prepared_statements_are_gone_is_replaced,
    connection_that_became_read_only_is_replaced,
);

const TABLE: &str = "CREATE TYPE mood AS ENUM ('good'); CREATE TABLE pages (id INTEGER, title TEXT, mood mood)";

const OTHER_COLUMN: &str = "ALTER TABLE pages ALTER title TYPE VARCHAR(200)";

const OTHER_TYPE: &str = "DROP TABLE pages; DROP TYPE mood; CREATE TYPE mood AS ENUM ('good'); \
     CREATE TABLE pages (id INTEGER, title TEXT, mood mood)";

/// The type stays, under another name, and the column has a new one.
const RENAMED_TYPE: &str = "ALTER TYPE mood RENAME TO old_mood; CREATE TYPE mood AS ENUM ('good'); \
     ALTER TABLE pages ALTER mood TYPE mood USING mood::text::mood";

/// A type of the same name in a schema that comes first.
const HIDDEN_TYPE: &str = "CREATE SCHEMA app; CREATE TYPE app.mood AS ENUM ('good'); \
     CREATE TABLE app.pages (id INTEGER, title TEXT, mood app.mood)";

fn titles(session: &Session<PgConnection>) -> Result<Vec<String>> {
    session.load(pages::table.filter(pages::id.eq(1)).select(pages::title))
}

fn insert(session: &Session<PgConnection>) -> Result<()> {
    let page = (pages::id.eq(1), pages::title.eq("A"), pages::mood.eq(Good));
    session.execute(diesel::insert_into(pages::table).values(page)).map(drop)
}

/// An application with three connections, each of which has plans and numbers of types, and a client that changes the
/// schema.
fn warm(test_db: &TestDatabase) -> (crate::fixtures::RegisteredApp<PgConnection>, crate::fixtures::AnyConnection) {
    let mut plain = connect_any(&test_db.url()).unwrap();
    plain.batch_execute(TABLE).unwrap();
    let app = PgConnection::app(test_db.config().max_size(3));
    let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
    for session in &sessions {
        for _ in 0..3 {
            insert(session).unwrap();
            titles(session).unwrap();
        }
    }
    drop(sessions);
    assert_eq!(app.status().open, 3);
    (app, plain)
}

/// How many scopes fail until all connections are sound again, of twelve that come one after another, three at a time.
fn failures(app: &App<PgConnection>, work: fn(&Session<PgConnection>) -> Result<()>) -> Vec<Error> {
    let mut errors = Vec::new();
    for _ in 0..4 {
        let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
        errors.extend(sessions.iter().filter_map(|session| work(session).err()));
    }
    errors
}

fn schema_changed_by_another_program_costs_one_error_a_connection_at_most() {
    for (change, work) in [
        (OTHER_COLUMN, (|session| titles(session).map(drop)) as fn(&Session<PgConnection>) -> Result<()>),
        (OTHER_TYPE, insert),
        (RENAMED_TYPE, insert),
        (HIDDEN_TYPE, insert),
        (RENAMED_TYPE, |session| {
            let good = pages::table.filter(pages::mood.eq(Good)).select(pages::title);
            session.load::<String>(good).map(drop)
        }),
        // Code that keeps the error to itself closes the connection too.
        (OTHER_COLUMN, |session| {
            session.with(|conn| {
                let _ = pages::table.filter(pages::id.eq(1)).select(pages::title).load::<String>(conn);
                Ok(())
            })
        }),
    ] {
        let test_db = TestDatabase::postgres();
        let (app, mut plain) = warm(&test_db);
        plain.batch_execute(change).unwrap();
        let error = failures(&app, work);
        assert!(error.len() <= 3, "{error:?}");
        assert!(error.iter().all(Error::is_transient), "{error:?}");
        assert!(failures(&app, |session| titles(session).map(drop)).is_empty());
        assert!(failures(&app, insert).is_empty());
    }
}

fn one_error_about_the_schema_replaces_all_idle_connections() {
    let test_db = TestDatabase::postgres();
    let (app, mut plain) = warm(&test_db);
    plain.batch_execute(OTHER_TYPE).unwrap();
    let session = app.open_session().unwrap();
    assert!(insert(&session).unwrap_err().is_transient());
    session.rollback().unwrap();
    assert!(failures(&app, insert).is_empty());
}

fn retry_gets_a_new_connection_after_a_change_of_the_schema() {
    for change in [OTHER_COLUMN, OTHER_TYPE] {
        let test_db = TestDatabase::postgres();
        let (app, mut plain) = warm(&test_db);
        plain.batch_execute(change).unwrap();
        let session = app.open_session().unwrap();
        let attempts = Cell::new(0);
        session
            .retry(2, |session| {
                attempts.set(attempts.get() + 1);
                titles(session)?;
                insert(session)
            })
            .unwrap();
        assert_eq!(attempts.get(), 2, "{change}");
        assert_eq!(plain.number("SELECT count(*) AS number FROM pages").unwrap(), 1);
    }
}

/// The server forgets the statements that the driver has prepared, and the driver is not told.
fn connection_whose_prepared_statements_are_gone_is_replaced() {
    for raw in ["DISCARD ALL", "DEALLOCATE ALL", "/* all of them */ deallocate prepare all"] {
        for autocommit in [true, false] {
            if raw == "DISCARD ALL" && !autocommit {
                continue;
            }
            let test_db = TestDatabase::postgres();
            let (app, _plain) = warm(&test_db);
            let scope = || if autocommit { app.scope().autocommit() } else { app.scope() };
            let session = || PgConnection::db().session();
            scope().run(|| session()?.with(|conn| conn.batch_execute(raw))).unwrap();
            // The others need not be replaced.
            assert_eq!(app.status().open, 2, "{raw}");
            for _ in 0..6 {
                scope().run(|| titles(&session()?)).unwrap();
            }
            // In the context itself it is too late, and `retry` takes another connection.
            let session = app.open_session().unwrap();
            let is_first = Cell::new(true);
            session
                .retry(2, |session| {
                    if is_first.replace(false) {
                        session.send("DEALLOCATE ALL")?;
                    }
                    titles(session).map(drop)
                })
                .unwrap();
        }
    }
}

fn alter(test_db: &TestDatabase, setting: &str) {
    let sql = format!("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I {setting}', current_database()); END $$");
    connect_any(&test_db.url()).unwrap().batch_execute(&sql).unwrap();
}

/// As after a failover: connections from before are in a server that takes no writes, new ones are not.
fn connection_that_became_read_only_is_replaced() {
    let test_db = TestDatabase::postgres();
    let migrated = PgConnection::app(test_db.config());
    migrated.create_all().unwrap();
    alter(&test_db, "SET default_transaction_read_only = on");
    let app = PgConnection::app(Config::new(test_db.url()).max_size(3));
    let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| assert_eq!(session.number("SELECT 1::bigint AS number").unwrap(), 1));
    drop(sessions);
    {
        // Not this client's own default.
        let mut plain = PgConnection::establish(&test_db.url()).unwrap();
        plain.batch_execute("SET default_transaction_read_only = off").unwrap();
        let sql = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); END $$";
        plain.batch_execute(sql).unwrap();
    }
    // Reading goes on as it is.
    app.scope().read_only().run(|| PgConnection::db().session()?.number("SELECT 1::bigint AS number")).unwrap();
    let refused = app.scope().read_only().run(|| PgConnection::db().session()?.send(INSERT)).unwrap_err();
    assert!(!refused.is_transient(), "{refused}");
    assert_eq!(app.status().open, 3);

    let session = app.open_session().unwrap();
    let refused = session.send(INSERT).unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    let Some(diesel::result::Error::DatabaseError(_, information)) = refused.database_error() else {
        panic!("{refused}")
    };
    assert!(information.hint().unwrap().contains("on a new connection"));
    session.rollback().unwrap();
    session.retry(1, |session| session.send(INSERT)).unwrap();
    for _ in 0..6 {
        app.run(|| PgConnection::db().session()?.send(INSERT)).unwrap();
    }

    // The same, handled by `retry`.
    alter(&test_db, "SET default_transaction_read_only = on");
    let app = PgConnection::app(Config::new(test_db.url()).max_size(1));
    let session = app.open_session().unwrap();
    session.send("SELECT 1").unwrap();
    session.rollback().unwrap();
    let mut plain = PgConnection::establish(&test_db.url()).unwrap();
    plain.batch_execute("SET default_transaction_read_only = off").unwrap();
    plain
        .batch_execute(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET default_transaction_read_only', current_database()); END $$",
        )
        .unwrap();
    session.retry(2, |session| session.send(INSERT)).unwrap();
}
