//! What a borrower leaves on a connection, and what the next one finds of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::dsl::sql;
use diesel::prelude::*;
use diesel::sql_types::{Bool, Integer, Text};
use diesel_session::{App, Config, Database, Reset, Result, Session};

use crate::fixtures::{Any, COUNT, Conn, INSERT, Site, Speak, Steps, connect_any, step, unique};
use crate::support::{self, Kind, enabled, wait};
use crate::{on_every_database, on_every_server};

on_every_database!(
    nothing_that_was_left_reaches_the_next,
    what_is_never_reset_is_there,
    settings_of_the_program_are_there_again,
    limits_are_there_again,
    what_migrations_leave_reaches_nobody,
    plain_statements_keep_the_connection,
    always_is_always,
    a_connection_that_is_closed_anyway_is_not_reset,
);
on_every_server!(a_lock_is_gone_when_commit_returns);

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

fn leftovers(site: &Site) -> Vec<Leftover> {
    let is = |condition: &str| format!("SELECT CASE WHEN {condition} THEN 1 ELSE 0 END::bigint AS number");
    let holds = |condition: &str| format!("SELECT CAST({condition} AS SIGNED) AS number");
    match site {
        Site::Postgres(_) => {
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
        Site::Mysql(_) => {
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
        Site::Sqlite(_) => {
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
    Lent,
    Guard,
    /// The statement before it in the same text is plain, the one after it fails.
    AmongOthers,
    /// The panic is caught by the code that has the connection.
    CaughtPanic,
    Autocommit,
}

const WAYS: [Way; 5] = [Way::Lent, Way::Guard, Way::AmongOthers, Way::CaughtPanic, Way::Autocommit];

impl Way {
    fn leave<C: Conn>(self, db: &Database<C>, app: &App<C>, sql: &str) {
        let scope = app.scope();
        let send = || -> Result<()> {
            let session = db.session()?;
            match self {
                Self::Lent | Self::Autocommit => session.send(sql),
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
            _ => scope.commit_on_ok().run(send),
        }
        .unwrap_or_else(|error| panic!("{self:?}, `{sql}`: {error}"));
    }
}

/// What the next one sees, who finds no such table or value where nothing was left.
fn is_there<C: Conn>(app: &App<C>, leftover: &Leftover) -> bool {
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    session.number(&leftover.probe).is_ok_and(|number| number == 1)
}

fn nothing_that_was_left_reaches_the_next<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(1));
    app.create_all().unwrap();
    for leftover in leftovers(site) {
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
    if let Site::Postgres(database) = site {
        assert_eq!(support::postgres().backend_pids(database.name()).len(), 1);
        assert_eq!(app.dispose_report().unwrap().closed, 1, "one connection served all");
    }
}

/// So that the test above can fail.
fn what_is_never_reset_is_there<C: Conn>(site: &Site) {
    C::app(site.config()).create_all().unwrap();
    for leftover in leftovers(site) {
        for way in WAYS {
            if leftover.outside && way != Way::Autocommit {
                continue;
            }
            let app = C::app(site.config().max_size(1).reset(Reset::Never));
            way.leave(C::db(), &app, &leftover.statement);
            assert_eq!(app.status().open, 1);
            assert!(is_there(&app, &leftover), "{} is not there, left by {way:?}", leftover.name);
        }
    }
}

/// A setting of the program, what a borrower makes of it, and a query for whether it is the program's.
fn setting(site: &Site) -> [&'static str; 3] {
    match site {
        Site::Postgres(_) => [
            "SET work_mem = '5MB'",
            "SET work_mem = '77MB'",
            "SELECT CASE WHEN current_setting('work_mem') = '5MB' THEN 1 ELSE 0 END::bigint AS number",
        ],
        Site::Mysql(_) => [
            "SET SESSION sort_buffer_size = 65536",
            "SET SESSION sort_buffer_size = 131072",
            "SELECT CAST(@@sort_buffer_size = 65536 AS SIGNED) AS number",
        ],
        Site::Sqlite(_) => [
            "PRAGMA cache_size = 55",
            "PRAGMA cache_size = 77",
            "SELECT cache_size = 55 AS number FROM pragma_cache_size",
        ],
    }
}

fn settings_of_the_program_are_there_again<C: Conn>(site: &Site) {
    fn with_a_table<C: Conn>(conn: &mut C) -> QueryResult<()> {
        // Of the hook's own transaction nothing is left either.
        conn.transaction(|conn| conn.batch_execute("CREATE TEMPORARY TABLE of_the_hook (a INTEGER)"))
    }
    let [own, left, probe] = setting(site);
    let db = C::new_db().on_connect(with_a_table::<C>);
    let app = db.init_app(unique("own"), site.config().max_size(1).on_connect(own)).unwrap();
    for way in WAYS {
        way.leave(&db, &app, left);
        let session = app.open_session().unwrap();
        assert_eq!(session.number(probe).unwrap(), 1, "{way:?}");
        assert_eq!(session.number("SELECT count(*) AS number FROM of_the_hook").unwrap(), 0, "{way:?}");
    }
    if let Site::Postgres(_) = site {
        assert_eq!(app.status().open, 1);
    }
    app.dispose().unwrap();
}

fn limits_are_there_again<C: Conn>(site: &Site) {
    let limit = Duration::from_secs(7);
    let app = C::app(site.config().max_size(1).statement_timeout(limit).lock_timeout(limit));
    let (left, probe) = match site {
        Site::Postgres(_) => (
            "SET statement_timeout = 0; SET lock_timeout = 0",
            "SELECT count(*) AS number FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout') AND setting = '7000'",
        ),
        Site::Mysql(_) => (
            "SET SESSION max_statement_time = 0, SESSION lock_wait_timeout = 77",
            "SELECT CAST((@@max_statement_time = 7) + (@@lock_wait_timeout = 7) AS SIGNED) AS number",
        ),
        Site::Sqlite(_) => {
            ("PRAGMA busy_timeout = 0", "SELECT 2 * (timeout = 7000) AS number FROM pragma_busy_timeout")
        }
    };
    for _ in 0..2 {
        Way::Autocommit.leave(C::db(), &app, left);
        assert_eq!(app.open_session().unwrap().number(probe).unwrap(), 2);
    }
}

fn what_migrations_leave_reaches_nobody<C: Conn>(site: &Site) {
    let [_, left, probe] = setting(site);
    let probe = probe.replace("5MB", "77MB").replace("65536", "131072").replace("55", "77");
    let steps =
        Steps(vec![step("1", format!("CREATE TABLE made (a INTEGER); {left}"), format!("DROP TABLE made; {left}"))]);
    for reset in [Reset::WhenDirty, Reset::Never] {
        let db = db_with::<C>(steps.clone());
        let app = db.init_app(unique("migrated"), site.config().max_size(1).reset(reset)).unwrap();
        let seen = || app.open_session().unwrap().number(&probe).unwrap() == 1;
        app.create_all().unwrap();
        // PostgreSQL's settings are put back after each migration, whatever the reset.
        assert_eq!(seen(), reset == Reset::Never && !matches!(site, Site::Postgres(_)));
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

fn db_with<C: Conn>(steps: Steps) -> Database<C, Steps>
where
    Steps: diesel::migration::MigrationSource<C::Backend>,
{
    let db = Database::<C, Steps>::new(steps);
    match (&C::db() as &dyn std::any::Any).downcast_ref::<&'static Database<Any>>() {
        // The enum's own `establish` tells no reason; it takes SQLite's path for PostgreSQL's and is asked last.
        Some(_) => db.connect_with(|url| {
            let any: Box<dyn std::any::Any> = Box::new(connect_any(url)?);
            Ok(*any.downcast().expect("it is the enum"))
        }),
        None => db,
    }
}

/// Which connection it is, where that can be told.
fn connection_of<C: Conn>(app: &App<C>, site: &Site) -> i64 {
    app.open_session()
        .unwrap()
        .number(match site {
            Site::Postgres(_) => "SELECT pg_backend_pid()::bigint AS number",
            Site::Mysql(_) => "SELECT CONNECTION_ID() AS number",
            Site::Sqlite(_) => "SELECT cache_size AS number FROM pragma_cache_size",
        })
        .unwrap()
}

fn plain_statements_keep_the_connection<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(1));
    app.create_all().unwrap();
    let before = connection_of(&app, site);
    app.scope()
        .commit_on_ok()
        .run(|| {
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
    assert_eq!(connection_of(&app, site), before);
}

fn always_is_always<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(1).reset(Reset::Always));
    for _ in 0..2 {
        app.ping().unwrap();
        let kept = matches!(site, Site::Postgres(_));
        assert_eq!(app.status().open, usize::from(kept));
    }
    assert_eq!(app.status().in_use, 0);
}

fn a_connection_that_is_closed_anyway_is_not_reset<C: Conn>(site: &Site) {
    // A reset would run it again, and the second time it fails.
    let once = match site {
        Site::Postgres(_) => "PREPARE once AS SELECT 1",
        _ => "CREATE TEMPORARY TABLE once (a INTEGER)",
    };
    let app = C::app(site.config().max_size(1).on_connect(once));
    for doom in ["COMMIT", "ROLLBACK"] {
        let session = app.open_session().unwrap();
        session.send(doom).unwrap();
        session.rollback().unwrap();
        assert_eq!(app.status().open, 0);
    }
    // What cannot be put in order again is closed, which is no error of the one who returned it.
    app.scope().commit_on_ok().run(|| C::db().session()?.send("SELECT 1")).unwrap();
    app.ping().unwrap();
    assert_eq!((app.status().open, app.status().in_use), (1, 0));
}

fn a_lock_is_gone_when_commit_returns<C: Conn>(site: &Site) {
    let Site::Postgres(_) = site else { return };
    let (app, other) = (C::app(site.config()), C::app(site.config()));
    for _ in 0..20 {
        let session = app.open_session().unwrap();
        session.send("SELECT pg_advisory_lock(43)").unwrap();
        session.commit().unwrap();
        let free = other.open_session().unwrap().number("SELECT pg_try_advisory_lock(43)::int::bigint AS number");
        assert_eq!(free.unwrap(), 1);
    }
}

diesel::define_sql_function!(fn set_config(name: Text, value: Text, local: Bool) -> Text);

#[test]
fn functions_of_the_program_in_typed_statements_leave_nothing() {
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
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    for (reset, seen) in [(Reset::WhenDirty, 0), (Reset::Never, 1)] {
        for (way, leave) in WAYS {
            let app = PgConnection::app(
                site.config()
                    .max_size(1)
                    .reset(reset)
                    .on_connect("CREATE TEMPORARY TABLE one (id int); INSERT INTO one VALUES (1)"),
            );
            app.scope().commit_on_ok().run(|| leave(&PgConnection::db().session()?)).unwrap();
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

#[test]
fn a_lock_by_a_function_of_the_program_is_not_left_on_mariadb() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let site = Site::mysql();
    let name = unique("clean-hands-typed");
    let probe = format!("SELECT CAST(IS_USED_LOCK('{name}') IS NOT NULL AS SIGNED) AS number");
    for (reset, left) in [(Reset::WhenDirty, 0), (Reset::Never, 1)] {
        let app = MysqlConnection::app(site.config().max_size(1).reset(reset));
        let lock = || MysqlConnection::db().session()?.load::<i32>(diesel::select(get_lock(&name, 0)));
        assert_eq!(app.scope().commit_on_ok().run(lock).unwrap(), [1]);
        let seen =
            wait::until_equal(left, Duration::from_secs(5), || app.open_session().unwrap().number(&probe).unwrap());
        assert_eq!(seen, left);
    }
}

#[test]
fn a_role_that_a_superuser_took_is_left_by_nobody() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let boss = unique("clean_hands_boss").replace('-', "_");
    let mut admin = support::postgres().admin();
    admin.batch_execute(&format!("CREATE ROLE {boss} LOGIN SUPERUSER PASSWORD 'boss'")).unwrap();
    let place = site.url().split_once('@').unwrap().1.to_owned();
    let who = format!("SELECT count(*) AS number WHERE session_user = '{boss}' AND current_user = '{boss}'");
    for (reset, itself) in [(Reset::WhenDirty, 1), (Reset::Never, 0)] {
        let app = PgConnection::app(Config::new(format!("postgres://{boss}:boss@{place}")).max_size(1).reset(reset));
        let become_app = format!("SET SESSION AUTHORIZATION {}; SET statement_timeout = 60000", support::ROLE);
        Way::Lent.leave(PgConnection::db(), &app, &become_app);
        assert_eq!(app.open_session().unwrap().number(&who).unwrap(), itself, "{reset:?}");
        assert_eq!(app.dispose_report().unwrap().closed, 1);
    }
    admin.batch_execute(&format!("DROP ROLE {boss}")).unwrap();
}

#[test]
fn a_database_in_memory_survives_its_connections() {
    for reset in [Reset::WhenDirty, Reset::Always] {
        let app = SqliteConnection::app(Config::new(":memory:").reset(reset));
        app.create_all().unwrap();
        for number in 1..=3 {
            Way::Lent.leave(SqliteConnection::db(), &app, "CREATE TEMPORARY TABLE left_over (a INTEGER)");
            assert_eq!(app.status().open, 0);
            Way::Lent.leave(SqliteConnection::db(), &app, INSERT);
            assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), number);
        }
    }
}

#[test]
fn statements_that_diesel_has_prepared_are_still_prepared() {
    diesel::table! {
        entries (id) { id -> Integer, author -> Text, message -> Text, }
    }
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let app = PgConnection::app(site.config().max_size(1));
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
