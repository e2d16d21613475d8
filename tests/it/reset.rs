//! What a holder leaves on a connection, and what the next holder finds.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel::sql_types::{Bool, Integer, Text};
use diesel_session::pool::Reset;
use diesel_session::{App, Config, Database, Result, Session};

use crate::fixtures::{
    AnyConnection, COUNT, INSERT, SessionExt, Steps, TestConnection, TestDatabase, connect_any, step, unique,
};
use crate::for_each_database;
use crate::support::{self, wait};

for_each_database!(every_database =>
    reset_removes_session_state_between_holders,
    reset_never_keeps_session_state,
    reset_restores_the_settings_of_on_connect,
    reset_restores_the_configured_limits,
    session_state_of_migrations_reaches_no_holder,
    plain_statements_need_no_reset,
    reset_always_resets_after_each_holder,
    connection_to_be_closed_is_not_reset,
);
for_each_database!(every_server => lock_is_released_when_commit_returns);
for_each_database!(only mariadb => reset_releases_a_lock_of_a_program_function_on_mariadb);
for_each_database!(only postgres =>
    reset_removes_effects_of_program_functions_in_typed_statements,
    reset_restores_the_role_of_a_superuser,
    reset_keeps_the_prepared_statements_of_diesel,
    connection_by_a_local_socket_is_reset_although_another_part_of_the_program_connects,
);

/// A thing to leave behind.
struct Leftover {
    name: &'static str,
    /// What leaves it; each can be sent by itself.
    statement: String,
    /// `1` where it is there.
    probe: String,
    /// It cannot be left inside of a transaction.
    outside: bool,
}

fn leftover(name: &'static str, statement: impl Into<String>, probe: impl Into<String>) -> Leftover {
    Leftover { name, statement: statement.into(), probe: probe.into(), outside: false }
}

fn leftovers(test_db: &TestDatabase) -> Vec<Leftover> {
    let is = |condition: &str| format!("SELECT CASE WHEN {condition} THEN 1 ELSE 0 END::bigint AS number");
    let holds = |condition: &str| format!("SELECT CAST({condition} AS SIGNED) AS number");
    match test_db {
        TestDatabase::Postgres(_) => {
            let role = unique("clean_hands_role").replace('-', "_");
            support::postgres()
                .admin()
                .batch_execute(&format!("CREATE ROLE {role}; GRANT {role} TO {}", support::ROLE))
                .unwrap();
            vec![
                leftover("a setting", "SET work_mem = '77MB'", is("current_setting('work_mem') = '77MB'")),
                leftover(
                    "a setting of the program",
                    "SET shop.tenant = 'a'",
                    is("current_setting('shop.tenant', true) = 'a'"),
                ),
                leftover(
                    "a function's setting",
                    "SELECT set_config('work_mem', '77MB', false)",
                    is("current_setting('work_mem') = '77MB'"),
                ),
                leftover("the search path", "SET search_path = nowhere", is("current_schema() IS NULL")),
                leftover("the time zone", "SET TIME ZONE 'Asia/Tokyo'", is("current_setting('TimeZone') <> 'UTC'")),
                leftover(
                    "the encoding",
                    "SET client_encoding TO 'LATIN1'",
                    is("current_setting('client_encoding') <> 'UTF8'"),
                ),
                leftover(
                    "a time limit",
                    "SET statement_timeout = 12345",
                    is("current_setting('statement_timeout') <> '0'"),
                ),
                leftover(
                    "reading only",
                    "SET default_transaction_read_only = on",
                    is("current_setting('default_transaction_read_only') = 'on'"),
                ),
                leftover("a role", format!("SET ROLE {role}"), is("current_user <> session_user")),
                leftover(
                    "a lock",
                    "SELECT pg_advisory_lock(42)",
                    is("EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())"),
                ),
                leftover(
                    "a temporary table",
                    "CREATE TEMPORARY TABLE left_over (a int)",
                    is("to_regclass('pg_temp.left_over') IS NOT NULL"),
                ),
                leftover("a channel", "LISTEN news", "SELECT count(*) AS number FROM pg_listening_channels()"),
                leftover(
                    "a cursor",
                    "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
                    "SELECT count(*) AS number FROM pg_cursors WHERE name = 'held'",
                ),
                leftover(
                    "a sequence's value",
                    "SELECT nextval('entries_id_seq')",
                    "SELECT 1::bigint + 0 * lastval() AS number",
                ),
            ]
        }
        TestDatabase::Mariadb(_) => {
            let lock = unique("clean-hands");
            vec![
                leftover("a setting", "SET SESSION sort_buffer_size = 131072", holds("@@sort_buffer_size = 131072")),
                leftover("the time zone", "SET time_zone = '+05:00'", holds("@@time_zone = '+05:00'")),
                leftover("a variable", "SET @left_over = 1", holds("@left_over IS NOT NULL")),
                leftover("a variable that was assigned", "SELECT @left_over := 1", holds("@left_over IS NOT NULL")),
                leftover("a variable that was selected", "SELECT 1 INTO @left_over", holds("@left_over IS NOT NULL")),
                leftover(
                    "a comment that is executed",
                    "/*!50000 SET @left_over = 1 */",
                    holds("@left_over IS NOT NULL"),
                ),
                leftover(
                    "a lock",
                    format!("SELECT GET_LOCK('{lock}', 0)"),
                    holds(&format!("IS_USED_LOCK('{lock}') IS NOT NULL")),
                ),
                leftover(
                    "a temporary table",
                    "CREATE TEMPORARY TABLE left_over (a INT)",
                    "SELECT 1 + COUNT(*) AS number FROM left_over",
                ),
            ]
        }
        TestDatabase::Sqlite(_) => {
            let pragma = |name: &str, value: i64| format!("SELECT {name} = {value} AS number FROM pragma_{name}");
            let outside = |leftover: Leftover| Leftover { outside: true, ..leftover };
            vec![
                leftover("a pragma", "PRAGMA cache_size = 77", pragma("cache_size", 77)),
                outside(leftover("foreign keys", "PRAGMA foreign_keys = 0", pragma("foreign_keys", 0))),
                outside(leftover(
                    "an attached database",
                    "ATTACH ':memory:' AS other",
                    "SELECT count(*) AS number FROM pragma_database_list WHERE name = 'other'",
                )),
                leftover(
                    "a temporary table",
                    "CREATE TEMPORARY TABLE left_over (a INTEGER)",
                    "SELECT count(*) AS number FROM temp.sqlite_master WHERE name = 'left_over'",
                ),
            ]
        }
    }
}

