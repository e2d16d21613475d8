//! Whole databases: created, found and dropped.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::admin::DatabaseProblem;
use diesel_session::{Config, Result, admin};

use crate::fixtures::threads::together;
use crate::fixtures::{AnyConnection, COUNT, INSERT, SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::{self};

for_each_database!(every_database =>
    create_database_if_missing_creates_once,
    create_database_if_missing_by_many_threads_creates_once,
    drop_database_refuses_a_database_in_use,
    create_database_names_what_exists_and_drop_database_what_is_missing,
);
for_each_database!(only sqlite => drop_database_keeps_a_file_that_it_cannot_check);
for_each_database!(only mariadb => mariadb_names_are_taken_exactly_or_refused, mariadb_account_without_rights_is_told);
for_each_database!(only postgres =>
    postgres_names_are_taken_exactly_or_refused,
    postgres_account_without_rights_is_told,
);

/// The URL with another database, which is percent-encoded.
fn named(url: &str, database: &str) -> Config {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let one = |byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    let encoded: String = database.bytes().map(one).collect();
    let at = url.rfind('/').unwrap();
    Config::new(format!("{}/{encoded}", &url[..at]))
}

const ODD: [&str; 4] = ["appit's", "appa\"b`c", "app; DROP DATABASE app; --", "app\u{e9}\u{4e16}\u{754c} %?&"];

fn exactly<C: TestConnection>(url: &str, names: &[&str], refused: &[&str]) {
    let longest = format!("app{}", "x".repeat(60));
    for name in names.iter().copied().chain([longest.as_str(), "app_plain-1.x"]) {
        let name = name.to_owned();
        let config = named(url, &name);
        admin::create_database(C::db(), &config).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(has_problem(&admin::create_database(C::db(), &config), DatabaseProblem::Exists), "{name} is there");
        let app = C::app(config.clone());
        app.ping().unwrap();
        drop(app);
        for wrong in [None, Some("app"), Some(&name[..name.len() - 1]).filter(|_| name.is_ascii())] {
            let refused = admin::drop_database(C::db(), &config, wrong).unwrap_err();
            assert_eq!(refused.code(), "DS504", "{refused}");
        }
        admin::drop_database(C::db(), &config, Some(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let gone = C::app(config.clone());
        assert!(gone.ping().is_err(), "{name} is gone");
        assert!(has_problem(&admin::drop_database(C::db(), &config, Some(&name)), DatabaseProblem::Missing), "{name}");
    }
    // What a server would cut, or take for something else.
    let (long, wide) = ("x".repeat(70), "\u{e9}".repeat(70));
    for name in refused.iter().copied().chain([long.as_str(), wide.as_str(), "appa\0b", ""]) {
        let config = named(url, name);
        for refused in [
            admin::create_database(C::db(), &config).unwrap_err(),
            admin::drop_database(C::db(), &config, Some(name)).unwrap_err(),
        ] {
            assert_eq!(refused.code(), "DS101", "{refused}");
        }
    }
}

fn postgres_names_are_taken_exactly_or_refused() {
    exactly::<PgConnection>(&support::postgres().url(), &ODD, &[]);
}

fn mariadb_names_are_taken_exactly_or_refused() {
    exactly::<MysqlConnection>(&support::mariadb().url(), &[], &ODD);
}

#[test]
fn a_file_has_to_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it's my.sqlite");
    std::fs::write(&path, "").unwrap();
    let config = Config::new(format!("sqlite://{}", path.display()));
    let db = SqliteConnection::db();
    assert_eq!(admin::drop_database(db, &config, None).unwrap_err().code(), "DS504");
    assert!(path.exists());
    admin::drop_database(db, &config, Some("it's my.sqlite")).unwrap();
    assert!(!path.exists());
    assert_eq!(admin::drop_database(db, &Config::new(":memory:"), Some(":memory:")).unwrap_err().code(), "DS101");
}

/// Whether the outcome is this error, which shows no password.
#[track_caller]
fn has_problem<T: std::fmt::Debug>(outcome: &Result<T>, wanted: DatabaseProblem) -> bool {
    let error = outcome.as_ref().unwrap_err();
    let (text, debug) = (error.to_string(), format!("{error:?}"));
    for password in [support::PASSWORD, LIMITED] {
        assert!(!text.contains(password) && !debug.contains(password), "{text}");
    }
    assert_eq!(error.code(), "DS408", "{error}");
    error.database_problem() == Some(wanted)
}

/// A database that does not exist, beside the one of `test_db`, with the name that `drop_database` asks for.
fn absent(test_db: &TestDatabase) -> (Config, String) {
    let name = unique("app_absent").replace('-', "_");
    match test_db {
        TestDatabase::Sqlite(file) => {
            let name = format!("{name}.sqlite");
            let folder = std::path::Path::new(&file.url()).parent().unwrap().join(&name);
            (Config::new(folder.to_str().unwrap()), name)
        }
        _ => (named(&test_db.url(), &name), name),
    }
}

fn create_database_if_missing_creates_once<C: TestConnection>(test_db: &TestDatabase) {
    let (config, name) = absent(test_db);
    assert!(admin::create_database_if_missing(C::db(), &config).unwrap());
    assert!(!admin::create_database_if_missing(C::db(), &config).unwrap());
    let app = C::app(config.clone());
    app.create_all().unwrap();
    assert!(!admin::create_database_if_missing(C::db(), &config).unwrap());
    assert_eq!(app.context(|| C::db().session()?.number(COUNT)).unwrap(), 0);
    drop(app);
    admin::drop_database(C::db(), &config, Some(&name)).unwrap();
    assert!(admin::create_database_if_missing(C::db(), &config).unwrap(), "it was gone");
    admin::drop_database(C::db(), &config, Some(&name)).unwrap();
}

fn create_database_if_missing_by_many_threads_creates_once<C: TestConnection>(test_db: &TestDatabase) {
    let (config, name) = absent(test_db);
    let outcomes = together(6, |_| admin::create_database_if_missing(C::db(), &config).unwrap());
    assert_eq!(outcomes.iter().filter(|created| **created).count(), 1, "{outcomes:?}");
    admin::drop_database(C::db(), &config, Some(&name)).unwrap();
}

fn drop_database_refuses_a_database_in_use<C: TestConnection>(test_db: &TestDatabase) {
    let (config, name) = absent(test_db);
    admin::create_database(C::db(), &config).unwrap();
    let app = C::app(config.clone());
    app.create_all().unwrap();
    app.ping().unwrap();
    let dropped = admin::drop_database(C::db(), &config, Some(&name));
    assert!(has_problem(&dropped, DatabaseProblem::InUse), "{dropped:?}");
    assert_eq!(app.context(|| C::db().session()?.number(COUNT)).unwrap(), 0);
    app.dispose().unwrap();
    admin::drop_database(C::db(), &config, Some(&name)).unwrap();
}

fn drop_database_keeps_a_file_that_it_cannot_check() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("used.sqlite");
    let file = path.to_str().unwrap();
    let app = SqliteConnection::app(Config::new(file));
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    for config in [
        Config::new(file),
        Config::new(file).acquire_timeout(std::time::Duration::ZERO),
        Config::new(format!("file:{file}?nolock=1")),
        Config::new(format!("file:{file}?immutable=1")),
    ] {
        let dropped = admin::drop_database(SqliteConnection::db(), &config, Some("used.sqlite"));
        assert!(dropped.is_err() && path.exists(), "{config:?}: {dropped:?}");
    }
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
    drop(session);
    app.dispose().unwrap();
    admin::drop_database(SqliteConnection::db(), &Config::new(file), Some("used.sqlite")).unwrap();
    assert!(!path.exists());
}

fn create_database_names_what_exists_and_drop_database_what_is_missing<C: TestConnection>(test_db: &TestDatabase) {
    let (config, name) = absent(test_db);
    let dropped = admin::drop_database(C::db(), &config, Some(&name));
    assert!(has_problem(&dropped, DatabaseProblem::Missing), "{dropped:?}");
    assert!(dropped.unwrap_err().to_string().contains(&name));
    admin::create_database(C::db(), &config).unwrap();
    let created = admin::create_database(C::db(), &config);
    assert!(has_problem(&created, DatabaseProblem::Exists), "{created:?}");
    assert!(created.unwrap_err().to_string().contains(&name));
    admin::drop_database(C::db(), &config, Some(&name)).unwrap();
}

const LIMITED: &str = "s3cret-of-limited";

fn account_without_rights_is_told<C: TestConnection>(config: &Config, existing: &Config, existing_name: &str) {
    for created in
        [admin::create_database(C::db(), config), admin::create_database_if_missing(C::db(), config).map(drop)]
    {
        assert!(has_problem(&created, DatabaseProblem::NotPermitted), "{created:?}");
    }
    let dropped = admin::drop_database(C::db(), existing, Some(existing_name));
    assert!(has_problem(&dropped, DatabaseProblem::NotPermitted), "{dropped:?}");
}

fn postgres_account_without_rights_is_told() {
    let server = support::postgres();
    let test_db = TestDatabase::postgres();
    let name = test_db.url().rsplit('/').next().unwrap().to_owned();
    let create = format!("CREATE ROLE limited LOGIN PASSWORD '{LIMITED}'");
    server.admin().batch_execute(&create).unwrap();
    let url =
        |database: &str| Config::new(format!("postgres://limited:{LIMITED}@127.0.0.1:{}/{database}", server.port()));
    account_without_rights_is_told::<PgConnection>(&url("not_there"), &url(&name), &name);
    account_without_rights_is_told::<AnyConnection>(&url("not_there"), &url(&name), &name);
    // It can connect, so the database is there.
    assert!(!admin::create_database_if_missing(PgConnection::db(), &url(&name)).unwrap());
    server.admin().batch_execute("DROP ROLE limited").unwrap();
}

fn mariadb_account_without_rights_is_told() {
    let server = support::mariadb();
    let test_db = TestDatabase::mariadb();
    let name = test_db.url().rsplit('/').next().unwrap().to_owned();
    let create = format!("CREATE USER limited IDENTIFIED BY '{LIMITED}'");
    server.admin().batch_execute(&create).unwrap();
    let url = |database: &str| Config::new(format!("mysql://limited:{LIMITED}@127.0.0.1:{}/{database}", server.port()));
    account_without_rights_is_told::<MysqlConnection>(&url("not_there"), &url(&name), &name);
    server.admin().batch_execute("DROP USER limited").unwrap();
}

#[test]
fn create_database_of_a_file_needs_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::new(folder.path().join("no/such/shop.sqlite").to_str().unwrap());
    let error = admin::create_database(SqliteConnection::db(), &config).unwrap_err();
    assert!(error.code() == "DS101" && error.to_string().contains("does not exist"), "{error}");
    let config = Config::new(folder.path().to_str().unwrap());
    assert!(admin::create_database_if_missing(SqliteConnection::db(), &config).is_err(), "a folder is no database");
}

#[test]
fn database_in_memory_needs_no_creation() {
    let config = Config::new(":memory:");
    admin::create_database(SqliteConnection::db(), &config).unwrap();
    assert!(!admin::create_database_if_missing(SqliteConnection::db(), &config).unwrap());
}
