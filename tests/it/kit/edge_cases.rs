//! Edge cases of the test kit: code that has the connection, settings of another test, tests that cannot begin.

use std::any::TypeId;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::pool::Reset;
use diesel_session::recorder::Recorder;
use diesel_session::{App, Database};

use super::*;

for_each_database!(ServerUrl; postgres, mariadb, sqlite =>
    committed_rows_are_removed_while_a_thread_holds_the_connection,
    hooks_of_the_pool_do_not_commit_the_test,
    every_reset_option_keeps_the_transaction_of_a_rolled_back_test,
    panic_in_a_fixture_is_an_error_and_leaves_nothing,
    rolled_back_test_survives_guards_savepoints_hooks_and_retries,
);
for_each_database!(ServerUrl; postgres, mariadb =>
    committed_rows_are_removed_from_a_database_of_another_process,
    idle_connection_that_is_lost_fails_a_rolled_back_test,
    deadline_in_a_rolled_back_test_leaves_no_limit,
);
for_each_database!(only mariadb =>
    rolled_back_test_without_migrations_keeps_its_database,
    tables_without_transactions_are_emptied,
);
for_each_database!(only postgres =>
    settings_of_one_test_do_not_reach_the_next,
    test_waits_for_the_connection_limit_of_its_database_object,
    idle_connections_of_one_database_object_make_room_for_another,
    tests_beyond_the_connections_wait_for_others_to_end,
    caller_waits_for_the_connection_of_a_disposed_pool,
    error_at_the_start_of_a_test_omits_the_password,
);

const SETTING: &str = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'statement_timeout'";

fn rollback(url: impl Into<String>) -> (Config, TestIsolation) {
    (Config::new(url.into()), TestIsolation::Rollback)
}

