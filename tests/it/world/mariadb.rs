//! MariaDB.

world!(Mariadb, MysqlConnection, Database::without_migrations());

#[path = "../contexts.rs"]
mod contexts;
#[path = "../ended_by_database.rs"]
mod ended_by_database;
#[path = "../hooks.rs"]
mod hooks;
#[path = "../lending.rs"]
mod lending;
#[path = "../locks.rs"]
mod locks;
#[path = "../policy.rs"]
mod policy;
#[path = "../queries.rs"]
mod queries;
#[path = "../retry.rs"]
mod retry;
#[path = "../settings.rs"]
mod settings;
#[path = "../spoiled.rs"]
mod spoiled;
#[path = "../transactions.rs"]
mod transactions;
#[path = "../unions.rs"]
mod unions;
#[path = "../unit.rs"]
mod unit;
