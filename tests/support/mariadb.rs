use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::Error;
use diesel::sql_query;
use diesel::sql_types::Text;

use super::cluster::Cluster;
use super::database::Database;
use super::kind::{self, Kind};
use super::observer::{Number, Observer};
use super::{PASSWORD, ROLE, process, program, text, wait};

/// The MariaDB of this test process, started at the first call.
#[track_caller]
pub fn mariadb() -> &'static Mariadb {
    static SHARED: OnceLock<Result<Mariadb, String>> = OnceLock::new();
    let option = || format!("--max-connections={}", super::shared_max_connections());
    SHARED.get_or_init(|| Mariadb::try_start(&[&option()])).as_ref().unwrap_or_else(|error| panic!("{error}"))
}

/// A throw-away MariaDB cluster with `max_connections = 20`, all of them for the ordinary role: the observer and
/// `admin` come in by MariaDB's extra port, which has slots of its own.
pub struct Mariadb {
    inner: Arc<Inner>,
}

impl Mariadb {
    /// A cluster of one's own, for tests that break it; gone when it is dropped.
    #[track_caller]
    pub fn start() -> Mariadb {
        Mariadb::try_start(&[]).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The same, with further options.
    #[track_caller]
    pub fn start_with(options: &[&str]) -> Mariadb {
        Mariadb::try_start(options).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The first node of a Galera cluster.
    #[track_caller]
    pub fn start_galera() -> Mariadb {
        let Mariadb { inner } = Mariadb::start();
        let mut inner = Arc::into_inner(inner).expect("no database was created");
        // A node that begins a cluster does not read the file with the accounts.
        inner.cluster.kill();
        inner.observer.leave();
        inner.options = galera_options(program::free_port(), None);
        inner.boot().unwrap_or_else(|error| panic!("Galera cannot be started: {error}"));
        Mariadb { inner: Arc::new(inner) }
    }

    /// Another node of the Galera cluster to which this node belongs.
    #[track_caller]
    pub fn start_second_node(&self) -> Mariadb {
        let node = self.inner.second_node();
        Mariadb { inner: Arc::new(node.unwrap_or_else(|error| panic!("the second node cannot be started: {error}"))) }
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
        url_at(ROLE, PASSWORD, port, database)
    }

    pub fn socket_url(&self, database: &str) -> String {
        let socket = text::percent_encoded(&self.inner.cluster.path("socket"));
        let password = text::percent_encoded(PASSWORD);
        format!("mysql://{ROLE}:{password}@localhost/{database}?unix_socket={socket}")
    }

    pub fn create_database(&self) -> Database {
        static SERIAL: AtomicUsize = AtomicUsize::new(1);
        let name = format!("{ROLE}_{}", SERIAL.fetch_add(1, Ordering::Relaxed));
        self.inner.observer.ask(|conn| sql_query(format!("CREATE DATABASE {name}")).execute(conn));
        let (url, inner) = (self.url_of(&name), Arc::clone(&self.inner));
        Database::new(name, url, move |name| {
            // An open transaction would make the removal wait for its lock.
            for session in inner.sessions("db = ?", name)? {
                inner.kill(session)?;
            }
            inner.observer.try_ask(|conn| sql_query(format!("DROP DATABASE IF EXISTS {name}")).execute(conn)).map(drop)
        })
    }

    /// A superuser's connection to the maintenance database.
    #[track_caller]
    pub fn admin(&self) -> MysqlConnection {
        self.inner.observer.connect().expect("a superuser can connect")
    }

    /// Server sessions of the role `app`.
    pub fn connections(&self) -> i64 {
        self.connections_of(ROLE)
    }

    pub fn connections_of(&self, role: &str) -> i64 {
        self.count("information_schema.processlist WHERE user = ?", role)
    }

    pub fn connections_to(&self, database: &str) -> i64 {
        self.count("information_schema.processlist WHERE db = ?", database)
    }

    /// Waits until `wanted` sessions are in the database; the last count.
    pub fn wait_for_connections_to(&self, database: &str, wanted: i64, limit: Duration) -> i64 {
        wait::until_equal(wanted, limit, || self.connections_to(database))
    }

    /// Sessions in the database that are inside a transaction.
    ///
    /// `information_schema.innodb_trx` will not do: it shows a cached picture to queries within 100 ms, and
    /// no transaction that has not touched a table.
    pub fn open_transactions(&self, database: &str) -> i64 {
        self.count(
            "performance_schema.events_transactions_current AS transactions
             JOIN performance_schema.threads USING (thread_id)
             WHERE transactions.state = 'ACTIVE' AND transactions.autocommit = 'NO' AND processlist_db = ?",
            database,
        )
    }

    pub fn backend_pids(&self, database: &str) -> Vec<i64> {
        self.inner.sessions("db = ?", database).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Ends one session from the server's side.
    pub fn terminate(&self, session: i64) {
        self.inner.kill(session).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Freezes the whole server: its sockets stay open and nothing answers.
    pub fn sigstop(&mut self) {
        assert!(process::signal("STOP", &[self.inner.cluster.pid()]), "the server is gone");
    }

    pub fn sigcont(&mut self) {
        assert!(process::signal("CONT", &[self.inner.cluster.pid()]), "the server is gone");
    }

    /// Kills the server the hard way; the port refuses until `restart`.
    pub fn kill9(&mut self) {
        self.inner.cluster.kill();
        self.inner.observer.leave();
    }

    /// Starts the killed server again on the same port and folder.
    #[track_caller]
    pub fn restart(&mut self) {
        self.inner.boot().unwrap_or_else(|error| panic!("{error}"));
    }

    fn count(&self, rows: &str, name: &str) -> i64 {
        let query = format!("SELECT count(*) AS number FROM {rows}");
        let row: Number = self.inner.observer.ask(|conn| sql_query(query).bind::<Text, _>(name).get_result(conn));
        row.number
    }

    fn try_start(options: &[&str]) -> Result<Mariadb, String> {
        kind::require(Kind::Mariadb);
        let inner = Inner::start(options).map_err(|error| {
            format!(
                "MariaDB cannot be started: {error}\n\
                 It is needed for the tests: `scripts/setup` installs it (Debian: mariadb-server libmariadb-dev), \
                 and DIESEL_SESSION_TEST_WITHOUT=mysql goes without."
            )
        })?;
        Ok(Mariadb { inner: Arc::new(inner) })
    }
}

struct Inner {
    cluster: Cluster,
    server: PathBuf,
    port: u16,
    extra_port: u16,
    observer: Observer<MysqlConnection>,
    /// The password of the superuser.
    secret: String,
    options: Vec<String>,
}

const SUPERUSER: &str = "bench";

const SETTINGS: &[&str] = &[
    "--bind-address=127.0.0.1",
    "--max-connections=20",
    "--extra-max-connections=10",
    "--character-set-server=utf8mb4",
    "--performance-schema=on",
    "--performance-schema-instrument=transaction=on",
    "--performance-schema-consumer-events-transactions-current=on",
];

const FAST: &[&str] = &[
    "--skip-name-resolve",
    "--sync-frm=0",
    "--innodb-flush-log-at-trx-commit=2",
    "--innodb-flush-method=nosync",
    "--innodb-log-file-size=8M",
    "--innodb-buffer-pool-size=32M",
    "--aria-pagecache-buffer-size=8M",
    "--key-buffer-size=1M",
];

impl Inner {
    fn start(options: &[&str]) -> Result<Inner, String> {
        let folders = ["/usr/sbin", "/usr/libexec", "/usr/local/sbin"].map(PathBuf::from);
        let install = program::find("mariadb-install-db", &[])?;
        let server = program::find("mariadbd", &folders)?;
        let cluster = Cluster::new(&["mysql", "nobody"], "KILL")?;
        let data = format!("--datadir={}", cluster.path("data"));
        let args = ["--no-defaults", &data, "--auth-root-authentication-method=normal", "--skip-test-db"];
        cluster.run(&install, &args.iter().chain(FAST).map(ToString::to_string).collect::<Vec<_>>())?;
        let secret = format!("{:x}", text::random());
        cluster.write("accounts.sql", &accounts(&secret))?;

        let options = options.iter().map(ToString::to_string).collect();
        let observer = Observer::new(String::new());
        let mut inner = Inner { cluster, server, port: 0, extra_port: 0, observer, secret, options };
        let mut last = Ok(());
        // Another process may take a free port first.
        for _ in 0..3 {
            (inner.port, inner.extra_port) = (program::free_port(), program::free_port());
            inner.observer = Observer::new(url_at(SUPERUSER, &inner.secret, inner.extra_port, "mysql"));
            last = inner.boot();
            if last.is_ok() {
                break;
            }
        }
        last.map(|()| inner)
    }

    fn second_node(&self) -> Result<Inner, String> {
        let first = self.options.iter().find_map(|option| option.strip_prefix("--wsrep-node-address="));
        let cluster = Cluster::new(&["mysql", "nobody"], "KILL")?;
        cluster.write("accounts.sql", "")?;
        cluster.run(Path::new("/bin/mkdir"), &[cluster.path("data")])?;
        let extra_port = program::free_port();
        let inner = Inner {
            cluster,
            server: self.server.clone(),
            port: program::free_port(),
            extra_port,
            observer: Observer::new(url_at(SUPERUSER, &self.secret, extra_port, "mysql")),
            secret: self.secret.clone(),
            options: galera_options(program::free_port(), first),
        };
        inner.boot()?;
        Ok(inner)
    }

    fn boot(&self) -> Result<(), String> {
        let path = |name| self.cluster.path(name);
        let own = [
            "--no-defaults".to_owned(),
            format!("--datadir={}", path("data")),
            format!("--tmpdir={}", self.cluster.folder().display()),
            format!("--socket={}", path("socket")),
            format!("--pid-file={}", path("pid")),
            format!("--init-file={}", path("accounts.sql")),
            format!("--port={}", self.port),
            format!("--extra-port={}", self.extra_port),
        ];
        let common = SETTINGS.iter().chain(FAST).map(ToString::to_string);
        let args: Vec<String> = own.into_iter().chain(common).chain(self.options.iter().cloned()).collect();
        self.cluster.start(&self.server, &args, || self.observer.arrive())
    }

    fn sessions(&self, condition: &str, name: &str) -> Result<Vec<i64>, String> {
        let query = format!("SELECT id AS number FROM information_schema.processlist WHERE {condition} ORDER BY id");
        let rows = self.observer.try_ask(|conn| sql_query(query).bind::<Text, _>(name).load::<Number>(conn))?;
        Ok(rows.into_iter().map(|row| row.number).collect())
    }

    fn kill(&self, session: i64) -> Result<(), String> {
        self.observer.try_ask(|conn| match sql_query(format!("KILL {session}")).execute(conn) {
            Err(Error::DatabaseError(_, info)) if info.message().starts_with("Unknown thread id") => Ok(()),
            result => result.map(drop),
        })
    }
}

fn galera_options(port: u16, first_node: Option<&str>) -> Vec<String> {
    let address = format!("127.0.0.1:{port}");
    let provider = format!(
        "base_host=127.0.0.1;base_port={port};gmcast.listen_addr=tcp://{address};ist.recv_addr=127.0.0.1:{};\
         gcache.size=16M;evs.keepalive_period=PT0.3S;evs.inactive_check_period=PT0.3S;evs.suspect_timeout=PT1S;\
         evs.inactive_timeout=PT2S;evs.install_timeout=PT2S",
        program::free_port()
    );
    let mut options = [
        "--binlog-format=ROW",
        "--innodb-autoinc-lock-mode=2",
        "--wsrep-on=ON",
        "--wsrep-provider=/usr/lib/galera/libgalera_smm.so",
        "--wsrep-sst-method=rsync",
        &format!("--wsrep-sst-receive-address=127.0.0.1:{}", program::free_port()),
        &format!("--wsrep-node-address={address}"),
        &format!("--wsrep-provider-options={provider}"),
        &format!("--wsrep-cluster-address=gcomm://{}", first_node.unwrap_or_default()),
    ]
    .map(str::to_owned)
    .to_vec();
    options.extend(first_node.is_none().then(|| "--wsrep-new-cluster".to_owned()));
    options
}

/// Run at every start before the first connection is taken. The ordinary role gets no right on `*.*`, which would
/// bring it a slot beyond `max_connections`.
fn accounts(secret: &str) -> String {
    let app = ["%", "localhost"].map(|host| {
        format!(
            "CREATE USER IF NOT EXISTS '{ROLE}'@'{host}' IDENTIFIED BY '{PASSWORD}';\n\
             GRANT ALL ON `{ROLE}%`.* TO '{ROLE}'@'{host}';\n\
             GRANT ALL ON `diesel\\_session\\_%`.* TO '{ROLE}'@'{host}';\n"
        )
    });
    format!(
        "DELETE FROM mysql.global_priv WHERE user IN ('', 'root');\n\
         FLUSH PRIVILEGES;\n\
         CREATE USER IF NOT EXISTS '{SUPERUSER}'@'127.0.0.1' IDENTIFIED BY '{secret}';\n\
         GRANT ALL ON *.* TO '{SUPERUSER}'@'127.0.0.1' WITH GRANT OPTION;\n\
         {}CREATE DATABASE IF NOT EXISTS {ROLE};\n",
        app.concat()
    )
}

fn url_at(role: &str, password: &str, port: u16, database: &str) -> String {
    format!("mysql://{role}:{}@127.0.0.1:{port}/{database}", text::percent_encoded(password))
}
