//! The entry: what a visitor left in the book.

use chrono::NaiveDateTime;
use diesel::prelude::*;
use diesel_session::Result;

use crate::database::{AnyConnection, DB};

diesel::table! {
    entries (id) {
        id -> Integer,
        author -> Text,
        message -> Text,
        written_at -> Timestamp,
    }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = entries)]
pub(crate) struct Entry {
    pub(crate) id: i32,
    pub(crate) author: String,
    pub(crate) message: String,
    /// In UTC, set by the database.
    pub(crate) written_at: NaiveDateTime,
}

/// An entry that is not in the book yet.
#[derive(Insertable)]
#[diesel(table_name = entries)]
pub(crate) struct NewEntry {
    pub(crate) author: String,
    pub(crate) message: String,
}

impl NewEntry {
    /// Puts it into the book. It stays there when the request's scope commits.
    pub(crate) fn insert(&self) -> Result<Entry> {
        DB.session()?.with(|conn| self.insert_into(conn))
    }

    /// What each database has to tell what it made of a new row. The other statements are the same for all.
    fn insert_into(&self, conn: &mut AnyConnection) -> QueryResult<Entry> {
        let insert = diesel::insert_into(entries::table).values(self);
        match conn {
            AnyConnection::Sqlite(conn) => insert.returning(Entry::as_returning()).get_result(conn),
            #[cfg(feature = "postgres")]
            AnyConnection::Postgres(conn) => insert.returning(Entry::as_returning()).get_result(conn),
            #[cfg(feature = "mysql")]
            AnyConnection::Mysql(conn) => {
                insert.execute(conn)?;
                entries::table.find(last_insert_id()).select(Entry::as_select()).get_result(conn)
            }
        }
    }
}

#[cfg(feature = "mysql")]
#[diesel::declare_sql_function]
extern "SQL" {
    /// MySQL's key of the row that this connection inserted last.
    fn last_insert_id() -> Integer;
}

impl Entry {
    /// Takes an entry out of the book; `false` where it is not there.
    pub(crate) fn delete(id: i32) -> Result<bool> {
        let deleted = DB.session()?.execute(diesel::delete(entries::table.find(id)))?;
        Ok(deleted > 0)
    }
}
