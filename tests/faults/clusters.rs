//! Servers of a cluster, and poolers before a server.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::pool::{Behind, ConnectErrorKind};
use diesel_session::session::CommitOutcome;
use diesel_session::{App, Config, Database, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, INSERT, POSTGRES, SessionExt, Step, Steps, TestConnection, TestDatabase, step, unique};
use crate::for_each_database;
use crate::pooler::TRANSACTIONS;
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::{Mariadb, Pgbouncer, Postgres, ROLE, wait};

for_each_database!(every_server => the_error_of_a_released_lock_names_a_migration);
for_each_database!(only mariadb =>
    leftovers_on_a_galera_node_may_be_of_another_node,
    retry_waits_until_mariadb_accepts_writes,
    callers_wait_while_a_galera_node_has_no_quorum,
);
for_each_database!(only postgres =>
    drop_all_names_a_prepared_transaction_that_blocks_it,
    callers_of_a_full_pooler_wait_for_a_connection,
    callers_wait_while_the_pooler_has_no_server,
    unknown_database_of_a_pooler_is_recognised,
    callers_wait_until_a_standby_is_promoted,
    retry_waits_until_postgres_accepts_writes,
    commit_that_waits_for_a_standby_is_unknown_at_the_deadline,
    commit_that_a_failover_lost_never_resolves_to_committed,
    small_pooler_in_session_mode_does_not_stall_the_application,
);
for_each_database!(only sqlite => leftovers_without_a_lock_may_be_of_another_program);

const RELEASE: [(&str, &str); 2] =
    [("postgres", "SELECT pg_advisory_unlock_all()"), ("mariadb", "SELECT RELEASE_ALL_LOCKS()")];

/// The error of a migration whose second part fails, outside of a transaction.
fn failed_migration<C: TestConnection>(config: Config, steps: Vec<Step>) -> String {
    let db = Database::<C, _>::new(Steps(steps));
    let app = db.init_app("failed-migration", config).unwrap();
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    app.dispose().unwrap();
    error.to_string()
}

fn half_done(first: &str) -> Step {
    let mut step = step("1", first, "SELECT 1").outside_a_transaction();
    step.up.push_str("; CREATE TABLE half (id INTEGER); INSERT INTO nowhere VALUES (1)");
    step
}

fn the_error_of_a_released_lock_names_a_migration<C: TestConnection>(test_db: &TestDatabase) {
    let kind = test_db.kind_name();
    let release = RELEASE.iter().find(|(name, _)| *name == kind).unwrap().1;
    let db = Database::<C, _>::new(Steps(vec![step("1", release, "SELECT 1")]));
    let app = db.init_app(unique("releases-the-lock"), test_db.config()).unwrap();
    let error = app.create_all().unwrap_err().to_string();
    assert!(error.contains("a migration has released it. Done: 1.") && !error.contains("stays with"), "{error}");
    assert_eq!(app.status().open, 0, "the connection is closed");
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert_eq!(app.status().open, 1, "a connection that held its lock stays");
    app.dispose().unwrap();
    // After a failure the lock did not exclude others either.
    let failing = Step { version: "2", ..half_done(release) };
    let text = failed_migration::<C>(test_db.config(), vec![failing]);
    // PostgreSQL rolls all statements of one message back.
    assert_eq!(text.contains("+half.id"), kind != "postgres", "{text}");
    assert!(!text.contains("by hand"), "{text}");
}

fn leftovers_on_a_galera_node_may_be_of_another_node() {
    let server = Mariadb::start_galera();
    let text = failed_migration::<MysqlConnection>(Config::new(server.url()), vec![half_done("DO 1")]);
    assert!(text.contains("+half.id") && text.contains("Find out which program has done it"), "{text}");
    assert!(!text.contains("by hand"), "{text}");
}

fn leftovers_without_a_lock_may_be_of_another_program() {
    let test_db = TestDatabase::sqlite();
    let text = failed_migration::<SqliteConnection>(test_db.config(), vec![half_done("SELECT 1")]);
    assert!(text.contains("+half.id") && text.contains("Find out which program has done it"), "{text}");
    assert!(!text.contains("by hand"), "{text}");
}

