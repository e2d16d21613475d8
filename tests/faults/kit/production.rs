//! The kit's databases are what production would have, also on servers that are set up in other ways.

use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::Text;
use diesel_session::migrations::PerBackend;
use diesel_session::testing::{Fixture, TestApp, TestIsolation, TestSetup};
use diesel_session::{App, Config, Database};

use crate::fixtures::{
    AnyConnection, COUNT, INSERT, MYSQL, POSTGRES, SQLITE, ServerUrl, SessionExt, Step, Steps, TestConnection, step,
};
use crate::for_each_database;
use crate::support::{Kind, Mariadb, Postgres, enabled};

use TestIsolation::{Rollback, Schema};

for_each_database!(ServerUrl; postgres, mariadb, sqlite =>
    patience_of_any_length_is_possible,
    a_fixture_without_a_statement_does_nothing,
);
for_each_database!(only sqlite => each_migration_on_sqlite_is_replayed_in_a_transaction_of_its_own);
for_each_database!(only mariadb =>
    test_database_on_mariadb_has_the_properties_of_the_configured_one,
    tests_run_under_unusual_settings_of_mariadb,
    missing_right_is_named_only_if_the_account_lacks_it_on_mariadb,
    unfinished_database_is_an_error_that_names_its_state_on_mariadb,
    server_messages_in_german_are_understood_on_mariadb,
    idle_transaction_of_a_test_has_a_limit_on_mariadb,
);
for_each_database!(only postgres =>
    each_migration_on_postgres_is_replayed_in_a_transaction_of_its_own,
    a_template_is_made_for_sessions_that_are_prepared_alike,
    test_database_on_postgres_has_the_properties_of_the_configured_one,
    role_set_by_on_connect_may_use_the_test_database,
    session_in_template1_blocks_only_if_template1_has_content,
    an_extension_that_the_role_may_not_install_comes_by_a_template,
    a_schema_with_very_many_tables_is_removed,
    functions_and_operators_of_another_schema_are_not_called,
    missing_right_is_named_only_if_the_account_lacks_it_on_postgres,
    unfinished_database_is_an_error_that_names_its_state_on_postgres,
    server_messages_in_german_are_understood_on_postgres,
    idle_transaction_of_a_test_has_a_limit_on_postgres,
);

const OWN: TestIsolation = TestIsolation::Database;

#[derive(QueryableByName)]
struct Value {
    #[diesel(sql_type = Text)]
    value: String,
}

trait Ask: TestConnection {
    fn ask(&mut self, sql: &str) -> QueryResult<Vec<Value>>;
}

impl Ask for PgConnection {
    fn ask(&mut self, sql: &str) -> QueryResult<Vec<Value>> {
        sql_query(sql).load(self)
    }
}

impl Ask for MysqlConnection {
    fn ask(&mut self, sql: &str) -> QueryResult<Vec<Value>> {
        sql_query(sql).load(self)
    }
}

/// What a session of the test's sees.
#[track_caller]
fn texts<C: Ask>(test: &TestApp<C>, sql: &str) -> Vec<String> {
    let rows = test.open_session().unwrap().with(|conn| conn.ask(sql)).unwrap();
    rows.into_iter().map(|row| row.value).collect()
}

fn database<C: TestConnection>(steps: Vec<Step>) -> &'static Database<C, Steps> {
    Box::leak(Box::new(Database::new(Steps(steps))))
}

fn entries(versions: [&'static str; 3]) -> Vec<Step> {
    let tables = ["entries (author VARCHAR(20), message VARCHAR(20))", "b (id INTEGER)", "c (id INTEGER)"];
    let made = versions.into_iter().zip(tables);
    made.map(|(version, table)| step(version, format!("CREATE TABLE {table}"), "SELECT 1")).collect()
}

/// A test on the database of `setup` from its beginning to its end.
#[track_caller]
fn used<C: TestConnection>(setup: TestSetup<C>) {
    let test = setup.start().unwrap();
    let session = test.open_session().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 0);
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
    drop(session);
    test.finish().unwrap();
}

