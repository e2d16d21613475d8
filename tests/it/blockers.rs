//! A schema operation that cannot get its locks names the sessions that hold them.

use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::migrations::Blocker;
use diesel_session::{Config, ErrorKind};

use crate::fixtures::{SessionExt, TestConnection, TestDatabase, shown};
use crate::for_each_database;
use crate::support::{mariadb, postgres, wait};

for_each_database!(every_server =>
    blockers_name_a_transaction_of_another_program,
    blockers_name_the_sessions_of_this_process,
    idle_connection_is_no_blocker,
);
for_each_database!(only mariadb => blockers_on_mariadb_show_more_to_a_privileged_account);
for_each_database!(only postgres =>
    blockers_on_postgres_omit_waiting_sessions,
    blockers_on_postgres_hide_statements_of_other_roles,
);

const READ: &str = "SELECT count(*) AS number FROM entries /* to be found again */";

/// An application with its schema, which waits a second for a lock.
fn owner<C: TestConnection>(test_db: &TestDatabase) -> crate::fixtures::RegisteredApp<C> {
    let app = C::app(test_db.config().lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    app
}

/// The blockers of `drop_all`; the schema is unchanged.
#[track_caller]
fn blockers_of_drop_all<C: TestConnection>(app: &diesel_session::App<C>) -> (Vec<Blocker>, String) {
    let error = app.drop_all().unwrap_err();
    let text = error.to_string();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    assert!(error.to_string().contains("drop_all"), "{error}");
    let blockers = error.blockers().expect("blockers");
    assert!(error.to_string().contains("The schema is as it was."), "{error}");
    assert!(app.migrations().unwrap().iter().all(|one| one.applied));
    assert_eq!(app.status().in_use, 0);
    (blockers.to_vec(), text)
}

fn session_number(test_db: &TestDatabase) -> &'static str {
    match test_db {
        TestDatabase::Postgres(_) => "SELECT pg_backend_pid()::bigint AS number",
        TestDatabase::Mariadb(_) => "SELECT CONNECTION_ID() AS number",
        TestDatabase::Sqlite(_) => unreachable!("it has no sessions"),
    }
}

