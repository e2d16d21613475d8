//! A server that stops as a whole, or stops answering: which callers get an error, which wait, and which do not notice
//! it.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use diesel_session::pool::ConnectErrorKind;
use diesel_session::{App, Config, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, logged};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Mariadb, Postgres, ROLE, postgres, wait};

for_each_database!(every_server => ended_idle_connections_fail_no_caller, a_silent_network_delays_no_disposal);
for_each_database!(only mariadb => waiting_callers_are_served_after_a_restart_of_mariadb);
for_each_database!(only postgres =>
    waiting_callers_are_served_after_a_restart_of_postgres,
    idle_connections_under_another_name_of_the_server_are_evicted,
    frozen_connections_of_one_application_delay_no_other,
    frozen_idle_connection_is_replaced_after_connect_timeout,
    plain_r2d2_waits_for_a_frozen_backend_beyond_its_timeout,
    server_full_error_names_the_other_clients,
);

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Opens `count` connections at once and leaves them idle.
fn warm_up<C: TestConnection>(app: &App<C>, count: usize) {
    let sessions: Vec<_> = (0..count).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    drop(sessions);
    assert!(app.status().idle >= count);
}

/// Ten connections idle in three applications, five in a transaction, and all of them die with the server.
fn assert_waiting_callers_are_served_after_a_restart<C: TestConnection>(
    url: &str,
    kill: impl FnOnce(),
    restart: impl FnOnce(),
) {
    let config = || Config::new(url).acquire_timeout(Duration::from_secs(30));
    let apps: Vec<_> = (0..3).map(|_| C::app(config())).collect();
    apps[0].create_all().unwrap();
    let sessions: Vec<_> = (0..5).map(|_| apps[0].open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.send(INSERT).unwrap());
    for (app, idle) in apps.iter().zip([2, 4, 4]) {
        warm_up(app, idle);
    }
    let told = |what: &str| {
        let port = url.rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap();
        logged::lines_with(what).iter().filter(|line| line.contains(port)).count()
    };
    logged::listen();
    kill();
    for session in &sessions {
        let error = session.number(COUNT).unwrap_err();
        assert!(error.kind() == ErrorKind::ConnectionLost && error.is_transient(), "{error}");
        // Nothing more is sent, and there is nothing more to tell.
        session.rollback().unwrap();
    }
    thread::scope(|scope| {
        let served =
            |app: &App<C>| app.context(|| C::db().session()?.number(COUNT)).map(|count| (count, Instant::now()));
        let callers: Vec<_> = (0..12)
            .map(|number| {
                let app = &apps[number % 3];
                scope.spawn(move || served(app))
            })
            .collect();
        let all_wait = || apps.iter().map(|app| app.status().waiting).sum::<usize>() == callers.len();
        assert!(wait::until(Duration::from_secs(5), || all_wait() && told(" is unreachable: ") == 1));
        assert!(callers.iter().all(|caller| !caller.is_finished()));
        restart();
        let accepting = Instant::now();
        for caller in callers {
            let (count, at) = caller.join().unwrap().unwrap();
            assert_eq!(count, 0, "what was begun is gone");
            let late = at.saturating_duration_since(accepting);
            assert!(
                late < Duration::from_millis(500),
                "waiting callers are served within 0.5 s of a server's return: {late:?}"
            );
        }
    });
    assert_eq!((told(" is unreachable: "), told(" is reachable again")), (1, 1), "each is told once");
    for session in &sessions {
        session.send(INSERT).unwrap();
        session.commit().unwrap();
    }
    assert_eq!(apps[2].open_session().unwrap().number(COUNT).unwrap(), 5);
    for app in &apps {
        // A connect without a waiting caller may be under way.
        wait::until(Duration::from_secs(2), || app.status().connecting == 0);
        let status = app.status();
        assert_eq!((status.in_use, status.waiting, status.connecting), (0, 0, 0), "{status}");
        assert!(app.dispose_report().unwrap().is_complete());
    }
}

fn waiting_callers_are_served_after_a_restart_of_postgres() {
    let server = std::cell::RefCell::new(Postgres::start());
    let url = server.borrow().url();
    assert_waiting_callers_are_served_after_a_restart::<PgConnection>(
        &url,
        || server.borrow_mut().kill9(),
        || server.borrow_mut().restart(),
    );
}

