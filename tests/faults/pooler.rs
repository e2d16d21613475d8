//! PgBouncer in front of the server, declared by `Config::behind`, and not declared.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::pool::{Behind, ConnectErrorKind, Reset};
use diesel_session::session::Isolation;
use diesel_session::testing::{TestIsolation, TestSetup};
use diesel_session::{App, Config, Database, Entity, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{AnyConnection, COUNT, INSERT, SessionExt, Steps, TestConnection, TestDatabase, step};
use crate::for_each_database;
use crate::support::Pgbouncer;
use crate::support::proxy::{Mode, Moment, Proxy};

for_each_database!(only postgres =>
    nothing_that_a_session_leaves_reaches_another_client,
    statements_of_two_applications_do_not_get_mixed_up,
    deadline_of_one_client_does_not_cancel_another,
    limits_of_the_configuration_hold_in_each_transaction,
    pooler_that_is_not_declared_is_refused,
    session_keeps_its_application_name_behind_a_pooler_in_session_mode,
    options_that_a_pooler_cannot_apply_are_refused,
    schema_url_changes_the_schema_behind_a_pooler,
    error_of_a_deferred_constraint_is_that_of_the_autocommitted_statement,
    unit_of_work_behaves_behind_a_pooler_as_without_one,
    commit_of_an_autocommitted_statement_may_be_unknown,
    schema_url_needs_no_second_connection_of_a_limit,
    enum_of_connections_is_safe_behind_a_pooler,
    hooks_of_a_commit_leave_nothing_behind_a_pooler,
    migrations_leave_nothing_behind_a_pooler,
    tests_change_no_schema_but_their_own,
);

pub(crate) const TRANSACTIONS: Behind = Behind::TransactionPooler { keeps_prepared: false };

diesel::table! {
    items (id) { id -> Integer, name -> Text, }
}

diesel::table! {
    others (id) { id -> Integer, name -> Text, }
}

/// A pooler with two connections to the server, both of them open, which a client gets in turn.
pub(crate) fn pooler(test_db: &TestDatabase, settings: &str) -> (Pgbouncer, String) {
    let TestDatabase::Postgres(database) = test_db else { unreachable!() };
    let pooler = Pgbouncer::start(test_db.port(), database.name(), 2, settings);
    let url = pooler.url_of(database.name());
    let mut clients: Vec<_> = (0..2).map(|_| PgConnection::establish(&url).unwrap()).collect();
    clients.iter_mut().for_each(|client| client.batch_execute("BEGIN").unwrap());
    clients.iter_mut().for_each(|client| client.batch_execute("COMMIT").unwrap());
    (pooler, url)
}

fn round_robin(test_db: &TestDatabase) -> (Pgbouncer, String) {
    pooler(test_db, "server_round_robin = 1")
}

fn direct(test_db: &TestDatabase, sql: &str) {
    PgConnection::establish(&test_db.url()).unwrap().batch_execute(sql).unwrap();
}

#[derive(QueryableByName, Debug, PartialEq, Eq)]
struct State {
    #[diesel(sql_type = diesel::sql_types::Text)]
    state: String,
}

/// What another client of the pooler finds on both sessions of the server.
fn state_of_sessions(client: &mut PgConnection) -> Vec<String> {
    const QUERY: &str = "SELECT concat_ws(' | ', \
         (SELECT string_agg(concat(name, '=', setting), ', ' ORDER BY name) FROM pg_settings \
          WHERE source = 'session' AND setting <> reset_val), \
         (SELECT setting FROM pg_settings WHERE name = 'search_path'), session_user, current_user, \
         (SELECT string_agg(concat(classid, '/', objid), ', ') FROM pg_locks \
          WHERE locktype = 'advisory' AND pid = pg_backend_pid()), \
         (SELECT string_agg(relname, ', ') FROM pg_class WHERE relpersistence = 't' AND relkind = 'r'), \
         (SELECT string_agg(channel, ', ') FROM pg_listening_channels() AS channel), \
         (SELECT string_agg(name, ', ') FROM pg_cursors WHERE is_holdable), \
         (SELECT string_agg(name, ', ') FROM pg_prepared_statements)) AS state";
    let mut states: Vec<_> =
        (0..4).map(|_| diesel::sql_query(QUERY).get_result::<State>(client).unwrap().state).collect();
    states.sort();
    states
}

/// Another client of the pooler.
struct Neighbour {
    client: PgConnection,
    at_first: Vec<String>,
}

impl Neighbour {
    fn of(url: &str) -> Self {
        // The pooler restores the name of a client only if the client has one.
        let mut client = PgConnection::establish(&format!("{url}?application_name=plain")).unwrap();
        let at_first = state_of_sessions(&mut client);
        Self { client, at_first }
    }

    #[track_caller]
    fn assert_finds_nothing(&mut self, after: &str) {
        assert_eq!(state_of_sessions(&mut self.client), self.at_first, "after {after}");
    }
}

/// Everything that the reset removes.
const LEAVE: &str = "SET statement_timeout = 7777; SET search_path = pg_catalog; SET TIME ZONE 'Asia/Tokyo'; \
     SET application_name = 'left'; SELECT pg_advisory_lock(4711); LISTEN left_channel; \
     DECLARE left_cursor CURSOR WITH HOLD FOR SELECT 1; PREPARE left_statement AS SELECT 1";

type Operation = (&'static str, fn(&App<PgConnection>));

const OPERATIONS: &[Operation] = &[
    ("a read", |app| {
        drop(app.run(|| PgConnection::db().session()?.load::<i32>(items::table.select(items::id))).unwrap())
    }),
    ("a write", |app| app.run(|| PgConnection::db().session()?.send("INSERT INTO items (name) VALUES ('a')")).unwrap()),
    ("a deadline", |app| {
        let scope = app.scope().deadline(Duration::from_secs(5));
        scope.run_and_commit(|| PgConnection::db().session()?.count(items::table).map(drop)).unwrap();
    }),
    ("a deadline with autocommit", |app| {
        let scope = app.scope().deadline(Duration::from_secs(5)).autocommit();
        let insert = diesel::insert_into(items::table).values(items::name.eq("b"));
        scope.run(|| PgConnection::db().session()?.execute(insert).map(drop)).unwrap();
    }),
    ("a commit after raw SQL", |app| app.run(|| PgConnection::db().session()?.send(LEAVE)).unwrap()),
    ("a rollback after raw SQL", |app| app.context(|| PgConnection::db().session()?.send(LEAVE)).unwrap()),
    ("a temporary table", |app| {
        app.run(|| PgConnection::db().session()?.send("CREATE TEMP TABLE left_table (id INTEGER)")).unwrap();
    }),
    ("an error after raw SQL", |app| {
        let refused = app.run(|| {
            let session = PgConnection::db().session()?;
            session.send(LEAVE)?;
            session.send("SELECT nonsense")
        });
        refused.unwrap_err();
    }),
    ("an error that the code keeps to itself", |app| {
        let refused = app.run(|| {
            PgConnection::db().session()?.with(|conn| {
                conn.batch_execute(LEAVE)?;
                let _ = conn.batch_execute("SELECT nonsense");
                Ok(())
            })
        });
        refused.unwrap_err();
    }),
    ("a panic after raw SQL", |app| {
        let panics = || {
            let _ = app.run(|| {
                PgConnection::db().session()?.send(LEAVE)?;
                if true {
                    panic!("on purpose");
                }
                Ok(())
            });
        };
        catch_unwind(AssertUnwindSafe(panics)).unwrap_err();
    }),
    ("a panic in code that has the connection", |app| {
        let panics = || {
            let _ = app.run(|| {
                PgConnection::db().session()?.with(|conn| -> QueryResult<()> {
                    conn.batch_execute(LEAVE)?;
                    panic!("on purpose")
                })
            });
        };
        catch_unwind(AssertUnwindSafe(panics)).unwrap_err();
    }),
    ("raw SQL with autocommit", |app| {
        app.scope().autocommit().run(|| PgConnection::db().session()?.send(LEAVE)).unwrap();
    }),
    ("a function with autocommit", |app| {
        let lock = diesel::select(diesel::dsl::sql::<diesel::sql_types::Text>("pg_advisory_lock(4711)::text"));
        app.scope().autocommit().run(|| PgConnection::db().session()?.load::<String>(lock).map(drop)).unwrap();
    }),
    ("a guard with autocommit", |app| {
        let guarded = || Ok::<_, Error>(PgConnection::db().session()?.connection()?.batch_execute(LEAVE)?);
        let refused = app.scope().autocommit().run(guarded).unwrap_err();
        assert!(
            refused.kind() == ErrorKind::InvalidConfig && refused.to_string().contains("Session::with"),
            "{refused}"
        );
    }),
    ("a guard", |app| {
        app.run(|| Ok(PgConnection::db().session()?.connection()?.batch_execute(LEAVE)?)).unwrap();
    }),
    ("a read-only scope", |app| {
        let leave = "SET search_path = pg_catalog; SELECT pg_advisory_lock(4711)";
        app.scope().read_only().run_and_commit(|| PgConnection::db().session()?.send(leave)).unwrap();
    }),
    ("savepoints", |app| {
        app.run(|| {
            let session = PgConnection::db().session()?;
            let undone = session.savepoint(|_| {
                session.send("SELECT pg_advisory_lock(4711)")?;
                session.send("SELECT nonsense")
            });
            undone.unwrap_err();
            session.savepoint(|_| session.send(LEAVE))
        })
        .unwrap();
    }),
    ("a search path", |app| {
        let scope = app.scope().search_path(["pg_catalog", "public"]);
        scope.run_and_commit(|| PgConnection::db().session()?.send(LEAVE)).unwrap();
    }),
    ("a resolvable commit", |app| {
        let scope = app.scope().resolvable().isolation(Isolation::Serializable);
        scope.run_and_commit(|| PgConnection::db().session()?.send(LEAVE)).unwrap();
    }),
    ("a session that is dropped", |app| {
        let session = app.open_session().unwrap();
        session.send(LEAVE).unwrap();
    }),
    ("a disposal", |app| {
        let session = app.open_session().unwrap();
        session.send(LEAVE).unwrap();
        app.dispose_report_within(Duration::from_millis(1)).unwrap();
        drop(session);
        app.dispose().unwrap();
    }),
    ("create_all and drop_all", |app| {
        assert_eq!(app.create_all().unwrap().len(), 1);
        assert!(app.migrations().unwrap()[0].applied);
        assert_eq!(app.drop_all().unwrap().len(), 1);
    }),
    ("a ping", |app| app.ping().unwrap()),
];

fn nothing_that_a_session_leaves_reaches_another_client() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id SERIAL PRIMARY KEY, name TEXT NOT NULL)");
    // The client finds what another one leaves.
    let (soiled, url) = round_robin(&test_db);
    let mut client = PgConnection::establish(&url).unwrap();
    let at_first = state_of_sessions(&mut client);
    PgConnection::establish(&url).unwrap().batch_execute(LEAVE).unwrap();
    assert_ne!(state_of_sessions(&mut client), at_first);
    drop((client, soiled));
    let (_pooler, url) = round_robin(&test_db);
    let mut neighbour = Neighbour::of(&url);
    let plain = Config::new(&url).behind(TRANSACTIONS);
    let limited = plain.clone().statement_timeout(Duration::from_secs(5)).lock_timeout(Duration::from_secs(4));
    for config in [plain, limited] {
        let app = PgConnection::app(config);
        for (name, operation) in OPERATIONS {
            // An odd number of transactions changes which session comes next.
            for _ in 0..3 {
                operation(&app);
                neighbour.assert_finds_nothing(name);
            }
        }
    }
}

