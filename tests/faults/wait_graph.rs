//! The wait-for graph: waits that cannot end are refused at once, and other waits are not, however long they take.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Database, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database =>
    deadlock_of_two_threads_and_two_pools_is_refused,
    deadlock_of_four_threads_in_one_pool_is_refused,
    nested_context_waits_for_running_holders,
);
for_each_database!(every_server =>
    deadlock_in_a_shared_connection_limit_is_refused,
    caller_waits_for_running_holders_of_the_connection_limit,
);

const AT_ONCE: Duration = Duration::from_millis(200);
/// A refusal keeps the promise of README: it comes at once, long before `acquire_timeout`.
#[track_caller]
fn assert_at_once<T>(outcome: &Result<T, Error>, asked: Instant, limit: Duration) {
    let took = asked.elapsed();
    assert!(outcome.is_ok() || took < limit, "a wait that cannot end is refused at once: {took:?}");
}

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Takes a connection of `app` for as long as `body` runs.
fn holding<C: TestConnection, T>(
    db: &Database<C>,
    app: &App<C>,
    body: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    app.scope().read_only().run(|| {
        db.session()?.begin()?;
        body()
    })
}

fn deadlock_of_two_threads_and_two_pools_is_refused<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db();
    let apps = ["first", "second"].map(|name| db.init_app(unique(name), test_db.config().max_size(1)).unwrap());
    let both = Barrier::new(2);
    let outcomes = together(2, |number| {
        holding(&db, &apps[number], || {
            both.wait();
            let asked = Instant::now();
            let outcome = holding(&db, &apps[1 - number], || Ok(()));
            assert_at_once(&outcome, asked, AT_ONCE);
            outcome
        })
    });
    let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
    assert_eq!(error.kind(), ErrorKind::WouldDeadlock, "{error}");
    let holders = error.holders().expect("holders");
    assert_eq!(holders.len(), 1);
    let waits_at = holders[0].waits_at().expect("the other waits");
    assert_eq!(waits_at.file(), file!());
    let text = error.to_string();
    assert!(text.contains(&format!("itself waiting at {}:{}", file!(), waits_at.line())), "{text}");
    assert!(text.contains("Take connections in the same order everywhere") && error.is_transient(), "{text}");
    assert_eq!(apps.each_ref().map(|app| (app.status().in_use, app.status().waiting)), [(0, 0); 2]);
    db.dispose_all().unwrap();
}

/// Every thread has one and wants another of the same pool.
fn deadlock_of_four_threads_in_one_pool_is_refused<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db();
    let app = db.init_app(unique("four"), test_db.config().max_size(4)).unwrap();
    for _ in 0..10 {
        let all = Barrier::new(4);
        let outcomes = together(4, |_| {
            holding(&db, &app, || {
                all.wait();
                let asked = Instant::now();
                let outcome = holding(&db, &app, || Ok(()));
                assert_at_once(&outcome, asked, Duration::from_secs(1));
                outcome
            })
        });
        let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        let [error] = refused[..] else { panic!("one of the four is refused: {outcomes:?}") };
        assert!(error.kind() == ErrorKind::WouldDeadlock && error.holders().expect("holders").len() == 4, "{error}");
        assert!(error.to_string().contains("Let each thread hold one connection at a time"), "{error}");
        assert!(error.is_transient(), "{error}");
    }
    db.dispose_all().unwrap();
}

/// Ten of ten are out, and one of the holders enters a nested context: the others run, so it waits.
fn nested_context_waits_for_running_holders<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db();
    let app = db.init_app(unique("ten"), test_db.config().max_size(10)).unwrap();
    let all = Barrier::new(10);
    let waits = together(10, |number| {
        holding(&db, &app, || {
            all.wait();
            if number < 9 {
                // Nine wait, and the last one works until it sees that.
                let asked = Instant::now();
                return holding(&db, &app, || Ok(asked.elapsed()));
            }
            assert!(wait::until(Duration::from_secs(2), || app.status().waiting == 9));
            // The holder works on for longer than it takes to find a deadlock.
            thread::sleep(Duration::from_millis(150));
            Ok(Duration::ZERO)
        })
        .unwrap()
    });
    assert!(waits[..9].iter().all(|wait| *wait >= Duration::from_millis(100)), "{waits:?}");
    db.dispose_all().unwrap();
}

/// What is short is the limit of the database object, not a pool.
fn deadlock_in_a_shared_connection_limit_is_refused<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(2);
    let apps: Vec<App<C>> = (0..4).map(|_| db.init_app(unique("shared"), test_db.config()).unwrap()).collect();
    for _ in 0..10 {
        let both = Barrier::new(2);
        let outcomes = together(2, |number| {
            holding(&db, &apps[number], || {
                both.wait();
                let asked = Instant::now();
                let outcome = holding(&db, &apps[2 + number], || Ok(()));
                assert_at_once(&outcome, asked, AT_ONCE);
                outcome
            })
        });
        let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
        assert!(error.kind() == ErrorKind::WouldDeadlock, "{error}");
        assert!(error.to_string().contains("max_connections"), "{error}");
    }
    // One thread that has all of it.
    let error = holding(&db, &apps[0], || holding(&db, &apps[1], || holding(&db, &apps[2], || Ok(())))).unwrap_err();
    assert!(error.kind() == ErrorKind::WouldDeadlock && error.holders().expect("holders").len() >= 2, "{error}");
    assert!(error.to_string().contains("this thread itself holds"), "{error}");
    db.dispose_all().unwrap();
    test_db.assert_connections(0);
}

fn caller_waits_for_running_holders_of_the_connection_limit<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(2);
    let apps: Vec<App<C>> = (0..3).map(|_| db.init_app(unique("shared"), test_db.config()).unwrap()).collect();
    let both = Barrier::new(2);
    together(2, |number| {
        holding(&db, &apps[number], || {
            both.wait();
            if number == 1 {
                assert!(wait::until(Duration::from_secs(2), || { apps[2].status().waiting == 1 }));
                // The holder works on for longer than it takes to find a deadlock.
                thread::sleep(Duration::from_millis(150));
                return Ok(());
            }
            holding(&db, &apps[2], || Ok(()))
        })
        .unwrap();
    });
    db.dispose_all().unwrap();
}

/// The queue of SQLite's writers is one of the things that a thread may wait for.
#[test]
fn deadlock_through_the_writer_queue_is_refused() {
    let (first, second) = (TestDatabase::sqlite(), TestDatabase::sqlite());
    let db = SqliteConnection::new_db();
    let apps = [&first, &second].map(|test_db| db.init_app(unique("writer"), test_db.config()).unwrap());
    let both = Barrier::new(2);
    let outcomes = together(2, |number| {
        apps[number].context(|| {
            db.session()?.begin()?;
            both.wait();
            let asked = Instant::now();
            let outcome = apps[1 - number].context(|| db.session()?.begin());
            assert_at_once(&outcome, asked, AT_ONCE);
            outcome
        })
    });
    let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
    assert!(error.to_string().contains("the write lock of this SQLite database"), "{error}");
    assert_eq!(apps[0].open_session().unwrap().number(ONE).unwrap(), 1);
    db.dispose_all().unwrap();
}
