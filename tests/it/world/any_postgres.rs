//! PostgreSQL by the enum of connections.

world!(Postgres, AnyConnection, Database::without_migrations().connect_with(connect));

fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    PgConnection::establish(url).map(AnyConnection::Postgres)
}

#[path = "../contexts.rs"]
mod contexts;