/// The ways in which a program leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    With,
    Guard,
    /// The statement before it in the same text is plain, the one after it fails.
    AmongOthers,
    /// The panic is caught by the code that has the connection.
    CaughtPanic,
    Autocommit,
}

const WAYS: [Way; 5] = [Way::With, Way::Guard, Way::AmongOthers, Way::CaughtPanic, Way::Autocommit];

impl Way {
    fn leave<C: TestConnection>(self, db: &Database<C>, app: &App<C>, sql: &str) {
        let scope = app.scope();
        let send = || -> Result<()> {
            let session = db.session()?;
            match self {
                Self::With | Self::Autocommit => session.send(sql),
                Self::Guard => Ok(session.connection()?.batch_execute(sql)?),
                Self::AmongOthers => session.savepoint(|session| session.send(&format!("SELECT 1; {sql}"))),
                Self::CaughtPanic => session.with(|conn| {
                    let caught = catch_unwind(AssertUnwindSafe(|| {
                        conn.batch_execute(sql).unwrap();
                        panic!("on purpose")
                    }));
                    assert!(caught.is_err());
                    Ok(())
                }),
            }
        };
        match self {
            Self::Autocommit => scope.autocommit().run(send),
            _ => scope.run_and_commit(send),
        }
        .unwrap_or_else(|error| panic!("{self:?}, `{sql}`: {error}"));
    }
}

/// What the next holder sees. It finds no such table or value if nothing was left.
fn is_there<C: TestConnection>(app: &App<C>, leftover: &Leftover) -> bool {
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    session.number(&leftover.probe).is_ok_and(|number| number == 1)
}

