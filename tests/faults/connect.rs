//! How long a bad address takes, what it tells, and what an application costs that nobody uses.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Config, ConnectErrorKind, Database, Error};

use crate::fixtures::threads::together;
use crate::fixtures::{Any, Conn, Site, logged};
use crate::on_every_server;
use crate::support::listeners::{full_backlog_listener, silent_listener};
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, PASSWORD, enabled, process};

on_every_server!(refused_in_under_a_second, a_frozen_idle_connection);

const SECRET: &str = "hunter2hunter2";
const PATIENCE: Duration = Duration::from_millis(300);

/// The error of a first statement, and how long it took.
#[track_caller]
fn fails<C: Conn>(app: &App<C>) -> (Error, Duration) {
    let started = Instant::now();
    let error = app.ping().unwrap_err();
    let took = started.elapsed();
    let text = format!("{error} {error:?}");
    assert!(text.contains(app.id()), "{text}");
    for secret in [SECRET, PASSWORD, "s3cret%2Fpw%401"] {
        assert!(!text.contains(secret), "{text}");
    }
    (error, took)
}

fn refused_in_under_a_second<C: Conn>(site: &Site) {
    logged::listen();
    let url = site.url();
    let good = url.replace("app:s3cret%2Fpw%401@", "");
    assert_ne!(good, url);
    let (scheme, place) = good.split_once("://").unwrap();
    let at = |port: u16| format!("{scheme}://app:{SECRET}@127.0.0.1:{port}/app");
    let cases = [
        format!("{scheme}://app:{SECRET}@{place}"),
        url.replace(place, &format!("127.0.0.1:{}/app_nowhere", site.port())),
        at(1),
        format!("{scheme}://app:{SECRET}@no-such-host.invalid/app"),
    ];
    let mut refused = 0;
    for url in cases {
        let app = C::app(Config::new(url));
        let (error, took) = fails(&app);
        assert!(matches!(error, Error::Connect { .. }), "{error}");
        assert!(took < Duration::from_secs(1), "{took:?}: {error}");
        if let Error::Connect { kind: ConnectErrorKind::Authentication, .. } = &error {
            assert!(took < Duration::from_millis(100), "{took:?}: {error}");
            refused += 1;
        }
    }
    assert_eq!(refused, 1, "one of them has a wrong password");
    let started = Instant::now();
    let malformed = C::db().init_app("malformed", Config::new(format!("{scheme}://app:{SECRET}@host:x/db"))).map(drop);
    assert!(matches!(malformed.unwrap_err(), Error::InvalidConfig { .. }));
    assert!(started.elapsed() < Duration::from_millis(50));

    let lines = logged::lines();
    assert!(lines.iter().any(|line| line.contains("cannot connect")), "the log was listened to");
    for line in lines {
        assert!(!line.contains(SECRET) && !line.contains(PASSWORD) && !line.contains("s3cret%2Fpw"), "{line}");
    }
}

/// Nobody answers there: the call ends at `connect_timeout`, and other applications notice nothing.
fn never_answers<C: Conn>(scheme: &str, address: SocketAddr, working: &Site) {
    let config = Config::new(format!("{scheme}://app:{SECRET}@{address}/app")).connect_timeout(PATIENCE);
    let (app, neighbour) = (C::app(config), C::app(working.config()));
    neighbour.ping().unwrap();
    thread::scope(|scope| {
        let calls: Vec<_> = (0..6).map(|_| scope.spawn(|| fails(&app))).collect();
        let mut pings = 0;
        while calls.iter().any(|call| !call.is_finished()) {
            let started = Instant::now();
            neighbour.ping().unwrap();
            // A connection that is new each time: connecting is what must not be delayed.
            neighbour.dispose().unwrap();
            assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
            pings += 1;
        }
        assert!(pings > 1);
        for call in calls {
            let (error, took) = call.join().unwrap();
            assert!(matches!(error, Error::ConnectTimeout { .. }) && error.is_timeout(), "{error}");
            assert!((PATIENCE..PATIENCE * 2).contains(&took), "{took:?}");
        }
    });
    // All helpers of that server hang now: the next caller is told at once, or at its own deadline at the latest.
    let (error, took) = fails(&app);
    assert!(matches!(error, Error::ConnectTimeout { .. }), "{error}");
    assert!(took < PATIENCE * 2, "{took:?}");
    assert_eq!((app.status().open, app.status().in_use), (0, 0));
    neighbour.ping().unwrap();
}