fn rolled_back_test_without_migrations_keeps_its_database() {
    static DB: Database<MysqlConnection> = Database::without_migrations();
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
fn forget_what_is_free<C: TestConnection>(db: &'static Database<C>, url: &str) {
    let test = TestSetup::of(db).config(Config::new(url)).max_size(1000).start().unwrap();
    test.finish().unwrap();
}

fn committed_rows_are_removed_from_a_database_of_another_process<C: TestConnection>(url: &str) {
    let [first, second]: [&'static Database<C>; 2] =
        [Box::leak(Box::new(C::new_db())), Box::leak(Box::new(C::new_db()))];
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

fn committed_rows_are_removed_while_a_thread_holds_the_connection<C: TestConnection>(url: &str) {
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
    assert!(error.to_string().contains("edge_cases.rs"), "{error}");
    drop(release);
    let _ = holder.join().unwrap();
    for _ in 0..3 {
        let next = begin::<C>(&rollback(url));
        assert_eq!(committed(&next), 0);
        next.finish().unwrap();
    }
}

fn settings_of_one_test_do_not_reach_the_next() {
    let url = support::postgres().url();
    let with = |config: Config| begin::<PgConnection>(&(config, TestIsolation::Rollback));
    let lock = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'lock_timeout'";
    let strict = Config::new(&*url)
        .statement_timeout(Duration::from_secs(7))
        .connection_init_sql("SET lock_timeout = 1234")
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

fn transaction<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    conn.transaction(|conn| conn.batch_execute("SELECT 1"))
}

fn hooks_of_the_pool_do_not_commit_the_test<C: TestConnection>(url: &str) {
    let db: &'static Database<C> = Box::leak(Box::new(
        C::new_db()
            .on_connect(transaction)
            .on_checkout(transaction)
            .on_checkin(transaction)
            .on_close(|app, conn| drop(transaction(app, conn))),
    ));
    for _ in 0..2 {
        let test = TestSetup::of(db).config(Config::new(url)).isolation(TestIsolation::Rollback).start().unwrap();
        for rows in 1..=3 {
            test.run(|| {
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
fn pragmas_of_on_connect_run_once_in_a_rolled_back_test() {
    let config = Config::new(":memory:")
        .connection_init_sql("PRAGMA synchronous = OFF")
        .connection_init_sql("PRAGMA journal_mode = MEMORY");
    for _ in 0..2 {
        let test = begin::<SqliteConnection>(&(config.clone(), TestIsolation::Rollback));
        test.run(|| SqliteConnection::db().session()?.send("CREATE TABLE more (a)")).unwrap();
        test.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
        test.dispose().unwrap();
        assert_eq!(committed(&test), 1);
        test.finish().unwrap();
    }
}

fn every_reset_option_keeps_the_transaction_of_a_rolled_back_test<C: TestConnection>(url: &str) {
    for reset in [Reset::Always, Reset::Never, Reset::WhenDirty] {
        for _ in 0..2 {
            let config = Config::new(url).reset(reset).max_lifetime(Duration::from_millis(1));
            let test = begin::<C>(&(config, TestIsolation::Rollback));
            for rows in 1..=3 {
                test.run(|| C::db().session()?.send(INSERT)).unwrap();
                assert_eq!(committed(&test), rows);
                // Longer than `max_lifetime`.
                std::thread::sleep(Duration::from_millis(3));
            }
            test.finish().unwrap();
        }
    }
}

#[test]
fn application_with_the_id_of_a_test_stays_registered() {
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
    assert!(db.app("the same id").is_ok(), "it is the application of the program");
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

fn tables_without_transactions_are_emptied() {
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

fn test_waits_for_the_connection_limit_of_its_database_object() {
    static DB: Database<PgConnection> = Database::new(crate::fixtures::POSTGRES).max_connections(1);
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

fn idle_connections_of_one_database_object_make_room_for_another() {
    static DBS: [Database<PgConnection>; 2] =
        [Database::new(crate::fixtures::POSTGRES), Database::new(crate::fixtures::POSTGRES)];
    let start = |db: &'static Database<PgConnection>, isolation, size| {
        let config = Config::new(support::postgres().url());
        let setup = TestSetup::of(db).config(config).isolation(isolation).max_size(size);
        setup.patience(Duration::from_secs(10)).start()
    };
    // Several tests at a time, and then none.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let test = start(&DBS[0], TestIsolation::Rollback, 1).unwrap();
                // The work of the test.
                std::thread::sleep(Duration::from_millis(100));
                test.finish().unwrap();
            });
        }
    });
    let other = start(&DBS[1], TestIsolation::Database, 1000).unwrap();
    other.finish().unwrap();
}

fn tests_beyond_the_connections_wait_for_others_to_end() {
    let url = support::postgres().url();
    std::thread::scope(|scope| {
        for number in 0..40 {
            let url = &url;
            scope.spawn(move || {
                let isolation = if number % 10 == 0 { TestIsolation::Database } else { TestIsolation::Rollback };
                let setup = TestSetup::of(PgConnection::db()).config(Config::new(&**url)).isolation(isolation);
                let test = setup.patience(Duration::from_secs(30)).start().unwrap();
                test.run(|| PgConnection::db().session()?.send(INSERT)).unwrap();
                // The work of the test.
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(committed(&test), 1);
                test.finish().unwrap();
            });
        }
    });
}

/// The connection types whose next fixture panics. Their tests run at the same time.
static FAILING: Mutex<BTreeSet<TypeId>> = Mutex::new(BTreeSet::new());

fn panics_at_first<C: TestConnection>(session: &Session<C>) -> Result<()> {
    session.send(INSERT)?;
    let fails = FAILING.lock().unwrap().remove(&TypeId::of::<C>());
    assert!(!fails, "not yet");
    Ok(())
}

fn panic_in_a_fixture_is_an_error_and_leaves_nothing<C: TestConnection>(url: &str) {
    for isolation in [TestIsolation::Rollback, TestIsolation::Database] {
        FAILING.lock().unwrap().insert(TypeId::of::<C>());
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
fn unused_broken_foreign_key_does_not_fail_a_test() {
    let setup = TestSetup::of(SqliteConnection::db()).config(Config::new(":memory:"));
    let odd = "CREATE TABLE odd_parents (name TEXT); \
               CREATE TABLE odd_children (name TEXT REFERENCES odd_parents (name), other INTEGER REFERENCES nowhere (id)); \
               PRAGMA foreign_keys = 0; INSERT INTO odd_children VALUES ('an orphan', 1); PRAGMA foreign_keys = 1";
    let test = setup.isolation(TestIsolation::Rollback).fixture(Fixture::sql("odd", odd)).start().unwrap();
    test.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
    assert_eq!(committed(&test), 1);
    test.finish().unwrap();
}

fn caller_waits_for_the_connection_of_a_disposed_pool() {
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
        // The holder works on while the other caller waits.
        std::thread::sleep(Duration::from_millis(200));
        drop(release);
    });
    assert_eq!(committed(&test), 1);
    holder.join().unwrap().unwrap();
    soon.join().unwrap();
    test.finish().unwrap();
}

fn idle_connection_that_is_lost_fails_a_rolled_back_test<C: TestConnection>(url: &str) {
    let number = match url.starts_with("postgres") {
        true => "SELECT pg_backend_pid()::bigint AS number",
        false => "SELECT CAST(CONNECTION_ID() AS SIGNED) AS number",
    };
    let end = |number: i64| match url.starts_with("postgres") {
        true => support::postgres().terminate(i32::try_from(number).unwrap()),
        false => support::mariadb().terminate(number),
    };
    let test = begin::<C>(&rollback(url));
    test.run(|| C::db().session()?.send(INSERT)).unwrap();
    let session = test.open_session().unwrap();
    let pid = session.number(number).unwrap();
    session.rollback().unwrap();
    drop(session);
    end(pid);
    // The next checkout pings the connection.
    let test_db = if url.starts_with("postgres") { TestDatabase::postgres() } else { TestDatabase::mariadb() };
    test_db.lose_a_connection::<C>(&test_db.url());
    assert!(test.open_session().unwrap().number(COUNT).is_err());
    let error = test.open_session().unwrap().number(COUNT).unwrap_err();
    assert_eq!(error.code(), "DS501", "{error}");
    assert!(error.to_string().contains("lost"), "{error}");
    let error = test.finish().unwrap_err();
    assert!(error.to_string().contains("lost"), "{error}");
    let next = begin::<C>(&rollback(url));
    assert_eq!(committed(&next), 0);
    next.finish().unwrap();
}

fn deadline_in_a_rolled_back_test_leaves_no_limit<C: TestConnection>(url: &str) {
    let test = begin::<C>(&rollback(url));
    let sleep = |time: f64| match url.starts_with("mysql") {
        true => format!("SELECT COUNT(*) AS number FROM entries WHERE SLEEP({time}) = 0"),
        false => format!("SELECT COUNT(*) AS number FROM pg_sleep({time})"),
    };
    test.run(|| C::db().session()?.send(INSERT)).unwrap();
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

fn rolled_back_test_survives_guards_savepoints_hooks_and_retries<C: TestConnection>(url: &str) {
    let test = begin::<C>(&rollback(url));
    // Read-only and then not.
    test.scope().read_only().run(|| C::db().session()?.number(COUNT)).unwrap();
    let read = test.scope().read_only().run_and_commit(|| C::db().session()?.number(COUNT));
    assert_eq!(read.unwrap(), 0);
    test.run(|| C::db().session()?.send(INSERT)).unwrap();
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
    test.run(|| {
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
        test.enter(|| {
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
    test.scope().resolvable().run_and_commit(|| C::db().session()?.send(INSERT)).unwrap();
    test.finish().unwrap();
}

fn transient() -> Error {
    Error::from(diesel::result::Error::NotFound)
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
    for (config, isolation) in Isolations::sqlite().0 {
        let test = begin::<SqliteConnection>(&(config.clone(), isolation));
        std::thread::spawn(move || test.finish()).join().unwrap().unwrap();
        let test = begin::<SqliteConnection>(&(config, isolation));
        let app = test.app().clone();
        app.enter(|| {
            let session = SqliteConnection::db().session().unwrap();
            session.send(INSERT).unwrap();
            session.commit().unwrap();
            test.finish().unwrap();
            assert!(session.send(INSERT).is_err());
        });
    }
}

/// Nothing of a URL's password, in whatever way it is given.
fn error_at_the_start_of_a_test_omits_the_password() {
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
        // No test has made a database for it before.
        let started = setup.fixture(Fixture::sql("nothing", "SELECT 1 AS nothing")).start();
        let text = started.map(drop).unwrap_err().to_string();
        assert!(text.contains(word), "{isolation:?}: {text}");
        assert!(!text.contains("hush"), "{text}");
    }
}

#[test]
fn recorder_may_be_nested_and_survives_a_panic() {
    let test = begin::<SqliteConnection>(&rollback(":memory:"));
    let ((), recording) = Recorder::new().run(|| {
        test.enter(|| {
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