fn waiting_callers_are_served_after_a_restart_of_mariadb() {
    let server = std::cell::RefCell::new(Mariadb::start());
    let url = server.borrow().url();
    assert_waiting_callers_are_served_after_a_restart::<MysqlConnection>(
        &url,
        || server.borrow_mut().kill9(),
        || server.borrow_mut().restart(),
    );
}

/// An administrator ends every session: no one of a thousand statements fails.
fn ended_idle_connections_fail_no_caller<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    warm_up(&app, 8);
    test_db.terminate_all();
    test_db.assert_connections(0);
    let outcomes = together(4, |_| {
        (0..250).filter_map(|_| app.context(|| C::db().session()?.number(COUNT)).err()).collect::<Vec<_>>()
    });
    assert!(outcomes.iter().all(Vec::is_empty), "{outcomes:?}");
    assert_eq!(app.status().in_use, 0);
}

/// A PostgreSQL server has other names, and this process has most of its connections under one of them.
fn idle_connections_under_another_name_of_the_server_are_evicted() {
    let server = Postgres::start();
    let tcp = server.url();
    let names = [tcp.replace("127.0.0.1", "localhost"), server.socket_url(ROLE)];
    let config = |url: &str| Config::new(url).acquire_timeout(Duration::from_secs(3));
    for (number, name) in names.iter().enumerate() {
        let full = PgConnection::app(config(&tcp).max_size(17));
        // The first time there was no connection under that name, so the identity of the server is unknown.
        let other = PgConnection::app(config(name));
        warm_up(&full, 17);
        assert_eq!(full.status().open, 17);
        other.ping().unwrap();
        assert!(full.status().open < 17, "{number}");
        full.dispose().unwrap();
        other.dispose().unwrap();
    }
}

/// All idle connections of one application are frozen, and four of its callers ask them. The other application notices
/// nothing.
fn frozen_connections_of_one_application_delay_no_other() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let (frozen, sound) = (PgConnection::app(test_db.config()), PgConnection::app(test_db.config()));
    warm_up(&frozen, 4);
    let pids = postgres().backend_pids(database.name());
    warm_up(&sound, 4);
    // The callers ping their connections.
    test_db.lose_a_connection::<PgConnection>(&test_db.url());
    pids.iter().for_each(|pid| postgres().sigstop_backend(*pid));
    thread::scope(|scope| {
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| frozen.ping())).collect();
        assert!(wait::until(Duration::from_secs(5), || frozen.status().idle == 0), "{}", frozen.status());
        for _ in 0..20 {
            together(4, |_| sound.ping().unwrap());
        }
        // A new connection to the same server too.
        let third = PgConnection::app(test_db.config());
        third.ping().unwrap();
        assert!(callers.iter().all(|caller| !caller.is_finished()), "the other application did not wait for them");
        pids.iter().for_each(|pid| postgres().sigcont(*pid));
        callers.into_iter().for_each(|caller| drop(caller.join().unwrap()));
    });
    assert_eq!(sound.status().open, 4, "no sound connection was closed");
}

/// The process behind one idle connection stops, as the kernel of a machine that is out of memory lets it.
fn frozen_idle_connection_is_replaced_after_connect_timeout() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let file = TestDatabase::sqlite();
    let config = test_db.config().connect_timeout(Duration::from_secs(1)).acquire_timeout(Duration::from_secs(3));
    let (app, elsewhere) = (PgConnection::app(config.max_size(2)), SqliteConnection::app(file.config()));
    app.ping().unwrap();
    elsewhere.ping().unwrap();
    let pid = postgres().backend_pids(database.name())[0];
    // The caller pings the connection.
    test_db.lose_a_connection::<PgConnection>(&test_db.url());
    postgres().sigstop_backend(pid);
    let (answer, took) = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let started = Instant::now();
            (app.ping(), started.elapsed())
        });
        let mut pings = 0;
        while !caller.is_finished() {
            elsewhere.dispose().unwrap();
            elsewhere.ping().unwrap();
            pings += 1;
        }
        assert!(pings > 1, "another server's connects do not wait for it");
        caller.join().unwrap()
    });
    // The connection that does not answer is closed, and another serves the caller.
    answer.unwrap();
    assert!(
        took > Duration::from_millis(900) && took < Duration::from_millis(1500),
        "a ping ends at `connect_timeout`: {took:?}"
    );
    assert_eq!((app.status().idle, app.status().open, app.status().in_use), (1, 1, 0));
    postgres().sigcont(pid);
    assert!(wait::until(Duration::from_secs(2), || !postgres().backend_pids(database.name()).contains(&pid)));
    let both = [app.open_session().unwrap(), app.open_session().unwrap()];
    both.iter().for_each(|session| session.begin().unwrap());
    assert_eq!((app.status().in_use, app.status().open), (2, 2));
}

