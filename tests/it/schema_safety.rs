//! What `create_all` and `drop_all` must not touch, and what migrations must not leave.

use std::fmt;
use std::time::Duration;

use diesel::backend::Backend;
use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource, MigrationVersion};
use diesel::prelude::*;
use diesel_migrations::{EmbeddedMigrations, FileBasedMigrations, embed_migrations};
use diesel_session::testing::{Fixture, TestIsolation, TestSetup};
use diesel_session::{App, Config, Database, ErrorKind, SessionConnection};

use crate::fixtures::{
    AnyConnection, COUNT, INSERT, ServerUrl, SessionExt, Step, Steps, TestConnection, TestDatabase, logged, step,
    unique,
};
use crate::for_each_database;
use crate::support;

for_each_database!(every_database =>
    drop_all_refuses_a_blank_down,
    create_all_applies_a_blank_up,
    create_all_skips_an_empty_file,
    init_app_refuses_blank_init_sql,
    with_refuses_or_skips_an_empty_text,
    create_all_survives_an_error_whose_display_panics,
    create_all_runs_without_the_statement_timeout,
    drop_all_refuses_a_protected_schema,
    drop_all_warns_of_nothing_where_it_reverts_nothing,
    unknown_app_names_place_and_database_object,
);
for_each_database!(ServerUrl; postgres, mariadb, sqlite => test_kit_skips_blank_fixtures);
for_each_database!(only mariadb =>
    drop_all_works_without_the_right_to_lock_tables,
    on_connect_that_sends_an_empty_text_is_an_error_on_mariadb,
);
for_each_database!(only postgres =>
    drop_all_reverts_nothing_through_search_path,
    drop_all_refuses_when_its_schema_is_gone,
    drop_all_finds_extensions_and_no_other_tables,
    schema_operations_call_no_functions_of_others,
    create_all_takes_a_dump_as_its_first_migration,
    create_all_restores_role_and_local_settings,
);

for_each_database!(every_server => create_all_restores_what_a_migration_sets);

fn own<C: TestConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static>(
    migrations: M,
    config: Config,
) -> (Database<C, M>, App<C>) {
    let db = Database::new(migrations);
    let connect: diesel_session_connect::Connect<AnyConnection> = crate::fixtures::connect_any;
    let connect = (&connect as &dyn std::any::Any).downcast_ref::<diesel_session_connect::Connect<C>>().copied();
    let db = if let Some(connect) = connect { db.connect_with(connect) } else { db };
    let app = db.init_app(unique("safety"), config).unwrap();
    (db, app)
}

mod diesel_session_connect {
    pub(super) type Connect<C> = fn(&str) -> diesel::result::ConnectionResult<C>;
}

fn exists<C: TestConnection>(app: &App<C>, table: &str) -> bool {
    app.open_session().unwrap().number(&format!("SELECT count(*) AS number FROM {table}")).is_ok()
}

/// The database's `entries` table, by plain Diesel.
const ENTRIES: EmbeddedMigrations = embed_migrations!("migrations/postgres");

fn in_schema(test_db: &TestDatabase, path: &str) -> Config {
    Config::new(format!("{}?options=-c%20search_path%3D{path}", test_db.url()))
}

fn plain(test_db: &TestDatabase) -> PgConnection {
    PgConnection::establish(&test_db.url()).unwrap()
}

/// A database whose `public` has `entries` with a row, and an empty schema `tenant`.
fn shared_and_tenant() -> (TestDatabase, App<PgConnection>) {
    let test_db = TestDatabase::postgres();
    let (_db, shared) = own::<PgConnection, _>(ENTRIES, test_db.config());
    shared.create_all().unwrap();
    let mut conn = plain(&test_db);
    conn.batch_execute(INSERT).unwrap();
    conn.batch_execute("CREATE SCHEMA tenant").unwrap();
    (test_db, shared)
}

#[track_caller]
fn assert_public_is_whole(test_db: &TestDatabase) {
    let mut conn = plain(test_db);
    assert_eq!(conn.number("SELECT count(*) AS number FROM public.entries").unwrap(), 1);
    assert_eq!(conn.number("SELECT count(*) AS number FROM public.__diesel_schema_migrations").unwrap(), 1);
}