fn reset_removes_session_state_between_holders<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    app.create_all().unwrap();
    for leftover in leftovers(test_db) {
        for way in WAYS {
            if leftover.outside && way != Way::Autocommit {
                continue;
            }
            way.leave(C::db(), &app, &leftover.statement);
            // A server notices a little later that a connection was closed.
            let patience = if app.status().open == 0 { Duration::from_secs(5) } else { Duration::ZERO };
            let gone = wait::until(patience, || !is_there(&app, &leftover));
            assert!(gone, "{} is there, left by {way:?}", leftover.name);
        }
    }
    if let TestDatabase::Postgres(database) = test_db {
        assert_eq!(support::postgres().backend_pids(database.name()).len(), 1);
        assert_eq!(app.dispose_report().unwrap().closed, 1, "one connection served all");
    }
}

/// So that the test above can fail.
fn reset_never_keeps_session_state<C: TestConnection>(test_db: &TestDatabase) {
    C::app(test_db.config()).create_all().unwrap();
    for leftover in leftovers(test_db) {
        for way in WAYS {
            if leftover.outside && way != Way::Autocommit {
                continue;
            }
            let app = C::app(test_db.config().max_size(1).reset(Reset::Never));
            way.leave(C::db(), &app, &leftover.statement);
            assert_eq!(app.status().open, 1);
            assert!(is_there(&app, &leftover), "{} is not there, left by {way:?}", leftover.name);
        }
    }
}

/// A setting of the program, what a holder changes it to, and a query for whether it is the program's.
fn setting(test_db: &TestDatabase) -> [&'static str; 3] {
    match test_db {
        TestDatabase::Postgres(_) => [
            "SET work_mem = '5MB'",
            "SET work_mem = '77MB'",
            "SELECT CASE WHEN current_setting('work_mem') = '5MB' THEN 1 ELSE 0 END::bigint AS number",
        ],
        TestDatabase::Mariadb(_) => [
            "SET SESSION sort_buffer_size = 65536",
            "SET SESSION sort_buffer_size = 131072",
            "SELECT CAST(@@sort_buffer_size = 65536 AS SIGNED) AS number",
        ],
        TestDatabase::Sqlite(_) => [
            "PRAGMA cache_size = 55",
            "PRAGMA cache_size = 77",
            "SELECT cache_size = 55 AS number FROM pragma_cache_size",
        ],
    }
}

fn reset_restores_the_settings_of_on_connect<C: TestConnection>(test_db: &TestDatabase) {
    fn with_a_table<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
        // Of the hook's own transaction nothing is left either.
        conn.transaction(|conn| conn.batch_execute("CREATE TEMPORARY TABLE of_the_hook (a INTEGER)"))
    }
    let [own, left, probe] = setting(test_db);
    let db = C::new_db().on_connect(with_a_table::<C>);
    let app = db.init_app(unique("own"), test_db.config().max_size(1).connection_init_sql(own)).unwrap();
    for way in WAYS {
        way.leave(&db, &app, left);
        let session = app.open_session().unwrap();
        assert_eq!(session.number(probe).unwrap(), 1, "{way:?}");
        assert_eq!(session.number("SELECT count(*) AS number FROM of_the_hook").unwrap(), 0, "{way:?}");
    }
    if let TestDatabase::Postgres(_) = test_db {
        assert_eq!(app.status().open, 1);
    }
    app.dispose().unwrap();
}

fn reset_restores_the_configured_limits<C: TestConnection>(test_db: &TestDatabase) {
    let limit = Duration::from_secs(7);
    let app = C::app(test_db.config().max_size(1).statement_timeout(limit).lock_timeout(limit));
    let (left, probe) = match test_db {
        TestDatabase::Postgres(_) => (
            "SET statement_timeout = 0; SET lock_timeout = 0",
            "SELECT count(*) AS number FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout') AND setting = '7000'",
        ),
        TestDatabase::Mariadb(_) => (
            "SET SESSION max_statement_time = 0, SESSION lock_wait_timeout = 77",
            "SELECT CAST((@@max_statement_time = 7) + (@@lock_wait_timeout = 7) AS SIGNED) AS number",
        ),
        TestDatabase::Sqlite(_) => {
            ("PRAGMA busy_timeout = 0", "SELECT 2 * (timeout = 7000) AS number FROM pragma_busy_timeout")
        }
    };
    for _ in 0..2 {
        Way::Autocommit.leave(C::db(), &app, left);
        assert_eq!(app.open_session().unwrap().number(probe).unwrap(), 2);
    }
}