/// Two applications, whose connections give their statements the same names.
fn statements_of_two_applications_do_not_get_mixed_up() {
    let test_db = TestDatabase::postgres();
    direct(
        &test_db,
        "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT NOT NULL); \
         INSERT INTO items SELECT n, concat('item ', n) FROM generate_series(1, 50) AS n; \
         CREATE TABLE others (id INTEGER PRIMARY KEY, name TEXT NOT NULL); \
         INSERT INTO others SELECT n, concat('other ', n) FROM generate_series(1, 50) AS n",
    );
    let (_pooler, url) = round_robin(&test_db);
    let run = |behind: Behind| {
        let db = Database::<PgConnection>::without_migrations();
        let [reads, deletes] = ["reads", "deletes"].map(|id| {
            let config = Config::new(&url).behind(behind).max_size(2);
            db.init_app(id, config).unwrap()
        });
        let outcomes = together(4, |number| {
            let mut wrong = 0;
            for round in 0..100_i32 {
                let id = round % 50 + 1;
                let is_right = match number % 2 {
                    0 => reads
                        .run(|| db.session()?.first::<(i32, String)>(items::table.find(id)))
                        .is_ok_and(|row| row == (id, format!("item {id}"))),
                    _ => deletes
                        .run(|| db.session()?.execute(diesel::delete(others::table.find(1_000 + id))))
                        .is_ok_and(|deleted| deleted == 0),
                };
                wrong += usize::from(!is_right);
            }
            wrong
        });
        db.dispose_all().unwrap();
        outcomes.into_iter().sum::<usize>()
    };
    assert_eq!(run(TRANSACTIONS), 0);
    let mut server = PgConnection::establish(&test_db.url()).unwrap();
    let count = "SELECT (SELECT count(*) FROM items) + (SELECT count(*) FROM others) AS number";
    assert_eq!(server.number(count).unwrap(), 100);
    // A PgBouncer that keeps no prepared statements mixes them up.
    if is_old_pgbouncer() {
        assert!(run(Behind::TransactionPooler { keeps_prepared: true }) > 0);
    }
}

