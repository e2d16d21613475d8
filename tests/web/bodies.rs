//! Bodies that no browser sends: their answers, and that slow ones delay no other request.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use ureq::Agent;

use crate::client::{Answer, agent};
use crate::fixtures::TestDatabase;
use crate::guestbook::Guestbook;

const FORM: &str = "application/x-www-form-urlencoded";
const ENTRY: &str = "author=Ada&message=Hello";

#[test]
fn malformed_entries_are_refused() {
    let test_db = TestDatabase::sqlite();
    let guestbook = Guestbook::on(&test_db);
    let agent = agent();
    let post = |kind: &str, body: &str| {
        let request = agent.post(guestbook.at("api/entries")).header("Content-Type", kind);
        let answer = Answer::of(request.send(body));
        (answer.status, answer.json()["error"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(post("application/json", "{}").0, 415);
    // The first is as long as a body may be, and is looked at.
    let long = format!("{ENTRY}{}", "!".repeat(64 * 1024 - ENTRY.len()));
    assert_eq!(post(FORM, &long), (400, String::new()));
    assert_eq!(post(FORM, &(long + "!")), (413, "That is too long for a guestbook.".to_owned()));

    let mut cut_off = half_an_entry(&guestbook);
    cut_off.shutdown(Shutdown::Write).unwrap();
    let answer = rest_of(&mut cut_off);
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("The form did not arrive whole."), "{answer}");

    assert_eq!(total(&agent, &guestbook), 0);
    guestbook.assert_no_errors();
}

#[test]
fn slow_bodies_delay_no_other_request() {
    let test_db = TestDatabase::sqlite();
    let guestbook = Guestbook::on(&test_db);
    let agent = agent();
    // More than the web server has threads that may wait, which are 512.
    let mut slow: Vec<TcpStream> = (0..600).map(|_| half_an_entry(&guestbook)).collect();
    assert_eq!(total(&agent, &guestbook), 0);
    for visitor in &mut slow {
        visitor.write_all(&ENTRY.as_bytes()[ENTRY.len() / 2..]).unwrap();
        let answer = rest_of(visitor);
        assert!(answer.starts_with("HTTP/1.1 201 "), "{answer}");
    }
    assert_eq!(total(&agent, &guestbook), slow.len());
    guestbook.assert_no_errors();
}

#[test]
fn head_response_has_no_body() {
    let test_db = TestDatabase::sqlite();
    let guestbook = Guestbook::on(&test_db);
    let mut visitor = TcpStream::connect(guestbook.place()).unwrap();
    visitor.write_all(b"HEAD / HTTP/1.1\r\nHost: guestbook\r\nConnection: close\r\n\r\n").unwrap();
    let answer = rest_of(&mut visitor);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("content-length: "), "{answer}");
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
    guestbook.assert_no_errors();
}

/// Begins to post an entry.
fn half_an_entry(guestbook: &Guestbook) -> TcpStream {
    let mut visitor = TcpStream::connect(guestbook.place()).unwrap();
    let (length, half) = (ENTRY.len(), &ENTRY[..ENTRY.len() / 2]);
    let head = "POST /api/entries HTTP/1.1\r\nHost: guestbook\r\nConnection: close";
    write!(visitor, "{head}\r\nContent-Type: {FORM}\r\nContent-Length: {length}\r\n\r\n{half}").unwrap();
    visitor
}

/// All that comes until the other side closes.
fn rest_of(visitor: &mut TcpStream) -> String {
    let mut answer = String::new();
    visitor.read_to_string(&mut answer).unwrap();
    answer
}

fn total(agent: &Agent, guestbook: &Guestbook) -> usize {
    let page = Answer::of(agent.get(guestbook.at("api/entries")).call());
    page.json()["total"].as_u64().expect("a number") as usize
}
