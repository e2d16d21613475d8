//! `create_all` and `drop_all` behind a pooler, on a connection that is cut, and with more tables than one transaction
//! can lock.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::migrations::MigrationOutcome;
use diesel_session::pool::Behind;
use diesel_session::{App, Config, Database, Error, ErrorKind};

use crate::fixtures::{Step, Steps, TestConnection, TestDatabase, step};
use crate::for_each_database;
use crate::pooler::{TRANSACTIONS, pooler};
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::{Pgbouncer, Postgres, postgres};

for_each_database!(only mariadb => errors_after_a_cut_are_true_on_mariadb);
for_each_database!(only postgres =>
    create_all_through_a_transaction_pooler_is_done_once_and_leaves_no_lock,
    a_migration_without_a_transaction_is_refused_behind_a_transaction_pooler,
    a_transaction_pooler_with_one_session_is_recognised,
    error_of_a_pooler_without_prepared_statements_names_the_remedy,
    errors_after_a_cut_are_true_on_postgres,
    create_all_says_that_a_commit_without_an_answer_is_done,
    drop_all_of_1400_tables_needs_no_more_locks_than_a_default_server_has,
    drop_all_goes_on_one_by_one_when_the_locks_run_out,
    the_lock_of_create_all_excludes_other_callers_on_a_direct_connection,
);

type Operation = fn(&App<PgConnection>) -> diesel_session::Result<Vec<String>>;

const TABLES: &str = "SELECT count(*) AS number FROM pg_tables WHERE schemaname = 'public'";
const LOCKS: &str = "SELECT count(*) AS number FROM pg_locks WHERE locktype = 'advisory' AND classid = 7236271";

fn three_tables() -> Vec<Step> {
    vec![
        step("1", "CREATE TABLE one (id INTEGER PRIMARY KEY)", "DROP TABLE one"),
        step("2", "CREATE TABLE two (id INTEGER PRIMARY KEY)", "DROP TABLE two"),
        step("3", "CREATE TABLE three (id INTEGER PRIMARY KEY)", "DROP TABLE three"),
    ]
}

fn create_all_through_a_transaction_pooler_is_done_once_and_leaves_no_lock() {
    for settings in ["server_round_robin = 1", "server_round_robin = 0"] {
        let test_db = TestDatabase::postgres();
        let (_pooler, url) = pooler(&test_db, settings);
        let mut server = PgConnection::establish(&test_db.url()).unwrap();
        let both: [(Operation, i64); 2] = [(|app| app.create_all(), 4), (|app| app.drop_all(), 0)];
        for round in 0..3 {
            for (operation, tables) in both {
                let barrier = Barrier::new(4);
                let mut done: Vec<Vec<String>> = thread::scope(|scope| {
                    let callers: Vec<_> = (0..4)
                        .map(|_| {
                            scope.spawn(|| {
                                let db = Database::<PgConnection, _>::new(Steps(three_tables()));
                                let app = db.init_app("pooled", Config::new(&url).behind(TRANSACTIONS)).unwrap();
                                barrier.wait();
                                let done = operation(&app);
                                app.dispose().unwrap();
                                done.unwrap()
                            })
                        })
                        .collect();
                    callers.into_iter().map(|caller| caller.join().unwrap()).collect()
                });
                done.sort();
                assert_eq!(done[3].len(), 3, "{settings}, round {round}: one does all");
                assert!(done[..3].iter().all(Vec::is_empty), "{settings}, round {round}: {done:?}");
                assert_eq!(server.number(TABLES).unwrap(), tables);
                assert_eq!(server.number(LOCKS).unwrap(), 0, "{settings}, round {round}: a lock stays");
            }
        }
        // A caller that fails leaves no lock either.
        let mut broken = three_tables();
        broken[1].up = "CREATE TABLE two (id INTEGER); SELECT nonsense".into();
        let db = Database::<PgConnection, _>::new(Steps(broken));
        let app = db.init_app("broken", Config::new(&url).behind(TRANSACTIONS)).unwrap();
        assert!(app.create_all().unwrap_err().kind() == ErrorKind::Migration);
        app.dispose().unwrap();
        assert_eq!(server.number(LOCKS).unwrap(), 0);
        assert_eq!(server.number(TABLES).unwrap(), 2);
    }
}

