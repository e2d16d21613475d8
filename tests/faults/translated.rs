//! Servers that speak German: what a refusal means cannot be read, so it is asked over a connection that is there.

use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{Config, ConnectErrorKind, Error};

use crate::fixtures::{Conn, unique};
use crate::support::{Kind, Mariadb, Postgres, ROLE, enabled, wait};

/// A server of the test's own, of which an ordinary role gets so many connections.
struct Server {
    url: String,
    slots: usize,
    /// What it says when it is full, and of a database that is not there.
    says: [&'static str; 2],
}

fn understood<C: Conn>(server: &Server) {
    let db = C::new_db();
    let config = || Config::new(&server.url).max_size(20).acquire_timeout(Duration::from_secs(2));
    let crowd = db.init_app(unique("crowd"), config()).unwrap();
    let sessions: Vec<_> = (0..server.slots).map(|_| crowd.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    let Err(ConnectionError::BadConnection(text)) = C::establish(&server.url).map(drop) else { panic!("it is full") };
    assert!(text.contains(server.says[0]), "{text}");

    // Full, and nothing of ours is idle: the text, at once, as nobody can be asked.
    let other = db.init_app(unique("other"), config()).unwrap();
    let started = Instant::now();
    let error = other.ping().unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(error.to_string().contains(server.says[0]), "{error}");

    // Full, and something of ours is idle: that goes.
    drop(sessions);
    assert_eq!(crowd.status().idle, server.slots);
    let started = Instant::now();
    other.ping().unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(crowd.status().idle < server.slots, "{}", crowd.status());
    db.dispose_all().unwrap();
    not_full::<C>(server);
}

/// Refused for another reason while there is room, and connections that could be asked.
fn not_full<C: Conn>(server: &Server) {
    let db = C::new_db();
    let idle = db.init_app(unique("idle"), Config::new(&server.url)).unwrap();
    idle.ping().unwrap();
    let nowhere = db.init_app(unique("nowhere"), Config::new(format!("{}_nowhere", server.url))).unwrap();
    let started = Instant::now();
    let error = nowhere.ping().unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(matches!(&error, Error::Connect { kind: ConnectErrorKind::Other, .. }), "{error}");
    assert!(error.to_string().contains(server.says[1]), "{error}");
    assert_eq!(idle.status().idle, 1, "it was asked, and stays");
    db.dispose_all().unwrap();
}

#[test]
fn postgres_speaks_german() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let server = Postgres::start_speaking("de_DE");
    let says = ["Nicht-Replikationsverbindungen reserviert", "existiert nicht"];
    understood::<PgConnection>(&Server { url: server.url(), slots: 17, says });
    none_answers(&server);
}

#[test]
fn mysql_speaks_german() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let server = Mariadb::start_with(&["--lc-messages=de_DE"]);
    let says = ["Zu viele Verbindungen", "Unbekannte Datenbank"];
    understood::<MysqlConnection>(&Server { url: server.url(), slots: 20, says });
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
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(error.to_string().contains("existiert nicht"), "{error}");
    idle.iter().for_each(|app| assert!(wait::until(Duration::from_secs(2), || app.status().suspect == 0)));
    idle.iter().for_each(|app| app.ping().unwrap());
    db.dispose_all().unwrap();
}
