//! `create_all` by many at once, and `drop_all` with somebody in the way.

use std::time::Duration;

use diesel::connection::{BoxableConnection, SimpleConnection};
use diesel::migration::{self, Migration, MigrationMetadata, MigrationName, MigrationSource};
use diesel::mysql::Mysql;
use diesel::prelude::*;
use diesel_session::{Config, Database, Error};

use crate::fixtures::threads::{Process, answer_parent, child_of, together};
use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, Step, Steps, many_connections, step};
use crate::on_every_database;
use crate::support::{Kind, enabled};

const ROUNDS: usize = 20;

on_every_database!(eight_threads_create);

/// One applies, the others find nothing to do.
#[track_caller]
fn assert_one_applied(mut outcomes: Vec<Vec<String>>, versions: &[&str]) {
    outcomes.sort();
    let (last, others) = outcomes.split_last().expect("several");
    assert_eq!(last, versions);
    assert!(others.iter().all(Vec::is_empty), "{others:?}");
}

fn eight_threads_create<C: Conn>(site: &Site) {
    let _many = many_connections();
    let app = C::app(site.config());
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

fn four_processes_create<C: Conn>(test: &str, site: impl FnOnce() -> Site) {
    if let Some(url) = child_of() {
        let app = C::app(Config::new(url).max_size(1));
        answer_parent(|_| format!("{:?}", app.create_all()));
        app.dispose().unwrap();
        return;
    }
    let site = site();
    let app = C::app(site.config());
    let mut children: Vec<_> = (0..4).map(|_| Process::spawn(test, &site.url())).collect();
    for _ in 0..ROUNDS {
        children.iter_mut().for_each(|child| child.order("create"));
        let mut answers: Vec<_> = children.iter_mut().map(Process::answer).collect();
        answers.sort();
        assert_eq!(answers, ["Ok([\"20260101000000\"])", "Ok([])", "Ok([])", "Ok([])"]);
        assert_eq!(app.drop_all().unwrap().len(), 1);
    }
}

mod four_processes_create {
    use super::*;

    #[test]
    fn postgres() {
        if enabled(Kind::Postgres) {
            super::four_processes_create::<PgConnection>(
                "schema_races::four_processes_create::postgres",
                Site::postgres,
            );
        }
    }

    #[test]
    fn mysql() {
        if enabled(Kind::Mysql) {
            super::four_processes_create::<MysqlConnection>("schema_races::four_processes_create::mysql", Site::mysql);
        }
    }

    #[test]
    fn sqlite() {
        super::four_processes_create::<SqliteConnection>("schema_races::four_processes_create::sqlite", Site::sqlite);
    }
}

/// A statement that waits for the end of every transaction that was there before it, pollers of the lock included.
#[test]
fn an_index_is_created_concurrently() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let _many = many_connections();
    let site = Site::postgres();
    let db = Database::<PgConnection, _>::new(Steps(vec![
        step("1", "CREATE TABLE one (id INTEGER)", "DROP TABLE one"),
        step("2", "CREATE INDEX CONCURRENTLY one_id ON one (id)", "DROP INDEX CONCURRENTLY one_id")
            .outside_a_transaction(),
    ]));
    let app = db.init_app("index", site.config()).unwrap();
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

#[test]
fn mysql_says_what_a_late_blocker_left() {
    if !enabled(Kind::Mysql) {
        return;
    }
    let site = Site::mysql();
    let db = Database::<MysqlConnection, _>::new(TwoTables(site.url()));
    let app = db.init_app("late", site.config().lock_timeout(Duration::from_secs(1))).unwrap();
    assert_eq!(app.create_all().unwrap(), ["1", "2"]);
    let error = app.drop_all().unwrap_err();
    let Error::LockTimeout { left, .. } = &error else { panic!("{error}") };
    assert!(left.contains("kept: 2"), "{error}");
    let applied: Vec<_> = app.migrations().unwrap().into_iter().map(|one| (one.version, one.applied)).collect();
    assert_eq!(applied, [("1".into(), true), ("2".into(), false)]);
    BLOCKER.with_borrow_mut(Option::take).expect("the way back was gone").batch_execute("ROLLBACK").unwrap();
    assert_eq!(app.drop_all().unwrap(), ["1"]);
    app.dispose().unwrap();
}

/// A writer that is not of this library.
#[test]
fn sqlite_names_who_is_in_the_way() {
    let site = Site::sqlite();
    let app = SqliteConnection::app(site.config().lock_timeout(Duration::from_millis(300)));
    app.create_all().unwrap();
    let mut writer = SqliteConnection::establish(&site.url()).unwrap();
    writer.batch_execute("BEGIN IMMEDIATE").unwrap();
    let error = app.drop_all().unwrap_err();
    assert!(matches!(&error, Error::LockTimeout { operation: "drop_all", .. }), "{error}");
    let error = app.create_all().unwrap_err();
    assert!(matches!(&error, Error::LockTimeout { operation: "create_all", .. }), "{error}");
    writer.batch_execute("ROLLBACK").unwrap();
    assert_eq!(app.drop_all().unwrap().len(), 1);
}