fn drop_all_names_a_prepared_transaction_that_blocks_it() {
    let mut server = Postgres::try_start_with("max_prepared_transactions = 5\n").unwrap();
    let app = PgConnection::app(Config::new(server.url()).lock_timeout(Duration::from_millis(300)));
    app.create_all().unwrap();
    let prepare = format!("BEGIN; {INSERT}; PREPARE TRANSACTION 'transfer 7'");
    PgConnection::establish(&server.url()).unwrap().batch_execute(&prepare).unwrap();
    // After a restart the transaction has another number among the locks.
    for restarts in [false, true] {
        if restarts {
            server.kill9();
            server.restart();
        }
        let error = app.drop_all().unwrap_err();
        let [blocker] = &error.blockers().expect("blockers")[..] else { panic!("{error}") };
        assert_eq!((blocker.session, blocker.name.as_str()), (None, "prepared transaction `transfer 7` of app"));
        assert!(blocker.state_for.is_some(), "{error}");
        assert!(error.to_string().contains("prepared transaction `transfer 7` of app for "), "{error}");
    }
    let rollback = "ROLLBACK PREPARED 'transfer 7'";
    PgConnection::establish(&server.url()).unwrap().batch_execute(rollback).unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

/// Runs `after` as soon as a caller waits in the pool of the application.
fn once_a_caller_waits<C: TestConnection, T>(app: &App<C>, call: impl FnOnce() -> T, after: impl FnOnce() + Send) -> T {
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let waits = wait::until(Duration::from_secs(5), || app.status().waiting > 0);
            after();
            waits
        });
        let outcome = call();
        assert!(waits.join().unwrap(), "no caller has waited");
        outcome
    })
}

fn connect_error_kind<T: std::fmt::Debug>(outcome: diesel_session::Result<T>) -> Option<ConnectErrorKind> {
    outcome.expect_err("a failed connect").connect_error_kind()
}

fn callers_of_a_full_pooler_wait_for_a_connection() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let pooler = Pgbouncer::start(test_db.port(), database.name(), 5, "max_client_conn = 2");
    let url = pooler.url_of(database.name());
    let mut others: Vec<_> = (0..2).map(|_| PgConnection::establish(&url).unwrap()).collect();
    let patience = Duration::from_millis(600);
    let config = || Config::new(&url).behind(TRANSACTIONS);
    let impatient = PgConnection::app(config().acquire_timeout(patience));
    let started = Instant::now();
    let error = impatient.ping().unwrap_err();
    assert!(started.elapsed() > patience - Duration::from_millis(110), "{:?}: {error}", started.elapsed());
    assert_eq!(error.connect_error_kind(), Some(ConnectErrorKind::ServerFull), "{error}");
    let patient = PgConnection::app(config());
    once_a_caller_waits(&patient, || patient.ping(), || drop(others.pop())).unwrap();
}

fn callers_wait_while_the_pooler_has_no_server() {
    for mode in ["session", "transaction"] {
        let mut server = Postgres::start();
        let settings = format!("server_login_retry = 1\npool_mode = {mode}");
        let pooler = Pgbouncer::start(server.port(), ROLE, 5, &settings);
        let behind = if mode == "session" { Behind::SessionPooler } else { TRANSACTIONS };
        let config = || Config::new(pooler.url_of(ROLE)).behind(behind).acquire_timeout(Duration::from_secs(30));
        let db = Database::<PgConnection>::new(POSTGRES);
        let [app, fresh] = ["app", "fresh"].map(|id| db.init_app(id, config()).unwrap());
        app.create_all().unwrap();
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        app.run(|| db.session()?.send(INSERT)).unwrap();
        server.kill9();
        let error = session.send(INSERT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{mode}: {error}");
        session.rollback().unwrap();
        let call = |app: &App<PgConnection>| app.context(|| db.session()?.number(COUNT));
        once_a_caller_waits(&app, || call(&app), || server.restart()).unwrap();
        assert_eq!(call(&fresh).unwrap(), 1, "{mode}");
        db.dispose_all().unwrap();
    }
}

fn unknown_database_of_a_pooler_is_recognised() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let pooler = Pgbouncer::start_for(test_db.port(), database.name());
    let config = |name: &str| Config::new(pooler.url_of(name)).behind(TRANSACTIONS);
    PgConnection::app(config(database.name())).ping().unwrap();
    let app = PgConnection::app(config("nowhere"));
    assert_eq!(connect_error_kind(app.ping()), Some(ConnectErrorKind::UnknownDatabase));
}

fn callers_wait_until_a_standby_is_promoted() {
    let primary = Postgres::start();
    for wanted in ["read-write", "primary"] {
        let standby = primary.standby();
        let config = || Config::new(format!("{}?target_session_attrs={wanted}", standby.url()));
        let impatient = PgConnection::app(config().acquire_timeout(Duration::from_millis(500)));
        let error = impatient.ping().unwrap_err();
        assert_eq!(error.connect_error_kind(), Some(ConnectErrorKind::NotPrimary), "{error}");
        assert!(error.is_transient(), "{error}");
        let app = PgConnection::app(config().acquire_timeout(Duration::from_secs(30)));
        once_a_caller_waits(&app, || app.ping(), || standby.promote()).unwrap();
    }
}

