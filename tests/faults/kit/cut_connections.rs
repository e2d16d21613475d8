//! A test that is rolled back whose connection the server ends.

use super::child::Run;
use super::server::Server;
use crate::fixtures::TestConnection;
use crate::for_each_database;

for_each_database!(crate::kit::server::Server; postgres, mariadb =>
    rolled_back_test_with_an_ended_session_fails_by_name,
);

fn rolled_back_test_with_an_ended_session_fails_by_name<C: TestConnection>(server: &Server) {
    let mut run = Run::start(server, "be_cut", &[]);
    for sign in ["begun", "begun", "between"] {
        run.await_sign(sign);
        server.end_sessions_of_rolled_back_tests();
        run.go_on();
    }
    let run = run.ended();
    assert_eq!(run.code(), Some(0), "{}", run.said());
    server.assert_clean();
}
