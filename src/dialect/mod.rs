//! What is true of one kind of database only, behind one set of questions.
//!
//! Everything here is SQL text and texts of errors, so it needs no driver: which drivers are built in changes nothing.

mod databases;
mod effect;
mod error_texts;
mod leftovers;
mod migrations;
mod mysql;
mod nested;
mod poison;
mod postgres;
pub(crate) mod sql_parts;
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

pub(crate) use databases::{HERE, fnv1a};
pub(crate) use effect::Effect;
pub(crate) use migrations::{BEGIN, State, TRY_LOCK_IN_TRANSACTION, needs_too_many_locks};
pub(crate) use poison::{Poison, advised};
pub(crate) use sqlite::{BUSY, memory_url};

/// Stands between the parts of an answer: no text that is meant to be read has it.
pub(crate) const BETWEEN: char = '\u{1f}';

/// How a transaction is begun.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beginning {
    pub(crate) mode: Mode,
    pub(crate) isolation: Option<Isolation>,
    pub(crate) remaining: Option<Duration>,
}

impl Beginning {
    /// With nothing said about it.
    pub(crate) fn plain() -> Self {
        Self { mode: Mode::Default, isolation: None, remaining: None }
    }
}

/// What has to be known before it is asked whether a transaction still exists.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Question {
    /// One of the errors was a serialization failure or deadlock.
    pub(crate) serialization_failure: bool,
    /// The transaction that exists may be another one.
    pub(crate) may_be_another: bool,
    /// There is no savepoint younger than the one that was set when the transaction was begun.
    pub(crate) marker_is_last: bool,
}

impl DatabaseKind {
    /// The kind of a connection type, where the type alone says it.
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

    /// The kind a URL names by its scheme or form.
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

    /// The URL for the driver, with what the library adds to it.
    pub(crate) fn driver_url(self, target: &Target, config: &Config, app: &str) -> String {
        match self {
            Self::Postgres => postgres::driver_url(target, config, app),
            Self::Mysql | Self::Sqlite => target.url.clone(),
        }
    }

    /// Statements for a new connection, each sent by itself. `no_log`: it is a SQLite database that can have no write-ahead log.
    pub(crate) fn setup(self, config: &Config, no_log: bool) -> Vec<String> {
        match self {
            Self::Postgres => postgres::setup(config),
            Self::Mysql => mysql::setup(config),
            Self::Sqlite => sqlite::setup(config, no_log),
        }
    }

