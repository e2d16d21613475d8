//! SQLite by the enum of connections.

per_database!($ any_sqlite, Sqlite, AnyConnection, Database::without_migrations().connect_with(connect));

fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    SqliteConnection::establish(url).map(AnyConnection::Sqlite)
}

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
#[path = "../settings.rs"]
mod settings;
#[path = "../transactions.rs"]
mod transactions;
#[path = "../unit.rs"]
mod unit;
