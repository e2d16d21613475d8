//! PostgreSQL.

world!(Postgres, PgConnection, Database::without_migrations());

#[path = "../contexts.rs"]
mod contexts;
