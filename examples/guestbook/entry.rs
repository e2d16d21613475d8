//! The entries of the guestbook.

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
    /// The time in UTC, set by the database.
    pub(crate) written_at: NaiveDateTime,
}

/// An entry that is not inserted yet.
#[derive(Insertable)]
#[diesel(table_name = entries)]
pub(crate) struct NewEntry {
    pub(crate) author: String,
    pub(crate) message: String,
}

impl NewEntry {
    /// Inserts the entry. The scope of the request commits it.
    pub(crate) fn insert(&self) -> Result<Entry> {
        DB.session()?.with(|conn| self.insert_into(conn))
    }

    /// The INSERT, which returns the new row. The other statements are the same for all databases.
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
    /// MySQL's key of the last row that this connection inserted.
    fn last_insert_id() -> Integer;
}

impl Entry {
    /// Deletes an entry. Returns `false` if the entry does not exist.
    pub(crate) fn delete(id: i32) -> Result<bool> {
        let deleted = DB.session()?.execute(diesel::delete(entries::table.find(id)))?;
        Ok(deleted > 0)
    }
}

#[cfg(test)]
mod tests {
    use diesel_session::App;

    use super::*;

    fn written_by(author: &str) -> Result<Entry> {
        NewEntry { author: author.into(), message: "hello".into() }.insert()
    }

    fn in_memory() -> diesel_session::Config {
        diesel_session::Config::new(":memory:")
    }

    #[diesel_session::test(DB, config = in_memory(), isolation = Rollback)]
    fn entry_is_in_the_book_until_it_is_deleted(app: App<AnyConnection>) -> Result<()> {
        let entry = written_by("Ada")?;
        DB.session()?.commit()?;
        // Another context stands for another visitor.
        let count = || DB.session()?.count(entries::table);
        assert_eq!(app.run(count)?, 1);
        assert!(Entry::delete(entry.id)?);
        assert!(!Entry::delete(entry.id)?);
        DB.session()?.commit()?;
        assert_eq!(app.run(count)?, 0);
        Ok(())
    }

    #[diesel_session::test(DB, config = in_memory(), isolation = Rollback)]
    fn test_begins_with_an_empty_book(_app: App<AnyConnection>) -> Result<()> {
        assert_eq!(DB.session()?.count(entries::table)?, 0);
        let (first, second) = (written_by("Ada")?, written_by("Bob")?);
        assert!(first.id < second.id && first.written_at <= second.written_at);
        assert_eq!((second.author.as_str(), second.message.as_str()), ("Bob", "hello"));
        Ok(())
    }
}
