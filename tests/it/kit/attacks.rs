//! What breaks a test kit: code that has the connection, settings of another test, tests that cannot begin.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::{Database, Recorder, Reset};

use super::*;

const SETTING: &str = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'statement_timeout'";

fn rollback(url: impl Into<String>) -> (Config, TestIsolation) {
    (Config::new(url.into()), TestIsolation::Rollback)
}

/// `body` with the URL of each server, and in memory.
macro_rules! on_all {
    ($body:ident) => {
        if enabled(Kind::Postgres) {
            $body::<PgConnection>(&support::postgres().url());
        }
        if enabled(Kind::Mysql) {
            $body::<MysqlConnection>(&support::mariadb().url());
        }
        $body::<SqliteConnection>(":memory:");
    };
}

#[test]
fn no_migrations_are_no_reason_to_begin_again() {
    static DB: Database<MysqlConnection> = Database::without_migrations();
    if !enabled(Kind::Mysql) {
        return;
    }
    let (told, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..2 {
            let test = TestSetup::of(&DB)
                .config(Config::new(support::mariadb().url()))
                .isolation(TestIsolation::Rollback)
                .fixture(Fixture::sql("a table", "CREATE TABLE only (a INTEGER); INSERT INTO only VALUES (1)"))
                .start()
                .unwrap();
            let session = test.open_session().unwrap();
            assert_eq!(session.number("SELECT count(*) AS number FROM only").unwrap(), 1);
            drop(session);
            test.finish().unwrap();
        }
        told.send(()).unwrap();
    });
    heard.recv_timeout(Duration::from_secs(20)).expect("it ends");
}

/// Takes all connections that are to be had, so that nothing is kept between tests any more.
fn forget_what_is_free<C: Conn>(db: &'static Database<C>, url: &str) {
    let test = TestSetup::of(db).config(Config::new(url)).max_size(1000).start().unwrap();
    test.finish().unwrap();
}

fn is_gone_without_an_owner<C: Conn>(url: &str, first: &'static Database<C>, second: &'static Database<C>) {
    let begin =
        |db: &'static Database<C>| TestSetup::of(db).config(Config::new(url)).isolation(TestIsolation::Rollback);
    begin(first).start().unwrap().finish().unwrap();
    forget_what_is_free(first, url);
    // That database object has made nothing so far: it finds what the first has made, as the next process would.
    let test = begin(second).start().unwrap();
    let _ = test.open_session().unwrap().send(&format!("{INSERT}; COMMIT"));
    assert_eq!(test.finish().unwrap_err().code(), "DS501");
    forget_what_is_free(first, url);
    for _ in 0..2 {
        let next = begin(second).start().unwrap();
        assert_eq!(committed(&next), 0);
        next.finish().unwrap();
    }
}

#[test]
fn what_was_committed_is_gone_also_where_another_process_has_made_the_database() {
    static PG: (Database<PgConnection>, Database<PgConnection>) =
        (Database::new(crate::fixtures::POSTGRES), Database::new(crate::fixtures::POSTGRES));
    static MY: (Database<MysqlConnection>, Database<MysqlConnection>) =
        (Database::new(crate::fixtures::MYSQL), Database::new(crate::fixtures::MYSQL));
    if enabled(Kind::Postgres) {
        is_gone_without_an_owner(&support::postgres().url(), &PG.0, &PG.1);
    }
    if enabled(Kind::Mysql) {
        is_gone_without_an_owner(&support::mariadb().url(), &MY.0, &MY.1);
    }
}

fn is_gone_although_it_is_held<C: Conn>(url: &str) {
    let test = begin::<C>(&rollback(url));
    let app = test.app().clone();
    let (told, heard) = mpsc::channel();
    let (release, wait) = mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        let session = app.open_session().unwrap();
        session
            .with(|conn| {
                conn.batch_execute(&format!("{INSERT}; COMMIT"))?;
                told.send(()).unwrap();
                let _ = wait.recv();
                Ok(())
            })
            .map(drop)
    });
    heard.recv().unwrap();
    let error = test.finish().unwrap_err();
    assert!(error.to_string().contains("attacks.rs"), "{error}");
    drop(release);
    let _ = holder.join().unwrap();
    for _ in 0..3 {
        let next = begin::<C>(&rollback(url));
        assert_eq!(committed(&next), 0);
        next.finish().unwrap();
    }
}