/// The server refuses to write until half a second after the first attempt.
fn assert_retry_waits_until_the_server_accepts_writes<C: TestConnection>(
    url: &str,
    forbid: impl FnOnce(),
    permit: impl FnOnce() + Send,
) {
    let app = C::app(Config::new(url));
    app.create_all().unwrap();
    forbid();
    let refused = app.run(|| C::db().session()?.send(INSERT)).unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    // Without a deadline of its own the wait ends at `acquire_timeout`.
    let impatient = C::app(Config::new(url).acquire_timeout(Duration::from_millis(300)));
    let started = Instant::now();
    let refused = impatient.context(|| C::db().session()?.retry(2, |session| session.send(INSERT))).unwrap_err();
    let took = started.elapsed();
    assert!(took > Duration::from_millis(150) && took < Duration::from_secs(2), "{took:?}: {refused}");
    let mut runs = 0;
    thread::scope(|scope| {
        let mut permit = Some(permit);
        app.context(|| {
            C::db().session()?.retry(2, |session| {
                runs += 1;
                if let Some(permit) = permit.take() {
                    scope.spawn(|| {
                        thread::sleep(Duration::from_millis(500));
                        permit();
                    });
                }
                session.send(INSERT)
            })
        })
        .unwrap();
    });
    assert_eq!(runs, 2);
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
    assert_eq!(app.status().in_use, 0);
}

fn retry_waits_until_postgres_accepts_writes() {
    let server = Postgres::start();
    let set = |value: &str| {
        let alter = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        let both = [alter.as_str(), "SELECT pg_reload_conf()"];
        server.try_ask(|conn| both.iter().try_for_each(|sql| conn.batch_execute(sql))).unwrap();
        // The server has told its sessions before it opens another one with the new setting.
        let sql = format!(
            "SELECT count(*) AS number FROM pg_settings WHERE name = 'transaction_read_only' AND setting = '{value}'"
        );
        let is_set = || PgConnection::establish(&server.url()).unwrap().number(&sql).unwrap() == 1;
        assert!(wait::until(Duration::from_secs(5), is_set));
    };
    assert_retry_waits_until_the_server_accepts_writes::<PgConnection>(&server.url(), || set("on"), || set("off"));
}

fn retry_waits_until_mariadb_accepts_writes() {
    let server = Mariadb::start();
    let set = |value: &str| server.admin().batch_execute(&format!("SET GLOBAL read_only = {value}")).unwrap();
    assert_retry_waits_until_the_server_accepts_writes::<MysqlConnection>(&server.url(), || set("1"), || set("0"));
}

/// One of two nodes is killed, so the other one has no majority.
fn callers_wait_while_a_galera_node_has_no_quorum() {
    let server = Mariadb::start_galera();
    let mut second = server.start_second_node();
    let app = MysqlConnection::app(Config::new(server.url()).acquire_timeout(Duration::from_secs(30)).max_size(4));
    app.create_all().unwrap();
    let sessions: Vec<_> = (0..4).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.send(INSERT).unwrap());
    sessions[1..].iter().for_each(|session| session.rollback().unwrap());
    second.kill9();
    let mut plain = MysqlConnection::establish(&server.url()).unwrap();
    assert!(wait::until(Duration::from_secs(20), || plain.batch_execute("BEGIN; ROLLBACK").is_err()));

    let error = sessions[0].send(INSERT).unwrap_err();
    assert!(error.kind() == ErrorKind::ConnectionLost && error.is_transient(), "{error}");
    sessions[0].rollback().unwrap();
    let impatient = MysqlConnection::app(Config::new(server.url()).acquire_timeout(Duration::from_millis(300)));
    assert_eq!(connect_error_kind(impatient.ping()), Some(ConnectErrorKind::Unreachable));
    let primary = "SET GLOBAL wsrep_provider_options = 'pc.bootstrap=1'";
    let callers = || {
        together(4, |number| match number {
            0 => app.ping(),
            1 => app.context(|| MysqlConnection::db().session()?.number(COUNT).map(drop)),
            _ => app.run(|| MysqlConnection::db().session()?.send(INSERT)),
        })
    };
    let outcomes = once_a_caller_waits(&app, callers, || server.admin().batch_execute(primary).unwrap());
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 2);
}

