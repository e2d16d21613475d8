//! Connections that are lost: idle, in use, at `COMMIT`, and with the whole server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::pool::ConnectErrorKind;
use diesel_session::{Config, Error, ErrorKind, Result, Session};

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::{Mariadb, Postgres};

for_each_database!(every_server =>
    lost_idle_connections_are_replaced_without_an_error,
    connection_lost_in_a_transaction_requires_rollback,
    connection_lost_outside_of_a_transaction_requires_no_rollback,
    loss_of_a_foreign_connection_keeps_the_transaction_valid,
    retry_does_not_repeat_after_a_lost_connection,
    connection_lost_at_commit_is_commit_unknown,
);
for_each_database!(only mariadb =>
    session_reconnects_after_mariadb_was_killed,
    typed_statement_on_mariadb_reports_a_lost_connection,
);
for_each_database!(only postgres =>
    session_reconnects_after_postgres_was_killed,
    typed_statement_on_postgres_reports_a_lost_connection,
);

fn lost_idle_connections_are_replaced_without_an_error<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    // A connection that was used just now is checked out as it is. After the loss of another connection it is pinged
    // first.
    for pings in [false, true] {
        for idle in [1, 5] {
            let sessions: Vec<_> = (0..idle).map(|_| app.open_session().unwrap()).collect();
            sessions.iter().for_each(|session| session.begin().unwrap());
            drop(sessions);
            assert!(app.status().idle >= idle);
            test_db.terminate_all();
            test_db.assert_connections(0);
            if pings {
                test_db.lose_a_connection::<C>(&test_db.url());
            }
            for _ in 0..100 {
                app.context(|| C::db().session()?.number(COUNT)).unwrap();
            }
            test_db.terminate_all();
            test_db.assert_connections(0);
            if pings {
                test_db.lose_a_connection::<C>(&test_db.url());
            }
            app.run(|| C::db().session()?.send(INSERT)).unwrap();
        }
    }
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 4);
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
}

type Way<C> = fn(&Session<C>) -> Result<()>;

fn connection_lost_in_a_transaction_requires_rollback<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
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
        test_db.terminate_all();
        test_db.assert_connections(0);
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
    test_db.terminate_all();
    test_db.assert_connections(0);
    assert!(!session.with(|conn| Ok(conn.batch_execute(INSERT).is_ok())).unwrap());
    assert!(session.number(COUNT).unwrap_err().is_rollback_required());
    session.rollback().unwrap();
    assert_eq!(app.status().in_use, 0);
}

#[track_caller]
fn assert_lost(error: &Error, inside: bool, id: &str, after: u32) {
    assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{error}");
    // Only a statement in a transaction may be sent again without a look at the data.
    assert_eq!((error.app(), error.is_transient()), (Some(id), inside), "{error}");
    let at = error.location().expect("a location");
    assert!(at.file().ends_with("lost_connection.rs") && at.line() >= after, "{error}");
    assert!(error.is_connection_lost() && error.database_error().is_some() && !error.is_commit_unknown());
    assert!(error.code() == "DS308" && error.to_string().starts_with("DS308"), "{error}");
}

/// Statements of the query builder are written out for each connection type.
macro_rules! typed_statement_reports_a_lost_connection {
    ($name:ident, $connection:ty, $test_db:expr) => {
        fn $name() {
            diesel::table! { entries (id) { id -> Integer, author -> Text, message -> Text, } }
            let test_db = $test_db;
            let app = <$connection>::app(test_db.config());
            app.create_all().unwrap();
            let scope = app.scope().begin_eagerly();
            let outcome = scope.run(|| {
                let session = <$connection>::db().session()?;
                session.count(entries::table)?;
                test_db.terminate_all();
                test_db.assert_connections(0);
                assert_lost(&session.count(entries::table).unwrap_err(), true, app.id(), 1);
                assert!(session.count(entries::table).unwrap_err().is_rollback_required());
                Ok::<_, Error>(())
            });
            outcome.unwrap();
        }
    };
}

