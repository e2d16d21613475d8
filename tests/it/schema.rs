//! `create_all`, `drop_all` and `migrations`, one caller at a time; `schema_races` has the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diesel::backend::Backend;
use diesel::migration::{self, Migration, MigrationSource};
use diesel::prelude::*;
use diesel_migrations::FileBasedMigrations;
use diesel_session::{App, Config, Database, ErrorKind};

use crate::fixtures::{
    AnyConnection, COUNT, INSERT, SessionExt, Step, Steps, TestConnection, TestDatabase, step, unique,
};
use crate::for_each_database;

for_each_database!(every_database =>
    create_all_and_drop_all_change_and_report_the_schema,
    drop_all_refuses_irreversible_migrations,
    schema_operations_are_refused_inside_a_transaction,
    panic_in_a_migration_is_a_migration_error,
    failing_migration_source_is_invalid_config,
    migrations_from_files_are_applied_and_reverted,
);
for_each_database!(every_server => drop_all_names_its_blocker);
for_each_database!(postgres, sqlite, any_sqlite => failed_migration_leaves_nothing);
for_each_database!(only mariadb => failed_migration_on_mariadb_names_its_leftovers);
for_each_database!(only postgres =>
    failed_migration_without_transaction_on_postgres_names_its_leftovers,
    schema_change_leaves_no_connection_with_old_plans_or_types,
);

/// An application with migrations of the test's own. `connect_with` as the shared database object of `C` has it.
fn own<C: TestConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static>(
    migrations: M,
    config: Config,
) -> (Database<C, M>, App<C>) {
    let db = Database::new(migrations);
    let db = if let Some(connect) = connect_any_as::<C>() { db.connect_with(connect) } else { db };
    let app = db.init_app(unique("schema"), config).unwrap();
    (db, app)
}

type Connect<C> = fn(&str) -> diesel::result::ConnectionResult<C>;

/// `connect_any`, where `C` is the enum.
fn connect_any_as<C: 'static>() -> Option<Connect<C>> {
    let connect: Connect<AnyConnection> = crate::fixtures::connect_any;
    (&connect as &dyn std::any::Any).downcast_ref::<Connect<C>>().copied()
}

fn exists<C: TestConnection>(app: &App<C>, table: &str) -> bool {
    app.open_session().unwrap().number(&format!("SELECT count(*) AS number FROM {table}")).is_ok()
}

fn tables() -> Vec<Step> {
    vec![
        step("1", "CREATE TABLE one (id INTEGER PRIMARY KEY)", "DROP TABLE one"),
        step("2", "CREATE TABLE two (id INTEGER PRIMARY KEY)", "DROP TABLE two"),
    ]
}

fn create_all_and_drop_all_change_and_report_the_schema<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    let statuses =
        |app: &App<C>| app.migrations().unwrap().iter().map(|one| (one.applied, one.known)).collect::<Vec<_>>();
    assert_eq!(app.drop_all().unwrap(), Vec::<String>::new(), "there is nothing in an empty database");
    assert_eq!(statuses(&app), [(false, true)]);
    assert!(!exists(&app, "__diesel_schema_migrations"), "asking changes nothing");

    let created = app.create_all().unwrap();
    assert_eq!(created, ["20260101000000"]);
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    assert_eq!(statuses(&app), [(true, true)]);
    assert_eq!(app.migrations().unwrap()[0].version, created[0]);
    assert!(app.migrations().unwrap()[0].name.ends_with("_create_entries"));

    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert_eq!(app.drop_all().unwrap(), created);
    assert!(!exists(&app, "entries"));
    assert!(!exists(&app, "__diesel_schema_migrations"));
    assert_eq!(app.drop_all().unwrap(), Vec::<String>::new());

    assert_eq!(app.context(|| C::db().create_all()).unwrap(), created);
    assert_eq!(session.number(COUNT).unwrap(), 0);
    session.rollback().unwrap();
    assert_eq!(app.context(|| C::db().drop_all()).unwrap(), created);
    assert_eq!(app.status().in_use, 0);
}