const SAID: &str = "SELECT said AS value FROM said ORDER BY id";

fn each_migration_on_postgres_is_replayed_in_a_transaction_of_its_own() {
    let server = Postgres::start();
    let tell = "INSERT INTO public.said (said) SELECT concat_ws(' ', current_setting('search_path'), current_user, \
                current_setting('TimeZone'), current_setting('work_mem'))";
    let db = database::<PgConnection>(vec![
        step("1", "CREATE SCHEMA other; CREATE TABLE said (id SERIAL PRIMARY KEY, said TEXT)", "SELECT 1"),
        step("2", "CREATE TABLE moments (at TIMESTAMPTZ DEFAULT now()); INSERT INTO moments DEFAULT VALUES", ""),
        step("3", "INSERT INTO moments DEFAULT VALUES; SET LOCAL search_path = other, public", "SELECT 1"),
        step("4", format!("{tell}; CREATE TABLE made (id INT)"), "SELECT 1"),
        step("5", "SET LOCAL TIME ZONE 'Asia/Tokyo'; SELECT set_config('work_mem', '1234kB', true)", "SELECT 1"),
        step("6", tell, "SELECT 1"),
        step(
            "7",
            "CREATE TABLE p (id INT PRIMARY KEY); \
            CREATE TABLE q (id INT REFERENCES p DEFERRABLE INITIALLY IMMEDIATE); SET CONSTRAINTS ALL DEFERRED",
            "SELECT 1",
        ),
        step(
            "8",
            format!(
                "DO $$ BEGIN INSERT INTO q VALUES (1); DELETE FROM q; EXCEPTION WHEN foreign_key_violation \
            THEN INSERT INTO said (said) VALUES ('refused'); END $$; {tell}"
            ),
            "SELECT 1",
        ),
    ]);
    let production = db.init_app("production", Config::new(server.url())).unwrap();
    production.create_all().unwrap();
    let tables = "SELECT schemaname || '.' || tablename AS value FROM pg_catalog.pg_tables \
                  WHERE schemaname IN ('public', 'other') ORDER BY 1";
    let ask = |conn: &mut PgConnection| {
        let said: Vec<Value> = sql_query(SAID).load(conn).unwrap();
        let tables: Vec<Value> = sql_query(tables).load(conn).unwrap();
        (said.into_iter().chain(tables)).map(|row| row.value).collect::<Vec<_>>()
    };
    let wanted = ask(&mut PgConnection::establish(&server.url()).unwrap());
    assert!(wanted.contains(&"public.made".to_owned()) && wanted.contains(&"refused".to_owned()), "{wanted:?}");
    for isolation in [OWN, Rollback] {
        let test = TestSetup::of(db).config(Config::new(server.url())).isolation(isolation).start().unwrap();
        let session = test.open_session().unwrap();
        assert_eq!(session.with(|conn| Ok::<_, diesel::result::Error>(ask(conn))).unwrap(), wanted, "{isolation:?}");
        assert_eq!(session.number("SELECT count(DISTINCT at) AS number FROM moments").unwrap(), 2);
        drop(session);
        test.finish().unwrap();
    }
    production.dispose().unwrap();
}

/// A violation that one transaction leaves to the next one is one.
fn each_migration_on_sqlite_is_replayed_in_a_transaction_of_its_own() {
    let steps = vec![
        step("1", "CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE q (id INTEGER REFERENCES p (id))", "SELECT 1"),
        step("2", "PRAGMA defer_foreign_keys = ON; INSERT INTO q VALUES (1); INSERT INTO p VALUES (1)", "SELECT 1"),
        step("3", "INSERT INTO q VALUES (2); INSERT INTO p VALUES (2)", "SELECT 1"),
    ];
    let on = |config: Config| config.connection_init_sql("PRAGMA foreign_keys = ON");
    let db = database::<SqliteConnection>(steps.clone());
    let production = db.init_app("production", on(Config::new(":memory:"))).unwrap();
    let error = production.create_all().unwrap_err().to_string();
    assert!(error.contains("3_step"), "{error}");
    for (url, isolation) in [(":memory:", OWN), (":memory:", Rollback), ("some.sqlite", OWN)] {
        let started = TestSetup::of(db).config(on(Config::new(url))).isolation(isolation).start();
        let error = started.map(drop).unwrap_err().to_string();
        assert!(error.contains("3_step"), "{url} {isolation:?}: {error}");
        let sound = database::<SqliteConnection>(steps[..2].to_vec());
        TestSetup::of(sound).config(on(Config::new(url))).isolation(isolation).start().unwrap().finish().unwrap();
    }
}