fn is_old_pgbouncer() -> bool {
    Pgbouncer::version() < (1, 21)
}

fn deadline_of_one_client_does_not_cancel_another() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT NOT NULL)");
    let (_pooler, url) = round_robin(&test_db);
    let app = PgConnection::app(Config::new(&url).behind(TRANSACTIONS));
    let mut neighbour = PgConnection::establish(&url).unwrap();
    for round in 0..4 {
        let limited = app.scope().deadline(Duration::from_millis(300)).autocommit();
        limited.run(|| PgConnection::db().session()?.count(items::table).map(drop)).unwrap();
        let outcome = neighbour.batch_execute("SELECT pg_sleep(0.6)");
        assert!(outcome.is_ok(), "round {round}: {outcome:?}");
    }
    // The deadline holds for the client that has it.
    let limited = app.scope().deadline(Duration::from_millis(300)).autocommit();
    let started = Instant::now();
    let error = limited.run(|| PgConnection::db().session()?.send("SELECT pg_sleep(5)")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

fn limits_of_the_configuration_hold_in_each_transaction() {
    const LIMITS: &str = "SELECT (SELECT setting::int8 FROM pg_settings WHERE name = 'statement_timeout') * 10000 + \
         (SELECT setting::int8 FROM pg_settings WHERE name = 'lock_timeout') AS number";
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = round_robin(&test_db);
    let config = Config::new(&url).behind(TRANSACTIONS);
    let config = config.statement_timeout(Duration::from_millis(7_000)).lock_timeout(Duration::from_millis(900));
    let app = PgConnection::app(config);
    let limits = || PgConnection::db().session()?.number(LIMITS);
    for _ in 0..4 {
        assert_eq!(app.run(limits).unwrap(), 70_000_900);
        assert_eq!(app.scope().autocommit().run(limits).unwrap(), 70_000_900);
        assert_eq!(app.scope().read_only().run(limits).unwrap(), 70_000_900);
        // The limit that ends first holds.
        let limited = app.scope().deadline(Duration::from_secs(2)).run(limits).unwrap();
        assert!((10_000_900..=20_000_900).contains(&limited), "{limited}");
        let limited = app.scope().deadline(Duration::from_secs(60)).run(limits).unwrap();
        assert_eq!(limited, 70_000_900);
    }
    let plain = PgConnection::app(Config::new(&url).behind(TRANSACTIONS));
    for _ in 0..4 {
        assert_eq!(plain.run(limits).unwrap(), 0);
    }
}

fn pooler_that_is_not_declared_is_refused() {
    for mode in ["transaction", "session"] {
        let test_db = TestDatabase::postgres();
        let (_pooler, url) = pooler(&test_db, &format!("pool_mode = {mode}"));
        // The sessions of the server become older than a connect takes.
        thread::sleep(Duration::from_millis(300));
        let app = PgConnection::app(Config::new(&url));
        let error = app.ping().unwrap_err();
        assert_eq!(error.connect_error_kind(), Some(ConnectErrorKind::UndeclaredPooler), "{mode}: {error}");
        assert!(error.to_string().contains("`Config::behind`") && !error.is_transient(), "{error}");
        let behind = if mode == "session" { Behind::SessionPooler } else { TRANSACTIONS };
        let declared = PgConnection::app(Config::new(&url).behind(behind));
        declared.ping().unwrap();
        PgConnection::app(test_db.config()).ping().unwrap();
        assert_eq!(app.status().open, 0);
        // The refused connection has set nothing.
        let limited = PgConnection::app(Config::new(&url).statement_timeout(Duration::from_millis(200)));
        let mut neighbour = Neighbour::of(&url);
        for _ in 0..4 {
            limited.ping().unwrap_err();
        }
        neighbour.assert_finds_nothing("a refused connection");
    }
}

fn session_keeps_its_application_name_behind_a_pooler_in_session_mode() {
    const NAME: &str = "SELECT count(*) AS number FROM pg_stat_activity \
         WHERE pid = pg_backend_pid() AND application_name = 'the shop''s'";
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = pooler(&test_db, "pool_mode = session");
    let config = Config::new(&url).behind(Behind::SessionPooler).max_size(1).application_name("the shop's");
    let app = PgConnection::app(config);
    let has_name = || PgConnection::db().session()?.number(NAME);
    for _ in 0..3 {
        assert_eq!(app.run(has_name).unwrap(), 1);
    }
    app.run(|| PgConnection::db().session()?.send("SET application_name = 'other'; SET statement_timeout = 7"))
        .unwrap();
    assert_eq!(app.run(has_name).unwrap(), 1);
}

fn options_that_a_pooler_cannot_apply_are_refused() {
    let db = Database::<PgConnection>::without_migrations();
    let refused = |config: Config| {
        let error = db.init_app("refused", config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        error.to_string()
    };
    let with = |url: &str| Config::new(url).behind(TRANSACTIONS);
    assert!(refused(with("postgres://h/db").connection_init_sql("SET x.y = 1")).contains("connection_init_sql"));
    let text = refused(with("postgres://h/db?options=-csearch_path%3Dhunter2"));
    assert!(text.contains("ALTER ROLE") && !text.contains("hunter2"), "{text}");
    let text = refused(Config::new("postgres://h/db").schema_url("mysql://app:hunter2@h/db"));
    assert!(text.contains("schema_url") && !text.contains("hunter2"), "{text}");
    assert!(!format!("{:?}", with("postgres://h/db").schema_url("postgres://a:hunter2@h/db")).contains("hunter2"));
    let sqlite = Database::<SqliteConnection>::without_migrations();
    for config in [Config::new(":memory:").behind(TRANSACTIONS), Config::new(":memory:").schema_url(":memory:")] {
        assert_eq!(sqlite.init_app("sqlite", config).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}

fn schema_url_changes_the_schema_behind_a_pooler() {
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = round_robin(&test_db);
    let concurrently =
        step("2", "CREATE INDEX CONCURRENTLY i ON one (id)", "DROP INDEX CONCURRENTLY i").outside_a_transaction();
    let steps = vec![step("1", "CREATE TABLE one (id INTEGER PRIMARY KEY)", "DROP TABLE one"), concurrently];
    let db = Database::<PgConnection, _>::new(Steps(steps));
    let pooled = Config::new(&url).behind(TRANSACTIONS);
    let app = db.init_app("pooled", pooled.clone()).unwrap();
    assert_eq!(app.create_all().unwrap_err().kind(), ErrorKind::PoolerInTransactionMode);
    let before = test_db.connections();
    let app = db.init_app("with a URL for the schema", pooled.schema_url(test_db.url())).unwrap();
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    assert!(app.migrations().unwrap().iter().all(|migration| migration.applied));
    let open = app.open_session().unwrap();
    open.begin().unwrap();
    assert_eq!(app.drop_all().unwrap_err().kind(), ErrorKind::TransactionOpen);
    open.rollback().unwrap();
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    test_db.assert_connections(before);
    // A URL of another database is refused, before anything is done.
    let other = TestDatabase::postgres();
    direct(&other, "CREATE TABLE one (id INTEGER PRIMARY KEY)");
    let pooled = Config::new(&url).behind(TRANSACTIONS);
    let app = db.init_app("with another database", pooled.clone().schema_url(other.url())).unwrap();
    for refused in [app.create_all().map(drop), app.drop_all().map(drop), app.migrations().map(drop)] {
        let error = refused.unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("schema_url"), "{error}");
    }
    // A URL that leads to a pooler all the same is refused.
    let app = db.init_app("with a wrong URL", pooled.schema_url(&url)).unwrap();
    let error = app.create_all().unwrap_err();
    assert_eq!(error.connect_error_kind(), Some(ConnectErrorKind::UndeclaredPooler), "{error}");
    db.dispose_all().unwrap();
}

fn error_of_a_deferred_constraint_is_that_of_the_autocommitted_statement() {
    let test_db = TestDatabase::postgres();
    direct(
        &test_db,
        "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED); \
         INSERT INTO items VALUES (1, 'one')",
    );
    let (_pooler, url) = round_robin(&test_db);
    let app = PgConnection::app(Config::new(&url).behind(TRANSACTIONS).statement_timeout(Duration::from_secs(5)));
    let twice = diesel::insert_into(items::table).values((items::id.eq(2), items::name.eq("one")));
    let typed = app.scope().autocommit().run(|| PgConnection::db().session()?.execute(twice)).unwrap_err();
    let raw = "INSERT INTO items VALUES (2, 'one')";
    let raw_error = app.scope().autocommit().run(|| PgConnection::db().session()?.send(raw)).unwrap_err();
    let in_transaction = app.run(|| PgConnection::db().session()?.send(raw)).unwrap_err();
    for error in [typed, raw_error, in_transaction] {
        assert!(error.is_unique_violation(), "{error}");
    }
    assert_eq!(app.run(|| PgConnection::db().session()?.count(items::table)).unwrap(), 1);
    assert_eq!(app.status().in_use, 0);
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = items)]
#[entity(new = NewItem)]
struct Item {
    #[entity(generated)]
    id: i32,
    name: String,
}

fn new_item(name: &str) -> NewItem {
    NewItem { name: name.into() }
}

fn unit_of_work_behaves_behind_a_pooler_as_without_one() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id SERIAL PRIMARY KEY, name TEXT NOT NULL)");
    let (_pooler, url) = round_robin(&test_db);
    let mut server = PgConnection::establish(&test_db.url()).unwrap();
    let mut number = |sql: &str| server.number(&format!("SELECT count(*) AS number FROM {sql}")).unwrap();
    let pooled = Config::new(&url).behind(TRANSACTIONS);
    let limited = pooled.clone().statement_timeout(Duration::from_secs(5));
    let always = pooled.clone().reset(Reset::Always);
    for config in [test_db.config(), pooled, limited, always] {
        direct(&test_db, "TRUNCATE items");
        let app = PgConnection::app(config);
        let first = app.run(|| {
            let session = PgConnection::db().session()?;
            let row = session.add(new_item("one"))?;
            session.flush()?;
            row.write().name = "two".into();
            let undone = session.savepoint(|session| {
                session.add(new_item("undone"))?;
                session.flush()?;
                session.send("SELECT pg_advisory_lock(4711); SELECT nonsense")
            });
            undone.unwrap_err();
            let id = row.read().id;
            Ok(id)
        });
        let first = first.unwrap();
        let outcome = app.scope().autocommit().run(|| {
            let session = PgConnection::db().session()?;
            let row = session.find::<Item>(first)?;
            assert_eq!(row.read().name, "two");
            row.write().name = "three".into();
            session.add(new_item("new"))?;
            session.flush()?;
            session.savepoint(|session| session.send("UPDATE items SET name = 'four' WHERE name = 'new'"))?;
            let refused = session.savepoint(|session| session.send("SELECT nonsense"));
            refused.unwrap_err();
            Ok::<(), Error>(())
        });
        outcome.unwrap();
        let retried = app.context(|| {
            PgConnection::db().session()?.retry(2, |session| {
                session.send("SELECT pg_advisory_lock(4711)")?;
                session.count(items::table)
            })
        });
        assert_eq!(retried.unwrap(), 2);
        assert_eq!(number(&format!("items WHERE name = 'three' AND id = {first}")), 1);
        assert_eq!(number("items WHERE name = 'four'"), 1);
        assert_eq!(number("pg_locks WHERE locktype = 'advisory'"), 0);
        assert_eq!(app.status().in_use, 0);
    }
}

