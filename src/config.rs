//! The configuration of an application's database and pool.

use std::fmt;
use std::time::Duration;

use crate::behind::Behind;
use crate::error::{Details, NO_APP, Result};
use crate::kind::DatabaseKind;
use crate::url::{self, Target};
use crate::wording::{is_unprintable, name};

/// The URL of an application's database, and the options of its connections.
///
/// | option | default | meaning |
/// |---|---|---|
/// | [`max_size`](Self::max_size) | 8 | maximum number of connections at one time |
/// | [`acquire_timeout`](Self::acquire_timeout) | 5 s | maximum wait for a connection, including the time to connect |
/// | [`connect_timeout`](Self::connect_timeout) | 3 s | maximum duration of one connect, one ping or one reset |
/// | [`idle_timeout`](Self::idle_timeout) | 60 s | idle time after which a connection is closed |
/// | [`max_lifetime`](Self::max_lifetime) | 30 min | maximum age of a connection, idle or in use, with up to 10 % jitter |
/// | [`statement_timeout`](Self::statement_timeout) | none | maximum duration of a statement |
/// | [`lock_timeout`](Self::lock_timeout) | none; 5 s for SQLite and for `create_all`, `drop_all` | maximum wait for another session's lock |
/// | [`leak_threshold`](Self::leak_threshold) | 30 s | time after which a held connection is logged |
/// | [`application_name`](Self::application_name) | `diesel-session/` and the application's id | name in PostgreSQL's `pg_stat_activity` |
/// | [`reset`](Self::reset) | [`Reset::WhenDirty`] | which connections are reset before their next checkout |
/// | [`wal`](Self::wal) | on | SQLite files use write-ahead logging |
/// | [`protect_schema`](Self::protect_schema) | off | `drop_all` returns an error |
/// | [`behind`](Self::behind) | [`Behind::Nothing`] | the connection pooler before the server |
/// | [`schema_url`](Self::schema_url) | none | the URL for changes of the schema |
///
/// ```
/// use std::time::Duration;
/// use diesel_session::Config;
///
/// let config = Config::new("postgres://shop:secret@db.example/shop")
///     .max_size(4)
///     .statement_timeout(Duration::from_secs(10));
/// assert!(!format!("{config:?}").contains("secret"));
/// ```
#[derive(Clone)]
#[must_use]
pub struct Config {
    pub(crate) url: String,
    pub(crate) max_size: u32,
    pub(crate) acquire_timeout: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) max_lifetime: Option<Duration>,
    pub(crate) statement_timeout: Option<Duration>,
    pub(crate) lock_timeout: Option<Duration>,
    pub(crate) leak_threshold: Option<Duration>,
    pub(crate) application_name: Option<String>,
    pub(crate) connection_init_sql: Vec<String>,
    pub(crate) reset: Reset,
    pub(crate) wal: bool,
    /// The server ends a session that is idle in a transaction for longer, unless another limit is set. For the test
    /// kit.
    #[cfg_attr(not(any(feature = "postgres", feature = "mysql")), allow(dead_code))]
    pub(crate) idle_in_transaction_timeout: Option<Duration>,
    pub(crate) protect_schema: bool,
    pub(crate) behind: Behind,
    pub(crate) schema_url: Option<String>,
}

/// The connections that the pool resets after their checkin, so that the state that a holder has left on a connection
/// does not reach the next holder. For [`Config::reset`].
///
/// On PostgreSQL a reset is one message of several statements. It restores the initial state of settings (`SET`,
/// `search_path`, `SET ROLE`, `SET SESSION AUTHORIZATION`), advisory locks, temporary tables, `LISTEN`, cursors and the
/// cached values of sequences, and it runs `connection_init_sql` and
/// `Database::on_connect` again. Diesel's prepared statements stay. MySQL, MariaDB and
/// SQLite have no such statements: there the pool closes the connection, and the next holder gets a new one.
///
/// A session checks its connection in at a commit or rollback, and in an autocommit scope after each statement and
/// after each use of the raw connection.
///
/// A reset does not end an open transaction. The pool closes a connection that is checked in with an open transaction,
/// whatever is chosen here.
///
/// The pool does not detect, and a reset does not remove:
///
/// * on PostgreSQL, the statements of SQL's `PREPARE`, loaded libraries, and the OIDs of types that Diesel caches by
///   name;
/// * the state that functions, triggers and procedures leave, if a typed statement calls them without naming them, and
///   on MySQL and MariaDB also if a typed statement names them;
/// * the state that calls of the driver set without SQL, such as SQLite's functions and collations.
///
/// Set such state in [`Config::connection_init_sql`] or [`Database::on_connect`](crate::Database::on_connect), for all
/// connections alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Reset {
    /// The connections on which code ran that may have left state: raw SQL, [`Session::with`](crate::Session::with) and
    /// [`Session::connection`](crate::Session::connection), typed statements with raw fragments or functions of the
    /// program, and `create_all` and `drop_all` if they changed anything.
    ///
    /// On MySQL, MariaDB and SQLite the pool keeps a connection on which only SELECT, INSERT, UPDATE, DELETE and
    /// savepoints ran, without functions and variables that are known to leave state (`GET_LOCK`, user variables,
    /// `load_extension`).
    #[default]
    WhenDirty,
    /// All connections, also after typed statements. On MySQL, MariaDB and SQLite each connection is then checked out
    /// only once.
    Always,
    /// No connections: the program removes the state itself.
    Never,
}