    /// What must be so after the program's own statements on a new connection.
    pub(crate) fn required(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::REQUIRED),
            Self::Mysql => Some(mysql::REQUIRED),
            Self::Sqlite => None,
        }
    }

    /// Whether a connection is used although a statement of its setup was refused.
    pub(crate) fn goes_without(self, sql: &str, message: &str) -> bool {
        self == Self::Sqlite && sqlite::goes_without(sql, message)
    }

    /// What a failed connect means. In the message all white space is single blanks.
    pub(crate) fn classify(self, message: &str) -> ConnectErrorKind {
        let (known, translated): (_, &[(&[&str], _)]) = match self {
            Self::Postgres => (postgres::CONNECT_ERRORS, postgres::TRANSLATED_CONNECT_ERRORS),
            Self::Mysql => (mysql::CONNECT_ERRORS, mysql::TRANSLATED_CONNECT_ERRORS),
            Self::Sqlite => (sqlite::CONNECT_ERRORS, &[]),
        };
        let english = known.iter().find(|(text, _)| message.contains(text)).map(|(_, kind)| *kind);
        let other = || translated.iter().find(|(texts, _)| says(message, texts)).map(|(_, kind)| *kind);
        let masked = || translated.iter().find(|(texts, _)| says_masked(message, texts)).map(|(_, kind)| *kind);
        english.or_else(other).or_else(masked).unwrap_or(ConnectErrorKind::Other)
    }

    /// How many connections this process keeps open while some of them are idle, on a server that allows `capacity`: a quarter is
    /// left to others. For SQLite it is what keeps forgotten applications from using up the process's open files.
    pub(crate) fn keeps_open(self, capacity: usize) -> usize {
        match self {
            Self::Sqlite => 64,
            Self::Postgres | Self::Mysql if capacity == 0 => usize::MAX,
            Self::Postgres | Self::Mysql => (capacity * 3 / 4).max(1),
        }
    }

    /// A query for the server's number of this session, how many connections an ordinary role may have, what tells this server
    /// from others by whatever address it was reached, `set` where it has told the server to look for its client, and the name of
    /// the database; with blanks between.
    pub(crate) fn introduction(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::INTRODUCTION),
            Self::Mysql => Some(mysql::INTRODUCTION),
            Self::Sqlite => None,
        }
    }

    /// A query for the client's port of this session as the server sees it; NULL or no number for a local socket.
    pub(crate) fn client_port(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::CLIENT_PORT),
            Self::Mysql => Some(mysql::CLIENT_PORT),
            Self::Sqlite => None,
        }
    }

    /// A query for who has the server, each with how many connections.
    pub(crate) fn session_counts_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::CENSUS),
            Self::Mysql => Some(mysql::CENSUS),
            Self::Sqlite => None,
        }
    }

    /// A query that answers `1` where an ordinary role gets no connection any more.
    pub(crate) fn is_full(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::IS_FULL),
            Self::Mysql => Some(mysql::IS_FULL),
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

    /// The names of schemas as SQL.
    pub(crate) fn search_path<S: AsRef<str>>(schemas: impl IntoIterator<Item = S>) -> String {
        let names: Vec<_> = schemas.into_iter().map(|schema| Self::Postgres.quote(schema.as_ref())).collect();
        if names.is_empty() { "''".into() } else { names.join(", ") }
    }

    /// Begins a transaction. PostgreSQL's looks names up in the schemas of `search_path`.
    pub(crate) fn begin<C: SessionConnection>(
        self,
        conn: &mut C,
        how: Beginning,
        search_path: Option<&str>,
    ) -> diesel::QueryResult<()> {
        if let Some(search_path) = search_path {
            let sql = postgres::begin(how).unwrap_or_else(|| "BEGIN".into());
            return conn.begin_with(&format!("{sql}; {}", postgres::search_path(search_path)));
        }
        let sql = match self {
            Self::Postgres => postgres::begin(how),
            Self::Mysql => Some(mysql::begin(how)),
            Self::Sqlite => sqlite::begin(how),
        };
        match sql {
            Some(sql) => conn.begin_with(&sql),
            None => conn.begin_level(),
        }
    }

    /// Limits the statements that follow in this transaction to what is left of a deadline.
    pub(crate) fn limit_statements(self, remaining: Duration) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_transaction(remaining)),
            Self::Mysql => Some(mysql::limit(Some(remaining))),
            Self::Sqlite => None,
        }
    }

    /// Limits the statements of an autocommit session to what is left of a deadline.
    pub(crate) fn limit_session(self, limit: Option<Duration>) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_session(limit)),
            Self::Mysql => Some(mysql::limit(limit)),
            Self::Sqlite => None,
        }
    }

    /// Limits the waits for other writers to what is left of a deadline, where the database has no limit for statements;
    /// `None` for `remaining` goes back to what the configuration says.
    pub(crate) fn limit_waits(self, remaining: Option<Duration>, config: &Config) -> Option<String> {
        let most = config.lock_timeout.unwrap_or(BUSY);
        (self == Self::Sqlite).then(|| sqlite::busy_timeout(remaining.map_or(most, |remaining| remaining.min(most))))
    }

    /// What has to be sent after a transaction so that the connection is as it was before.
    pub(crate) fn after_transaction(self, how: Beginning, config: &Config) -> Option<String> {
        match self {
            Self::Mysql => how.remaining.map(|_| mysql::limit(config.statement_timeout)),
            Self::Postgres | Self::Sqlite => None,
        }
    }

    /// What makes this database refuse writes where a read-only transaction does not, and what ends that.
    pub(crate) fn read_only_guard(self) -> Option<(&'static str, &'static str)> {
        (self == Self::Sqlite).then_some(sqlite::READ_ONLY)
    }

    /// Whether the transaction still exists, after an error or after a statement that may have ended it.
    pub(crate) fn still_exists<C: SessionConnection>(self, conn: &mut C, question: Question) -> bool {
        match self {
            // libpq has told Diesel. What it has not told is whether the text was read as the server has read it.
            Self::Postgres => !question.may_be_another || postgres::reads_strings_as_usual(conn),
            Self::Mysql if question.may_be_another && question.marker_is_last => mysql::has_marker(conn),
            Self::Mysql => mysql::is_in_transaction(conn, question.serialization_failure),
            Self::Sqlite => sqlite::is_in_transaction(conn),
        }
    }

    /// How a transaction in which raw statements were sent is committed: in one message with something that is refused where the
    /// transaction is not the one that was begun, or is aborted. `None` where a plain `COMMIT` is refused then.
    pub(crate) fn guarded_commit(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(postgres::GUARDED_COMMIT),
            Self::Mysql => Some(mysql::GUARDED_COMMIT),
            Self::Sqlite => None,
        }
    }

    /// Whether what [`guarded_commit`](Self::guarded_commit) sends before the commit was refused, by the error and by the levels that
    /// Diesel counts after it.
    pub(crate) fn was_refused(self, error: &DieselError, depth: Option<u32>) -> bool {
        match self {
            // A failed COMMIT ends the transaction, and libpq tells Diesel.
            Self::Postgres => depth.is_some_and(|depth| depth > 0),
            // The name of the savepoint is in the error, in whatever language.
            Self::Mysql => {
                matches!(error, DieselError::DatabaseError(_, information) if information.message().contains(mysql::MARKER))
            }
            Self::Sqlite => false,
        }
    }

    /// What a raw statement does to the transaction in which it is sent.
    pub(crate) fn effect(self, sql: &str) -> Effect {
        Effect::of(sql, self)
    }

    /// Whether [`reset`](Self::reset) makes a connection what it was when it was new; otherwise only closing it does.
    pub(crate) fn can_reset(self) -> bool {
        self == Self::Postgres
    }

    /// Removes what a holder has left on a connection, as one message to be sent outside of any transaction.
    pub(crate) fn reset(self, config: &Config, checks_client: bool) -> String {
        match self {
            Self::Postgres => postgres::reset(config, checks_client),
            Self::Mysql | Self::Sqlite => String::new(),
        }
    }

    /// Whether a statement may leave something on the connection that outlives its transaction. Where a reset removes it, a raw
    /// statement is not looked at, and a typed one only for calls of functions that are not known.
    pub(crate) fn leaves_something(self, sql: &str, raw: bool) -> bool {
        match self {
            Self::Postgres => raw || leftovers::calls_unknown_function(sql),
            Self::Mysql => leftovers::leaves_something(sql, true),
            Self::Sqlite => leftovers::leaves_something(sql, false),
        }
    }

    /// Whether an error says that a lock was not to be had in time.
    pub(crate) fn is_lock_timeout(self, message: &str) -> bool {
        match self {
            Self::Postgres => message.contains("lock timeout") || says(message, translations::LOCK_TIMEOUT),
            Self::Mysql => {
                message.contains("Lock wait timeout exceeded") || says(message, translations::MARIADB_LOCK_TIMEOUT)
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

    /// Whether an error is a serialization failure, a deadlock or a lock that was not to be had: running the whole transaction
    /// again may succeed. Diesel has a name for some of them only.
    ///
    /// So may it after an error that comes of what a connection remembers, or of the server that it is connected to: the next attempt
    /// gets another connection.
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
                known.iter().any(|known| message.contains(known)) || translated.iter().any(|texts| says(message, texts))
            }
            DieselError::RollbackErrorOnCommit { commit_error, .. } => self.is_transient(commit_error),
            _ => false,
        }
    }

    /// A query for the number of the open transaction, by which it can be asked for later. NULL where it has written nothing.
    pub(crate) fn transaction_number(self) -> Option<&'static str> {
        (self == Self::Postgres).then_some(postgres::TRANSACTION_NUMBER)
    }

    /// A query for what became of the transaction of that number; `committed`, `aborted`, `in progress`, or NULL where it has been forgotten.
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

    /// A query that answers `1` once it has the lock of all schema operations on `database`. SQLite has none but that of
    /// writing.
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

    /// Queries for the sessions that have had what this one waited for in vain; the first that is permitted is the one to ask. An
    /// answer is the session's number, its name, its state, for how many seconds it has had that, and its last statement, with
    /// [`BETWEEN`] between them.
    pub(crate) fn blockers(self, waited: Duration) -> Vec<String> {
        match self {
            Self::Postgres => vec![postgres::blockers(waited)],
            Self::Mysql => mysql::blockers(waited),
            Self::Sqlite => Vec::new(),
        }
    }

    /// The same for the session that has the lock of all schema operations on `database`.
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

    /// An identifier as SQL: the one place that quotes names.
    pub(crate) fn quote(self, identifier: &str) -> String {
        match self {
            Self::Postgres | Self::Sqlite => format!("\"{}\"", identifier.replace('"', "\"\"")),
            Self::Mysql => format!("`{}`", identifier.replace('`', "``")),
        }
    }

    /// A query for the names of what the schema consists of: columns and indexes, each after its table.
    pub(crate) fn inventory(self) -> &'static str {
        match self {
            Self::Postgres => postgres::INVENTORY,
            Self::Mysql => mysql::INVENTORY,
            Self::Sqlite => sqlite::INVENTORY,
        }
    }
}

