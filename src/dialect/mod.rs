//! Everything that is specific to one kind of database.
//!
//! The module consists of SQL texts and error texts, so it compiles the same whichever drivers are enabled.

#[cfg(feature = "testing")]
mod databases;
mod effect;
mod error_texts;
mod leftovers;
pub(crate) mod lexer;
mod migrations;
mod mysql;
mod nested;
mod poison;
mod postgres;
mod sqlite;
mod translations;
#[cfg(test)]
mod translations_tests;

use std::any::TypeId;
use std::time::Duration;

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::settings::{Isolation, Mode};
use crate::url::Target;

#[cfg(feature = "testing")]
pub(crate) use databases::NAME_PLACEHOLDER;
pub(crate) use effect::Effect;
pub(crate) use migrations::{BEGIN, ConnectionSnapshot, TRY_LOCK_IN_TRANSACTION, needs_too_many_locks};
pub(crate) use poison::{Poison, with_poison_advice};
pub(crate) use sqlite::{DEFAULT_BUSY_TIMEOUT, memory_url};

/// Separates the fields of a query result. It is a control character that does not occur in printable text.
pub(crate) const SEPARATOR: char = '\u{1f}';

/// The options with which a transaction begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BeginOptions {
    pub(crate) mode: Mode,
    pub(crate) isolation: Option<Isolation>,
    /// The time until the deadline.
    pub(crate) remaining: Option<Duration>,
}