fn drop_all_refuses_irreversible_migrations<C: TestConnection>(test_db: &TestDatabase) {
    let mut steps = tables();
    steps.insert(1, step("15", "CREATE TABLE between_them (id INTEGER)", "").irreversible());
    let (_db, app) = own::<C, _>(Steps(steps.clone()), test_db.config());
    // Versions are texts: "15" comes before "2".
    assert_eq!(app.create_all().unwrap(), ["1", "15", "2"]);
    let error = app.drop_all().unwrap_err();
    assert_eq!(error.irreversible_migrations().expect("some").collect::<Vec<_>>(), ["15_step"]);
    assert!(exists(&app, "two") && exists(&app, "one"), "nothing was reverted");

    // Another program that knows nothing of the one in between.
    let (_other_db, other) = own::<C, _>(Steps(tables()), test_db.config());
    let error = other.drop_all().unwrap_err();
    assert_eq!(error.irreversible_migrations().expect("some").collect::<Vec<_>>(), ["15"]);
    assert!(error.to_string().contains("15"), "{error}");
    let known: Vec<_> =
        other.migrations().unwrap().into_iter().map(|one| (one.version, one.applied, one.known)).collect();
    assert_eq!(known, [("1".into(), true, true), ("15".into(), true, false), ("2".into(), true, true)]);
    assert!(exists(&other, "two") && exists(&other, "one"));
    assert_eq!(other.create_all().unwrap(), Vec::<String>::new());

    // With a way back for all three it works.
    steps[1].down = Some("DROP TABLE between_them".into());
    let (_whole_db, whole) = own::<C, _>(Steps(steps), test_db.config());
    assert_eq!(whole.drop_all().unwrap(), ["2", "15", "1"]);
    for app in [&app, &other, &whole] {
        app.dispose().unwrap();
    }
}

fn schema_operations_are_refused_inside_a_transaction<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let outer = app.open_session().unwrap();
    let line = line!() + 1;
    outer.send(INSERT).unwrap();
    let refusals = [app.create_all(), app.drop_all(), app.context(|| app.drop_all())];
    for (refusal, operation) in refusals.into_iter().zip(["create_all", "drop_all", "drop_all"]) {
        let error = refusal.unwrap_err();
        assert!(
            error.kind() == ErrorKind::TransactionOpen
                && error.to_string().contains(operation)
                && error.holders().expect("holders").len() == 1,
            "{error}"
        );
        assert!(error.to_string().contains(&format!("{}:{line}:", file!())), "{error}");
    }
    // It is this thread's that are refused: the session itself goes on.
    outer.commit().unwrap();
    assert_eq!(outer.number(COUNT).unwrap(), 1);
    outer.remove().unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}

fn panic_in_a_migration_is_a_migration_error<C: TestConnection>(test_db: &TestDatabase) {
    let mut steps = tables();
    steps[1].up = "panic".into();
    let (_db, app) = own::<C, _>(Steps(steps), test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!((failure.migration.as_str(), &failure.done), ("2_step", &vec!["1".to_owned()]));
    assert!(failure.message.contains("a panic was asked for"), "{error}");
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
    let (_mended_db, mended) = own::<C, _>(Steps(tables()), test_db.config());
    assert_eq!(mended.create_all().unwrap(), ["2"], "the lock is free, and only the second is missing");
    app.dispose().unwrap();
    mended.dispose().unwrap();
}

/// Fails, then panics, then has nothing.
struct Moody(std::sync::atomic::AtomicUsize);

impl<DB: Backend> MigrationSource<DB> for Moody {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<DB>>>> {
        match self.0.fetch_add(1, Ordering::Relaxed) {
            0 => Err("the shelf is empty".into()),
            1 => panic!("the shelf fell down"),
            _ => Ok(Vec::new()),
        }
    }
}

fn failing_migration_source_is_invalid_config<C: TestConnection>(test_db: &TestDatabase) {
    let (_db, app) = own::<C, _>(Moody(0.into()), test_db.config());
    for told in ["the shelf is empty", "the shelf fell down"] {
        let error = app.create_all().unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(told), "{error}");
    }
    assert_eq!(app.status().open, 0, "no connection was needed to find out");
    assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
    app.dispose().unwrap();
}

