//! Many visitors at one time, and what is left of them on the server.

use std::io::{self, Write};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::sql_types::Integer;
use ureq::Agent;

use crate::client::{Answer, agent};
use crate::fixtures::{TestConnection, TestDatabase};
use crate::for_each_database;
use crate::guestbook::Guestbook;
use crate::support::{self, TempSqlite};

const VISITORS: usize = 8;
const TIME: Duration = Duration::from_secs(10);
/// What every application's pool has at most, unless it says otherwise.
const POOL: usize = 8;

for_each_database!(sqlite, postgres, mariadb => visitors_leave_no_transaction_open);

fn visitors_leave_no_transaction_open<C: TestConnection>(test_db: &TestDatabase) {
    let guestbook = Guestbook::on(test_db);
    let mut visitors: Vec<Visitor> = (0..VISITORS).map(|number| Visitor::new(&guestbook, number)).collect();
    // They connect in the same moment, each with a connection of its own.
    let door = Barrier::new(VISITORS);
    let end = Instant::now() + TIME;
    thread::scope(|scope| {
        for visitor in &mut visitors {
            let door = &door;
            scope.spawn(move || {
                door.wait();
                while Instant::now() < end {
                    visitor.visit();
                }
            });
        }
    });
    let requests: usize = visitors.iter().map(|visitor| visitor.requests).sum();
    let written: usize = visitors.iter().map(|visitor| visitor.written).sum();
    // Past the harness, which shows nothing of a test that passes.
    let _ = writeln!(
        io::stderr(),
        "{}: {requests} requests by {VISITORS} visitors, {written} entries left",
        test_db.kind_name()
    );
    assert!(requests >= 1000, "only {requests} requests");

    assert_at_rest::<C>(test_db);
    let sessions = sessions(test_db, &guestbook);
    assert!((1..=POOL).contains(&sessions), "{sessions} connections to the database");
    assert_eq!(visitors[0].get("api/entries", 200).json()["total"], written);
    guestbook.assert_no_errors();
}

/// No session is in a transaction: every request has been answered, and its transaction had ended before that.
fn assert_at_rest<C: TestConnection>(test_db: &TestDatabase) {
    match test_db {
        TestDatabase::Postgres(database) => assert_eq!(support::postgres().open_transactions(database.name()), 0),
        TestDatabase::Mariadb(database) => assert_eq!(support::mariadb().open_transactions(database.name()), 0),
        TestDatabase::Sqlite(file) => {
            C::establish(&file.url())
                .unwrap()
                .batch_execute("BEGIN EXCLUSIVE; ROLLBACK")
                .expect("no transaction writes");
            let mut conn = SqliteConnection::establish(&file.url()).unwrap();
            let checkpoint: Checkpoint =
                diesel::sql_query("PRAGMA wal_checkpoint(TRUNCATE)").get_result(&mut conn).unwrap();
            assert_eq!(checkpoint.busy, 0, "no transaction reads");
        }
    }
}

#[derive(QueryableByName)]
struct Checkpoint {
    #[diesel(sql_type = Integer)]
    busy: i32,
}

/// The guestbook's connections, as the server counts them; for SQLite, how often it has the file open.
fn sessions(test_db: &TestDatabase, guestbook: &Guestbook) -> usize {
    match test_db {
        TestDatabase::Postgres(_) | TestDatabase::Mariadb(_) => test_db.connections(),
        TestDatabase::Sqlite(file) => handles(file, guestbook.pid()),
    }
}

fn handles(file: &TempSqlite, pid: u32) -> usize {
    let handles = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    handles.filter(|handle| std::fs::read_link(handle.path()).is_ok_and(|open| open == file.path())).count()
}

/// A visitor that never waits and requires the right answer.
struct Visitor<'g> {
    guestbook: &'g Guestbook,
    agent: Agent,
    name: String,
    requests: usize,
    /// Entries of this visitor that are in the book.
    written: usize,
    rounds: usize,
}

impl<'g> Visitor<'g> {
    fn new(guestbook: &'g Guestbook, number: usize) -> Self {
        let name = format!("Visitor {number}");
        Visitor { guestbook, agent: agent(), name, requests: 0, written: 0, rounds: number }
    }

    /// A few requests; each visitor is elsewhere in the same round.
    fn visit(&mut self) {
        self.rounds += 1;
        let (round, name) = (self.rounds, self.name.clone());
        let message = format!("Round {round} & <b>😀</b>");
        match round % 6 {
            0 => {
                self.get("", 200);
                self.get(&format!("?page={}", round % 9), 200);
            }
            1 => {
                self.post("entries", &name, &message, 303);
                self.written += 1;
            }
            2 => {
                // The database's share of a request is the largest here.
                for number in 0..8 {
                    let id = self.add_by_api(&name, &message);
                    self.get(&format!("api/entries?page={number}"), 200);
                    if number % 2 == 0 {
                        self.delete(&id, 303);
                        self.written -= 1;
                    }
                    if number == 0 {
                        self.delete(&id, 404);
                    }
                }
            }
            3 => {
                let refused = self.post("entries", &name, "", 400);
                assert!(refused.body.contains("Please write a message."), "{refused:?}");
            }
            4 => {
                let refused = self.post("api/entries", "", &message, 400).json();
                assert_eq!(refused["errors"]["author"], "Please tell us your name.");
            }
            _ => {
                self.get("nothing", 404);
            }
        }
    }

    /// The new entry's id.
    fn add_by_api(&mut self, author: &str, message: &str) -> String {
        let added = self.post("api/entries", author, message, 201).json();
        assert_eq!((&added["author"], &added["message"]), (&author.into(), &message.into()));
        self.written += 1;
        added["id"].to_string()
    }

    fn delete(&mut self, id: &str, wanted: u16) {
        self.post(&format!("entries/{id}/delete"), "", "", wanted);
    }

    fn get(&mut self, path: &str, wanted: u16) -> Answer {
        let answer = self.agent.get(self.guestbook.at(path)).call();
        self.expect(&format!("GET /{path}"), wanted, Answer::of(answer))
    }

    fn post(&mut self, path: &str, author: &str, message: &str, wanted: u16) -> Answer {
        let answer = self.agent.post(self.guestbook.at(path)).send_form([("author", author), ("message", message)]);
        self.expect(&format!("POST /{path}"), wanted, Answer::of(answer))
    }

    fn expect(&mut self, request: &str, wanted: u16, answer: Answer) -> Answer {
        self.requests += 1;
        let Answer { status, body } = &answer;
        assert!(*status == wanted, "{request}: {status}, not {wanted}\n{body}");
        answer
    }
}