impl BeginOptions {
    /// The options of Diesel's own `BEGIN`.
    pub(crate) fn plain() -> Self {
        Self { mode: Mode::Default, isolation: None, remaining: None }
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

    /// The database kind that a URL names by its scheme or its form.
    pub(crate) fn of_url(url: &str) -> Option<Self> {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| url.starts_with(prefix));
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| url.ends_with(suffix));
        let keyword = url.split_once('=').map(|(name, _)| name.trim());
        if starts(&["postgres://", "postgresql://"]) || keyword.is_some_and(|name| postgres::KEYWORDS.contains(&name)) {
            Some(Self::Postgres)
        } else if starts(&["mysql://"]) {
            Some(Self::Mysql)
        } else if starts(&["sqlite:", "file:", ":memory:"])
            || !starts(&["postgres", "mysql"]) && ends(&[".sqlite", ".sqlite3", ".db"])
        {
            Some(Self::Sqlite)
        } else {
            None
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Postgres => "PostgreSQL",
            Self::Mysql => "MySQL",
            Self::Sqlite => "SQLite",
        }
    }

    /// The kind of the server in the text of an error, which is [`Target::shown`].
    pub(crate) fn of_shown(server: &str) -> Option<Self> {
        let name = server.split(' ').next();
        [Self::Postgres, Self::Mysql, Self::Sqlite].into_iter().find(|kind| name == Some(kind.name()))
    }

    pub(crate) fn url_form(self) -> &'static str {
        match self {
            Self::Postgres => "postgres://user:password@host:port/database",
            Self::Mysql => "mysql://user:password@host:port/database",
            Self::Sqlite => "a path, sqlite://path or :memory:",
        }
    }

    /// The URL for the driver, with the parameters that the library adds.
    pub(crate) fn driver_url(self, target: &Target, config: &Config, app: &str) -> String {
        match self {
            Self::Postgres => postgres::driver_url(target, config, app),
            Self::Mysql | Self::Sqlite => target.url.clone(),
        }
    }

    /// The statements for a new connection, each of which is sent separately. `no_wal` is true for a SQLite database
    /// that cannot have a write-ahead log.
    pub(crate) fn setup(self, config: &Config, no_wal: bool) -> Vec<String> {
        match self {
            Self::Postgres => postgres::setup(config),
            Self::Mysql => mysql::setup(config),
            Self::Sqlite => sqlite::setup(config, no_wal),
        }
    }

    /// The statement that sets the settings on which the library relies. It runs again after the program's own
    /// statements on a new connection.
    pub(crate) fn required_settings(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::REQUIRED_SETTINGS),
            Self::Mysql => Some(mysql::REQUIRED_SETTINGS),
            Self::Sqlite => None,
        }
    }

    /// Whether the pool accepts a connection although the database refused the setup statement `sql` with `message`.
    pub(crate) fn tolerates_refusal(self, sql: &str, message: &str) -> bool {
        self == Self::Sqlite && sqlite::tolerates_refusal(sql, message)
    }

    /// The kind of a connect error. White space in `message` must consist of single blanks.
    pub(crate) fn classify_connect_error(self, message: &str) -> ConnectErrorKind {
        let (known, translated): (_, &[(&[&str], _)]) = match self {
            Self::Postgres => (postgres::CONNECT_ERRORS, postgres::TRANSLATED_CONNECT_ERRORS),
            Self::Mysql => (mysql::CONNECT_ERRORS, mysql::TRANSLATED_CONNECT_ERRORS),
            Self::Sqlite => (sqlite::CONNECT_ERRORS, &[]),
        };
        let english = known.iter().find(|(text, _)| message.contains(text)).map(|(_, kind)| *kind);
        let other = || translated.iter().find(|(texts, _)| contains_any(message, texts)).map(|(_, kind)| *kind);
        let masked = || translated.iter().find(|(texts, _)| contains_any_masked(message, texts)).map(|(_, kind)| *kind);
        english.or_else(other).or_else(masked).unwrap_or(ConnectErrorKind::Other)
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

    /// A query for five fields, separated by blanks: the server's id of this session; the number of connections of
    /// ordinary roles; an identity of the server that does not depend on the address; `set` if the query has switched
    /// on the check of the client; and the name of the database.
    pub(crate) fn server_info_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::SERVER_INFO),
            Self::Mysql => Some(mysql::SERVER_INFO),
            Self::Sqlite => None,
        }
    }

    /// A query for the client's port of this session as the server sees it. The result is NULL or no number for a local
    /// socket.
    pub(crate) fn client_port_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::CLIENT_PORT),
            Self::Mysql => Some(mysql::CLIENT_PORT),
            Self::Sqlite => None,
        }
    }

    /// A query for the clients of the server, each with its number of sessions.
    pub(crate) fn session_counts_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::SESSION_COUNTS),
            Self::Mysql => Some(mysql::SESSION_COUNTS),
            Self::Sqlite => None,
        }
    }

    /// A query that returns `1` if an ordinary role cannot get another connection.
    pub(crate) fn full_server_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::FULL_SERVER),
            Self::Mysql => Some(mysql::FULL_SERVER),
            Self::Sqlite => None,
        }
    }

    /// Whether an idle connection of this database can be dead.
    pub(crate) fn can_go_stale(self) -> bool {
        self != Self::Sqlite
    }

    /// Whether the database has one writer at a time.
    pub(crate) fn has_one_writer(self) -> bool {
        self == Self::Sqlite
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
        if let Some(search_path) = search_path {
            let sql = postgres::begin(options).unwrap_or_else(|| "BEGIN".into());
            return conn.begin_with(&format!("{sql}; {}", postgres::search_path(search_path)));
        }
        let sql = match self {
            Self::Postgres => postgres::begin(options),
            Self::Mysql => Some(mysql::begin(options)),
            Self::Sqlite => sqlite::begin(options),
        };
        match sql {
            Some(sql) => conn.begin_with(&sql),
            None => conn.begin_level(),
        }
    }

    /// SQL that limits the following statements of this transaction to the time until a deadline.
    pub(crate) fn limit_statements(self, remaining: Duration) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_transaction(remaining)),
            Self::Mysql => Some(mysql::limit(Some(remaining))),
            Self::Sqlite => None,
        }
    }

    /// SQL that limits the statements of an autocommit session to the time until a deadline.
    pub(crate) fn limit_session(self, limit: Option<Duration>) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_session(limit)),
            Self::Mysql => Some(mysql::limit(limit)),
            Self::Sqlite => None,
        }
    }

    /// SQL that limits the waits for other writers to the time until a deadline, for a database without a statement
    /// limit. `None` for `remaining` restores the limit of the configuration.
    pub(crate) fn limit_waits(self, remaining: Option<Duration>, config: &Config) -> Option<String> {
        let longest = config.lock_timeout.unwrap_or(DEFAULT_BUSY_TIMEOUT);
        let limit = remaining.map_or(longest, |remaining| remaining.min(longest));
        (self == Self::Sqlite).then(|| sqlite::busy_timeout(limit))
    }

    /// SQL that restores the settings of the connection after a transaction.
    pub(crate) fn after_transaction(self, options: BeginOptions, config: &Config) -> Option<String> {
        match self {
            Self::Mysql => options.remaining.map(|_| mysql::limit(config.statement_timeout)),
            Self::Postgres | Self::Sqlite => None,
        }
    }

    /// SQL that makes the database refuse writes, and SQL that ends this, for a database without read-only
    /// transactions.
    pub(crate) fn read_only_guard(self) -> Option<(&'static str, &'static str)> {
        (self == Self::Sqlite).then_some(sqlite::READ_ONLY)
    }

    /// Asks the database whether the transaction still exists, after an error or after a statement that may have ended
    /// it.
    pub(crate) fn transaction_exists<C: SessionConnection>(self, conn: &mut C, check: TransactionCheck) -> bool {
        match self {
            // Diesel knows from libpq whether there is a transaction. Only the lexer may have read the text differently
            // than the server, if the server reads strings in an unusual way.
            Self::Postgres => !check.may_be_replaced || postgres::has_standard_strings(conn),
            Self::Mysql if check.may_be_replaced && check.marker_is_newest => mysql::renew_marker(conn),
            Self::Mysql => mysql::is_in_transaction(conn, check.serialization_failure),
            Self::Sqlite => sqlite::probe_transaction(conn),
        }
    }

    /// SQL that commits a transaction in which raw statements ran. The message begins with a statement that the server
    /// refuses if the transaction is aborted, or is not the one that the session began. `None` if the database refuses
    /// a plain `COMMIT` in these cases.
    pub(crate) fn guarded_commit(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::GUARDED_COMMIT),
            Self::Mysql => Some(mysql::GUARDED_COMMIT),
            Self::Sqlite => None,
        }
    }

    /// Whether the database refused the first statement of [`guarded_commit`](Self::guarded_commit). `error` is the
    /// error of the message, and `depth` is Diesel's transaction depth after the error.
    pub(crate) fn was_refused(self, error: &DieselError, depth: Option<u32>) -> bool {
        match self {
            // A failed COMMIT ends the transaction, and Diesel learns this from libpq.
            Self::Postgres => depth.is_some_and(|depth| depth > 0),
            // The error contains the name of the savepoint in every language.
            Self::Mysql => {
                matches!(error, DieselError::DatabaseError(_, information) if information.message().contains(mysql::MARKER))
            }
            Self::Sqlite => false,
        }
    }

    /// The effect of a raw statement on the open transaction.
    pub(crate) fn effect(self, sql: &str) -> Effect {
        Effect::of(sql, self)
    }

    /// Whether [`reset`](Self::reset) restores the initial state of a connection. Otherwise the pool has to close the
    /// connection.
    pub(crate) fn can_reset(self) -> bool {
        self == Self::Postgres
    }

    /// SQL that removes the state that a holder has left on a connection: one message, to be sent outside a
    /// transaction.
    pub(crate) fn reset(self, config: &Config, checks_client: bool) -> String {
        match self {
            Self::Postgres => postgres::reset(config, checks_client),
            Self::Mysql | Self::Sqlite => String::new(),
        }
    }

    /// Whether a statement may leave state on the connection after its transaction. On PostgreSQL, where a reset is
    /// cheap, every raw statement counts, and a typed statement counts if it calls an unknown function.
    pub(crate) fn leaves_state(self, sql: &str, raw: bool) -> bool {
        match self {
            Self::Postgres => raw || leftovers::calls_unknown_function(sql),
            Self::Mysql => leftovers::leaves_state(sql, true),
            Self::Sqlite => leftovers::leaves_state(sql, false),
        }
    }

    /// Whether an error message reports a lock timeout.
    pub(crate) fn is_lock_timeout(self, message: &str) -> bool {
        match self {
            Self::Postgres => message.contains("lock timeout") || contains_any(message, translations::LOCK_TIMEOUT),
            Self::Mysql => {
                message.contains("Lock wait timeout exceeded")
                    || contains_any(message, translations::MARIADB_LOCK_TIMEOUT)
            }
            Self::Sqlite => message.contains("is locked"),
        }
    }

    /// Whether an error says that the lock of the whole database was not to be had in time. Servers have none.
    pub(crate) fn is_busy(self, error: &DieselError) -> bool {
        match error {
            DieselError::DatabaseError(_, information) => {
                self == Self::Sqlite && information.message() == sqlite::BUSY_TEXT
            }
            DieselError::RollbackErrorOnCommit { commit_error, .. } => self.is_busy(commit_error),
            _ => false,
        }
    }

    /// Who may have that lock, as far as this process can tell.
    pub(crate) fn possible_blocker(target: &Target, config: &Config) -> &'static str {
        match (target.in_memory, config.wal) {
            (true, _) => "another connection of this application",
            // The writers of this process stand in a queue, and readers are in nobody's way.
            (false, true) => "another process",
            (false, false) => "another process, or another connection of this one",
        }
    }

    /// Whether another attempt of the whole transaction may succeed: after a serialization failure, a deadlock or a lock timeout. Diesel
    /// has error kinds for some of them only.
    ///
    /// Another attempt may also succeed after an error that a cached state of the connection or a read-only server has
    /// caused, because the next attempt gets another connection.
    pub(crate) fn is_transient(self, error: &DieselError) -> bool {
        if matches!(self.poison(error), Some(Poison::Outdated | Poison::OtherType | Poison::Forgotten))
            || crate::error::advice::is_refused_write(error)
        {
            return true;
        }
        match error {
            DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => true,
            DieselError::DatabaseError(DatabaseErrorKind::Unknown, information) => {
                let known = match self {
                    Self::Postgres => postgres::TRANSIENT_ERRORS,
                    Self::Mysql => mysql::TRANSIENT_ERRORS,
                    Self::Sqlite => sqlite::TRANSIENT_ERRORS,
                };
                let translated: &[&[&str]] = match self {
                    Self::Postgres => postgres::TRANSLATED_TRANSIENT_ERRORS,
                    Self::Mysql => mysql::TRANSLATED_TRANSIENT_ERRORS,
                    Self::Sqlite => &[],
                };
                let message = information.message();
                known.iter().any(|known| message.contains(known))
                    || translated.iter().any(|texts| contains_any(message, texts))
            }
            DieselError::RollbackErrorOnCommit { commit_error, .. } => self.is_transient(commit_error),
            _ => false,
        }
    }

    /// A query for the id of the open transaction, for [`transaction_status`](Self::transaction_status). The result is
    /// NULL if the transaction has written nothing.
    pub(crate) fn transaction_number(self) -> Option<&'static str> {
        (self == Self::Postgres).then_some(postgres::TRANSACTION_NUMBER)
    }

    /// A query for the status of the transaction with this id: `committed`, `aborted`, `in progress`, or NULL if the
    /// server has discarded the status.
    pub(crate) fn transaction_status(self, number: u64) -> Option<String> {
        (self == Self::Postgres).then(|| postgres::transaction_status(number))
    }

    /// SQL that limits the wait for locks on this connection.
    pub(crate) fn lock_limit(self, limit: Duration) -> String {
        match self {
            Self::Postgres => postgres::lock_limit(limit),
            Self::Mysql => mysql::lock_limit(limit),
            Self::Sqlite => sqlite::busy_timeout(limit),
        }
    }

    /// A query that takes the lock of all schema operations on `database`, and returns `1` if it succeeds. SQLite has
    /// only its write lock.
    pub(crate) fn try_lock_schema(self, database: &str) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::TRY_LOCK_SCHEMA.into()),
            Self::Mysql => Some(mysql::try_lock_schema(database)),
            Self::Sqlite => None,
        }
    }

    pub(crate) fn unlock_schema(self, database: &str) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::UNLOCK_SCHEMA.into()),
            Self::Mysql => Some(mysql::unlock_schema(database)),
            Self::Sqlite => None,
        }
    }

    /// Queries for the sessions that hold the locks for which this session waited until its timeout. The caller uses
    /// the first query that the server permits. A row has the id of a session, its name, its state, the seconds since
    /// it entered this state, and its last statement, separated by [`SEPARATOR`].
    pub(crate) fn blockers(self, waited: Duration) -> Vec<String> {
        match self {
            Self::Postgres => vec![postgres::blockers(waited)],
            Self::Mysql => mysql::blockers(waited),
            Self::Sqlite => Vec::new(),
        }
    }

    /// Like [`blockers`](Self::blockers), for the session that holds the lock of all schema operations on `database`.
    pub(crate) fn schema_lock_holders(self, database: &str) -> Vec<String> {
        match self {
            Self::Postgres => vec![postgres::schema_lock_holder()],
            Self::Mysql => mysql::schema_lock_holders(database),
            Self::Sqlite => Vec::new(),
        }
    }

    /// A query for the names of all tables.
    pub(crate) fn tables(self) -> &'static str {
        match self {
            Self::Postgres => postgres::TABLES,
            Self::Mysql => mysql::TABLES,
            Self::Sqlite => sqlite::TABLES,
        }
    }

    /// A text as an SQL string literal.
    pub(crate) fn literal(self, text: &str) -> String {
        match self {
            Self::Postgres | Self::Sqlite => format!("'{}'", text.replace('\'', "''")),
            Self::Mysql => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''")),
        }
    }

    /// An identifier as SQL. No other function quotes identifiers.
    pub(crate) fn quote(self, identifier: &str) -> String {
        match self {
            Self::Postgres | Self::Sqlite => format!("\"{}\"", identifier.replace('"', "\"\"")),
            Self::Mysql => format!("`{}`", identifier.replace('`', "``")),
        }
    }

    /// A query for the names of the columns and indexes of the schema, each prefixed with the name of its table.
    pub(crate) fn inventory(self) -> &'static str {
        match self {
            Self::Postgres => postgres::INVENTORY,
            Self::Mysql => mysql::INVENTORY,
            Self::Sqlite => sqlite::INVENTORY,
        }
    }
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

