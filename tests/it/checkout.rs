//! Connections that `App::checkout` gives to code of the program.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel_session::pool::Reset;
use diesel_session::recorder::Recorder;
use diesel_session::testing::{TestIsolation, TestSetup};
use diesel_session::{App, Config, Database, ErrorKind, PooledConnection};

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, logged, shown, unique};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database =>
    pooled_connection_commits_each_statement_and_goes_back,
    pooled_connection_moves_to_another_thread_with_its_holder,
    open_transaction_is_rolled_back_at_checkin,
    transaction_that_has_ended_is_no_open_transaction_at_checkin,
    what_pooled_connection_leaves_reaches_no_other_holder,
    pooled_connection_is_closed_after_a_panic_or_a_replacement,
    wait_for_a_connection_that_has_moved_is_no_deadlock,
    statements_of_pooled_connection_are_recorded,
    pooled_connection_counts_in_max_connections_and_evicts,
    dispose_lists_the_callers_own_pooled_connection,
    lost_pooled_connection_is_replaced,
    pooled_connection_outlives_the_other_handles,
    pooled_connection_keeps_its_work_in_a_rolled_back_test,
);

fn app<C: TestConnection>(test_db: &TestDatabase, max_size: u32) -> crate::fixtures::RegisteredApp<C> {
    let app = C::app(test_db.config().max_size(max_size));
    app.create_all().unwrap();
    app
}

fn count<C: TestConnection>(app: &App<C>) -> i64 {
    app.scope().autocommit().run(|| C::db().session()?.number(COUNT)).unwrap()
}

fn pooled_connection_commits_each_statement_and_goes_back<C: TestConnection>(test_db: &TestDatabase) {
    fn is_send<T: Send>(_: &T) {}
    let app = app::<C>(test_db, 2);
    let mut conn = app.checkout().unwrap();
    is_send(&conn);
    conn.batch_execute(INSERT).unwrap();
    conn.transaction(|conn| conn.batch_execute(INSERT)).unwrap();
    assert_eq!(conn.number(COUNT).unwrap(), 2);
    assert_eq!(count(&app), 2, "another connection sees it");
    let status = app.status();
    assert_eq!((status.in_use, status.holders.len()), (1, 1));
    let holder = &status.holders[0];
    assert!(holder.location().file().ends_with("checkout.rs") && !holder.in_transaction(), "{holder}");
    assert_eq!(holder.thread_id(), thread::current().id());
    assert_eq!(PooledConnection::app(&conn).id(), app.id());
    assert!(format!("{conn:?}").contains(app.id()));
    drop(conn);
    assert_eq!(app.status().in_use, 0);
    assert!(app.status().idle >= 1);
}

fn pooled_connection_moves_to_another_thread_with_its_holder<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 2);
    let mut conn = app.checkout().unwrap();
    conn.batch_execute(INSERT).unwrap();
    let (used, told) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let worker = thread::Builder::new().name("worker".into()).spawn(move || {
        conn.batch_execute(INSERT).unwrap();
        used.send(()).unwrap();
        released.recv().unwrap();
        drop(conn);
    });
    told.recv().unwrap();
    assert_eq!(app.status().holders[0].thread_name(), "worker");
    release.send(()).unwrap();
    worker.unwrap().join().unwrap();
    assert_eq!((app.status().in_use, count(&app)), (0, 2));
}

fn open_transaction_is_rolled_back_at_checkin<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 1);
    let session = app.open_session().unwrap();
    let inserted = |conn: &mut C| conn.batch_execute(INSERT);
    type Leave<C> = fn(&mut C) -> QueryResult<()>;
    let leave: [(&str, Leave<C>); 5] = [
        ("a raw BEGIN", |conn| conn.batch_execute("BEGIN")),
        ("two raw transactions", |conn| {
            conn.transaction(|_| QueryResult::Ok(()))?;
            conn.batch_execute("BEGIN")
        }),
        ("a level of Diesel", |conn| {
            use diesel::connection::{Connection, TransactionManager};
            <C as Connection>::TransactionManager::begin_transaction(conn)
        }),
        ("two levels of Diesel", |conn| {
            use diesel::connection::{Connection, TransactionManager};
            <C as Connection>::TransactionManager::begin_transaction(conn)?;
            <C as Connection>::TransactionManager::begin_transaction(conn)
        }),
        ("an aborted one", |conn| {
            use diesel::connection::{Connection, TransactionManager};
            <C as Connection>::TransactionManager::begin_transaction(conn)?;
            let _ = conn.batch_execute("SELECT * FROM nowhere_at_all");
            Ok(())
        }),
    ];
    for reset in [Reset::WhenDirty, Reset::Never] {
        let other = C::app(test_db.config().max_size(1).reset(reset));
        for (what, leave) in leave {
            let mut conn = other.checkout().unwrap();
            leave(&mut conn).unwrap();
            let _ = inserted(&mut conn);
            drop(conn);
            assert_eq!(count(&other), 0, "{what}, {reset:?}");
            // Nothing holds a lock either.
            session.send(INSERT).unwrap();
            session.rollback().unwrap();
        }
    }
}