#[test]
fn a_server_that_never_answers() {
    for kind in [Kind::Postgres, Kind::Mysql].into_iter().filter(|kind| enabled(*kind)) {
        let (address, listener) = silent_listener();
        match kind {
            Kind::Postgres => never_answers::<PgConnection>("postgres", address, &Site::postgres()),
            Kind::Mysql => never_answers::<MysqlConnection>("mysql", address, &Site::mysql()),
        }
        drop(listener);
        let (address, _listener) = silent_listener();
        match kind {
            Kind::Postgres => never_answers::<Any>("postgres", address, &Site::sqlite()),
            Kind::Mysql => never_answers::<Any>("mysql", address, &Site::sqlite()),
        }
    }
}

#[test]
fn a_server_with_a_full_backlog() {
    for kind in [Kind::Postgres, Kind::Mysql].into_iter().filter(|kind| enabled(*kind)) {
        let (address, _listener) = full_backlog_listener();
        match kind {
            Kind::Postgres => never_answers::<PgConnection>("postgres", address, &Site::postgres()),
            Kind::Mysql => never_answers::<MysqlConnection>("mysql", address, &Site::mysql()),
        }
    }
}

/// A connection that is idle when the network freezes: the next caller is not held up, and is served when that is over.
fn a_frozen_idle_connection<C: Conn>(site: &Site) {
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let config = Config::new(site.url_at(proxy.port())).connect_timeout(PATIENCE).acquire_timeout(PATIENCE * 2);
    let config = config.max_size(1);
    let app = C::app(config);
    app.ping().unwrap();
    proxy.set(Mode::Silent);
    // Longer than a connection is trusted without a sign of life.
    thread::sleep(Duration::from_millis(600));
    let started = Instant::now();
    let error = app.ping().unwrap_err();
    assert!(error.is_timeout(), "{error}");
    assert!(started.elapsed() < PATIENCE * 3, "{:?}", started.elapsed());
    // The connection that does not answer is closed, and the network does not let another come about.
    let error = app.ping().unwrap_err();
    assert!(matches!(error, Error::ConnectTimeout { .. }), "{error}");
    let error = app.create_all().unwrap_err();
    assert!(matches!(error, Error::ConnectTimeout { .. }), "{error}");
    proxy.set(Mode::Pass);
    app.ping().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
    site.assert_connections(0);
}

/// Resident memory in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn ten_thousand_applications_at_rest() {
    const COUNT: usize = 10_000;
    static DB: Database<PgConnection> = Database::without_migrations();
    // The address of nobody: whoever connected would fail.
    let config = || Config::new(format!("postgres://app:{SECRET}@127.0.0.1:1/app"));
    let before = (resident(), process::threads(), process::fds());
    let started = Instant::now();
    let apps: Vec<_> = (0..COUNT).map(|number| DB.init_app(format!("shop-{number}"), config()).unwrap()).collect();
    let took = started.elapsed();
    let each = resident().saturating_sub(before.0) / COUNT;
    assert!(each < 4096, "{each} bytes each");
    // What an earlier test left may have ended meanwhile.
    let after = (process::threads(), process::fds());
    assert!(after.0 <= before.1 && after.1 <= before.2, "{before:?}, {after:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert!(DB.status().iter().all(|status| status.open == 0));
    let found = together(4, |number| DB.app(&format!("shop-{number}")).unwrap().id().to_owned());
    assert_eq!(found, ["shop-0", "shop-1", "shop-2", "shop-3"]);
    for app in apps {
        DB.remove_app(app.id()).unwrap();
    }
}
