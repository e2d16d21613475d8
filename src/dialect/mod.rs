//! Everything that is specific to one kind of database.
//!
//! `postgres`, `mysql` and `sqlite` each hold one [`Dialect`], and depend on the feature of their driver. The other
//! files hold the code that the dialects share, one subject each.

// Each dialect uses some options and circumstances only.
#![cfg_attr(
    not(all(feature = "postgres", feature = "mysql", feature = "sqlite", feature = "testing")),
    allow(dead_code)
)]

mod admin;
#[cfg(feature = "testing")]
mod databases;
mod effect;
mod error_texts;
mod leftovers;
pub(crate) mod lexer;
mod migrations;
#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "testing")]
mod nested;
mod poison;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(all(test, feature = "postgres", feature = "mysql"))]
mod translations_tests;

use std::any::TypeId;
use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use diesel::result::Error as DieselError;

use crate::config::Config;
use crate::connection::{Inspect, SessionConnection};
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::settings::{Isolation, Mode};
use crate::url::Target;

#[cfg(feature = "testing")]
pub(crate) use databases::NAME_PLACEHOLDER;
pub(crate) use effect::{Effect, WriteStep};
pub(crate) use error_texts::{is_connection_lost, is_empty_query};
pub(crate) use migrations::{BEGIN, ConnectionSnapshot, TRY_LOCK_IN_TRANSACTION, needs_too_many_locks};
pub(crate) use poison::{Poison, with_poison_advice};

/// Separates the fields of a query result. It is a control character that does not occur in printable text.
pub(crate) const SEPARATOR: char = '\u{1f}';

/// The answer to [`Texts::defaults_query`] if a transaction sees at each statement what is committed at that moment.
pub(crate) const READ_COMMITTED: &str = "committed";

/// The longest wait of a statement for another writer of a SQLite file, unless the configuration sets a limit.
pub(crate) const DEFAULT_BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The constant SQL and the error texts of one kind of database.
///
/// An error text is one text, or the lines of a file of translations. `%` in it stands for any text that the server
/// inserts.
pub(crate) struct Texts {
    /// Sets the settings on which the library relies. It runs again after the program's own statements on a new
    /// connection.
    pub(crate) required_settings: Option<&'static str>,
    /// A query for seven fields, separated by blanks: the default isolation level as in `defaults_query`; the server's
    /// id of this session; the number of connections of ordinary roles; an identity of the server that does not depend
    /// on the address; `default` if the setup should switch on the server's check for its client; the age of the session
    /// in seconds, or `?`; and the name of the database. The query changes nothing, because the session may turn out to
    /// be one that a pooler gives to other clients too.
    pub(crate) server_info_query: Option<&'static str>,
    /// A query for two fields, separated by a blank: the default isolation level, which is [`READ_COMMITTED`] if it is
    /// READ COMMITTED or weaker, and SQL that restores the present limit of statements.
    pub(crate) defaults_query: Option<&'static str>,
    /// A statement that fails if the server does not execute statements. `None` if the driver's ping has the same result.
    pub(crate) ping: Option<&'static str>,
    /// A query for the client's port of this session as the server sees it. The result is NULL or no number for a local
    /// socket.
    pub(crate) client_port_query: Option<&'static str>,
    /// A query for the clients of the server, each with its number of sessions.
    pub(crate) session_counts_query: Option<&'static str>,
    /// A query that returns `1` if an ordinary role cannot get another connection.
    pub(crate) full_server_query: Option<&'static str>,
    /// Restricts the `search_path` of the session to the server's own schema.
    pub(crate) catalog_search_path: Option<&'static str>,
    /// Makes the database refuse writes, and ends this, for a database without read-only transactions.
    pub(crate) read_only_guard: Option<(&'static str, &'static str)>,
    /// Commits a transaction in which raw statements ran. The message begins with a statement that the server refuses
    /// if the transaction is aborted, or is not the one that the session began. `None` if the database refuses a plain
    /// `COMMIT` in these cases.
    pub(crate) guarded_commit: Option<&'static str>,
    /// A query for the id of the open transaction, for [`Dialect::transaction_status`], and the server's process,
    /// separated by a blank. The result is NULL if the transaction has written nothing.
    pub(crate) transaction_number: Option<&'static str>,
    /// A query for the identity of the server's data. A standby that is promoted gets another identity, because it may
    /// lack the last transactions.
    pub(crate) server_identity: Option<&'static str>,
    /// A query whose result is `on` if the open transaction must not write, or the server accepts no writes.
    pub(crate) is_read_only: Option<&'static str>,
    /// Begins a nested transaction.
    begin_nested: &'static str,
    /// Fails if the transaction around a nested one is aborted, or is not the one in which the nested one began. The
    /// nested transaction has to end after it.
    probe_nested: Option<&'static str>,
    /// Releases the savepoint of a nested transaction if a commit would succeed.
    commit_nested: &'static str,
    /// A query for the names of all tables.
    pub(crate) tables: &'static str,
    /// A query for the names of the columns and indexes of the schema, each prefixed with the name of its table.
    pub(crate) inventory: &'static str,
    /// A query whose rows are the input of [`ConnectionSnapshot::from_rows`].
    pub(crate) snapshot_query: &'static str,
    connect_errors: &'static [(&'static str, ConnectErrorKind)],
    /// Connect errors of an account or a database without free connections, on a server that may have some. Only the
    /// texts with a name count.
    account_full: &'static [&'static str],
    transient: &'static [&'static str],
    lock_timeout: &'static [&'static str],
    deadlock: &'static [&'static str],
    connection_lost: &'static [&'static str],
    /// The driver has cached plans or types of an older schema.
    outdated: &'static [&'static str],
    /// The type of a value is not the type that the statement needs.
    other_type: &'static [&'static str],
    /// The server or the file refuses writes.
    read_only: &'static [&'static str],
}

