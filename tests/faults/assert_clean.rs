//! `assert_clean` at the end of a suite.

use std::sync::mpsc;

use diesel::SqliteConnection;
use diesel_session::testing::{TestSetup, assert_clean};
use diesel_session::{Config, ErrorKind};

use crate::fixtures::{INSERT, SessionExt, TestConnection};

#[test]
fn assert_clean_lists_unfinished_tests_and_held_connections() {
    type C = SqliteConnection;
    assert_clean().unwrap();
    let setup = || TestSetup::of(C::db()).config(Config::new(":memory:"));
    let test = setup().named("unfinished").start().unwrap();
    let session = test.open_session().unwrap();
    session.send(INSERT).unwrap();
    let (end, ends) = mpsc::channel::<()>();
    let leaky = setup().named("leaky").start().unwrap();
    let app = leaky.app().clone();
    let (begun, begins) = mpsc::channel();
    let thread = std::thread::Builder::new().name("sleeper".into()).spawn(move || {
        let session = app.open_session().unwrap();
        begun.send(()).unwrap();
        // Until the test lets it go.
        let _ = ends.recv();
        drop(session);
    });
    begins.recv().unwrap();
    leaky.finish().unwrap();
    let error = assert_clean().expect_err("something is left");
    assert_eq!(error.kind(), ErrorKind::TestLeftovers, "{error}");
    let all = error.to_string();
    for part in [
        "test `unfinished`, begun at tests/faults/assert_clean.rs",
        "a session opened at tests/faults/assert_clean.rs",
        "of test `unfinished`",
        "a connection of app `unfinished` at tests/faults/assert_clean.rs",
        "in a transaction",
        "on thread sleeper",
        "of test `leaky`",
    ] {
        assert!(all.contains(part), "{part} in\n{all}");
    }
    drop(session);
    test.finish().unwrap();
    drop(end);
    thread.unwrap().join().unwrap();
    assert_clean().unwrap();
}
