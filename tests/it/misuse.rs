//! Misuse of sessions, connections and hooks: what a program may do by mistake, and how the session reacts.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use diesel::connection::InstrumentationEvent;
use diesel::prelude::*;
use diesel_session::session::ConnectionGuard;
use diesel_session::{Config, Database, Error, ErrorKind, Session};

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database =>
    savepoint_that_returns_its_connection_keeps_nothing,
    transaction_that_returns_its_connection_requires_rollback,
    replaced_instrumentation_requires_rollback,
    exchanged_connection_is_not_pooled,
    connection_guard_of_a_read_only_scope_outlives_the_scope,
    read_only_autocommit_scope_refuses_writes,
    before_commit_hook_that_rolls_back_prevents_the_commit,
    before_commit_hooks_after_a_refusal_run_at_the_next_commit,
    hook_whose_drop_panics_keeps_no_connection,
);
for_each_database!(postgres, mariadb, any_postgres => swapped_connections_commit_nothing);
for_each_database!(postgres, sqlite, any_postgres, any_sqlite => failed_statement_requires_rollback_even_if_swallowed);
for_each_database!(every_server =>
    very_long_limits_are_accepted,
    deadline_keeps_the_statement_timeout,
    autocommit_scope_with_a_deadline_survives_a_lost_connection,
    backslashes_do_not_hide_a_commit,
);
for_each_database!(only mariadb => maintenance_statement_of_mariadb_requires_rollback);
for_each_database!(only postgres =>
    hung_connects_of_one_application_delay_no_other,
    text_without_a_statement_requires_no_rollback,
    postgres_url_may_end_in_a_question_mark_or_an_ampersand,
);

fn prepared<C: TestConnection>(config: Config) -> crate::fixtures::RegisteredApp<C> {
    let app = C::app(config);
    app.create_all().unwrap();
    app
}

fn entries<C: TestConnection>(app: &diesel_session::App<C>) -> i64 {
    app.open_session().unwrap().number(COUNT).unwrap()
}

fn savepoint_that_returns_its_connection_keeps_nothing<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    let out: Result<ConnectionGuard<C>, Error> = session.savepoint(|session| {
        session.send(INSERT)?;
        session.connection()
    });
    assert!(matches!(&out, Err(error) if error.kind() == ErrorKind::SessionBusy));
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 0);
}

fn transaction_that_returns_its_connection_requires_rollback<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let session = app.open_session().unwrap();
    let out: Result<ConnectionGuard<C>, Error> = session.transaction(|session| {
        session.send(INSERT)?;
        session.connection()
    });
    assert!(matches!(&out, Err(error) if error.kind() == ErrorKind::SessionBusy));
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 0);
}

fn replaced_instrumentation_requires_rollback<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config().max_size(1));
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    let replaced = session.with(|conn| {
        conn.set_instrumentation(|_: InstrumentationEvent<'_>| {});
        let _ = conn.batch_execute("SELECT * FROM nowhere_at_all");
        Ok(())
    });
    replaced.unwrap();
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!((entries(&app), app.status().open), (0, 1));
}

fn exchanged_connection_is_not_pooled<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config().max_size(1));
    let other = C::app(test_db.config());
    let url = test_db.url();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session
        .with(|conn| {
            // The same as `*conn = C::establish(..)`, for the enum too.
            *conn = connect::<C>(&url);
            Ok(())
        })
        .unwrap();
    session.rollback().unwrap();
    assert_eq!(app.status().open, 0);
    drop(other);
}

fn connect<C: TestConnection>(url: &str) -> C {
    let any: Box<dyn std::any::Any> =
        if std::any::TypeId::of::<C>() == std::any::TypeId::of::<crate::fixtures::AnyConnection>() {
            Box::new(crate::fixtures::connect_any(url).unwrap())
        } else {
            Box::new(C::establish(url).unwrap())
        };
    *any.downcast().expect("of this type")
}

// Not on SQLite, which has one writer at a time.
fn swapped_connections_commit_nothing<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let (one, two) = (app.open_session().unwrap(), app.open_session().unwrap());
    one.send(INSERT).unwrap();
    let (mut first, mut second) = (one.connection().unwrap(), two.connection().unwrap());
    std::mem::swap(&mut *first, &mut *second);
    drop((first, second));
    // Session `two` did nothing: what `one` did must not be committed by it.
    let committed = two.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    drop((one, two));
    assert_eq!(entries(&app), 0);
}

