//! Processes that end as they should not, by their own doing: the next run is clean.

use diesel_session::testing::TestIsolation;

use super::server::Server;
use crate::fixtures::TestConnection;
use crate::for_each_database;

for_each_database!(crate::kit::server::Server; postgres, mariadb, sqlite =>
    panic_in_a_test_leaves_nothing,
    leaked_session_leaves_nothing_to_the_next_run,
    exit_in_a_test_leaves_nothing_to_the_next_run,
    raw_commit_in_a_rolled_back_test_leaves_nothing,
    exit_in_a_fixture_leaves_no_half_filled_database,
    program_without_migrations_leaves_nothing,
);

/// How the process ends where a test fails.
const FAILED: i32 = 101;

/// In each isolation, and the next run; how many had left something.
fn ends(server: &Server, verb: &str, code: i32) -> usize {
    let mut leaving = 0;
    for way in server.ways() {
        let run = server.run(&format!("{verb} {way:?}"));
        assert_eq!(run.code(), Some(code), "{way:?}: {}", run.said());
        server.assert_connections(0);
        leaving += server.left().len().min(1);
        server.succeed("one Database");
        server.assert_clean();
        // What is kept is as it was.
        server.succeed(&format!("one {way:?}"));
        server.assert_clean();
    }
    leaving
}

fn panic_in_a_test_leaves_nothing<C: TestConnection>(server: &Server) {
    assert_eq!(ends(server, "panic", FAILED), 0, "a panic leaves nothing to the next run");
}

fn leaked_session_leaves_nothing_to_the_next_run<C: TestConnection>(server: &Server) {
    ends(server, "leak", FAILED);
}

fn exit_in_a_test_leaves_nothing_to_the_next_run<C: TestConnection>(server: &Server) {
    assert_eq!(ends(server, "exit", 3), server.ways().len() - 1, "all but the one that is rolled back");
}

/// In a process that has not made the database in which it does that.
fn raw_commit_in_a_rolled_back_test_leaves_nothing<C: TestConnection>(server: &Server) {
    let rollback = format!("{:?}", TestIsolation::Rollback);
    server.succeed(&format!("one {rollback}"));
    let run = server.run(&format!("commit {rollback}"));
    assert_eq!(run.code(), Some(FAILED), "{}", run.said());
    assert!(run.said().contains("[DS501]") || run.said().contains("COMMIT"), "{}", run.said());
    server.succeed(&format!("one {rollback}"));
    server.assert_clean();
}

/// A half-filled database is not used.
fn exit_in_a_fixture_leaves_no_half_filled_database<C: TestConnection>(server: &Server) {
    for way in server.ways() {
        let run = server.run(&format!("leave_while_filling {way:?}"));
        assert_eq!(run.code(), Some(3), "{way:?}: {}", run.said());
        server.assert_connections(0);
        server.succeed(&format!("fill {way:?}"));
        server.succeed(&format!("fill {way:?}"));
        server.succeed("one Database");
        server.assert_clean();
    }
}

fn program_without_migrations_leaves_nothing<C: TestConnection>(server: &Server) {
    for way in server.ways() {
        server.succeed(&format!("bare {way:?}"));
        server.succeed(&format!("bare {way:?}"));
        server.assert_clean();
    }
}
