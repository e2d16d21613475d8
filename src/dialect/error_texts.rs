//! The meaning of a database's errors for the program.

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::Poison;
use crate::config::Config;
use crate::error::{CONFIG_INIT_SQL, ConnectErrorKind, DATABASE_ON_CONNECT, Details, Error, LostStatement};
use crate::kind::DatabaseKind;
use crate::url::Target;

impl Error {
    /// Whether running the whole transaction again may succeed and does nothing twice.
    ///
    /// This is the case for a serialization failure, a deadlock, a locked SQLite database, a connection that was lost
    /// inside a transaction or by a migration of which nothing remains, a full or starting server, a pool without a
    /// free connection, and a deadlock of callers that wait for connections
    /// ([`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock), unless the calling thread holds all of the
    /// connections). It is also the case for an error that only concerns the connection: another program has changed
    /// the schema, or a server has become read-only for a session that was to write.
    ///
    /// [`Session::retry`](crate::Session::retry) repeats the transaction after the first three and after these last
    /// two.
    pub fn is_transient(&self) -> bool {
        match self.details() {
            Details::AcquireTimeout { .. }
            | Details::ConnectionLimitReached { .. }
            | Details::ConnectTimeout { .. }
            | Details::LockTimeout { .. } => true,
            // The other threads can go on when the caller has rolled back.
            Details::WouldDeadlock { holders, .. } => !holders.are_all_the_caller(),
            Details::ConnectionLost { lost, .. } => *lost != LostStatement::Autocommitted,
            // A file that cannot be opened does not appear by itself.
            Details::Connect { kind, server, .. } => {
                let is_file = DatabaseKind::of_shown(server) == Some(DatabaseKind::Sqlite);
                kind.is_transient() || *kind == ConnectErrorKind::Unreachable && !is_file
            }
            Details::Query { source, .. } => DatabaseKind::enabled().any(|kind| kind.is_transient(source)),
            Details::Migration(failure) => failure.is_transient(),
            Details::Autoflush { source, .. } => source.is_transient(),
            _ => false,
        }
    }

    /// Whether the database refused a row because of a CHECK constraint. This includes a failure in the flush before a
    /// query.
    pub fn is_check_violation(&self) -> bool {
        match self.database_error() {
            Some(DieselError::DatabaseError(DatabaseErrorKind::CheckViolation, _)) => true,
            // Diesel does not know the number of MariaDB's error.
            Some(DieselError::DatabaseError(DatabaseErrorKind::Unknown, information)) => {
                failed_mariadb_check(information.message()).is_some()
            }
            _ => false,
        }
    }

    /// The name of the constraint or of the unique index that the database refused to violate.
    ///
    /// PostgreSQL reports the name. MySQL and MariaDB mention it in their English message, MySQL with the table before
    /// the name of an index. SQLite mentions only the name of a CHECK constraint. Otherwise the result is `None`.
    pub fn constraint_name(&self) -> Option<&str> {
        let Some(DieselError::DatabaseError(kind, information)) = self.database_error() else { return None };
        let message = information.message();
        information.constraint_name().or_else(|| match kind {
            DatabaseErrorKind::UniqueViolation => message.rsplit_once(" for key '")?.1.strip_suffix('\''),
            DatabaseErrorKind::ForeignKeyViolation => between(message, "CONSTRAINT `", "` FOREIGN KEY"),
            DatabaseErrorKind::CheckViolation => message
                .strip_prefix("CHECK constraint failed: ")
                .or_else(|| between(message, "Check constraint '", "' is violated")),
            DatabaseErrorKind::Unknown => failed_mariadb_check(message),
            _ => None,
        })
    }
}

/// The name of the CHECK constraint in a message of MariaDB.
fn failed_mariadb_check(message: &str) -> Option<&str> {
    between(message.strip_prefix("CONSTRAINT ")?, "`", "` failed for ")
}

/// The text between `before` and the `after` that follows.
fn between<'t>(text: &'t str, before: &str, after: &str) -> Option<&'t str> {
    Some(text.split_once(before)?.1.split_once(after)?.0)
}

impl ConnectErrorKind {
    /// The advice as a sentence with a space before it. It is empty if only `message` can tell the remedy.
    pub(crate) fn advice(self, server: &str, message: &str) -> &'static str {
        let database = DatabaseKind::of_shown(server);
        let (is_sqlite, is_postgres) =
            (database == Some(DatabaseKind::Sqlite), database == Some(DatabaseKind::Postgres));
        // A lost connection or a lock is not a mistake in the SQL.
        let is_refused_sql = matches!(self, Self::Other | Self::Authentication | Self::UnknownDatabase)
            || self == Self::Unreachable && is_sqlite;
        if is_refused_sql && message.starts_with(CONFIG_INIT_SQL) {
            return " Correct the SQL of `Config::connection_init_sql`.";
        }
        if is_refused_sql && message.starts_with(DATABASE_ON_CONNECT) {
            return " Correct the function given to `Database::on_connect`.";
        }
        match self {
            Self::Unreachable if is_sqlite => " Check the path, and that the folder may be written to.",
            Self::Starting if is_sqlite => " End the transaction of the connection that has locked the file.",
            Self::Authentication if is_postgres => {
                " Check the user and the password in the URL, and the server's pg_hba.conf."
            }
            Self::Authentication => " Check the user and the password in the URL, and the rights of the account.",
            Self::NotPrimary => {
                " Wait until a server is promoted, or correct host and `target_session_attrs` in the URL."
            }
            Self::Other if message.contains("startup parameter: options") => {
                " The pooler does not accept `options`: remove it from the URL, and use `Config::connection_init_sql`, \
                 or `ALTER ROLE .. SET ..` on the server."
            }
            Self::Other => "",
            Self::ServerFull if is_limit_of_account(message, database) => {
                " The limit is that of the account or of the database, not the server's: end transactions of this \
                 account, lower `Config::max_size`, or have an administrator raise the limit."
            }
            Self::ServerFull => {
                " End transactions that are not needed, close connections of other programs, or raise the server's \
                 max_connections."
            }
            Self::Starting => " Wait until the server accepts connections.",
            Self::UndeclaredPooler => {
                " Declare the pooler with `Config::behind`: `Behind::SessionPooler`, or `Behind::TransactionPooler \
                 { keeps_prepared: false }` if it gives each transaction another session (PgBouncer: `pool_mode`). Or \
                 use the URL of the server itself."
            }
            Self::UnknownDatabase => " Create the database or correct its name in the URL.",
            Self::Unreachable => " Check host and port, and that the server runs.",
        }
    }
}