fn connection_guard_of_a_read_only_scope_outlives_the_scope<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let kept = app
        .scope()
        .read_only()
        .deadline(Duration::from_secs(60))
        .run(|| {
            let session = C::db().session()?;
            session.connection()
        })
        .unwrap();
    assert_eq!(app.status().in_use, 1);
    drop(kept);
    assert_eq!((app.status().in_use, app.dispose_report().unwrap().is_complete()), (0, true));
}

fn read_only_autocommit_scope_refuses_writes<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let written = app.scope().read_only().autocommit().run(|| C::db().session()?.send(INSERT));
    assert!(matches!(&written, Err(error) if error.kind() == ErrorKind::Query), "{written:?}");
    assert_eq!(entries(&app), 0);
}

fn before_commit_hook_that_rolls_back_prevents_the_commit<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let committed = app.run(|| {
        let session = C::db().session()?;
        session.send(INSERT)?;
        session.before_commit(|| C::db().session()?.rollback())
    });
    assert!(
        matches!(&committed, Err(error) if error.kind() == ErrorKind::HookFailed && error.to_string().ends_with("The transaction was not committed.")),
        "{committed:?}"
    );
    assert_eq!(entries(&app), 0);
}

fn before_commit_hooks_after_a_refusal_run_at_the_next_commit<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let checked = Rc::new(Cell::new(false));
    app.enter(|| {
        let session = C::db().session().unwrap();
        session.send(INSERT).unwrap();
        session.before_commit(|| -> () { panic!("refused") }).unwrap();
        let check = Rc::clone(&checked);
        session.before_commit(move || check.set(true)).unwrap();
        session.commit().unwrap_err();
        assert!(!checked.get());
        session.commit().unwrap();
    });
    assert!(checked.get());
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a value that panics in its drop");
    }
}

fn hook_whose_drop_panics_keeps_no_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let kept: RefCell<Option<Session<C>>> = RefCell::new(None);
    app.enter(|| {
        let session = C::db().session().unwrap();
        session.send(INSERT).unwrap();
        let bomb = Bomb;
        session
            .after_commit(move || {
                let _bomb = &bomb;
            })
            .unwrap();
        *kept.borrow_mut() = Some(session);
    });
    let kept = kept.into_inner().unwrap();
    assert!(matches!(kept.send(INSERT), Err(error) if error.kind() == ErrorKind::SessionEnded));
    assert_eq!(app.status().in_use, 0);
}

// Not on MariaDB, where such an error ends no transaction.
fn failed_statement_requires_rollback_even_if_swallowed<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let session = app.open_session().unwrap();
    let fails = match test_db {
        TestDatabase::Sqlite(_) => {
            let sql = "CREATE TRIGGER no BEFORE INSERT ON entries WHEN NEW.author = 'no' \
                       BEGIN SELECT RAISE(ROLLBACK, 'no'); END";
            session.send(sql).unwrap();
            session.commit().unwrap();
            "INSERT INTO entries (author, message) VALUES ('no', '') RETURNING 1 AS number"
        }
        TestDatabase::Postgres(_) => "SELECT (1 / 0)::bigint AS number",
        TestDatabase::Mariadb(_) => unreachable!("it is not in the list"),
    };
    for swallowed in [false, true] {
        session.send(INSERT).unwrap();
        if swallowed {
            session
                .with(|conn| {
                    let _ = conn.number(fails);
                    Ok(())
                })
                .unwrap();
        } else {
            session.number(fails).unwrap_err();
        }
        let gone_on = session.send(INSERT);
        assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{swallowed} {gone_on:?}");
        session.rollback().unwrap();
        assert_eq!(entries(&app), 0, "{swallowed}");
    }
}