typed_statement_reports_a_lost_connection!(
    typed_statement_on_postgres_reports_a_lost_connection,
    PgConnection,
    TestDatabase::postgres()
);
typed_statement_reports_a_lost_connection!(
    typed_statement_on_mariadb_reports_a_lost_connection,
    MysqlConnection,
    TestDatabase::mariadb()
);

/// It is unknown whether the statement was carried out.
fn connection_lost_outside_of_a_transaction_requires_no_rollback<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    // The connection is sound when it is checked out, and is lost in the middle of a statement.
    let (own_number, sleep) = match test_db {
        TestDatabase::Postgres(_) => ("SELECT pg_backend_pid()::bigint AS number", "SELECT pg_sleep(60)"),
        _ => ("SELECT connection_id() AS number", "SELECT SLEEP(60)"),
    };
    app.scope()
        .autocommit()
        .run(|| {
            let session = C::db().session()?;
            let line = line!() + 1;
            let error = session.with(|conn| {
                let _ = conn.number(own_number)?;
                test_db.terminate_all();
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
fn loss_of_a_foreign_connection_keeps_the_transaction_valid<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let mut other = C::establish(&test_db.url_at(proxy.port())).unwrap();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    proxy.cut_all();
    let error = session.with(|_| other.batch_execute(INSERT)).unwrap_err();
    assert!(error.kind() == ErrorKind::Query, "{error}");
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
}

/// Whether the program may repeat it is for the program to say.
fn retry_does_not_repeat_after_a_lost_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let mut runs = 0;
    let lost = app.context(|| {
        C::db().session()?.retry(3, |session| {
            runs += 1;
            session.send(INSERT)?;
            test_db.terminate_all();
            test_db.assert_connections(0);
            session.send(INSERT)
        })
    });
    assert!(lost.unwrap_err().is_connection_lost());
    assert_eq!((runs, app.open_session().unwrap().number(COUNT).unwrap()), (1, 0));
}

/// A hook of a rollback was run where none may be.
static ROLLBACKS_TOLD: AtomicBool = AtomicBool::new(false);

fn connection_lost_at_commit_is_commit_unknown<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = C::app(Config::new(test_db.url_at(proxy.port())));
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
        assert!(error.kind() == ErrorKind::CommitUnknown && error.is_commit_unknown(), "{moment:?}: {error}");
        assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
        proxy.set(Mode::Pass);
        assert!(!session.in_transaction());
        assert_eq!(session.number(COUNT).unwrap(), rows, "{moment:?}");
        session.rollback().unwrap();

        session.send(INSERT).unwrap();
        session.rollback().unwrap();
        proxy.set(Mode::CutOn(b"COMMIT".to_vec(), moment));
        let scope = app.run(|| C::db().session()?.send(INSERT));
        assert!(scope.unwrap_err().is_commit_unknown());
        proxy.set(Mode::Pass);
        app.run(|| C::db().session()?.send("DELETE FROM entries")).unwrap();
    }
    assert_eq!(app.status().in_use, 0);
}

/// A server of the test's own, killed and started again on its port.
fn assert_session_reconnects<C: TestConnection>(url: String, kill: impl FnOnce(), restart: impl FnOnce()) {
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
    assert!(
        error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::Unreachable),
        "{error}"
    );
    // The server was reachable before, so the call waits for it.
    let waited = started.elapsed();
    assert!(
        waited > Duration::from_millis(700) && waited < Duration::from_millis(1300),
        "the wait for an unreachable server ends at `acquire_timeout`: {waited:?}"
    );
    restart();
    assert_eq!(session.number(COUNT).unwrap(), 0);
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    app.drop_all().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
}

fn session_reconnects_after_postgres_was_killed() {
    let server = std::cell::RefCell::new(Postgres::start());
    let url = server.borrow().url();
    assert_session_reconnects::<PgConnection>(url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}

fn session_reconnects_after_mariadb_was_killed() {
    let server = std::cell::RefCell::new(Mariadb::start());
    let url = server.borrow().url();
    assert_session_reconnects::<MysqlConnection>(url, || server.borrow_mut().kill9(), || server.borrow_mut().restart());
}
