//! What code leaves on the one connection of a test that is rolled back.

use diesel::prelude::*;

use super::*;

for_each_database!(ServerUrl; postgres, mariadb, sqlite => exchanged_connections_serve_no_other_test);
for_each_database!(ServerUrl; postgres, sqlite => thread_that_disposed_of_its_own_session_would_deadlock);
for_each_database!(only mariadb => temporary_table_of_mariadb_is_no_schema_change);
for_each_database!(only postgres =>
    session_state_of_postgres_is_removed_between_sessions,
    plan_of_a_rolled_back_table_is_not_used_again,
    deadline_keeps_the_limit_of_on_connect,
    templates_of_many_fixtures_are_all_kept,
);

diesel::table! {
    shapes (id) {
        id -> Integer,
        size -> Integer,
    }
}

#[track_caller]
fn rollback<C: TestConnection>(url: &str) -> TestApp<C> {
    begin(&(Config::new(url), TestIsolation::Rollback))
}

/// One statement in a transaction of its own.
#[track_caller]
fn commit<C: TestConnection>(test: &TestApp<C>, sql: &str) {
    test.run(|| C::db().session()?.send(sql)).unwrap_or_else(|error| panic!("{sql}: {error}"));
}

fn session_state_of_postgres_is_removed_between_sessions() {
    for _ in 0..2 {
        let test = rollback::<PgConnection>(&support::postgres().url());
        for _ in 0..2 {
            commit(&test, "SET LOCAL lock_timeout = 7; SET work_mem = '8MB'");
            commit(&test, "CREATE TEMP TABLE scratch (a INTEGER) ON COMMIT DROP");
            commit(&test, "DECLARE a_cursor CURSOR WITH HOLD FOR SELECT 1");
            commit(&test, "SELECT pg_advisory_lock(77); SELECT pg_advisory_xact_lock(78)");
            commit(&test, "LISTEN something; NOTIFY something");
            commit(&test, INSERT);
        }
        let session = test.open_session().unwrap();
        let left = "SELECT (SELECT count(*) FROM pg_settings WHERE name = 'lock_timeout' AND setting <> '0') \
                    + (SELECT count(*) FROM pg_settings WHERE name = 'work_mem' AND setting = '8192') \
                    + (SELECT count(*) FROM pg_cursors WHERE name = 'a_cursor') \
                    + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 77) AS number";
        assert_eq!(session.number(left).unwrap(), 0);
        drop(session);
        test.finish().unwrap();
    }
}

fn shapes_of(test: &TestApp<PgConnection>) -> Vec<(i32, i32)> {
    test.context(|| PgConnection::db().session()?.load(shapes::table)).unwrap()
}

fn plan_of_a_rolled_back_table_is_not_used_again() {
    for (made, more) in [
        ("CREATE TABLE shapes (id INTEGER, size INTEGER)", ""),
        ("SELECT 1 AS id, 'a'::text AS name, 2 AS size INTO shapes", ""),
        ("CREATE TABLE shapes (name TEXT, size INTEGER, id INTEGER)", ""),
        ("DO $$ BEGIN EXECUTE 'cre' || 'ate table shapes (size INTEGER, id INTEGER)'; END $$", ""),
        ("SELECT 3 AS size, 1 AS id INTO shapes", "x"),
    ] {
        let test = rollback::<PgConnection>(&support::postgres().url());
        commit(&test, made);
        let rows = shapes_of(&test);
        assert!(rows.len() <= 1, "{rows:?} {more}");
        assert_eq!(shapes_of(&test), rows);
        test.finish().unwrap();
    }
}

fn exchanged_connections_serve_no_other_test<C: TestConnection>(url: &str) {
    let (one, other) = (rollback::<C>(url), rollback::<C>(url));
    {
        let (first, second) = (one.open_session().unwrap(), other.open_session().unwrap());
        let (mut a, mut b) = (first.connection().unwrap(), second.connection().unwrap());
        std::mem::swap(&mut *a, &mut *b);
        a.batch_execute(INSERT).unwrap();
        b.batch_execute(INSERT).unwrap();
        drop((a, b));
        assert!(first.commit().is_err() && second.commit().is_err());
    }
    assert_eq!(one.finish().unwrap_err().code(), "DS501");
    assert_eq!(other.finish().unwrap_err().code(), "DS501");
    for _ in 0..2 {
        let next = (rollback::<C>(url), rollback::<C>(url));
        assert_eq!((committed(&next.0), committed(&next.1)), (0, 0));
        next.0.finish().unwrap();
        next.1.finish().unwrap();
    }
}

fn thread_that_disposed_of_its_own_session_would_deadlock<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    let session = test.open_session().unwrap();
    session.send(INSERT).unwrap();
    assert_eq!(test.dispose_report().unwrap().still_out.len(), 1);
    // In production it would get another connection.
    let error = test.open_session().unwrap().number(COUNT).unwrap_err();
    assert_eq!(error.code(), "DS206", "{error}");
    session.commit().unwrap();
    assert_eq!(committed(&test), 1);
    drop(session);
    test.finish().unwrap();
}

fn temporary_table_of_mariadb_is_no_schema_change() {
    for _ in 0..2 {
        let test = rollback::<MysqlConnection>(&support::mariadb().url());
        commit(&test, INSERT);
        commit(&test, "CREATE TEMPORARY TABLE scratch (a INTEGER); INSERT INTO scratch VALUES (1)");
        commit(&test, "DROP TEMPORARY TABLE scratch");
        commit(&test, "SET SESSION sql_mode = ''; SET @a = 1");
        assert_eq!(committed(&test), 1);
        test.finish().unwrap();
    }
}

fn deadline_keeps_the_limit_of_on_connect() {
    let config = Config::new(support::postgres().url()).connection_init_sql("SET statement_timeout = 4321");
    let test = begin::<PgConnection>(&(config, TestIsolation::Rollback));
    let limit = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'statement_timeout'";
    let deadline = std::time::Duration::from_secs(2);
    for _ in 0..2 {
        let insert = diesel::sql_query(INSERT);
        let within = test.scope().deadline(deadline).run_and_commit(|| PgConnection::db().session()?.execute(insert));
        within.unwrap();
        assert_eq!(test.open_session().unwrap().number(limit).unwrap(), 4321);
    }
    test.finish().unwrap();
}

/// More sets of fixtures than are kept.
fn templates_of_many_fixtures_are_all_kept() {
    let url = support::postgres().url();
    let made = || {
        let names = "SELECT count(*) AS number FROM pg_database WHERE datname LIKE 'diesel\\_session\\_template%'";
        support::postgres().admin().number(names).unwrap()
    };
    for _ in 0..2 {
        for number in 0..12 {
            let fixture = Fixture::sql("one of many", format!("SELECT {number}"));
            let test = TestSetup::of(PgConnection::db()).config(Config::new(&*url)).fixture(fixture).start().unwrap();
            test.finish().unwrap();
        }
        assert!(made() >= 12, "{}", made());
    }
}