fn look_into_tenant(_: &App<PgConnection>, conn: &mut PgConnection) -> QueryResult<()> {
    conn.batch_execute("SET search_path = tenant, public")
}

fn a_template_is_made_for_sessions_that_are_prepared_alike() {
    let server = Postgres::start();
    let steps = || Steps(vec![step("1", "CREATE SCHEMA tenant", ""), step("2", "CREATE TABLE t (id INT)", "")]);
    static FUNCTION: std::sync::OnceLock<Database<PgConnection, Steps>> = std::sync::OnceLock::new();
    let prepared = FUNCTION.get_or_init(|| Database::new(steps()).on_connect(look_into_tenant));
    let plain = database::<PgConnection>(steps().0);
    let url = server.url();
    for isolation in [OWN, Rollback] {
        for _ in 0..2 {
            let in_tenant = |db: &'static Database<PgConnection, Steps>, config: Config| {
                let test = TestSetup::of(db).config(config).isolation(isolation).start().unwrap();
                let place = texts(&test, "SELECT schemaname::text AS value FROM pg_tables WHERE tablename = 't'");
                test.finish().unwrap();
                place.concat()
            };
            let tenant = "tenant,public";
            assert_eq!(in_tenant(plain, Config::new(&url)), "public");
            assert_eq!(
                in_tenant(plain, Config::new(&url).connection_init_sql("SET search_path = tenant, public")),
                "tenant"
            );
            assert_eq!(in_tenant(plain, Config::new(format!("{url}?options=-c%20search_path%3D{tenant}"))), "tenant");
            assert_eq!(in_tenant(prepared, Config::new(&url)), "tenant");
        }
    }
}