fn a_migration_without_a_transaction_is_refused_behind_a_transaction_pooler() {
    for settings in ["server_round_robin = 1", "server_round_robin = 0"] {
        let test_db = TestDatabase::postgres();
        let (_pooler, url) = pooler(&test_db, settings);
        let mut steps = three_tables();
        steps[1] =
            step("2", "CREATE INDEX CONCURRENTLY i ON one (id)", "DROP INDEX CONCURRENTLY i").outside_a_transaction();
        let db = Database::<PgConnection, _>::new(Steps(steps));
        let pooled = db.init_app("pooled", Config::new(&url).behind(TRANSACTIONS)).unwrap();
        let direct = db.init_app("direct", test_db.config()).unwrap();
        let mut server = PgConnection::establish(&test_db.url()).unwrap();
        let refused = |operation: &str, error: Error| {
            assert!(
                error.kind() == ErrorKind::PoolerInTransactionMode && error.to_string().contains(operation),
                "{error}"
            );
            assert_eq!(error.code(), "DS406");
            assert!(
                error.to_string().contains("2_step") && error.to_string().contains("goes to the server itself"),
                "{error}"
            );
        };
        refused("create_all", pooled.create_all().unwrap_err());
        assert_eq!((server.number(TABLES).unwrap(), server.number(LOCKS).unwrap()), (0, 0), "{settings}");
        assert_eq!(direct.create_all().unwrap(), ["1", "2", "3"]);
        assert_eq!(pooled.create_all().unwrap(), Vec::<String>::new(), "none is pending");
        refused("drop_all", pooled.drop_all().unwrap_err());
        assert_eq!((server.number(TABLES).unwrap(), server.number(LOCKS).unwrap()), (3, 0), "{settings}");
        assert_eq!(direct.drop_all().unwrap(), ["3", "2", "1"]);
        db.dispose_all().unwrap();
    }
}

/// The second connection, by which the pooler is recognised, takes the one session away.
fn a_transaction_pooler_with_one_session_is_recognised() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let pooler = Pgbouncer::start(test_db.port(), database.name(), 1, "");
    let mut server = PgConnection::establish(&test_db.url()).unwrap();
    let url = pooler.url_of(database.name());
    let in_itself = "BEGIN; DROP TABLE two; COMMIT";
    let without = step("2", "CREATE TABLE two (id INTEGER)", "DROP TABLE two").outside_a_transaction();
    for (second, create_is_refused) in [(step("2", "CREATE TABLE two (id INTEGER)", in_itself), false), (without, true)]
    {
        let mut steps = three_tables();
        steps[1] = second;
        let db = Database::<PgConnection, _>::new(Steps(steps));
        let pooled = db.init_app("pooled", Config::new(&url).behind(Behind::SessionPooler)).unwrap();
        let direct = db.init_app("direct", test_db.config()).unwrap();
        match create_is_refused {
            true => assert!(pooled.create_all().unwrap_err().kind() == ErrorKind::PoolerInTransactionMode),
            false => assert_eq!(pooled.create_all().unwrap(), ["1", "2", "3"]),
        }
        direct.create_all().unwrap();
        let refused = pooled.drop_all().unwrap_err();
        assert!(
            refused.kind() == ErrorKind::PoolerInTransactionMode && refused.to_string().contains("2_step"),
            "{refused}"
        );
        assert_eq!(server.number(LOCKS).unwrap(), 0);
        assert_eq!(direct.drop_all().unwrap(), ["3", "2", "1"]);
        db.dispose_all().unwrap();
    }
}

diesel::table! {
    one (id) { id -> Integer, }
}

/// The pooler gives each transaction another connection to the server, on which nothing is prepared.
fn error_of_a_pooler_without_prepared_statements_names_the_remedy() {
    let test_db = TestDatabase::postgres();
    PgConnection::establish(&test_db.url())
        .unwrap()
        .batch_execute("CREATE TABLE one (id INTEGER PRIMARY KEY)")
        .unwrap();
    let (_pooler, url) = pooler(&test_db, "server_round_robin = 1");
    let count = |keeps_prepared| {
        let config = Config::new(&url).behind(Behind::TransactionPooler { keeps_prepared }).max_size(1);
        let app = PgConnection::app(config);
        let each = (0..6).map(|_| app.open_session()?.load::<i32>(one::table.select(one::id).filter(one::id.gt(1))));
        each.map(|rows| rows.map(|rows| rows.len())).collect::<Result<Vec<_>, _>>()
    };
    // A newer PgBouncer keeps prepared statements by default.
    if let Err(error) = count(true) {
        let text = error.to_string();
        assert!(text.contains("Behind::TransactionPooler { keeps_prepared: false }"), "{text}");
    }
    assert_eq!(count(false).unwrap(), [0; 6]);
}

