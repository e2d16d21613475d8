//! The upkeep of a pool after callers have given up, connects have hung and the program's own code has panicked.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, Config, Database, ErrorKind};

use crate::fixtures::threads::{Process, answer_parent, child_of};
use crate::fixtures::{TestConnection, TestDatabase, logged};
use crate::for_each_database;
use crate::support::listeners::silent_listener;
use crate::support::{TempSqlite, mariadb, postgres, wait};

for_each_database!(every_server => disposal_waits_for_the_server);
for_each_database!(only mariadb => connect_that_never_ends_does_not_end_the_application);
for_each_database!(only postgres =>
    idle_connections_that_died_cost_one_caller_one_ping,
    set_up_without_an_answer_is_cut,
    connection_lost_while_it_is_set_up_is_tried_again,
    disposal_of_a_limited_pool_with_dead_connections_keeps_its_deadline,
);

const SOON: Duration = Duration::from_secs(3);

/// Opens `count` connections at once and leaves them idle.
fn warm_up<C: TestConnection>(app: &App<C>, count: usize) {
    let sessions: Vec<_> = (0..count).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
}

fn slow_connect(url: &str) -> ConnectionResult<SqliteConnection> {
    // Longer than the callers below wait.
    thread::sleep(Duration::from_millis(300));
    SqliteConnection::establish(url)
}

/// An application whose one caller has left before the connect ended.
fn late(db: &Database<SqliteConnection>, file: &TempSqlite, id: &str) -> App<SqliteConnection> {
    let config = Config::new(file.url()).acquire_timeout(Duration::from_millis(100)).idle_timeout(SOON / 10);
    let app = db.init_app(id, config).unwrap();
    assert!(app.ping().unwrap_err().kind() == ErrorKind::ConnectTimeout);
    assert!(wait::until(SOON, || app.status().idle == 1));
    app
}

#[test]
fn connection_that_came_too_late_is_closed_after_idle_timeout() {
    let file = TempSqlite::new();
    let db = Database::<SqliteConnection>::without_migrations().connect_with(slow_connect);
    let app = late(&db, &file, "late");
    assert!(wait::until(SOON, || app.status().open == 0), "{}", app.status());
}

#[test]
fn connection_that_came_too_late_is_evicted() {
    let file = TempSqlite::new();
    let db = Database::<SqliteConnection>::without_migrations().connect_with(slow_connect).max_connections(1);
    let late = late(&db, &file, "late");
    let other = db.init_app("other", Config::new(file.url())).unwrap();
    other.ping().unwrap();
    assert_eq!((late.status().open, other.status().open), (0, 1));
}

#[test]
fn caller_that_waits_for_a_slow_connect_is_told_so() {
    let file = TempSqlite::new();
    let db = Database::<SqliteConnection>::without_migrations().connect_with(slow_connect);
    let app = db.init_app("slow", Config::new(file.url()).max_size(3)).unwrap();
    let held = app.open_session().unwrap();
    held.with(|conn| conn.batch_execute("SELECT 1")).unwrap();
    let error = app.scope().deadline(Duration::from_millis(100)).run(|| db.session()?.begin()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AcquireTimeout, "{error}");
    assert_eq!(error.holders().expect("holders").len(), 1);
    assert!(error.to_string().contains("1 connection of at most 3 is in use, one more has been connecting"), "{error}");
}

#[test]
fn idle_connection_is_closed_within_a_quarter_of_idle_timeout() {
    let file = TempSqlite::new();
    let app = SqliteConnection::app(Config::new(file.url()).idle_timeout(Duration::from_millis(800)));
    for _ in 0..3 {
        app.ping().unwrap();
        let used = Instant::now();
        assert!(wait::until(SOON, || app.status().open == 0));
        let idle = used.elapsed();
        assert!(
            (Duration::from_millis(750)..Duration::from_millis(1150)).contains(&idle),
            "an idle connection is closed within a quarter of `idle_timeout`: {idle:?}"
        );
    }
}

