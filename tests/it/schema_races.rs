//! `create_all` in many threads at once, and `drop_all` with a blocker.

use std::time::Duration;

use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource};
use diesel::mysql::Mysql;
use diesel::prelude::*;
use diesel_session::{Config, Database, ErrorKind};

use crate::fixtures::threads::{Process, answer_parent, child_of, together};
use crate::fixtures::{
    COUNT, INSERT, Provisioner, SessionExt, Step, Steps, TestConnection, TestDatabase, many_connections, step,
};
use crate::for_each_database;

const ROUNDS: usize = 20;

for_each_database!(every_database => create_all_in_eight_threads_applies_each_migration_once);
for_each_database!(Provisioner; postgres, mariadb, sqlite => create_all_in_four_processes_applies_each_migration_once);
for_each_database!(only mariadb => drop_all_on_mariadb_names_what_a_late_blocker_left);
for_each_database!(only postgres => create_all_runs_create_index_concurrently);

/// One applies, the others find nothing to do.
#[track_caller]
fn assert_one_applied(mut outcomes: Vec<Vec<String>>, versions: &[&str]) {
    outcomes.sort();
    let (last, others) = outcomes.split_last().expect("several");
    assert_eq!(last, versions);
    assert!(others.iter().all(Vec::is_empty), "{others:?}");
}

fn create_all_in_eight_threads_applies_each_migration_once<C: TestConnection>(test_db: &TestDatabase) {
    let _many = many_connections();
    let app = C::app(test_db.config());
    for round in 0..ROUNDS {
        let outcomes = together(8, |_| app.create_all().unwrap());
        assert_one_applied(outcomes, &["20260101000000"]);
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        session.commit().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), 1);
        session.rollback().unwrap();
        let dropped =
            if round % 2 == 0 { vec![app.drop_all().unwrap()] } else { together(4, |_| app.drop_all().unwrap()) };
        assert_one_applied([vec![Vec::new()], dropped].concat(), &["20260101000000"]);
    }
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
}

fn create_all_in_four_processes_applies_each_migration_once<C: TestConnection>(provisioner: &Provisioner) {
    if let Some(url) = child_of() {
        let app = C::app(Config::new(url).max_size(1));
        answer_parent(|_| format!("{:?}", app.create_all()));
        app.dispose().unwrap();
        return;
    }
    let test_db = (provisioner.create)();
    let app = C::app(test_db.config());
    let test = format!("schema_races::create_all_in_four_processes_applies_each_migration_once::{}", provisioner.name);
    let mut children: Vec<_> = (0..4).map(|_| Process::spawn(&test, &test_db.url())).collect();
    for _ in 0..ROUNDS {
        children.iter_mut().for_each(|child| child.order("create"));
        let mut answers: Vec<_> = children.iter_mut().map(Process::answer).collect();
        answers.sort();
        assert_eq!(answers, ["Ok([\"20260101000000\"])", "Ok([])", "Ok([])", "Ok([])"]);
        assert_eq!(app.drop_all().unwrap().len(), 1);
    }
}

/// A statement that waits for the end of every transaction that was there before it, pollers of the lock included.
fn create_all_runs_create_index_concurrently() {
    let _many = many_connections();
    let test_db = TestDatabase::postgres();
    let db = Database::<PgConnection, _>::new(Steps(vec![
        step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one"),
        step("2", "CREATE INDEX CONCURRENTLY one_id ON one (id)", "DROP INDEX CONCURRENTLY one_id")
            .outside_a_transaction(),
    ]));
    let app = db.init_app("index", test_db.config()).unwrap();
    for _ in 0..ROUNDS {
        let outcomes = together(8, |_| app.create_all().unwrap());
        assert_one_applied(outcomes, &["1", "2"]);
        assert_eq!(app.drop_all().unwrap(), ["2", "1"]);
    }
    app.dispose().unwrap();
}

/// Two tables; the way back of the second lets another session lock the first.
struct BlockedOnTheWay {
    url: String,
    step: Step,
}

impl Migration<Mysql> for BlockedOnTheWay {
    fn run(&self, conn: &mut dyn BoxableConnection<Mysql>) -> migration::Result<()> {
        Migration::<Mysql>::run(&self.step, conn)
    }

    fn revert(&self, conn: &mut dyn BoxableConnection<Mysql>) -> migration::Result<()> {
        Migration::<Mysql>::revert(&self.step, conn)?;
        // Asked beforehand whether there is a way back, it has no connection.
        if conn.downcast_mut::<MysqlConnection>().is_some() {
            let mut blocker = MysqlConnection::establish(&self.url)?;
            blocker.batch_execute("BEGIN")?;
            blocker.number("SELECT count(*) AS number FROM one")?;
            BLOCKER.with_borrow_mut(|slot| *slot = Some(blocker));
        }
        Ok(())
    }

    fn metadata(&self) -> &dyn MigrationMetadata {
        Migration::<Mysql>::metadata(&self.step)
    }

    fn name(&self) -> &dyn MigrationName {
        Migration::<Mysql>::name(&self.step)
    }
}

thread_local!(static BLOCKER: std::cell::RefCell<Option<MysqlConnection>> = const { std::cell::RefCell::new(None) });

struct TwoTables(String);

impl MigrationSource<Mysql> for TwoTables {
    fn migrations(&self) -> migration::Result<Vec<Box<dyn Migration<Mysql>>>> {
        let second = step("2", "CREATE TABLE two (id INTEGER)", "DROP TABLE two");
        Ok(vec![
            Box::new(step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one")),
            Box::new(BlockedOnTheWay { url: self.0.clone(), step: second }),
        ])
    }
}

fn drop_all_on_mariadb_names_what_a_late_blocker_left() {
    let test_db = TestDatabase::mariadb();
    let db = Database::<MysqlConnection, _>::new(TwoTables(test_db.url()));
    let app = db.init_app("late", test_db.config().lock_timeout(Duration::from_secs(1))).unwrap();
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    let error = app.drop_all().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockTimeout, "{error}");
    let left = error.to_string();
    assert!(left.contains("kept: 2"), "{error}");
    let applied: Vec<_> = app.migrations().unwrap().into_iter().map(|one| (one.version, one.applied)).collect();
    assert_eq!(applied, [("1".into(), true), ("2".into(), false)]);
    BLOCKER.with_borrow_mut(Option::take).expect("the way back was gone").batch_execute("ROLLBACK").unwrap();
    assert_eq!(app.drop_all().unwrap(), ["1"]);
    app.dispose().unwrap();
}

/// A writer that is not of this library.
#[test]
fn drop_all_on_sqlite_names_its_blocker() {
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config().lock_timeout(Duration::from_millis(300)));
    app.create_all().unwrap();
    let mut writer = SqliteConnection::establish(&test_db.url()).unwrap();
    writer.batch_execute("BEGIN IMMEDIATE").unwrap();
    let error = app.drop_all().unwrap_err();
    assert!(error.kind() == ErrorKind::LockTimeout && error.to_string().contains(": drop_all (at "), "{error}");
    let error = app.create_all().unwrap_err();
    assert!(error.kind() == ErrorKind::LockTimeout && error.to_string().contains(": create_all (at "), "{error}");
    writer.batch_execute("ROLLBACK").unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}
