//! Taking a connection out of the pool and giving it back. Nothing is sent, so it is the pool's own cost.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use diesel_session::Config;

use crate::contest::Contest;
use crate::peer;
use crate::table::Conn;

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    for (threads, size) in [(1, 8), (2, 8), (8, 8), (8, 2)] {
        let pool = peer::pool::<C>(url, size, false);
        let app = C::db().init_app("checkout", Config::new(url).max_size(size)).unwrap();
        let mut contest = Contest::new(format!("Checkout and return: {threads} threads, {size} connections"));
        let baseline = contest.baseline("r2d2, no ping", |times| {
            on_threads(threads, times, |times| {
                for _ in 0..times {
                    pool.get().unwrap();
                }
            })
        });
        contest.against(baseline, "autocommit session", |times| {
            on_threads(threads, times, |times| {
                app.scope()
                    .autocommit()
                    .run(|| {
                        let session = C::db().session()?;
                        (0..times).try_for_each(|_| session.with(|_| Ok(())))
                    })
                    .unwrap();
            })
        });
        contest.hold(rounds);
        C::db().remove_app("checkout").unwrap();
    }
}

/// From the moment when the first thread begins to the moment when the last one is done.
fn on_threads(threads: u64, times: u64, run: impl Fn(u64) + Sync) -> Duration {
    let start = Barrier::new(threads as usize);
    let each = || {
        start.wait();
        let began = Instant::now();
        run(times.div_ceil(threads));
        (began, Instant::now())
    };
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(each)).collect();
        let times: Vec<_> = all.into_iter().map(|thread| thread.join().unwrap()).collect();
        let began = times.iter().map(|time| time.0).min().unwrap();
        times.iter().map(|time| time.1).max().unwrap() - began
    })
}
