//! Tests that fail while databases are to be kept.

use diesel_session::testing::TestIsolation;

use super::child::Run;
use super::server::Server;
use crate::fixtures::{COUNT, TestConnection};
use crate::for_each_database;
use crate::support::{PASSWORD, ROLE, text};

for_each_database!(crate::kit::server::Server; postgres, mariadb, sqlite =>
    failed_test_keeps_its_database_until_a_run_that_keeps_nothing,
);

fn failed_test_keeps_its_database_until_a_run_that_keeps_nothing<C: TestConnection>(server: &Server) {
    let fail = |way: &TestIsolation| {
        let run = Run::start(server, &format!("fail {way:?}"), &[("DIESEL_SESSION_KEEP", "1")]).ended();
        assert_eq!(run.code(), Some(101), "{}", run.said());
        let told = run.said().lines().find_map(|line| line.split_once("its database is kept")?.1.split_once(": "));
        told.map(|(_, url)| url.trim().to_owned())
    };
    let kept: Vec<_> = server.ways().iter().filter_map(fail).collect();
    // Of one that is rolled back there is nothing to keep.
    assert_eq!(kept.len(), server.ways().len() - 1);
    server.assert_connections(0);
    let left = server.left();
    assert_eq!(left.len(), kept.len(), "{left:?}");
    let password = text::percent_encoded(PASSWORD);
    for url in &kept {
        assert!(!url.contains(PASSWORD) && !url.contains(&password), "{url}");
        assert!(left.iter().any(|name| url.contains(name)), "{url}, and {left:?}");
        let url = url.replacen(&format!("{ROLE}@"), &format!("{ROLE}:{password}@"), 1);
        assert_eq!(C::establish(&url).unwrap().number(COUNT).unwrap(), 1);
    }
    server.assert_connections(0);
    server.succeed("one Database");
    server.assert_clean();
}