/// The SQL of one kind of database that depends on circumstances.
pub(crate) trait Dialect {
    fn texts(&self) -> &'static Texts;

    /// The URL for the driver, with the parameters that the library adds.
    fn driver_url(&self, target: &Target, _config: &Config, _app: &str) -> String {
        target.url.clone()
    }

    /// The statements for a new connection, each of which is sent separately. `no_wal` is true for a SQLite database
    /// that cannot have a write-ahead log. `checks_client`: see [`Texts::server_info_query`].
    fn setup(&self, config: &Config, no_wal: bool, checks_client: bool) -> Vec<String>;

    /// Whether the pool accepts a connection although the database refused the setup statement `sql` with `message`.
    fn tolerates_refusal(&self, _sql: &str, _message: &str) -> bool {
        false
    }

    /// Begins a transaction. `None` stands for Diesel's own `BEGIN`.
    fn begin(&self, options: BeginOptions) -> Option<Cow<'static, str>>;

    /// Limits the statements of a session. `None` for `limit` restores the server's default.
    fn limit_session(&self, _limit: Option<Duration>) -> Option<String> {
        None
    }

    /// Limits the following statements of this transaction.
    fn limit_statements(&self, limit: Duration) -> Option<String> {
        self.limit_session(Some(limit))
    }

    /// Limits the wait for locks on this connection.
    fn lock_limit(&self, limit: Duration) -> String;

    /// Asks the database whether the transaction still exists, after an error or after a statement that may have ended
    /// it.
    fn transaction_exists(&self, conn: &mut dyn Inspect, check: TransactionCheck) -> bool;

    /// Whether the database may be in a transaction that Diesel does not know.
    fn may_be_in_transaction(&self, conn: &mut dyn Inspect) -> bool;

    /// Whether the database refused the first statement of [`Texts::guarded_commit`]. `error` is the error of the
    /// message, and `depth` is Diesel's transaction depth after the error.
    fn was_refused(&self, _error: &DieselError, _depth: Option<u32>) -> bool {
        false
    }

    /// SQL that removes the state that a holder has left on a connection: one message, to be sent outside a
    /// transaction or behind its end. `checks_client` is that of the setup. `application_name` is set again behind a pooler, whose own connection had another name.
    fn reset(&self, _config: &Config, _checks_client: bool, _application_name: &str) -> String {
        String::new()
    }

    /// A query for the status of the transaction with this id on the server with this identity: `committed`, `aborted`,
    /// `in progress`, `forgotten` if the server has discarded the status, or `another server`.
    fn transaction_status(&self, _number: u64, _identity: &str) -> Option<String> {
        None
    }

    /// A query that takes the lock of all schema operations on `database`, and returns `1` if it succeeds. SQLite has
    /// only its write lock.
    fn try_lock_schema(&self, _database: &str) -> Option<String> {
        None
    }

    /// A query that releases this lock. If the session did not hold the lock, the query returns the server's process of
    /// the session; otherwise it returns NULL.
    fn unlock_schema(&self, _database: &str) -> Option<String> {
        None
    }

