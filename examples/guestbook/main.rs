//! A guestbook on the web: run `cargo run --example guestbook` and open the printed address.
//!
//! These files show the crate: `database.rs` has the database object, this file the scope of a request, `entry.rs` and `page.rs`
//! the statements. The other files are a plain web application: `handlers.rs` answers requests, `form.rs` validates the form,
//! `html.rs` and `api.rs` write the responses.
//!
//! The default database is the file `guestbook.sqlite`. `DATABASE_URL` names another one. PostgreSQL and MySQL or MariaDB need
//! the feature of that name: `DATABASE_URL=postgres://user:password@host/database cargo run --features postgres --example guestbook`.
//! `PORT` names another port than 8000.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program tells its user the address, and errors")]

mod api;
mod database;
mod entry;
mod form;
mod handlers;
mod html;
mod page;
mod request;

use std::env;
use std::error::Error;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::Method;
use axum::http::request::Parts;
use axum::response::Response;
use axum::serve::ListenerExt;
use diesel_session::{App, Config};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::spawn_blocking;

use crate::database::{AnyConnection, DB};
use crate::request::{BODY_BYTES, Request};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guestbook: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    let config = match env::var_os("DATABASE_URL") {
        Some(_) => Config::from_env("DATABASE_URL")?,
        None => Config::new("guestbook.sqlite"),
    };
    let app = DB.init_app("guestbook", config)?;
    app.create_all()?;

    let port = env::var("PORT").unwrap_or_else(|_| "8000".into());
    let port: u16 = port.parse().map_err(|_| format!("PORT is `{port}`; it takes a number from 0 to 65535"))?;
    Runtime::new()?.block_on(serve(app, port))?;
    Ok(())
}

async fn serve(app: App<AnyConnection>, port: u16) -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))
        .await
        .map_err(|error| io::Error::other(format!("cannot listen on port {port}: {error}; PORT chooses another")))?;
    println!("The guestbook is open at http://{}/", listener.local_addr()?);
    // Without this the second part of a response would wait for the acknowledgement of the first.
    let listener = listener.tap_io(|visitor| drop(visitor.set_nodelay(true)));
    axum::serve(listener, Router::new().fallback(respond).layer(DefaultBodyLimit::max(BODY_BYTES)).with_state(app))
        .await
}

/// A context belongs to a thread, so the whole request runs with its context on one blocking thread. It begins after the body has
/// arrived, so a slow visitor occupies neither a thread nor a connection.
async fn respond(State(app): State<App<AnyConnection>>, head: Parts, body: Result<Bytes, BytesRejection>) -> Response {
    let request = Arc::new(Request::from_parts(head, body));
    let asked = Arc::clone(&request);
    let error: Box<dyn Error> = match spawn_blocking(move || answer(&app, &asked)).await {
        Ok(Ok(response)) => return response,
        Ok(Err(error)) => error.into(),
        Err(panic) => panic.into(),
    };
    // The text is for the operator, because it names source locations. The visitor only learns that the request failed.
    eprintln!("guestbook: {} {}: {error}", request.method(), request.uri());
    handlers::failure(&request)
}

/// A request is a context: all code inside it gets its session from `DB.session()`, so no function passes a connection.
///
/// The scope commits the session once, if the response is a success. A response of 400 and above, an error and a panic roll back,
/// so a handler that gives up half-way has nothing to undo.
fn answer(app: &App<AnyConnection>, request: &Request) -> diesel_session::Result<Response> {
    let mut scope = app.scope();
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        // All queries of a page see one state of the data, and an accidental write is refused.
        scope = scope.read_only();
    }
    scope.run_and_commit_if(|response: &Response| response.status().as_u16() < 400, || handlers::answer(request))
}