/// Whether the server has ended an idle connection, as far as can be told without asking it.
pub(crate) fn has_hung_up<C: SessionConnection>(conn: &mut C) -> bool {
    #[cfg(feature = "postgres")]
    if let Some(conn) = (conn as &mut dyn std::any::Any).downcast_mut::<diesel::pg::PgConnection>() {
        // libpq reads what has come: first what the server had to say, then that it has gone.
        return (0..2).any(|_| conn.notifications_iter().any(|notification| notification.is_err()));
    }
    let _ = conn;
    false
}

/// Whether a message is one of these texts, in which `%` stands for any text that the server inserts.
fn says(message: &str, texts: &[&str]) -> bool {
    // Some translations have line breaks.
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    texts.iter().any(|text| {
        let mut rest = message.as_str();
        text.split('%').all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    })
}

/// The same for a server whose locale has no letters but English ones, as in a cluster that was made with `--locale=C`: before a
/// connection is there it sends a question mark for each of the others. A text of which nothing but question marks is left is
/// not recognised.
fn says_masked(message: &str, texts: &[&str]) -> bool {
    let message = mask(message);
    // Every text stands at the end, behind the word for `FATAL`.
    let starts = message.match_indices(": ").map(|(at, colon)| at + colon.len()).chain([0]);
    let starts: Vec<_> = starts.collect();
    let is_telling = |text: &str| text.contains('%') || text.bytes().filter(u8::is_ascii_alphabetic).count() > 3;
    texts.iter().map(|text| mask(text)).filter(|text| is_telling(text)).any(|text| {
        starts.iter().any(|start| {
            let (first, parts) = text.split_once('%').unwrap_or((&text, ""));
            let Some(mut rest) = message[*start..].strip_prefix(first) else { return false };
            let inserts = text.contains('%');
            let (inner, last) = parts.rsplit_once('%').unwrap_or(("", parts));
            for part in inner.split('%') {
                match rest.find(part) {
                    Some(at) => rest = &rest[at + part.len()..],
                    None => return false,
                }
            }
            if inserts { rest.ends_with(last) } else { rest.is_empty() }
        })
    })
}

