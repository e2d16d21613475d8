use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{Integer, Text};

use super::cluster::Cluster;
use super::database::Database;
use super::kind::{self, Kind};
use super::observer::{Number, Observer};
use super::{PASSWORD, ROLE, process, program, text, wait};

/// The PostgreSQL of this test process, started at the first call.
#[track_caller]
pub fn postgres() -> &'static Postgres {
    static SHARED: OnceLock<Result<Postgres, String>> = OnceLock::new();
    let settings = || format!("max_connections = {}\n", super::shared_max_connections());
    SHARED.get_or_init(|| Postgres::for_tests(&settings())).as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// A throw-away PostgreSQL cluster with `max_connections = 20`.
///
/// Of the usual three slots for superusers the observer occupies one and two are reserved, so that an ordinary role
/// gets what it gets elsewhere: 17.
pub struct Postgres {
    inner: Arc<Inner>,
}

impl Postgres {
    /// A cluster of one's own, for tests that break it; gone when it is dropped.
    #[track_caller]
    pub fn start() -> Postgres {
        Postgres::for_tests("").unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same, whose messages are those of a locale such as `de_DE`.
    #[track_caller]
    pub fn start_speaking(locale: &str) -> Postgres {
        kind::require(Kind::Postgres);
        let inner =
            Inner::start(Some(locale), "").unwrap_or_else(|error| panic!("PostgreSQL cannot be started: {error}"));
        Postgres { inner: Arc::new(inner) }
    }

    /// A standby with the data of this moment. It is not told of later changes.
    #[track_caller]
    pub fn standby(&self) -> Postgres {
        let inner = self.inner.standby().unwrap_or_else(|error| panic!("the standby cannot be started: {error}"));
        Postgres { inner: Arc::new(inner) }
    }

    /// Makes a standby the primary server of a new timeline.
    pub fn promote(&self) {
        self.inner.observer.ask(|conn| sql_query("SELECT pg_promote()").execute(conn));
    }

    /// The same as [`start`](Self::start) for a program that is no test.
    pub fn try_start() -> Result<Postgres, String> {
        Postgres::try_start_with("")
    }

    /// The same, with these lines of settings after those of the tests, which they overrule.
    pub fn try_start_with(settings: &str) -> Result<Postgres, String> {
        let inner = Inner::start(None, settings).map_err(|error| format!("PostgreSQL cannot be started: {error}"))?;
        Ok(Postgres { inner: Arc::new(inner) })
    }

    pub fn host(&self) -> &str {
        "127.0.0.1"
    }

    pub fn port(&self) -> u16 {
        self.inner.port
    }

    pub fn password(&self) -> &str {
        PASSWORD
    }

    /// Role `app`, database `app`, over TCP.
    pub fn url(&self) -> String {
        self.url_of(ROLE)
    }

    pub fn url_of(&self, database: &str) -> String {
        self.url_at(self.port(), database)
    }

    /// The same through another port of this machine, such as a proxy's.
    pub fn url_at(&self, port: u16, database: &str) -> String {
        url_at(port, database)
    }

    pub fn socket_url(&self, database: &str) -> String {
        self.inner.socket_url(ROLE, PASSWORD, database)
    }

    pub fn create_database(&self) -> Database {
        static SERIAL: AtomicUsize = AtomicUsize::new(1);
        let name = format!("{ROLE}_{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        self.inner.observer.ask(|conn| sql_query(format!("CREATE DATABASE {name} OWNER {ROLE}")).execute(conn));
        let (url, inner) = (self.url_of(&name), Arc::clone(&self.inner));
        Database::new(name, url, move |name| inner.observer.try_ask(|conn| remove(conn, name)))
    }

    /// A superuser's connection to the maintenance database.
    #[track_caller]
    pub fn admin(&self) -> PgConnection {
        self.inner.observer.connect().expect("a superuser can connect")
    }

    /// Asks on the observer's connection, which is there when the slots are taken.
    pub fn try_ask<T>(&self, question: impl FnOnce(&mut PgConnection) -> QueryResult<T>) -> Result<T, String> {
        self.inner.observer.try_ask(question)
    }

    /// Server sessions of the role `app`.
    pub fn connections(&self) -> i64 {
        self.connections_of(ROLE)
    }

    pub fn connections_of(&self, role: &str) -> i64 {
        self.count("usename = $1", role)
    }

    pub fn connections_to(&self, database: &str) -> i64 {
        self.count("datname = $1", database)
    }

    /// Waits until `wanted` sessions are in the database; the last count.
    pub fn wait_for_connections_to(&self, database: &str, wanted: i64, limit: Duration) -> i64 {
        wait::until_equal(wanted, limit, || self.connections_to(database))
    }

    /// Sessions in the database that are inside a transaction.
    pub fn open_transactions(&self, database: &str) -> i64 {
        self.count("datname = $1 AND xact_start IS NOT NULL", database)
    }

    pub fn backend_pids(&self, database: &str) -> Vec<i32> {
        let query = "SELECT pid::bigint AS number FROM pg_stat_activity
            WHERE backend_type = 'client backend' AND datname = $1 ORDER BY backend_start";
        let rows: Vec<Number> = self.inner.observer.ask(|conn| sql_query(query).bind::<Text, _>(database).load(conn));
        rows.into_iter().map(|row| i32::try_from(row.number).expect("a process id")).collect()
    }

    /// Ends one session from the server's side.
    pub fn terminate(&self, pid: i32) {
        let query = sql_query("SELECT pg_terminate_backend($1)").bind::<Integer, _>(pid);
        self.inner.observer.ask(|conn| query.execute(conn));
    }

    /// Freezes one session: its socket stays open and nothing answers.
    pub fn sigstop_backend(&self, pid: i32) {
        assert!(process::signal("STOP", &[pid as u32]), "no backend {pid}");
    }

    pub fn sigcont(&self, pid: i32) {
        assert!(process::signal("CONT", &[pid as u32]), "no backend {pid}");
    }

    /// Kills the server and its backends the hard way; the port refuses until `restart`.
    pub fn kill9(&mut self) {
        self.inner.observer.leave();
        self.inner.cluster.kill();
        self.inner.remove_shared_memory();
    }

    /// Starts the killed server again on the same port and folder.
    #[track_caller]
    pub fn restart(&mut self) {
        let inner = &self.inner;
        // The dying backends may hold the old shared memory for a moment.
        let mut last = Ok(());
        wait::until(Duration::from_secs(10), || {
            last = inner.boot();
            last.is_ok()
        });
        last.unwrap_or_else(|error| panic!("{error}"));
    }

    fn count(&self, condition: &str, name: &str) -> i64 {
        let query = format!(
            "SELECT count(*) AS number FROM pg_stat_activity WHERE backend_type = 'client backend' AND {condition}"
        );
        let row: Number = self.inner.observer.ask(|conn| sql_query(query).bind::<Text, _>(name).get_result(conn));
        row.number
    }

    fn for_tests(settings: &str) -> Result<Postgres, String> {
        kind::require(Kind::Postgres);
        Postgres::try_start_with(settings).map_err(|error| {
            format!(
                "{error}\n\
                 It is needed for the tests: `scripts/setup` installs it (Debian: postgresql libpq-dev), \
                 and DIESEL_SESSION_TEST_WITHOUT=postgres goes without."
            )
        })
    }
}

struct Inner {
    cluster: Cluster,
    binaries: PathBuf,
    port: u16,
    observer: Observer<PgConnection>,
    /// The password of the superuser.
    secret: String,
    /// Where the locale of its messages lies, if not with the system's.
    locales: Option<String>,
}

const SUPERUSER: &str = "postgres";

const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
max_connections = 20
superuser_reserved_connections = 2
fsync = off
full_page_writes = off
shared_buffers = 16MB
dynamic_shared_memory_type = mmap
lc_messages = 'C'
";

impl Inner {
    fn start(locale: Option<&str>, overruling: &str) -> Result<Inner, String> {
        let initdb = program::find("initdb", &program::versioned_folders(Path::new("/usr/lib/postgresql")))?;
        let binaries = initdb.parent().expect("a program is in a folder").to_owned();
        let cluster = Cluster::new(&["postgres", "nobody"], "QUIT")?;
        let secret = format!("{:x}", text::random());
        cluster.write("secret", &secret)?;
        let (data, secret_file) = (cluster.path("data"), cluster.path("secret"));
        let args = ["-N", "-A", "scram-sha-256", "-U", SUPERUSER, "-E", "UTF8", "--locale=C", "-D", &data];
        let args = args.into_iter().map(String::from).chain([format!("--pwfile={secret_file}")]);
        cluster.run(&initdb, &args.collect::<Vec<_>>())?;
        let sockets = cluster.folder().display();
        let mut settings = format!("{SETTINGS}{overruling}unix_socket_directories = '{sockets}'\n");
        let mut locales = None;
        if let Some(locale) = locale {
            // A small system has none of its own built.
            let localedef = program::find("localedef", &[])?;
            let args = ["-i", locale, "-f", "UTF-8", &cluster.path(&format!("{locale}.UTF-8"))].map(String::from);
            cluster.run(&localedef, &args)?;
            locales = Some(format!("LOCPATH={}", cluster.folder().display()));
            settings.push_str(&format!("lc_messages = '{locale}.UTF-8'\n"));
        }
        cluster.write("data/postgresql.auto.conf", &settings)?;

        let observer = Observer::new(String::new());
        let mut inner = Inner { cluster, binaries, port: 0, observer, secret, locales };
        let mut last = Ok(());
        // Another process may take the free port first.
        for _ in 0..3 {
            inner.port = program::free_port();
            inner.observer = Observer::new(inner.socket_url(SUPERUSER, &inner.secret, "postgres"));
            last = inner.boot();
            if last.is_ok() {
                break;
            }
        }
        last?;
        inner.observer.try_ask(|conn| {
            sql_query(format!("CREATE ROLE {ROLE} LOGIN CREATEDB PASSWORD '{PASSWORD}'")).execute(conn)?;
            sql_query(format!("CREATE DATABASE {ROLE} OWNER {ROLE}")).execute(conn)
        })?;
        Ok(inner)
    }

    fn standby(&self) -> Result<Inner, String> {
        let cluster = Cluster::new(&["postgres", "nobody"], "QUIT")?;
        let data = cluster.path("data");
        let url = self.socket_url(SUPERUSER, &self.secret, "postgres");
        let args = ["-X", "stream", "-c", "fast", "-D", &data, "-d", &url].map(String::from);
        cluster.run(&self.binaries.join("pg_basebackup"), &args)?;
        let settings = fs::read_to_string(self.cluster.folder().join("data/postgresql.auto.conf"));
        let settings = settings.map_err(|error| error.to_string())?;
        let sockets = format!("unix_socket_directories = '{}'\n", cluster.folder().display());
        cluster.write("data/postgresql.auto.conf", &(settings + &sockets))?;
        cluster.write("data/standby.signal", "")?;
        let (binaries, secret) = (self.binaries.clone(), self.secret.clone());
        let observer = Observer::new(String::new());
        let mut inner = Inner { cluster, binaries, port: program::free_port(), observer, secret, locales: None };
        inner.observer = Observer::new(inner.socket_url(SUPERUSER, &inner.secret, "postgres"));
        inner.boot()?;
        Ok(inner)
    }

    fn boot(&self) -> Result<(), String> {
        let postgres = self.binaries.join("postgres");
        let args = ["-D".to_owned(), self.cluster.path("data"), "-p".to_owned(), self.port.to_string()];
        let Some(locales) = &self.locales else {
            return self.cluster.start(&postgres, &args, || self.observer.arrive());
        };
        let env = program::find("env", &[])?;
        let args: Vec<_> = [locales.clone(), postgres.display().to_string()].into_iter().chain(args).collect();
        self.cluster.start(&env, &args, || self.observer.arrive())
    }

    /// A killed server leaves a System V segment behind, which only its next start would remove.
    fn remove_shared_memory(&self) {
        let lock_file = fs::read_to_string(self.cluster.folder().join("data/postmaster.pid")).unwrap_or_default();
        if let Some(id) = lock_file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1)) {
            let removed = Command::new("ipcrm").args(["-m", id]).status();
            assert!(removed.is_ok_and(|status| status.success()), "shared memory segment {id} cannot be removed");
        }
    }

    fn socket_url(&self, role: &str, password: &str, database: &str) -> String {
        let folder = text::percent_encoded(self.cluster.folder().to_str().expect("a UTF-8 path"));
        let password = text::percent_encoded(password);
        format!("postgres://{role}:{password}@/{database}?host={folder}&port={}", self.port)
    }
}

fn url_at(port: u16, database: &str) -> String {
    format!("postgres://{ROLE}:{}@127.0.0.1:{port}/{database}", text::percent_encoded(PASSWORD))
}

/// `FORCE` ends the sessions too, but then the server sleeps 100 ms before it looks whether they are gone.
fn remove(conn: &mut PgConnection, database: &str) -> QueryResult<()> {
    let sessions = "SELECT count(pg_terminate_backend(pid)) AS number FROM pg_stat_activity WHERE datname = $1";
    let mut left = Ok(0);
    wait::until(Duration::from_secs(1), || {
        let row = sql_query(sessions).bind::<Text, _>(database).get_result(conn);
        left = row.map(|row: Number| row.number);
        !matches!(left, Ok(1..))
    });
    left?;
    sql_query(format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)")).execute(conn).map(drop)
}
