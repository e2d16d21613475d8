//! A server for one test, with the folder that its processes share, and what the kit leaves there.

use std::fs;
use std::path::Path;
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::Text;
use diesel_session::testing::TestIsolation;
use tempfile::TempDir;

use super::child::Run;
use crate::support::{Mariadb, Postgres, wait};

/// How soon after its end a process has no connection any more.
const SOON: Duration = Duration::from_secs(1);

/// Databases of another program, with names that look like the kit's.
const OTHERS: [&str; 3] = ["diesel_session_test_zzz", "diesel_session_shop", "diesel_session_test_00000001_1_00000000"];

/// The same in the folder of the SQLite files.
const OTHER_FILES: [&str; 2] = ["diesel_session_test_zzz/1.sqlite", "shop/lock.sqlite"];

pub(super) struct Server {
    engine: Engine,
    pub(super) folder: TempDir,
}

enum Engine {
    Postgres(Postgres),
    Mariadb(Mariadb),
    Sqlite,
}

#[derive(QueryableByName)]
struct Name {
    #[diesel(sql_type = Text)]
    name: String,
}

impl Server {
    pub(super) fn postgres() -> Self {
        Self::of(Engine::Postgres(Postgres::start()))
    }

    pub(super) fn mariadb() -> Self {
        Self::of(Engine::Mariadb(Mariadb::start()))
    }

    pub(super) fn sqlite() -> Self {
        Self::of(Engine::Sqlite)
    }

    fn of(engine: Engine) -> Self {
        let folder = tempfile::Builder::new().prefix("diesel-session-").tempdir().expect("a temporary folder");
        Self { engine, folder }
    }

    pub(super) fn url(&self) -> String {
        match &self.engine {
            Engine::Postgres(server) => server.url(),
            Engine::Mariadb(server) => server.url(),
            Engine::Sqlite => "somewhere.sqlite".into(),
        }
    }

