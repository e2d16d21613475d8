//! The test kit, used on itself.

#[path = "kit/attacks.rs"]
mod attacks;
#[path = "kit/attribute.rs"]
mod attribute;
#[path = "kit/databases.rs"]
mod databases;
#[path = "kit/isolation.rs"]
mod isolation;
#[path = "kit/rollback.rs"]
mod rollback;
#[path = "kit/schema_changes.rs"]
mod schema_changes;
#[path = "kit/waiting.rs"]
mod waiting;

#[path = "kit/traces.rs"]
mod traces;

use std::sync::Arc;

use diesel_session::testing::{Fixture, TestApp, TestIsolation, TestSetup};
use diesel_session::{AppEnd, Config, Error, Result, Session};

use crate::fixtures::{Any, COUNT, Conn, INSERT, Speak};
use crate::support::{self, Kind, enabled};
use diesel::{MysqlConnection, PgConnection, SqliteConnection};

#[derive(PartialEq, Eq)]
enum Server {
    Postgres,
    Mysql,
    Sqlite,
}

/// The ways a test can be kept apart on one kind of database, with the URL of its server.
fn worlds(kind: Server) -> Vec<(Config, TestIsolation)> {
    use TestIsolation::{Database, Rollback, Schema};
    let (url, ways): (String, &[TestIsolation]) = match kind {
        Server::Postgres => (support::postgres().url(), &[Database, Schema, Rollback]),
        Server::Mysql => (support::mariadb().url(), &[Database, Rollback]),
        Server::Sqlite => (":memory:".into(), &[Database, Rollback]),
    };
    let mut worlds: Vec<_> = ways.iter().map(|way| (Config::new(url.as_str()), *way)).collect();
    if kind == Server::Sqlite {
        worlds.push((Config::new("somewhere.sqlite"), Database));
    }
    worlds
}

/// `#[test]` functions that run a generic one in every way on every kind of database.
macro_rules! in_every_way {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use super::*;

            #[test]
            fn postgres() {
                if enabled(Kind::Postgres) {
                    worlds(Server::Postgres).into_iter().for_each(super::$name::<PgConnection>);
                }
            }

            #[test]
            fn mysql() {
                if enabled(Kind::Mysql) {
                    worlds(Server::Mysql).into_iter().for_each(super::$name::<MysqlConnection>);
                }
            }

            #[test]
            fn sqlite() {
                worlds(Server::Sqlite).into_iter().for_each(super::$name::<SqliteConnection>);
            }

            #[test]
            fn any_postgres() {
                if enabled(Kind::Postgres) {
                    worlds(Server::Postgres).into_iter().for_each(super::$name::<Any>);
                }
            }
        }
    )+ };
}
use in_every_way;

#[track_caller]
fn begin<C: Conn>((config, isolation): &(Config, TestIsolation)) -> TestApp<C> {
    TestSetup::of(C::db()).config(config.clone()).isolation(*isolation).start().unwrap()
}

#[track_caller]
fn committed<C: Conn>(test: &TestApp<C>) -> i64 {
    let session = test.open_session().unwrap();
    session.number(COUNT).unwrap()
}
