//! Migrations whose SQL ends the transaction in which they run, and comments that MariaDB executes.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::testing::TestSetup;
use diesel_session::{App, Config, Database, ErrorKind};

use crate::fixtures::{Provisioner, SessionExt, Step, Steps, TestConnection, TestDatabase, step, unique};
use crate::for_each_database;
use crate::support;

for_each_database!(postgres, sqlite => create_all_names_what_a_migration_committed_by_itself);
for_each_database!(postgres, mariadb, sqlite =>
    create_all_records_a_migration_that_committed_by_itself,
    create_all_is_not_misled_by_a_temporary_bookkeeping_table,
);
for_each_database!(Provisioner; postgres, sqlite =>
    drop_all_reports_what_was_kept_when_a_migration_ends_the_transaction,
);
for_each_database!(postgres, mariadb => create_all_reports_a_lock_that_is_gone_at_its_end);
for_each_database!(mariadb, sqlite => settings_of_one_migration_do_not_reach_the_next);
for_each_database!(only mariadb => drop_all_refuses_a_down_of_executed_comments_without_a_statement);
for_each_database!(only postgres =>
    drop_all_spares_other_schemas_after_the_end_of_a_transaction,
    search_path_of_one_migration_does_not_reach_the_next_in_a_test_database,
);

fn own<C: TestConnection>(steps: Vec<Step>, config: Config) -> (Database<C, Steps>, App<C>) {
    let db = Database::new(Steps(steps));
    let app = db.init_app(unique("endings"), config).unwrap();
    (db, app)
}

fn has<C: TestConnection>(app: &App<C>, table: &str) -> bool {
    app.open_session().unwrap().number(&format!("SELECT count(*) AS number FROM {table}")).is_ok()
}

fn tables_of(conn: &mut PgConnection, schema: &str) -> i64 {
    conn.number(&format!("SELECT count(*) AS number FROM pg_tables WHERE schemaname = '{schema}'")).unwrap()
}

