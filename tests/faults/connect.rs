//! How long a connect to a wrong address takes, what its error says, and what an unused application costs.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::pool::ConnectErrorKind;
use diesel_session::{App, Config, Database, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{TestConnection, TestDatabase, logged};
use crate::for_each_database;
use crate::support::listeners::{full_backlog_listener, silent_listener};
use crate::support::proxy::{Mode, Proxy};
use crate::support::{PASSWORD, process};

for_each_database!(every_server =>
    refused_connect_fails_in_under_a_second,
    frozen_idle_connection_is_closed_and_replaced,
);
for_each_database!(postgres, mariadb, any_postgres, any_mariadb => connect_to_a_silent_server_ends_at_connect_timeout);
for_each_database!(postgres, mariadb => connect_to_a_full_backlog_ends_at_connect_timeout);

const SECRET: &str = "hunter2hunter2";
const PATIENCE: Duration = Duration::from_millis(300);

/// The error of a first statement, and how long it took.
#[track_caller]
fn fails<C: TestConnection>(app: &App<C>) -> (Error, Duration) {
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

fn refused_connect_fails_in_under_a_second<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let url = test_db.url();
    let good = url.replace("app:s3cret%2Fpw%401@", "");
    assert_ne!(good, url);
    let (scheme, place) = good.split_once("://").unwrap();
    let at = |port: u16| format!("{scheme}://app:{SECRET}@127.0.0.1:{port}/app");
    let cases = [
        format!("{scheme}://app:{SECRET}@{place}"),
        url.replace(place, &format!("127.0.0.1:{}/app_nowhere", test_db.port())),
        at(1),
        format!("{scheme}://app:{SECRET}@no-such-host.invalid/app"),
    ];
    let mut refused = 0;
    for url in cases {
        let app = C::app(Config::new(url));
        let (error, took) = fails(&app);
        assert!(error.kind() == ErrorKind::Connect, "{error}");
        assert!(took < Duration::from_secs(1), "a refused connect fails in under a second: {took:?}: {error}");
        if error.connect_error_kind() == Some(ConnectErrorKind::Authentication) {
            assert!(took < Duration::from_millis(100), "a wrong password is not tried again: {took:?}: {error}");
            refused += 1;
        }
    }
    assert_eq!(refused, 1, "one of them has a wrong password");
    let malformed = C::db().init_app("malformed", Config::new(format!("{scheme}://app:{SECRET}@host:x/db"))).map(drop);
    assert!(malformed.unwrap_err().kind() == ErrorKind::InvalidConfig);

    let lines = logged::lines();
    assert!(lines.iter().any(|line| line.contains("cannot connect")), "the log was listened to");
    for line in lines {
        assert!(!line.contains(SECRET) && !line.contains(PASSWORD) && !line.contains("s3cret%2Fpw"), "{line}");
    }
}

/// No server answers there: the call ends at `connect_timeout`, and other applications are not delayed.
fn assert_connect_timeout<C: TestConnection>(address: SocketAddr, working: &TestDatabase) {
    let url = working.url();
    let (scheme, _) = url.split_once("://").unwrap();
    let config = Config::new(format!("{scheme}://app:{SECRET}@{address}/app")).connect_timeout(PATIENCE);
    let (app, neighbour) = (C::app(config), C::app(working.config()));
    neighbour.ping().unwrap();
    thread::scope(|scope| {
        let calls: Vec<_> = (0..6).map(|_| scope.spawn(|| fails(&app))).collect();
        let mut pings = 0;
        while calls.iter().any(|call| !call.is_finished()) {
            neighbour.ping().unwrap();
            // A connection that is new each time: connecting is what must not be delayed.
            neighbour.dispose().unwrap();
            pings += 1;
        }
        assert!(pings > 1, "connects of another application do not wait for the calls");
        for call in calls {
            let (error, took) = call.join().unwrap();
            assert!(error.kind() == ErrorKind::ConnectTimeout && error.is_timeout(), "{error}");
            assert!((PATIENCE..PATIENCE * 2).contains(&took), "a call ends at `connect_timeout`: {took:?}");
        }
    });
    // All worker threads of that server hang now. The next call ends at its own deadline at the latest.
    let (error, took) = fails(&app);
    assert!(error.kind() == ErrorKind::ConnectTimeout, "{error}");
    assert!(took < PATIENCE * 2, "a call ends at `connect_timeout`: {took:?}");
    assert_eq!((app.status().open, app.status().in_use), (0, 0));
    neighbour.ping().unwrap();
}

fn connect_to_a_silent_server_ends_at_connect_timeout<C: TestConnection>(test_db: &TestDatabase) {
    let (address, _listener) = silent_listener();
    assert_connect_timeout::<C>(address, test_db);
}

fn connect_to_a_full_backlog_ends_at_connect_timeout<C: TestConnection>(test_db: &TestDatabase) {
    let (address, _listener) = full_backlog_listener();
    assert_connect_timeout::<C>(address, test_db);
}

/// A connection that is idle when the network freezes: the next caller is not held up, and is served when that is over.
fn frozen_idle_connection_is_closed_and_replaced<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let config = Config::new(test_db.url_at(proxy.port())).connect_timeout(PATIENCE).acquire_timeout(PATIENCE * 2);
    let config = config.max_size(1);
    let app = C::app(config);
    app.ping().unwrap();
    // The next checkout pings the idle connection.
    test_db.lose_a_connection::<C>(&test_db.url_at(proxy.port()));
    proxy.set(Mode::Silent);
    let started = Instant::now();
    let error = app.ping().unwrap_err();
    assert!(error.is_timeout(), "{error}");
    let took = started.elapsed();
    assert!(took < PATIENCE * 3, "a call ends at `acquire_timeout`: {took:?}");
    // The connection that does not answer is closed, and the network does not let another come about.
    let error = app.ping().unwrap_err();
    assert!(error.kind() == ErrorKind::ConnectTimeout, "{error}");
    let error = app.create_all().unwrap_err();
    assert!(error.kind() == ErrorKind::ConnectTimeout, "{error}");
    proxy.set(Mode::Pass);
    app.ping().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
    test_db.assert_connections(0);
}

/// Resident memory in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[test]
fn unused_applications_cost_no_thread_and_little_memory() {
    const COUNT: usize = 10_000;
    static DB: Database<PgConnection> = Database::without_migrations();
    // No server has that address, so a connect would fail.
    let config = || Config::new(format!("postgres://app:{SECRET}@127.0.0.1:1/app"));
    let before = (resident(), process::threads(), process::fds());
    let apps: Vec<_> = (0..COUNT).map(|number| DB.init_app(format!("shop-{number}"), config()).unwrap()).collect();
    let each = resident().saturating_sub(before.0) / COUNT;
    assert!(each < 4096, "{each} bytes each");
    // What an earlier test left may have ended meanwhile.
    let after = (process::threads(), process::fds());
    assert!(after.0 <= before.1 && after.1 <= before.2, "{before:?}, {after:?}");
    assert!(DB.status().iter().all(|status| status.open == 0));
    let found = together(4, |number| DB.app(&format!("shop-{number}")).unwrap().id().to_owned());
    assert_eq!(found, ["shop-0", "shop-1", "shop-2", "shop-3"]);
    for app in apps {
        DB.remove_app(app.id()).unwrap();
    }
}
