//! The database object, and the choice between the three databases.

use diesel::prelude::*;
use diesel_migrations::{EmbeddedMigrations, embed_migrations};
use diesel_session::Database;
use diesel_session::migrations::PerBackend;

/// A connection to the database that `DATABASE_URL` names. A program for one database needs no enum, no `connect_with` and no
/// [`PerBackend`]: `Database<SqliteConnection>` and `Database::new(MIGRATIONS)` are enough.
#[derive(diesel::MultiConnection)]
pub(crate) enum AnyConnection {
    Sqlite(SqliteConnection),
    #[cfg(feature = "postgres")]
    Postgres(PgConnection),
    #[cfg(feature = "mysql")]
    Mysql(MysqlConnection),
}

const SQLITE: EmbeddedMigrations = embed_migrations!("migrations/sqlite");
const POSTGRES: EmbeddedMigrations = embed_migrations!("migrations/postgres");
const MYSQL: EmbeddedMigrations = embed_migrations!("migrations/mysql");

/// The one database object of the program. It has no connection: applications have connections, and `main` registers one.
pub(crate) static DB: Database<AnyConnection> =
    Database::per_backend(PerBackend { sqlite: Some(SQLITE), postgres: Some(POSTGRES), mysql: Some(MYSQL) })
        .connect_with(connect);

fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    match feature_for(url) {
        "sqlite" => SqliteConnection::establish(url).map(AnyConnection::Sqlite),
        #[cfg(feature = "postgres")]
        "postgres" => PgConnection::establish(url).map(AnyConnection::Postgres),
        #[cfg(feature = "mysql")]
        "mysql" => MysqlConnection::establish(url).map(AnyConnection::Mysql),
        feature => Err(ConnectionError::BadConnection(format!(
            "this guestbook was built without that database; `cargo run --features {feature} --example guestbook` has it"
        ))),
    }
}

/// The feature that supports the database of a URL.
fn feature_for(url: &str) -> &'static str {
    match url.split_once("://") {
        Some(("postgres" | "postgresql", _)) => "postgres",
        Some(("mysql", _)) => "mysql",
        // libpq's own form, such as `host=localhost dbname=guestbook`.
        _ if url.split_once('=').is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_lowercase())) => "postgres",
        _ => "sqlite",
    }
}
