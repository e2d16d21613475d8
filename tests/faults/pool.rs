//! How long callers wait for a connection, and the errors of callers that get none.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{Database, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database =>
    checkout_beside_the_callers_own_connection_would_deadlock,
    acquire_timeout_names_the_holders,
    checkout_ends_at_the_deadline_of_the_scope,
    broken_connection_passes_its_permit_to_a_waiter,
    idle_connection_is_closed_at_max_lifetime,
    waiters_are_served_in_order,
);

/// HikariCP's spike: many callers at once, slow connects, short work. No connect ends before every caller is served.
#[test]
fn spike_of_callers_is_served_by_open_connections() {
    static CONNECTS: AtomicUsize = AtomicUsize::new(0);
    /// No connect ends while the test has this lock.
    static CONNECTING: Mutex<()> = Mutex::new(());
    fn slow(url: &str) -> ConnectionResult<SqliteConnection> {
        CONNECTS.fetch_add(1, Ordering::Relaxed);
        drop(CONNECTING.lock());
        SqliteConnection::establish(url)
    }
    let test_db = TestDatabase::sqlite();
    let db = Database::<SqliteConnection>::without_migrations().connect_with(slow);
    let app = db.init_app("spike", test_db.config().max_size(50)).unwrap();
    let work = |time: Duration| {
        app.scope()
            .read_only()
            .run(|| {
                db.session()?.begin()?;
                thread::sleep(time);
                Ok::<_, Error>(())
            })
            .unwrap();
    };
    let connections: Vec<_> = (0..5).map(|_| app.checkout().unwrap()).collect();
    drop(connections);
    let warm = CONNECTS.load(Ordering::Relaxed);
    assert_eq!((warm, app.status().idle), (5, 5));

    let connecting = CONNECTING.lock().unwrap();
    together(50, |_| work(Duration::from_millis(2)));
    drop(connecting);
    assert!(wait::until(Duration::from_secs(2), || app.status().connecting == 0));
    // No further connect is queued.
    assert!(!wait::until(Duration::from_millis(200), || app.status().connecting > 0));
    let more = CONNECTS.load(Ordering::Relaxed) - warm;
    assert!(more <= 4, "{more} connects more");
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
    app.dispose().unwrap();
    test_db.assert_connections(0);
}

fn checkout_beside_the_callers_own_connection_would_deadlock<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    let outer = app.open_session().unwrap();
    let line = line!() + 1;
    outer.begin().unwrap();
    let error = app.open_session().unwrap().begin().unwrap_err();
    assert!(error.kind() == ErrorKind::WouldDeadlock && error.holders().expect("holders").len() == 1, "{error}");
    assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
    assert!(app.ping().unwrap_err().kind() == ErrorKind::WouldDeadlock);
    outer.rollback().unwrap();
    app.ping().unwrap();
}

fn acquire_timeout_names_the_holders<C: TestConnection>(test_db: &TestDatabase) {
    let patience = Duration::from_millis(200);
    let app = C::app(test_db.config().max_size(2).acquire_timeout(patience));
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let mut releases = Vec::new();
        for name in ["one", "two"] {
            let (release, released) = mpsc::channel::<()>();
            let (app, tell) = (&app, tell.clone());
            let holder = thread::Builder::new().name(name.into());
            holder
                .spawn_scoped(scope, move || {
                    app.scope()
                        .read_only()
                        .run(|| {
                            let session = C::db().session()?;
                            let place = line!() + 1;
                            session.begin()?;
                            tell.send(place).unwrap();
                            let _ = released.recv();
                            Ok::<_, Error>(())
                        })
                        .unwrap();
                })
                .unwrap();
            releases.push(release);
        }
        drop(tell);
        let lines: Vec<u32> = told.iter().take(2).collect();
        assert_eq!(lines.len(), 2);
        let started = Instant::now();
        let error = app.ping().unwrap_err();
        let took = started.elapsed();
        assert!((patience..patience * 3 / 2).contains(&took), "a call ends at `acquire_timeout`: {took:?}");
        assert_eq!(error.kind(), ErrorKind::AcquireTimeout, "{error}");
        assert_eq!(error.holders().expect("holders").len(), 2, "{error}");
        assert!(error.to_string().contains("all its 2 connections are in use, and no other caller waits"), "{error}");
        assert!(error.is_timeout() && error.is_transient());
        let text = error.to_string();
        for (line, name) in lines.iter().zip(["one", "two"]) {
            assert!(text.contains(&format!("{}:{line}:", file!())) && text.contains(name), "{text}");
        }
        assert!(text.contains("in a transaction"), "{text}");
        drop(releases);
    });
    app.ping().unwrap();
    assert_eq!((app.status().waiting, app.status().in_use), (0, 0));
}

fn checkout_ends_at_the_deadline_of_the_scope<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let holder = &app;
        scope.spawn(move || {
            let session = holder.open_session().unwrap();
            session.begin().unwrap();
            tell.send(()).unwrap();
            let _ = released.recv();
        });
        told.recv().unwrap();
        let started = Instant::now();
        let limit = Duration::from_millis(150);
        let outcome = app.scope().deadline(limit).run(|| C::db().session()?.number(COUNT));
        let took = started.elapsed();
        assert!(outcome.unwrap_err().is_timeout());
        assert!((limit..limit * 2).contains(&took), "a call ends at the deadline of its scope: {took:?}");
        drop(release);
    });
}