/// The answer to the commit of an autocommitted statement is lost. The error must not say that it has failed.
fn commit_of_an_autocommitted_statement_may_be_unknown() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT NOT NULL)");
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    let (pooler, _) = round_robin(&test_db);
    let proxy = Proxy::to(("127.0.0.1", pooler.port()));
    let url = pooler.url_of(database.name()).replace(&pooler.port().to_string(), &proxy.port().to_string());
    let mut server = PgConnection::establish(&test_db.url()).unwrap();
    for (id, cut, moment) in [
        (1, "INSERT", Moment::BeforeForwarding),
        (2, "INSERT", Moment::BeforeAnswer),
        (3, "COMMIT", Moment::BeforeForwarding),
        (4, "COMMIT", Moment::BeforeAnswer),
    ] {
        for raw in [false, true] {
            let id = if raw { id + 10 } else { id };
            let config = Config::new(&url).behind(TRANSACTIONS).statement_timeout(Duration::from_secs(5));
            let app = PgConnection::app(config);
            app.ping().unwrap();
            proxy.set(Mode::CutOn(cut.into(), moment));
            let error = app.scope().autocommit().run(|| {
                let session = PgConnection::db().session()?;
                match raw {
                    false => session
                        .execute(diesel::insert_into(items::table).values((items::id.eq(id), items::name.eq("x")))),
                    true => session.execute(diesel::sql_query(format!("INSERT INTO items VALUES ({id}, 'x')"))),
                }
            });
            let error = error.unwrap_err();
            proxy.set(Mode::Pass);
            let exists = server.number(&format!("SELECT count(*) AS number FROM items WHERE id = {id}")).unwrap() == 1;
            assert_eq!(error.is_commit_unknown(), cut == "COMMIT", "{error}");
            assert_eq!(exists, (cut, moment) == ("COMMIT", Moment::BeforeAnswer), "{error}");
        }
    }
}