    /// The isolations that there are.
    pub(super) fn ways(&self) -> &'static [TestIsolation] {
        ways(&self.url())
    }

    /// What the kit made and does not keep: databases and schemas, or files.
    pub(super) fn left(&self) -> Vec<String> {
        let mut left = self.all();
        left.retain(|name| !is_kept(name) && !self.others().contains(&name.as_str()));
        left
    }

    /// Makes databases, on PostgreSQL also schemas, that are none of the kit's.
    pub(super) fn make_others(&self) {
        for name in self.others() {
            match &self.engine {
                Engine::Postgres(server) => {
                    let mut conn = PgConnection::establish(&server.url()).unwrap();
                    conn.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
                    conn.batch_execute(&format!("CREATE SCHEMA {name}")).unwrap();
                }
                Engine::Mariadb(server) => {
                    let mut conn = MysqlConnection::establish(&server.url()).unwrap();
                    conn.batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
                }
                Engine::Sqlite => {
                    let file = self.folder.path().join("sqlite").join(name);
                    fs::create_dir_all(file.parent().unwrap()).unwrap();
                    fs::write(file, "").unwrap();
                }
            }
        }
    }

    pub(super) fn assert_others(&self) {
        let all = self.all();
        for name in self.others() {
            let wanted = if matches!(self.engine, Engine::Postgres(_)) { 2 } else { 1 };
            assert_eq!(all.iter().filter(|found| found == name).count(), wanted, "{name} of {all:?}");
        }
    }

    fn others(&self) -> &'static [&'static str] {
        if matches!(self.engine, Engine::Sqlite) { &OTHER_FILES } else { &OTHERS }
    }

    fn all(&self) -> Vec<String> {
        const DATABASES: &str = "SELECT datname::text AS name FROM pg_database WHERE datname LIKE 'diesel%' ORDER BY 1";
        const SCHEMAS: &str = "SELECT nspname::text AS name FROM pg_namespace WHERE nspname LIKE 'diesel%' ORDER BY 1";
        const BOTH: &str =
            "SELECT schema_name AS name FROM information_schema.schemata WHERE schema_name LIKE 'diesel%' ORDER BY 1";
        let rows: Vec<Name> = match &self.engine {
            Engine::Postgres(server) => {
                let mut rows = server.try_ask(|conn| sql_query(DATABASES).load(conn)).unwrap();
                let mut conn = PgConnection::establish(&server.url()).unwrap();
                rows.extend(sql_query(SCHEMAS).load::<Name>(&mut conn).unwrap());
                rows
            }
            Engine::Mariadb(server) => sql_query(BOTH).load(&mut server.admin()).unwrap(),
            Engine::Sqlite => return files(&self.folder.path().join("sqlite")),
        };
        rows.into_iter().map(|row| row.name).collect()
    }

    /// Connections of the ordinary role.
    pub(super) fn connections(&self) -> i64 {
        match &self.engine {
            Engine::Postgres(server) => server.connections(),
            Engine::Mariadb(server) => server.connections(),
            Engine::Sqlite => 0,
        }
    }

    /// Waits until the server has seen that its clients are gone.
    #[track_caller]
    pub(super) fn assert_connections(&self, wanted: i64) {
        assert_eq!(wait::until_equal(wanted, SOON, || self.connections()), wanted, "connections of the role");
    }

    /// There is no session, and nothing but what is kept.
    #[track_caller]
    pub(super) fn assert_clean(&self) {
        self.assert_connections(0);
        assert_eq!(self.left(), Vec::<String>::new());
    }

    /// Ends the sessions in the databases in which tests are rolled back, from the server's side.
    pub(super) fn end_sessions_of_rolled_back_tests(&self) {
        for name in self.all().iter().filter(|name| name.starts_with("diesel_session_rollback_")) {
            match &self.engine {
                Engine::Postgres(server) => {
                    server.backend_pids(name).into_iter().for_each(|pid| server.terminate(pid));
                    assert_eq!(server.wait_for_connections_to(name, 0, SOON), 0);
                }
                Engine::Mariadb(server) => {
                    server.backend_pids(name).into_iter().for_each(|session| server.terminate(session));
                    assert_eq!(server.wait_for_connections_to(name, 0, SOON), 0);
                }
                Engine::Sqlite => unreachable!("a file has no sessions"),
            }
        }
    }

    /// A process that does what `part` says, from its beginning to its end.
    #[track_caller]
    pub(super) fn run(&self, part: &str) -> Run {
        Run::start(self, part, &[]).ended()
    }

    /// The same, which has to succeed.
    #[track_caller]
    pub(super) fn succeed(&self, part: &str) {
        let run = self.run(part);
        assert_eq!(run.code(), Some(0), "`{part}`: {}", run.said());
    }
}

pub(super) fn ways(url: &str) -> &'static [TestIsolation] {
    use TestIsolation::{Database, Rollback, Schema};
    if url.starts_with("postgres:") { &[Database, Schema, Rollback] } else { &[Database, Rollback] }
}

/// Most of ten tests are rolled back, as in a suite that is to be fast.
pub(super) fn chosen(url: &str, number: usize) -> TestIsolation {
    let ways = ways(url);
    ways[(number % 10).min(ways.len() - 1)]
}

fn is_kept(name: &str) -> bool {
    ["diesel_session_template_", "diesel_session_rollback_"].iter().any(|prefix| name.starts_with(prefix))
}

/// What the processes have in the folders that are theirs, or were, except locks: each with its folder.
fn files(all: &Path) -> Vec<String> {
    let folders = fs::read_dir(all).into_iter().flatten().flatten().map(|entry| entry.path());
    let entries = folders.filter(|path| path.is_dir()).flat_map(|path| fs::read_dir(path).into_iter().flatten());
    let paths = entries.flatten().map(|entry| entry.path()).filter(|path| !path.ends_with("lock"));
    paths.map(|path| path.strip_prefix(all).expect("in there").to_str().expect("UTF-8").to_owned()).collect()
}