fn blockers_name_a_transaction_of_another_program<C: TestConnection>(test_db: &TestDatabase) {
    let app = owner::<C>(test_db);
    let url = match test_db {
        TestDatabase::Postgres(_) => format!("{}?application_name=nightly-report", test_db.url()),
        _ => test_db.url(),
    };
    let mut other_connection = C::establish(&url).unwrap();
    let number = other_connection.number(session_number(test_db)).unwrap();
    let began = Instant::now();
    other_connection.batch_execute("BEGIN").unwrap();
    other_connection.number(READ).unwrap();

    let (blockers, text) = blockers_of_drop_all(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert!(blocker.holder.is_none(), "{text}");
    let waited = blocker.state_for.expect("it tells since when");
    // MariaDB counts in seconds.
    let limits = Duration::from_millis(900)..=began.elapsed() + Duration::from_secs(1);
    assert!(limits.contains(&waited), "{text}");
    match test_db {
        TestDatabase::Postgres(_) => {
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
    drop(other_connection);
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

/// Of another application, and of another database object, which knows the server by another name.
fn blockers_name_the_sessions_of_this_process<C: TestConnection>(test_db: &TestDatabase) {
    let app = owner::<C>(test_db);
    let (elsewhere, alias) = (C::new_db(), test_db.url().replace("127.0.0.1", "127.1"));
    assert_ne!(alias, test_db.url());
    let first = C::app(test_db.config());
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
                    .send((session.number(READ).and_then(|_| session.number(session_number(test_db))).unwrap(), line))
                    .unwrap();
                // Until the end of the test, however it ends.
                let _ = ended.recv();
            })
            .unwrap();
        let (number, line) = told.recv().unwrap();
        let session = first.open_session().unwrap();
        session.number(READ).unwrap();
        let mine = session.number(session_number(test_db)).unwrap();

        let status = second.status();
        assert_eq!(status.holders[0].session(), Some(number.try_into().unwrap()));
        assert!(status.to_string().contains(&format!("server session {number}")), "{status}");

        let (blockers, text) = blockers_of_drop_all(&app);
        assert_eq!(blockers.len(), 2, "{text}");
        let find = |number: i64| blockers.iter().find(|one| one.session == Some(number.try_into().unwrap())).unwrap();
        let (here, there) = (find(mine).holder.as_ref().unwrap(), find(number).holder.as_ref().unwrap());
        assert_eq!((here.app(), there.app()), (first.id(), "elsewhere"));
        assert_eq!((there.thread_name(), there.in_transaction()), ("night shift", true));
        assert_eq!(shown(there.location()), format!("{}:{line}", file!()));
        for part in ["app `elsewhere`", "night shift", &format!("{}:{line}", file!()), first.id()] {
            assert!(text.contains(part), "{part} in {text}");
        }
        session.rollback().unwrap();
        drop(end);
    });
    elsewhere.dispose_all().unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

/// Idle connections in pools of this process are no blockers, and the number of a closed connection names none.
fn idle_connection_is_no_blocker<C: TestConnection>(test_db: &TestDatabase) {
    let app = owner::<C>(test_db);
    let (idle, busy) = (C::app(test_db.config()), C::app(test_db.config()));
    let sessions: Vec<_> = (0..3).map(|_| idle.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| assert_eq!(session.number(READ).unwrap(), 0));
    drop(sessions);
    assert_eq!(idle.status().idle, 3);
    let session = busy.open_session().unwrap();
    session.number(READ).unwrap();
    let number = session.number(session_number(test_db)).unwrap();
    let (blockers, text) = blockers_of_drop_all(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert_eq!(blocker.holder.as_ref().unwrap().app(), busy.id());
    session.rollback().unwrap();
    app.drop_all().unwrap();
}

/// Sessions that came while `drop_all` waited wait behind it: only the first session blocks it.
fn blockers_on_postgres_omit_waiting_sessions() {
    let test_db = TestDatabase::postgres();
    let app = owner::<PgConnection>(&test_db);
    let mut other_connection = PgConnection::establish(&format!("{}?application_name=culprit", test_db.url())).unwrap();
    other_connection.batch_execute("BEGIN").unwrap();
    other_connection.number(READ).unwrap();
    let url = format!("{}?application_name=victim", test_db.url());
    std::thread::scope(|scope| {
        let dropping = scope.spawn(|| blockers_of_drop_all(&app));
        let mut observer = PgConnection::establish(&test_db.url()).unwrap();
        let waiting = "SELECT count(*) AS number FROM pg_locks WHERE NOT granted AND locktype = 'relation' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        assert!(wait::until(Duration::from_secs(5), || observer.number(waiting).unwrap() == 1));
        let victim = scope.spawn(|| {
            let mut victim = PgConnection::establish(&url).unwrap();
            victim.batch_execute("BEGIN").unwrap();
            victim.number(READ).unwrap();
            victim
        });
        let (blockers, text) = dropping.join().unwrap();
        assert_eq!(blockers.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["culprit"], "{text}");
        drop((victim.join().unwrap(), other_connection));
    });
    app.drop_all().unwrap();
}

/// Another role's session is shown by number and name; what it does is not ours to see.
fn blockers_on_postgres_hide_statements_of_other_roles() {
    let test_db = TestDatabase::postgres();
    let app = owner::<PgConnection>(&test_db);
    let TestDatabase::Postgres(database) = &test_db else { unreachable!("it is") };
    let role = format!("backup_{}", database.name());
    let mut admin = postgres().admin();
    admin.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'x'")).unwrap();
    let mut owner = PgConnection::establish(&test_db.url()).unwrap();
    owner.batch_execute(&format!("GRANT SELECT ON entries TO {role}")).unwrap();
    let place = format!("127.0.0.1:{}/{}", test_db.port(), database.name());
    let mut other = PgConnection::establish(&format!("postgres://{role}:x@{place}?application_name=backup")).unwrap();
    other.batch_execute("BEGIN").unwrap();
    other.number(READ).unwrap();
    let number = other.number(session_number(&test_db)).unwrap();
    let (blockers, text) = blockers_of_drop_all(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!((blocker.session, blocker.name.as_str()), (Some(number.try_into().unwrap()), "backup"));
    assert_eq!((blocker.state.as_str(), blocker.state_for), ("", None));
    assert!(!text.contains("to be found again"), "{text}");
    drop(other);
    app.drop_all().unwrap();
    admin.batch_execute(&format!("DROP ROLE {role}")).unwrap();
}

/// An account that may see all processes learns which of them is in a transaction, and its last statement.
fn blockers_on_mariadb_show_more_to_a_privileged_account() {
    let test_db = TestDatabase::mariadb();
    let TestDatabase::Mariadb(database) = &test_db else { unreachable!("it is") };
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
    let url = format!("mysql://seer_{name}:x@127.0.0.1:{}/{name}", test_db.port());
    let app = MysqlConnection::app(Config::new(url).lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    let mut idle = MysqlConnection::establish(&test_db.url()).unwrap();
    idle.number(READ).unwrap();
    let mut other_connection = MysqlConnection::establish(&test_db.url()).unwrap();
    let number = other_connection.number(session_number(&test_db)).unwrap();
    other_connection.batch_execute("BEGIN").unwrap();
    // As a text: of a prepared statement this server keeps none.
    other_connection.batch_execute(READ).unwrap();

    let (blockers, text) = blockers_of_drop_all(&app);
    let [blocker] = &blockers[..] else { panic!("{text}") };
    assert_eq!(blocker.session, Some(number.try_into().unwrap()), "{text}");
    assert_eq!((blocker.name.as_str(), blocker.state.as_str()), ("app@127.0.0.1", "idle in transaction"));
    assert_eq!(blocker.last_query.as_deref(), Some(READ), "{text}");
    drop(other_connection);
    app.drop_all().unwrap();
    app.dispose().unwrap();
    admin.batch_execute(&format!("DROP USER 'seer_{name}'@'%'")).unwrap();
}

/// The writer before it in the queue of this process.
#[test]
fn blockers_on_sqlite_name_the_previous_writer() {
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config().lock_timeout(Duration::from_millis(300)));
    app.create_all().unwrap();
    let other = SqliteConnection::app(test_db.config());
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
        assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
        let blockers = error.blockers().expect("blockers");
        assert_eq!(blockers.len(), 1, "{error}");
        let holder = blockers[0].holder.as_ref().unwrap();
        assert_eq!((holder.app(), holder.session()), (other.id(), None));
        assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
    });
    app.drop_all().unwrap();
}
