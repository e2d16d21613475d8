//! Servers with messages in other languages: refusals, deadlocks and lock timeouts keep their meaning.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::pool::ConnectErrorKind;
use diesel_session::testing::{TestIsolation, TestSetup};
use diesel_session::{Config, ErrorKind};

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, unique};
use crate::for_each_database;
use crate::support::{Mariadb, Postgres, ROLE, wait};

for_each_database!(only mariadb =>
    mariadb_errors_keep_their_meaning_in_every_language,
    full_server_is_recognised_in_german_on_mariadb,
);
for_each_database!(only postgres =>
    postgres_errors_keep_their_meaning_in_every_language,
    full_server_is_recognised_in_german_on_postgres,
);

/// A server of the test's own, of which an ordinary role gets so many connections.
struct Server {
    url: String,
    slots: usize,
    /// What it says when it is full, and of a database that is not there.
    says: [&'static str; 2],
}

fn assert_full_server_is_recognised<C: TestConnection>(server: &Server) {
    let db = C::new_db();
    let config = || Config::new(&server.url).max_size(20).acquire_timeout(Duration::from_secs(2));
    let crowd = db.init_app(unique("crowd"), config()).unwrap();
    let sessions: Vec<_> = (0..server.slots).map(|_| crowd.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    let Err(ConnectionError::BadConnection(text)) = C::establish(&server.url).map(drop) else { panic!("it is full") };
    assert!(text.contains(server.says[0]), "{text}");

    // Full, and nothing of ours is idle.
    let other = db.init_app(unique("other"), config()).unwrap();
    let error = other.ping().unwrap_err();
    assert!(
        error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::ServerFull),
        "{error}"
    );
    assert!(error.to_string().contains(server.says[0]), "{error}");

    // Full, and something of ours is idle: that goes.
    drop(sessions);
    assert_eq!(crowd.status().idle, server.slots);
    other.ping().unwrap();
    assert!(crowd.status().idle < server.slots, "{}", crowd.status());
    db.dispose_all().unwrap();
    not_full::<C>(server);
}

/// Refused for another reason while there is room, and connections that could be asked.
fn not_full<C: TestConnection>(server: &Server) {
    let db = C::new_db();
    let idle = db.init_app(unique("idle"), Config::new(&server.url)).unwrap();
    idle.ping().unwrap();
    let nowhere = db.init_app(unique("nowhere"), Config::new(format!("{}_nowhere", server.url))).unwrap();
    let started = Instant::now();
    let error = nowhere.ping().unwrap_err();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1), "a refusal that no wait changes is returned at once: {took:?}");
    assert!(
        error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::UnknownDatabase),
        "{error}"
    );
    assert!(error.to_string().contains(server.says[1]), "{error}");
    assert_eq!(idle.status().idle, 1, "it stays");
    db.dispose_all().unwrap();
}

#[track_caller]
fn kind_of<C: TestConnection>(url: &str) -> ConnectErrorKind {
    let db = C::new_db();
    let app = db.init_app(unique("app"), Config::new(url)).unwrap();
    app.ping().unwrap_err().connect_error_kind().expect("a failed connect")
}

/// What is told apart by texts, at a server that speaks any language.
fn assert_errors_keep_their_meaning<C: Sessions>(url: &str) {
    // A wrong password, role and database.
    let (start, database) = url.rsplit_once('/').unwrap();
    let (credentials, server) = start.rsplit_once('@').unwrap();
    let role = credentials.split_once("://").unwrap().1.split(':').next().unwrap();
    let with = |role: &str, password: &str, database: &str| {
        let scheme = credentials.split("://").next().unwrap();
        format!("{scheme}://{role}:{password}@{server}/{database}")
    };
    assert_eq!(kind_of::<C>(&with(role, "wrong", database)), ConnectErrorKind::Authentication);
    assert_eq!(kind_of::<C>(&with("nobody_at_all", "wrong", database)), ConnectErrorKind::Authentication);
    assert_eq!(kind_of::<C>(&format!("{url}_nowhere")), ConnectErrorKind::UnknownDatabase);

    // A deadlock is run again.
    let app = C::app(Config::new(url).lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    app.run(|| C::db().session()?.send(&format!("{INSERT}, ('Bob', 'hello')"))).unwrap();
    let mut own = C::establish(url).unwrap();
    let first = own.number("SELECT count(*) + min(id) - count(*) AS number FROM entries").unwrap();
    let patient = C::app(Config::new(url));
    let both_have_one = Barrier::new(2);
    let runs = AtomicUsize::new(0);
    let cross = |mine: i64, yours: i64| {
        let update = |id: i64| format!("UPDATE entries SET author = 'Eve' WHERE id = {id}");
        patient.context(|| {
            let mut first = true;
            C::db().session()?.retry(3, |session| {
                runs.fetch_add(1, Ordering::SeqCst);
                session.send(&update(mine))?;
                if std::mem::take(&mut first) {
                    both_have_one.wait();
                }
                session.send(&update(yours))
            })
        })
    };
    std::thread::scope(|threads| {
        let other = threads.spawn(|| cross(first, first + 1));
        cross(first + 1, first).unwrap();
        other.join().unwrap().unwrap();
    });
    assert_eq!(runs.into_inner(), 3, "one of the two was the victim, once");
    assert_eq!(own.number("SELECT count(*) AS number FROM entries WHERE author = 'Eve'").unwrap(), 2);

    // A schema operation that waits for a lock in vain names the holder of the lock.
    own.batch_execute("BEGIN").unwrap();
    own.number(COUNT).unwrap();
    let error = app.drop_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    assert!(error.to_string().contains("drop_all"), "{error}");
    let blockers = error.blockers().expect("blockers");
    assert_eq!(blockers.len(), 1, "{error}");
    drop(own);

    // The end of a connection is a loss.
    let session = patient.open_session().unwrap();
    session.send(INSERT).unwrap();
    let number = session.number(C::OWN_NUMBER).unwrap();
    let mut killer = C::establish(url).unwrap();
    killer.batch_execute(&C::kill(number)).unwrap();
    assert!(wait::until(Duration::from_secs(2), || {
        let count = killer.number(&format!("SELECT ({}) AS number", C::alive(number)));
        count.unwrap() == 0
    }));
    let error = session.number(COUNT).unwrap_err();
    assert!(error.is_connection_lost(), "{error}");
    session.rollback().unwrap();
    drop(session);
    drop(killer);

    // The kit: a test in a transaction, whose database has to be made first, and one in a database of its own.
    for isolation in [TestIsolation::Rollback, TestIsolation::Database, TestIsolation::Rollback] {
        // The database of the URL need not be there.
        let config = Config::new(format!("{url}_nowhere"));
        let test = TestSetup::of(C::db()).config(config).isolation(isolation).start().unwrap();
        test.context(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            session.commit()
        })
        .unwrap();
        test.finish().unwrap();
    }
    app.drop_all().unwrap();
}