fn session_state_of_migrations_reaches_no_holder<C: TestConnection>(test_db: &TestDatabase) {
    let [_, left, probe] = setting(test_db);
    let probe = probe.replace("5MB", "77MB").replace("65536", "131072").replace("55", "77");
    let steps =
        Steps(vec![step("1", format!("CREATE TABLE made (a INTEGER); {left}"), format!("DROP TABLE made; {left}"))]);
    for reset in [Reset::WhenDirty, Reset::Never] {
        let db = db_with::<C>(steps.clone());
        let app = db.init_app(unique("migrated"), test_db.config().max_size(1).reset(reset)).unwrap();
        let seen = || app.open_session().unwrap().number(&probe).unwrap() == 1;
        app.create_all().unwrap();
        // PostgreSQL's settings are put back after each migration, whatever the reset.
        assert_eq!(seen(), reset == Reset::Never && !matches!(test_db, TestDatabase::Postgres(_)));
        app.drop_all().unwrap();
        // That connection is closed in any case, as it has prepared statements for the schema of before.
        assert!(!seen());
        app.create_all().unwrap();
        // Nothing to do is nothing done.
        app.create_all().unwrap();
        app.ping().unwrap();
        app.create_all().unwrap();
        assert_eq!(app.status().open, 1);
        app.drop_all().unwrap();
        app.dispose().unwrap();
    }
}

fn db_with<C: TestConnection>(steps: Steps) -> Database<C, Steps>
where
    Steps: diesel::migration::MigrationSource<C::Backend>,
{
    let db = Database::<C, Steps>::new(steps);
    match (&C::db() as &dyn std::any::Any).downcast_ref::<&'static Database<AnyConnection>>() {
        // The enum's own `establish` tells no reason; it takes SQLite's path for PostgreSQL's and is asked last.
        Some(_) => db.connect_with(|url| {
            let any: Box<dyn std::any::Any> = Box::new(connect_any(url)?);
            Ok(*any.downcast().expect("it is the enum"))
        }),
        None => db,
    }
}

/// Which connection it is, where that can be told.
fn connection_of<C: TestConnection>(app: &App<C>, test_db: &TestDatabase) -> i64 {
    app.open_session()
        .unwrap()
        .number(match test_db {
            TestDatabase::Postgres(_) => "SELECT pg_backend_pid()::bigint AS number",
            TestDatabase::Mariadb(_) => "SELECT CONNECTION_ID() AS number",
            TestDatabase::Sqlite(_) => "SELECT cache_size AS number FROM pragma_cache_size",
        })
        .unwrap()
}

fn plain_statements_need_no_reset<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    app.create_all().unwrap();
    let before = connection_of(&app, test_db);
    app.run(|| {
        let session = C::db().session()?;
        session.send(INSERT)?;
        session.send("UPDATE entries SET author = 'Bob; SET a = 1'; DELETE FROM entries WHERE author = 'Cid'")?;
        session.with(|conn| conn.transaction(|conn| conn.batch_execute(INSERT)))?;
        let undone: QueryResult<()> = session.connection()?.transaction(|conn| {
            conn.batch_execute(INSERT)?;
            Err(diesel::result::Error::RollbackTransaction)
        });
        assert!(undone.is_err());
        assert_eq!(session.number(COUNT)?, 2);
        Ok::<_, diesel_session::Error>(())
    })
    .unwrap();
    assert_eq!(app.status().open, 1);
    assert_eq!(connection_of(&app, test_db), before);
}

fn reset_always_resets_after_each_holder<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1).reset(Reset::Always));
    for _ in 0..2 {
        app.ping().unwrap();
        let kept = matches!(test_db, TestDatabase::Postgres(_));
        assert_eq!(app.status().open, usize::from(kept));
    }
    assert_eq!(app.status().in_use, 0);
}