fn drop_all_reverts_nothing_through_search_path() {
    let (test_db, shared) = shared_and_tenant();
    let (_db, tenant) = own::<PgConnection, _>(ENTRIES, in_schema(&test_db, "tenant,public"));
    assert!(tenant.migrations().unwrap().iter().all(|one| !one.applied), "those of `public` are not its own");
    assert_eq!(tenant.drop_all().unwrap(), Vec::<String>::new());
    assert_public_is_whole(&test_db);

    assert_eq!(tenant.create_all().unwrap().len(), 1);
    assert_eq!(plain(&test_db).number("SELECT count(*) AS number FROM tenant.entries").unwrap(), 0);
    assert!(tenant.migrations().unwrap().iter().all(|one| one.applied));
    assert_eq!(tenant.drop_all().unwrap().len(), 1);
    assert_eq!(tenant.drop_all().unwrap(), Vec::<String>::new());
    assert_public_is_whole(&test_db);
    plain(&test_db).number("SELECT count(*) AS number FROM tenant.entries").unwrap_err();

    // The bookkeeping says that it is there, and only `public` has such a table.
    tenant.create_all().unwrap();
    plain(&test_db).batch_execute("DROP TABLE tenant.entries").unwrap();
    let error = tenant.drop_all().unwrap_err();
    assert!(
        error.kind() == ErrorKind::Migration
            && error.migration_failure().expect("a failure").message.contains("entries"),
        "{error}"
    );
    assert_public_is_whole(&test_db);
    assert_eq!(plain(&test_db).number("SELECT count(*) AS number FROM tenant.__diesel_schema_migrations").unwrap(), 1);
    for app in [shared, tenant] {
        app.dispose().unwrap();
    }
}

fn drop_all_refuses_when_its_schema_is_gone() {
    let (test_db, _shared) = shared_and_tenant();
    plain(&test_db).batch_execute("DROP SCHEMA tenant").unwrap();
    let (_db, tenant) = own::<PgConnection, _>(ENTRIES, in_schema(&test_db, "tenant,public"));
    let error = tenant.drop_all().unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("`tenant`"), "{error}");
    assert_public_is_whole(&test_db);
    let (_db, nowhere) = own::<PgConnection, _>(ENTRIES, in_schema(&test_db, "tenant"));
    nowhere.create_all().unwrap_err();
    assert!(nowhere.migrations().unwrap().iter().all(|one| !one.applied));
    nowhere.drop_all().unwrap_err();
    assert_public_is_whole(&test_db);
}

/// Types and functions of extensions are found in the schema that has nothing else.
fn drop_all_finds_extensions_and_no_other_tables() {
    let test_db = TestDatabase::postgres();
    let mut conn = plain(&test_db);
    conn.batch_execute("CREATE SCHEMA tenant; CREATE SCHEMA extensions").unwrap();
    conn.batch_execute("CREATE EXTENSION IF NOT EXISTS citext SCHEMA extensions").unwrap();
    let steps = vec![
        step("1", "CREATE TABLE names (name text)", "DROP TABLE names"),
        step(
            "2",
            "ALTER TABLE names ALTER name TYPE varchar(20)",
            "ALTER TABLE names ALTER name TYPE citext; INSERT INTO names VALUES ('Ada')",
        ),
    ];
    let (_db, app) = own::<PgConnection, _>(Steps(steps), in_schema(&test_db, "tenant,extensions,public"));
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    conn.batch_execute("CREATE TABLE public.names (name text); INSERT INTO public.names VALUES ('of another')")
        .unwrap();
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    assert_eq!(conn.number("SELECT count(*) AS number FROM public.names").unwrap(), 1);
}

