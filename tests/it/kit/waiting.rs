//! Tests that wait for connections which their own process has.

use std::thread;
use std::time::Duration;

use super::*;

#[test]
fn who_wants_all_connections_gets_those_that_rest() {
    if !enabled(Kind::Postgres) {
        return;
    }
    // Nobody else has connections of this one.
    let server = support::Postgres::start();
    let config = Config::new(server.url());
    let setup = |isolation| {
        let setup = TestSetup::of(PgConnection::db()).config(config.clone()).isolation(isolation);
        setup.patience(Duration::from_secs(20))
    };
    let database = setup(TestIsolation::Database).max_size(1).start().unwrap();
    let lane = setup(TestIsolation::Rollback).start().unwrap();
    thread::scope(|scope| {
        let all = scope.spawn(|| setup(TestIsolation::Database).max_size(100).start()?.finish());
        thread::sleep(Duration::from_millis(500));
        assert!(!all.is_finished(), "there are two tests whose connections it wants");
        lane.finish().unwrap();
        database.finish().unwrap();
        all.join().unwrap().unwrap();
    });
}

/// The first test of a process reserves one connection more, for the session that owns the databases. The tests after it need none.
#[test]
fn each_test_of_a_process_has_the_connections_that_it_wants() {
    if !enabled(Kind::Postgres) {
        return;
    }
    // Tests of other servers give nothing back here.
    let server = support::Postgres::start();
    let config = Config::new(server.url());
    for isolation in [TestIsolation::Database, TestIsolation::Schema] {
        for number in 1..=3 {
            let setup = TestSetup::of(PgConnection::db()).config(config.clone()).isolation(isolation).max_size(2);
            let test = setup.start().unwrap();
            assert_eq!(test.status().max_size, 2, "test {number}, {isolation:?}");
            test.finish().unwrap();
        }
    }
}
