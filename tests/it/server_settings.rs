//! Settings of servers, databases and roles: those that the crate relies on it sets, the others stay as they are.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_types::Text;
use diesel_session::Database;
use diesel_session::pool::Reset;

use crate::fixtures::{AnyConnection, INSERT, SessionExt, TestConnection, TestDatabase, connect_any, unique};
use crate::for_each_database;

for_each_database!(only postgres =>
    connection_sets_required_settings_and_keeps_the_others,
    required_setting_changed_by_on_connect_is_restored,
    client_connection_check_interval_is_set_unless_configured,
    functions_and_operators_before_pg_catalog_are_not_called,
);

#[derive(QueryableByName)]
struct Value {
    #[diesel(sql_type = Text)]
    value: String,
}

fn setting(conn: &mut PgConnection, name: &str) -> String {
    let sql = format!("SELECT pg_catalog.current_setting('{name}') AS value");
    diesel::sql_query(sql).get_result::<Value>(conn).unwrap().value
}

/// The settings of the connection that a session of that application gets.
fn settings(app: &diesel_session::App<PgConnection>, names: &[&str]) -> Vec<String> {
    let session = app.open_session().unwrap();
    session.with(|conn| Ok(names.iter().map(|name| setting(conn, name)).collect())).unwrap()
}

fn alter(test_db: &TestDatabase, setting: &str) {
    let sql = format!(
        "DO $$ BEGIN EXECUTE pg_catalog.format('ALTER DATABASE %I SET {setting}', pg_catalog.current_database()); END $$"
    );
    connect_any(&test_db.url()).unwrap().batch_execute(&sql).unwrap();
}

fn connection_sets_required_settings_and_keeps_the_others() {
    let test_db = TestDatabase::postgres();
    for sql in [
        "standard_conforming_strings = off",
        "synchronous_commit = off",
        "default_transaction_isolation = serializable",
        "bytea_output = escape",
        "DateStyle = German",
    ] {
        alter(&test_db, sql);
    }
    let names = [
        "standard_conforming_strings",
        "synchronous_commit",
        "default_transaction_isolation",
        "bytea_output",
        "DateStyle",
    ];
    let app = PgConnection::app(test_db.config().max_size(1).reset(Reset::Always));
    let wanted = ["on", "off", "serializable", "escape", "German, DMY"];
    for round in 0..3 {
        assert_eq!(settings(&app, &names), wanted, "{round}");
        // What a session sets is gone after it.
        let session = app.open_session().unwrap();
        session.send("SET standard_conforming_strings = off; SET synchronous_commit = local").unwrap();
        session.commit().unwrap();
    }
    // A hidden end is seen where the database reads strings in the old way.
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session.send("SELECT 'C:\\'; COMMIT; BEGIN; SELECT 'C:\\'").unwrap();
    assert!(session.send("SELECT 1").unwrap_err().is_rollback_required());
}

fn required_setting_changed_by_on_connect_is_restored() {
    let test_db = TestDatabase::postgres();
    let on_connect = "SET standard_conforming_strings = off; SET work_mem = '7MB'";
    let app = PgConnection::app(test_db.config().connection_init_sql(on_connect).max_size(1).reset(Reset::Always));
    for _ in 0..2 {
        assert_eq!(settings(&app, &["standard_conforming_strings", "work_mem"]), ["on", "7MB"]);
    }
}

fn client_connection_check_interval_is_set_unless_configured() {
    const NAME: &str = "client_connection_check_interval";
    let test_db = TestDatabase::postgres();
    let interval = |url: &str| {
        let app = PgConnection::app(diesel_session::Config::new(url).max_size(1).reset(Reset::Always));
        let first = settings(&app, &[NAME]).remove(0);
        assert_eq!(settings(&app, &[NAME]), [&*first], "after a reset");
        first
    };
    assert_eq!(interval(&test_db.url()), "10s");
    let separator = if test_db.url().contains('?') { '&' } else { '?' };
    assert_eq!(interval(&format!("{}{separator}options=-c%20{NAME}%3D3s", test_db.url())), "3s");
    alter(&test_db, &format!("{NAME} = 0"));
    assert_eq!(interval(&test_db.url()), "0");
}