fn migrations_from_files_are_applied_and_reverted<C: TestConnection>(test_db: &TestDatabase) {
    let folder = tempfile::tempdir().unwrap();
    for (name, up, down) in [
        ("2026-01-01-000000_authors", "CREATE TABLE authors (id INTEGER PRIMARY KEY);", "DROP TABLE authors;"),
        ("2026-01-02-000000_books", "CREATE TABLE books (id INTEGER PRIMARY KEY);", "DROP TABLE books;"),
    ] {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("up.sql"), up).unwrap();
        std::fs::write(folder.join("down.sql"), down).unwrap();
    }
    std::fs::write(folder.path().join("2026-01-02-000000_books/metadata.toml"), "run_in_transaction = false\n")
        .unwrap();
    let (_db, app) = own::<C, _>(FileBasedMigrations::from_path(folder.path()).unwrap(), test_db.config());
    assert_eq!(app.create_all().unwrap(), ["20260101000000", "20260102000000"]);
    assert!(exists(&app, "books"));
    std::fs::remove_file(folder.path().join("2026-01-01-000000_authors/down.sql")).unwrap();
    let error = app.drop_all().unwrap_err();
    assert!(error.irreversible_migrations().is_some_and(|versions| versions.count() == 1), "{error}");
    assert!(exists(&app, "books"));
    std::fs::write(folder.path().join("2026-01-01-000000_authors/down.sql"), "DROP TABLE authors;").unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 2);
    app.dispose().unwrap();
}

/// A migration whose third statement fails.
fn broken(in_transaction: bool) -> Vec<Step> {
    let up = "CREATE TABLE broken (id INTEGER PRIMARY KEY); INSERT INTO one (id) VALUES (7); INSERT INTO nowhere (id) VALUES (1)";
    let mut steps = tables();
    steps.insert(1, step("15", up, "DROP TABLE broken"));
    steps[1].in_transaction = in_transaction;
    steps
}

