//! SQLite by the enum of connections.

world!(Sqlite, AnyConnection, Database::without_migrations().connect_with(connect));

fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    SqliteConnection::establish(url).map(AnyConnection::Sqlite)
}

#[path = "../contexts.rs"]
mod contexts;
