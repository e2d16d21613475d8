//! A server that goes away as a whole, or stops answering: who is told, who waits, and who notices nothing.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use diesel_session::{App, Config, ConnectErrorKind, Error};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, logged};
use crate::on_every_server;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, Mariadb, Postgres, ROLE, enabled, postgres, wait};

on_every_server!(every_idle_one_is_ended, a_silent_network_delays_no_disposal);

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Opens `count` connections at once and leaves them idle.
fn warm_up<C: Conn>(app: &App<C>, count: usize) {
    let sessions: Vec<_> = (0..count).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    drop(sessions);
    assert!(app.status().idle >= count);
}

/// Ten connections idle in three applications, five in a transaction, and all of them die with the server.
fn killed_and_started_again<C: Conn>(url: &str, kill: impl FnOnce(), restart: impl FnOnce()) {
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
        assert!(matches!(&error, Error::ConnectionLost { in_transaction: true, .. }), "{error}");
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
        // Some have tried by now, and all of them wait.
        thread::sleep(Duration::from_millis(700));
        assert!(callers.iter().all(|caller| !caller.is_finished()));
        restart();
        let accepting = Instant::now();
        for caller in callers {
            let (count, at) = caller.join().unwrap().unwrap();
            assert_eq!(count, 0, "what was begun is gone");
            let late = at.saturating_duration_since(accepting);
            assert!(late < Duration::from_millis(500), "{late:?} after the server accepts");
        }
    });
    assert_eq!((told(" is unreachable: "), told(" is reachable again")), (1, 1), "each is told once");
    for session in &sessions {
        session.send(INSERT).unwrap();
        session.commit().unwrap();
    }
    assert_eq!(apps[2].open_session().unwrap().number(COUNT).unwrap(), 5);
    for app in &apps {
        // A connect that nobody waits for any more may be under way.
        wait::until(Duration::from_secs(2), || app.status().connecting == 0);
        let status = app.status();
        assert_eq!((status.in_use, status.waiting, status.connecting), (0, 0, 0), "{status}");
        assert!(app.dispose_report().unwrap().is_complete());
    }
}

#[test]
fn postgres_is_killed_and_started_again() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let server = std::cell::RefCell::new(Postgres::start());
    let url = server.borrow().url();
    killed_and_started_again::<PgConnection>(&url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}

#[test]
fn mysql_is_killed_and_started_again() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let server = std::cell::RefCell::new(Mariadb::start());
    let url = server.borrow().url();
    killed_and_started_again::<MysqlConnection>(&url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}

/// An administrator ends every session: a thousand statements later nobody has noticed.
fn every_idle_one_is_ended<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    warm_up(&app, 8);
    site.terminate_all();
    site.assert_connections(0);
    let outcomes = together(4, |_| {
        (0..250).filter_map(|_| app.context(|| C::db().session()?.number(COUNT)).err()).collect::<Vec<_>>()
    });
    assert!(outcomes.iter().all(Vec::is_empty), "{outcomes:?}");
    assert_eq!(app.status().in_use, 0);
}

/// A PostgreSQL server has other names, and this process has most of its connections under one of them.
#[test]
fn idle_connections_under_another_name_of_the_server_make_room() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let server = Postgres::start();
    let tcp = server.url();
    let names = [tcp.replace("127.0.0.1", "localhost"), server.socket_url(ROLE)];
    let config = |url: &str| Config::new(url).acquire_timeout(Duration::from_secs(3));
    for (number, name) in names.iter().enumerate() {
        let full = PgConnection::app(config(&tcp).max_size(17));
        // The first time nobody has connected under that name, so the server has not told what it is.
        let other = PgConnection::app(config(name));
        warm_up(&full, 17);
        assert_eq!(full.status().open, 17);
        other.ping().unwrap();
        assert!(full.status().open < 17, "{number}");
        full.dispose().unwrap();
        other.dispose().unwrap();
    }
}

/// All idle connections of one application are frozen, and four of its callers ask them. The other application notices nothing.
#[test]
fn frozen_connections_of_one_application_delay_no_other() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let Site::Postgres(database) = &site else { unreachable!() };
    let (frozen, sound) = (PgConnection::app(site.config()), PgConnection::app(site.config()));
    warm_up(&frozen, 4);
    let pids = postgres().backend_pids(database.name());
    warm_up(&sound, 4);
    // Longer than a connection is trusted without a sign of life.
    thread::sleep(Duration::from_millis(600));
    pids.iter().for_each(|pid| postgres().sigstop_backend(*pid));
    thread::scope(|scope| {
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| frozen.ping())).collect();
        thread::sleep(Duration::from_millis(100));
        assert!(callers.iter().all(|caller| !caller.is_finished()));
        for _ in 0..20 {
            let started = Instant::now();
            together(4, |_| sound.ping().unwrap());
            assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        }
        // A new connection to the same server too.
        let started = Instant::now();
        let third = PgConnection::app(site.config());
        third.ping().unwrap();
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
        pids.iter().for_each(|pid| postgres().sigcont(*pid));
        callers.into_iter().for_each(|caller| drop(caller.join().unwrap()));
    });
    assert_eq!(sound.status().open, 4, "no sound connection was closed");
}