#[test]
fn what_was_committed_is_gone_although_a_thread_still_has_the_connection() {
    on_all!(is_gone_although_it_is_held);
}

#[test]
fn settings_of_one_test_are_not_those_of_the_next() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let url = support::postgres().url();
    let with = |config: Config| begin::<PgConnection>(&(config, TestIsolation::Rollback));
    let lock = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'lock_timeout'";
    let strict = Config::new(&*url)
        .statement_timeout(Duration::from_secs(7))
        .on_connect("SET lock_timeout = 1234")
        .application_name("strict");
    for _ in 0..2 {
        for (config, limit, lock_limit) in [(strict.clone(), 7000, 1234), (Config::new(&*url), 0, 0)] {
            let test = with(config);
            let session = test.open_session().unwrap();
            assert_eq!(session.number(SETTING).unwrap(), limit);
            assert_eq!(session.number(lock).unwrap(), lock_limit);
            let named =
                "SELECT count(*) AS number FROM pg_settings WHERE name = 'application_name' AND setting = 'strict'";
            assert_eq!(session.number(named).unwrap(), i64::from(limit > 0));
            drop(session);
            test.finish().unwrap();
        }
    }
}

fn transaction<C: Conn>(conn: &mut C) -> QueryResult<()> {
    conn.transaction(|conn| conn.batch_execute("SELECT 1"))
}

fn hooks_are_inside<C: Conn>(db: &'static Database<C>, url: &str) {
    for _ in 0..2 {
        let test = TestSetup::of(db).config(Config::new(url)).isolation(TestIsolation::Rollback).start().unwrap();
        for rows in 1..=3 {
            test.scope()
                .commit_on_ok()
                .run(|| {
                    let session = db.session()?;
                    session.send(INSERT)?;
                    assert_eq!(session.number(COUNT)?, rows);
                    Ok::<(), Error>(())
                })
                .unwrap();
        }
        test.dispose().unwrap();
        assert_eq!(committed(&test), 3);
        test.finish().unwrap();
    }
}

#[test]
fn hooks_of_the_pool_do_not_commit_the_test() {
    static PG: Database<PgConnection> = Database::new(crate::fixtures::POSTGRES)
        .on_connect(transaction)
        .on_checkout(transaction)
        .on_checkin(transaction)
        .on_close(|conn| drop(transaction(conn)));
    static MY: Database<MysqlConnection> = Database::new(crate::fixtures::MYSQL)
        .on_connect(transaction)
        .on_checkout(transaction)
        .on_checkin(transaction)
        .on_close(|conn| drop(transaction(conn)));
    static LITE: Database<SqliteConnection> = Database::new(crate::fixtures::SQLITE)
        .on_connect(transaction)
        .on_checkout(transaction)
        .on_checkin(transaction)
        .on_close(|conn| drop(transaction(conn)));
    hooks_are_inside(&LITE, ":memory:");
    if enabled(Kind::Postgres) {
        hooks_are_inside(&PG, &support::postgres().url());
    }
    if enabled(Kind::Mysql) {
        hooks_are_inside(&MY, &support::mariadb().url());
    }
}

#[test]
fn what_sqlite_sets_outside_of_a_transaction_is_set_once() {
    let config =
        Config::new(":memory:").on_connect("PRAGMA synchronous = OFF").on_connect("PRAGMA journal_mode = MEMORY");
    for _ in 0..2 {
        let test = begin::<SqliteConnection>(&(config.clone(), TestIsolation::Rollback));
        test.scope().commit_on_ok().run(|| SqliteConnection::db().session()?.send("CREATE TABLE more (a)")).unwrap();
        test.scope().commit_on_ok().run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
        test.dispose().unwrap();
        assert_eq!(committed(&test), 1);
        test.finish().unwrap();
    }
}

fn every_reset<C: Conn>(url: &str) {
    for reset in [Reset::Always, Reset::Never, Reset::WhenDirty] {
        for _ in 0..2 {
            let config = Config::new(url).reset(reset).max_lifetime(Duration::from_millis(1));
            let test = begin::<C>(&(config, TestIsolation::Rollback));
            for rows in 1..=3 {
                test.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
                assert_eq!(committed(&test), rows);
                std::thread::sleep(Duration::from_millis(3));
            }
            test.finish().unwrap();
        }
    }
}

