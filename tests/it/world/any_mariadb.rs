//! MariaDB by the enum of connections.

world!(Mariadb, AnyConnection, Database::without_migrations().connect_with(connect));

fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    MysqlConnection::establish(url).map(AnyConnection::Mysql)
}

#[path = "../contexts.rs"]
mod contexts;
