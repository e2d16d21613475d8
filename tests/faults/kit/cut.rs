//! A test that is rolled back whose connection the server ends.

use super::child::Run;
use super::server::Server;
use crate::support::{Kind, enabled};

#[test]
fn postgres() {
    if enabled(Kind::Postgres) {
        it_fails_by_name_and_the_next_one_does_not(&Server::postgres());
    }
}

#[test]
fn mysql() {
    if enabled(Kind::Mysql) {
        it_fails_by_name_and_the_next_one_does_not(&Server::mysql());
    }
}

fn it_fails_by_name_and_the_next_one_does_not(server: &Server) {
    let mut run = Run::start(server, "be_cut", &[]);
    for sign in ["begun", "begun", "between"] {
        run.await_sign(sign);
        server.cut_lanes();
        run.go_on();
    }
    let run = run.ended();
    assert_eq!(run.code(), Some(0), "{}", run.said());
    server.assert_clean();
}