/// Plain r2d2 asks the frozen connection itself, without a deadline.
fn plain_r2d2_waits_for_a_frozen_backend_beyond_its_timeout() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let pool = Pool::builder().max_size(1).build(ConnectionManager::<PgConnection>::new(test_db.url())).unwrap();
    let pid = postgres().backend_pids(database.name())[0];
    postgres().sigstop_backend(pid);
    let frozen = Duration::from_secs(2);
    // Taken before the thread starts, because the pause below is measured from then on.
    let started = Instant::now();
    let took = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let _ = pool.get_timeout(Duration::from_millis(200));
            started.elapsed()
        });
        // The backend is frozen for that time.
        thread::sleep(frozen);
        postgres().sigcont(pid);
        caller.join().unwrap()
    });
    assert!(took >= frozen, "a deadline of 0.2 s: {took:?}");
}

/// Others have every slot but the one that is ours and in use.
fn server_full_error_names_the_other_clients() {
    let server = Postgres::start();
    server
        .try_ask(|conn| {
            diesel::sql_query(format!("CREATE ROLE reporter LOGIN IN ROLE {ROLE} PASSWORD 'x'")).execute(conn)
        })
        .unwrap();
    let theirs = format!("postgres://reporter:x@127.0.0.1:{}/{ROLE}?application_name=monthly%20report", server.port());
    let _others: Vec<_> = (0..16).map(|_| PgConnection::establish(&theirs).unwrap()).collect();
    let patience = Duration::from_millis(600);
    let config = || Config::new(server.url()).acquire_timeout(patience);
    let (holding, wanting) = (PgConnection::app(config()), PgConnection::app(config()));
    let session = holding.open_session().unwrap();
    session.begin().unwrap();
    let started = Instant::now();
    let error = wanting.ping().unwrap_err();
    let took = started.elapsed();
    assert!(
        error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::ServerFull),
        "{error}"
    );
    assert!(
        took > patience - Duration::from_millis(110) && took < patience + Duration::from_millis(200),
        "the wait for a full server ends at `acquire_timeout`: {took:?}"
    );
    let text = error.to_string();
    assert!(text.contains("monthly report 16") && text.contains("This process has 1 connection there"), "{text}");
    session.rollback().unwrap();
    wanting.ping().unwrap();
    // This process has no connection there, so no query can tell the other clients.
    wanting.dispose().unwrap();
    let last = PgConnection::establish(&theirs).unwrap();
    let error = wanting.ping().unwrap_err();
    assert!(error.to_string().contains("This process has 0 connections there"), "{error}");
    drop(last);
    wanting.ping().unwrap();
}

/// The network swallows everything while two connections are idle and one is waited for.
fn a_silent_network_delays_no_disposal<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = C::app(Config::new(test_db.url_at(proxy.port())));
    app.create_all().unwrap();
    warm_up(&app, 3);
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (app, proxy) = (&app, &proxy);
        let holder = scope.spawn(move || {
            let session = app.open_session().unwrap();
            session.begin().unwrap();
            tell.send(()).unwrap();
            assert!(wait::until(Duration::from_secs(5), || app.status().open == 1));
            let answer = session.number(ONE);
            session.commit().ok();
            answer
        });
        told.recv().unwrap();
        proxy.set(Mode::Silent);
        let patience = Duration::from_millis(400);
        let started = Instant::now();
        let error = app.dispose_within(patience).unwrap_err();
        let took = started.elapsed();
        assert_eq!(error.kind(), ErrorKind::StillInUse, "{error}");
        let report = error.dispose_report().expect("a report");
        assert_eq!((report.closed, report.still_out.len()), (2, 1), "{error}");
        assert!(
            took >= patience && took < patience + Duration::from_millis(300),
            "`dispose_within` keeps its limit: {took:?}"
        );
        proxy.set(Mode::Pass);
        holder.join().unwrap().unwrap();
    });
    assert!(app.dispose_report().unwrap().is_complete());
    test_db.assert_connections(0);
}
