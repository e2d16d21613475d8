//! Processes that end as they should not, by their own doing: the next run is clean.

use diesel_session::testing::TestIsolation;

use super::server::Server;
use super::with_each_server;
use crate::fixtures::Conn;

with_each_server!(
    a_panic,
    a_leak,
    an_exit,
    a_commit_in_a_test_that_is_rolled_back,
    an_exit_while_a_database_is_filled,
    a_program_without_migrations,
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

fn a_panic<C: Conn>(server: &Server) {
    assert_eq!(ends(server, "panic", FAILED), 0, "a panic leaves nothing to the next run");
}

fn a_leak<C: Conn>(server: &Server) {
    ends(server, "leak", FAILED);
}

fn an_exit<C: Conn>(server: &Server) {
    assert_eq!(ends(server, "exit", 3), server.ways().len() - 1, "all but the one that is rolled back");
}

/// In a process that has not made the database in which it does that.
fn a_commit_in_a_test_that_is_rolled_back<C: Conn>(server: &Server) {
    let rollback = format!("{:?}", TestIsolation::Rollback);
    server.succeed(&format!("one {rollback}"));
    let run = server.run(&format!("commit {rollback}"));
    assert_eq!(run.code(), Some(FAILED), "{}", run.said());
    assert!(run.said().contains("[DS501]") || run.said().contains("COMMIT"), "{}", run.said());
    server.succeed(&format!("one {rollback}"));
    server.assert_clean();
}

/// Nobody takes what is half of it for the whole.
fn an_exit_while_a_database_is_filled<C: Conn>(server: &Server) {
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

fn a_program_without_migrations<C: Conn>(server: &Server) {
    for way in server.ways() {
        server.succeed(&format!("bare {way:?}"));
        server.succeed(&format!("bare {way:?}"));
        server.assert_clean();
    }
}