    /// Queries for the sessions that hold the locks for which this session waited until its timeout. The caller uses
    /// the first query that the server permits. A row has the id of a session, its name, its state, the seconds since
    /// it entered this state, and its last statement, separated by [`SEPARATOR`].
    fn blockers(&self, _waited: Duration) -> Vec<String> {
        Vec::new()
    }

    /// Like [`blockers`](Self::blockers), for the session that holds the lock of all schema operations on `database`.
    fn schema_lock_holders(&self, _database: &str) -> Vec<String> {
        Vec::new()
    }

    /// Statements that restore the state `before`. `now` is the current state.
    fn restore(&self, before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String>;

    /// Statements that set the limits of a schema operation for the session: a lock timeout, and no statement timeout.
    fn set_limits(&self, lock_timeout: Duration) -> Vec<String>;

    /// Statements that restore the session's limits of `original`.
    fn restore_limits(&self, original: &ConnectionSnapshot) -> Vec<String>;

    /// A query that returns one row if the bookkeeping table exists in `schema`.
    fn bookkeeping_table_query(&self, schema: &str) -> String;
}

/// The options with which a transaction begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BeginOptions {
    pub(crate) mode: Mode,
    pub(crate) isolation: Option<Isolation>,
    /// The time until the deadline, or another limit of the transaction's statements.
    pub(crate) remaining: Option<Duration>,
    /// The longest wait for locks, if it is set for the transaction and not for the connection.
    pub(crate) lock_timeout: Option<Duration>,
}

impl BeginOptions {
    /// The options of Diesel's own `BEGIN`.
    pub(crate) fn plain() -> Self {
        Self { mode: Mode::Default, isolation: None, remaining: None, lock_timeout: None }
    }

    /// The isolation level and the mode of a transaction on a server.
    fn characteristics(self) -> Vec<&'static str> {
        let isolation = self.isolation.map(|isolation| match isolation {
            Isolation::ReadUncommitted => "ISOLATION LEVEL READ UNCOMMITTED",
            Isolation::ReadCommitted => "ISOLATION LEVEL READ COMMITTED",
            Isolation::RepeatableRead => "ISOLATION LEVEL REPEATABLE READ",
            Isolation::Serializable => "ISOLATION LEVEL SERIALIZABLE",
        });
        isolation.into_iter().chain((self.mode == Mode::ReadOnly).then_some("READ ONLY")).collect()
    }
}

/// The circumstances of a check whether a transaction still exists.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TransactionCheck {
    /// One of the errors was a serialization failure or a deadlock.
    pub(crate) serialization_failure: bool,
    /// The existing transaction may be another transaction than the one that the session began.
    pub(crate) may_be_replaced: bool,
    /// No savepoint is newer than the marker savepoint, which the session sets when it begins the transaction.
    pub(crate) marker_is_newest: bool,
}

