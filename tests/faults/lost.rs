//! Connections that are lost: idle, in use, at `COMMIT`, and with the whole server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{Config, ConnectErrorKind, Error, Result, Session};

use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak};
use crate::on_every_server;
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::{Kind, Mariadb, Postgres, enabled};

on_every_server!(
    idle_ones_are_replaced,
    in_the_middle_of_a_transaction,
    outside_of_a_transaction,
    another_connection_s_loss,
    not_run_again_by_retry,
    at_commit,
);

fn idle_ones_are_replaced<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    // Just used, when it is handed out as it is, and idle for longer, when it is asked for a sign of life first.
    for pause in [Duration::ZERO, Duration::from_millis(600)] {
        for idle in [1, 5] {
            let sessions: Vec<_> = (0..idle).map(|_| app.open_session().unwrap()).collect();
            sessions.iter().for_each(|session| session.begin().unwrap());
            drop(sessions);
            assert!(app.status().idle >= idle);
            site.terminate_all();
            site.assert_connections(0);
            thread::sleep(pause);
            for _ in 0..100 {
                app.context(|| C::db().session()?.number(COUNT)).unwrap();
            }
            site.terminate_all();
            site.assert_connections(0);
            thread::sleep(pause);
            app.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
        }
    }
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 4);
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
}

type Way<C> = fn(&Session<C>) -> Result<()>;

fn in_the_middle_of_a_transaction<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    let line = line!() + 2;
    // By raw SQL, by a transaction of the code that has the connection, and inside of a savepoint.
    let ways: [Way<C>; 3] = [
        |session| session.with(|conn| conn.number(COUNT)).map(drop),
        |session| session.with(|conn| conn.transaction(|conn| conn.batch_execute(INSERT))),
        |session| session.savepoint(|session| session.send(INSERT)),
    ];
    for lose in ways {
        session.send(INSERT).unwrap();
        site.terminate_all();
        site.assert_connections(0);
        let error = lose(&session).unwrap_err();
        assert_lost(&error, true, app.id(), line);
        assert!(
            error.is_transient() && error.to_string().contains("Call `rollback()`, then run all of it again"),
            "{error}"
        );
        assert!(session.number(COUNT).unwrap_err().is_rollback_required());
        let error = session.commit().unwrap_err();
        assert!(error.is_rollback_required(), "nothing is sent, so nothing is unknown: {error}");
        session.rollback().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), 0, "it goes on with another connection");
        session.rollback().unwrap();
    }
    // Swallowed by code that had the connection.
    session.send(INSERT).unwrap();
    site.terminate_all();
    site.assert_connections(0);
    assert!(!session.with(|conn| Ok(conn.batch_execute(INSERT).is_ok())).unwrap());
    assert!(session.number(COUNT).unwrap_err().is_rollback_required());
    session.rollback().unwrap();
    assert_eq!(app.status().in_use, 0);
}

#[track_caller]
fn assert_lost(error: &Error, inside: bool, id: &str, after: u32) {
    match error {
        Error::ConnectionLost { app, at, in_transaction, .. } => {
            assert_eq!((app.as_str(), *in_transaction), (id, inside), "{error}");
            assert!(at.file().ends_with("lost.rs") && at.line() >= after, "{error}");
        }
        other => panic!("{other}"),
    }
    assert!(error.is_connection_lost() && error.diesel().is_some() && !error.is_commit_unknown());
    assert!(error.code() == "DS308" && error.to_string().starts_with("DS308"), "{error}");
}

/// Statements of the query builder are written out for each connection type.
macro_rules! by_a_typed_statement {
    ($name:ident, $connection:ty, $kind:expr, $site:expr) => {
        #[test]
        fn $name() {
            diesel::table! { entries (id) { id -> Integer, author -> Text, message -> Text, } }
            if !enabled($kind) {
                return;
            }
            let site = $site;
            let app = <$connection>::app(site.config());
            app.create_all().unwrap();
            app.context(|| {
                let session = <$connection>::db().session()?;
                session.count(entries::table)?;
                site.terminate_all();
                site.assert_connections(0);
                assert_lost(&session.count(entries::table).unwrap_err(), true, app.id(), 1);
                assert!(session.count(entries::table).unwrap_err().is_rollback_required());
                Ok::<_, Error>(())
            })
            .unwrap();
        }
    };
}

by_a_typed_statement!(by_a_typed_statement_on_postgres, PgConnection, Kind::Postgres, Site::postgres());
by_a_typed_statement!(by_a_typed_statement_on_mysql, MysqlConnection, Kind::Mysql, Site::mysql());

