use diesel::prelude::*;

use super::cluster::Cluster;
use super::{PASSWORD, ROLE, program, text};

/// A PgBouncer, in transaction mode unless the settings say otherwise, before a PostgreSQL of this machine; gone when it is dropped.
pub struct Pgbouncer {
    port: u16,
    _cluster: Cluster,
}

impl Pgbouncer {
    /// With as many connections to the server, and those settings beside.
    #[track_caller]
    pub fn start(server: u16, database: &str, connections: usize, settings: &str) -> Pgbouncer {
        Pgbouncer::try_start(server, database, connections, settings).unwrap_or_else(|error| {
            panic!("PgBouncer cannot be started: {error}\nIt is needed for the tests: `scripts/setup` installs it.")
        })
    }

    /// With a single database, so that it knows no other.
    #[track_caller]
    pub fn start_for(server: u16, database: &str) -> Pgbouncer {
        let databases = format!("{database} = host=127.0.0.1 port={server}");
        Pgbouncer::with(&databases, database, 2, "")
            .unwrap_or_else(|error| panic!("PgBouncer cannot be started: {error}"))
    }

    /// The major and the minor version.
    pub fn version() -> (u32, u32) {
        let program = program::find("pgbouncer", &["/usr/sbin".into()]).expect("`scripts/setup` installs it");
        let output = std::process::Command::new(program).arg("--version").output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().and_then(|line| line.split(' ').nth(1)).expect("a version");
        let mut numbers = version.split('.').map(|number| number.parse().expect("a number"));
        (numbers.next().expect("two numbers"), numbers.next().expect("two numbers"))
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    fn try_start(server: u16, database: &str, connections: usize, settings: &str) -> Result<Pgbouncer, String> {
        Pgbouncer::with(&format!("* = host=127.0.0.1 port={server}"), database, connections, settings)
    }

    fn with(databases: &str, database: &str, connections: usize, settings: &str) -> Result<Pgbouncer, String> {
        let pgbouncer = program::find("pgbouncer", &["/usr/sbin".into()])?;
        let cluster = Cluster::new(&["postgres", "nobody"], "INT")?;
        let port = program::free_port();
        let users = cluster.path("users");
        cluster.write("users", &format!("\"{ROLE}\" \"{PASSWORD}\"\n"))?;
        cluster.write(
            "pgbouncer.ini",
            &format!(
                "[databases]\n{databases}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\n\
                 default_pool_size = {connections}\nmax_client_conn = 100\n{settings}\n"
            ),
        )?;
        let url = url_at(port, database);
        cluster.start(&pgbouncer, &[cluster.path("pgbouncer.ini")], || PgConnection::establish(&url).is_ok())?;
        Ok(Pgbouncer { port, _cluster: cluster })
    }

    pub fn url_of(&self, database: &str) -> String {
        url_at(self.port, database)
    }
}

fn url_at(port: u16, database: &str) -> String {
    format!("postgres://{ROLE}:{}@127.0.0.1:{port}/{database}", text::percent_encoded(PASSWORD))
}
