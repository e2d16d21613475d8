//! The table that is read, and each database's way to it.

use diesel::prelude::*;
use diesel_session::{Database, Result, Session, SessionConnection};

diesel::table! {
    items (id) {
        id -> Integer,
        name -> Text,
        price -> Integer,
    }
}

pub type Item = (i32, String, i32);

pub const ROWS: i32 = 1000;

/// A connection type, with the statements written out for it.
pub trait Conn: SessionConnection {
    const NAME: &'static str;

    /// What is sent once the table is filled, so that every connection plans alike.
    const FILLED: &'static str;

    fn db() -> &'static Database<Self>;

    fn select(&mut self, id: i32) -> QueryResult<Item>;

    fn select_in(session: &Session<Self>, id: i32) -> Result<Item>;

    /// Diesel's own transaction that only reads.
    fn read_only(&mut self, id: i32) -> QueryResult<Item>;

    /// Diesel's own transaction of the kind that a session begins.
    fn read_write(&mut self, id: i32) -> QueryResult<Item>;

    /// Makes the table, with its rows.
    fn fill(&mut self) {
        self.batch_execute("CREATE TABLE items (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL)")
            .unwrap();
        let rows: Vec<String> = (0..ROWS).map(|id| format!("({id}, 'item number {id}', {})", id * 3)).collect();
        self.batch_execute(&format!("INSERT INTO items VALUES {}", rows.join(","))).unwrap();
        self.batch_execute(Self::FILLED).unwrap();
    }
}

macro_rules! conn {
    ($connection:ty, $name:literal, $filled:literal, $read_only:expr, $read_write:expr) => {
        impl Conn for $connection {
            const NAME: &'static str = $name;
            const FILLED: &'static str = $filled;

            fn db() -> &'static Database<Self> {
                static DB: Database<$connection> = Database::without_migrations();
                &DB
            }

            fn select(&mut self, id: i32) -> QueryResult<Item> {
                items::table.find(id).get_result(self)
            }

            fn select_in(session: &Session<Self>, id: i32) -> Result<Item> {
                session.get_result(items::table.find(id))
            }

            fn read_only(&mut self, id: i32) -> QueryResult<Item> {
                $read_only(self, id)
            }

            fn read_write(&mut self, id: i32) -> QueryResult<Item> {
                $read_write(self, id)
            }
        }
    };
}

conn!(
    SqliteConnection,
    "SQLite, a file",
    "",
    |conn: &mut Self, id| conn.transaction(|conn| conn.select(id)),
    |conn: &mut Self, id| conn.immediate_transaction(|conn| conn.select(id))
);

#[cfg(feature = "postgres")]
conn!(
    PgConnection,
    "PostgreSQL",
    "VACUUM ANALYZE items",
    |conn: &mut Self, id| conn.build_transaction().read_only().run(|conn| conn.select(id)),
    |conn: &mut Self, id| conn.transaction(|conn| conn.select(id))
);