/// Whether `message` contains one of `texts`. A `%` stands for any text that the server inserts.
fn contains_any(message: &str, texts: &[&str]) -> bool {
    // Some translations have line breaks.
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    texts.iter().any(|text| {
        let mut rest = message.as_str();
        text.split('%').all(|part| match rest.find(part) {
            Some(index) => {
                rest = &rest[index + part.len()..];
                true
            }
            None => false,
        })
    })
}

/// Like [`contains_any`], for a server whose locale has ASCII letters only, as in a cluster that was created with
/// `--locale=C`. Before the connection is established, such a server sends a question mark for each other letter. The
/// function does not recognise a text of which only question marks are left.
fn contains_any_masked(message: &str, texts: &[&str]) -> bool {
    let message = mask(message);
    // Every text is at the end of the message, behind the word for `FATAL`.
    let starts = message.match_indices(": ").map(|(index, colon)| index + colon.len()).chain([0]);
    let starts: Vec<_> = starts.collect();
    let is_distinctive = |text: &str| text.contains('%') || text.bytes().filter(u8::is_ascii_alphabetic).count() > 3;
    texts.iter().map(|text| mask(text)).filter(|text| is_distinctive(text)).any(|text| {
        starts.iter().any(|start| {
            let (first, parts) = text.split_once('%').unwrap_or((&text, ""));
            let Some(mut rest) = message[*start..].strip_prefix(first) else { return false };
            let has_insertion = text.contains('%');
            let (inner, last) = parts.rsplit_once('%').unwrap_or(("", parts));
            for part in inner.split('%') {
                match rest.find(part) {
                    Some(index) => rest = &rest[index + part.len()..],
                    None => return false,
                }
            }
            if has_insertion { rest.ends_with(last) } else { rest.is_empty() }
        })
    })
}

