//! Tests that wait for connections of their own process.

use std::thread;
use std::time::Duration;

use super::*;

for_each_database!(only postgres =>
    test_that_needs_all_connections_gets_the_idle_ones,
    each_test_of_a_process_gets_its_connections,
);

fn test_that_needs_all_connections_gets_the_idle_ones() {
    // No other test has connections to this server.
    let server = support::Postgres::start();
    let config = Config::new(server.url());
    let setup = |isolation| {
        let setup = TestSetup::of(PgConnection::db()).config(config.clone()).isolation(isolation);
        setup.patience(Duration::from_secs(20))
    };
    let database = setup(TestIsolation::Database).max_size(1).start().unwrap();
    let rolled_back = setup(TestIsolation::Rollback).start().unwrap();
    thread::scope(|scope| {
        let all = scope.spawn(|| setup(TestIsolation::Database).max_size(100).start()?.finish());
        // An absence can only be seen in a time.
        thread::sleep(Duration::from_millis(500));
        assert!(!all.is_finished(), "there are two tests whose connections it wants");
        rolled_back.finish().unwrap();
        database.finish().unwrap();
        all.join().unwrap().unwrap();
    });
}

/// The first test of a process reserves one connection more, for the session that owns the databases. The tests after
/// it need none.
fn each_test_of_a_process_gets_its_connections() {
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