/// A text as a locale without other letters shows it: glibc has replacements for punctuation.
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
                || says(text, translations::TERMINATED)
        }
        // An error nobody can name, after which not even a rollback is answered, may be the loss itself.
        DieselError::RollbackErrorOnCommit { commit_error, rollback_error } => {
            is_connection_lost(commit_error)
                || matches!(**commit_error, DieselError::DatabaseError(DatabaseErrorKind::Unknown, _))
                    && is_connection_lost(rollback_error)
        }
        _ => false,
    }
}

/// Whether it is only that there was no statement in the text. To PostgreSQL itself that is no error, and it aborts nothing.
pub(crate) fn is_empty_query(error: &DieselError) -> bool {
    matches!(error, DieselError::DatabaseError(DatabaseErrorKind::Unknown, information)
        if information.message() == "Received an empty query")
}

/// Whether an error is one of those that MySQL ends a transaction with; Diesel knows it of prepared statements only.
pub(crate) fn is_deadlock(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => true,
        DieselError::DatabaseError(_, information) => {
            let message = information.message();
            message.contains("Deadlock found") || says(message, translations::MARIADB_DEADLOCK)
        }
        _ => false,
    }
}

/// Whether running the whole transaction again may succeed, whatever the kind of database.
pub(crate) fn is_transient(error: &DieselError) -> bool {
    [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite].into_iter().any(|kind| kind.is_transient(error))
}

/// Milliseconds, rounded up so that a positive time never becomes "no limit".
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1)
}