/// A kind of server whose sessions can be counted and ended in SQL.
trait Sessions: TestConnection {
    const OWN_NUMBER: &str;

    fn kill(number: i64) -> String;

    fn alive(number: i64) -> String;
}

impl Sessions for PgConnection {
    const OWN_NUMBER: &str = "SELECT pg_backend_pid()::bigint AS number";

    fn kill(number: i64) -> String {
        format!("SELECT pg_terminate_backend({number})")
    }

    fn alive(number: i64) -> String {
        format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {number}")
    }
}

impl Sessions for MysqlConnection {
    const OWN_NUMBER: &str = "SELECT connection_id() AS number";

    fn kill(number: i64) -> String {
        format!("KILL {number}")
    }

    fn alive(number: i64) -> String {
        format!("SELECT count(*) FROM information_schema.processlist WHERE id = {number}")
    }
}

fn postgres_errors_keep_their_meaning_in_every_language() {
    for language in ["de_DE", "ja_JP", "ru_RU", "fr_FR"] {
        let server = Postgres::start_speaking(language);
        let Err(ConnectionError::BadConnection(text)) = PgConnection::establish(&format!("{}_no", server.url())) else {
            panic!("there is no such database")
        };
        assert!(!text.contains("does not exist"), "{language}: {text}");
        assert_errors_keep_their_meaning::<PgConnection>(&server.url());
    }
}

fn mariadb_errors_keep_their_meaning_in_every_language() {
    for language in ["de_DE", "ja_JP", "ru_RU"] {
        let server = Mariadb::start_with(&[&format!("--lc-messages={language}")]);
        let Err(ConnectionError::BadConnection(text)) = MysqlConnection::establish(&format!("{}_no", server.url()))
        else {
            panic!("there is no such database")
        };
        assert!(!text.contains("Unknown database"), "{language}: {text}");
        assert_errors_keep_their_meaning::<MysqlConnection>(&server.url());
    }
}

fn full_server_is_recognised_in_german_on_postgres() {
    let server = Postgres::start_speaking("de_DE");
    let says = ["Nicht-Replikationsverbindungen reserviert", "existiert nicht"];
    assert_full_server_is_recognised::<PgConnection>(&Server { url: server.url(), slots: 17, says });
    none_answers(&server);
}

fn full_server_is_recognised_in_german_on_mariadb() {
    let server = Mariadb::start_with(&["--lc-messages=de_DE"]);
    let says = ["Zu viele Verbindungen", "Unbekannte Datenbank"];
    assert_full_server_is_recognised::<MysqlConnection>(&Server { url: server.url(), slots: 20, says });
}

/// Refused for another reason, and none of those that could be asked answers.
fn none_answers(server: &Postgres) {
    let db = PgConnection::new_db();
    let idle: Vec<_> = (0..6).map(|_| db.init_app(unique("idle"), Config::new(server.url())).unwrap()).collect();
    idle.iter().for_each(|app| app.ping().unwrap());
    let frozen = server.backend_pids(ROLE);
    assert_eq!(frozen.len(), 6);
    frozen.iter().for_each(|pid| server.sigstop_backend(*pid));
    let nowhere = db.init_app(unique("nowhere"), Config::new(format!("{}_nowhere", server.url()))).unwrap();
    let started = Instant::now();
    let error = nowhere.ping().unwrap_err();
    let took = started.elapsed();
    frozen.iter().for_each(|pid| server.sigcont(*pid));
    assert!(took < Duration::from_secs(1), "a refusal that no wait changes is returned at once: {took:?}");
    assert!(error.to_string().contains("existiert nicht"), "{error}");
    idle.iter().for_each(|app| app.ping().unwrap());
    db.dispose_all().unwrap();
}
