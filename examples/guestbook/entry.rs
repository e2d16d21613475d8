//! The entry: what a visitor left in the book.

use chrono::NaiveDateTime;
use diesel::prelude::*;
use diesel_session::Result;

use crate::DB;

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
    pub(crate) fn insert(self) -> Result<Entry> {
        let insert = diesel::insert_into(entries::table).values(self).returning(Entry::as_returning());
        DB.session()?.get_result(insert)
    }
}

impl Entry {
    /// Takes an entry out of the book; `false` where it is not there.
    pub(crate) fn delete(id: i32) -> Result<bool> {
        let deleted = DB.session()?.execute(diesel::delete(entries::table.find(id)))?;
        Ok(deleted > 0)
    }
}
