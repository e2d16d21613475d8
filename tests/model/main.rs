//! The core of the pool under a scheduler that tries many orders of events. Admission, waiters, growth, the connection
//! limit and the wait-for graph are the library's own files. `sync.rs` replaces their synchronisation primitives, and
//! `imitation.rs` replaces r2d2.
//!
//! Time passes only if a thread advances the clock. So a lost wake-up is a deadlock, which the scheduler reports, and
//! not a timeout. `DIESEL_SESSION_MODEL_ROUNDS=100000 cargo test --all-features --test model` tries more orders.

// The model uses only a part of the library's files.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

mod error;
mod pool;
mod scenarios;
mod sync;
mod wording;
