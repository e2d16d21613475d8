//! More threads than connections, each with one request after another.

use std::hint::black_box;

use diesel::QueryResult;
use diesel_session::{App, Config, Result};

use crate::peer;
use crate::table::{Conn, Item};
use crate::throughput::Throughput;

type Plain<C> = fn(&mut C, i32) -> QueryResult<Item>;
type Ours<C> = fn(&App<C>, i32) -> Result<Item>;

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    C::fill_once(url);
    let select: (Plain<C>, Ours<C>) =
        (C::select, |app, id| app.scope().autocommit().run(|| C::select_in(&C::db().session()?, id)));
    let transaction: (Plain<C>, Ours<C>) =
        (C::read_write, |app, id| app.scope().begin_eagerly().run_and_commit(|| C::select_in(&C::db().session()?, id)));
    for (threads, size) in [(8, 2), (8, 4), (64, 8)] {
        let pool = peer::pool::<C>(url, size, false);
        let app = C::db().init_app("contended", Config::new(url).max_size(size)).unwrap();
        for (statements, (plain, ours)) in [("SELECT", select), ("BEGIN, SELECT, COMMIT", transaction)] {
            let title = format!("{}: {statements}: {threads} threads, {size} connections", C::NAME);
            let mut throughput = Throughput::new(title, threads);
            throughput.enter("r2d2, no ping", || |id| drop(black_box(plain(&mut pool.get().unwrap(), id).unwrap())));
            throughput.enter("context", || |id| drop(black_box(ours(&app, id).unwrap())));
            throughput.hold(rounds);
        }
        C::db().remove_app("contended").unwrap();
    }
}
