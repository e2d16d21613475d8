//! Many more callers than connections: in what order they are served, and what those leave behind who give up.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool, R2D2Connection};
use diesel_session::{App, Error};

use crate::fixtures::threads::together;
use crate::fixtures::{Conn, Site, Speak};
use crate::on_every_database;
use crate::support::{Kind, enabled, wait};

on_every_database!(ten_thousand_who_give_up);

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";
const THREADS: usize = 1_000;
const STATEMENTS: usize = 20;
const CONNECTIONS: u32 = 10;

/// The longest wait, and the median of those who had to wait at all.
fn longest_and_median(waits: Vec<Vec<Duration>>) -> (Duration, Duration) {
    let mut waits: Vec<_> = waits.into_iter().flatten().filter(|wait| *wait > Duration::from_millis(1)).collect();
    assert!(waits.len() > THREADS, "hardly anybody waited");
    waits.sort_unstable();
    (waits[waits.len() - 1], waits[waits.len() / 2])
}

/// A thousand threads with twenty statements each, on ten connections.
fn a_thousand_threads<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(CONNECTIONS).acquire_timeout(Duration::from_secs(60)));
    let waits = together(THREADS, |_| {
        (0..STATEMENTS)
            .map(|_| {
                app.context(|| {
                    let session = C::db().session()?;
                    let asked = Instant::now();
                    session.begin()?;
                    let waited = asked.elapsed();
                    session.number(ONE)?;
                    session.commit()?;
                    Ok::<_, Error>(waited)
                })
                .unwrap()
            })
            .collect()
    });
    let (longest, median) = longest_and_median(waits);
    assert!(longest <= median * 3, "{longest:?} is more than three times {median:?}");
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
}

/// The same with plain r2d2, where whoever comes by is served first.
fn a_thousand_threads_of_plain_r2d2<C: Conn + R2D2Connection>(site: &Site) {
    let manager = ConnectionManager::<C>::new(site.url());
    let pool =
        Pool::builder().max_size(CONNECTIONS).connection_timeout(Duration::from_secs(60)).build(manager).unwrap();
    let waits = together(THREADS, |_| {
        (0..STATEMENTS)
            .map(|_| {
                let asked = Instant::now();
                let mut conn = pool.get().unwrap();
                let waited = asked.elapsed();
                conn.transaction(|conn| conn.number(ONE)).unwrap();
                waited
            })
            .collect()
    });
    let (longest, median) = longest_and_median(waits);
    assert!(longest > median * 3, "{longest:?} and {median:?}");
}

#[test]
fn a_thousand_threads_postgres() {
    if enabled(Kind::Postgres) {
        a_thousand_threads::<PgConnection>(&Site::postgres());
        a_thousand_threads_of_plain_r2d2::<PgConnection>(&Site::postgres());
    }
}

#[test]
fn a_thousand_threads_mysql() {
    if enabled(Kind::Mysql) {
        a_thousand_threads::<MysqlConnection>(&Site::mysql());
    }
}

/// Takes so many connections at once, each in a context inside of the other.
fn hold<C: Conn>(app: &App<C>, count: u32) -> Result<usize, Error> {
    app.scope().read_only().run(|| {
        C::db().session()?.begin()?;
        if count == 1 { Ok(app.status().in_use) } else { hold(app, count - 1) }
    })
}

/// Callers with the patience of a millisecond, under churn.
fn ten_thousand_who_give_up<C: Conn>(site: &Site) {
    const SIZE: u32 = 3;
    const GIVE_UPS: usize = 10_000;
    let app = C::app(site.config().max_size(SIZE).acquire_timeout(Duration::from_millis(1)));
    let gave_up = AtomicUsize::new(0);
    let served = AtomicUsize::new(0);
    let unexpected = Mutex::new(Vec::new());
    together(24, |thread| {
        let mut round = thread;
        while gave_up.load(Ordering::Relaxed) < GIVE_UPS {
            round += 1;
            let outcome = app.scope().read_only().run(|| {
                let session = C::db().session()?;
                session.begin()?;
                thread::sleep(Duration::from_micros((round % 7) as u64 * 300));
                if round % 50 == 0 { session.send("ROLLBACK") } else { Ok(()) }
            });
            match outcome {
                Ok(()) => served.fetch_add(1, Ordering::Relaxed),
                Err(Error::AcquireTimeout { .. } | Error::ConnectTimeout { .. }) => {
                    gave_up.fetch_add(1, Ordering::Relaxed)
                }
                Err(error) => {
                    unexpected.lock().unwrap().push(error.to_string());
                    break;
                }
            };
        }
    });
    assert_eq!(unexpected.into_inner().unwrap(), [""; 0]);
    assert!(served.into_inner() > 100 && gave_up.into_inner() >= GIVE_UPS);
    let quiet = || {
        let status = app.status();
        (status.holders.len(), status.waiting, status.connecting, status.in_use)
    };
    assert_eq!(wait::until_equal((0, 0, 0, 0), Duration::from_secs(5), quiet), (0, 0, 0, 0), "{}", app.status());
    // Every permit is back: all can be had at once, as soon as they are open.
    assert!(wait::until(Duration::from_secs(5), || hold(&app, SIZE).is_ok_and(|in_use| in_use == SIZE as usize)));
    assert!(app.dispose_report().unwrap().is_complete());
}

/// What `pool::a_broken_connection_comes_back` shows of this crate: here the waiter sleeps on.
#[test]
fn a_broken_connection_of_plain_r2d2() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let patience = Duration::from_millis(400);
    let pool = Pool::builder().max_size(1).min_idle(Some(0)).connection_timeout(patience).test_on_check_out(false);
    let pool = pool.build(ConnectionManager::<PgConnection>::new(site.url())).unwrap();
    let mut held = pool.get().unwrap();
    thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let pool = &pool;
        let waiter = scope.spawn(move || {
            tell.send(()).unwrap();
            pool.get().map(drop)
        });
        told.recv().unwrap();
        // It is in line, as far as can be seen.
        thread::sleep(patience / 4);
        site.terminate_all();
        held.number(ONE).unwrap_err();
        assert!(held.is_broken());
        drop(held);
        assert!(waiter.join().unwrap().is_err(), "it was served");
    });
}
