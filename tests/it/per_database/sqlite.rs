//! SQLite.

per_database!($ sqlite, Sqlite, SqliteConnection, Database::without_migrations());

#[path = "../begin_eagerly.rs"]
mod begin_eagerly;
#[path = "../commit_policy.rs"]
mod commit_policy;
#[path = "../connection_guard.rs"]
mod connection_guard;
#[path = "../contexts.rs"]
mod contexts;
#[path = "../ended_by_database.rs"]
mod ended_by_database;
#[path = "../forgotten.rs"]
mod forgotten;
#[path = "../hooks.rs"]
mod hooks;
#[path = "../invalidation.rs"]
mod invalidation;
#[path = "../queries.rs"]
mod queries;
#[path = "../retry.rs"]
mod retry;
#[path = "../returning.rs"]
mod returning;
#[path = "../settings.rs"]
mod settings;
#[path = "../transactions.rs"]
mod transactions;
#[path = "../unions.rs"]
mod unions;
#[path = "../unit.rs"]
mod unit;