fn migrations_leave_nothing_behind_a_pooler() {
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = round_robin(&test_db);
    let mut neighbour = Neighbour::of(&url);
    let leave =
        format!("CREATE TABLE one (id INTEGER PRIMARY KEY); {LEAVE}; CREATE TEMP TABLE left_table (id INTEGER)");
    let leaving = step("1", &leave, "DROP TABLE one");
    let failing = step("1", format!("{leave}; SELECT nonsense"), "DROP TABLE one");
    for (step, works) in [(failing, false), (leaving, true)] {
        let db = Database::<PgConnection, _>::new(Steps(vec![step]));
        let app = db.init_app("leaves", Config::new(&url).behind(TRANSACTIONS)).unwrap();
        for _ in 0..3 {
            assert_eq!(app.create_all().is_ok(), works);
            neighbour.assert_finds_nothing("create_all");
            if works {
                app.drop_all().unwrap();
            }
        }
        db.dispose_all().unwrap();
    }
}

/// The limit on connections counts those that change the schema, and one connection is enough for it.
fn schema_url_needs_no_second_connection_of_a_limit() {
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = round_robin(&test_db);
    // The pooler would refuse this migration.
    let outside = step("1", "CREATE TABLE one (id INTEGER PRIMARY KEY)", "DROP TABLE one").outside_a_transaction();
    let db = Database::<PgConnection, _>::new(Steps(vec![outside])).max_connections(1);
    let config = Config::new(&url).behind(TRANSACTIONS).schema_url(test_db.url());
    let app = db.init_app("limited", config).unwrap();
    app.ping().unwrap();
    assert_eq!(app.create_all().unwrap(), ["1"]);
    app.ping().unwrap();
    assert_eq!(app.drop_all().unwrap(), ["1"]);
    db.dispose_all().unwrap();
}