/// Functions and operators of a schema before `pg_catalog` are not called.
fn schema_operations_call_no_functions_of_others() {
    let test_db = TestDatabase::postgres();
    let mut conn = plain(&test_db);
    conn.batch_execute(
        "CREATE SCHEMA evil; CREATE SCHEMA own; CREATE TABLE evil.calls (name text); \
         CREATE FUNCTION evil.current_schema() RETURNS name LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO evil.calls VALUES ('current_schema'); RETURN 'public'; END $$; \
         CREATE FUNCTION evil.concat(VARIADIC text[]) RETURNS text LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO evil.calls VALUES ('concat'); RETURN 'x'; END $$; \
         CREATE FUNCTION evil.equal(text, text) RETURNS boolean LANGUAGE plpgsql AS \
         $$ BEGIN INSERT INTO evil.calls VALUES ('='); RETURN true; END $$; \
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.equal)",
    )
    .unwrap();
    let steps = vec![
        step("1", "CREATE TABLE one (id integer)", "DROP TABLE one"),
        step("2", "CREATE TABLE two (id integer)", "DROP TABLE two").outside_a_transaction(),
    ];
    let config = test_db.config().connection_init_sql("SET search_path = own, evil, pg_catalog");
    let (_db, app) = own::<PgConnection, _>(Steps(steps), config);
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    assert_eq!(conn.number("SELECT count(*) AS number FROM evil.calls WHERE name <> ''").unwrap(), 0);
}

/// A temporary table hides the real one, and an attached database has one of the same name.
#[test]
fn drop_all_spares_other_databases_of_the_connection() {
    let (test_db, other) = (TestDatabase::sqlite(), TestDatabase::sqlite());
    let mut attached = SqliteConnection::establish(&other.url()).unwrap();
    attached.batch_execute("CREATE TABLE one (id INTEGER); INSERT INTO one VALUES (7)").unwrap();
    let steps = vec![step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one")];
    let attach = format!("ATTACH '{}' AS other", other.url());
    let (_db, app) = own::<SqliteConnection, _>(Steps(steps.clone()), test_db.config().connection_init_sql(attach));
    app.create_all().unwrap();
    SqliteConnection::establish(&test_db.url()).unwrap().batch_execute("DROP TABLE one").unwrap();
    let error = app.drop_all().unwrap_err();
    assert!(
        error.kind() == ErrorKind::Migration
            && error.migration_failure().expect("a failure").message.contains("`other`"),
        "{error}"
    );
    assert_eq!(attached.number("SELECT count(*) AS number FROM one").unwrap(), 1);
    app.dispose().unwrap();

    let temporary = "CREATE TEMP TABLE __diesel_schema_migrations (version TEXT, run_on TEXT); \
                     INSERT INTO temp.__diesel_schema_migrations VALUES ('1', '')";
    let fresh = TestDatabase::sqlite();
    let (_db, app) = own::<SqliteConnection, _>(Steps(steps), fresh.config().connection_init_sql(temporary));
    assert!(app.migrations().unwrap().iter().all(|one| !one.applied));
    assert_eq!(app.drop_all().unwrap(), Vec::<String>::new());
    assert_eq!(app.create_all().unwrap(), ["1"]);
    assert_eq!(app.drop_all().unwrap(), ["1"]);
    app.dispose().unwrap();
}

const BLANKS: [&str; 5] = ["", "\n", " ; \n", "-- never written", "/* never written */ ;"];

fn drop_all_refuses_a_blank_down<C: TestConnection>(test_db: &TestDatabase) {
    for blank in BLANKS {
        let steps = vec![
            step("1", "CREATE TABLE one (id INTEGER PRIMARY KEY)", "DROP TABLE one"),
            step("2", "CREATE TABLE two (id INTEGER PRIMARY KEY)", blank),
            step("3", "CREATE TABLE three (id INTEGER PRIMARY KEY)", "DROP TABLE three"),
        ];
        let (_db, app) = own::<C, _>(Steps(steps.clone()), test_db.config());
        assert_eq!(app.create_all().unwrap(), ["1", "2", "3"]);
        let error = app.drop_all().unwrap_err();
        assert!(error.irreversible_migrations().is_some_and(|versions| versions.eq(["2_step"])), "{error}");
        assert!(error.to_string().contains("SELECT 1;"), "{error}");
        assert!(exists(&app, "three") && exists(&app, "two") && exists(&app, "one"), "nothing was reverted");
        assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
        let mut mended = steps;
        mended[1].down = Some("DROP TABLE two".into());
        let (_db, mended) = own::<C, _>(Steps(mended), test_db.config());
        assert_eq!(mended.drop_all().unwrap(), ["3", "2", "1"]);
        for app in [app, mended] {
            app.dispose().unwrap();
        }
    }
}

fn create_all_applies_a_blank_up<C: TestConnection>(test_db: &TestDatabase) {
    let mut steps: Vec<Step> = Vec::new();
    for (version, blank) in ["1", "2", "3", "4", "5"].into_iter().zip(BLANKS) {
        steps.push(step(version, blank, "SELECT 1;"));
    }
    steps[4] = steps[4].clone().outside_a_transaction();
    let (_db, app) = own::<C, _>(Steps(steps), test_db.config());
    assert_eq!(app.create_all().unwrap(), ["1", "2", "3", "4", "5"]);
    assert!(app.migrations().unwrap().iter().all(|one| one.applied));
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert_eq!(app.drop_all().unwrap(), ["5", "4", "3", "2", "1"]);
    app.dispose().unwrap();
}

fn create_all_skips_an_empty_file<C: TestConnection>(test_db: &TestDatabase) {
    let folder = tempfile::tempdir().unwrap();
    for (name, up, down) in [
        ("2026-01-01-000000_nothing", "", ""),
        ("2026-01-02-000000_one", "CREATE TABLE one (id INTEGER PRIMARY KEY);", "DROP TABLE one;"),
    ] {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("up.sql"), up).unwrap();
        std::fs::write(folder.join("down.sql"), down).unwrap();
    }
    let (_db, app) = own::<C, _>(FileBasedMigrations::from_path(folder.path()).unwrap(), test_db.config());
    assert_eq!(app.create_all().unwrap(), ["20260101000000", "20260102000000"]);
    let error = app.drop_all().unwrap_err();
    assert!(error.irreversible_migrations().is_some_and(|versions| versions.count() == 1), "{error}");
    assert!(exists(&app, "one"));
    app.dispose().unwrap();
}

