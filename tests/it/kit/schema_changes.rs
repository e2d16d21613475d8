//! Tests that are rolled back and change the schema.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use super::*;

for_each_database!(ServerUrl; postgres, sqlite, any_postgres => schema_change_in_a_rolled_back_test_is_undone);
for_each_database!(ServerUrl; postgres, sqlite => commit_in_a_rolled_back_test_checks_deferred_constraints);
for_each_database!(only mariadb => implicit_commit_of_mariadb_fails_the_test_by_name);
for_each_database!(only postgres => raw_begin_in_a_rolled_back_test_is_refused);

fn rollback<C: TestConnection>(url: &str) -> TestApp<C> {
    begin(&(Config::new(url), TestIsolation::Rollback))
}

fn schema_change_in_a_rolled_back_test_is_undone<C: TestConnection>(url: &str) {
    for _ in 0..2 {
        let test = rollback::<C>(url);
        test.context(|| {
            let session = C::db().session()?;
            assert!(session.number("SELECT count(*) AS number FROM extra").is_err(), "it is not there yet");
            session.rollback()?;
            session.send("CREATE TABLE extra (a INTEGER); INSERT INTO extra VALUES (1)")?;
            session.send(INSERT)?;
            session.commit()?;
            assert_eq!(session.number("SELECT count(*) AS number FROM extra")?, 1);
            session.rollback()
        })
        .unwrap();
        assert_eq!(committed(&test), 1);
        let reverted = test.drop_all().unwrap();
        assert!(!reverted.is_empty());
        assert!(test.open_session().unwrap().number(COUNT).is_err());
        assert_eq!(test.create_all().unwrap().len(), reverted.len());
        assert_eq!(committed(&test), 0);
        test.finish().unwrap();
    }
    let test = rollback::<C>(url);
    assert_eq!(committed(&test), 0);
    assert!(test.migrations().unwrap().iter().all(|migration| migration.applied));
    test.finish().unwrap();
}

/// Two tables with a foreign key that the commit checks.
const DEFERRED: &str = "
    CREATE TABLE parents (id INTEGER PRIMARY KEY);
    CREATE TABLE children (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED);";

fn commit_in_a_rolled_back_test_checks_deferred_constraints<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    let session = test.open_session().unwrap();
    session.send(DEFERRED).unwrap();
    session.commit().unwrap();
    session.send("INSERT INTO children VALUES (1, 7)").unwrap();
    let refused = session.commit().unwrap_err();
    assert!(refused.is_foreign_key_violation(), "{refused:#}");
    session.send("INSERT INTO children VALUES (1, 7)").unwrap();
    session.send("INSERT INTO parents VALUES (7)").unwrap();
    session.commit().unwrap();
    assert_eq!(session.number("SELECT count(*) AS number FROM children").unwrap(), 1);
    drop(session);
    test.finish().unwrap();
}

fn implicit_commit_of_mariadb_fails_the_test_by_name() {
    let url = support::mariadb().url();
    type Change = fn(&TestApp<MysqlConnection>);
    let changes: [(&str, Change); 3] = [
        ("CREATE", |test| drop(test.open_session().unwrap().send("CREATE TABLE extra (a INTEGER)"))),
        ("ALTER", |test| {
            let session = test.open_session().unwrap();
            let _ = session.with(|conn| {
                conn.batch_execute("ALTER TABLE entries ADD COLUMN more INTEGER")?;
                diesel::sql_query("SELECT 1").execute(conn)
            });
        }),
        ("drop_all", |test| assert_eq!(test.drop_all().unwrap_err().code(), "DS501")),
    ];
    for (word, change) in changes {
        let test = rollback::<MysqlConnection>(&url);
        test.run(|| MysqlConnection::db().session()?.send(INSERT)).unwrap();
        change(&test);
        let error = test.finish().unwrap_err();
        assert_eq!(error.code(), "DS501", "{error}");
        assert!(error.to_string().contains(word), "{word}: {error}");
        let next = rollback::<MysqlConnection>(&url);
        assert_eq!(committed(&next), 0, "after {word}");
        assert!(next.open_session().unwrap().number("SELECT count(*) AS number FROM extra").is_err());
        next.finish().unwrap();
    }
}

fn raw_begin_in_a_rolled_back_test_is_refused() {
    let test = rollback::<PgConnection>(&support::postgres().url());
    let session = test.open_session().unwrap();
    let refused = session.with(|conn| conn.build_transaction().serializable().run(|_| Ok(())));
    let refused = refused.unwrap_err();
    assert!(matches!(refused.database_error(), Some(diesel::result::Error::AlreadyInTransaction)), "{refused}");
    assert_eq!(session.number(COUNT).unwrap(), 0);
    drop(session);
    test.finish().unwrap();
}

#[test]
fn transaction_that_sqlite_ends_fails_the_test_by_name() {
    let test = rollback::<SqliteConnection>(":memory:");
    let session = test.open_session().unwrap();
    session.send("CREATE UNIQUE INDEX one ON entries (author)").unwrap();
    session.commit().unwrap();
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert!(session.send("INSERT OR ROLLBACK INTO entries (author, message) VALUES ('Ada', 'hello')").is_err());
    drop(session);
    let error = test.finish().unwrap_err();
    assert_eq!(error.code(), "DS501", "{error}");
}