fn enum_of_connections_is_safe_behind_a_pooler() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id SERIAL PRIMARY KEY, name TEXT NOT NULL)");
    let (_pooler, url) = round_robin(&test_db);
    let mut neighbour = Neighbour::of(&url);
    let app = AnyConnection::app(Config::new(&url).behind(TRANSACTIONS));
    for _ in 0..3 {
        app.run(|| AnyConnection::db().session()?.load::<i32>(items::table.select(items::id).into_boxed())).unwrap();
        app.run(|| AnyConnection::db().session()?.send(LEAVE)).unwrap();
        app.scope().autocommit().run(|| AnyConnection::db().session()?.send(LEAVE)).unwrap();
        app.context(|| AnyConnection::db().session()?.send(LEAVE)).unwrap();
        neighbour.assert_finds_nothing("a round");
    }
}

/// A hook of a commit uses the session again, which begins another transaction.
fn hooks_of_a_commit_leave_nothing_behind_a_pooler() {
    let test_db = TestDatabase::postgres();
    direct(&test_db, "CREATE TABLE items (id SERIAL PRIMARY KEY, name TEXT NOT NULL)");
    let (_pooler, url) = round_robin(&test_db);
    let mut neighbour = Neighbour::of(&url);
    let app = PgConnection::app(Config::new(&url).behind(TRANSACTIONS));
    for _ in 0..3 {
        app.run(|| {
            let session = PgConnection::db().session()?;
            session.before_commit(|| PgConnection::db().session()?.send(LEAVE))?;
            session.after_commit(|| PgConnection::db().session().unwrap().send(LEAVE).unwrap())?;
            session.send("INSERT INTO items (name) VALUES ('a')")
        })
        .unwrap();
        neighbour.assert_finds_nothing("a round");
    }
}

