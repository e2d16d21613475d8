//! The core of the pool under a scheduler that tries orders of events. Admission, growth, the connection limit and the wait-for
//! graph are the library's own files. What they are synchronised with is `sync.rs` here, and r2d2 is imitated by `storage.rs`.
//!
//! Time passes only if a thread says so, so a lost wake-up is a deadlock, which the scheduler reports, and not a time-out.
//! `DIESEL_SESSION_MODEL_ROUNDS=100000 cargo test --all-features --test model` looks at more orders.

// The library's files are used in part.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

mod error;
mod pool;
mod scenarios;
mod sync;
mod wording;