fn broken_connection_passes_its_permit_to_a_waiter<C: TestConnection>(test_db: &TestDatabase) {
    for round in 0..10 {
        let app = C::app(test_db.config().max_size(1).acquire_timeout(Duration::from_secs(20)));
        app.ping().unwrap();
        thread::scope(|scope| {
            let session = app.open_session().unwrap();
            session.begin().unwrap();
            let waiter = scope.spawn(|| app.ping());
            assert!(wait::until(Duration::from_secs(5), || app.status().waiting == 1));
            match (round % 2, test_db) {
                (0, TestDatabase::Postgres(_) | TestDatabase::Mariadb(_)) => {
                    test_db.terminate_all();
                    session.number("SELECT count(*) AS number FROM (SELECT 1 AS one) AS t").unwrap_err();
                }
                // A session whose transaction was ended behind its back closes its connection.
                _ => {
                    session.send("ROLLBACK").unwrap();
                    session.commit().unwrap_err();
                }
            }
            session.rollback().unwrap();
            waiter.join().unwrap().expect("the waiter is woken before its `acquire_timeout`");
        });
        assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
    }
}

fn idle_connection_is_closed_at_max_lifetime<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(3).max_lifetime(Duration::from_millis(300)).idle_timeout(None));
    app.ping().unwrap();
    assert_eq!(app.status().idle, 1);
    assert_eq!(wait::until_equal(0, Duration::from_secs(2), || app.status().open), 0);
    test_db.assert_connections(0);
    app.ping().unwrap();
}

fn waiters_are_served_in_order<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    let (tell, served) = mpsc::channel();
    thread::scope(|scope| {
        let session = app.open_session().unwrap();
        session.begin().unwrap();
        for number in 0..10 {
            let (app, tell) = (&app, tell.clone());
            scope.spawn(move || {
                app.scope().read_only().run(|| {
                    C::db().session()?.begin()?;
                    tell.send(number).unwrap();
                    Ok::<_, Error>(())
                })
            });
            assert!(wait::until(Duration::from_secs(5), || app.status().waiting == number + 1));
        }
        session.rollback().unwrap();
    });
    assert_eq!(served.try_iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
}

/// A connect without a waiting caller is under way while another connection is being closed.
#[test]
fn closing_connection_counts_against_max_size() {
    static CONNECTS: AtomicUsize = AtomicUsize::new(0);
    static CONNECTING: Mutex<()> = Mutex::new(());
    static CLOSING: Mutex<()> = Mutex::new(());
    static CLOSINGS: AtomicUsize = AtomicUsize::new(0);

    /// Owned by a function registered with the connection: dropped while that is closed.
    struct Closing;

    impl Drop for Closing {
        fn drop(&mut self) {
            CLOSINGS.fetch_add(1, Ordering::SeqCst);
            drop(CLOSING.lock());
        }
    }

    fn connect(url: &str) -> ConnectionResult<SqliteConnection> {
        if CONNECTS.fetch_add(1, Ordering::SeqCst) == 1 {
            drop(CONNECTING.lock());
        }
        let conn = SqliteConnection::establish(url)?;
        let closing = Arc::new(Closing);
        let answer = move || {
            let _kept = &closing;
            1
        };
        answer_utils::register_nondeterministic_impl(&conn, answer)
            .map_err(ConnectionError::CouldntSetupConfiguration)?;
        Ok(conn)
    }

    let test_db = TestDatabase::sqlite();
    let db = Database::<SqliteConnection>::without_migrations().connect_with(connect);
    let config = test_db.config().max_size(2).acquire_timeout(Duration::from_millis(300)).idle_timeout(None);
    let app = db.init_app("closing", config).unwrap();
    let first = app.open_session().unwrap();
    first.load::<i32>(diesel::select(answer())).unwrap();
    first.begin().unwrap();
    let (connecting, closing) = (CONNECTING.lock().unwrap(), CLOSING.lock().unwrap());
    thread::scope(|scope| {
        // It asks for the second connection, and is served with the first.
        let served = scope.spawn(|| {
            let session = app.open_session().unwrap();
            session.load::<i32>(diesel::select(answer())).unwrap();
            session.send("COMMIT").unwrap();
        });
        assert!(wait::until(Duration::from_secs(2), || app.status().connecting == 1));
        first.rollback().unwrap();
        // The first connection is being closed. The second one is still under way.
        assert!(wait::until(Duration::from_secs(2), || CLOSINGS.load(Ordering::SeqCst) == 1));
        let third = app.ping();
        drop(closing);
        served.join().unwrap();
        assert!(matches!(&third, Err(error) if error.kind() == ErrorKind::AcquireTimeout), "{third:?}");
    });
    assert_eq!(CONNECTS.load(Ordering::SeqCst), 2);
    drop(connecting);
    app.dispose().unwrap();
    test_db.assert_connections(0);
}

#[diesel::declare_sql_function]
extern "SQL" {
    fn answer() -> Integer;
}