impl Config {
    /// The default of [`max_size`](Self::max_size).
    pub(crate) const MAX_SIZE: u32 = 8;

    /// A configuration with a database URL and the default options.
    ///
    /// * PostgreSQL: `postgres://user:password@host:port/database`, or libpq's `host=.. dbname=..`.
    /// * MySQL and MariaDB: `mysql://user:password@host:port/database`.
    /// * SQLite: a path, `sqlite://path`, or `:memory:`. `:memory:` is one database for all connections of the
    ///   application, and lives until the application is disposed of. It has no write-ahead log, so readers and
    ///   uncommitted writers wait for each other. If contexts overlap, use a temporary file instead.
    ///
    /// A path is relative to the working directory unless it starts with `/`: `sqlite://shop.sqlite` is a file in the
    /// working directory, and `sqlite:///shop.sqlite` is a file in the root folder. For an enum of connections, a path
    /// must end in `.sqlite`, `.sqlite3` or `.db`.
    ///
    /// In a URL, percent-encode special characters of the user and the password.
    ///
    /// The library adds `keepalives_idle=10`, `keepalives_interval=3`, `keepalives_count=3` and
    /// `tcp_user_timeout=20000` to a PostgreSQL URL, except for those that the URL sets itself. They apply to TCP. With
    /// them a statement on a dead network fails after about 20 s, instead of hours with the defaults of the operating
    /// system. MySQL's client has no such parameters.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            max_size: Self::MAX_SIZE,
            acquire_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            idle_timeout: Some(Duration::from_secs(60)),
            max_lifetime: Some(Duration::from_secs(30 * 60)),
            statement_timeout: None,
            lock_timeout: None,
            leak_threshold: Some(Duration::from_secs(30)),
            application_name: None,
            connection_init_sql: Vec::new(),
            reset: Reset::WhenDirty,
            wal: true,
            idle_in_transaction_timeout: None,
            protect_schema: false,
            behind: Behind::Nothing,
            schema_url: None,
        }
    }

    /// A configuration with the URL in an environment variable, often `DATABASE_URL`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the variable is not set, is empty or is not
    /// UTF-8.
    pub fn from_env(variable: &str) -> Result<Self> {
        let reason = match std::env::var(variable) {
            Ok(url) if !url.is_empty() => return Ok(Self::new(url)),
            Ok(_) => "is empty",
            Err(std::env::VarError::NotPresent) => "is not set",
            Err(std::env::VarError::NotUnicode(_)) => "is not valid UTF-8",
        };
        Err(Details::InvalidConfig {
            app: NO_APP.into(),
            reason: format!("the environment variable {} {reason}; it holds the database URL", name(variable)),
        }
        .into())
    }

    /// Most connections at one time, 1 to 10,000. Connections of an earlier pool that were out when a
    /// [`dispose`](crate::App::dispose) gave up are not among them: each is closed when it comes back.
    ///
    /// A pool opens nothing in advance, and one connection at a time. So the callers that find a cold pool wait for
    /// each other's connects: the last of `N` connections is there after `N` times the time of one connect. A program
    /// that expects many callers at once can open the connections before, by as many checkouts at the same time:
    ///
    /// ```
    /// # use diesel::SqliteConnection;
    /// # use diesel_session::{Config, Database, Result};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # let app = DB.init_app("warm", Config::new(":memory:").max_size(4))?;
    /// let connections = (0..4).map(|_| app.checkout()).collect::<Result<Vec<_>>>()?;
    /// drop(connections);
    /// assert_eq!(app.status().idle, 4);
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    pub fn max_size(mut self, connections: u32) -> Self {
        self.max_size = connections;
        self
    }

    /// Longest wait for a connection, connecting included. A pool [opens one connection at a time](Self::max_size): of
    /// the callers that find a cold pool, the `N`th waits for `N` connects.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// Longest wait for one connect, and for the answer to the ping or the reset of a connection: without an answer the
    /// connection is closed, and another one is tried.
    ///
    /// PostgreSQL's client library gets it too, in whole seconds and 2 at least, and applies it to each host of a URL.
    /// So where the first of several hosts is dead, the caller's time is over before the second is tried. Give the URL
    /// a shorter limit for each host, `?connect_timeout=2`, and this one enough time for all of them.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// A connection that has been idle for that time is closed, at most a quarter of the time later; `None` keeps it.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.idle_timeout = timeout.into();
        self
    }

    /// The maximum age of a connection, idle or in use. Up to 10 % of jitter is subtracted, so that the connections do
    /// not expire at the same time. `None` sets no limit. The pool closes a connection that expires while it is checked
    /// out at its checkin.
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.max_lifetime = lifetime.into();
        self
    }

    /// The maximum duration of a statement. The server ends a statement that takes longer (PostgreSQL, MariaDB; MySQL
    /// for SELECT only). SQLite has no such limit and ignores the option.
    pub fn statement_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.statement_timeout = timeout.into();
        self
    }

    /// The maximum wait of a statement for another session's lock, after which the statement fails. MySQL and MariaDB
    /// count in whole seconds, rounded up.
    pub fn lock_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.lock_timeout = timeout.into();
        self
    }

    /// The time after which a held connection is logged, once, as a warning. The log line has the application, the
    /// source location of the statement that checked the connection out (`file:line`), the thread, the time, and
    /// whether the connection is used for a transaction. The later checkin of the connection is logged too, at the
    /// level `info`. Both lines have the target `diesel_session::leak`. `None` logs nothing.
    pub fn leak_threshold(mut self, threshold: impl Into<Option<Duration>>) -> Self {
        self.leak_threshold = threshold.into();
        self
    }

    /// The name in PostgreSQL's `pg_stat_activity`. Other databases ignore it.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = Some(name.into());
        self
    }

    /// SQL to run on every new connection, after the library's own settings. The method may be called several times. On
    /// PostgreSQL the SQL runs again after each [`reset`](Self::reset) of the connection, so it must be idempotent.
    /// `init_app` refuses SQL without a statement. [`Database::on_connect`](crate::Database::on_connect) is a function
    /// for the same purpose.
    #[doc(alias = "on_connect")]
    pub fn connection_init_sql(mut self, sql: impl Into<String>) -> Self {
        self.connection_init_sql.push(sql.into());
        self
    }

    /// The connections that the pool resets after their checkin.
    pub fn reset(mut self, reset: Reset) -> Self {
        self.reset = reset;
        self
    }

    /// Whether the library switches SQLite files to write-ahead logging.
    pub fn wal(mut self, on: bool) -> Self {
        self.wal = on;
        self
    }

    /// Whether [`drop_all`](crate::App::drop_all) returns
    /// [`ErrorKind::SchemaProtected`](crate::ErrorKind::SchemaProtected). Switch it on for every database whose rows
    /// must not be lost, such as that of production, because `drop_all` does not ask for confirmation.
    pub fn protect_schema(mut self, on: bool) -> Self {
        self.protect_schema = on;
        self
    }

    /// Declares the connection pooler between the program and the server.
    ///
    /// # Errors
    /// `init_app` returns [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) for a pooler of another database
    /// than PostgreSQL, and for options that a pooler in transaction mode cannot apply.
    pub fn behind(mut self, behind: Behind) -> Self {
        self.behind = behind;
        self
    }

    /// The URL that `create_all`, `drop_all`, `migrations` and the functions of [`admin`](crate::admin) use in place of
    /// the application's: that of the server itself if the application's URL leads to a pooler, or that of a role that
    /// may change the schema. A connection is opened for each call and closed at the end of the call. Tests of the
    /// kit change the schema of their own database. They use this URL only behind a pooler in transaction mode, as that of
    /// the server.
    ///
    /// It must lead to the same database of the same server. `create_all`, `drop_all` and `migrations` compare the name
    /// of the database with the one that the application's URL leads to. They cannot compare the servers, because a
    /// pooler may lead to several.
    ///
    /// # Errors
    /// `init_app` returns [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the URL is malformed or for
    /// another kind of database, and for SQLite. `create_all`, `drop_all` and `migrations` return it if the name of the
    /// database is another one.
    pub fn schema_url(mut self, url: impl Into<String>) -> Self {
        self.schema_url = Some(url.into());
        self
    }

    /// The first option about a pooler or about the URL for changes of the schema that is invalid for the application's
    /// `target`, as a text.
    pub(crate) fn problem_behind_pooler(&self, target: &Target) -> Option<String> {
        if let Some(url) = &self.schema_url {
            let reason = match target.kind {
                DatabaseKind::Sqlite => Err("SQLite has no server; leave it out".into()),
                kind => Target::parse(url, Some(kind)).map(drop),
            };
            if let Err(reason) = reason {
                return Some(format!("`Config::schema_url`: {reason}"));
            }
        }
        if self.behind != Behind::Nothing && target.kind != DatabaseKind::Postgres {
            let kind = target.kind.name();
            return Some(format!("`Config::behind` is for poolers of PostgreSQL, and this is {kind}; leave it out"));
        }
        if !self.behind.is_transaction_pooler() {
            return None;
        }
        let why = "a pooler in transaction mode gives each transaction another session of the server";
        let instead = "Set this for the role or the database on the server: `ALTER ROLE .. SET ..`";
        if target.has_parameter("options") {
            return Some(format!("the URL has `options`, but {why}. {instead}"));
        }
        (!self.connection_init_sql.is_empty()).then(|| {
            format!("`Config::connection_init_sql` was given, but {why}. {instead}, or in the scope with `SET LOCAL`")
        })
    }

    /// The configuration for changes of the schema, if they have a URL of their own.
    pub(crate) fn for_schema(&self) -> Option<Self> {
        let url = self.schema_url.clone()?;
        Some(Self { url, behind: Behind::Nothing, schema_url: None, ..self.clone() })
    }

    /// The configuration for tests, which have databases of their own: the schema is changed there. Tests need sessions
    /// of the server that no pooler gives to other clients.
    #[cfg(feature = "testing")]
    pub(crate) fn for_tests(self) -> Result<Self> {
        if !self.behind.is_transaction_pooler() {
            return Ok(Self { schema_url: None, ..self });
        }
        let reason = "behind a pooler in transaction mode, tests need the URL of the server: set `Config::schema_url`";
        self.for_schema().ok_or_else(|| Details::InvalidConfig { app: NO_APP.into(), reason: reason.into() }.into())
    }

    /// The first invalid option, as a text, if there is one.
    pub(crate) fn problem(&self) -> Option<String> {
        let times = [
            ("acquire_timeout", Some(self.acquire_timeout)),
            ("connect_timeout", Some(self.connect_timeout)),
            ("idle_timeout", self.idle_timeout),
            ("max_lifetime", self.max_lifetime),
            ("statement_timeout", self.statement_timeout),
            ("lock_timeout", self.lock_timeout),
            ("leak_threshold", self.leak_threshold),
        ];
        if self.max_size == 0 || self.max_size > 10_000 {
            return Some(format!("max_size is {}; it takes 1 to 10,000", self.max_size));
        }
        if self.application_name.as_ref().is_some_and(|name| name.contains(is_unprintable)) {
            return Some("application_name has characters that cannot be seen".into());
        }
        if self.connection_init_sql.iter().any(|sql| sql.contains('\0')) {
            return Some("the SQL of connection_init_sql contains a NUL character".into());
        }
        for (name, value) in times {
            match value {
                Some(Duration::ZERO) if name == "acquire_timeout" || name == "connect_timeout" => {
                    return Some(format!("{name} is zero; give a time"));
                }
                Some(Duration::ZERO) => {
                    return Some(format!("{name} is zero; give a time, or `None` where it may be switched off"));
                }
                Some(long) if long > Duration::from_secs(366 * 24 * 3600) => {
                    return Some(format!("{name} is longer than a year"));
                }
                _ => {}
            }
        }
        None
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("url", &url::redacted(&self.url))
            .field("max_size", &self.max_size)
            .field("acquire_timeout", &self.acquire_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("idle_timeout", &self.idle_timeout)
            .field("max_lifetime", &self.max_lifetime)
            .field("statement_timeout", &self.statement_timeout)
            .field("lock_timeout", &self.lock_timeout)
            .field("leak_threshold", &self.leak_threshold)
            .field("application_name", &self.application_name)
            .field("connection_init_sql", &format_args!("{} statements", self.connection_init_sql.len()))
            .field("reset", &self.reset)
            .field("wal", &self.wal)
            .field("protect_schema", &self.protect_schema)
            .field("behind", &self.behind)
            .field("schema_url", &self.schema_url.as_deref().map(url::redacted))
            .finish()
    }
}
