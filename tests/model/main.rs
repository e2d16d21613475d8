//! The pool's parts that wait for each other, under a scheduler that tries orders of events: gate, limit, orders and the account of
//! who waits for whom are the library's own files; what they are synchronised with is `sync.rs` here, and r2d2 is a vector.
//!
//! Time passes only where a thread says so, so a lost wake-up is a deadlock, which the scheduler reports, and not a time-out.
//! `DIESEL_SESSION_MODEL_ROUNDS=100000 cargo test --all-features --test model` looks at more orders.

// The library's files are used in part.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

mod error;
mod pool;
mod scenarios;
mod wording;