/// What `drop_all` sets for a transaction is gone after the migration's own `COMMIT`, and after its `ROLLBACK`.
fn drop_all_spares_other_schemas_after_the_end_of_a_transaction() {
    for down in [
        "SELECT 1; COMMIT; DROP TABLE other",
        "SELECT 1; ROLLBACK; DROP TABLE other",
        "BEGIN; SELECT 1; COMMIT; BEGIN; DROP TABLE other; COMMIT;",
        "SELECT 1; END; DROP TABLE other",
    ] {
        let test_db = TestDatabase::postgres();
        let mut plain = PgConnection::establish(&test_db.url()).unwrap();
        plain.batch_execute("CREATE SCHEMA tenant; CREATE TABLE public.other (id INTEGER)").unwrap();
        let config = Config::new(format!("{}?options=-c%20search_path%3Dtenant,public", test_db.url()));
        let steps = vec![step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one"), step("2", "SELECT 1", down)];
        let (_db, app) = own::<PgConnection>(steps, config);
        app.create_all().unwrap();
        let error = app.drop_all().unwrap_err();
        assert!(
            error.kind() == ErrorKind::Migration
                && error.migration_failure().expect("a failure").message.contains("other"),
            "{down}: {error}"
        );
        assert_eq!(tables_of(&mut plain, "public"), 1, "{down}");
        assert_eq!(tables_of(&mut plain, "tenant"), 2, "{down}");
        plain.batch_execute("CREATE TABLE tenant.other (id INTEGER)").unwrap();
        assert_eq!(app.drop_all().unwrap(), ["2", "1"], "{down}");
        assert_eq!(tables_of(&mut plain, "public"), 1, "{down}");
        assert_eq!(tables_of(&mut plain, "tenant"), 0, "{down}");
        // The connection's own path is there again.
        assert!(has(&app, "public.other") && has(&app, "other"));
    }
}

/// Its `ROLLBACK` undid what was reverted before it, and its `COMMIT` kept that.
fn drop_all_reports_what_was_kept_when_a_migration_ends_the_transaction<C: TestConnection>(provisioner: &Provisioner) {
    for ending in ["COMMIT", "ROLLBACK"] {
        let test_db = (provisioner.create)();
        let steps = vec![
            step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE nowhere"),
            step("2", "CREATE TABLE two (id INTEGER)", format!("BEGIN; DROP TABLE two; {ending}")),
            step("3", "CREATE TABLE three (id INTEGER)", "DROP TABLE three"),
        ];
        let (_db, app) = own::<C>(steps, test_db.config());
        app.create_all().unwrap();
        let error = app.drop_all().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
        let failure = error.migration_failure().expect("a failure");
        assert_eq!(failure.done, ["3", "2"], "{error}");
        let statuses = app.migrations().unwrap();
        let applied: Vec<bool> = statuses.iter().map(|one| one.applied).collect();
        assert_eq!(applied, [true, false, false]);
        assert!(has(&app, "one") && !has(&app, "three"));
        assert_eq!(has(&app, "two"), ending == "ROLLBACK");
    }
}

/// What a migration committed by itself is left behind when the rest of it fails.
fn create_all_names_what_a_migration_committed_by_itself<C: TestConnection>(test_db: &TestDatabase) {
    let up = "CREATE TABLE one (id INTEGER); COMMIT; CREATE TABLE one (id INTEGER)";
    let (_db, app) = own::<C>(vec![step("1", up, "DROP TABLE one")], test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert!(failure.left_behind.iter().any(|left| left == "+one.id"), "{error}");
    assert!(has(&app, "one"));
    let again = app.create_all().unwrap_err();
    assert!(again.to_string().contains("Nothing of it remains"), "{again}");
}

fn create_all_records_a_migration_that_committed_by_itself<C: TestConnection>(test_db: &TestDatabase) {
    let up = "CREATE TABLE one (id INTEGER); COMMIT; CREATE TABLE two (id INTEGER)";
    let steps = vec![
        step("1", up, "DROP TABLE two; DROP TABLE one"),
        step("2", "CREATE TABLE three (id INTEGER)", "DROP TABLE three"),
    ];
    let (_db, app) = own::<C>(steps, test_db.config());
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert!(has(&app, "two") && has(&app, "three"));
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    assert!(!has(&app, "one") && !has(&app, "two"));
}

/// The server says that this session does not have the lock: another caller may have had it meanwhile.
fn create_all_reports_a_lock_that_is_gone_at_its_end<C: TestConnection>(test_db: &TestDatabase) {
    let unlock = match test_db {
        TestDatabase::Postgres(_) => "SELECT pg_advisory_unlock_all()",
        _ => "DO RELEASE_ALL_LOCKS()",
    };
    let up = format!("CREATE TABLE one (id INTEGER); {unlock}");
    let steps = vec![
        step("1", up, "DROP TABLE one"),
        step("2", "CREATE TABLE two (id INTEGER)", format!("DROP TABLE two; {unlock}")),
    ];
    let (_db, app) = own::<C>(steps, test_db.config());
    let error = app.create_all().unwrap_err();
    assert!(
        error.kind() == ErrorKind::PoolerInTransactionMode && error.to_string().contains(": create_all needs "),
        "{error}"
    );
    assert!(error.to_string().contains("Done: 1, 2."), "{error}");
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    let error = app.drop_all().unwrap_err();
    assert!(
        error.kind() == ErrorKind::PoolerInTransactionMode && error.to_string().contains(": drop_all needs "),
        "{error}"
    );
    assert!(error.to_string().contains("Done: 2, 1."), "{error}");
    assert!(!has(&app, "one") && !has(&app, "two"));
    assert_eq!(app.drop_all().unwrap(), Vec::<String>::new());
}

/// MariaDB executes the inside of these comments, and in some there is no statement.
fn drop_all_refuses_a_down_of_executed_comments_without_a_statement() {
    for down in
        ["/*!*/", "/*! */;", "/*!999999\\- enable the sandbox mode */", "/*M!999999 DROP TABLE one */", "/*!40101 */"]
    {
        let steps = vec![
            step("1", "CREATE TABLE one (id INTEGER)", down),
            step("2", "CREATE TABLE two (id INTEGER)", "DROP TABLE two"),
        ];
        let test_db = TestDatabase::mariadb();
        let (_db, app) = own::<MysqlConnection>(steps, test_db.config());
        app.create_all().unwrap();
        let error = app.drop_all().unwrap_err();
        assert!(error.irreversible_migrations().is_some_and(|versions| versions.eq(["1_step"])), "{error}");
        assert!(has(&app, "one") && has(&app, "two"), "{down}");
    }
    let steps = vec![step("1", "/*!40101 CREATE TABLE one (id INTEGER) */;", "/*!50000 DROP */ TABLE one")];
    let test_db = TestDatabase::mariadb();
    let (_db, app) = own::<MysqlConnection>(steps, test_db.config());
    app.create_all().unwrap();
    assert!(has(&app, "one"));
    app.drop_all().unwrap();
    assert!(!has(&app, "one"));
}

/// On MariaDB a temporary table hides the table of its name, even where the database is named.
fn create_all_is_not_misled_by_a_temporary_bookkeeping_table<C: TestConnection>(test_db: &TestDatabase) {
    let up = "CREATE TEMPORARY TABLE __diesel_schema_migrations (version VARCHAR(50)); CREATE TABLE one (id INTEGER)";
    let steps = vec![step("1", up, "DROP TABLE one"), step("2", "CREATE TABLE two (id INTEGER)", "DROP TABLE two")];
    let (_db, app) = own::<C>(steps, test_db.config().max_size(1));
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    let mut plain = C::establish(&test_db.url()).unwrap();
    assert_eq!(plain.number("SELECT count(*) AS number FROM __diesel_schema_migrations").unwrap(), 2);
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
}

#[test]
fn create_all_on_a_full_disk_says_what_is_missing() {
    let test_db = TestDatabase::sqlite();
    let up = "CREATE TABLE one AS SELECT hex(zeroblob(1000000)) AS text";
    let config = test_db.config().connection_init_sql("PRAGMA max_page_count = 10");
    let (_db, app) = own::<SqliteConnection>(vec![step("1", up, "DROP TABLE one")], config);
    let error = app.create_all().unwrap_err().to_string();
    assert!(error.contains("Make room on the disk") && !error.contains("Correct the migration"), "{error}");
}

/// What the first migration sets is not what the second one finds.
fn settings_of_one_migration_do_not_reach_the_next<C: TestConnection>(test_db: &TestDatabase) {
    let sqlite = [
        ("PRAGMA legacy_alter_table = 1", "(SELECT legacy_alter_table FROM pragma_legacy_alter_table)"),
        (
            "PRAGMA ignore_check_constraints = 1",
            "(SELECT ignore_check_constraints FROM pragma_ignore_check_constraints)",
        ),
        ("PRAGMA recursive_triggers = 1", "(SELECT recursive_triggers FROM pragma_recursive_triggers)"),
        ("PRAGMA query_only = 1", "(SELECT query_only FROM pragma_query_only)"),
    ];
    let mariadb = [
        ("SET SESSION sql_safe_updates = 1", "@@sql_safe_updates"),
        ("SET SESSION sql_select_limit = 1", "@@sql_select_limit"),
        ("SET SESSION group_concat_max_len = 77", "@@group_concat_max_len"),
        ("SET SESSION completion_type = 1", "@@completion_type"),
        ("SET SESSION default_storage_engine = MyISAM", "@@default_storage_engine"),
        ("SET SESSION tx_isolation = 'SERIALIZABLE'", "@@tx_isolation"),
    ];
    let (kit_url, settings) = match test_db {
        TestDatabase::Sqlite(_) => ("endings.sqlite".to_owned(), &sqlite[..]),
        _ => (support::mariadb().url(), &mariadb[..]),
    };
    let set: Vec<&str> = settings.iter().map(|(set, _)| *set).collect();
    let read: Vec<&str> = settings.iter().map(|(_, read)| *read).collect();
    let list = |names: &[&str]| {
        let columns: Vec<_> = names.iter().enumerate().map(|(at, name)| format!("{name} AS c{at}")).collect();
        format!("SELECT {}", columns.join(", "))
    };
    let steps = vec![
        step("1", set.join("; "), "SELECT 1"),
        step("2", format!("CREATE TABLE two AS {}", list(&read)), "DROP TABLE two"),
    ];
    let (_db, app) = own::<C>(steps.clone(), test_db.config().max_size(1));
    // The setup of the crate's own connection is what both see.
    let app_without = C::app(test_db.config().max_size(1));
    app_without.create_all().unwrap();
    app.create_all().unwrap();
    // Nor in a database of the test kit.
    let db: &'static Database<C, Steps> = Box::leak(Box::new(Database::new(Steps(steps))));
    let test = TestSetup::of(db).config(Config::new(kit_url)).start().unwrap();
    let sessions = [app_without.open_session().unwrap(), test.open_session().unwrap()];
    for (at, name) in read.iter().enumerate() {
        let same = format!("SELECT count(*) AS number FROM two, (SELECT {name} AS value) AS now WHERE c{at} = value");
        for session in &sessions {
            assert_eq!(session.number(&same).unwrap(), 1, "{name}");
        }
    }
    drop(sessions);
    test.finish().unwrap();
}

fn search_path_of_one_migration_does_not_reach_the_next_in_a_test_database() {
    let steps = vec![
        step("1", "CREATE SCHEMA other; SET search_path = other, public", "DROP SCHEMA other"),
        step("2", "CREATE TABLE two (id INTEGER)", "DROP TABLE two"),
    ];
    let db: &'static Database<PgConnection, Steps> = Box::leak(Box::new(Database::new(Steps(steps))));
    let test = TestSetup::of(db).config(Config::new(support::postgres().url())).start().unwrap();
    let session = test.open_session().unwrap();
    assert_eq!(session.number("SELECT count(*) AS number FROM public.two").unwrap(), 0);
    drop(session);
    test.finish().unwrap();
}
