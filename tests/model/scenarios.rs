//! What the parts do together, whatever the order of events.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::Rng;
use shuttle::thread;

use crate::pool::admission::Refused;
use crate::pool::imitation::{Conduct, Failure};
use crate::pool::world::{CheckedOut, FOR_EVER, WILLING, World, acquire, break_it};
use crate::sync;

const SOON: Duration = Duration::from_millis(5);

fn rounds(default: usize) -> usize {
    let wanted = std::env::var("DIESEL_SESSION_MODEL_ROUNDS").ok();
    wanted.map_or(default, |rounds| rounds.parse().expect("a number of rounds"))
}

fn try_orders(default: usize, model: impl Fn() + Send + Sync + Clone + 'static) {
    let anew = move || {
        sync::reset(None);
        model();
    };
    shuttle::check_random(anew.clone(), rounds(default));
    shuttle::check_pct(anew, rounds(default), 4);
}

fn join(threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn maybe() -> bool {
    shuttle::rand::thread_rng().r#gen()
}

/// Time passes, or not, and the connection comes back sound or broken.
fn return_somehow(mut checked_out: CheckedOut) {
    if maybe() {
        sync::pass(Duration::from_micros(600));
    }
    if maybe() {
        break_it(&mut checked_out);
    }
    drop(checked_out);
}

/// One pool, more callers than connections, some of which come back broken.
fn everybody_is_served() {
    let world = World::new(2, &[2], WILLING);
    let threads = (0..4).map(|_| {
        let pool = world.pool(0);
        thread::spawn(move || (0..2).for_each(|_| return_somehow(acquire(&pool, FOR_EVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Two pools and room for one connection: each takes it from the other.
fn pools_give_way_to_each_other() {
    let world = World::new(1, &[1, 2], WILLING);
    let threads = (0..4).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| return_somehow(acquire(&pool, FOR_EVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// The same with room for two: a caller may be served by what comes back while its own connect is under way.
fn returns_and_connects_cross() {
    let world = World::new(2, &[2, 2], WILLING);
    let threads = (0..5).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| return_somehow(acquire(&pool, FOR_EVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Connects fail for good or for the moment, and another thread closes what has been idle for too long.
fn failures_and_evictions() {
    let world = World::new(2, &[1, 1, 2], Conduct { failing: 3, faltering: 3, ..WILLING });
    let mut threads: Vec<_> = (0..3)
        .map(|number| {
            let pool = world.pool(number);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, FOR_EVER) {
                        Ok(lease) => return_somehow(lease),
                        Err(refused) => assert!(matches!(refused, Refused::Failed(Failure::Final)), "{refused:?}"),
                    }
                }
            })
        })
        .collect();
    let aged = world.pool(2);
    threads.push(thread::spawn(move || {
        for _ in 0..2 {
            aged.close_aged();
            thread::yield_now();
        }
    }));
    join(threads);
    world.assert_at_rest();
}

/// The server has room for one session: whoever is refused has another pool's idle connection closed.
fn a_full_server() {
    let world = World::new(9, &[1, 2], Conduct { capacity: 1, ..WILLING });
    let threads = (0..3).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| return_somehow(acquire(&pool, FOR_EVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Time-outs come at whatever moment.
fn no_permit_is_lost_by_time_outs() {
    let world = World::new(1, &[1, 2], WILLING);
    let mut threads: Vec<_> = (0..4)
        .map(|number| {
            let pool = world.pool(number % 2);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, SOON) {
                        Ok(lease) => return_somehow(lease),
                        Err(Refused::InUse { .. } | Refused::Limited | Refused::Connecting { .. }) => {}
                        Err(refused) => panic!("{refused:?}"),
                    }
                }
            })
        })
        .collect();
    threads.push(thread::spawn(|| {
        for _ in 0..6 {
            thread::yield_now();
            sync::pass(SOON);
        }
    }));
    // Whoever waits when no other thread is left gets his time-out too.
    let (last, clock) = (Arc::new(()), Arc::new(()));
    let stop = Arc::downgrade(&last);
    let ticking = thread::spawn(move || {
        let _clock = clock;
        while stop.strong_count() > 0 {
            sync::pass(SOON);
            thread::yield_now();
        }
    });
    join(threads);
    drop(last);
    ticking.join().unwrap();
    world.assert_at_rest();
}

/// A pool is disposed of under its callers: they are served or told, and nothing stays open.
fn a_disposal_leaves_nothing() {
    let world = World::new(2, &[2, 1], WILLING);
    let mut threads: Vec<_> = (0..3)
        .map(|number| {
            let pool = world.pool(number % 2);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, FOR_EVER) {
                        Ok(lease) => return_somehow(lease),
                        Err(refused) => assert!(matches!(refused, Refused::Closed), "{refused:?}"),
                    }
                }
            })
        })
        .collect();
    let disposals = (0..2).map(|_| {
        let pool = world.pool(0);
        thread::spawn(move || {
            pool.close(sync::Instant::now() + FOR_EVER);
            assert!(pool.wait_until_drained(sync::Instant::now() + FOR_EVER));
            assert!(matches!(acquire(&pool, FOR_EVER), Err(Refused::Closed)));
        })
    });
    threads.extend(disposals);
    join(threads);
    world.pool(1).close(sync::Instant::now() + FOR_EVER);
    assert!(world.pool(1).wait_until_drained(sync::Instant::now() + FOR_EVER));
    assert_eq!(world.open(), 0);
    world.assert_at_rest();
}

/// Two threads that each have what the other wants: one is refused, the other served.
fn of_a_circle_one_is_refused() {
    let world = World::new(4, &[1, 1], WILLING);
    let refused = Arc::new(shuttle::sync::atomic::AtomicUsize::new(0));
    let both = Arc::new(shuttle::sync::Barrier::new(2));
    let threads = (0..2).map(|number| {
        let (mine, other) = (world.pool(number), world.pool(1 - number));
        let (refused, both) = (Arc::clone(&refused), Arc::clone(&both));
        thread::spawn(move || {
            let lease = acquire(&mine, FOR_EVER).unwrap();
            both.wait();
            match acquire(&other, FOR_EVER) {
                Ok(second) => drop(second),
                Err(told) => {
                    assert!(matches!(told, Refused::Deadlock { .. }), "{told:?}");
                    refused.fetch_add(1, shuttle::sync::atomic::Ordering::SeqCst);
                }
            }
            drop(lease);
        })
    });
    join(threads.collect());
    assert_eq!(refused.load(shuttle::sync::atomic::Ordering::SeqCst), 1);
    world.assert_at_rest();
}

/// One of the holders waits for nobody: whoever waits for it is served.
fn a_wait_that_can_end_is_not_refused() {
    let world = World::new(2, &[1, 1], WILLING);
    let (first, second) = (world.pool(0), world.pool(1));
    let mut threads = vec![thread::spawn(move || {
        let lease = acquire(&first, FOR_EVER).unwrap();
        drop(acquire(&second, FOR_EVER).unwrap());
        return_somehow(lease);
    })];
    threads.extend((0..2).map(|number| {
        let pool = world.pool(number);
        thread::spawn(move || return_somehow(acquire(&pool, FOR_EVER).unwrap()))
    }));
    join(threads);
    world.assert_at_rest();
}

#[test]
fn callers_of_one_pool() {
    try_orders(400, everybody_is_served);
}

#[test]
fn pools_under_one_limit() {
    try_orders(400, pools_give_way_to_each_other);
    try_orders(400, returns_and_connects_cross);
}

#[test]
fn connects_that_fail() {
    try_orders(400, failures_and_evictions);
}

#[test]
fn full_servers() {
    try_orders(400, a_full_server);
}

#[test]
fn time_outs() {
    try_orders(400, no_permit_is_lost_by_time_outs);
}

#[test]
fn disposal() {
    try_orders(400, a_disposal_leaves_nothing);
}

#[test]
fn circles() {
    try_orders(400, of_a_circle_one_is_refused);
    try_orders(400, a_wait_that_can_end_is_not_refused);
}

/// The model finds what it is there for: with any one of the first notifications lost, somebody waits for ever in some order.
#[test]
fn a_lost_notification_is_found() {
    let found = |model: fn(), lost: usize| {
        let mutant = move || {
            sync::reset(Some(lost));
            model();
        };
        catch_unwind(AssertUnwindSafe(|| shuttle::check_random(mutant, 2_000))).is_err()
    };
    for lost in 0..3 {
        assert!(found(everybody_is_served, lost), "number {lost}");
        assert!(found(pools_give_way_to_each_other, lost), "number {lost}");
    }
}
