//! How an application reaches its database.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, NO_APP, Result};
use crate::url;
use crate::wording::{is_unprintable, name};

/// The URL of an application's database, and its options.
///
/// | option | default | meaning |
/// |---|---|---|
/// | [`max_size`](Self::max_size) | 8 | most connections at one time |
/// | [`acquire_timeout`](Self::acquire_timeout) | 5 s | longest wait for a connection, connecting included |
/// | [`connect_timeout`](Self::connect_timeout) | 3 s | longest wait for one connect, or for the answer to a ping or a reset |
/// | [`idle_timeout`](Self::idle_timeout) | 60 s | an idle connection is closed after that |
/// | [`max_lifetime`](Self::max_lifetime) | 30 min | maximum age of a connection, also of an idle one, with up to 10 % jitter |
/// | [`statement_timeout`](Self::statement_timeout) | none | the server ends a longer statement |
/// | [`lock_timeout`](Self::lock_timeout) | none; 5 s for SQLite and for `create_all`, `drop_all` | longest wait for another session's lock |
/// | [`leak_threshold`](Self::leak_threshold) | 30 s | a connection that is held longer is logged |
/// | [`application_name`](Self::application_name) | `diesel-session/` and the application's id | what PostgreSQL shows in `pg_stat_activity` |
/// | [`reset`](Self::reset) | [`Reset::WhenLent`] | which connections are reset before their next checkout |
/// | [`wal`](Self::wal) | on | SQLite files use write-ahead logging |
/// | [`protect_schema`](Self::protect_schema) | off | `drop_all` is refused |
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
    pub(crate) on_connect: Vec<String>,
    pub(crate) reset: Reset,
    pub(crate) wal: bool,
    /// The server ends a session that is idle in a transaction for longer, unless something sets another limit; for the test kit.
    pub(crate) idle_in_transaction_timeout: Option<Duration>,
    pub(crate) protect_schema: bool,
}

/// Which connections are cleaned when they come back, so that what a holder left on them does not reach the next; for
/// [`Config::reset`].
///
/// *Cleaned* means, on PostgreSQL, one message with a batch of its own: settings (`SET`, `search_path`, `SET ROLE`,
/// `SET SESSION AUTHORIZATION`), advisory locks, temporary tables, `LISTEN`, cursors and what sequences remember are as on a new
/// connection, prepared statements of Diesel stay, and `on_connect` has run again. MySQL, MariaDB and SQLite have no such
/// statement: there the connection is closed, and the next holder gets a new one.
///
/// A connection goes back at commit and rollback; in an autocommit scope after each statement or lending.
///
/// An open transaction is not among it: a connection that comes back with one is closed, whatever is chosen here.
///
/// Not seen, and not cleaned: on PostgreSQL statements of SQL's `PREPARE`, loaded libraries, and the numbers of types that
/// Diesel remembers by name; what functions, triggers and procedures that a typed statement calls without naming them leave behind, on MySQL
/// and MariaDB also those that are named; and what is set by calls of the driver and not by SQL, such as SQLite's functions and
/// collations. Set such things in `on_connect`, for all connections alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Reset {
    /// Those on which code ran that may have left something: raw SQL, [`Session::with`](crate::Session::with) and
    /// [`Session::connection`](crate::Session::connection), and typed statements with raw fragments or functions of the program's
    /// own. `create_all` and `drop_all` count too where they changed anything.
    ///
    /// MySQL, MariaDB and SQLite keep the connection where all that was sent was SELECT, INSERT, UPDATE, DELETE and savepoints,
    /// without what is known to leave something (`GET_LOCK`, user variables, `load_extension`).
    #[default]
    WhenLent,
    /// All, after typed statements too. On MySQL, MariaDB and SQLite every connection then serves once.
    Always,
    /// None: the program cleans up itself.
    Never,
}

impl Config {
    /// The size of a pool where nothing was said.
    pub(crate) const MAX_SIZE: u32 = 8;

