//! A server with unusual settings.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::{Config, Entity, Error};

use crate::fixtures::{AnyConnection, INSERT, SessionExt, TestConnection, connect_any, unique};
use crate::for_each_database;
use crate::support::Mariadb;

for_each_database!(only mariadb =>
    mariadb_server_with_other_defaults_stores_what_was_committed,
    statements_with_many_keys_fit_into_what_a_mariadb_server_takes,
    connection_to_a_mariadb_replica_is_replaced_once_a_write_is_refused,
);

const OTHERWISE: &str = "SET GLOBAL autocommit = 0; SET GLOBAL completion_type = 1; SET GLOBAL foreign_key_checks = 0; \
     SET GLOBAL unique_checks = 0; SET GLOBAL sql_auto_is_null = 1; SET GLOBAL sql_select_limit = 1";

fn count(url: &str) -> i64 {
    let mut plain = connect_any(url).unwrap();
    plain.batch_execute("SET autocommit = 1").unwrap();
    plain.number("SELECT count(*) AS number FROM entries").unwrap()
}

fn stores<C: TestConnection>(url: &str, config: Config) -> Result<(), Error> {
    let db = C::new_db();
    let app = db.init_app(unique("app"), config)?;
    app.create_all()?;
    let before = count(url);
    app.scope().autocommit().run(|| db.session()?.send(INSERT))?;
    assert_eq!(count(url), before + 1, "an autocommit scope");
    app.scope().autocommit().run(|| {
        let session = db.session()?;
        session.send(INSERT)?;
        assert_eq!(count(url), before + 2, "each statement by itself");
        Ok::<(), Error>(())
    })?;
    app.run(|| db.session()?.send(INSERT))?;
    assert_eq!(count(url), before + 3, "a transaction");
    app.context(|| db.session()?.send(INSERT))?;
    assert_eq!(count(url), before + 3, "what is not committed is rolled back");
    app.run(|| {
        let session = db.session()?;
        session.send(
            "CREATE TEMPORARY TABLE two (id INT AUTO_INCREMENT PRIMARY KEY); INSERT INTO two VALUES (NULL), (NULL)",
        )?;
        assert_eq!(session.number("SELECT count(*) AS number FROM two WHERE id IS NULL")?, 0, "sql_auto_is_null");
        let settings = "SELECT @@autocommit + 10 * @@foreign_key_checks + 100 * @@unique_checks AS number";
        assert_eq!(session.number(settings)?, 111);
        Ok::<(), Error>(())
    })?;
    db.dispose_all()?;
    Ok(())
}

fn mariadb_server_with_other_defaults_stores_what_was_committed() {
    let server = Mariadb::start();
    server.admin().batch_execute(OTHERWISE).unwrap();
    let url = server.url();
    stores::<MysqlConnection>(&url, Config::new(&url)).unwrap();
    stores::<AnyConnection>(&url, Config::new(&url)).unwrap();
    // Not even the program's own statement on a new connection takes that away.
    stores::<MysqlConnection>(&url, Config::new(&url).connection_init_sql("SET autocommit = 0")).unwrap();
}

diesel::table! { names (name) { name -> Text, } }

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(name))]
#[entity(new = NewName)]
pub struct Name {
    name: String,
}

fn statements_with_many_keys_fit_into_what_a_mariadb_server_takes() {
    let server = Mariadb::start();
    server.admin().batch_execute("SET GLOBAL max_allowed_packet = 65536").unwrap();
    let url = server.url();
    let db = MysqlConnection::new_db();
    let app = db.init_app(unique("app"), Config::new(&url)).unwrap();
    let keys: Vec<String> = (0..400).map(|n| format!("{n}{}", "x".repeat(700))).collect();
    let table = "CREATE TABLE names (name VARCHAR(710) NOT NULL PRIMARY KEY) CHARACTER SET latin1";
    connect_any(&url).unwrap().batch_execute(table).unwrap();
    app.context(|| {
        let session = db.session()?;
        keys.iter().try_for_each(|name| session.add(NewName { name: name.clone() }).map(drop))?;
        session.commit()?;
        session.expunge_all();
        let found = session.get_many::<Name>(keys.clone())?;
        assert!(found.iter().zip(&keys).all(|(row, key)| row.as_ref().is_some_and(|row| row.read().name == *key)));
        found.iter().flatten().try_for_each(|row| session.delete(row))?;
        session.commit()?;
        assert_eq!(session.number("SELECT count(*) AS number FROM names")?, 0);
        Ok::<(), Error>(())
    })
    .unwrap();
    db.dispose_all().unwrap();
}

/// A primary that became a replica, and is one no longer.
fn connection_to_a_mariadb_replica_is_replaced_once_a_write_is_refused() {
    let server = Mariadb::start();
    let url = server.url();
    let db = MysqlConnection::new_db();
    let app = db.init_app(unique("app"), Config::new(&url).max_size(1)).unwrap();
    app.create_all().unwrap();
    let session = app.open_session().unwrap();
    let number = || app.context(|| db.session()?.number("SELECT CONNECTION_ID() AS number")).unwrap();
    let before = number();
    assert_eq!(number(), before);
    server.admin().batch_execute("SET GLOBAL read_only = 1").unwrap();
    let refused = session.send(INSERT).unwrap_err();
    assert!(refused.is_transient(), "{refused}");
    session.rollback().unwrap();
    assert_ne!(number(), before);
    let attempts = std::cell::Cell::new(0);
    session
        .retry(3, |session| {
            attempts.set(attempts.get() + 1);
            if attempts.get() == 2 {
                server.admin().batch_execute("SET GLOBAL read_only = 0").unwrap();
            }
            session.send(INSERT)
        })
        .unwrap();
    assert_eq!((attempts.get(), count(&url)), (2, 1));
    db.dispose_all().unwrap();
}
