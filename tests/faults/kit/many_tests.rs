//! Two hundred tests, eight at a time, on a server with twenty connections.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::child::{AT_A_TIME, TESTS};
use super::server::{Server, chosen};
use crate::fixtures::TestConnection;
use crate::fixtures::threads::together;
use crate::for_each_database;

for_each_database!(crate::kit::server::Server; postgres, mariadb, sqlite =>
    two_hundred_tests_in_threads_leave_nothing,
    two_hundred_tests_in_processes_leave_nothing,
);

fn two_hundred_tests_in_threads_leave_nothing<C: TestConnection>(server: &Server) {
    server.succeed("crowd");
    server.assert_clean();
}

fn two_hundred_tests_in_processes_leave_nothing<C: TestConnection>(server: &Server) {
    let (next, url) = (AtomicUsize::new(0), server.url());
    together(AT_A_TIME, |_| {
        while let number @ 0..TESTS = next.fetch_add(1, Ordering::Relaxed) {
            server.succeed(&format!("one {:?}", chosen(&url, number)));
        }
    });
    server.assert_clean();
}