fn init_app_refuses_blank_init_sql<C: TestConnection>(test_db: &TestDatabase) {
    for blank in BLANKS {
        let error = C::db().init_app(unique("blank"), test_db.config().connection_init_sql(blank)).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("connection_init_sql"),
            "{error}"
        );
    }
}

/// SQLite accepts it and the servers refuse it. No process crashes, and the session can be used.
fn with_refuses_or_skips_an_empty_text<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    for text in ["", " ", "-- nothing"] {
        let sent = session.with(|conn| conn.batch_execute(text));
        assert!(sent.is_ok() || matches!(&sent, Err(error) if error.kind() == ErrorKind::Query), "{text:?}: {sent:?}");
        session.with(|conn| conn.number(text)).unwrap_err();
        session.rollback().unwrap();
    }
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
    drop(session);
    // A connection guard cannot return an error.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        app.enter(|| {
            let mut conn = C::db().session().unwrap().connection().unwrap();
            conn.batch_execute("").is_err()
        })
    }));
    let is_mysql = matches!(test_db, TestDatabase::Mariadb(_));
    assert_eq!(outcome.is_err(), is_mysql, "a panic takes the place of a crash");
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
}

fn send_nothing<C: SessionConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    let _ = conn.batch_execute("");
    Ok(())
}

fn on_connect_that_sends_an_empty_text_is_an_error_on_mariadb() {
    let test_db = TestDatabase::mariadb();
    let db = Database::<MysqlConnection>::without_migrations().on_connect(send_nothing);
    let app = db.init_app("nothing", test_db.config()).unwrap();
    let error = app.ping().unwrap_err();
    assert!(error.kind() == ErrorKind::Connect && error.to_string().contains("empty text"), "{error}");
}

#[test]
fn on_connect_may_send_an_empty_text_on_sqlite() {
    let db = Database::<SqliteConnection>::without_migrations().on_connect(send_nothing);
    let app = db.init_app("nothing", Config::new(":memory:")).unwrap();
    app.ping().unwrap();
    app.dispose().unwrap();
}

