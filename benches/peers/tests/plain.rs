//! Tests by hand: an application each, whose tables are created and dropped. Those of one server share a database, so that
//! only one thread can run them.

#[macro_use]
mod common;

use diesel::prelude::*;
use diesel_migrations::embed_migrations;
use diesel_session::{Config, Database};

diesel::table! { users (id) { id -> Integer, name -> Text, } }

macro_rules! tests {
    ($($name:ident)*) => { $(#[test] fn $name() { body(stringify!($name)); })* };
}

macro_rules! backend {
    ($module:ident, $connection:ty, $migrations:literal) => {
        mod $module {
            use super::*;

            static DB: Database<$connection> = Database::new(embed_migrations!($migrations));

            fn body(name: &str) {
                let app = DB.init_app(name, Config::new(std::env::var("DATABASE_URL").unwrap())).unwrap();
                app.context(|| {
                    DB.create_all()?;
                    let session = DB.session()?;
                    session.execute(diesel::insert_into(users::table).values(users::name.eq("Ada")))?;
                    let rows: Vec<(i32, String)> = session.load(users::table)?;
                    assert_eq!(rows, [(1, "Ada".to_owned())]);
                    session.commit()?;
                    DB.drop_all()
                })
                .unwrap();
                app.dispose().unwrap();
            }

            many!(tests);
        }
    };
}

backend!(postgres, diesel::PgConnection, "migrations/postgres");
backend!(mysql, diesel::MysqlConnection, "migrations/mysql");
backend!(sqlite, diesel::SqliteConnection, "migrations/sqlite");
