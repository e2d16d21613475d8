//! Requests that read, render their answer and read again, on more threads than connections. If a request keeps its
//! connection while it renders, the number of connections limits the throughput.

use std::thread;
use std::time::Duration;

use diesel_session::{Config, Result};

use crate::peer;
use crate::table::{Conn, Item};
use crate::throughput::Throughput;

const THREADS: usize = 8;
const CONNECTIONS: u32 = 2;

/// The duration of the rendering. A pause stands for it, because the CPU of a benchmark that is pinned is shared.
const RENDERING: Duration = Duration::from_millis(2);

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    C::fill_once(url);
    let pool = peer::pool::<C>(url, CONNECTIONS, false);
    let app = C::db().init_app("render", Config::new(url).max_size(CONNECTIONS)).unwrap();
    let title = format!(
        "{}: SELECT, {} ms of rendering, SELECT: {THREADS} threads, {CONNECTIONS} connections",
        C::NAME,
        RENDERING.as_millis()
    );
    let mut throughput = Throughput::new(title, THREADS);
    throughput.enter("r2d2, a checkout for each SELECT", || {
        |id| {
            request(|| Ok(C::select(&mut pool.get().unwrap(), id).unwrap()));
        }
    });
    throughput.enter("r2d2, one checkout", || {
        |id| {
            let mut conn = pool.get().unwrap();
            request(|| Ok(C::select(&mut conn, id).unwrap()));
        }
    });
    throughput.enter("context", || {
        |id| {
            app.run(|| {
                request(|| C::select_in(&C::db().session()?, id));
                Ok(())
            })
            .unwrap();
        }
    });
    throughput.enter("context, begun eagerly", || {
        |id| {
            let scope = app.scope().begin_eagerly();
            let run = || {
                request(|| C::select_in(&C::db().session()?, id));
                Ok::<_, diesel_session::Error>(())
            };
            scope.run_and_commit(run).unwrap();
        }
    });
    throughput.hold(rounds);
    C::db().remove_app("render").unwrap();
}

fn request(mut select: impl FnMut() -> Result<Item>) -> (Item, Item) {
    let first = select().unwrap();
    thread::sleep(RENDERING);
    (first, select().unwrap())
}
