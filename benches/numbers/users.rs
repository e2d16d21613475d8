//! The entity whose rows a session keeps, and each database's way to them without a session.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::unit_of_work::{Insert, Persist};
use diesel_session::{Entity, Result, Session, Tracked};

use crate::table::Conn;

diesel::table! {
    users (id) {
        id -> Integer,
        name -> Text,
        email -> Nullable<Text>,
        version -> Integer,
    }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
#[entity(new = NewUser)]
pub struct User {
    #[entity(generated)]
    pub id: i32,
    pub name: String,
    pub email: Option<String>,
    #[entity(version)]
    pub version: i32,
}

/// A connection type that can keep users.
pub trait Keeper: Conn
where
    User: Persist<Self>,
    NewUser: Insert<Self>,
{
    const TABLE: &'static str;

    fn begin(&mut self);

    fn load_users(&mut self) -> QueryResult<Vec<User>>;

    fn load_in(session: &Session<Self>) -> Result<Vec<User>>;

    fn track_in(session: &Session<Self>) -> Result<Vec<Tracked<User>>>;

    fn insert(&mut self, rows: Vec<NewUser>) -> QueryResult<Vec<User>>;

    /// Empties the table, and fills it with so many rows.
    fn fill_users(&mut self, rows: usize) {
        self.batch_execute(Self::TABLE).unwrap();
        let rows: Vec<NewUser> = (0..rows).map(new_user).collect();
        self.begin();
        self.insert_all(rows).unwrap();
        self.batch_execute("COMMIT").unwrap();
        self.batch_execute("ANALYZE users").unwrap();
    }

    /// In chunks of the size that a flush takes.
    fn insert_all(&mut self, rows: Vec<NewUser>) -> QueryResult<Vec<User>> {
        let mut inserted = Vec::with_capacity(rows.len());
        let mut rows = rows.into_iter();
        loop {
            let chunk: Vec<NewUser> = rows.by_ref().take(<NewUser as Insert<Self>>::MAX_INSERT_ROWS).collect();
            if chunk.is_empty() {
                return Ok(inserted);
            }
            inserted.extend(self.insert(chunk)?);
        }
    }
}

pub fn new_user(number: usize) -> NewUser {
    NewUser { name: format!("user number {number}"), email: Some(format!("user{number}@example.org")) }
}

macro_rules! keeper {
    ($connection:ty, $key:literal, $begin:literal) => {
        impl Keeper for $connection {
            const TABLE: &'static str = concat!(
                "DROP TABLE IF EXISTS users; CREATE TABLE users (id ",
                $key,
                ", name TEXT NOT NULL, email TEXT, version INTEGER NOT NULL DEFAULT 1)"
            );

            fn begin(&mut self) {
                self.batch_execute($begin).unwrap();
            }

            fn load_users(&mut self) -> QueryResult<Vec<User>> {
                users::table.select(User::as_select()).load(self)
            }

            fn load_in(session: &Session<Self>) -> Result<Vec<User>> {
                session.load(users::table.select(User::as_select()))
            }

            fn track_in(session: &Session<Self>) -> Result<Vec<Tracked<User>>> {
                session.track::<User>(users::table.select(User::as_select()))
            }

            fn insert(&mut self, rows: Vec<NewUser>) -> QueryResult<Vec<User>> {
                diesel::insert_into(users::table).values(rows).returning(User::as_returning()).get_results(self)
            }
        }
    };
}

keeper!(SqliteConnection, "INTEGER PRIMARY KEY", "BEGIN IMMEDIATE");
#[cfg(feature = "postgres")]
keeper!(PgConnection, "SERIAL PRIMARY KEY", "BEGIN");

/// Writes the names of these rows with one statement for each thousand of them; how many rows that were.
#[cfg(feature = "postgres")]
pub fn rename(conn: &mut PgConnection, rows: &[User], name: impl Fn(&User) -> String) -> QueryResult<usize> {
    use diesel::sql_types::{Array, Integer, Text};

    const RENAME: &str = "UPDATE users SET name = given.name, version = given.version + 1 \
                          FROM unnest($1, $2, $3) AS given (id, version, name) \
                          WHERE users.id = given.id AND users.version = given.version";
    let rename = |rows: &[User]| {
        diesel::sql_query(RENAME)
            .bind::<Array<Integer>, _>(rows.iter().map(|row| row.id).collect::<Vec<_>>())
            .bind::<Array<Integer>, _>(rows.iter().map(|row| row.version).collect::<Vec<_>>())
            .bind::<Array<Text>, _>(rows.iter().map(&name).collect::<Vec<_>>())
            .execute(conn)
    };
    rows.chunks(1000).map(rename).sum()
}