fn connection_to_be_closed_is_not_reset<C: TestConnection>(test_db: &TestDatabase) {
    // A reset would run it again, and the second time it fails.
    let once = match test_db {
        TestDatabase::Postgres(_) => "PREPARE once AS SELECT 1",
        _ => "CREATE TEMPORARY TABLE once (a INTEGER)",
    };
    let app = C::app(test_db.config().max_size(1).connection_init_sql(once));
    for ending in ["COMMIT", "ROLLBACK"] {
        let session = app.open_session().unwrap();
        session.send(ending).unwrap();
        session.rollback().unwrap();
        assert_eq!(app.status().open, 0);
    }
    // A connection that cannot be reset is closed. This is no error of its holder.
    app.run(|| C::db().session()?.send("SELECT 1")).unwrap();
    app.ping().unwrap();
    assert_eq!((app.status().open, app.status().in_use), (1, 0));
}

fn lock_is_released_when_commit_returns<C: TestConnection>(test_db: &TestDatabase) {
    let TestDatabase::Postgres(_) = test_db else { return };
    let (app, other) = (C::app(test_db.config()), C::app(test_db.config()));
    for _ in 0..20 {
        let session = app.open_session().unwrap();
        session.send("SELECT pg_advisory_lock(43)").unwrap();
        session.commit().unwrap();
        let free = other.open_session().unwrap().number("SELECT pg_try_advisory_lock(43)::int::bigint AS number");
        assert_eq!(free.unwrap(), 1);
    }
}

diesel::define_sql_function!(fn set_config(name: Text, value: Text, local: Bool) -> Text);

fn reset_removes_effects_of_program_functions_in_typed_statements() {
    type Statement = fn(&Session<PgConnection>) -> Result<()>;
    const WAYS: [(&str, Statement); 6] = [
        ("raw SQL", |session| session.execute(diesel::sql_query("SET shop.tenant = 'a'")).map(drop)),
        ("a function", |session| {
            session.load::<String>(diesel::select(set_config("shop.tenant", "a", false))).map(drop)
        }),
        ("a function in a condition", |session| {
            session
                .load::<i32>(one::table.select(one::id).filter(set_config("shop.tenant", "a", false).eq("a")))
                .map(drop)
        }),
        ("a fragment", |session| {
            session.load::<String>(diesel::select(sql::<Text>("set_config('shop.tenant', 'a', false)"))).map(drop)
        }),
        ("a boxed condition", |session| {
            let condition = sql::<Bool>("set_config('shop.tenant', 'a', false) = 'a'");
            session.load::<i32>(one::table.select(one::id).into_boxed().filter(condition)).map(drop)
        }),
        ("a selection", |session| session.load::<Selected>(one::table.select(Selected::as_select())).map(drop)),
    ];
    const PROBE: &str = "SELECT count(*) AS number WHERE current_setting('shop.tenant', true) = 'a'";
    let test_db = TestDatabase::postgres();
    for (reset, seen) in [(Reset::WhenDirty, 0), (Reset::Never, 1)] {
        for (way, leave) in WAYS {
            let app = PgConnection::app(
                test_db
                    .config()
                    .max_size(1)
                    .reset(reset)
                    .connection_init_sql("CREATE TEMPORARY TABLE one (id int); INSERT INTO one VALUES (1)"),
            );
            app.run(|| leave(&PgConnection::db().session()?)).unwrap();
            assert_eq!(app.open_session().unwrap().number(PROBE).unwrap(), seen, "{way}, {reset:?}");
            assert_eq!(app.dispose_report().unwrap().closed, 1);
        }
    }
}

diesel::table! {
    one (id) { id -> Integer, }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = one)]
#[allow(dead_code)]
struct Selected {
    #[diesel(select_expression = sql::<Text>("set_config('shop.tenant', 'a', false)"))]
    #[diesel(select_expression_type = diesel::expression::SqlLiteral<Text>)]
    tenant: String,
}

diesel::define_sql_function!(fn get_lock(name: Text, patience: Integer) -> Integer);

fn reset_releases_a_lock_of_a_program_function_on_mariadb() {
    let test_db = TestDatabase::mariadb();
    let name = unique("clean-hands-typed");
    let probe = format!("SELECT CAST(IS_USED_LOCK('{name}') IS NOT NULL AS SIGNED) AS number");
    for (reset, left) in [(Reset::WhenDirty, 0), (Reset::Never, 1)] {
        let app = MysqlConnection::app(test_db.config().max_size(1).reset(reset));
        let lock = || MysqlConnection::db().session()?.load::<i32>(diesel::select(get_lock(&name, 0)));
        assert_eq!(app.run(lock).unwrap(), [1]);
        let seen =
            wait::until_equal(left, Duration::from_secs(5), || app.open_session().unwrap().number(&probe).unwrap());
        assert_eq!(seen, left);
    }
}