#[test]
fn every_way_of_cleaning_keeps_the_transaction() {
    on_all!(every_reset);
}

#[test]
fn an_application_of_the_same_id_stays_registered() {
    let db = SqliteConnection::db();
    let mine = db.init_app("the same id", Config::new(":memory:")).unwrap();
    let refused = TestSetup::of(db).config(Config::new(":memory:")).named("the same id").start();
    match refused {
        Err(error) => assert_eq!(error.code(), "DS102", "{error}"),
        Ok(test) => {
            assert_ne!(test.id(), mine.id());
            test.finish().unwrap();
        }
    }
    assert!(db.app("the same id").is_ok(), "it is somebody else's");
    mine.ping().unwrap();
    db.remove_app("the same id").unwrap();
    // The other way round.
    let test = TestSetup::of(db).config(Config::new(":memory:")).named("taken over").start().unwrap();
    db.remove_app(test.id()).unwrap();
    let other = db.init_app(test.id(), Config::new(":memory:")).unwrap();
    test.finish().unwrap();
    assert!(db.app(other.id()).is_ok());
    other.ping().unwrap();
    db.remove_app(other.id()).unwrap();
}

#[test]
fn tables_without_transactions_do_not_keep_rows() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let setup = || {
        TestSetup::of(MysqlConnection::db())
            .config(Config::new(support::mariadb().url()))
            .isolation(TestIsolation::Rollback)
            .fixture(Fixture::sql("a table", "CREATE TABLE plain (a INTEGER) ENGINE = MyISAM"))
    };
    for _ in 0..3 {
        let test = setup().start().unwrap();
        let session = test.open_session().unwrap();
        assert_eq!(session.number("SELECT count(*) AS number FROM plain").unwrap(), 0);
        session.send("INSERT INTO plain VALUES (1)").unwrap();
        session.commit().unwrap();
        drop(session);
        test.finish().unwrap();
    }
}

#[test]
fn a_limit_of_the_database_object_is_waited_for() {
    static DB: Database<PgConnection> = Database::new(crate::fixtures::POSTGRES).max_connections(1);
    if !enabled(Kind::Postgres) {
        return;
    }
    let start = || {
        let config = Config::new(support::postgres().url()).acquire_timeout(Duration::from_secs(5));
        TestSetup::of(&DB).config(config).isolation(TestIsolation::Rollback).start()
    };
    let first = start().unwrap();
    let (told, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let second = start();
        told.send(second.map(|test| test.finish()).map_err(|error| error.to_string())).unwrap();
    });
    assert!(heard.recv_timeout(Duration::from_millis(300)).is_err());
    assert_eq!(committed(&first), 0);
    first.finish().unwrap();
    heard.recv_timeout(Duration::from_secs(4)).expect("it gets what the first has given back").unwrap().unwrap();
}

#[test]
fn what_one_database_object_keeps_another_may_have() {
    static DBS: [Database<PgConnection>; 2] =
        [Database::new(crate::fixtures::POSTGRES), Database::new(crate::fixtures::POSTGRES)];
    if !enabled(Kind::Postgres) {
        return;
    }
    let start = |db: &'static Database<PgConnection>, isolation, size| {
        let config = Config::new(support::postgres().url());
        let setup = TestSetup::of(db).config(config).isolation(isolation).max_size(size);
        setup.patience(Duration::from_secs(10)).start()
    };
    // Several at a time, and then nobody is under way.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let test = start(&DBS[0], TestIsolation::Rollback, 1).unwrap();
                std::thread::sleep(Duration::from_millis(100));
                test.finish().unwrap();
            });
        }
    });
    let other = start(&DBS[1], TestIsolation::Database, 1000).unwrap();
    other.finish().unwrap();
}

#[test]
fn more_threads_than_connections_wait_for_those_that_end() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let url = support::postgres().url();
    std::thread::scope(|scope| {
        for number in 0..40 {
            let url = &url;
            scope.spawn(move || {
                let isolation = if number % 10 == 0 { TestIsolation::Database } else { TestIsolation::Rollback };
                let setup = TestSetup::of(PgConnection::db()).config(Config::new(&**url)).isolation(isolation);
                let test = setup.patience(Duration::from_secs(30)).start().unwrap();
                test.scope().commit_on_ok().run(|| PgConnection::db().session()?.send(INSERT)).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(committed(&test), 1);
                test.finish().unwrap();
            });
        }
    });
}