/// What the library sends by itself at connect, and around migrations and disposal, calls nothing of a schema that
/// precedes `pg_catalog`.
fn functions_and_operators_before_pg_catalog_are_not_called() {
    let test_db = TestDatabase::postgres();
    // It keeps the usual search path.
    let mut plain = PgConnection::establish(&test_db.url()).unwrap();
    plain
        .batch_execute("CREATE SCHEMA evil; CREATE TABLE evil.calls (name text); CREATE SEQUENCE evil.called")
        .unwrap();
    let functions = [
        ("current_setting(text)", "text", "''"),
        ("current_setting(text, boolean)", "text", "'0'"),
        ("current_database()", "name", "'evil'"),
        ("current_schemas(boolean)", "name[]", "'{}'"),
        ("to_regclass(text)", "regclass", "NULL"),
        ("version()", "text", "''"),
        ("strpos(text, text)", "int", "0"),
        ("pg_backend_pid()", "int", "0"),
        ("clock_timestamp()", "timestamptz", "'epoch'"),
        ("now()", "timestamptz", "'epoch'"),
        ("chr(int)", "text", "'x'"),
        ("set_config(text, text, boolean)", "text", "''"),
        ("pg_try_advisory_lock(int, int)", "boolean", "true"),
        ("pg_advisory_unlock(int, int)", "boolean", "true"),
    ];
    for (signature, returns, value) in functions {
        let sql = format!(
            "CREATE FUNCTION evil.{signature} RETURNS {returns} LANGUAGE plpgsql AS $$ BEGIN \
             PERFORM pg_catalog.nextval('evil.called'); \
             INSERT INTO evil.calls VALUES ('{signature}'); RETURN {value}; END $$"
        );
        plain.batch_execute(&sql).unwrap();
    }
    let operators = [
        ("||", "text", "text", "text", "''"),
        ("||", "text", "bigint", "text", "''"),
        ("||", "text", "numeric", "text", "''"),
        ("||", "int", "text", "text", "''"),
        ("-", "int", "int", "int", "0"),
        ("=", "name", "name", "boolean", "false"),
        ("=", "oid", "oid", "boolean", "false"),
        ("=", "int", "int", "boolean", "false"),
        ("<>", "text", "text", "boolean", "false"),
        (">=", "bigint", "int", "boolean", "true"),
        (">", "int", "int", "boolean", "false"),
    ];
    for (number, (name, left, right, returns, value)) in operators.into_iter().enumerate() {
        let sql = format!(
            "CREATE FUNCTION evil.operator_{number}({left}, {right}) RETURNS {returns} LANGUAGE plpgsql AS $$ BEGIN \
             PERFORM pg_catalog.nextval('evil.called'); \
             INSERT INTO evil.calls VALUES ('operator {name} of {left}'); RETURN {value}; END $$; \
             CREATE OPERATOR evil.{name} (FUNCTION = evil.operator_{number}, LEFTARG = {left}, RIGHTARG = {right})"
        );
        plain.batch_execute(&sql).unwrap();
    }
    plain
        .batch_execute(
            "CREATE DOMAIN evil.text AS varchar CHECK (false); CREATE DOMAIN evil.int4 AS bigint CHECK (false)",
        )
        .unwrap();
    alter(&test_db, "search_path = evil, pg_catalog, public");
    let db: Database<AnyConnection> = AnyConnection::new_db();
    let app = db.init_app(unique("careful"), test_db.config()).unwrap();
    app.ping().unwrap();
    let session = app.open_session().unwrap();
    session.send("SELECT 1").unwrap();
    session.commit().unwrap();
    app.scope().resolvable().run_and_commit(|| db.session()?.send("SELECT 1")).unwrap();
    assert!(app.status().to_string().contains("careful"));
    db.dispose_all().unwrap();
    let calls = diesel::sql_query("SELECT DISTINCT name::text AS value FROM evil.calls");
    let called: Vec<String> = calls.load::<Value>(&mut plain).unwrap().into_iter().map(|row| row.value).collect();
    assert!(called.is_empty(), "{called:?}");
    // A query that fails for its answer takes the row back, but not the number.
    let counted = diesel::sql_query("SELECT is_called::text AS value FROM evil.called");
    assert_eq!(counted.get_result::<Value>(&mut plain).unwrap().value, "false");
}