#[test]
fn eviction_takes_from_the_application_that_was_used_least_recently() {
    let file = TempSqlite::new();
    let db = Database::<SqliteConnection>::without_migrations().max_connections(6);
    let app = |id: &str| db.init_app(id, Config::new(file.url())).unwrap();
    let open = |app: &App<SqliteConnection>| {
        let connections: Vec<_> = (0..3).map(|_| app.checkout().unwrap()).collect();
        drop(connections);
    };
    let (first, second, third) = (app("first"), app("second"), app("third"));
    [&first, &second, &third].into_iter().for_each(open);
    let kept = [&first, &second, &third].map(|app| app.status().open);
    assert_eq!(kept, [0, 3, 3]);
}

/// Threads of pools in this process.
fn pool_threads() -> usize {
    let names = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = names.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("diesel-session")).count()
}

#[test]
fn threads_of_pools_that_never_connected_end() {
    let db = Database::<SqliteConnection>::without_migrations();
    let before = pool_threads();
    for number in 0..60 {
        let config = Config::new("/nowhere/at/all.sqlite").idle_timeout(Duration::from_millis(100));
        db.init_app(format!("never{number}"), config).unwrap().ping().unwrap_err();
    }
    // Eight spare threads are kept.
    assert!(wait::until(SOON, || pool_threads() <= before + 8), "{} of {before}", pool_threads());
}

#[test]
fn panicking_logger_costs_no_connection() {
    logged::listen();
    let file = TempSqlite::new();
    let app = SqliteConnection::app(Config::new(file.url()).max_size(1).acquire_timeout(SOON));
    for line in ["has opened a connection", "has closed a connection"] {
        logged::panic_once_at(line);
        // A connect that failed so is an error of its caller.
        let _ = app.ping();
        app.dispose().unwrap();
        app.ping().unwrap();
        assert_eq!((app.status().in_use, app.status().open), (0, 1), "after {line}");
    }
}

/// The four idle connections die without a word, and new ones are made at once.
fn idle_connections_that_died_cost_one_caller_one_ping() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let config = test_db.config().connect_timeout(Duration::from_millis(1000));
    let app = PgConnection::app(config.acquire_timeout(Duration::from_millis(2500)));
    warm_up(&app, 4);
    let pids = postgres().backend_pids(database.name());
    assert_eq!(pids.len(), 4);
    // The callers ping the connections that they are offered.
    test_db.lose_a_connection::<PgConnection>(&test_db.url());
    pids.iter().for_each(|pid| postgres().sigstop_backend(*pid));
    let outcomes = [app.ping(), app.ping()];
    pids.iter().for_each(|pid| postgres().sigcont(*pid));
    for outcome in outcomes {
        outcome.unwrap();
    }
    assert_eq!(app.status().open, 1);
}

/// `on_connect` waits for an answer of the server that does not come, once.
fn set_up_without_an_answer_is_cut() {
    static HANGS: AtomicBool = AtomicBool::new(true);
    fn prepare(_: &App<PgConnection>, conn: &mut PgConnection) -> QueryResult<()> {
        if HANGS.swap(false, Ordering::SeqCst) { conn.batch_execute("SELECT pg_sleep(60)") } else { Ok(()) }
    }
    let test_db = TestDatabase::postgres();
    let db = Database::<PgConnection>::without_migrations().on_connect(prepare);
    let config = test_db.config().connect_timeout(Duration::from_secs(1)).acquire_timeout(Duration::from_millis(1500));
    let app = db.init_app("set_up", config).unwrap();
    assert!(app.ping().is_err());
    app.ping().unwrap();
    app.dispose().unwrap();
}

fn connection_lost_while_it_is_set_up_is_tried_again() {
    static DIES: AtomicBool = AtomicBool::new(false);
    fn prepare(_: &App<PgConnection>, conn: &mut PgConnection) -> QueryResult<()> {
        match DIES.swap(false, Ordering::SeqCst) {
            true => conn.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())"),
            false => Ok(()),
        }
    }
    let test_db = TestDatabase::postgres();
    let db = Database::<PgConnection>::without_migrations().on_connect(prepare);
    let [first, second] = ["first", "second"].map(|id| db.init_app(id, test_db.config()).unwrap());
    first.ping().unwrap();
    DIES.store(true, Ordering::SeqCst);
    second.ping().unwrap();
    db.dispose_all().unwrap();
}