fn test_database_on_postgres_has_the_properties_of_the_configured_one() {
    let server = Postgres::start();
    let mut admin = server.admin();
    for sql in [
        "CREATE ROLE keeper",
        "CREATE ROLE reader",
        "GRANT keeper TO app",
        "CREATE DATABASE odd OWNER keeper TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'",
        "ALTER DATABASE odd SET search_path = \"a b\", public",
        "ALTER DATABASE odd SET work_mem = '3MB'",
        "ALTER ROLE app IN DATABASE odd SET application_name = 'it''s'",
        "REVOKE CONNECT ON DATABASE odd FROM PUBLIC",
        "GRANT CONNECT ON DATABASE odd TO reader",
    ] {
        admin.batch_execute(sql).unwrap();
    }
    let own = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET maintenance_work_mem = ''2MB''', current_database()); END $$";
    let steps = vec![step("1", "CREATE TABLE entries (author TEXT, message TEXT)", ""), step("2", own, "")];
    let db = database::<PgConnection>(steps);
    let like = |name: &str| {
        format!(
            "SELECT concat_ws('|', pg_encoding_to_char(encoding), datcollate, datctype, pg_get_userbyid(datdba), \
             (SELECT array_agg(a ORDER BY a::text) FROM unnest(datacl) a)) AS value \
             FROM pg_database WHERE datname = {name} UNION ALL SELECT c FROM pg_db_role_setting s, unnest(setconfig) c, \
             pg_database d WHERE d.oid = setdatabase AND datname = {name} AND c NOT LIKE 'maintenance%' \
             AND (setrole = 0 OR c LIKE 'app%') ORDER BY 1"
        )
    };
    for isolation in [OWN, Rollback] {
        for _ in 0..2 {
            let config = Config::new(server.url_of("odd"));
            let test = TestSetup::of(db).config(config).isolation(isolation).start().unwrap();
            // What the session's own role could not set is a right of the administrator's.
            let mut wanted = texts(&test, &like("'odd'"));
            assert_eq!(wanted.len(), 4, "{wanted:?}");
            let mut found = texts(&test, &like("current_database()"));
            if !found.iter().any(|setting| setting.starts_with("app")) {
                found.push("application_name=it's".into());
                found.sort();
            }
            wanted.sort();
            found.sort();
            assert_eq!(found, wanted, "{isolation:?}");
            let sees = "SELECT current_setting('work_mem') || ' ' || current_setting('maintenance_work_mem') AS value";
            assert_eq!(texts(&test, sees), ["3MB 2MB"], "{isolation:?}");
            test.finish().unwrap();
        }
    }
}

fn test_database_on_mariadb_has_the_properties_of_the_configured_one() {
    let server = Mariadb::start();
    server.admin().batch_execute("CREATE DATABASE odd CHARACTER SET latin2 COLLATE latin2_bin").unwrap();
    server.admin().batch_execute("GRANT ALL ON odd.* TO app").unwrap();
    let steps =
        |more: &str| vec![step("1", format!("CREATE TABLE entries (author VARCHAR(9), message TEXT){more}"), "")];
    let is = "SELECT CONCAT(table_collation, ' ', @@collation_database) AS value FROM information_schema.tables \
              WHERE table_schema = DATABASE() AND table_name = 'entries'";
    let db = database::<MysqlConnection>(steps(""));
    // A migration may change it.
    let other = database::<MysqlConnection>(steps("; ALTER DATABASE CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"));
    for isolation in [OWN, Rollback] {
        for _ in 0..2 {
            let begin = |db| TestSetup::of(db).config(Config::new(server.url_of("odd"))).isolation(isolation).start();
            let test = begin(db).unwrap();
            assert_eq!(texts(&test, is), ["latin2_bin latin2_bin"], "{isolation:?}");
            test.finish().unwrap();
            let test = begin(other).unwrap();
            assert_eq!(texts(&test, is), ["latin2_bin utf8mb4_bin"], "{isolation:?}");
            test.finish().unwrap();
        }
    }
}

fn role_set_by_on_connect_may_use_the_test_database() {
    let server = Postgres::start();
    let mut admin = server.admin();
    for sql in ["CREATE ROLE keeper", "GRANT keeper TO app", "CREATE DATABASE kept OWNER keeper"] {
        admin.batch_execute(sql).unwrap();
    }
    admin.batch_execute("GRANT CREATE ON DATABASE kept TO app").unwrap();
    for isolation in [OWN, Schema, Rollback] {
        for _ in 0..2 {
            let config = Config::new(server.url_of("kept")).connection_init_sql("SET ROLE keeper");
            let setup = TestSetup::of(PgConnection::db()).config(config).isolation(isolation);
            let test = setup.start().unwrap_or_else(|error| panic!("{isolation:?}: {error}"));
            let owner = "SELECT tableowner::text AS value FROM pg_tables WHERE tablename = 'entries'";
            assert_eq!(texts(&test, owner), ["keeper"]);
            test.open_session().unwrap().send(INSERT).unwrap();
            test.finish().unwrap();
        }
    }
    let left = "SELECT count(*) AS number FROM pg_database WHERE datname LIKE 'diesel%test%'";
    assert_eq!(admin.number(left).unwrap(), 0);
}

fn session_in_template1_blocks_only_if_template1_has_content() {
    let server = Postgres::start();
    let mut template1 = PgConnection::establish(&server.url_of("template1")).unwrap();
    for isolation in [OWN, Rollback] {
        used(TestSetup::of(PgConnection::db()).config(Config::new(server.url())).isolation(isolation));
    }
    drop(template1);
    let mut admin = server.admin();
    admin.batch_execute("CREATE DATABASE base IS_TEMPLATE true").unwrap();
    admin.batch_execute("ALTER DATABASE template1 OWNER TO app").unwrap();
    template1 = PgConnection::establish(&server.url_of("template1")).unwrap();
    template1.batch_execute("CREATE TABLE extra (id INT)").unwrap();
    let setup = || {
        let fixture = Fixture::sql("another content", "SELECT 1");
        TestSetup::of(PgConnection::db()).config(Config::new(server.url())).fixture(fixture)
    };
    for isolation in [OWN, Rollback] {
        let error = setup().isolation(isolation).start().map(drop).unwrap_err().to_string();
        assert!(error.contains("`template1`") && error.contains("TestSetup::template"), "{error}");
        assert!(!error.contains("CREATEDB"), "{error}");
        used(setup().template("base").isolation(isolation));
    }
    drop(template1);
    // A session is connected to the template that was named.
    let _base = PgConnection::establish(&server.url_of("base")).unwrap();
    let other = Fixture::sql("one more content", "SELECT 2");
    let error = setup().template("base").fixture(other).start().map(drop).unwrap_err().to_string();
    assert!(error.contains("connected to `base`") && !error.contains("CREATEDB"), "{error}");
    let error = setup().template("base").isolation(Schema).start().map(drop).unwrap_err().to_string();
    assert!(error.contains("give no template"), "{error}");
}

fn an_extension_that_the_role_may_not_install_comes_by_a_template() {
    let server = Postgres::start();
    let steps = vec![
        step("1", "CREATE EXTENSION IF NOT EXISTS plpgsql", ""),
        step("2", "CREATE EXTENSION IF NOT EXISTS \"dblink\"", ""),
    ];
    let db = database::<PgConnection>(steps);
    server.admin().batch_execute("CREATE DATABASE base IS_TEMPLATE true").unwrap();
    for isolation in [OWN, Rollback] {
        let setup = || TestSetup::of(db).config(Config::new(server.url())).isolation(isolation);
        let error = setup().start().map(drop).unwrap_err().to_string();
        assert!(error.contains("`dblink`") && error.contains("TestSetup::template"), "{error}");
        assert!(!error.contains("CREATEDB"), "{error}");
    }
    // As the administrator would.
    server.admin().batch_execute("ALTER ROLE app SUPERUSER").unwrap();
    let mut base = PgConnection::establish(&server.url_of("base")).unwrap();
    base.batch_execute("CREATE EXTENSION dblink").unwrap();
    drop(base);
    server.admin().batch_execute("ALTER ROLE app NOSUPERUSER").unwrap();
    for isolation in [OWN, Rollback] {
        let setup = TestSetup::of(db).config(Config::new(server.url())).isolation(isolation).template("base");
        setup.start().unwrap_or_else(|error| panic!("{isolation:?}: {error}")).finish().unwrap();
    }
}

fn missing_right_is_named_only_if_the_account_lacks_it_on_postgres() {
    let server = Postgres::start();
    server.admin().batch_execute("ALTER ROLE app NOCREATEDB").unwrap();
    server.admin().batch_execute("CREATE ROLE other").unwrap();
    server.admin().batch_execute("ALTER DATABASE app OWNER TO other").unwrap();
    for (isolation, right) in [(OWN, "CREATEDB"), (Rollback, "CREATEDB"), (Schema, "right CREATE in")] {
        let setup = TestSetup::of(PgConnection::db()).config(Config::new(server.url())).isolation(isolation);
        let error = setup.start().map(drop).unwrap_err().to_string();
        assert!(error.contains(right), "{isolation:?}: {error}");
    }
}

fn missing_right_is_named_only_if_the_account_lacks_it_on_mariadb() {
    let server = Mariadb::start();
    server.admin().batch_execute("CREATE USER poor@'%' IDENTIFIED BY 'pw'; CREATE DATABASE poor").unwrap();
    server.admin().batch_execute("GRANT SELECT ON poor.* TO poor@'%'").unwrap();
    let url = format!("mysql://poor:pw@127.0.0.1:{}/poor", server.port());
    for isolation in [OWN, Rollback] {
        let setup = TestSetup::of(MysqlConnection::db()).config(Config::new(&url)).isolation(isolation);
        let error = setup.start().map(drop).unwrap_err().to_string();
        assert!(error.contains("GRANT ALL ON"), "{isolation:?}: {error}");
    }
}

/// Settings of MariaDB under which a test has to be like any other.
fn tests_run_under_unusual_settings_of_mariadb() {
    let modes = "--sql-mode=ANSI_QUOTES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,NO_ZERO_DATE,ONLY_FULL_GROUP_BY";
    let ways: [&[&str]; 3] = [
        &["--autocommit=0"],
        &["--innodb-force-primary-key=1", modes, "--lower-case-table-names=1"],
        &["--collation-server=utf8mb4_bin", "--init-connect=SET foreign_key_checks = 0, autocommit = 0, sql_mode = ''"],
    ];
    for options in ways {
        let server = Mariadb::start_with(options);
        // What a process that was killed has left is found under these settings too.
        server.admin().batch_execute(&format!("CREATE DATABASE {}", of_a_dead_process())).unwrap();
        let key = "(number INTEGER AUTO_INCREMENT PRIMARY KEY, ";
        for versions in [["a1", "B2", "c3"], ["1", "10", "9"]] {
            let keyed = entries(versions).into_iter().map(|step| Step { up: step.up.replacen('(', key, 1), ..step });
            let db = database::<MysqlConnection>(keyed.collect());
            for isolation in [OWN, Rollback, OWN, Rollback] {
                let setup = TestSetup::of(db).config(Config::new(server.url())).isolation(isolation);
                let setup = setup.fixture(Fixture::sql("a row", "INSERT INTO b (id) VALUES (1)"));
                let test = setup
                    .patience(Duration::from_secs(20))
                    .start()
                    .unwrap_or_else(|error| panic!("{options:?}: {error}"));
                let session = test.open_session().unwrap();
                assert_eq!(session.number("SELECT count(*) AS number FROM b").unwrap(), 1, "{options:?} {isolation:?}");
                session.send(INSERT).unwrap();
                session.commit().unwrap();
                drop(session);
                test.finish().unwrap();
            }
        }
        let gone = "SELECT count(*) AS number FROM information_schema.schemata WHERE schema_name LIKE 'diesel|_session|_test%' ESCAPE '|'";
        assert_eq!(server.admin().number(gone).unwrap(), 0, "{options:?}");
    }
}

/// The name of a database as the kit makes it, of an owner that does not exist.
fn of_a_dead_process() -> String {
    let text = "diesel_session_test_00000001_1";
    let hash = format!("{text}made for a test")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{text}_{:08x}", (hash ^ (hash >> 32)) as u32)
}

/// Each new database looks unfinished.
fn unfinished_database_is_an_error_that_names_its_state_on_mariadb() {
    let make = "--init-connect=CREATE TABLE IF NOT EXISTS __diesel_session_unfinished (id INT)";
    let server = Mariadb::start_with(&[make]);
    let setup = TestSetup::of(MysqlConnection::db()).config(Config::new(server.url())).isolation(Rollback);
    let error = setup.patience(Duration::from_secs(20)).start().map(drop).unwrap_err().to_string();
    assert!(error.contains("diesel_session_rollback") && error.contains("__diesel_session_unfinished"), "{error}");
}

/// Each new database looks unfinished.
fn unfinished_database_is_an_error_that_names_its_state_on_postgres() {
    let server = Postgres::start();
    let setup = || TestSetup::of(PgConnection::db()).config(Config::new(server.url())).isolation(Rollback);
    used(setup());
    // The connection of this process is kept, so another account's settings are taken.
    let mut admin = server.admin();
    let names = "SELECT datname::text AS value FROM pg_database WHERE datname LIKE 'diesel%rollback%'";
    let databases: Vec<Value> = sql_query(names).load(&mut admin).unwrap();
    for database in &databases {
        admin.batch_execute(&format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", database.value)).unwrap();
        server.backend_pids(&database.value).into_iter().for_each(|pid| server.terminate(pid));
    }
    let error = setup().patience(Duration::from_secs(20)).start().map(drop).unwrap_err().to_string();
    assert!(error.contains("not currently accepting connections"), "{error}");
}

/// The ways to isolate a test on the server at `url`. SQLite's database in memory stands for a file too.
fn setups(url: &str) -> Vec<(&str, TestIsolation)> {
    match url {
        ":memory:" => [":memory:", "a.sqlite"].into_iter().flat_map(|url| [(url, OWN), (url, Rollback)]).collect(),
        _ if url.starts_with("postgres") => [OWN, Schema, Rollback].map(|isolation| (url, isolation)).to_vec(),
        _ => [OWN, Rollback].map(|isolation| (url, isolation)).to_vec(),
    }
}

fn patience_of_any_length_is_possible<C: TestConnection>(url: &str) {
    for patience in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
        for (url, isolation) in setups(url) {
            let setup = TestSetup::of(C::db()).config(Config::new(url)).isolation(isolation);
            used(setup.max_size(1).patience(patience));
        }
    }
}

/// Which gives no reason why a connection cannot be had.
static WITHOUT_REASONS: Database<AnyConnection> =
    Database::per_backend(PerBackend { sqlite: Some(SQLITE), postgres: Some(POSTGRES), mysql: Some(MYSQL) });

#[test]
fn rolled_back_test_works_with_an_enum_without_connect_with() {
    let urls = [
        enabled(Kind::Postgres).then(|| crate::support::postgres().url()),
        enabled(Kind::Mariadb).then(|| crate::support::mariadb().url()),
        Some(":memory:".into()),
    ];
    for url in urls.into_iter().flatten() {
        for isolation in [Rollback, Rollback, OWN] {
            let setup = TestSetup::of(&WITHOUT_REASONS).config(Config::new(&url)).isolation(isolation);
            used(setup.fixture(Fixture::sql("of an enum", "SELECT 1")));
        }
    }
}

fn server_messages_in_german_are_understood_on_postgres() {
    let server = Postgres::start_speaking("de_DE");
    for isolation in [Rollback, OWN, Schema, Rollback] {
        used(TestSetup::of(PgConnection::db()).config(Config::new(server.url())).isolation(isolation));
    }
    // The database of the URL is not there.
    used(TestSetup::of(PgConnection::db()).config(Config::new(server.url_of("nowhere"))));
}

fn server_messages_in_german_are_understood_on_mariadb() {
    let server = Mariadb::start_with(&["--lc-messages=de_DE"]);
    for isolation in [Rollback, OWN, Rollback] {
        used(TestSetup::of(MysqlConnection::db()).config(Config::new(server.url())).isolation(isolation));
    }
    used(TestSetup::of(MysqlConnection::db()).config(Config::new(server.url_of("nowhere"))));
}

fn idle_transaction_of_a_test_has_a_limit_on_postgres() {
    let limit = "SELECT setting::bigint AS number FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'";
    let url = crate::support::postgres().url();
    for isolation in [OWN, Schema, Rollback] {
        let ask = |config: Config| {
            let test = TestSetup::of(PgConnection::db()).config(config).isolation(isolation).start().unwrap();
            // Raw access has the connection cleaned.
            test.open_session().unwrap().send("SELECT 1").unwrap();
            let limit = test.open_session().unwrap().number(limit).unwrap();
            test.finish().unwrap();
            limit
        };
        assert_eq!(ask(Config::new(&url)), 4 * 3600 * 1000, "{isolation:?}");
        let own = Config::new(&url).connection_init_sql("SET idle_in_transaction_session_timeout = 5000");
        assert_eq!(ask(own), 5000, "{isolation:?}");
    }
}

fn idle_transaction_of_a_test_has_a_limit_on_mariadb() {
    let url = crate::support::mariadb().url();
    for isolation in [OWN, Rollback] {
        let test = TestSetup::of(MysqlConnection::db()).config(Config::new(&url)).isolation(isolation).start().unwrap();
        let limit = "SELECT CAST(@@idle_transaction_timeout AS SIGNED) AS number";
        assert_eq!(test.open_session().unwrap().number(limit).unwrap(), 4 * 3600);
        test.finish().unwrap();
    }
}

fn a_schema_with_very_many_tables_is_removed() {
    let server = Postgres::start();
    let part = |from: usize| {
        let tables: Vec<String> =
            (from..from + 280).map(|number| format!("CREATE TABLE t{number} (id SERIAL PRIMARY KEY)")).collect();
        tables.join(";\n")
    };
    let versions = ["1", "2", "3", "4", "5"];
    let steps = versions.iter().enumerate().map(|(at, version)| step(version, part(at * 280), "")).collect();
    let db = database::<PgConnection>(steps);
    let test = TestSetup::of(db).config(Config::new(server.url())).isolation(Schema).start().unwrap();
    let session = test.open_session().unwrap();
    assert_eq!(session.number("SELECT count(*) AS number FROM pg_tables WHERE tablename ~ '^t[0-9]+$'").unwrap(), 1400);
    drop(session);
    test.finish().unwrap();
    let left = "SELECT count(*) AS number FROM pg_namespace WHERE nspname LIKE 'diesel%'";
    assert_eq!(PgConnection::establish(&server.url()).unwrap().number(left).unwrap(), 0);
}

fn a_fixture_without_a_statement_does_nothing<C: TestConnection>(url: &str) {
    for (url, isolation) in setups(url) {
        for text in ["", " \n\t", "-- a comment", "/* one */;\n;", ";"] {
            let setup = TestSetup::of(C::db()).config(Config::new(url)).isolation(isolation);
            let setup = setup.fixture(Fixture::sql("blank", text)).fixture(Fixture::sql("a row", INSERT));
            let test = setup.fixture(Fixture::sql("blank too", text)).start().unwrap();
            assert_eq!(test.open_session().unwrap().number(COUNT).unwrap(), 1, "{text:?}");
            test.finish().unwrap();
        }
    }
}

/// What the kit asks the server is asked of the server, whatever a schema before `pg_catalog` has.
fn functions_and_operators_of_another_schema_are_not_called() {
    let server = Postgres::start();
    let mut conn = PgConnection::establish(&server.url()).unwrap();
    conn.batch_execute(
        "CREATE SCHEMA evil; CREATE TABLE evil.calls (what TEXT);
         CREATE FUNCTION evil.never(text, text) RETURNS bool LANGUAGE plpgsql
             AS 'BEGIN INSERT INTO evil.calls VALUES (current_query()); RETURN false; END';
         CREATE FUNCTION evil.never(name, name) RETURNS bool LANGUAGE plpgsql
             AS 'BEGIN INSERT INTO evil.calls VALUES (current_query()); RETURN false; END';
         CREATE FUNCTION evil.never(oid, oid) RETURNS bool LANGUAGE plpgsql
             AS 'BEGIN INSERT INTO evil.calls VALUES (current_query()); RETURN false; END';
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.never);
         CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = name, FUNCTION = evil.never);
         CREATE OPERATOR evil.= (LEFTARG = oid, RIGHTARG = oid, FUNCTION = evil.never)",
    )
    .unwrap();
    // The schema has to be there in a test's database too.
    server.admin().batch_execute("CREATE DATABASE base OWNER app").unwrap();
    PgConnection::establish(&server.url_of("base")).unwrap().batch_execute("CREATE SCHEMA evil").unwrap();
    assert_eq!(server.wait_for_connections_to("base", 0, Duration::from_secs(2)), 0);
    let url = format!("{}?options=-c%20search_path%3Devil,pg_catalog,public", server.url());
    for isolation in [OWN, Rollback, OWN] {
        used(TestSetup::of(PgConnection::db()).config(Config::new(&url)).isolation(isolation).template("base"));
    }
    // The pool's own query for the clients of the server is not the kit's.
    let calls = "SELECT DISTINCT what AS value FROM evil.calls WHERE what NOT LIKE '%backend_type%'";
    let calls: Vec<Value> = sql_query(calls).load(&mut conn).unwrap();
    assert_eq!(calls.into_iter().map(|call| call.value).collect::<Vec<_>>(), [""; 0]);
    let left = "SELECT count(*) AS number FROM pg_database WHERE datname LIKE 'diesel%test%'";
    assert_eq!(conn.number(left).unwrap(), 0);
}
