//! The test kit by whole processes: many at once, and those that end as they should not. Each story has a server and a shared folder of
//! its own; the processes are this program once more.

mod child;
mod crowd;
mod cut;
mod ends;
mod files;
mod kept;
mod killed;
mod production;
mod server;

/// `#[test]` functions that run a generic one with a server of its own.
macro_rules! with_each_server {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use super::super::server::Server;
            use $crate::support::{Kind, enabled};

            #[test]
            fn postgres() {
                if enabled(Kind::Postgres) {
                    super::$name::<diesel::PgConnection>(&Server::postgres());
                }
            }

            #[test]
            fn mysql() {
                if enabled(Kind::Mysql) {
                    super::$name::<diesel::MysqlConnection>(&Server::mysql());
                }
            }

            #[test]
            fn sqlite() {
                super::$name::<diesel::SqliteConnection>(&Server::sqlite());
            }
        }
    )+ };
}
use with_each_server;