impl DatabaseKind {
    /// The dialect of a kind whose feature is enabled. The URL of another kind is refused.
    #[inline]
    pub(crate) fn dialect(self) -> &'static dyn Dialect {
        match self.known() {
            #[cfg(feature = "postgres")]
            Self::Postgres => &postgres::Postgres,
            #[cfg(feature = "mysql")]
            Self::Mysql => &mysql::Mysql,
            #[cfg(feature = "sqlite")]
            Self::Sqlite => &sqlite::Sqlite,
            #[allow(unreachable_patterns, reason = "all features are enabled")]
            kind => unreachable!("no URL is parsed for {kind:?} without its feature"),
        }
    }

    #[inline]
    pub(crate) fn texts(self) -> &'static Texts {
        self.dialect().texts()
    }

    /// The database kind of a connection type, if the type determines it.
    pub(crate) fn of_type<C: 'static>() -> Option<Self> {
        let connection = TypeId::of::<C>();
        #[cfg(feature = "postgres")]
        if connection == TypeId::of::<diesel::pg::PgConnection>() {
            return Some(Self::Postgres);
        }
        #[cfg(feature = "mysql")]
        if connection == TypeId::of::<diesel::mysql::MysqlConnection>() {
            return Some(Self::Mysql);
        }
        #[cfg(feature = "sqlite")]
        if connection == TypeId::of::<diesel::sqlite::SqliteConnection>() {
            return Some(Self::Sqlite);
        }
        let _ = connection;
        None
    }

    /// The number of connections from which on this process closes idle connections, for a server with `capacity`
    /// connections. It leaves a quarter of the connections to other processes. For SQLite the limit prevents unused
    /// applications from exhausting the open files of the process.
    pub(crate) fn eviction_threshold(self, capacity: usize) -> usize {
        match self {
            Self::Sqlite => 64,
            Self::Postgres | Self::Mysql if capacity == 0 => usize::MAX,
            Self::Postgres | Self::Mysql => (capacity * 3 / 4).max(1),
        }
    }

    /// Whether an idle connection of this database can be dead.
    pub(crate) fn can_go_stale(self) -> bool {
        self.known() != Self::Sqlite
    }

    /// Whether the database has one writer at a time.
    pub(crate) fn has_one_writer(self) -> bool {
        self.known() == Self::Sqlite
    }

    /// Whether [`Dialect::reset`] restores the initial state of a connection. Otherwise the pool has to close the
    /// connection.
    pub(crate) fn can_reset(self) -> bool {
        self.known() == Self::Postgres
    }

    /// The value of PostgreSQL's `search_path` for these schemas.
    pub(crate) fn search_path<S: AsRef<str>>(schemas: impl IntoIterator<Item = S>) -> String {
        let names: Vec<_> = schemas.into_iter().map(|schema| Self::Postgres.quote(schema.as_ref())).collect();
        if names.is_empty() { "''".into() } else { names.join(", ") }
    }

    /// Begins a transaction. On PostgreSQL the transaction uses `search_path`, if given.
    pub(crate) fn begin<C: SessionConnection>(
        self,
        conn: &mut C,
        options: BeginOptions,
        search_path: Option<&str>,
    ) -> diesel::QueryResult<()> {
        match (self.dialect().begin(options), search_path) {
            (sql, Some(path)) => {
                let sql = sql.as_deref().unwrap_or("BEGIN");
                conn.begin_with(&format!("{sql}; {}", set_search_path(path)))
            }
            (Some(sql), None) => conn.begin_with(&sql),
            (None, None) => conn.begin_level(),
        }
    }

    /// SQL that limits the following statements to the time until a deadline: on SQLite their waits for other writers,
    /// because SQLite has no limit for statements.
    pub(crate) fn limit(self, remaining: Duration, in_transaction: bool, config: &Config) -> String {
        let dialect = self.dialect();
        let limit =
            if in_transaction { dialect.limit_statements(remaining) } else { dialect.limit_session(Some(remaining)) };
        limit.unwrap_or_else(|| dialect.lock_limit(remaining.min(config.lock_timeout.unwrap_or(DEFAULT_BUSY_TIMEOUT))))
    }

    /// SQL that restores the limit of the configuration.
    pub(crate) fn restore_limit(self, config: &Config) -> Option<String> {
        match self.known() {
            Self::Postgres | Self::Mysql => self.dialect().limit_session(config.statement_timeout),
            Self::Sqlite => Some(self.dialect().lock_limit(config.lock_timeout.unwrap_or(DEFAULT_BUSY_TIMEOUT))),
        }
    }

    /// A text as an SQL string literal.
    pub(crate) fn literal(self, text: &str) -> String {
        let text = if self == Self::Mysql { text.replace('\\', "\\\\") } else { text.to_owned() };
        format!("'{}'", text.replace('\'', "''"))
    }

    /// An identifier as SQL. No other function quotes identifiers.
    pub(crate) fn quote(self, identifier: &str) -> String {
        let mark = if self == Self::Mysql { "`" } else { "\"" };
        format!("{mark}{}{mark}", identifier.replace(mark, &mark.repeat(2)))
    }
}

/// SQL of PostgreSQL for the rest of a transaction.
fn set_search_path(schemas: &str) -> String {
    format!("SET LOCAL search_path = {schemas}")
}

/// Whether the server has closed an idle connection, as far as the client can detect this without a round trip. It
/// discards notifications of PostgreSQL that have arrived.
pub(crate) fn detect_hang_up<C: SessionConnection>(conn: &mut C) -> bool {
    #[cfg(feature = "postgres")]
    if let Some(conn) = (conn as &mut dyn std::any::Any).downcast_mut::<diesel::pg::PgConnection>() {
        // The first read consumes a message of the server, the second read finds the end of the stream.
        return (0..2).any(|_| conn.notifications_iter().any(|notification| notification.is_err()));
    }
    let _ = conn;
    false
}

/// A unique URL for the in-memory database of one application.
pub(crate) fn memory_url() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("file:/diesel-session-{}?vfs=memdb", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Milliseconds, rounded up. A positive time must not become 0, which means "no limit".
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1)
}

/// FNV-1a with 64 bits. The hash has to be the same in every program.
pub(crate) fn fnv1a<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    parts
        .into_iter()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
