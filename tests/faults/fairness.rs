//! Many more callers than connections: in which order they are served, and what callers that give up leave behind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool, R2D2Connection};
use diesel_session::{App, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database => callers_that_give_up_lose_no_permit);
for_each_database!(postgres, mariadb => checkout_is_fair_to_a_thousand_threads);
for_each_database!(postgres => plain_r2d2_is_unfair_to_a_thousand_threads);
for_each_database!(only postgres => plain_r2d2_wakes_no_waiter_for_a_broken_connection);

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";
const THREADS: usize = 1_000;
const STATEMENTS: usize = 20;
const CONNECTIONS: u32 = 10;

/// The waits of all callers, in turns: how many other callers were served during a wait. The machine's speed may vary
/// during the test, so times are not compared.
#[derive(Default)]
struct Turns {
    served: AtomicUsize,
}

impl Turns {
    fn count<T>(&self, take: impl FnOnce() -> T) -> (T, usize) {
        let before = self.served.load(Ordering::Relaxed);
        let taken = take();
        (taken, self.served.fetch_add(1, Ordering::Relaxed) - before)
    }
}

/// The longest wait, and the median of the waits.
fn longest_and_median(waits: Vec<Vec<usize>>) -> (usize, usize) {
    let mut waits: Vec<_> = waits.into_iter().flatten().filter(|turns| *turns > CONNECTIONS as usize).collect();
    assert!(waits.len() > THREADS, "hardly anybody waited");
    waits.sort_unstable();
    (waits[waits.len() - 1], waits[waits.len() / 2])
}

/// A thousand threads with twenty statements each, on ten connections.
fn checkout_is_fair_to_a_thousand_threads<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(CONNECTIONS).acquire_timeout(Duration::from_secs(60)));
    let turns = Turns::default();
    let waits = together(THREADS, |_| {
        (0..STATEMENTS)
            .map(|_| {
                app.context(|| {
                    let session = C::db().session()?;
                    let (begun, waited) = turns.count(|| session.begin());
                    begun?;
                    session.number(ONE)?;
                    session.commit()?;
                    Ok::<_, Error>(waited)
                })
                .unwrap()
            })
            .collect()
    });
    let (longest, median) = longest_and_median(waits);
    assert!(longest * 2 <= median * 3, "a caller waited for {longest} turns, and half of them for {median}");
    assert_eq!((app.status().in_use, app.status().waiting), (0, 0));
}

/// The control: plain r2d2 may serve a new caller before one that waits.
fn plain_r2d2_is_unfair_to_a_thousand_threads<C: TestConnection + R2D2Connection>(test_db: &TestDatabase) {
    let manager = ConnectionManager::<C>::new(test_db.url());
    let pool =
        Pool::builder().max_size(CONNECTIONS).connection_timeout(Duration::from_secs(60)).build(manager).unwrap();
    let turns = Turns::default();
    let waits = together(THREADS, |_| {
        (0..STATEMENTS)
            .map(|_| {
                let (conn, waited) = turns.count(|| pool.get());
                let mut conn = conn.unwrap();
                conn.transaction(|conn| conn.number(ONE)).unwrap();
                waited
            })
            .collect()
    });
    let (longest, median) = longest_and_median(waits);
    assert!(longest > median * 3, "a caller waited for {longest} turns, and half of them for {median}");
}

/// Takes so many connections at once, each in a context inside of the other.
fn hold<C: TestConnection>(app: &App<C>, count: u32) -> Result<usize, Error> {
    app.scope().read_only().run(|| {
        C::db().session()?.begin()?;
        if count == 1 { Ok(app.status().in_use) } else { hold(app, count - 1) }
    })
}

/// Callers with the patience of a millisecond, under churn.
fn callers_that_give_up_lose_no_permit<C: TestConnection>(test_db: &TestDatabase) {
    const SIZE: u32 = 3;
    const GIVE_UPS: usize = 10_000;
    let app = C::app(test_db.config().max_size(SIZE).acquire_timeout(Duration::from_millis(1)));
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
                // The work of the holder.
                thread::sleep(Duration::from_micros((round % 7) as u64 * 300));
                if round % 50 == 0 { session.send("ROLLBACK") } else { Ok(()) }
            });
            match outcome {
                Ok(()) => served.fetch_add(1, Ordering::Relaxed),
                Err(error) if matches!(error.kind(), ErrorKind::AcquireTimeout | ErrorKind::ConnectTimeout) => {
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

/// The control of `pool::broken_connection_passes_its_permit_to_a_waiter`: here the waiter is not woken.
fn plain_r2d2_wakes_no_waiter_for_a_broken_connection() {
    let test_db = TestDatabase::postgres();
    let patience = Duration::from_millis(400);
    let pool = Pool::builder().max_size(1).min_idle(Some(0)).connection_timeout(patience).test_on_check_out(false);
    let pool = pool.build(ConnectionManager::<PgConnection>::new(test_db.url())).unwrap();
    let mut held = pool.get().unwrap();
    thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let pool = &pool;
        let waiter = scope.spawn(move || {
            tell.send(()).unwrap();
            pool.get().map(drop)
        });
        told.recv().unwrap();
        // r2d2 does not tell how many callers wait. This one has had enough time to begin.
        thread::sleep(patience / 4);
        test_db.terminate_all();
        held.number(ONE).unwrap_err();
        assert!(held.is_broken());
        drop(held);
        assert!(waiter.join().unwrap().is_err(), "it was served");
    });
}
