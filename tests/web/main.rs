//! The guestbook as its visitors use it, on every database: through a real browser, and by many at one time.
//!
//! `cargo test --all-features --test web -- --test-threads=1`; the pictures are in `target/screenshots`.

// The lint does not take the functions that tests call for tests.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[path = "../support/mod.rs"]
mod support;

#[path = "../fixtures/mod.rs"]
mod fixtures;

mod bodies;
mod browser;
mod client;
mod clock;
mod crowd;
mod element;
mod guestbook;
mod service;
mod story;