/// MySQL's client library has no deadline for the first word of the server.
fn connect_that_never_ends_does_not_end_the_application() {
    static SILENT: AtomicUsize = AtomicUsize::new(0);
    fn connect(url: &str) -> ConnectionResult<MysqlConnection> {
        match SILENT.swap(0, Ordering::SeqCst) {
            0 => MysqlConnection::establish(url),
            port => MysqlConnection::establish(&format!("mysql://root@127.0.0.1:{port}/test")),
        }
    }
    let test_db = TestDatabase::mariadb();
    let (address, listener) = silent_listener();
    let db = Database::<MysqlConnection>::without_migrations().connect_with(connect);
    let app = db.init_app("hangs", test_db.config().connect_timeout(Duration::from_secs(1))).unwrap();
    SILENT.store(usize::from(address.port()), Ordering::SeqCst);
    assert!(app.ping().unwrap_err().kind() == ErrorKind::ConnectTimeout);
    app.ping().unwrap();
    assert_eq!((app.status().open, app.status().connecting), (1, 1));
    drop(listener);
    assert!(wait::until(SOON, || app.status().connecting == 0));
    app.dispose().unwrap();
}

/// Each close waits for the server, which has been stopped.
fn disposal_of_a_limited_pool_with_dead_connections_keeps_its_deadline() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let db = PgConnection::new_db().max_connections(8);
    let app = db.init_app("limited", test_db.config()).unwrap();
    warm_up(&app, 8);
    let pids = postgres().backend_pids(database.name());
    pids.iter().for_each(|pid| postgres().sigstop_backend(*pid));
    let started = Instant::now();
    let outcome = app.dispose_within(Duration::from_millis(100));
    let took = started.elapsed();
    pids.iter().for_each(|pid| postgres().sigcont(*pid));
    outcome.unwrap();
    assert!(took < Duration::from_millis(600), "`dispose_within` keeps its limit: {took:?}");
}

fn disposal_waits_for_the_server<C: TestConnection>(test_db: &TestDatabase) {
    let sessions = || match test_db {
        TestDatabase::Postgres(database) => postgres().backend_pids(database.name()).len(),
        TestDatabase::Mariadb(database) => mariadb().backend_pids(database.name()).len(),
        TestDatabase::Sqlite(_) => unreachable!("a file has no sessions"),
    };
    let app = C::app(test_db.config());
    for _ in 0..30 {
        warm_up(&app, 5);
        app.dispose().unwrap();
        assert_eq!(sessions(), 0, "after the disposal");
    }
}

/// Each time in a process of its own, as the first threads of pools start there.
#[test]
fn process_that_has_disposed_of_everything_may_fork() {
    const USABLE: &str = "usable";
    const TEST: &str = "pool_upkeep::process_that_has_disposed_of_everything_may_fork";
    if let Some(url) = child_of() {
        answer_parent(|_| {
            let app = SqliteConnection::app(Config::new(&url));
            app.ping().unwrap();
            SqliteConnection::db().dispose_all().unwrap();
            let (mut heard, mut told) = UnixStream::pair().unwrap();
            match fork::fork().unwrap() {
                fork::Fork::Child => {
                    let outcome = app.ping().map_or_else(|error| error.to_string(), |()| USABLE.to_owned());
                    told.write_all(outcome.as_bytes()).unwrap();
                    std::process::exit(0)
                }
                fork::Fork::Parent(pid) => {
                    drop(told);
                    let mut outcome = String::new();
                    heard.read_to_string(&mut outcome).unwrap();
                    fork::waitpid(pid).unwrap();
                    outcome
                }
            }
        });
        return;
    }
    let file = TempSqlite::new();
    for _ in 0..60 {
        let mut parent = Process::spawn(TEST, &file.url());
        parent.order("fork");
        assert_eq!(parent.answer(), USABLE);
    }
}
