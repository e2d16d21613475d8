//! The cost of a pooler: contexts on a direct connection and behind PgBouncer in transaction mode.

use std::cell::RefCell;
use std::hint::black_box;
use std::time::Duration;

use diesel::connection::{CacheSize, SimpleConnection};
use diesel::prelude::*;
use diesel_session::pool::Behind;
use diesel_session::{App, Config, Result};

use crate::contest::{Contest, timed};
use crate::support::{self, Pgbouncer, ROLE};
use crate::table::{Conn, ROWS};

type Scope = fn(&App<PgConnection>, i32) -> Result<()>;

fn read(id: i32) -> Result<()> {
    black_box(PgConnection::select_in(&PgConnection::db().session()?, id)?);
    Ok(())
}

fn raw() -> Result<()> {
    PgConnection::db().session()?.with(|conn| conn.batch_execute("SELECT 1"))
}

const SCOPES: [(&str, Scope); 4] = [
    ("one SELECT", |app, id| app.run(|| read(id))),
    ("BEGIN, SELECT, COMMIT", |app, id| app.scope().begin_eagerly().run_and_commit(|| read(id))),
    ("raw SQL, with the reset", |app, _| app.run(raw)),
    ("SELECT with a deadline", |app, id| app.scope().deadline(Duration::from_secs(60)).run_and_commit(|| read(id))),
];

pub fn measure(rounds: usize) {
    let server = support::postgres();
    PgConnection::fill_once(&server.url());
    let pooler = Pgbouncer::start(server.port(), ROLE, 2, "");
    let url = pooler.url_of(ROLE);
    let app = |id: &str, config: Config| PgConnection::db().init_app(id, config.max_size(1)).unwrap();
    let direct = app("direct", Config::new(server.url()));
    let pooled = app("pooled", Config::new(&url).behind(Behind::TransactionPooler { keeps_prepared: false }));
    let plain = |url: &str| {
        let mut conn = PgConnection::establish(url).unwrap();
        conn.set_prepared_statement_cache_size(CacheSize::Disabled);
        RefCell::new(conn)
    };
    let (plain_direct, plain_pooled) = (plain(&server.url()), plain(&url));
    let each = |times: u64, call: &mut dyn FnMut(i32)| {
        let mut id = 0;
        timed(times, || {
            id = (id + 7) % ROWS;
            call(id);
        })
    };
    let mut contest = Contest::new("PostgreSQL by TCP, and behind PgBouncer in transaction mode");
    let baseline = contest.baseline("one SELECT: plain Diesel, nothing prepared", |times| {
        each(times, &mut |id| drop(black_box(plain_direct.borrow_mut().select(id).unwrap())))
    });
    contest.against(baseline, "  the same, behind the pooler", |times| {
        each(times, &mut |id| drop(black_box(plain_pooled.borrow_mut().select(id).unwrap())))
    });
    for (name, scope) in SCOPES {
        let (direct, pooled) = (&direct, &pooled);
        let baseline = contest
            .baseline(format!("{name}: context"), move |times| each(times, &mut |id| scope(direct, id).unwrap()));
        contest.against(baseline, "  the same, behind the pooler", move |times| {
            each(times, &mut |id| scope(pooled, id).unwrap())
        });
    }
    contest.hold(rounds);
    ["direct", "pooled"].into_iter().for_each(|id| drop(PgConnection::db().remove_app(id).unwrap()));
}
