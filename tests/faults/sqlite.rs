//! Many writers of one SQLite file: threads and processes.

use std::thread;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use diesel_session::{App, Config, Error};

use crate::fixtures::threads::{Process, answer_parent, child_of, together};
use crate::fixtures::{AnyConnection, COUNT, INSERT, SessionExt, TestConnection, TestDatabase};

/// Reads, then writes: what a transaction that only becomes a writer on the way is refused without waiting.
fn write<C: TestConnection>(app: &App<C>) -> Result<(), Error> {
    app.run(|| {
        let session = C::db().session()?;
        session.number(COUNT)?;
        session.send(INSERT)?;
        session.number(COUNT).map(drop)
    })
}

fn eight_writers<C: TestConnection>() {
    let test_db = TestDatabase::sqlite();
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    together(8, |_| (0..50).for_each(|_| write(&app).unwrap()));
    // Two pools on one file stand in the same queue.
    let other = C::app(test_db.config());
    together(8, |number| (0..50).for_each(|_| write(if number % 2 == 0 { &app } else { &other }).unwrap()));
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 2 * 8 * 50);
}

#[test]
fn eight_writers_in_one_process_commit_every_row() {
    eight_writers::<SqliteConnection>();
    eight_writers::<AnyConnection>();
}

#[test]
fn readers_beside_a_writer_see_committed_rows() {
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config());
    app.create_all().unwrap();
    let writer = app.open_session().unwrap();
    writer.send(INSERT).unwrap();
    let counts =
        together(4, |_| app.scope().read_only().run(|| SqliteConnection::db().session()?.number(COUNT)).unwrap());
    assert_eq!(counts, [0; 4], "they see what is committed");
    writer.commit().unwrap();
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
}

/// All files share their worker threads, so none of these may wait for a file.
#[test]
fn locked_file_delays_no_other_file() {
    let (locked, free) = (TestDatabase::sqlite(), TestDatabase::sqlite());
    let mut other_connection = SqliteConnection::establish(&locked.url()).unwrap();
    other_connection
        .batch_execute("PRAGMA journal_mode = DELETE; CREATE TABLE t (a INTEGER); BEGIN EXCLUSIVE")
        .unwrap();
    let waiting = SqliteConnection::app(locked.config().acquire_timeout(Duration::from_secs(2)));
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..8).map(|_| scope.spawn(|| waiting.ping())).collect();
        let neighbour = SqliteConnection::app(free.config());
        let mut pings = 0;
        while waiters.iter().any(|waiter| !waiter.is_finished()) {
            neighbour.ping().unwrap();
            neighbour.dispose().unwrap();
            pings += 1;
        }
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err();
            assert!(error.to_string().contains("is locked"), "{error}");
        }
        assert!(pings > 4, "{pings}");
    });
    other_connection.batch_execute("ROLLBACK").unwrap();
    waiting.ping().unwrap();
}

const PROCESSES: usize = 8;

/// So many processes that start to write at the same moment; what each answered.
fn at_once(test: &str, told: &str) -> Vec<String> {
    let mut children: Vec<_> = (0..PROCESSES).map(|_| Process::spawn(test, told)).collect();
    children.iter_mut().for_each(|child| child.order("write"));
    children.iter_mut().map(Process::answer).collect()
}

#[test]
fn eight_processes_commit_every_row() {
    if let Some(url) = child_of() {
        let app = SqliteConnection::app(Config::new(url));
        answer_parent(|_| {
            let outcomes = together(2, |_| (0..50).try_for_each(|_| write(&app)));
            format!("{:?}", outcomes.into_iter().collect::<Result<Vec<_>, _>>().map(|threads| threads.len()))
        });
        return;
    }
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config());
    app.create_all().unwrap();
    let answers = at_once("sqlite::eight_processes_commit_every_row", &test_db.url());
    assert_eq!(answers, ["Ok(2)"; PROCESSES]);
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), (PROCESSES * 2 * 50) as i64);
}

/// A file that is not there yet: all of them make it, switch it to a write-ahead log and create the schema.
#[test]
fn eight_processes_create_the_schema_of_a_fresh_file() {
    if let Some(url) = child_of() {
        answer_parent(|_| {
            let app = SqliteConnection::app(Config::new(&url));
            let outcome = app.create_all().and_then(|_| (0..10).try_for_each(|_| write(&app)));
            format!("{outcome:?}")
        });
        return;
    }
    for _ in 0..3 {
        let test_db = TestDatabase::sqlite();
        let answers = at_once("sqlite::eight_processes_create_the_schema_of_a_fresh_file", &test_db.url());
        assert_eq!(answers, ["Ok(())"; PROCESSES]);
        let app = SqliteConnection::app(test_db.config());
        let session = app.open_session().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), (PROCESSES * 10) as i64);
    }
}

/// Plain r2d2 and Diesel with the same work, without a busy timeout, as that is their default.
#[test]
fn plain_r2d2_processes_fail_with_database_is_locked() {
    if let Some(url) = child_of() {
        let pool = Pool::builder().max_size(2).build(ConnectionManager::<SqliteConnection>::new(url)).unwrap();
        let one = || {
            pool.get().unwrap().immediate_transaction(|conn| {
                conn.number(COUNT)?;
                conn.batch_execute(INSERT)?;
                conn.number(COUNT)
            })
        };
        answer_parent(|_| {
            let outcomes =
                together(2, |_| (0..50).filter_map(|_| one().err()).map(|error| error.to_string()).collect());
            let errors: Vec<String> = outcomes.into_iter().flat_map(|errors: Vec<String>| errors).collect();
            assert!(errors.iter().all(|error| error.contains("database is locked")), "{errors:?}");
            errors.len().to_string()
        });
        return;
    }
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config());
    app.create_all().unwrap();
    app.dispose().unwrap();
    let answers = at_once("sqlite::plain_r2d2_processes_fail_with_database_is_locked", &test_db.url());
    let locked: usize = answers.iter().map(|errors| errors.parse::<usize>().unwrap()).sum();
    // Most of the 800, where several processes run at a time.
    assert!(locked > 0);
}
