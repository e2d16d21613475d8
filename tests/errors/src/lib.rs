//! The tables and entities that the programs have in common. It compiles, without a warning from the strictest of lints.

#![deny(warnings, missing_docs, missing_debug_implementations, unreachable_pub, unused)]

use diesel::prelude::*;
use diesel_session::{Database, Entity, Session};

/// The tables.
#[allow(missing_docs)]
pub mod schema {
    diesel::table! {
        users (id) {
            id -> Integer,
            name -> Text,
        }
    }
    diesel::table! {
        posts (id) {
            id -> Integer,
            author_id -> Integer,
        }
    }
}
use schema::{posts, users};

/// The database.
pub static DB: Database<SqliteConnection> = Database::without_migrations();

/// Its session.
pub type Db = Session<SqliteConnection>;

/// An entity.
#[derive(Debug, Clone, Queryable, Selectable, Identifiable, Entity)]
#[entity(new = NewUser)]
pub struct User {
    /// Its key.
    #[entity(generated)]
    pub id: i32,
    /// Its name.
    pub name: String,
}

/// An entity that refers to another.
#[derive(Debug, Clone, Queryable, Selectable, Identifiable, Associations, Entity)]
#[diesel(belongs_to(User, foreign_key = author_id))]
#[entity(new = NewPost)]
pub struct Post {
    /// Its key.
    #[entity(generated)]
    pub id: i32,
    /// Who wrote it.
    pub author_id: i32,
}