fn test_kit_skips_blank_fixtures<C: TestConnection>(url: &str) {
    for isolation in [TestIsolation::Database, TestIsolation::Rollback] {
        let blank = BLANKS.iter().map(|blank| Fixture::sql("blank", *blank));
        let setup = TestSetup::of(C::db()).config(Config::new(url)).isolation(isolation);
        let setup = blank.fold(setup, |setup, fixture| setup.fixture(fixture));
        let test = setup.fixture(Fixture::sql("one", INSERT)).start().unwrap();
        assert_eq!(test.open_session().unwrap().number(COUNT).unwrap(), 1);
        test.finish().unwrap();
    }
}

/// A migration whose error has a text that panics.
struct Unspeakable;

#[derive(Debug)]
struct UnspeakableError;

impl fmt::Display for UnspeakableError {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("no words for it")
    }
}

impl std::error::Error for UnspeakableError {}

impl MigrationName for Unspeakable {
    fn version(&self) -> MigrationVersion<'_> {
        "2".into()
    }
}

impl fmt::Display for Unspeakable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("2_unspeakable")
    }
}

impl MigrationMetadata for Unspeakable {}

impl<DB: Backend> Migration<DB> for Unspeakable {
    fn run(&self, conn: &mut dyn BoxableConnection<DB>) -> migration::Result<()> {
        conn.batch_execute("CREATE TABLE half (id INTEGER)")?;
        Err(Box::new(UnspeakableError))
    }

    fn revert(&self, _: &mut dyn BoxableConnection<DB>) -> migration::Result<()> {
        Err(Box::new(UnspeakableError))
    }

    fn metadata(&self) -> &dyn MigrationMetadata {
        self
    }

    fn name(&self) -> &dyn MigrationName {
        self
    }
}

struct OneAndUnspeakable;

