//! What a context costs, measured side by side with plain Diesel and with r2d2 in one run: `cargo bench --all-features`.
//!
//! `-- --pin 0` binds this program, and the PostgreSQL it starts, to that CPU: between two CPUs of a small virtual machine a
//! round trip swings by a factor of 2 to 10. `-- --rounds 31` takes more rounds than 15. `-- reads` runs only that section of
//! `reads`, `checkout`, `contended`, `render`, `web`, `pooler`, `unit` and `apps`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "numbers are printed")]
#![allow(unreachable_pub, clippy::unwrap_used, reason = "a program of its own; a benchmark that fails ends")]

mod apps;
mod arguments;
#[cfg(feature = "postgres")]
mod checkout;
#[cfg(feature = "postgres")]
mod contended;
mod contest;
mod peer;
#[cfg(feature = "postgres")]
mod pooler;
mod reads;
#[cfg(feature = "postgres")]
mod render;
#[cfg(feature = "postgres")]
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;
#[cfg(feature = "postgres")]
mod throughput;
mod unit;
mod users;
#[cfg(feature = "postgres")]
mod web;

use std::process::ExitCode;

use arguments::Arguments;
use diesel::SqliteConnection;

fn main() -> ExitCode {
    let arguments = match Arguments::read().and_then(Arguments::pinned) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{arguments}");
    if arguments.runs("reads") {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("items.sqlite");
        reads::measure::<SqliteConnection>(file.to_str().unwrap(), arguments.rounds);
    }
    #[cfg(feature = "postgres")]
    if ["reads", "checkout", "contended", "render", "web", "pooler", "unit"]
        .iter()
        .any(|section| arguments.runs(section))
    {
        let url = support::postgres().socket_url(support::ROLE);
        if arguments.runs("reads") {
            reads::measure::<diesel::PgConnection>(&url, arguments.rounds);
        }
        if arguments.runs("checkout") {
            checkout::measure::<diesel::PgConnection>(&url, arguments.rounds);
        }
        if arguments.runs("contended") {
            contended::measure::<diesel::PgConnection>(&url, arguments.rounds);
        }
        if arguments.runs("render") {
            render::measure::<diesel::PgConnection>(&url, arguments.rounds);
        }
        if arguments.runs("web") {
            web::measure::<diesel::PgConnection>(&url, arguments.rounds);
        }
        if arguments.runs("pooler") {
            pooler::measure(arguments.rounds);
        }
        if arguments.runs("unit") {
            unit::measure::<diesel::PgConnection>(&url, arguments.rounds);
            unit::update(&url, arguments.rounds);
        }
    }
    if arguments.runs("unit") {
        let folder = tempfile::tempdir().unwrap();
        unit::measure::<SqliteConnection>(folder.path().join("users.sqlite").to_str().unwrap(), arguments.rounds);
    }
    if arguments.runs("apps") {
        apps::measure(arguments.rounds);
    }
    #[cfg(not(feature = "postgres"))]
    eprintln!("PostgreSQL is left out: this build lacks it; `cargo bench --all-features` has it");
    ExitCode::SUCCESS
}