fn transaction_that_has_ended_is_no_open_transaction_at_checkin<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let app = app::<C>(test_db, 1);
    type Work<C> = fn(&mut C) -> QueryResult<()>;
    let work: [(&str, Work<C>); 3] = [
        ("a transaction of Diesel", |conn| conn.transaction(|conn| conn.batch_execute(INSERT))),
        ("a raw transaction", |conn| {
            conn.batch_execute("BEGIN")?;
            conn.batch_execute(INSERT)?;
            conn.batch_execute("COMMIT")
        }),
        ("a raw transaction that is rolled back", |conn| {
            conn.batch_execute("BEGIN")?;
            conn.batch_execute("ROLLBACK")
        }),
    ];
    let warnings = || {
        let lines = logged::lines_with("open transaction").into_iter();
        lines.filter(|line| line.contains(app.id())).collect::<Vec<_>>()
    };
    for (what, work) in work {
        for _ in 0..10 {
            let mut conn = app.checkout().unwrap();
            work(&mut conn).unwrap();
            drop(conn);
            assert!(warnings().is_empty(), "{what}: {:?}", warnings());
        }
    }
    assert_eq!(count(&app), 20);
    app.checkout().unwrap().batch_execute("BEGIN").unwrap();
    assert_eq!(warnings().len(), 1, "an open transaction is told");
}

fn what_pooled_connection_leaves_reaches_no_other_holder<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 1);
    let mut conn = app.checkout().unwrap();
    conn.batch_execute("CREATE TEMPORARY TABLE left_over (a INTEGER)").unwrap();
    conn.number("SELECT count(*) AS number FROM left_over").unwrap();
    drop(conn);
    let mut conn = app.checkout().unwrap();
    conn.number("SELECT count(*) AS number FROM left_over").unwrap_err();
    assert_eq!(conn.number(COUNT).unwrap(), 0);
}

fn pooled_connection_is_closed_after_a_panic_or_a_replacement<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 1);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut conn = app.checkout().unwrap();
        conn.batch_execute(INSERT).unwrap();
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!((app.status().open, count(&app)), (0, 1));
    let mut conn = app.checkout().unwrap();
    conn.set_instrumentation(diesel::connection::get_default_instrumentation());
    drop(conn);
    assert_eq!(app.status().open, 0);
    assert_eq!(count(&app), 1);
}

/// This thread has checked out the only connection, and another thread ends the wait.
fn wait_for_a_connection_that_has_moved_is_no_deadlock<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 1);
    let conn = app.checkout().unwrap();
    let worker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(conn);
    });
    app.ping().unwrap();
    worker.join().unwrap();
    // A wait that cannot end has the usual end.
    let short = C::app(test_db.config().max_size(1).acquire_timeout(Duration::from_millis(200)));
    let conn = short.checkout().unwrap();
    let error = short.ping().unwrap_err();
    assert!(error.kind() == ErrorKind::AcquireTimeout && error.holders().expect("holders").len() == 1, "{error}");
    drop(conn);
    short.ping().unwrap();
}

fn statements_of_pooled_connection_are_recorded<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 1);
    let ((), recording) = Recorder::new().run(|| {
        let mut conn = app.checkout().unwrap();
        conn.batch_execute(INSERT).unwrap();
        conn.number(COUNT).unwrap();
    });
    assert_eq!(recording.total(), 2, "{recording}");
    let statement = recording.statements().iter().find(|statement| !statement.is_control()).unwrap();
    assert!(shown(statement.at().unwrap()).contains("checkout.rs:"), "{recording}");
}