impl<DB: Backend> MigrationSource<DB> for OneAndUnspeakable {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<DB>>>> {
        Ok(vec![Box::new(step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one")), Box::new(Unspeakable)])
    }
}

fn create_all_survives_an_error_whose_display_panics<C: TestConnection>(test_db: &TestDatabase) {
    let (_db, app) = own::<C, _>(OneAndUnspeakable, test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!((failure.migration.as_str(), &failure.done), ("2_unspeakable", &vec!["1".to_owned()]));
    assert!(failure.message.contains("no words for it"), "{error}");
    assert_eq!((app.status().in_use, exists(&app, "one")), (0, true));
    assert_eq!(exists(&app, "half"), matches!(test_db, TestDatabase::Mariadb(_)), "MySQL keeps it");
    let (_db, mended) = own::<C, _>(Steps(vec![step("1", "", "DROP TABLE one")]), test_db.config());
    assert_eq!(mended.drop_all().unwrap(), ["1"], "the lock is free");
}

fn create_all_runs_without_the_statement_timeout<C: TestConnection>(test_db: &TestDatabase) {
    let (sleep, limit) = match test_db {
        TestDatabase::Postgres(_) => (
            "SELECT pg_sleep(0.6)",
            "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'statement_timeout'",
        ),
        TestDatabase::Mariadb(_) => ("DO SLEEP(0.6)", "SELECT CAST(@@max_statement_time * 1000 AS INTEGER) AS number"),
        TestDatabase::Sqlite(_) => ("SELECT 1", "SELECT 200 AS number"),
    };
    let steps = vec![step("1", sleep, sleep), step("2", sleep, sleep).outside_a_transaction()];
    let (_db, app) =
        own::<C, _>(Steps(steps), test_db.config().max_size(1).statement_timeout(Duration::from_millis(200)));
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    assert_eq!(app.open_session().unwrap().number(limit).unwrap(), 200);
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert_eq!(app.open_session().unwrap().number(limit).unwrap(), 200, "of a connection that was kept");
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    assert_eq!(app.open_session().unwrap().number(limit).unwrap(), 200);
    app.dispose().unwrap();
}

fn drop_all_refuses_a_protected_schema<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().protect_schema(true));
    assert_eq!(app.create_all().unwrap().len(), 1);
    let line = line!() + 1;
    let error = app.drop_all().unwrap_err();
    assert!(error.kind() == ErrorKind::SchemaProtected, "{error}");
    assert_eq!(error.code(), "DS407");
    assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
    assert!(exists(&app, "entries"));
    let test = C::app(test_db.config());
    assert_eq!(test.drop_all().unwrap().len(), 1);
}

fn drop_all_warns_of_nothing_where_it_reverts_nothing<C: TestConnection>(test_db: &TestDatabase) {
    logged::listen();
    let warnings = |app: &App<C>| {
        let part = format!("app `{}`: drop_all, called at", app.id());
        logged::lines_with(&part).len()
    };
    let (_db, fails) =
        own::<C, _>(Steps(vec![step("1", "CREATE TABEL wrong (id INTEGER)", "SELECT 1")]), test_db.config());
    fails.create_all().unwrap_err();
    assert_eq!(fails.drop_all().unwrap(), Vec::<String>::new());
    assert_eq!(warnings(&fails), 0);
    let (_db, works) = own::<C, _>(Steps(vec![step("1", "SELECT 1", "SELECT 1")]), test_db.config());
    works.create_all().unwrap();
    assert_eq!(works.drop_all().unwrap(), ["1"]);
    assert_eq!(warnings(&works), 1);
}

fn unknown_app_names_place_and_database_object<C: TestConnection>(_: &TestDatabase) {
    let made = line!() + 1;
    let db = Database::<C>::without_migrations();
    let asked = line!() + 1;
    let errors = [db.app("nobody").unwrap_err(), db.remove_app("nobody").unwrap_err()];
    for error in errors {
        assert!(error.kind() == ErrorKind::UnknownApp, "{error}");
        let text = error.to_string();
        for part in ["DS108", "nobody", &format!("{}:{asked}:", file!()), &format!("made at {}:{made}:", file!())] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let connection = std::any::type_name::<C>().rsplit("::").next().unwrap();
        assert!(text.contains(&format!("Database<{connection}>")), "{text}");
    }
}

/// What a dump of the server's own tool sets for the session, and more.
fn create_all_restores_what_a_migration_sets<C: TestConnection>(test_db: &TestDatabase) {
    let (sets, reads) = match test_db {
        TestDatabase::Postgres(_) => (
            "SELECT pg_catalog.set_config('search_path', '', false); SET check_function_bodies = false; \
             SET client_min_messages = warning; SET default_tablespace = ''; SET row_security = off; \
             SET lock_timeout = 1; SET statement_timeout = 1; SET statement_timeout = 0; SET TIME ZONE 'Asia/Tokyo'; \
             CREATE TABLE public.dumped (id integer)",
            "SELECT count(*) AS number FROM pg_settings WHERE source = 'session' AND name IN \
             ('search_path', 'check_function_bodies', 'row_security', 'client_min_messages')",
        ),
        _ => (
            "SET FOREIGN_KEY_CHECKS = 0; SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO'; SET time_zone = '+09:00'; \
             SET NAMES latin1; CREATE TABLE dumped (id integer); USE information_schema",
            "SELECT 1 - @@foreign_key_checks AS number",
        ),
    };
    let down =
        if matches!(test_db, TestDatabase::Postgres(_)) { "DROP TABLE public.dumped" } else { "DROP TABLE dumped" };
    let seen = format!("CREATE TABLE seen AS {reads}");
    let steps = vec![
        step("1", sets, down),
        step("2", seen, "DROP TABLE seen"),
        step("3", sets.replace("dumped", "again"), down.replace("dumped", "again")).outside_a_transaction(),
        step("4", format!("INSERT INTO seen {reads}"), "SELECT 1"),
    ];
    let (_db, app) = own::<C, _>(Steps(steps), test_db.config());
    assert_eq!(app.create_all().unwrap(), ["1", "2", "3", "4"]);
    let session = app.open_session().unwrap();
    assert_eq!(session.number("SELECT count(*) AS number FROM seen WHERE number <> 0").unwrap(), 0);
    assert_eq!(session.number("SELECT count(*) AS number FROM seen").unwrap(), 2);
    drop(session);
    assert!(app.migrations().unwrap().iter().all(|one| one.applied));
    assert_eq!(app.drop_all().unwrap(), ["4", "3", "2", "1"]);
    app.dispose().unwrap();
}

fn create_all_takes_a_dump_as_its_first_migration() {
    let test_db = TestDatabase::postgres();
    plain(&test_db)
        .batch_execute(
            "CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE TABLE people (id serial PRIMARY KEY, mood mood); \
             CREATE VIEW happy AS SELECT id FROM people WHERE mood = 'good'; \
             CREATE FUNCTION twice(integer) RETURNS integer LANGUAGE sql AS $$ SELECT $1 * 2 $$",
        )
        .unwrap();
    let dump =
        std::process::Command::new("pg_dump").args(["--schema-only", "--no-owner", &test_db.url()]).output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    // Newer versions write commands of psql, which are no SQL.
    let dump = String::from_utf8(dump.stdout).unwrap();
    let dump: Vec<&str> = dump.lines().filter(|line| !line.starts_with('\\')).collect();
    let fresh = TestDatabase::postgres();
    let down = "DROP VIEW happy; DROP TABLE people; DROP TYPE mood; DROP FUNCTION twice(integer)";
    let steps =
        vec![step("1", dump.join("\n"), down), step("2", "CREATE TABLE later (id integer)", "DROP TABLE later")];
    let (_db, app) = own::<PgConnection, _>(Steps(steps), fresh.config());
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    assert!(exists(&app, "happy") && exists(&app, "public.later"));
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    app.dispose().unwrap();
}

/// What a migration sets for its transaction ends with it, and its role is not the next one's.
fn create_all_restores_role_and_local_settings() {
    let test_db = TestDatabase::postgres();
    let mut admin = support::postgres().admin();
    admin.batch_execute("CREATE ROLE safety_helper; GRANT safety_helper TO app").unwrap();
    let steps = vec![
        step(
            "1",
            "CREATE SCHEMA aside; SET LOCAL search_path = aside; CREATE TABLE one (id integer)",
            "DROP TABLE aside.one; DROP SCHEMA aside",
        ),
        step("2", "CREATE TABLE two (id integer); SET ROLE safety_helper", "DROP TABLE two"),
        step(
            "3",
            "CREATE TABLE three AS SELECT current_setting('search_path') AS path, current_user::text AS who",
            "DROP TABLE three",
        ),
    ];
    let (_db, app) = own::<PgConnection, _>(Steps(steps), test_db.config());
    assert_eq!(app.create_all().unwrap().len(), 3);
    let own = "SELECT count(*) AS number FROM public.three WHERE path = '\"$user\", public' AND who = session_user";
    assert_eq!(plain(&test_db).number(own).unwrap(), 1);
    assert!(exists(&app, "aside.one") && exists(&app, "public.two"));
    assert_eq!(app.drop_all().unwrap(), ["3", "2", "1"]);
    app.dispose().unwrap();
    admin.batch_execute("DROP ROLE safety_helper").unwrap();
}

fn drop_all_works_without_the_right_to_lock_tables() {
    let test_db = TestDatabase::mariadb();
    let TestDatabase::Mariadb(database) = &test_db else { unreachable!() };
    let name = database.name();
    let mut admin = support::mariadb().admin();
    let rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, INDEX, REFERENCES";
    for sql in [
        "CREATE USER IF NOT EXISTS 'no_locks'@'127.0.0.1' IDENTIFIED BY 'pw'".to_owned(),
        format!("GRANT {rights} ON {name}.* TO 'no_locks'@'127.0.0.1'"),
    ] {
        diesel::sql_query(sql).execute(&mut admin).unwrap();
    }
    let url = format!("mysql://no_locks:pw@127.0.0.1:{}/{name}", test_db.port());
    let app = MysqlConnection::app(Config::new(url));
    assert_eq!(app.create_all().unwrap().len(), 1);
    assert_eq!(app.drop_all().unwrap().len(), 1);
    assert!(!exists(&app, "entries"));
    diesel::sql_query("DROP USER 'no_locks'@'127.0.0.1'").execute(&mut admin).unwrap();
}
