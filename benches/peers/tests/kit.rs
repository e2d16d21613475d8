//! The test kit of this crate, with each isolation.

#[macro_use]
mod common;

use diesel::prelude::*;
use diesel_migrations::embed_migrations;
use diesel_session::{App, Database};

diesel::table! { users (id) { id -> Integer, name -> Text, } }

macro_rules! backend {
    ($connection:ty, $migrations:literal, $($module:ident $tests:ident),*) => { $(
        mod $module {
            use super::*;

            type Connection = $connection;

            static DB: Database<$connection> = Database::new(embed_migrations!($migrations));

            fn body(app: &App<$connection>) {
                app.run(|| {
                    let session = DB.session()?;
                    session.execute(diesel::insert_into(users::table).values(users::name.eq("Ada")))?;
                    let names: Vec<String> = session.load(users::table.select(users::name))?;
                    assert_eq!(names, ["Ada"]);
                    Ok(())
                })
                .unwrap();
            }

            many!($tests);
        }
    )* };
}

macro_rules! rollback {
    ($($name:ident)*) => { $(
        #[diesel_session::test(DB, isolation = Rollback)]
        fn $name(app: App<Connection>) { body(&app); }
    )* };
}

macro_rules! schema {
    ($($name:ident)*) => { $(
        #[diesel_session::test(DB, isolation = Schema)]
        fn $name(app: App<Connection>) { body(&app); }
    )* };
}

macro_rules! database {
    ($($name:ident)*) => { $(
        #[diesel_session::test(DB, isolation = Database)]
        fn $name(app: App<Connection>) { body(&app); }
    )* };
}

backend!(
    diesel::PgConnection,
    "migrations/postgres",
    postgres_rollback rollback,
    postgres_schema schema,
    postgres_database database
);
backend!(diesel::MysqlConnection, "migrations/mysql", mysql_rollback rollback, mysql_database database);
backend!(diesel::SqliteConnection, "migrations/sqlite", sqlite_rollback rollback, sqlite_database database);