/// `Config::schema_url` is the real database's. A test has another one.
fn tests_change_no_schema_but_their_own() {
    let test_db = TestDatabase::postgres();
    let (_pooler, url) = round_robin(&test_db);
    let real = PgConnection::app(test_db.config());
    assert!(!real.create_all().unwrap().is_empty());
    let direct = test_db.config().schema_url(test_db.url());
    let pooled = Config::new(&url).behind(TRANSACTIONS).schema_url(test_db.url());
    for config in [direct, pooled.clone()] {
        for isolation in [TestIsolation::Database, TestIsolation::Schema, TestIsolation::Rollback] {
            let setup = TestSetup::of(PgConnection::db()).config(config.clone()).isolation(isolation);
            let test = setup.start().unwrap();
            test.run(|| PgConnection::db().session()?.send(INSERT)).unwrap();
            assert!(!test.drop_all().unwrap().is_empty());
            test.finish().unwrap();
            assert_eq!(real.context(|| PgConnection::db().session()?.number(COUNT)).unwrap(), 0);
        }
    }
    let without_url = Config::new(&url).behind(TRANSACTIONS);
    let refused = TestSetup::of(PgConnection::db()).config(without_url).start().unwrap_err();
    assert!(refused.kind() == ErrorKind::InvalidConfig && refused.to_string().contains("schema_url"), "{refused}");
}
