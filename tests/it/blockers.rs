//! A schema operation that cannot get its locks says who has them.

use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::{Blocker, Config, Error};

use crate::fixtures::{Conn, Site, Speak, shown};
use crate::on_every_server;
use crate::support::{Kind, enabled, mariadb, postgres, wait};

on_every_server!(a_stranger_in_a_transaction, sessions_of_ours, what_is_idle_is_in_nobodys_way);

const READ: &str = "SELECT count(*) AS number FROM entries /* to be found again */";

/// An application with its schema, which waits a second for a lock.
fn owner<C: Conn>(site: &Site) -> crate::fixtures::Guard<C> {
    let app = C::app(site.config().lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    app
}

/// Who was in the way of `drop_all`; the schema is as it was.
#[track_caller]
fn in_the_way<C: Conn>(app: &diesel_session::App<C>) -> (Vec<Blocker>, String) {
    let error = app.drop_all().unwrap_err();
    let text = error.to_string();
    let Error::LockTimeout { operation: "drop_all", blockers, left, .. } = &error else { panic!("{text}") };
    assert_eq!(left, "The schema is as it was.");
    assert!(app.migrations().unwrap().iter().all(|one| one.applied));
    assert_eq!(app.status().in_use, 0);
    (blockers.to_vec(), text)
}

fn session_number(site: &Site) -> &'static str {
    match site {
        Site::Postgres(_) => "SELECT pg_backend_pid()::bigint AS number",
        Site::Mysql(_) => "SELECT CONNECTION_ID() AS number",
        Site::Sqlite(_) => unreachable!("it has no sessions"),
    }
}

