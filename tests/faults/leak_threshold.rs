//! A connection that is held for too long is logged once, and once more at its checkin.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Config, Error, ErrorKind};

use crate::fixtures::{TestConnection, TestDatabase, logged};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::wait;

for_each_database!(every_database =>
    held_connection_is_logged_once_and_again_at_checkin,
    connection_returned_within_the_threshold_is_not_logged,
    each_held_connection_is_logged,
    leak_threshold_none_logs_nothing,
    connection_held_beyond_a_disposal_is_logged,
);
for_each_database!(only postgres => pending_connect_is_not_logged_as_a_leak);

const THRESHOLD: Duration = Duration::from_millis(300);
const TARGET: &str = "diesel_session::leak";

/// The lines about an application.
fn told(app: &str) -> Vec<String> {
    let app = format!("app `{app}`");
    logged::lines_with(TARGET).into_iter().filter(|line| line.contains(&app)).collect()
}

fn held_connection_is_logged_once_and_again_at_checkin<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let app = C::app(test_db.config().leak_threshold(THRESHOLD));
    thread::scope(|scope| {
        let (tell, asked) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let worker = thread::Builder::new().name("forgetful".into());
        let app = &app;
        worker
            .spawn_scoped(scope, move || {
                let session = app.open_session().unwrap();
                let before = Instant::now();
                let line = line!() + 1;
                session.begin().unwrap();
                tell.send((before, line)).unwrap();
                let _ = ended.recv();
                session.rollback().unwrap();
            })
            .unwrap();
        let (before, line) = asked.recv().unwrap();
        let (mut seen, mut at) = (Vec::new(), before);
        assert!(wait::until(Duration::from_secs(5), || {
            at = Instant::now();
            seen = told(app.id());
            !seen.is_empty()
        }));
        assert!(at - before >= THRESHOLD, "{:?} too early: {seen:?}", at - before);
        assert!(
            at - before < THRESHOLD * 3,
            "a leak is logged soon after `leak_threshold`: {:?}: {seen:?}",
            at - before
        );
        assert!(seen[0].starts_with("WARN "), "{seen:?}");
        for part in [&format!("{}:{line}:", file!()), "thread forgetful", "in a transaction"] {
            assert!(seen[0].contains(part), "{part} in {seen:?}");
        }
        // As long as two more looks would take.
        assert!(!wait::until(THRESHOLD * 2 + THRESHOLD / 2, || told(app.id()).len() > 1), "{:?}", told(app.id()));
        drop(end);
        assert!(wait::until(Duration::from_secs(5), || app.status().in_use == 0));
        assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() > 1));
        let seen = told(app.id());
        assert!(seen.len() == 2 && seen[1].starts_with("INFO ") && seen[1].contains("has come back"), "{seen:?}");
        for part in [&format!("{}:{line}:", file!()), "thread forgetful"] {
            assert!(seen[1].contains(part), "{part} in {seen:?}");
        }
    });
    // The next holder is another matter.
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    session.rollback().unwrap();
    assert_eq!(told(app.id()).len(), 2);
    session.begin().unwrap();
    assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 3), "{:?}", told(app.id()));
}

/// However often the same connection is checked out, and although the pool checks for leaks all the time.
fn connection_returned_within_the_threshold_is_not_logged<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let app = C::app(test_db.config().leak_threshold(THRESHOLD));
    let watched = C::app(test_db.config().leak_threshold(THRESHOLD));
    holding(&watched, || {
        let started = Instant::now();
        while started.elapsed() < THRESHOLD * 4 {
            // Each holder works for a part of the threshold.
            holding(&app, || thread::sleep(THRESHOLD / 10));
        }
        assert_eq!(told(app.id()), Vec::<String>::new());
        assert_eq!(told(watched.id()).len(), 1, "the pool checked for leaks");
    });
    assert_eq!((app.status().open, told(app.id())), (1, Vec::new()));
}

/// Runs `body` while a context of `app` holds a connection. It only reads, so that it blocks no writer of SQLite.
fn holding<C: TestConnection>(app: &App<C>, body: impl FnOnce()) {
    let held = app.scope().read_only().run(|| {
        C::db().session()?.begin()?;
        body();
        Ok::<_, Error>(())
    });
    held.unwrap();
}

/// A second one and a third, taken while the first is known.
fn each_held_connection_is_logged<C: TestConnection>(test_db: &TestDatabase) {
    fn take<C: TestConnection>(app: &App<C>, number: usize) {
        if number > 3 {
            return;
        }
        let started = Instant::now();
        holding(app, || {
            assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == number), "{:?}", told(app.id()));
            let took = started.elapsed();
            assert!(took < THRESHOLD * 3, "each leak is logged soon after `leak_threshold`: {took:?}");
            take(app, number + 1);
        });
    }
    logged::listen();
    let app = C::app(test_db.config().leak_threshold(THRESHOLD));
    take(&app, 1);
    assert_eq!(told(app.id()).len(), 6);
}

fn leak_threshold_none_logs_nothing<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let (off, on) = (C::app(test_db.config().leak_threshold(None)), C::app(test_db.config().leak_threshold(THRESHOLD)));
    holding(&off, || {
        holding(&on, || assert!(wait::until(Duration::from_secs(5), || told(on.id()).len() == 1)));
    });
    assert_eq!((told(on.id()).len(), told(off.id()).len()), (2, 0));
}

/// What an application that was disposed of never got back.
fn connection_held_beyond_a_disposal_is_logged<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let app = C::app(test_db.config().leak_threshold(THRESHOLD));
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    assert_eq!(app.dispose_report().unwrap().still_out.len(), 1);
    assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 1));
    session.rollback().unwrap();
    assert_eq!(told(app.id()).len(), 2);
    app.dispose().unwrap();
    test_db.assert_connections(0);
}

/// A caller that waits for a connect holds no connection.
fn pending_connect_is_not_logged_as_a_leak() {
    logged::listen();
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let config = Config::new(test_db.url_at(proxy.port())).connect_timeout(THRESHOLD * 5);
    let app = PgConnection::app(config.leak_threshold(THRESHOLD));
    holding(&app, || {
        // A connection is held, so the pool checks for leaks.
        assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 1));
        proxy.set(Mode::Silent);
        let error = app.ping().unwrap_err();
        proxy.set(Mode::Pass);
        assert!(error.kind() == ErrorKind::ConnectTimeout, "{error}");
        assert_eq!(told(app.id()).len(), 1, "{:?}", told(app.id()));
    });
    assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 2));
}

#[test]
fn extreme_leak_threshold_is_invalid_config() {
    for (threshold, told) in [(Duration::ZERO, "leak_threshold is zero"), (Duration::MAX, "longer than a year")] {
        let refused = SqliteConnection::db().init_app("absurd", Config::new(":memory:").leak_threshold(threshold));
        let error = refused.map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(told), "{error}");
    }
}
