//! MariaDB.

world!(Mariadb, MysqlConnection, Database::without_migrations());

#[path = "../contexts.rs"]
mod contexts;