fn pooled_connection_counts_in_max_connections_and_evicts<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(1);
    let config = || test_db.config().acquire_timeout(Duration::from_millis(300));
    let first = db.init_app(unique("first"), config()).unwrap();
    let second = db.init_app(unique("second"), config()).unwrap();
    first.ping().unwrap();
    assert_eq!(first.status().idle, 1);
    let mut conn = second.checkout().unwrap();
    assert_eq!((first.status().open, second.status().open), (0, 1), "the idle connection was evicted");
    let error = first.ping().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionLimitReached, "{error}");
    assert_eq!(error.holders().expect("holders")[0].app(), second.id());
    conn.batch_execute("SELECT 1").unwrap();
    drop(conn);
    first.ping().unwrap();
    assert_eq!(second.status().open, 0);
    db.dispose_all().unwrap();
}

fn dispose_lists_the_callers_own_pooled_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = app::<C>(test_db, 2);
    let mut conn = app.checkout().unwrap();
    let report = app.dispose_report().unwrap();
    assert_eq!(report.still_out.len(), 1);
    // It works until it goes back, and is then closed.
    conn.batch_execute(INSERT).unwrap();
    drop(conn);
    app.dispose().unwrap();
    assert_eq!(app.status().open, 0);
    if !matches!(test_db, TestDatabase::Sqlite(_)) {
        test_db.assert_connections(0);
    }
}

fn lost_pooled_connection_is_replaced<C: TestConnection>(test_db: &TestDatabase) {
    if matches!(test_db, TestDatabase::Sqlite(_)) {
        return;
    }
    let app = app::<C>(test_db, 1);
    let mut conn = app.checkout().unwrap();
    conn.batch_execute(INSERT).unwrap();
    test_db.terminate_all();
    test_db.assert_connections(0);
    conn.batch_execute(INSERT).unwrap_err();
    drop(conn);
    assert_eq!(count(&app), 1);
}

fn pooled_connection_outlives_the_other_handles<C: TestConnection>(test_db: &TestDatabase) {
    let db: &'static Database<C> = C::db();
    let app = db.init_app(unique("outlived"), test_db.config()).unwrap();
    app.create_all().unwrap();
    let mut conn = app.checkout().unwrap();
    let id = app.id().to_owned();
    drop(app);
    assert!(wait::until(Duration::from_secs(1), || db.app(&id).is_ok()));
    let removed = thread::scope(|scope| {
        let remover = scope.spawn(|| db.remove_app(&id));
        thread::sleep(Duration::from_millis(50));
        conn.batch_execute(INSERT).unwrap();
        drop(conn);
        remover.join().unwrap()
    });
    assert!(removed.unwrap().still_out.is_empty(), "the disposal has waited");
}

fn pooled_connection_keeps_its_work_in_a_rolled_back_test<C: TestConnection>(test_db: &TestDatabase) {
    use diesel::connection::TransactionManager;
    let test =
        TestSetup::of(C::db()).config(Config::new(test_db.url())).isolation(TestIsolation::Rollback).start().unwrap();
    let app = test.app();
    let number = || app.context(|| C::db().session()?.number(COUNT)).unwrap();
    let mut conn = app.checkout().unwrap();
    conn.batch_execute(INSERT).unwrap();
    conn.transaction(|conn| conn.batch_execute(INSERT)).unwrap();
    assert_eq!(conn.number(COUNT).unwrap(), 2);
    drop(conn);
    assert_eq!(number(), 2);
    // What is left open is undone, and so is what a panic has interrupted.
    let mut conn = app.checkout().unwrap();
    <C as diesel::Connection>::TransactionManager::begin_transaction(&mut *conn).unwrap();
    conn.batch_execute(INSERT).unwrap();
    drop(conn);
    assert_eq!(number(), 2);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut conn = app.checkout().unwrap();
        conn.batch_execute(INSERT).unwrap();
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert_eq!(number(), 2);
    // An error costs at most what was done on this connection.
    let mut conn = app.checkout().unwrap();
    conn.batch_execute("SELECT * FROM nowhere_at_all").unwrap_err();
    drop(conn);
    assert_eq!(number(), 2);
    let mut conn = app.checkout().unwrap();
    assert_eq!(conn.number(COUNT).unwrap(), 2);
    drop(conn);
    test.finish().unwrap();
    // A raw COMMIT ends the test's transaction, and the test says so.
    let test =
        TestSetup::of(C::db()).config(Config::new(test_db.url())).isolation(TestIsolation::Rollback).start().unwrap();
    let mut conn = test.app().checkout().unwrap();
    conn.batch_execute("COMMIT").unwrap();
    drop(conn);
    assert_eq!(test.finish().unwrap_err().code(), "DS501");
}
