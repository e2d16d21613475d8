//! Two hundred tests, eight at a time, on a server with twenty connections.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::child::{AT_A_TIME, TESTS};
use super::server::{Server, chosen};
use super::with_each_server;
use crate::fixtures::Conn;
use crate::fixtures::threads::together;

with_each_server!(in_threads, in_a_process_each);

fn in_threads<C: Conn>(server: &Server) {
    server.succeed("crowd");
    server.assert_clean();
}

fn in_a_process_each<C: Conn>(server: &Server) {
    let (next, url) = (AtomicUsize::new(0), server.url());
    together(AT_A_TIME, |_| {
        while let number @ 0..TESTS = next.fetch_add(1, Ordering::Relaxed) {
            server.succeed(&format!("one {:?}", chosen(&url, number)));
        }
    });
    server.assert_clean();
}
