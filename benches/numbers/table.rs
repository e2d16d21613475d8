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

    /// The first statements of `read_only` and of `read_write`.
    const BEGIN_READ_ONLY: &'static str;
    const BEGIN: &'static str;

    /// What is sent once the table is filled, so that every connection plans alike.
    const FILLED: &'static str;

    fn db() -> &'static Database<Self>;

    fn select(&mut self, id: i32) -> QueryResult<Item>;

    fn select_in(session: &Session<Self>, id: i32) -> Result<Item>;

    /// Diesel's own transaction that only reads.
    fn read_only(&mut self, id: i32) -> QueryResult<Item>;

    /// Diesel's own transaction of the kind that a session begins.
    fn read_write(&mut self, id: i32) -> QueryResult<Item>;

    /// Makes the table, unless an earlier section of this run has made it.
    #[cfg(feature = "postgres")]
    fn fill_once(url: &str) {
        let mut conn = Self::establish(url).unwrap();
        if conn.select(0).is_err() {
            conn.fill();
        }
    }

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
    (
        $connection:ty, $name:literal, $filled:literal,
        $begin_read_only:literal, $read_only:expr,
        $begin:literal, $read_write:expr
    ) => {
        impl Conn for $connection {
            const NAME: &'static str = $name;
            const FILLED: &'static str = $filled;
            const BEGIN_READ_ONLY: &'static str = $begin_read_only;
            const BEGIN: &'static str = $begin;

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
    "BEGIN",
    |conn: &mut Self, id| conn.transaction(|conn| conn.select(id)),
    "BEGIN IMMEDIATE",
    |conn: &mut Self, id| conn.immediate_transaction(|conn| conn.select(id))
);

#[cfg(feature = "postgres")]
conn!(
    PgConnection,
    "PostgreSQL",
    "VACUUM ANALYZE items",
    "BEGIN READ ONLY",
    |conn: &mut Self, id| conn.build_transaction().read_only().run(|conn| conn.select(id)),
    "BEGIN",
    |conn: &mut Self, id| conn.transaction(|conn| conn.select(id))
);