fn reset_restores_the_role_of_a_superuser() {
    let test_db = TestDatabase::postgres();
    let boss = unique("clean_hands_boss").replace('-', "_");
    let mut admin = support::postgres().admin();
    admin.batch_execute(&format!("CREATE ROLE {boss} LOGIN SUPERUSER PASSWORD 'boss'")).unwrap();
    let place = test_db.url().split_once('@').unwrap().1.to_owned();
    let who = format!("SELECT count(*) AS number WHERE session_user = '{boss}' AND current_user = '{boss}'");
    for (reset, itself) in [(Reset::WhenDirty, 1), (Reset::Never, 0)] {
        let app = PgConnection::app(Config::new(format!("postgres://{boss}:boss@{place}")).max_size(1).reset(reset));
        let become_app = format!("SET SESSION AUTHORIZATION {}; SET statement_timeout = 60000", support::ROLE);
        Way::With.leave(PgConnection::db(), &app, &become_app);
        assert_eq!(app.open_session().unwrap().number(&who).unwrap(), itself, "{reset:?}");
        assert_eq!(app.dispose_report().unwrap().closed, 1);
    }
    admin.batch_execute(&format!("DROP ROLE {boss}")).unwrap();
}

#[test]
fn in_memory_database_survives_its_connections() {
    for reset in [Reset::WhenDirty, Reset::Always] {
        let app = SqliteConnection::app(Config::new(":memory:").reset(reset));
        app.create_all().unwrap();
        for number in 1..=3 {
            Way::With.leave(SqliteConnection::db(), &app, "CREATE TEMPORARY TABLE left_over (a INTEGER)");
            assert_eq!(app.status().open, 0);
            Way::With.leave(SqliteConnection::db(), &app, INSERT);
            assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), number);
        }
    }
}

fn reset_keeps_the_prepared_statements_of_diesel() {
    diesel::table! {
        entries (id) { id -> Integer, author -> Text, message -> Text, }
    }
    let test_db = TestDatabase::postgres();
    let app = PgConnection::app(test_db.config().max_size(1));
    app.create_all().unwrap();
    const PREPARED: &str =
        "SELECT count(*) AS number FROM pg_prepared_statements WHERE statement LIKE '%\"entries\".\"author\"%'";
    for _ in 0..3 {
        app.context(|| {
            let session = PgConnection::db().session()?;
            session.load::<String>(entries::table.select(entries::author).filter(entries::id.eq(1)))?;
            session.send("SET search_path = nowhere; SELECT pg_advisory_lock(44)")?;
            session.commit()
        })
        .unwrap();
        assert_eq!(app.open_session().unwrap().number(PREPARED).unwrap(), 1);
    }
    assert_eq!(app.dispose_report().unwrap().closed, 1);
}

/// A connection without a known socket cannot be cut at a deadline, so the pool closes it instead of a reset.
fn connection_by_a_local_socket_is_reset_although_another_part_of_the_program_connects() {
    /// The number of connects beside which another part of the program connects.
    static DISTURBED: AtomicUsize = AtomicUsize::new(0);

    fn connect(url: &str) -> ConnectionResult<PgConnection> {
        if DISTURBED.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
            // It stays open beyond the search for the socket.
            Box::leak(Box::new(PgConnection::establish(url)?));
        }
        PgConnection::establish(url)
    }

    let test_db = TestDatabase::postgres();
    let db = Database::<PgConnection>::without_migrations().connect_with(connect);
    for (disturbed, is_kept) in [(0, true), (2, true), (3, false)] {
        DISTURBED.store(disturbed, Relaxed);
        let app = db.init_app(unique("app"), Config::new(test_db.socket_url()).max_size(1)).unwrap();
        let session_number = || {
            let session = app.open_session().unwrap();
            let number = session.number(test_db.session_number()).unwrap();
            session.commit().unwrap();
            number
        };
        assert_eq!(session_number() == session_number(), is_kept, "{disturbed} connects were disturbed");
        app.dispose().unwrap();
        assert_eq!(DISTURBED.load(Relaxed), 0);
    }
}
