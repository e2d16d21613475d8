//! Whole databases by name.

use diesel_session::testing;

use super::*;

/// The URL with another database, which is percent-encoded.
fn named(url: &str, database: &str) -> Config {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let one = |byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    let encoded: String = database.bytes().map(one).collect();
    let at = url.rfind('/').unwrap();
    Config::new(format!("{}/{encoded}", &url[..at]))
}

const ODD: [&str; 4] = ["appit's", "appa\"b`c", "app; DROP DATABASE app; --", "app\u{e9}\u{4e16}\u{754c} %?&"];

fn exactly<C: Conn>(url: &str, names: &[&str], refused: &[&str]) {
    let longest = format!("app{}", "x".repeat(60));
    for name in names.iter().copied().chain([longest.as_str(), "app_plain-1.x"]) {
        let name = name.to_owned();
        let config = named(url, &name);
        testing::create_database(C::db(), &config).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(testing::create_database(C::db(), &config).is_err(), "{name} is there");
        let app = C::app(config.clone());
        app.ping().unwrap();
        drop(app);
        for wrong in [None, Some("app"), Some(&name[..name.len() - 1]).filter(|_| name.is_ascii())] {
            let refused = testing::drop_database(C::db(), &config, wrong).unwrap_err();
            assert_eq!(refused.code(), "DS504", "{refused}");
        }
        testing::drop_database(C::db(), &config, Some(&name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let gone = C::app(config.clone());
        assert!(gone.ping().is_err(), "{name} is gone");
        testing::drop_database(C::db(), &config, Some(&name)).unwrap();
    }
    // What a server would cut, or take for something else.
    let (long, wide) = ("x".repeat(70), "\u{e9}".repeat(70));
    for name in refused.iter().copied().chain([long.as_str(), wide.as_str(), "appa\0b", ""]) {
        let config = named(url, name);
        for refused in [
            testing::create_database(C::db(), &config).unwrap_err(),
            testing::drop_database(C::db(), &config, Some(name)).unwrap_err(),
        ] {
            assert_eq!(refused.code(), "DS101", "{refused}");
        }
    }
}

#[test]
fn postgres_names_are_taken_exactly_or_refused() {
    if enabled(Kind::Postgres) {
        exactly::<PgConnection>(&support::postgres().url(), &ODD, &[]);
    }
}

#[test]
fn mariadb_names_are_taken_exactly_or_refused() {
    if enabled(Kind::Mysql) {
        exactly::<MysqlConnection>(&support::mariadb().url(), &[], &ODD);
    }
}

#[test]
fn a_file_has_to_be_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("it's my.sqlite");
    std::fs::write(&path, "").unwrap();
    let config = Config::new(format!("sqlite://{}", path.display()));
    let db = SqliteConnection::db();
    assert_eq!(testing::drop_database(db, &config, None).unwrap_err().code(), "DS504");
    assert!(path.exists());
    testing::drop_database(db, &config, Some("it's my.sqlite")).unwrap();
    assert!(!path.exists());
    assert_eq!(testing::drop_database(db, &Config::new(":memory:"), Some(":memory:")).unwrap_err().code(), "DS101");
}