static FAILS: AtomicBool = AtomicBool::new(true);

fn panics_at_first<C: Conn>(session: &Session<C>) -> Result<()> {
    session.send(INSERT)?;
    assert!(!FAILS.swap(false, Ordering::SeqCst), "not yet");
    Ok(())
}

fn a_fixture_that_panics<C: Conn>(url: &str) {
    for isolation in [TestIsolation::Rollback, TestIsolation::Database] {
        FAILS.store(true, Ordering::SeqCst);
        let setup = || {
            TestSetup::of(C::db())
                .config(Config::new(url))
                .isolation(isolation)
                .fixture(Fixture::function("at first", panics_at_first::<C>))
        };
        let failed = catch_unwind(AssertUnwindSafe(|| setup().start().map(drop))).expect("an error, not a panic");
        let text = failed.unwrap_err().to_string();
        assert!(text.contains("at first") && text.contains("not yet"), "{text}");
        let test = setup().start().unwrap();
        assert_eq!(committed(&test), 1);
        test.finish().unwrap();
    }
}

#[test]
fn a_fixture_that_panics_is_an_error_and_leaves_nothing() {
    on_all!(a_fixture_that_panics);
}

#[test]
fn a_foreign_key_that_nobody_uses_is_in_nobodys_way() {
    let setup = TestSetup::of(SqliteConnection::db()).config(Config::new(":memory:"));
    let odd = "CREATE TABLE odd_parents (name TEXT); \
               CREATE TABLE odd_children (name TEXT REFERENCES odd_parents (name), other INTEGER REFERENCES nowhere (id)); \
               PRAGMA foreign_keys = 0; INSERT INTO odd_children VALUES ('an orphan', 1); PRAGMA foreign_keys = 1";
    let test = setup.isolation(TestIsolation::Rollback).fixture(Fixture::sql("odd", odd)).start().unwrap();
    test.scope().commit_on_ok().run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
    assert_eq!(committed(&test), 1);
    test.finish().unwrap();
}

#[test]
fn whoever_finds_the_connection_with_an_old_pool_waits_for_it() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let test = begin::<PgConnection>(&rollback(support::postgres().url()));
    let (told, heard) = mpsc::channel();
    let (release, wait) = mpsc::channel::<()>();
    let app = test.app().clone();
    let holder = std::thread::spawn(move || {
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        told.send(()).unwrap();
        let _ = wait.recv();
        session.commit()
    });
    heard.recv().unwrap();
    assert!(test.dispose_within(Duration::from_millis(10)).is_err());
    let soon = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(release);
    });
    assert_eq!(committed(&test), 1);
    holder.join().unwrap().unwrap();
    soon.join().unwrap();
    test.finish().unwrap();
}

