//! `#[diesel_session::test]`, as a program uses it.

use diesel::SqliteConnection;
use diesel_session::{App, Config, Database, Result, Session};

use crate::fixtures::{COUNT, INSERT, SessionExt};

static DB: Database<SqliteConnection> = Database::new(crate::fixtures::SQLITE);

fn a_row(session: &Session<SqliteConnection>) -> Result<()> {
    session.send(INSERT)
}

#[diesel_session::test(DB, config = Config::new(":memory:"))]
fn test_attribute_accepts_a_body_without_a_result(app: App<SqliteConnection>) {
    let session = DB.session().unwrap();
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
    assert!(app.id().ends_with("attribute::test_attribute_accepts_a_body_without_a_result"), "{}", app.id());
    assert_eq!(DB.current_app().unwrap().id(), app.id());
}

#[diesel_session::test(DB, config = Config::new(":memory:"), isolation = Rollback, fixture = a_row, fixtures("rows.sql"))]
fn test_attribute_accepts_a_body_with_a_result() -> Result<()> {
    assert_eq!(DB.session()?.number(COUNT)?, 3);
    DB.session()?.commit()
}

#[diesel_session::test(DB, config = Config::new("a.sqlite"), max_size = 1)]
fn test_attribute_sets_max_size(app: App<SqliteConnection>) -> std::result::Result<(), Box<dyn std::error::Error>> {
    assert_eq!(app.status().max_size, 1);
    Ok(())
}

#[diesel_session::test(DB, config = Config::new(":memory:"))]
#[should_panic(expected = "on purpose")]
fn test_attribute_passes_on_a_panic() {
    DB.session().unwrap().send(INSERT).unwrap();
    panic!("on purpose");
}

#[diesel_session::test(DB, config = Config::new(":memory:"), isolation = diesel_session::testing::TestIsolation::Schema)]
#[should_panic(expected = "SQLite has no schemas")]
fn test_attribute_refuses_schemas_on_sqlite() {}
