//! The time of an entry is in UTC, also where another program wrote it whose session is in another time zone. (Diesel's
//! own sessions are in UTC.)

use std::time::SystemTime;

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};

use crate::client::{Answer, agent};
use crate::fixtures::{INSERT, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::guestbook::Guestbook;

for_each_database!(postgres, mariadb => entry_times_are_utc);

fn entry_times_are_utc<C: TestConnection>(test_db: &TestDatabase) {
    let guestbook = Guestbook::on(test_db);
    let before = utc();
    let mut other_program = C::establish(&test_db.url()).unwrap();
    let time_zone = match test_db {
        TestDatabase::Postgres(_) => "SET TIME ZONE 'Asia/Tokyo'",
        TestDatabase::Mariadb(_) => "SET time_zone = '+09:00'",
        TestDatabase::Sqlite(_) => unreachable!("SQLite has no time zone of a session"),
    };
    other_program.batch_execute(time_zone).unwrap();
    other_program.batch_execute(INSERT).unwrap();
    let page = Answer::of(agent().get(guestbook.at("api/entries")).call()).json();
    let shown = page["entries"][0]["written_at"].as_str().expect("a time");
    let written = NaiveDateTime::parse_from_str(shown, "%Y-%m-%dT%H:%M:%SZ").unwrap();
    // It is shown without fractions.
    assert!((before - TimeDelta::seconds(1)..=utc()).contains(&written), "{shown} where it is {before}");
}

fn utc() -> NaiveDateTime {
    DateTime::<Utc>::from(SystemTime::now()).naive_utc()
}
