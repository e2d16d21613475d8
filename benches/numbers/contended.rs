//! More threads than connections, each with one request after another: how many requests the pool serves, how alike it treats the
//! threads, and how long the slowest requests take.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::QueryResult;
use diesel_session::{App, Config, Result};

use crate::contest::{median, shown};
use crate::peer::{self, Pool};
use crate::table::{Conn, Item, ROWS};

/// How long one pool is measured in a round.
const TURN: Duration = Duration::from_millis(200);

type Plain<C> = fn(&mut C, i32) -> QueryResult<Item>;
type Ours<C> = fn(&App<C>, i32) -> Result<Item>;

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    let mut conn = C::establish(url).unwrap();
    if conn.select(0).is_err() {
        conn.fill();
    }
    drop(conn);
    let select: (Plain<C>, Ours<C>) =
        (C::select, |app, id| app.scope().autocommit().run(|| C::select_in(&C::db().session()?, id)));
    let transaction: (Plain<C>, Ours<C>) = (C::read_write, |app, id| app.run(|| C::select_in(&C::db().session()?, id)));
    for (threads, size) in [(8, 2), (8, 4), (64, 8)] {
        let pool = peer::pool::<C>(url, size, false);
        let app = C::db().init_app("contended", Config::new(url).max_size(size)).unwrap();
        for (statements, (plain, ours)) in [("SELECT", select), ("BEGIN, SELECT, COMMIT", transaction)] {
            let (mut peers, mut own) = (Vec::new(), Vec::new());
            for round in 0..rounds {
                let measure_peer = |peers: &mut Vec<_>| peers.push(turn(threads, |id| drop(one_of(&pool, plain, id))));
                let measure_own = |own: &mut Vec<_>| own.push(turn(threads, |id| drop(ours(&app, id).unwrap())));
                if round % 2 == 0 {
                    measure_peer(&mut peers);
                    measure_own(&mut own);
                } else {
                    measure_own(&mut own);
                    measure_peer(&mut peers);
                }
            }
            println!("\n{}: {statements}: {threads} threads, {size} connections", C::NAME);
            let ratios: Vec<f64> = peers.iter().zip(&own).map(|(peer, own)| own.requests / peer.requests).collect();
            print("r2d2, no ping", &peers, None);
            print("context", &own, Some(&ratios));
        }
        C::db().remove_app("contended").unwrap();
    }
}

fn one_of<C: Conn>(pool: &Pool<C>, plain: Plain<C>, id: i32) -> Item {
    plain(&mut pool.get().unwrap(), id).unwrap()
}

/// The figures of one turn.
struct Seen {
    /// Per second.
    requests: f64,
    /// Those of the thread that had the fewest, of those that the thread with the most had.
    share: f64,
    /// Nanoseconds that 99 of 100 requests did not exceed, and the longest.
    p99: f64,
    longest: f64,
}

fn turn(threads: usize, request: impl Fn(i32) + Sync) -> Seen {
    let (start, over) = (Barrier::new(threads + 1), AtomicBool::new(false));
    let each = |thread: usize| {
        let mut took = Vec::with_capacity(1 << 14);
        let mut id = thread as i32;
        start.wait();
        while !over.load(Ordering::Relaxed) {
            let began = Instant::now();
            request(id);
            took.push(began.elapsed().as_nanos() as f64);
            id = (id + 7) % ROWS;
        }
        took
    };
    let each = &each;
    let (took, time) = thread::scope(|scope| {
        let all: Vec<thread::ScopedJoinHandle<'_, Vec<f64>>> =
            (0..threads).map(|thread| scope.spawn(move || each(thread))).collect();
        start.wait();
        let began = Instant::now();
        thread::sleep(TURN);
        over.store(true, Ordering::Relaxed);
        let took: Vec<Vec<f64>> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
        (took, began.elapsed())
    });
    let counts = || took.iter().map(Vec::len);
    let mut all: Vec<f64> = took.iter().flatten().copied().collect();
    all.sort_by(f64::total_cmp);
    Seen {
        requests: all.len() as f64 / time.as_secs_f64(),
        share: counts().min().unwrap_or_default() as f64 / counts().max().unwrap_or(1).max(1) as f64,
        p99: all[all.len() * 99 / 100],
        longest: all[all.len() - 1],
    }
}

fn print(name: &str, turns: &[Seen], ratios: Option<&[f64]>) {
    let of = |what: fn(&Seen) -> f64| median(&turns.iter().map(what).collect::<Vec<_>>());
    let ratio = ratios.map(|ratios| format!("{:>5.2} times", median(ratios))).unwrap_or_default();
    println!(
        "  {name:<16} {:>8.0} a second  slowest thread {:>4.2} of the fastest  p99 {:>9}  longest {:>9}  {ratio}",
        of(|turn| turn.requests),
        of(|turn| turn.share),
        shown(of(|turn| turn.p99)),
        shown(of(|turn| turn.longest)),
    );
}