fn failed_migration_leaves_nothing<C: TestConnection>(test_db: &TestDatabase) {
    let (_db, app) = own::<C, _>(Steps(broken(true)), test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!((failure.operation, failure.migration.as_str()), ("create_all", "15_step"));
    assert_eq!((&failure.done, &failure.left_behind), (&vec!["1".to_owned()], &Vec::new()));
    assert!(failure.message.contains("nowhere"), "{error}");
    assert!(error.to_string().contains("Nothing of it remains"), "{error}");
    assert!(exists(&app, "one") && !exists(&app, "broken") && !exists(&app, "two"));
    assert_eq!(app.open_session().unwrap().number("SELECT count(*) AS number FROM one").unwrap(), 0);
    assert_eq!(app.migrations().unwrap().iter().filter(|one| one.applied).count(), 1);
    let (_mended_db, mended) = own::<C, _>(Steps(tables()), test_db.config());
    assert_eq!(mended.create_all().unwrap(), ["2"]);
    assert_eq!(mended.drop_all().unwrap(), ["2", "1"]);
    app.dispose().unwrap();
    mended.dispose().unwrap();
}

fn failed_migration_on_mariadb_names_its_leftovers() {
    let test_db = TestDatabase::mariadb();
    let (_db, app) = own::<MysqlConnection, _>(Steps(broken(true)), test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!(failure.left_behind, ["+broken.id"]);
    let text = error.to_string();
    for part in
        ["15_step", "nowhere", "doesn't exist", "+broken.id", "Undo that by hand", "Done before it, and kept: 1"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let again = app.create_all().unwrap_err().to_string();
    assert!(again.contains("already exists") && again.contains("Nothing of it remains"), "{again}");
    app.dispose().unwrap();
}

/// Outside of a transaction a failed `CREATE INDEX CONCURRENTLY` leaves an index that is not valid.
fn failed_migration_without_transaction_on_postgres_names_its_leftovers() {
    let test_db = TestDatabase::postgres();
    let steps = vec![
        step("1", "CREATE TABLE one (id INTEGER); INSERT INTO one VALUES (1), (1)", "DROP TABLE one"),
        step("2", "CREATE UNIQUE INDEX CONCURRENTLY one_id ON one (id)", "DROP INDEX one_id").outside_a_transaction(),
    ];
    let (_db, app) = own::<PgConnection, _>(Steps(steps), test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!(
        (failure.left_behind.as_slice(), failure.migration.as_str()),
        (&["+one.one_id".to_owned()][..], "2_step")
    );
    assert!(!error.to_string().contains("Nothing of it remains"), "{error}");
    app.dispose().unwrap();
}

#[test]
fn failed_migration_without_transaction_on_sqlite_names_its_leftovers() {
    let test_db = TestDatabase::sqlite();
    let (_db, app) = own::<SqliteConnection, _>(Steps(broken(false)), test_db.config());
    let error = app.create_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Migration, "{error}");
    let failure = error.migration_failure().expect("a failure");
    assert_eq!(failure.left_behind, ["+broken.id"], "{error}");
    app.dispose().unwrap();
}

/// A column whose type is another one after every `drop_all`.
struct Changing(Arc<AtomicBool>);

impl<DB: Backend> MigrationSource<DB> for Changing {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<DB>>>> {
        let kind = if self.0.load(Ordering::Relaxed) { "VARCHAR(20)" } else { "TEXT" };
        let up = format!("CREATE TYPE mood AS ENUM ('good'); CREATE TABLE pages (id INTEGER, title {kind}, mood mood)");
        Ok(vec![Box::new(step("1", up, "DROP TABLE pages; DROP TYPE mood"))])
    }
}

diesel::table! { pages (id) { id -> Integer, title -> Text, mood -> crate::schema::MoodType, } }

#[derive(diesel::sql_types::SqlType, diesel::query_builder::QueryId, Debug)]
#[diesel(postgres_type(name = "mood"))]
pub struct MoodType;

#[derive(Debug, diesel::expression::AsExpression)]
#[diesel(sql_type = MoodType)]
struct Good;

impl diesel::serialize::ToSql<MoodType, diesel::pg::Pg> for Good {
    fn to_sql<'b>(&'b self, out: &mut diesel::serialize::Output<'b, '_, diesel::pg::Pg>) -> diesel::serialize::Result {
        std::io::Write::write_all(out, b"good")?;
        Ok(diesel::serialize::IsNull::No)
    }
}

fn schema_change_leaves_no_connection_with_old_plans_or_types() {
    let test_db = TestDatabase::postgres();
    let toggle = Arc::new(AtomicBool::new(false));
    let (_db, app) = own::<PgConnection, _>(Changing(Arc::clone(&toggle)), test_db.config().max_size(4));
    let titles = || pages::table.filter(pages::mood.eq(Good)).select(pages::title);
    let insert =
        || diesel::insert_into(pages::table).values((pages::id.eq(1), pages::title.eq("A"), pages::mood.eq(Good)));
    app.create_all().unwrap();

    let mut plain = PgConnection::establish(&test_db.url()).unwrap();
    insert().execute(&mut plain).unwrap();
    assert_eq!(titles().load::<String>(&mut plain).unwrap(), ["A"]);
    let sessions: Vec<_> = (0..4).map(|_| app.open_session().unwrap()).collect();
    let ask_all = || {
        sessions.iter().for_each(|session| session.begin().unwrap());
        for session in &sessions {
            assert_eq!(session.load::<String>(titles()).unwrap(), ["A"]);
        }
        sessions.iter().for_each(|session| session.commit().unwrap());
    };
    ask_all();
    assert_eq!(app.status().idle, 4);

    for other in [true, false] {
        toggle.store(other, Ordering::Relaxed);
        app.drop_all().unwrap();
        app.create_all().unwrap();
        sessions[0].execute(insert()).unwrap();
        sessions[0].commit().unwrap();
        ask_all();
    }
    // The control: a connection outside of the pools fails after the change.
    toggle.store(true, Ordering::Relaxed);
    titles().load::<String>(&mut plain).unwrap_err();
    let error = insert().execute(&mut plain).unwrap_err().to_string();
    assert!(error.contains("cache lookup failed") || error.contains("cached plan"), "{error}");
    drop((sessions, plain));
    app.dispose().unwrap();
}

fn drop_all_names_its_blocker<C: TestConnection>(test_db: &TestDatabase) {
    let (_db, app) = own::<C, _>(Steps(tables()), test_db.config().lock_timeout(Duration::from_secs(1)));
    app.create_all().unwrap();
    let blocker = C::app(test_db.config());
    let blocking = blocker.open_session().unwrap();
    assert_eq!(blocking.number("SELECT count(*) AS number FROM one").unwrap(), 0);
    let started = Instant::now();
    let error = app.drop_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    for told in ["drop_all (at ", "The schema is as it was."] {
        assert!(error.to_string().contains(told), "{error}");
    }
    assert!(started.elapsed() >= Duration::from_millis(900), "{error}");
    assert!(error.is_timeout());
    assert!(exists(&app, "one") && exists(&app, "two"));
    assert!(app.migrations().unwrap().iter().all(|one| one.applied));
    blocking.rollback().unwrap();
    assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    app.dispose().unwrap();
}
