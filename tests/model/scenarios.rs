//! Scenarios whose outcome must not depend on the order of events.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::Rng;
use shuttle::thread;

use crate::pool::imitation::{Failure, ServerBehavior};
use crate::pool::waiter::Refused;
use crate::pool::world::{CheckedOut, FOREVER, WITHOUT_FAILURES, World, acquire, break_connection};
use crate::sync;

const SOON: Duration = Duration::from_millis(5);

fn rounds(default: usize) -> usize {
    let wanted = std::env::var("DIESEL_SESSION_MODEL_ROUNDS").ok();
    wanted.map_or(default, |rounds| rounds.parse().expect("a number of rounds"))
}

fn check_orders(default: usize, model: impl Fn() + Send + Sync + Clone + 'static) {
    let from_reset = move || {
        sync::reset(None);
        model();
    };
    shuttle::check_random(from_reset.clone(), rounds(default));
    shuttle::check_pct(from_reset, rounds(default), 4);
}

fn join(threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn coin_flip() -> bool {
    shuttle::rand::thread_rng().r#gen()
}

/// Advances the clock or not, and checks the connection in, healthy or broken.
fn check_in_at_random(mut checked_out: CheckedOut) {
    if coin_flip() {
        sync::advance(Duration::from_micros(600));
    }
    if coin_flip() {
        break_connection(&mut checked_out);
    }
    drop(checked_out);
}

/// One pool with more callers than connections. Some connections are broken at their checkin.
fn every_caller_is_served() {
    let world = World::new(2, &[2], WITHOUT_FAILURES);
    let threads = (0..4).map(|_| {
        let pool = world.pool(0);
        thread::spawn(move || (0..2).for_each(|_| check_in_at_random(acquire(&pool, FOREVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Two pools under a limit of one connection. Each evicts the connection of the other.
fn pools_evict_for_each_other() {
    let world = World::new(1, &[1, 2], WITHOUT_FAILURES);
    let threads = (0..4).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| check_in_at_random(acquire(&pool, FOREVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Two pools under a limit of two connections. A checkin may serve a caller while its own connect is running.
fn checkins_and_connects_overlap() {
    let world = World::new(2, &[2, 2], WITHOUT_FAILURES);
    let threads = (0..5).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| check_in_at_random(acquire(&pool, FOREVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Connects fail for good or for the moment, and another thread closes connections that are too old.
fn connects_fail_and_connections_age() {
    let world = World::new(2, &[1, 1, 2], ServerBehavior { failing: 3, faltering: 3, ..WITHOUT_FAILURES });
    let mut threads: Vec<_> = (0..3)
        .map(|number| {
            let pool = world.pool(number);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, FOREVER) {
                        Ok(checked_out) => check_in_at_random(checked_out),
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

/// The server allows one session. A refused pool evicts the idle connection of another pool.
fn full_server_evicts() {
    let world = World::new(9, &[1, 2], ServerBehavior { capacity: 1, ..WITHOUT_FAILURES });
    let threads = (0..3).map(|number| {
        let pool = world.pool(number % 2);
        thread::spawn(move || (0..2).for_each(|_| check_in_at_random(acquire(&pool, FOREVER).unwrap())))
    });
    join(threads.collect());
    world.assert_at_rest();
}

/// Timeouts happen at any moment.
fn timeouts_lose_no_permit() {
    let world = World::new(1, &[1, 2], WITHOUT_FAILURES);
    let mut threads: Vec<_> = (0..4)
        .map(|number| {
            let pool = world.pool(number % 2);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, SOON) {
                        Ok(checked_out) => check_in_at_random(checked_out),
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
            sync::advance(SOON);
        }
    }));
    // A waiter also gets its timeout if no other thread is left to advance the clock.
    let (last, clock) = (Arc::new(()), Arc::new(()));
    let stop = Arc::downgrade(&last);
    let ticking = thread::spawn(move || {
        let _clock = clock;
        while stop.strong_count() > 0 {
            sync::advance(SOON);
            thread::yield_now();
        }
    });
    join(threads);
    drop(last);
    ticking.join().unwrap();
    world.assert_at_rest();
}

/// A pool is disposed of while callers use it. Each caller is served or refused, and no connection stays open.
fn disposal_closes_everything() {
    let world = World::new(2, &[2, 1], WITHOUT_FAILURES);
    let mut threads: Vec<_> = (0..3)
        .map(|number| {
            let pool = world.pool(number % 2);
            thread::spawn(move || {
                for _ in 0..2 {
                    match acquire(&pool, FOREVER) {
                        Ok(checked_out) => check_in_at_random(checked_out),
                        Err(refused) => assert!(matches!(refused, Refused::Closed), "{refused:?}"),
                    }
                }
            })
        })
        .collect();
    let disposals = (0..2).map(|_| {
        let pool = world.pool(0);
        thread::spawn(move || {
            pool.close(sync::Instant::now() + FOREVER);
            assert!(pool.wait_until_drained(sync::Instant::now() + FOREVER));
            assert!(matches!(acquire(&pool, FOREVER), Err(Refused::Closed)));
        })
    });
    threads.extend(disposals);
    join(threads);
    world.pool(1).close(sync::Instant::now() + FOREVER);
    assert!(world.pool(1).wait_until_drained(sync::Instant::now() + FOREVER));
    assert_eq!(world.open(), 0);
    world.assert_at_rest();
}

/// Each of two threads holds the connection that the other one wants. One is refused, and the other one is served.
fn deadlock_refuses_one_thread() {
    let world = World::new(4, &[1, 1], WITHOUT_FAILURES);
    let refused = Arc::new(shuttle::sync::atomic::AtomicUsize::new(0));
    let both = Arc::new(shuttle::sync::Barrier::new(2));
    let threads = (0..2).map(|number| {
        let (own, other) = (world.pool(number), world.pool(1 - number));
        let (refused, both) = (Arc::clone(&refused), Arc::clone(&both));
        thread::spawn(move || {
            let checked_out = acquire(&own, FOREVER).unwrap();
            both.wait();
            match acquire(&other, FOREVER) {
                Ok(second) => drop(second),
                Err(refusal) => {
                    assert!(matches!(refusal, Refused::Deadlock { .. }), "{refusal:?}");
                    refused.fetch_add(1, shuttle::sync::atomic::Ordering::SeqCst);
                }
            }
            drop(checked_out);
        })
    });
    join(threads.collect());
    assert_eq!(refused.load(shuttle::sync::atomic::Ordering::SeqCst), 1);
    world.assert_at_rest();
}

/// One of the holders does not wait, so every waiter is served.
fn wait_that_can_end_is_served() {
    let world = World::new(2, &[1, 1], WITHOUT_FAILURES);
    let (first, second) = (world.pool(0), world.pool(1));
    let mut threads = vec![thread::spawn(move || {
        let checked_out = acquire(&first, FOREVER).unwrap();
        drop(acquire(&second, FOREVER).unwrap());
        check_in_at_random(checked_out);
    })];
    threads.extend((0..2).map(|number| {
        let pool = world.pool(number);
        thread::spawn(move || check_in_at_random(acquire(&pool, FOREVER).unwrap()))
    }));
    join(threads);
    world.assert_at_rest();
}

#[test]
fn pool_serves_all_callers() {
    check_orders(400, every_caller_is_served);
}

#[test]
fn pools_keep_their_common_limit() {
    check_orders(400, pools_evict_for_each_other);
    check_orders(400, checkins_and_connects_overlap);
}

#[test]
fn pool_recovers_from_failed_connects() {
    check_orders(400, connects_fail_and_connections_age);
}

#[test]
fn pool_evicts_on_a_full_server() {
    check_orders(400, full_server_evicts);
}

#[test]
fn timeout_loses_no_permit() {
    check_orders(400, timeouts_lose_no_permit);
}

#[test]
fn disposal_closes_all_connections() {
    check_orders(400, disposal_closes_everything);
}

#[test]
fn wait_graph_refuses_only_deadlocks() {
    check_orders(400, deadlock_refuses_one_thread);
    check_orders(400, wait_that_can_end_is_served);
}

/// The model finds a lost notification: with any one of the first notifications lost, a thread waits forever in some
/// order.
#[test]
fn model_finds_a_lost_notification() {
    let found = |model: fn(), lost: usize| {
        let mutant = move || {
            sync::reset(Some(lost));
            model();
        };
        catch_unwind(AssertUnwindSafe(|| shuttle::check_random(mutant, 2_000))).is_err()
    };
    for lost in 0..3 {
        assert!(found(every_caller_is_served, lost), "number {lost}");
        assert!(found(pools_evict_for_each_other, lost), "number {lost}");
    }
}