    /// A database URL with the default options.
    ///
    /// * PostgreSQL: `postgres://user:password@host:port/database`, or libpq's `host=.. dbname=..`;
    /// * MySQL and MariaDB: `mysql://user:password@host:port/database`;
    /// * SQLite: a path, `sqlite://path`, or `:memory:`, which is one database for all connections of the application
    ///   and lives until it is disposed of. It has no write-ahead log: a reader and a writer that has not committed wait for each
    ///   other, so where contexts overlap a temporary file is better.
    ///
    /// A path is relative to the working directory unless it starts with `/`: `sqlite://shop.sqlite` is a file beside the program,
    /// `sqlite:///shop.sqlite` one in the root folder. For an enum of connections a path ends in `.sqlite`, `.sqlite3` or `.db`.
    ///
    /// Special characters of user and password are percent-encoded in URLs.
    ///
    /// To a PostgreSQL URL over TCP the library adds `keepalives_idle=10`, `keepalives_interval=3`, `keepalives_count=3` and
    /// `tcp_user_timeout=20000`, each unless the URL sets it itself: a statement on a network that is gone fails after some
    /// 20 s, where the operating system's defaults take hours. MySQL's client has no such parameters.
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
            on_connect: Vec::new(),
            reset: Reset::WhenLent,
            wal: true,
            idle_in_transaction_timeout: None,
            protect_schema: false,
        }
    }

    /// The URL in an environment variable, often `DATABASE_URL`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] where the variable is not set, is empty or is not UTF-8.
    pub fn from_env(variable: &str) -> Result<Self> {
        let reason = match std::env::var(variable) {
            Ok(url) if !url.is_empty() => return Ok(Self::new(url)),
            Ok(_) => "is empty",
            Err(std::env::VarError::NotPresent) => "is not set",
            Err(std::env::VarError::NotUnicode(_)) => "is not valid UTF-8",
        };
        Err(Error::InvalidConfig {
            app: NO_APP.into(),
            reason: format!("the environment variable {} {reason}; it holds the database URL", name(variable)),
        })
    }

    /// Most connections at one time, 1 to 10,000. Connections of an earlier pool that were out when a [`dispose`](crate::App::dispose)
    /// gave up are not among them: each is closed when it comes back.
    ///
    /// A pool opens nothing in advance, and one connection at a time. So the callers that find a cold pool wait for each other's
    /// connects: the last of `N` connections is there after `N` times the time of one connect. A program that expects many callers at
    /// once can open the connections before, by as many sessions at the same time:
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel::sql_types::Integer;
    /// # use diesel_session::{Config, Database, Result};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # let app = DB.init_app("warm", Config::new(":memory:").max_size(4))?;
    /// let sessions = (0..4).map(|_| app.open_session()).collect::<Result<Vec<_>>>()?;
    /// for session in &sessions {
    ///     session.get_result::<i32>(diesel::select(1.into_sql::<Integer>()))?;
    /// }
    /// drop(sessions);
    /// assert_eq!(app.status().idle, 4);
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    pub fn max_size(mut self, connections: u32) -> Self {
        self.max_size = connections;
        self
    }

    /// Longest wait for a connection, connecting included. A pool [opens one connection at a time](Self::max_size): of the callers that
    /// find a cold pool, the `N`th waits for `N` connects.
    pub fn acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }

    /// Longest wait for one connect, and for the answer to the ping or the reset of a connection: without an answer the connection is
    /// closed, and another one is tried.
    ///
    /// PostgreSQL's client library gets it too, in whole seconds and 2 at least, and applies it to each host of a URL. So where the first
    /// of several hosts is dead, the caller's time is over before the second is tried. Give the URL a shorter limit for each host,
    /// `?connect_timeout=2`, and this one enough time for all of them.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// An idle connection is closed after that time; `None` keeps it.
    pub fn idle_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.idle_timeout = timeout.into();
        self
    }

    /// Maximum age of a connection, in use or idle, less up to a tenth so that not all are closed at once; `None` keeps it. A connection that is
    /// checked out is closed when it is checked in.
    pub fn max_lifetime(mut self, lifetime: impl Into<Option<Duration>>) -> Self {
        self.max_lifetime = lifetime.into();
        self
    }

    /// The server ends a statement that takes longer (PostgreSQL, MariaDB; MySQL for SELECT). SQLite has no such limit
    /// and ignores it.
    pub fn statement_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.statement_timeout = timeout.into();
        self
    }

    /// A statement fails when it waits longer for another session's lock. MySQL and MariaDB count in whole seconds,
    /// rounded up.
    pub fn lock_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.lock_timeout = timeout.into();
        self
    }

    /// A connection that is held for longer is logged, once, as a warning: the application, the first statement that took it
    /// (`file:line`), the thread, for how long, and whether it was taken for a transaction. When it comes back, that is logged
    /// too, for information. Both lines have the target `diesel_session::leak`. `None` logs nothing.
    pub fn leak_threshold(mut self, threshold: impl Into<Option<Duration>>) -> Self {
        self.leak_threshold = threshold.into();
        self
    }

    /// The name in PostgreSQL's `pg_stat_activity`; other databases have none.
    pub fn application_name(mut self, name: impl Into<String>) -> Self {
        self.application_name = Some(name.into());
        self
    }

    /// SQL to run on every new connection, after the library's own settings. May be called several times. On PostgreSQL it runs
    /// again after each [`reset`](Self::reset) of the connection, so it must be idempotent. SQL without a statement is refused by
    /// `init_app`.
    pub fn on_connect(mut self, sql: impl Into<String>) -> Self {
        self.on_connect.push(sql.into());
        self
    }

    /// Which connections are cleaned when they come back.
    pub fn reset(mut self, reset: Reset) -> Self {
        self.reset = reset;
        self
    }

    /// Whether SQLite files are switched to write-ahead logging.
    pub fn wal(mut self, on: bool) -> Self {
        self.wal = on;
        self
    }

    /// Whether [`drop_all`](crate::App::drop_all) is refused with [`Error::SchemaProtected`]. It is meant for every configuration of a
    /// database whose rows are wanted, such as that of production: `drop_all` asks for no confirmation.
    pub fn protect_schema(mut self, on: bool) -> Self {
        self.protect_schema = on;
        self
    }

    /// What is wrong with the options, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        let positive =
            [("acquire_timeout", Some(self.acquire_timeout)), ("connect_timeout", Some(self.connect_timeout))];
        let optional = [
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
        if self.on_connect.iter().any(|sql| sql.contains('\0')) {
            return Some("the SQL of on_connect contains a NUL character".into());
        }
        for (name, value) in positive.into_iter().chain(optional) {
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
            .field("on_connect", &format_args!("{} statements", self.on_connect.len()))
            .field("reset", &self.reset)
            .field("wal", &self.wal)
            .field("protect_schema", &self.protect_schema)
            .finish()
    }
}
