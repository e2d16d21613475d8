//! SQLite.

world!(Sqlite, SqliteConnection, Database::without_migrations());

#[path = "../contexts.rs"]
mod contexts;
