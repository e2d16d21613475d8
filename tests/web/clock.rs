//! The time of an entry is in UTC, also where another program wrote it whose session is in another time zone. (Diesel's own
//! sessions are in UTC.)

use std::time::SystemTime;

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use diesel::connection::SimpleConnection;

use crate::client::{Answer, agent};
use crate::fixtures::{INSERT, Site, connect_any};
use crate::guestbook::Guestbook;
use crate::support::{Kind, enabled};

#[test]
fn on_postgres() {
    if enabled(Kind::Postgres) {
        assert_time_is_utc(&Site::postgres(), "SET TIME ZONE 'Asia/Tokyo'");
    }
}

#[test]
fn on_mariadb() {
    if enabled(Kind::Mysql) {
        assert_time_is_utc(&Site::mysql(), "SET time_zone = '+09:00'");
    }
}

fn assert_time_is_utc(site: &Site, go_to_tokyo: &str) {
    let guestbook = Guestbook::on(site);
    let before = utc();
    let mut other_program = connect_any(&site.url()).unwrap();
    other_program.batch_execute(go_to_tokyo).unwrap();
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