/// What an error says of a migration whose connection was cut is what the server says.
fn errors_after_a_cut_are_true<C: TestConnection>(test_db: &TestDatabase, tables: &str) {
    const STEP: usize = 151;
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let config = |url: String| Config::new(url).max_size(1).acquire_timeout(Duration::from_secs(2));
    let direct = Database::<C, _>::new(Steps(three_tables()));
    let direct = direct.init_app("direct", test_db.config()).unwrap();
    let exists = |table: &str| {
        let session = direct.open_session().unwrap();
        session.with(|conn| conn.number(&format!("{tables} AND table_name = '{table}'"))).unwrap() == 1
    };
    let mut seen = Vec::new();
    for operation in ["create_all", "drop_all"] {
        for cut in 1..1000 {
            let (wanted, start): (bool, _) = (operation == "create_all", direct.drop_all().unwrap());
            drop(start);
            if !wanted {
                direct.create_all().unwrap();
            }
            let db = Database::<C, _>::new(Steps(three_tables()));
            let app = db.init_app("cut", config(test_db.url_at(proxy.port()))).unwrap();
            proxy.set(Mode::Pass);
            app.ping().unwrap();
            proxy.set(Mode::CutAfter(cut * STEP));
            let outcome = if wanted { app.create_all() } else { app.drop_all() };
            proxy.set(Mode::Pass);
            let Err(error) = outcome else {
                assert_eq!(exists("three"), wanted);
                break;
            };
            assert!(error.is_connection_lost(), "{operation} cut at {}: {error}", cut * STEP);
            assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
            let failure = error.migration_failure().expect("a failure");
            seen.push(failure.outcome);
            let table = match failure.migration.as_str() {
                "1_step" => "one",
                "2_step" => "two",
                "3_step" => "three",
                _ => continue,
            };
            let at = format!("{operation} cut at {}: {error}", cut * STEP);
            assert_eq!(error.is_commit_unknown(), failure.outcome == MigrationOutcome::Unknown, "{at}");
            match failure.outcome {
                MigrationOutcome::Done => assert_eq!(exists(table), wanted, "{at}"),
                MigrationOutcome::NotDone if failure.left_behind.is_empty() => {
                    assert_eq!(exists(table), !wanted, "{at}")
                }
                MigrationOutcome::NotDone => {}
                _ => assert!(!error.to_string().contains("Nothing of it remains"), "{at}"),
            }
            // MySQL keeps half of a migration, which nobody can repeat.
            for (table, version) in [("one", "1"), ("two", "2"), ("three", "3")] {
                let applied = direct.migrations().unwrap().iter().any(|one| one.version == version && one.applied);
                let mend = match (exists(table), applied) {
                    (true, false) => format!("DROP TABLE {table}"),
                    (false, true) => format!("CREATE TABLE {table} (id INTEGER PRIMARY KEY)"),
                    _ => continue,
                };
                C::establish(&test_db.url()).unwrap().batch_execute(&mend).unwrap();
            }
        }
    }
    assert!(seen.contains(&MigrationOutcome::NotDone), "{seen:?}");
}

fn errors_after_a_cut_are_true_on_postgres() {
    let tables = "SELECT count(*) AS number FROM information_schema.tables WHERE table_schema = 'public'";
    errors_after_a_cut_are_true::<PgConnection>(&TestDatabase::postgres(), tables);
}

fn errors_after_a_cut_are_true_on_mariadb() {
    let tables = "SELECT count(*) AS number FROM information_schema.tables WHERE table_schema = DATABASE()";
    errors_after_a_cut_are_true::<MysqlConnection>(&TestDatabase::mariadb(), tables);
}

/// The commit reaches the server and its answer is lost; the server can be asked.
fn create_all_says_that_a_commit_without_an_answer_is_done() {
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let db = Database::<PgConnection, _>::new(Steps(three_tables()));
    let app = db.init_app("cut", Config::new(test_db.url_at(proxy.port()))).unwrap();
    for (moment, applied, outcome) in
        [(Moment::BeforeForwarding, 0, MigrationOutcome::NotDone), (Moment::BeforeAnswer, 1, MigrationOutcome::Done)]
    {
        proxy.set(Mode::CutOn(b"VALUES ('1'); COMMIT".to_vec(), moment));
        let error = app.create_all().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
        let failure = error.migration_failure().expect("a failure");
        assert_eq!((failure.outcome, failure.migration.as_str()), (outcome, "1_step"), "{error}");
        assert!(error.is_connection_lost() && !error.is_commit_unknown() && error.is_transient(), "{error}");
        assert_eq!(app.migrations().unwrap().iter().filter(|one| one.applied).count(), applied);
    }
    proxy.set(Mode::Pass);
    assert_eq!(app.create_all().unwrap(), ["2", "3"]);
    proxy.set(Mode::CutOn(b"COMMIT".to_vec(), Moment::BeforeAnswer));
    let error = app.drop_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!(failure.outcome, MigrationOutcome::Done, "{error}");
    proxy.set(Mode::Pass);
    assert_eq!(app.drop_all().unwrap(), Vec::<String>::new());
    app.dispose().unwrap();
}

