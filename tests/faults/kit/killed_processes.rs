//! Processes that are killed at any point.

use std::thread;
use std::time::Duration;

use super::child::Run;
use super::server::Server;
use crate::fixtures::TestConnection;
use crate::for_each_database;

for_each_database!(crate::kit::server::Server; postgres, mariadb, sqlite =>
    leftovers_of_killed_processes_are_removed_and_nothing_else,
);

/// How long they live, in milliseconds: every other one from its first test on, the rest from the start of the process.
/// Two of five are killed while tests are under way in them.
const LIVES: [u64; 30] =
    [1, 73, 38, 12, 55, 27, 80, 5, 64, 19, 46, 33, 9, 70, 58, 2, 41, 24, 77, 14, 50, 36, 67, 7, 29, 61, 17, 44, 3, 79];

fn leftovers_of_killed_processes_are_removed_and_nothing_else<C: TestConnection>(server: &Server) {
    server.make_others();
    let mut holder = Run::start(server, "hold", &[]);
    holder.await_sign("holding");
    let (held, connections) = (server.left(), server.ways().len() as i64 + 1);
    assert!(held.len() >= server.ways().len() - 1, "{held:?}");
    let connections = if server.connections() == 0 { 0 } else { connections };
    server.assert_connections(connections);
    let mut leaving = 0;
    for (number, life) in LIVES.into_iter().enumerate() {
        let is_amid_tests = number % 5 < 2;
        let mut run = Run::start(server, if is_amid_tests { "hold" } else { "loop" }, &[]);
        if is_amid_tests {
            run.await_sign("holding");
        } else if number % 2 == 0 {
            run.await_sign("tested");
        }
        thread::sleep(Duration::from_millis(life));
        run.kill();
        leaving += usize::from(server.left().len() > held.len());
    }
    assert!(leaving > LIVES.len() / 3, "only {leaving} left something");
    // Until then their owners live.
    server.assert_connections(connections);
    server.succeed("one Database");
    server.assert_connections(connections);
    assert_eq!(server.left(), held);
    server.assert_others();
    holder.go_on();
    let holder = holder.ended();
    assert_eq!(holder.code(), Some(0), "{}", holder.said());
    server.assert_clean();
    server.assert_others();
}