fn a_lost_connection<C: Conn>(url: &str, number: &str, end: impl Fn(i64)) {
    let test = begin::<C>(&rollback(url));
    test.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
    let session = test.open_session().unwrap();
    let pid = session.number(number).unwrap();
    session.rollback().unwrap();
    drop(session);
    end(pid);
    // Long enough that the pool asks for a sign of life.
    std::thread::sleep(Duration::from_millis(700));
    let begun = Instant::now();
    assert!(test.open_session().unwrap().number(COUNT).is_err());
    let error = test.open_session().unwrap().number(COUNT).unwrap_err();
    assert_eq!(error.code(), "DS501", "{error}");
    assert!(error.to_string().contains("lost"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let error = test.finish().unwrap_err();
    assert!(error.to_string().contains("lost"), "{error}");
    let next = begin::<C>(&rollback(url));
    assert_eq!(committed(&next), 0);
    next.finish().unwrap();
}

#[test]
fn a_connection_that_is_lost_while_nobody_has_it_fails_the_test() {
    if enabled(Kind::Postgres) {
        let server = support::postgres();
        let number = "SELECT pg_backend_pid()::bigint AS number";
        a_lost_connection::<PgConnection>(&server.url(), number, |pid| server.terminate(i32::try_from(pid).unwrap()));
    }
    if enabled(Kind::Mysql) {
        let server = support::mariadb();
        let number = "SELECT CAST(CONNECTION_ID() AS SIGNED) AS number";
        a_lost_connection::<MysqlConnection>(&server.url(), number, |session| server.terminate(session));
    }
}

fn deadlines<C: Conn>(url: &str) {
    let test = begin::<C>(&rollback(url));
    let sleep = |time: f64| match url.starts_with("mysql") {
        true => format!("SELECT COUNT(*) AS number FROM entries WHERE SLEEP({time}) = 0"),
        false => format!("SELECT COUNT(*) AS number FROM pg_sleep({time})"),
    };
    test.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
    for autocommit in [false, true] {
        let scope = || test.scope().deadline(Duration::from_millis(300));
        let scope = || if autocommit { scope().autocommit() } else { scope() };
        scope()
            .run(|| {
                let session = C::db().session()?;
                session.send(INSERT)?;
                let error = session.number(&sleep(5.0)).unwrap_err();
                assert_eq!(error.code(), "DS305", "{error}");
                session.rollback()
            })
            .unwrap();
        scope().run(|| C::db().session()?.number(COUNT)).unwrap();
        let session = test.open_session().unwrap();
        session.number(&sleep(0.6)).unwrap();
        if !url.starts_with("mysql") {
            assert_eq!(session.number(SETTING).unwrap(), 0);
        }
        assert_eq!(session.number(COUNT).unwrap(), if autocommit { 2 } else { 1 });
    }
    test.finish().unwrap();
}

#[test]
fn a_deadline_leaves_no_limit_behind() {
    if enabled(Kind::Postgres) {
        deadlines::<PgConnection>(&support::postgres().url());
    }
    if enabled(Kind::Mysql) {
        deadlines::<MysqlConnection>(&support::mariadb().url());
    }
}

fn one_after_the_other<C: Conn>(url: &str) {
    let test = begin::<C>(&rollback(url));
    // Read-only and then not.
    test.scope().read_only().run(|| C::db().session()?.number(COUNT)).unwrap();
    let read = test.scope().read_only().commit_on_ok().run(|| C::db().session()?.number(COUNT));
    assert_eq!(read.unwrap(), 0);
    test.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
    // A guard that is kept across the end of its session.
    let session = test.open_session().unwrap();
    let mut guard = session.connection().unwrap();
    guard.batch_execute(INSERT).unwrap();
    assert_eq!(session.commit().unwrap_err().code(), "DS106");
    drop(session);
    guard.batch_execute(INSERT).unwrap();
    drop(guard);
    // One from another scope, where each statement is committed by itself.
    let kept = test.scope().autocommit().run(|| {
        let session = C::db().session()?;
        let mut guard = session.connection()?;
        guard.batch_execute(INSERT).unwrap();
        Ok::<_, Error>(guard)
    });
    let mut kept = kept.unwrap();
    kept.batch_execute(INSERT).unwrap();
    drop(kept);
    let rows = committed(&test);
    assert!(rows == 1 || rows == 3, "{rows}");
    // Savepoints of the program's own.
    test.scope()
        .commit_on_ok()
        .run(|| {
            let session = C::db().session()?;
            session.send("SAVEPOINT diesel_savepoint_1; SAVEPOINT a")?;
            session.send(INSERT)?;
            session.savepoint(|session| session.send(INSERT))?;
            session.send("ROLLBACK TO SAVEPOINT a")
        })
        .unwrap();
    assert_eq!(committed(&test), rows);
    // Begun as a test of Diesel's own.
    let panic = catch_unwind(AssertUnwindSafe(|| {
        test.context(|| {
            let session = C::db().session().unwrap();
            let _ = session.with(|conn| conn.begin_test_transaction());
        })
    }));
    assert!(panic.is_err());
    assert_eq!(committed(&test), rows);
    // The hook of a commit that panics.
    let session = test.open_session().unwrap();
    session.send(INSERT).unwrap();
    session.before_commit(|| panic!("in a hook")).unwrap();
    assert!(session.commit().is_err());
    drop(session);
    assert_eq!(committed(&test), rows);
    // Once more, as often as it takes.
    let mut tries = 0;
    test.context(|| {
        let session = C::db().session()?;
        session.retry(3, |session| {
            tries += 1;
            session.send(INSERT)?;
            if tries < 2 { Err(transient()) } else { Ok(()) }
        })
    })
    .unwrap_or_else(|error: Error| assert!(tries < 3, "{error}"));
    test.scope().resolvable().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
    test.finish().unwrap();
}

fn transient() -> Error {
    Error::NoContext { at: std::panic::Location::caller() }
}

#[test]
fn what_comes_after_is_none_the_worse() {
    on_all!(one_after_the_other);
}

#[test]
fn tests_of_two_database_objects_find_each_other_by_name() {
    static OTHER: Database<SqliteConnection> = Database::new(crate::fixtures::SQLITE);
    let db = SqliteConnection::db();
    let test = TestSetup::of(db).config(Config::new(":memory:")).named("two databases").start().unwrap();
    let refused = test.context(|| OTHER.session().map(drop)).unwrap_err();
    assert!(refused.to_string().contains("two databases"), "{refused}");
    let other = TestSetup::of(&OTHER).config(Config::new(":memory:")).named(test.id().to_owned()).start().unwrap();
    test.context(|| {
        OTHER.session()?.send(INSERT)?;
        db.session()?.send(INSERT)?;
        OTHER.session()?.commit()?;
        db.session()?.commit()
    })
    .unwrap();
    assert_eq!((committed(&test), committed(&other)), (1, 1));
    other.finish().unwrap();
    test.finish().unwrap();
}

#[test]
fn a_test_may_end_in_another_thread_and_in_its_own_context() {
    for (config, isolation) in worlds(Server::Sqlite) {
        let test = begin::<SqliteConnection>(&(config.clone(), isolation));
        std::thread::spawn(move || test.finish()).join().unwrap().unwrap();
        let test = begin::<SqliteConnection>(&(config, isolation));
        let app = test.app().clone();
        app.context(|| {
            let session = SqliteConnection::db().session().unwrap();
            session.send(INSERT).unwrap();
            session.commit().unwrap();
            test.finish().unwrap();
            assert!(session.send(INSERT).is_err());
        });
    }
}

/// Nothing of a URL's password, in whatever way it is given.
#[test]
fn why_a_test_cannot_begin_is_said_without_the_password() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let server = support::postgres();
    server.admin().batch_execute("DROP ROLE IF EXISTS poor; CREATE ROLE poor LOGIN PASSWORD 'hush-hush'").unwrap();
    let at = |user: &str, password: &str, port: u16, rest: &str| {
        format!("postgres://{user}:{password}@{}:{port}/{rest}", server.host())
    };
    let port = server.port();
    let cases = [
        (at("poor", "hush-hush", port, "postgres"), TestIsolation::Database, "CREATEDB"),
        (at("poor", "hush-hush", port, "postgres"), TestIsolation::Rollback, "CREATEDB"),
        (at("poor", "wrong-hush-hush", port, "postgres"), TestIsolation::Database, "password"),
        (at("poor", "hush-hush", 1, "postgres"), TestIsolation::Rollback, "refused"),
        (at("poor", "hush-hush", port, "?dbname=postgres"), TestIsolation::Database, "dbname"),
        (at("poor", "hush-hush", port, "postgres?options=-c%20jit=off"), TestIsolation::Schema, "options"),
    ];
    for (url, isolation, word) in cases {
        let setup = TestSetup::of(PgConnection::db()).config(Config::new(url)).isolation(isolation);
        // Nobody has made a database for it before.
        let started = setup.fixture(Fixture::sql("nothing", "SELECT 1 AS nothing")).start();
        let text = started.map(drop).unwrap_err().to_string();
        assert!(text.contains(word), "{isolation:?}: {text}");
        assert!(!text.contains("hush"), "{text}");
    }
}

#[test]
fn a_log_that_sends_queries_itself_may_be_recorded() {
    let test = begin::<SqliteConnection>(&rollback(":memory:"));
    let ((), recording) = Recorder::new().run(|| {
        test.context(|| {
            let session = SqliteConnection::db().session().unwrap();
            let panic = catch_unwind(AssertUnwindSafe(|| {
                Recorder::new().run(|| {
                    session.number(COUNT).unwrap();
                    panic!("in a recording")
                })
            }));
            assert!(panic.is_err());
            session.number(COUNT).unwrap();
        });
    });
    assert_eq!(recording.total(), 2);
    test.finish().unwrap();
}