/// Whether the message of a full server names the account or the database as the one that is out of connections.
fn is_limit_of_account(message: &str, database: Option<DatabaseKind>) -> bool {
    let texts = database.map_or(&[][..], |kind| kind.texts().account_full);
    let named = || texts.iter().flat_map(|text| text.lines()).filter(|text| text.contains('%'));
    named().any(|text| contains_any(message, &[text]) || contains_any_masked(message, text))
}

impl DatabaseKind {
    /// The kind of a connect error. White space in `message` must consist of single blanks.
    pub(crate) fn classify_connect_error(self, message: &str) -> ConnectErrorKind {
        let known = self.texts().connect_errors;
        let plain = known.iter().find(|(texts, _)| contains_any(message, &[texts]));
        let masked = || known.iter().find(|(texts, _)| contains_any_masked(message, texts));
        plain.or_else(masked).map_or(ConnectErrorKind::Other, |(_, kind)| *kind)
    }

    /// Whether an error message reports a lock timeout.
    pub(crate) fn is_lock_timeout(self, message: &str) -> bool {
        contains_any(message, self.texts().lock_timeout)
    }

    /// Whether an error says that the lock of the whole database was not to be had in time. Servers have none.
    pub(crate) fn is_busy(self, error: &DieselError) -> bool {
        match error {
            DieselError::DatabaseError(_, information) => {
                self == Self::Sqlite && information.message() == "database is locked"
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

    /// Whether another attempt of the whole transaction may succeed: after a serialization failure, a deadlock or a
    /// lock timeout. Diesel has error kinds for some of them only.
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
                contains_any(information.message(), self.texts().transient)
            }
            DieselError::RollbackErrorOnCommit { commit_error, .. } => self.is_transient(commit_error),
            _ => false,
        }
    }

    /// Whether an error is a deadlock, with which MySQL ends a transaction. Diesel recognises it for prepared
    /// statements only.
    pub(crate) fn is_deadlock(self, error: &DieselError) -> bool {
        match error {
            DieselError::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => true,
            DieselError::DatabaseError(_, information) => contains_any(information.message(), self.texts().deadlock),
            _ => false,
        }
    }
}

/// Whether the connection itself is lost.
pub(crate) fn is_connection_lost(error: &DieselError) -> bool {
    match error {
        DieselError::DatabaseError(DatabaseErrorKind::ClosedConnection | DatabaseErrorKind::UnableToSendCommand, _)
        | DieselError::BrokenTransactionManager => true,
        DieselError::DatabaseError(_, information) => {
            DatabaseKind::enabled().any(|kind| contains_any(information.message(), kind.texts().connection_lost))
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

/// Whether `message` contains one line of `texts`. A `%` stands for any text that the server inserts.
pub(super) fn contains_any(message: &str, texts: &[&str]) -> bool {
    // Some translations have line breaks.
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    texts.iter().flat_map(|texts| texts.lines()).any(|text| {
        let rest = text.split('%').try_fold(&*message, |rest, part| Some(&rest[rest.find(part)? + part.len()..]));
        rest.is_some()
    })
}

/// Like [`contains_any`], for a server whose locale has ASCII letters only, as in a cluster that was created with
/// `--locale=C`. Before the connection is established, such a server sends a question mark for each other letter. The
/// function does not recognise a text of which only question marks are left.
fn contains_any_masked(message: &str, texts: &str) -> bool {
    let message = mask(message);
    // Every text is at the end of the message, behind the word for `FATAL`.
    let starts = message.match_indices(": ").map(|(index, colon)| index + colon.len()).chain([0]);
    let ends: Vec<_> = starts.map(|start| &message[start..]).collect();
    let is_distinctive = |text: &str| text.contains('%') || text.bytes().filter(u8::is_ascii_alphabetic).count() > 3;
    let mut masked = texts.lines().map(mask).filter(|text| is_distinctive(text));
    masked.any(|text| ends.iter().any(|end| is_like(end, &text)))
}

/// Whether a `%` in `pattern` stands for any text, and all of `text` has this pattern. Both are ASCII.
fn is_like(text: &str, pattern: &str) -> bool {
    match pattern.split_once('%') {
        None => text == pattern,
        Some((first, others)) => {
            text.strip_prefix(first).is_some_and(|rest| (0..=rest.len()).any(|length| is_like(&rest[length..], others)))
        }
    }
}

/// A text as a locale with ASCII letters only shows it. glibc has replacements for some punctuation.
pub(super) fn mask(text: &str) -> String {
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
