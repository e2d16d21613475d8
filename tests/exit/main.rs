//! Programs that end while the pool connects. The library guards the end of the main thread, which no test of the usual
//! harness runs on, so this is a program of its own that starts itself as those programs.
//!
//! `DIESEL_SESSION_EXITS=300 cargo test --all-features --test exit` starts more of them.

#![allow(clippy::print_stdout, reason = "it is its own test runner")]

#[path = "../support/mod.rs"]
mod support;

use std::process::{Command, ExitCode};
use std::time::Duration;

use diesel::PgConnection;
use diesel_session::{Config, Database};
use support::{Kind, Postgres, enabled};

static DB: Database<PgConnection> = Database::without_migrations();

const URL: &str = "DIESEL_SESSION_EXIT_URL";

const APPLICATIONS: usize = 6;

/// What each program ends with.
const CODE: u8 = 3;

fn main() -> ExitCode {
    if let Ok(url) = std::env::var(URL) {
        return program(&url);
    }
    println!("\nrunning 1 test");
    let crashed = if enabled(Kind::Postgres) { crashed() } else { Vec::new() };
    let (said, passed) = if crashed.is_empty() { ("ok", 1) } else { ("FAILED", 0) };
    println!("test main_that_returns_while_the_pool_connects_does_not_crash ... {said}");
    println!("{}", crashed.join("\n"));
    println!("test result: {said}. {passed} passed; {} failed; 0 ignored; 0 measured; 0 filtered out", 1 - passed);
    if passed == 1 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Its only caller gives up while the pools of several applications connect.
fn program(url: &str) -> ExitCode {
    for number in 0..APPLICATIONS {
        let config = Config::new(url).acquire_timeout(Duration::from_micros(300));
        let app = DB.init_app(format!("ends-{number}"), config).expect("a sound configuration");
        let outcome = app.ping();
        assert!(outcome.as_ref().is_err_and(|error| error.is_timeout()) || outcome.is_ok(), "{outcome:?}");
    }
    if url.ends_with('1') { std::process::exit(CODE.into()) } else { ExitCode::from(CODE) }
}

/// The ends of the programs that did not end as they should have.
fn crashed() -> Vec<String> {
    let programs = std::env::var("DIESEL_SESSION_EXITS").ok();
    let programs: usize = programs.map_or(60, |programs| programs.parse().expect("a number of programs"));
    let server = Postgres::start();
    let this = std::env::current_exe().expect("a running program");
    let end = |number: usize| {
        let separator = if server.url().contains('?') { '&' } else { '?' };
        let url = format!("{}{separator}application_name=exit{}", server.url(), number % 2);
        let output = Command::new(&this).env(URL, url).output().expect("the same program starts once more");
        (output.status.code() != Some(CODE.into()))
            .then(|| format!("program {number}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    };
    (0..programs).filter_map(end).collect()
}