fn very_long_limits_are_accepted<C: TestConnection>(test_db: &TestDatabase) {
    const LONG: Duration = Duration::from_secs(360 * 24 * 3600);
    let app = C::app(test_db.config().statement_timeout(LONG).lock_timeout(LONG));
    app.create_all().unwrap();
    for limit in [LONG, Duration::from_secs(1 << 40), Duration::MAX] {
        app.scope().deadline(limit).run(|| C::db().session()?.send(INSERT)).unwrap();
        app.scope().autocommit().deadline(limit).run(|| C::db().session()?.send(INSERT)).unwrap();
    }
}

fn deadline_keeps_the_statement_timeout<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().statement_timeout(Duration::from_millis(200)));
    // MariaDB returns 1 if it ends the sleep, and PostgreSQL an error.
    let slow = match test_db {
        TestDatabase::Postgres(_) => "SELECT count(*) AS number FROM pg_sleep(3)",
        _ => "SELECT CAST(SLEEP(3) AS SIGNED) AS number",
    };
    for autocommit in [false, true] {
        let scope = app.scope().deadline(Duration::from_secs(60));
        let scope = if autocommit { scope.autocommit() } else { scope };
        let slept = scope.run(|| C::db().session()?.number(slow));
        let ended = slept.is_err()
            || !matches!(test_db, TestDatabase::Postgres(_)) && slept.as_ref().is_ok_and(|slept| *slept == 1);
        assert!(ended, "{autocommit}: {slept:?}");
    }
}

fn autocommit_scope_with_a_deadline_survives_a_lost_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    app.scope()
        .autocommit()
        .deadline(Duration::from_secs(60))
        .run(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            // While it is in use: an idle one may be replaced.
            let lost = session.with(|conn| {
                test_db.terminate_all();
                test_db.assert_connections(0);
                conn.batch_execute(INSERT)
            });
            assert!(
                matches!(&lost, Err(error) if error.kind() == ErrorKind::ConnectionLost && !error.is_transient()),
                "{lost:?}"
            );
            assert_eq!(app.status().in_use, 0);
            session.send(INSERT)
        })
        .unwrap();
    assert_eq!(entries(&app), 2);
}

fn backslashes_do_not_hide_a_commit<C: TestConnection>(test_db: &TestDatabase) {
    let app = prepared::<C>(test_db.config());
    let session = app.open_session().unwrap();
    let e = if matches!(test_db, TestDatabase::Postgres(_)) { "E" } else { "" };
    session.send(&format!("INSERT INTO entries (author, message) VALUES ({e}'it\\'s', 'x; commit')")).unwrap();
    session.commit().unwrap();
    session.send(&format!("INSERT INTO entries (author, message) VALUES ({e}'\\'', 'x'); COMMIT; BEGIN")).unwrap();
    let gone_on = session.send(INSERT);
    assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{gone_on:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 2);
}

fn maintenance_statement_of_mariadb_requires_rollback() {
    let test_db = TestDatabase::mariadb();
    let app = prepared::<diesel::MysqlConnection>(test_db.config());
    for sql in ["CHECK TABLE entries", "/*M! COMMIT */", "EXECUTE IMMEDIATE 'COMMIT'", "SELECT 1 # it's\n; COMMIT"] {
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        session.send(sql).unwrap();
        let gone_on = session.send(INSERT);
        assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{sql}: {gone_on:?}");
    }
}

#[test]
fn sqlite_file_urls_with_parameters_are_accepted() {
    static DB: Database<SqliteConnection> = Database::without_migrations();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqlite");
    for url in [format!("file://{}", path.display()), format!("file://{}?mode=rwc", path.display())] {
        let app = DB.init_app(unique("url"), Config::new(url)).unwrap();
        app.ping().unwrap();
        DB.remove_app(app.id()).unwrap();
    }
    assert!(path.exists());
}

fn postgres_url_may_end_in_a_question_mark_or_an_ampersand() {
    let test_db = TestDatabase::postgres();
    for end in ["?", "?sslmode=prefer&"] {
        PgConnection::app(Config::new(test_db.url() + end)).ping().unwrap();
    }
}

