//! What the end of a suite says is still there.

use std::sync::mpsc;

use diesel::SqliteConnection;
use diesel_session::testing::{TestSetup, assert_clean};
use diesel_session::{Config, Error};

use crate::fixtures::{Conn, INSERT, Speak};

#[test]
fn the_end_of_a_suite_lists_what_is_left() {
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
    let Err(Error::TestLeftovers { left, .. }) = assert_clean() else { panic!("something is left") };
    let all = left.join("\n");
    for part in [
        "test `unfinished`, begun at tests/faults/kit_clean.rs",
        "a session opened at tests/faults/kit_clean.rs",
        "of test `unfinished`",
        "a connection of app `unfinished` at tests/faults/kit_clean.rs",
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
