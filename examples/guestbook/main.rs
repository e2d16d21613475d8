//! A guestbook on the web: `cargo run --example guestbook`, then open the address it prints.
//!
//! The parts that show the crate: the database object is in `database.rs`, the scope of a request in this file, the statements
//! are in `entry.rs` and `page.rs`. The others are a plain web application: `handlers.rs` says what is answered, `form.rs`
//! checks what a visitor sends, `html.rs` and `api.rs` write the answers.
//!
//! `DATABASE_URL` chooses another database than the file `guestbook.sqlite`; PostgreSQL and MySQL or MariaDB take the feature
//! of that name: `DATABASE_URL=postgres://user:password@host/database cargo run --features postgres --example guestbook`.
//! `PORT` chooses another port than 8000.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program tells its user the address, and errors")]

mod api;
mod database;
mod entry;
mod form;
mod handlers;
mod html;
mod page;

use std::env;
use std::process::ExitCode;

use diesel_session::{App, Config, Error};
use rouille::{Request, Response, Server};

use crate::database::{AnyConnection, DB};

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestbook: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let config = match env::var_os("DATABASE_URL") {
        Some(_) => Config::from_env("DATABASE_URL")?,
        None => Config::new("guestbook.sqlite"),
    };
    let app = DB.init_app("guestbook", config)?;
    app.create_all()?;

    let port = env::var("PORT").unwrap_or_else(|_| "8000".into());
    let port: u16 = port.parse().map_err(|_| format!("PORT is `{port}`; it takes a number from 0 to 65535"))?;
    let server = Server::new(("127.0.0.1", port), move |request| answer(&app, request))
        .map_err(|error| format!("cannot listen on port {port}: {error}; PORT chooses another"))?;
    println!("The guestbook is open at http://{}/", server.server_addr());
    server.run();
    Ok(())
}

/// A request is a context: whatever runs below finds its session with `DB.session()`, and nothing has to be handed down.
///
/// The session is committed here, once, where the answer is a success. An answer of 400 and above, an error and a panic roll
/// back, so a handler that changes its mind half-way has nothing to undo.
fn answer(app: &App<AnyConnection>, request: &Request) -> Response {
    let mut scope = app.scope();
    if matches!(request.method(), "GET" | "HEAD") {
        // All queries of a page see one state of the data, and a page that wrote by mistake would be refused.
        scope = scope.read_only();
    }
    let answered = scope.commit_if(|response: &Response| response.status_code < 400).run(|| handlers::answer(request));
    answered.unwrap_or_else(|error: Error| {
        // The text is for who runs the program: it names places in the source. A visitor learns only that it failed.
        eprintln!("guestbook: {} {}: {error}", request.method(), request.raw_url());
        handlers::failure(request)
    })
}
