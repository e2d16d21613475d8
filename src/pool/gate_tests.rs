//! Tests of the gate. They are no part of it, because the model of the gate takes it as it is.

use std::panic::Location;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::gate::{Gate, Permit, Refused};
use super::ledger::Holder;

#[track_caller]
fn holder() -> Holder {
    Holder::new("test".into(), Location::caller(), Instant::now(), false)
}

fn gate<T>(size: usize) -> Arc<Gate<T>> {
    Arc::new(Gate::new(size, Arc::default()))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn until_waiting(gate: &Gate<u8>, waiting: usize) {
    while gate.counts().1 != waiting {
        std::thread::yield_now();
    }
}

#[test]
fn waiters_are_served_in_order() {
    let gate = gate::<u8>(1);
    let first = gate.acquire(holder(), soon()).expect("free");
    let (tell, served) = mpsc::channel();
    let threads: Vec<_> = (0..10)
        .map(|n| {
            let (gate, tell) = (Arc::clone(&gate), tell.clone());
            let waiting = gate.counts().1;
            let thread = std::thread::spawn({
                let gate = Arc::clone(&gate);
                move || {
                    let permit = gate.acquire(holder(), soon()).expect("in turn");
                    tell.send(n).expect("heard");
                    drop(permit);
                }
            });
            until_waiting(&gate, waiting + 1);
            thread
        })
        .collect();
    drop(first);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(served.try_iter().collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    assert_eq!(gate.counts(), (0, 0));
}

#[test]
fn what_only_the_caller_holds_is_not_waited_for() {
    let gate = gate::<u8>(1);
    let _held = gate.acquire(holder(), soon()).expect("free");
    assert!(matches!(gate.acquire(holder(), soon()), Err(Refused::Hopeless(holders)) if holders.len() == 1));
}

#[test]
fn closing_wakes_waiters() {
    let gate = gate::<u8>(1);
    let held = gate.acquire(holder(), soon()).expect("free");
    let waiter = std::thread::spawn({
        let gate = Arc::clone(&gate);
        move || gate.acquire(holder(), soon()).map(drop)
    });
    until_waiting(&gate, 1);
    gate.close();
    assert!(matches!(waiter.join().expect("no panic"), Err(Refused::Closed)));
    assert!(!gate.wait_until(Instant::now(), |holders| holders.is_empty()));
    drop(held);
    assert!(gate.wait_until(soon(), |holders| holders.is_empty()));
}

#[test]
fn no_permit_is_lost_when_waiters_give_up() {
    let gate = gate::<u8>(2);
    std::thread::scope(|scope| {
        for n in 0..8_u64 {
            let gate = &gate;
            scope.spawn(move || {
                for round in 0..500 {
                    let patience = Duration::from_micros((n * 37 + round * 13) % 200);
                    if let Ok(permit) = gate.acquire(holder(), Instant::now() + patience) {
                        std::thread::yield_now();
                        drop(permit);
                    }
                }
            });
        }
    });
    assert_eq!(gate.counts(), (0, 0));
    let both = [gate.try_acquire(holder()), gate.try_acquire(holder())];
    assert!(both.iter().all(Option::is_some));
}

#[test]
fn who_lines_up_is_served_before_those_who_have_no_permit() {
    let gate = gate::<u8>(2);
    let mut given = gate.acquire(holder(), soon()).expect("free");
    let mut other = gate.acquire(holder(), soon()).expect("free");
    let line = given.line_up(holder()).expect("open").expect("nothing was left");
    let waiter = std::thread::spawn({
        let gate = Arc::clone(&gate);
        move || gate.acquire(holder(), soon()).expect("in turn").item
    });
    until_waiting(&gate, 2);
    other.item = Some(1);
    drop(other);
    assert_eq!(line.wait(soon()).expect("served").item, Some(1));
    given.item = Some(2);
    drop(given);
    let served = waiter.join().expect("no panic");
    assert!(served.is_some(), "by either");
    assert_eq!(gate.counts(), (0, 0));
}

#[test]
fn a_permit_with_nothing_on_it_goes_to_its_heir_or_to_who_has_none() {
    let gate = gate::<u8>(2);
    let mut first = gate.acquire(holder(), soon()).expect("free");
    let mut second = gate.acquire(holder(), soon()).expect("free");
    let line = first.line_up(holder()).expect("open").expect("nothing was left");
    let other = second.line_up(holder()).expect("open").expect("nothing was left");
    first.bequeath(line.ticket());
    drop(first);
    assert_eq!(line.wait(soon()).expect("its own").item, None);
    // The first is free again; its place in line is another's business.
    assert_eq!(gate.counts(), (1, 1));
    drop(second);
    assert_eq!(gate.counts(), (0, 1), "who lined up needs no permit");
    let newcomer = gate.acquire(holder(), soon()).expect("free");
    assert_eq!(newcomer.item, None);
    drop(other);
    drop(newcomer);
    assert_eq!(gate.counts(), (0, 0));
}

#[test]
fn who_leaves_the_line_leaves_nothing_behind() {
    let gate = gate::<u8>(1);
    let mut permit = gate.acquire(holder(), soon()).expect("free");
    let line = permit.line_up(holder()).expect("open").expect("nothing was left");
    permit.item = Some(7);
    drop(permit);
    // Served, and gone before it was taken.
    drop(line);
    assert_eq!(gate.counts(), (0, 0));
    let mut permit = gate.acquire(holder(), soon()).expect("free");
    assert_eq!(permit.item.take(), Some(7));
    let line = permit.line_up(holder()).expect("open").expect("nothing was left");
    gate.close();
    assert!(matches!(line.wait(soon()), Err(Refused::Closed)));
    assert!(matches!(permit.line_up(holder()), Err(Refused::Closed)));
}

/// Notes how many permits are out when it is dropped.
struct Noting(Arc<Gate<Noting>>, mpsc::Sender<usize>);

impl Drop for Noting {
    fn drop(&mut self) {
        self.1.send(self.0.counts().0).expect("heard");
    }
}

#[test]
fn what_is_not_kept_is_gone_before_its_permit_is_free() {
    let gate = gate(2);
    let (tell, dropped) = mpsc::channel();
    let held = gate.acquire(holder(), soon()).expect("free");
    let mut leaving = gate.acquire(holder(), soon()).expect("free");
    leaving.item = Some(Noting(Arc::clone(&gate), tell));
    gate.close();
    drop(leaving);
    assert_eq!((dropped.try_recv(), gate.counts()), (Ok(2), (1, 0)));
    drop(held);
}

#[test]
fn what_is_left_goes_to_the_next() {
    let gate = gate(3);
    let mut all: Vec<Permit<u8>> = (0..3).map(|_| gate.acquire(holder(), soon()).expect("free")).collect();
    assert!(all.iter().all(|permit| permit.item.is_none()));
    let (mut last, mut second) = (all.pop().expect("three"), all.pop().expect("three"));
    (second.item, last.item) = (Some(2), Some(3));
    drop((second, last));
    // Those with something come first, what was left last before all.
    drop(all);
    let mut three = gate.acquire(holder(), soon()).expect("free");
    assert_eq!(three.item, Some(3));
    three.item = None;
    three.refill();
    assert_eq!(three.item, Some(2));
    let empty = [gate.acquire(holder(), soon()), gate.acquire(holder(), soon())];
    assert!(empty.iter().flatten().all(|permit| permit.item.is_none()) && empty.iter().flatten().count() == 2);

    let waiter = std::thread::spawn({
        let gate = Arc::clone(&gate);
        move || gate.acquire(holder(), soon()).expect("in turn").item
    });
    until_waiting(&gate, 1);
    drop(three);
    assert_eq!(waiter.join().expect("no panic"), Some(2));
}

#[track_caller]
fn take(gate: &Arc<Gate<u8>>, since: Instant) -> Permit<u8> {
    let holder = Holder::new("test".into(), Location::caller(), since, false);
    gate.acquire(holder, since + Duration::from_secs(60)).expect("free")
}

#[test]
fn each_is_told_once_and_the_next_is_known() {
    let (gate, start) = (gate::<u8>(4), Instant::now());
    let after = |millis| start + Duration::from_millis(millis);
    let threshold = Duration::from_millis(100);
    let look = |now| {
        let (told, pause) = gate.overdue(after(now), threshold);
        (told.len(), pause.as_millis())
    };
    assert_eq!(look(0), (0, 100));
    let (_first, second) = (take(&gate, start), take(&gate, after(30)));
    assert_eq!(look(99), (0, 1));
    assert_eq!(look(100), (1, 30));
    assert_eq!(look(131), (1, 100));
    assert_eq!(look(500), (0, 100));
    drop(second);
    let third = take(&gate, after(500));
    third.seek(true);
    assert_eq!(look(700), (0, 100), "it has none yet");
    third.seek(false);
    assert_eq!(look(700), (1, 100));
}

#[test]
fn a_label_stays_with_its_item() {
    let (gate, now) = (gate::<u8>(3), Instant::now());
    let (mut first, mut second) = (take(&gate, now), take(&gate, now));
    for (permit, label) in [(&mut first, 10), (&mut second, 20)] {
        permit.item = Some(0);
        permit.label(Some(label));
    }
    let labels = || {
        let held = |(label, holder): (u64, Option<Holder>)| (label, holder.is_some());
        let mut all: Vec<_> = gate.labels().into_iter().map(held).collect();
        all.sort_unstable();
        all
    };
    assert_eq!(labels(), [(10, true), (20, true)]);
    drop(second);
    assert_eq!(labels(), [(10, true), (20, false)]);
    // Its own item is gone, and it takes the one of the free seat.
    first.item = None;
    first.refill();
    assert_eq!((labels(), gate.holders()[0].session), (vec![(20, true)], Some(20)));
    drop(first);
    let mut last = take(&gate, now);
    assert_eq!((last.item, labels()), (Some(0), vec![(20, true)]));
    last.item = None;
    drop(last);
    assert_eq!(labels(), []);
}