/// A text as a locale with ASCII letters only shows it. glibc has replacements for some punctuation.
fn mask(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '«' => masked.push_str("<<"),
            '»' => masked.push_str(">>"),
            '“' | '”' => masked.push('"'),
            '„' => masked.push_str(",,"),
            '‘' | '’' => masked.push('\''),
            '…' => masked.push_str("..."),
            '–' | '—' => masked.push('-'),
            c if c.is_ascii() => masked.push(c),
            c if c.is_whitespace() => masked.push(' '),
            _ => masked.push('?'),
        }
    }
    masked
}

/// Whether the connection itself is lost.
pub(crate) fn is_connection_lost(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::ClosedConnection | DatabaseErrorKind::UnableToSendCommand, _)
        | DieselError::BrokenTransactionManager => true,
        DieselError::DatabaseError(_, information) => {
            let text = information.message();
            [
                "server closed the connection",
                "no connection to the server",
                "terminating connection",
                "Lost connection",
                // MariaDB's client begins it with "Server", MySQL's with "MySQL server".
                "erver has gone away",
                "Connection was killed",
            ]
            .iter()
            .any(|known| text.contains(known))
                || contains_any(text, translations::TERMINATED)
        }
        // An unclassified commit error may itself be the loss of the connection, if the rollback after it fails with a
        // lost connection.
        DieselError::RollbackErrorOnCommit { commit_error, rollback_error } => {
            is_connection_lost(commit_error)
                || matches!(**commit_error, DieselError::DatabaseError(DatabaseErrorKind::Unknown, _))
                    && is_connection_lost(rollback_error)
        }
        _ => false,
    }
}

/// Whether the error only reports a text without a statement. PostgreSQL itself does not treat this as an error and
/// aborts nothing.
pub(crate) fn is_empty_query(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(DatabaseErrorKind::Unknown, information)
        if information.message() == "Received an empty query")
}

/// Whether an error is a deadlock, with which MySQL ends a transaction. Diesel recognises it for prepared statements
/// only.
pub(crate) fn is_deadlock(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => true,
        DieselError::DatabaseError(_, information) => {
            let message = information.message();
            message.contains("Deadlock found") || contains_any(message, translations::MARIADB_DEADLOCK)
        }
        _ => false,
    }
}

/// Whether another attempt of the whole transaction may succeed, on any kind of database.
pub(crate) fn is_transient(error: &DieselError) -> bool {
    [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite].into_iter().any(|kind| kind.is_transient(error))
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