/// The process behind one idle connection stops, as the kernel of a machine that is out of memory lets it.
#[test]
fn a_frozen_backend() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let Site::Postgres(database) = &site else { unreachable!() };
    let file = Site::sqlite();
    let config = site.config().connect_timeout(Duration::from_secs(1)).acquire_timeout(Duration::from_secs(3));
    let (app, elsewhere) = (PgConnection::app(config.max_size(2)), SqliteConnection::app(file.config()));
    app.ping().unwrap();
    elsewhere.ping().unwrap();
    let pid = postgres().backend_pids(database.name())[0];
    // Longer than a connection is trusted without a sign of life.
    thread::sleep(Duration::from_millis(600));
    postgres().sigstop_backend(pid);
    let (answer, took) = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let started = Instant::now();
            (app.ping(), started.elapsed())
        });
        while !caller.is_finished() {
            let started = Instant::now();
            elsewhere.dispose().unwrap();
            elsewhere.ping().unwrap();
            assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        }
        caller.join().unwrap()
    });
    // The connection that does not answer is closed, and another serves the caller.
    answer.unwrap();
    assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1500), "{took:?}");
    assert_eq!((app.status().idle, app.status().open, app.status().in_use), (1, 1, 0));
    postgres().sigcont(pid);
    assert!(wait::until(Duration::from_secs(2), || !postgres().backend_pids(database.name()).contains(&pid)));
    let both = [app.open_session().unwrap(), app.open_session().unwrap()];
    both.iter().for_each(|session| session.begin().unwrap());
    assert_eq!((app.status().in_use, app.status().open), (2, 2));
}

/// Plain r2d2 asks the frozen connection itself, without a deadline.
#[test]
fn control_a_frozen_backend() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let Site::Postgres(database) = &site else { unreachable!() };
    let pool = Pool::builder().max_size(1).build(ConnectionManager::<PgConnection>::new(site.url())).unwrap();
    let pid = postgres().backend_pids(database.name())[0];
    postgres().sigstop_backend(pid);
    let frozen = Duration::from_secs(2);
    let took = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            let started = Instant::now();
            let _ = pool.get_timeout(Duration::from_millis(200));
            started.elapsed()
        });
        thread::sleep(frozen);
        postgres().sigcont(pid);
        caller.join().unwrap()
    });
    assert!(took >= frozen, "a deadline of 0.2 s: {took:?}");
}

/// Others have every slot but the one that is ours and in use.
#[test]
fn a_server_that_others_have() {
    if !enabled(Kind::Postgres) {
        return;
    }
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
    assert!(matches!(&error, Error::Connect { kind: ConnectErrorKind::ServerFull, .. }), "{error}");
    assert!(took > patience - Duration::from_millis(110) && took < patience + Duration::from_millis(200), "{took:?}");
    let text = error.to_string();
    assert!(text.contains("monthly report 16") && text.contains("This process has 1 connection there"), "{text}");
    session.rollback().unwrap();
    wanting.ping().unwrap();
    // With nothing of ours there, nobody can be asked.
    wanting.dispose().unwrap();
    let last = PgConnection::establish(&theirs).unwrap();
    let error = wanting.ping().unwrap_err();
    assert!(error.to_string().contains("This process has 0 connections there"), "{error}");
    drop(last);
    wanting.ping().unwrap();
}

/// The network swallows everything while two connections are idle and one is waited for.
fn a_silent_network_delays_no_disposal<C: Conn>(site: &Site) {
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let app = C::app(Config::new(site.url_at(proxy.port())));
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
        let Error::StillInUse(report) = &error else { panic!("{error}") };
        assert_eq!((report.closed, report.still_out.len()), (2, 1), "{error}");
        assert!(took >= patience && took < patience + Duration::from_millis(300), "{took:?}");
        proxy.set(Mode::Pass);
        holder.join().unwrap().unwrap();
    });
    assert!(app.dispose_report().unwrap().is_complete());
    site.assert_connections(0);
}
