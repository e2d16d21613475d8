//! The table that every test creates, uses and drops.

use diesel_migrations::{EmbeddedMigrations, embed_migrations};

diesel::table! {
    entries (id) {
        id -> Integer,
        author -> Text,
        message -> Text,
    }
}

pub(crate) const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations/postgres");
