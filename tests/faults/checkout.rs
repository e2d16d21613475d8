//! Connections of `App::checkout`, pings with a deadline, and processes that create the same database, under a clock.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Config, Error, ErrorKind, Result, admin};

use crate::fixtures::threads::{Process, answer_parent, child_of};
use crate::fixtures::{AnyConnection, COUNT, INSERT, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, TempSqlite, enabled, mariadb, postgres};

for_each_database!(every_database =>
    dispose_waits_for_a_pooled_connection_on_another_thread,
    ping_within_ends_in_time_at_a_full_pool,
);
for_each_database!(every_server =>
    ping_within_ends_in_time_at_a_silent_server,
    checkin_of_a_pooled_connection_ends_in_time_at_a_silent_server,
);

const LIMIT: Duration = Duration::from_millis(500);

fn dispose_waits_for_a_pooled_connection_on_another_thread<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let mut conn = app.checkout().unwrap();
    let (used, told) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let worker = thread::spawn(move || {
        conn.batch_execute(INSERT).unwrap();
        used.send(()).unwrap();
        released.recv().unwrap();
        thread::sleep(Duration::from_millis(300));
        drop(conn);
    });
    told.recv().unwrap();
    let started = Instant::now();
    let error = app.dispose_within(Duration::from_millis(100)).unwrap_err();
    let report = error.dispose_report().expect("a report");
    assert_eq!(report.still_out.len(), 1);
    assert!(report.still_out[0].location().file().ends_with("checkout.rs"), "{report}");
    assert!(started.elapsed() >= Duration::from_millis(100));
    release.send(()).unwrap();
    let started = Instant::now();
    let report = app.dispose_report().unwrap();
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
    assert!(report.is_complete(), "{report}");
    worker.join().unwrap();
    assert_eq!(app.status().open, 0);
    assert_eq!(app.context(|| C::db().session()?.number(COUNT)).unwrap(), 1);
}

#[track_caller]
fn is_late<C: TestConnection>(app: &App<C>, limit: Duration) -> Error {
    let started = Instant::now();
    let error = app.ping_within(limit).unwrap_err();
    let took = started.elapsed();
    let slack = Duration::from_millis(450);
    assert!(took >= limit - Duration::from_millis(5) && took < limit + slack, "{took:?}: {error}");
    assert!(error.is_timeout(), "{error}");
    error
}

fn ping_within_ends_in_time_at_a_full_pool<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    app.ping_within(Duration::from_secs(5)).unwrap();
    app.ping_within(Duration::MAX).unwrap();
    let conn = app.checkout().unwrap();
    let error = is_late(&app, Duration::from_millis(200));
    assert_eq!(error.kind(), ErrorKind::AcquireTimeout, "{error}");
    drop(conn);
    app.ping_within(Duration::from_secs(5)).unwrap();
}

fn ping_within_ends_in_time_at_a_silent_server<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = C::app(Config::new(test_db.url_at(proxy.port())).max_size(1));
    app.ping_within(Duration::from_secs(5)).unwrap();
    proxy.set(Mode::Silent);
    let no_answer = |error: Error| {
        assert!(
            error.kind() == ErrorKind::ConnectTimeout && error.to_string().contains("give the call more time"),
            "{error}"
        );
        assert!(!error.to_string().contains("scope"), "{error}");
    };
    // The statement on a connection that was used just now, and then a connect.
    no_answer(is_late(&app, LIMIT));
    no_answer(is_late(&app, LIMIT));
    proxy.set(Mode::Pass);
    proxy.cut_all();
    app.ping_within(Duration::from_secs(5)).unwrap();
    // A connection whose health is in doubt is pinged before.
    thread::sleep(Duration::from_millis(600));
    proxy.set(Mode::Silent);
    no_answer(is_late(&app, LIMIT));
    proxy.set(Mode::Pass);
    proxy.cut_all();
    app.ping_within(Duration::from_secs(5)).unwrap();
}

/// The drop rolls an open transaction back, and the server does not answer.
fn checkin_of_a_pooled_connection_ends_in_time_at_a_silent_server<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = C::app(Config::new(test_db.url_at(proxy.port())).connect_timeout(LIMIT));
    app.create_all().unwrap();
    let mut conn = app.checkout().unwrap();
    conn.batch_execute("BEGIN").unwrap();
    conn.batch_execute(INSERT).unwrap();
    proxy.set(Mode::Silent);
    let started = Instant::now();
    drop(conn);
    assert!(started.elapsed() < 4 * LIMIT, "{:?}", started.elapsed());
    proxy.set(Mode::Pass);
    proxy.cut_all();
    assert_eq!(app.context(|| C::db().session()?.number(COUNT)).unwrap(), 0);
}

/// Several processes create one database at the same time, and each is told whether it was the one.
fn processes_create_once<C: TestConnection>(test: &str, url: &str) {
    let create = |url: &str| -> Result<bool> { admin::create_database_if_missing(C::db(), &Config::new(url)) };
    if let Some(url) = child_of() {
        answer_parent(|_| create(&url).map_or_else(|error| error.to_string(), |created| created.to_string()));
        return;
    }
    let name = url.rsplit('/').next().unwrap();
    for _ in 0..5 {
        let mut processes: Vec<_> = (0..3).map(|_| Process::spawn(test, url)).collect();
        processes.iter_mut().for_each(|process| process.order("create"));
        let answers: Vec<_> = processes.iter_mut().map(Process::answer).collect();
        assert_eq!(answers.iter().filter(|answer| *answer == "true").count(), 1, "{answers:?}");
        assert_eq!(answers.iter().filter(|answer| *answer == "false").count(), 2, "{answers:?}");
        assert!(!create(url).unwrap());
        admin::drop_database(C::db(), &Config::new(url), Some(name)).unwrap();
    }
}

#[test]
fn postgres_processes_create_a_database_once() {
    const TEST: &str = "checkout::postgres_processes_create_a_database_once";
    match child_of() {
        Some(url) => processes_create_once::<PgConnection>(TEST, &url),
        None if enabled(Kind::Postgres) => {
            processes_create_once::<PgConnection>(TEST, &postgres().url_of("app_of_processes"));
        }
        None => {}
    }
}

#[test]
fn enum_processes_create_a_database_once() {
    const TEST: &str = "checkout::enum_processes_create_a_database_once";
    match child_of() {
        Some(url) => processes_create_once::<AnyConnection>(TEST, &url),
        None if enabled(Kind::Postgres) => {
            processes_create_once::<AnyConnection>(TEST, &postgres().url_of("app_of_enums"))
        }
        None => {}
    }
}

#[test]
fn mariadb_processes_create_a_database_once() {
    const TEST: &str = "checkout::mariadb_processes_create_a_database_once";
    match child_of() {
        Some(url) => processes_create_once::<MysqlConnection>(TEST, &url),
        None if enabled(Kind::Mariadb) => {
            processes_create_once::<MysqlConnection>(TEST, &mariadb().url_of("app_of_processes"));
        }
        None => {}
    }
}

#[test]
fn sqlite_processes_create_a_file_once() {
    const TEST: &str = "checkout::sqlite_processes_create_a_file_once";
    match child_of() {
        Some(url) => processes_create_once::<SqliteConnection>(TEST, &url),
        None => {
            let file = TempSqlite::new();
            processes_create_once::<SqliteConnection>(TEST, &format!("{}.new.sqlite", file.url()));
        }
    }
}
