//! A web server on axum: GET of one row.

use std::future::Future;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use axum::Router;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use diesel_session::{App, Config, Scope};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::spawn_blocking;

use crate::peer;
use crate::table::{Conn, Item};
use crate::throughput::Throughput;

/// Clients, each with a connection to the web server that is kept.
const CLIENTS: usize = 8;

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    C::fill_once(url);
    let pool = peer::pool::<C>(url, CLIENTS as u32, false);
    let app = C::db().init_app("web", Config::new(url).max_size(CLIENTS as u32)).unwrap();
    let runtime = Runtime::new().unwrap();
    let plain = serve(&runtime, move |id| {
        let pool = pool.clone();
        respond(move || answer(&C::select(&mut pool.get().unwrap(), id).unwrap()))
    });
    let scoped = |options: fn(Scope<C>) -> Scope<C>| {
        let app = app.clone();
        serve(&runtime, move |id| {
            let app = app.clone();
            respond(move || handle(&app, options, id))
        })
    };
    let servers = [
        ("Diesel + r2d2, no ping", plain),
        ("context", scoped(|scope| scope)),
        ("context, autocommit", scoped(Scope::autocommit)),
        ("context, begun eagerly", scoped(Scope::begin_eagerly)),
    ];
    let mut throughput = Throughput::new(format!("{}: GET of one row on axum: {CLIENTS} clients", C::NAME), CLIENTS);
    for (name, address) in servers {
        throughput.enter(name, move || {
            let mut client = Client::connect(address);
            move |id| client.get(id)
        });
    }
    throughput.hold(rounds);
    drop(runtime);
    C::db().remove_app("web").unwrap();
}

fn handle<C: Conn>(app: &App<C>, options: fn(Scope<C>) -> Scope<C>, id: i32) -> Response {
    options(app.scope())
        .run_and_commit_if(
            |response: &Response| response.status().as_u16() < 400,
            || Ok::<_, diesel_session::Error>(answer(&C::select_in(&C::db().session()?, id)?)),
        )
        .unwrap()
}

fn answer((id, name, price): &Item) -> Response {
    format!("{id}: {name} for {price}\n").into_response()
}

/// Runs the handler on a blocking thread, as a program with synchronous Diesel does.
async fn respond(handler: impl FnOnce() -> Response + Send + 'static) -> Response {
    spawn_blocking(handler).await.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// Serves `GET /{id}` and returns the address.
fn serve<F: Future<Output = Response> + Send>(
    runtime: &Runtime,
    handler: impl Fn(i32) -> F + Clone + Send + Sync + 'static,
) -> SocketAddr {
    let router = Router::new().route("/{id}", get(move |Path(id): Path<i32>| handler(id)));
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = listener.tap_io(|client| drop(client.set_nodelay(true)));
    runtime.spawn(async move { axum::serve(listener, router).await });
    address
}

struct Client {
    stream: BufReader<TcpStream>,
    line: String,
    body: Vec<u8>,
}

impl Client {
    fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream: BufReader::new(stream), line: String::new(), body: Vec::new() }
    }

    fn get(&mut self, id: i32) {
        let request = format!("GET /{id} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).unwrap();
        assert!(self.header_line().starts_with("HTTP/1.1 200 "), "{}", self.line);
        let mut length = 0;
        while !self.header_line().is_empty() {
            if let Some((name, value)) = self.line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap();
            }
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body).unwrap();
        assert!(self.body.starts_with(format!("{id}: ").as_bytes()), "the row of another request");
    }

    fn header_line(&mut self) -> &str {
        self.line.clear();
        self.stream.read_line(&mut self.line).unwrap();
        self.line.trim_end()
    }
}
