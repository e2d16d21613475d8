//! A connection that is held for too long is logged, once, and once more when it comes back.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Config, Error};

use crate::fixtures::{Conn, Site, logged};
use crate::on_every_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, enabled, wait};

on_every_database!(is_told_once, is_not_told_in_time, is_told_of_each, is_switched_off, outlives_a_disposal);

const THRESHOLD: Duration = Duration::from_millis(300);
const TARGET: &str = "diesel_session::leak";

/// The lines about an application.
fn told(app: &str) -> Vec<String> {
    let app = format!("app `{app}`");
    logged::lines_with(TARGET).into_iter().filter(|line| line.contains(&app)).collect()
}

fn is_told_once<C: Conn>(site: &Site) {
    logged::listen();
    let app = C::app(site.config().leak_threshold(THRESHOLD));
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
        assert!(at - before < THRESHOLD * 3, "{:?} is late: {seen:?}", at - before);
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

/// However often the same connection is lent, and although somebody looks all the time.
fn is_not_told_in_time<C: Conn>(site: &Site) {
    logged::listen();
    let app = C::app(site.config().leak_threshold(THRESHOLD));
    let watched = C::app(site.config().leak_threshold(THRESHOLD));
    holding(&watched, || {
        let started = Instant::now();
        while started.elapsed() < THRESHOLD * 4 {
            holding(&app, || thread::sleep(THRESHOLD / 10));
        }
        assert_eq!(told(app.id()), Vec::<String>::new());
        assert_eq!(told(watched.id()).len(), 1, "there was somebody who looked");
    });
    assert_eq!((app.status().open, told(app.id())), (1, Vec::new()));
}

/// Runs `body` while a context of `app` holds a connection; readers of SQLite are in nobody's way.
fn holding<C: Conn>(app: &App<C>, body: impl FnOnce()) {
    let held = app.scope().read_only().run(|| {
        C::db().session()?.begin()?;
        body();
        Ok::<_, Error>(())
    });
    held.unwrap();
}

/// A second one and a third, taken while the first is known.
fn is_told_of_each<C: Conn>(site: &Site) {
    fn take<C: Conn>(app: &App<C>, number: usize) {
        if number > 3 {
            return;
        }
        let started = Instant::now();
        holding(app, || {
            assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == number), "{:?}", told(app.id()));
            assert!(started.elapsed() < THRESHOLD * 3, "{:?}", started.elapsed());
            take(app, number + 1);
        });
    }
    logged::listen();
    let app = C::app(site.config().leak_threshold(THRESHOLD));
    take(&app, 1);
    assert_eq!(told(app.id()).len(), 6);
}

fn is_switched_off<C: Conn>(site: &Site) {
    logged::listen();
    let (off, on) = (C::app(site.config().leak_threshold(None)), C::app(site.config().leak_threshold(THRESHOLD)));
    holding(&off, || {
        holding(&on, || assert!(wait::until(Duration::from_secs(5), || told(on.id()).len() == 1)));
    });
    assert_eq!((told(on.id()).len(), told(off.id()).len()), (2, 0));
}

/// What an application that was disposed of never got back.
fn outlives_a_disposal<C: Conn>(site: &Site) {
    logged::listen();
    let app = C::app(site.config().leak_threshold(THRESHOLD));
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    assert_eq!(app.dispose_report().unwrap().still_out.len(), 1);
    assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 1));
    session.rollback().unwrap();
    assert_eq!(told(app.id()).len(), 2);
    app.dispose().unwrap();
    site.assert_connections(0);
}

/// Who waits for a connect holds nothing that could have been forgotten.
#[test]
fn a_connect_is_no_leak() {
    if !enabled(Kind::Postgres) {
        return;
    }
    logged::listen();
    let site = Site::postgres();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let config = Config::new(site.url_at(proxy.port())).connect_timeout(THRESHOLD * 5);
    let app = PgConnection::app(config.leak_threshold(THRESHOLD));
    holding(&app, || {
        // There is one who holds a connection, so somebody looks.
        assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 1));
        proxy.set(Mode::Silent);
        let error = app.ping().unwrap_err();
        proxy.set(Mode::Pass);
        assert!(matches!(error, Error::ConnectTimeout { .. }), "{error}");
        assert_eq!(told(app.id()).len(), 1, "{:?}", told(app.id()));
    });
    assert!(wait::until(Duration::from_secs(5), || told(app.id()).len() == 2));
}

#[test]
fn absurd_thresholds() {
    for (threshold, told) in [(Duration::ZERO, "leak_threshold is zero"), (Duration::MAX, "longer than a year")] {
        let refused = SqliteConnection::db().init_app("absurd", Config::new(":memory:").leak_threshold(threshold));
        let error = refused.map(drop).unwrap_err();
        assert!(matches!(&error, Error::InvalidConfig { reason, .. } if reason.contains(told)), "{error}");
    }
}