/// Then nobody can say whether the statement was carried out.
fn outside_of_a_transaction<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    // The connection is sound when it is lent, and dies in the middle of a statement.
    let (own_number, sleep) = match site {
        Site::Postgres(_) => ("SELECT pg_backend_pid()::bigint AS number", "SELECT pg_sleep(60)"),
        _ => ("SELECT connection_id() AS number", "SELECT SLEEP(60)"),
    };
    app.scope()
        .autocommit()
        .run(|| {
            let session = C::db().session()?;
            let line = line!() + 1;
            let error = session.with(|conn| {
                let _ = conn.number(own_number)?;
                site.terminate_all();
                conn.batch_execute(sleep)
            });
            let error = error.unwrap_err();
            assert_lost(&error, false, app.id(), line);
            assert!(!error.is_transient() && error.to_string().contains("may have been carried out"), "{error}");
            assert_eq!(session.number(COUNT)?, 0, "there is no transaction to roll back");
            Ok::<_, Error>(())
        })
        .unwrap();
    assert_eq!(app.status().in_use, 0);
}

/// Code that has the session's connection may use others, and hand on what happened to them.
fn another_connection_s_loss<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let mut other = C::establish(&site.url_at(proxy.port())).unwrap();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    proxy.cut_all();
    let error = session.with(|_| other.batch_execute(INSERT)).unwrap_err();
    assert!(matches!(&error, Error::Query { .. }), "{error}");
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
}

/// Whether the program may repeat it is for the program to say.
fn not_run_again_by_retry<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    let mut runs = 0;
    let lost = app.context(|| {
        C::db().session()?.retry(3, |session| {
            runs += 1;
            session.send(INSERT)?;
            site.terminate_all();
            site.assert_connections(0);
            session.send(INSERT)
        })
    });
    assert!(lost.unwrap_err().is_connection_lost());
    assert_eq!((runs, app.open_session().unwrap().number(COUNT).unwrap()), (1, 0));
}

/// A hook of a rollback was run where none may be.
static ROLLBACKS_TOLD: AtomicBool = AtomicBool::new(false);

fn at_commit<C: Conn>(site: &Site) {
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let app = C::app(Config::new(site.url_at(proxy.port())));
    app.create_all().unwrap();
    for (moment, rows) in [(Moment::BeforeForwarding, 0), (Moment::BeforeAnswer, 1)] {
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        proxy.set(Mode::CutOn(b"COMMIT".to_vec(), moment));
        // Whether it happened is not known, so neither kind of hook runs.
        session.after_commit(|| panic!("told of a commit")).unwrap();
        session.after_rollback(|| ROLLBACKS_TOLD.store(true, Ordering::SeqCst)).unwrap();
        let line = line!() + 1;
        let error = session.commit().unwrap_err();
        assert!(!ROLLBACKS_TOLD.load(Ordering::SeqCst));
        assert!(matches!(&error, Error::CommitUnknown { .. }) && error.is_commit_unknown(), "{moment:?}: {error}");
        assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
        proxy.set(Mode::Pass);
        assert!(!session.in_transaction());
        assert_eq!(session.number(COUNT).unwrap(), rows, "{moment:?}");
        session.rollback().unwrap();

        session.send(INSERT).unwrap();
        session.rollback().unwrap();
        proxy.set(Mode::CutOn(b"COMMIT".to_vec(), moment));
        let scope = app.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT));
        assert!(scope.unwrap_err().is_commit_unknown());
        proxy.set(Mode::Pass);
        app.scope().commit_on_ok().run(|| C::db().session()?.send("DELETE FROM entries")).unwrap();
    }
    assert_eq!(app.status().in_use, 0);
}

/// A server of the test's own, killed and started again on its port.
fn a_server_dies<C: Conn>(url: String, kill: impl FnOnce(), restart: impl FnOnce()) {
    let app = C::app(Config::new(url).acquire_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    app.context(|| C::db().session()?.number(COUNT)).unwrap();
    kill();
    assert!(session.number(COUNT).unwrap_err().is_connection_lost());
    session.commit().unwrap_err();
    session.rollback().unwrap();
    let started = Instant::now();
    let error = session.number(COUNT).unwrap_err();
    assert!(matches!(&error, Error::Connect { kind: ConnectErrorKind::Unreachable, .. }), "{error}");
    // It was there a moment ago, so it is waited for.
    let waited = started.elapsed();
    assert!(waited > Duration::from_millis(700) && waited < Duration::from_millis(1300), "{waited:?}");
    restart();
    assert_eq!(session.number(COUNT).unwrap(), 0);
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    app.drop_all().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
}

#[test]
fn postgres_dies_and_comes_back() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let server = std::cell::RefCell::new(Postgres::start());
    let url = server.borrow().url();
    a_server_dies::<PgConnection>(url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}

#[test]
fn mysql_dies_and_comes_back() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let server = std::cell::RefCell::new(Mariadb::start());
    let url = server.borrow().url();
    a_server_dies::<MysqlConnection>(url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}