#[test]
fn session_in_a_thread_local_ends_with_the_thread() {
    thread_local! { static KEPT: RefCell<Option<Session<SqliteConnection>>> = const { RefCell::new(None) }; }
    struct Last;
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = SqliteConnection::db().session();
        }
    }
    thread_local! { static LAST: Last = const { Last }; }
    let test_db = TestDatabase::sqlite();
    let app = prepared::<SqliteConnection>(test_db.config());
    let inner = app.clone();
    std::thread::spawn(move || {
        LAST.with(|_| ());
        let session = inner.open_session().unwrap();
        session.send(INSERT).unwrap();
        KEPT.with(|kept| *kept.borrow_mut() = Some(session));
    })
    .join()
    .unwrap();
    assert_eq!(entries(&app), 0);
    assert_eq!(app.status().in_use, 0);
}

#[test]
fn session_opened_by_a_hook_is_committed() {
    static OTHER: Database<SqliteConnection> = Database::without_migrations();
    let (test_db, other_test_db) = (TestDatabase::sqlite(), TestDatabase::sqlite());
    let app = prepared::<SqliteConnection>(test_db.config());
    prepared::<SqliteConnection>(other_test_db.config());
    let other = OTHER.init_app(app.id(), other_test_db.config()).unwrap();
    app.run(|| {
        let session = SqliteConnection::db().session()?;
        session.send(INSERT)?;
        session.before_commit(|| OTHER.session()?.send(INSERT))
    })
    .unwrap();
    assert_eq!((entries(&app), entries(&other)), (1, 1));
}

#[test]
fn max_lifetime_shorter_than_a_connect_connects_each_time() {
    static CONNECTS: AtomicUsize = AtomicUsize::new(0);
    static DB: Database<SqliteConnection> = Database::without_migrations().connect_with(|url| {
        CONNECTS.fetch_add(1, Ordering::SeqCst);
        SqliteConnection::establish(url)
    });
    let test_db = TestDatabase::sqlite();
    let app = DB.init_app(unique("app"), test_db.config().max_lifetime(Duration::from_nanos(1))).unwrap();
    app.ping().unwrap();
    app.ping().unwrap();
    assert_eq!(CONNECTS.load(Ordering::SeqCst), 2);
}

/// Four connects of one application hang. Another one, which pings its idle connection, does not wait for them.
fn hung_connects_of_one_application_delay_no_other() {
    static HANGING: AtomicUsize = AtomicUsize::new(0);
    static HANGS: AtomicBool = AtomicBool::new(false);
    /// No connect ends while the test has this lock.
    static CONNECTING: Mutex<()> = Mutex::new(());
    static DB: Database<PgConnection> = Database::without_migrations().connect_with(|url| {
        if HANGS.load(Ordering::SeqCst) {
            HANGING.fetch_add(1, Ordering::SeqCst);
            drop(CONNECTING.lock());
        }
        PgConnection::establish(url)
    });
    let test_db = TestDatabase::postgres();
    let app = DB.init_app(unique("app"), test_db.config().max_size(1)).unwrap();
    let other = DB.init_app(unique("app"), test_db.config()).unwrap();
    app.ping().unwrap();
    // The next checkout pings the idle connection.
    test_db.lose_a_connection::<PgConnection>(&test_db.url());
    HANGS.store(true, Ordering::SeqCst);
    let connecting = CONNECTING.lock().unwrap();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| other.ping())).collect();
        assert!(
            wait::until(Duration::from_secs(5), || HANGING.load(Ordering::SeqCst) > 0 && other.status().waiting == 4)
        );
        app.ping().unwrap();
        assert!(callers.iter().all(|caller| !caller.is_finished()), "the other application did not wait for them");
        HANGS.store(false, Ordering::SeqCst);
        drop(connecting);
        callers.into_iter().for_each(|caller| caller.join().unwrap().unwrap());
    });
    DB.dispose_all().unwrap();
}

fn text_without_a_statement_requires_no_rollback() {
    let test_db = TestDatabase::postgres();
    let app = prepared::<PgConnection>(test_db.config());
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session.send("-- nothing").unwrap_err();
    session.commit().unwrap();
    assert_eq!(entries(&app), 1);
    // Nor does it heal anything.
    session.send("SELECT * FROM nowhere_at_all; ").unwrap_err();
    session.rollback().unwrap();
    session
        .with(|conn| {
            let _ = (conn.number("SELECT 1 / 0 AS number"), conn.number(""));
            Ok(())
        })
        .unwrap();
    assert!(session.commit().unwrap_err().is_rollback_required());
}
