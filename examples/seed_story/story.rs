//! The story: the same suite three times, and the cost of each run.

#[path = "../../tests/support/mod.rs"]
mod support;

mod bar;
mod entry;
mod outcome;
mod page;
mod plain;
mod schema;
mod server;
mod session;
mod slots;
mod suite;
mod url;

use std::process::ExitCode;

use self::bar::Scale;
use self::outcome::Outcome;
use self::plain::{PATIENCE, Plain};
use self::server::Server;
use self::session::Sessions;
use self::suite::Suite;
use crate::Result;

pub(crate) fn main_of() -> Result<ExitCode> {
    if let Some(code) = schema::keep() {
        return Ok(code);
    }
    let server = Server::choose()?;
    print_setting(&server);
    let seconds = PATIENCE.as_secs();
    let default = format!("r2d2::Pool::builder().connection_timeout({seconds} s).build(..): ten connections each");
    let single =
        format!("r2d2::Pool::builder().connection_timeout({seconds} s).max_size(1).build(..): one connection each");
    let session = "diesel_session: DB.init_app(..), and app.dispose() at the end of every test: none after it";
    let outcomes = [
        tell("1. r2d2, default", &default, Plain::new(&server.url, None), &server)?,
        tell("2. r2d2, max_size(1)", &single, Plain::new(&server.url, Some(1)), &server)?,
        tell("3. diesel-session", session, Sessions::new(&server.url), &server)?,
    ];
    print_table(&outcomes);
    print_verdict(&outcomes);
    let session = &outcomes[2];
    let survived = session.failure.is_none() && session.left == 0;
    Ok(if survived { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_setting(server: &Server) {
    let (slots, free) = (&server.slots, server.slots.free());
    let length = suite::length(free);
    page::print(
        0,
        &format!(
            "PostgreSQL {} with max_connections = {}: {} reserved for superusers, {} in use (this story's observer is \
             one), {free} free. Each of {length} tests makes a new application, which is kept; a bar is the server's own \
             count of their sessions. r2d2's connection_timeout is {} s here, not 30 s, to save time.",
            slots.version,
            slots.max_connections,
            slots.reserved,
            slots.others,
            PATIENCE.as_secs()
        ),
    );
    let unit = Scale::new(free).unit();
    if unit > 1 {
        println!("One # is {unit} sessions.");
    }
}

/// Runs the suite in one way, and prints its code as a heading, its applications and the outcome.
fn tell(name: &'static str, code: &str, suite: impl Suite, server: &Server) -> Result<Outcome> {
    println!("\n{}{code}", &name[..3]);
    let outcome = suite::run(name, suite, server)?;
    if let Some(number) = outcome.would_fail_at(server.slots.free()) {
        page::print(
            2,
            &format!(
                "No failure so far: this story stops at {} applications, and at this rate application {number} would fail.",
                outcome.worked
            ),
        );
    }
    Ok(outcome)
}

fn print_table(outcomes: &[Outcome]) {
    let rows: Vec<_> = outcomes.iter().map(Outcome::cells).collect();
    println!();
    for row in std::iter::once(&Outcome::HEADER.map(String::from)).chain(&rows) {
        let [name, numbers @ ..] = row;
        let numbers = numbers
            .iter()
            .zip(&Outcome::HEADER[1..])
            .map(|(cell, title)| format!("{cell:>width$}", width = title.len().max(7)));
        println!("{name:<20}  {}", numbers.collect::<Vec<_>>().join("  "));
    }
}

fn print_verdict([default, single, session]: &[Outcome; 3]) {
    let (default, single, session) = (default.verdict(), single.verdict(), session.verdict());
    println!();
    page::print(0, &format!("r2d2's default {default}, pools of one {single}, diesel-session {session}."));
}