fn a_stranger_in_a_transaction<C: Conn>(site: &Site) {
    let app = owner::<C>(site);
    let url = match site {
        Site::Postgres(_) => format!("{}?application_name=nightly-report", site.url()),
        _ => site.url(),
    };
    let mut stranger = C::establish(&url).unwrap();
    let number = stranger.number(session_number(site)).unwrap();
    stranger.batch_execute("BEGIN").unwrap();
    stranger.number(READ).unwrap();

    let (blockers, text) = in_the_way(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert!(blocker.holder.is_none(), "{text}");
    let waited = blocker.state_for.expect("it tells since when");
    assert!((Duration::from_millis(900)..Duration::from_secs(60)).contains(&waited), "{text}");
    match site {
        Site::Postgres(_) => {
            assert_eq!((blocker.name.as_str(), blocker.state.as_str()), ("nightly-report", "idle in transaction"));
            assert_eq!(blocker.last_query.as_deref(), Some(READ));
        }
        _ => {
            assert_eq!(
                (blocker.name.as_str(), blocker.state.as_str()),
                ("app@127.0.0.1", "idle, perhaps in transaction")
            );
        }
    }
    for part in [&format!("server session {number} ({})", blocker.name), &blocker.state] {
        assert!(text.contains(part.as_str()), "{part} in {text}");
    }
    drop(stranger);
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

/// Of another application, and of another database object, which knows the server by another name.
fn sessions_of_ours<C: Conn>(site: &Site) {
    let app = owner::<C>(site);
    let (elsewhere, alias) = (C::new_db(), site.url().replace("127.0.0.1", "127.1"));
    assert_ne!(alias, site.url());
    let first = C::app(site.config());
    let second = elsewhere.init_app("elsewhere", Config::new(alias)).unwrap();
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (second, report) = (&second, tell);
        let there = std::thread::Builder::new().name("night shift".into());
        there
            .spawn_scoped(scope, move || {
                let session = second.open_session().unwrap();
                let line = line!() + 1;
                session.send("SELECT 1").unwrap();
                report
                    .send((session.number(READ).and_then(|_| session.number(session_number(site))).unwrap(), line))
                    .unwrap();
                // Until the end of the test, however it ends.
                let _ = ended.recv();
            })
            .unwrap();
        let (number, line) = told.recv().unwrap();
        let session = first.open_session().unwrap();
        session.number(READ).unwrap();
        let mine = session.number(session_number(site)).unwrap();

        let status = second.status();
        assert_eq!(status.holders[0].session(), Some(number.try_into().unwrap()));
        assert!(status.to_string().contains(&format!("server session {number}")), "{status}");

        let (blockers, text) = in_the_way(&app);
        assert_eq!(blockers.len(), 2, "{text}");
        let find = |number: i64| blockers.iter().find(|one| one.session == Some(number.try_into().unwrap())).unwrap();
        let (here, there) = (find(mine).holder.as_ref().unwrap(), find(number).holder.as_ref().unwrap());
        assert_eq!((here.app(), there.app()), (first.id(), "elsewhere"));
        assert_eq!((there.thread_name(), there.in_transaction()), ("night shift", true));
        assert_eq!(shown(there.place()), format!("{}:{line}", file!()));
        for part in ["app `elsewhere`", "night shift", &format!("{}:{line}", file!()), first.id()] {
            assert!(text.contains(part), "{part} in {text}");
        }
        session.rollback().unwrap();
        drop(end);
    });
    elsewhere.dispose_all().unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

/// Connections in pools of this process, and the number of one that is gone is nobody's.
fn what_is_idle_is_in_nobodys_way<C: Conn>(site: &Site) {
    let app = owner::<C>(site);
    let (idle, busy) = (C::app(site.config()), C::app(site.config()));
    let sessions: Vec<_> = (0..3).map(|_| idle.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| assert_eq!(session.number(READ).unwrap(), 0));
    drop(sessions);
    assert_eq!(idle.status().idle, 3);
    let session = busy.open_session().unwrap();
    session.number(READ).unwrap();
    let number = session.number(session_number(site)).unwrap();
    let (blockers, text) = in_the_way(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert_eq!(blocker.holder.as_ref().unwrap().app(), busy.id());
    session.rollback().unwrap();
    app.drop_all().unwrap();
}

/// Those who came while `drop_all` waited had to wait behind it: only the first is in the way.
#[test]
fn postgres_names_no_victims() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let app = owner::<PgConnection>(&site);
    let mut stranger = PgConnection::establish(&format!("{}?application_name=culprit", site.url())).unwrap();
    stranger.batch_execute("BEGIN").unwrap();
    stranger.number(READ).unwrap();
    let url = format!("{}?application_name=victim", site.url());
    std::thread::scope(|scope| {
        let dropping = scope.spawn(|| in_the_way(&app));
        let mut observer = PgConnection::establish(&site.url()).unwrap();
        let waiting = "SELECT count(*) AS number FROM pg_locks WHERE NOT granted AND locktype = 'relation'";
        assert!(wait::until(Duration::from_secs(5), || observer.number(waiting).unwrap() == 1));
        let victim = scope.spawn(|| {
            let mut victim = PgConnection::establish(&url).unwrap();
            victim.batch_execute("BEGIN").unwrap();
            victim.number(READ).unwrap();
            victim
        });
        let (blockers, text) = dropping.join().unwrap();
        assert_eq!(blockers.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["culprit"], "{text}");
        drop((victim.join().unwrap(), stranger));
    });
    app.drop_all().unwrap();
}

/// Another role's session is shown by number and name; what it does is not ours to see.
#[test]
fn postgres_hides_what_others_do() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let app = owner::<PgConnection>(&site);
    let Site::Postgres(database) = &site else { unreachable!("it is") };
    let role = format!("backup_{}", database.name());
    let mut admin = postgres().admin();
    admin.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'x'")).unwrap();
    let mut owner = PgConnection::establish(&site.url()).unwrap();
    owner.batch_execute(&format!("GRANT SELECT ON entries TO {role}")).unwrap();
    let place = format!("127.0.0.1:{}/{}", site.port(), database.name());
    let mut other = PgConnection::establish(&format!("postgres://{role}:x@{place}?application_name=backup")).unwrap();
    other.batch_execute("BEGIN").unwrap();
    other.number(READ).unwrap();
    let number = other.number(session_number(&site)).unwrap();
    let (blockers, text) = in_the_way(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!((blocker.session, blocker.name.as_str()), (Some(number.try_into().unwrap()), "backup"));
    assert_eq!((blocker.state.as_str(), blocker.state_for), ("", None));
    assert!(!text.contains("to be found again"), "{text}");
    drop(other);
    app.drop_all().unwrap();
    admin.batch_execute(&format!("DROP ROLE {role}")).unwrap();
}

/// Who may see all processes is told which of them is in a transaction, and what it did last.
#[test]
fn mysql_tells_more_to_those_who_may_see_it() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let site = Site::mysql();
    let Site::Mysql(database) = &site else { unreachable!("it is") };
    let name = database.name();
    let mut admin = mariadb().admin();
    for sql in [
        format!("CREATE USER 'seer_{name}'@'%' IDENTIFIED BY 'x'"),
        format!("GRANT ALL ON {name}.* TO 'seer_{name}'@'%'"),
        format!("GRANT PROCESS ON *.* TO 'seer_{name}'@'%'"),
        format!("GRANT SELECT ON performance_schema.* TO 'seer_{name}'@'%'"),
        "UPDATE performance_schema.setup_consumers SET enabled = 'YES' WHERE name LIKE 'events_statements_%'".into(),
    ] {
        admin.batch_execute(&sql).unwrap();
    }
    let url = format!("mysql://seer_{name}:x@127.0.0.1:{}/{name}", site.port());
    let app = MysqlConnection::app(Config::new(url).lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    let mut idle = MysqlConnection::establish(&site.url()).unwrap();
    idle.number(READ).unwrap();
    let mut stranger = MysqlConnection::establish(&site.url()).unwrap();
    let number = stranger.number(session_number(&site)).unwrap();
    stranger.batch_execute("BEGIN").unwrap();
    // As a text: of a prepared statement this server keeps none.
    stranger.batch_execute(READ).unwrap();

    let (blockers, text) = in_the_way(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert_eq!((blocker.name.as_str(), blocker.state.as_str()), ("app@127.0.0.1", "idle in transaction"));
    assert_eq!(blocker.last_query.as_deref(), Some(READ), "{text}");
    drop(stranger);
    app.drop_all().unwrap();
    app.dispose().unwrap();
    admin.batch_execute(&format!("DROP USER 'seer_{name}'@'%'")).unwrap();
}

/// The writer before it in the queue of this process.
#[test]
fn sqlite_names_the_writer_before_it() {
    let site = Site::sqlite();
    let app = SqliteConnection::app(site.config().lock_timeout(Duration::from_millis(300)));
    app.create_all().unwrap();
    let other = SqliteConnection::app(site.config());
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = &other;
        scope.spawn(move || {
            let session = other.open_session().unwrap();
            let line = line!() + 1;
            session.send(crate::fixtures::INSERT).unwrap();
            tell.send(line).unwrap();
            let _ = ended.recv();
        });
        let line = told.recv().unwrap();
        let error = app.drop_all().unwrap_err();
        drop(end);
        let Error::LockTimeout { blockers, .. } = &error else { panic!("{error}") };
        assert_eq!(blockers.len(), 1, "{error}");
        let holder = blockers[0].holder.as_ref().unwrap();
        assert_eq!((holder.app(), holder.session()), (other.id(), None));
        assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
    });
    app.drop_all().unwrap();
}