/// The server waits without a limit: it switches its statement timeout off at `COMMIT`.
fn commit_that_waits_for_a_standby_is_unknown_at_the_deadline() {
    let server = Postgres::start();
    let app = PgConnection::app(Config::new(server.url()));
    app.create_all().unwrap();
    let wait_for = |standby: &str| {
        let alter = format!("ALTER SYSTEM SET synchronous_standby_names = '{standby}'");
        let both = [alter.as_str(), "SELECT pg_reload_conf()"];
        server.try_ask(|conn| both.iter().try_for_each(|sql| conn.batch_execute(sql))).unwrap();
        let sql = format!(
            "SELECT count(*) AS number FROM pg_settings WHERE name = 'synchronous_standby_names' AND setting = '{standby}'"
        );
        let is_set = || PgConnection::establish(&server.url()).unwrap().number(&sql).unwrap() == 1;
        assert!(wait::until(Duration::from_secs(5), is_set));
    };
    wait_for("away");
    let limit = Duration::from_secs(1);
    let started = Instant::now();
    let insert = || PgConnection::db().session()?.send(INSERT);
    let error = app.scope().resolvable().deadline(limit).run_and_commit(insert).unwrap_err();
    let took = started.elapsed();
    assert!(error.is_commit_unknown(), "{error}");
    assert!(took >= limit && took < limit + Duration::from_secs(1), "{took:?}");
    assert_eq!(app.status().in_use, 0);
    wait_for("");
    assert_eq!(error.resolve().unwrap(), CommitOutcome::Committed);
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
}

/// The primary commits and dies before its standby has the commit, and the standby gives the number to another
/// transaction.
fn commit_that_a_failover_lost_never_resolves_to_committed() {
    let mut primary = Postgres::start();
    let proxy = Proxy::to(("127.0.0.1", primary.port()));
    let app = PgConnection::app(Config::new(primary.url_at(proxy.port(), ROLE)));
    app.create_all().unwrap();
    let insert = || PgConnection::db().session()?.send(INSERT);
    // A commit that the standby has.
    proxy.set(Mode::CutOn(b"COMMIT".to_vec(), Moment::BeforeAnswer));
    let replicated = app.scope().resolvable().run_and_commit(insert).unwrap_err();
    proxy.set(Mode::Pass);
    let standby = primary.standby();
    proxy.set(Mode::CutOn(b"COMMIT".to_vec(), Moment::BeforeAnswer));
    let lost = app.scope().resolvable().run_and_commit(insert).unwrap_err();
    proxy.set(Mode::Pass);
    assert!(replicated.is_commit_unknown() && lost.is_commit_unknown(), "{replicated}; {lost}");

    proxy.lead_to(standby.port());
    proxy.cut_all();
    let is_unknown = |outcome| matches!(outcome, CommitOutcome::Unknown { reason } if reason.contains("promoted"));
    assert!(is_unknown(lost.resolve().unwrap()), "a standby does not know");
    standby.promote();
    for _ in 0..30 {
        app.run(insert).unwrap();
    }
    assert!(is_unknown(lost.resolve().unwrap()) && is_unknown(replicated.resolve().unwrap()));
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 31);

    // A commit of the new primary is found again, and the old primary knows its own.
    proxy.set(Mode::CutOn(b"COMMIT".to_vec(), Moment::BeforeAnswer));
    let new = app.scope().resolvable().run_and_commit(insert).unwrap_err();
    proxy.set(Mode::Pass);
    assert_eq!(new.resolve().unwrap(), CommitOutcome::Committed);
    proxy.lead_to(primary.port());
    proxy.cut_all();
    assert!(is_unknown(new.resolve().unwrap()), "the old primary");
    assert_eq!(lost.resolve().unwrap(), CommitOutcome::Committed);
    primary.kill9();
}

/// The pooler lets the eleventh connection log in, and lets its first query wait.
fn small_pooler_in_session_mode_does_not_stall_the_application() {
    let server = Postgres::start();
    let pooler = Pgbouncer::start(server.port(), ROLE, 10, "pool_mode = session\nquery_wait_timeout = 6");
    let app = PgConnection::app(Config::new(pooler.url_of(ROLE)).behind(Behind::SessionPooler).max_size(14));
    app.create_all().unwrap();
    let crowd = || {
        let outcomes = together(14, |_| {
            app.run(|| {
                let session = PgConnection::db().session()?;
                session.send(INSERT)?;
                session.send("SELECT pg_sleep(0.3)")
            })
        });
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert_eq!(app.status().connecting, 1, "{}", app.status());
    };
    crowd();
    // Until the pooler has given up the connect.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(8) {
        let asked = Instant::now();
        assert_eq!(app.context(|| PgConnection::db().session()?.number(COUNT)).unwrap(), 14);
        let took = asked.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?} after {:?}: {}", started.elapsed(), app.status());
        thread::sleep(Duration::from_millis(700));
    }
    assert_eq!(app.status().connecting, 0, "{}", app.status());
    crowd();
    let started = Instant::now();
    app.dispose().unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}