/// Fourteen migrations of that many tables each.
fn many_tables(each: usize) -> Vec<Step> {
    const VERSIONS: [&str; 14] = ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14"];
    let table = |version: &str, n: usize| format!("t{version}_{n}");
    let steps = VERSIONS.into_iter().map(|version| {
        let up: Vec<String> = (0..each)
            .map(|n| format!("CREATE TABLE {} (id integer PRIMARY KEY, name text)", table(version, n)))
            .collect();
        let down: Vec<String> = (0..each).map(|n| format!("DROP TABLE {}", table(version, n))).collect();
        step(version, up.join("; "), down.join("; "))
    });
    steps.collect()
}

fn drop_all_of_1400_tables_needs_no_more_locks_than_a_default_server_has() {
    let server = Postgres::try_start_with("max_connections = 100\n").unwrap();
    let database = server.create_database();
    let db = Database::<PgConnection, _>::new(Steps(many_tables(100)));
    let app = db.init_app("large", Config::new(database.url())).unwrap();
    assert_eq!(app.create_all().unwrap().len(), 14);
    let mut plain = PgConnection::establish(&database.url()).unwrap();
    assert_eq!(plain.number(TABLES).unwrap(), 1401);
    assert_eq!(app.drop_all().unwrap().len(), 14);
    assert_eq!(plain.number(TABLES).unwrap(), 0);
    drop(plain);
    app.dispose().unwrap();
}

/// One transaction is enough by the count, and other sessions have the locks.
fn drop_all_goes_on_one_by_one_when_the_locks_run_out() {
    let server = Postgres::try_start_with("max_connections = 30\nmax_locks_per_transaction = 40\n").unwrap();
    let database = server.create_database();
    let db = Database::<PgConnection, _>::new(Steps(many_tables(10)));
    let app = db.init_app("large", Config::new(database.url())).unwrap();
    assert_eq!(app.create_all().unwrap().len(), 14);
    let mut others = PgConnection::establish(&database.url()).unwrap();
    others.batch_execute("BEGIN; SELECT pg_advisory_xact_lock(n) FROM generate_series(1, 1500) AS n").unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 14);
    drop(others);
    assert_eq!(PgConnection::establish(&database.url()).unwrap().number(TABLES).unwrap(), 0);

    // A single migration that is too large is told with the server's own hint.
    let many: Vec<String> = (0..3000).map(|n| format!("CREATE TABLE t{n} (id integer PRIMARY KEY)")).collect();
    let db = Database::<PgConnection, _>::new(Steps(vec![step("1", many.join("; "), "SELECT 1")]));
    let too_large = db.init_app("too-large", Config::new(database.url())).unwrap();
    let error = too_large.create_all().unwrap_err().to_string();
    assert!(error.contains("max_locks_per_transaction") && error.contains("Nothing of it remains"), "{error}");
    for app in [app, too_large] {
        app.dispose().unwrap();
    }
}

/// A server of the tests' own is the one of all others.
fn the_lock_of_create_all_excludes_other_callers_on_a_direct_connection() {
    let test_db = TestDatabase::postgres();
    let mut steps = three_tables();
    steps[0].up.push_str("; SELECT pg_sleep(0.3)");
    let outcomes: Vec<Vec<String>> = thread::scope(|scope| {
        let callers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let db = Database::<PgConnection, _>::new(Steps(steps.clone()));
                    let app = db.init_app("one-of-three", test_db.config()).unwrap();
                    let done = app.create_all().unwrap();
                    app.dispose().unwrap();
                    done
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|done| done.len() == 3).count(), 1, "{outcomes:?}");
    assert_eq!(outcomes.iter().filter(|done| done.is_empty()).count(), 2, "{outcomes:?}");
    assert_eq!(postgres().open_transactions(site_name(&test_db)), 0);
}

fn site_name(test_db: &TestDatabase) -> &str {
    match test_db {
        TestDatabase::Postgres(database) | TestDatabase::Mariadb(database) => database.name(),
        TestDatabase::Sqlite(_) => unreachable!("a file has no name on a server"),
    }
}
