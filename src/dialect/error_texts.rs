//! The meaning of a database's errors for the program.

use super::{contains_any, contains_any_masked, is_transient, translations};
use crate::error::{CONFIG_ON_CONNECT, ConnectErrorKind, DATABASE_ON_CONNECT, Error};
use crate::kind::DatabaseKind;

impl Error {
    /// Whether running the whole transaction again may succeed and does nothing twice.
    ///
    /// This is the case for a serialization failure, a deadlock, a locked SQLite database, a connection that was lost
    /// inside a transaction or by a migration of which nothing remains, a full or starting server, a pool without a
    /// free connection, and a deadlock of callers that wait for connections ([`Error::WouldDeadlock`], unless the
    /// calling thread holds all of the connections). It is also the case for an error that only concerns the
    /// connection: another program has changed the schema, or a server has become read-only for a session that was to
    /// write.
    ///
    /// [`Session::retry`](crate::Session::retry) repeats the transaction after the first three and after these last
    /// two.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::AcquireTimeout { .. }
            | Self::BudgetExhausted { .. }
            | Self::ConnectTimeout { .. }
            | Self::LockTimeout { .. } => true,
            // The other threads can go on when the caller has rolled back.
            Self::WouldDeadlock { holders, .. } => !holders.are_all_the_caller(),
            Self::ConnectionLost { in_transaction, .. } => *in_transaction,
            // A file that cannot be opened does not appear by itself.
            Self::Connect { kind, server, .. } => {
                let is_file = DatabaseKind::of_shown(server) == Some(DatabaseKind::Sqlite);
                kind.is_transient() || *kind == ConnectErrorKind::Unreachable && !is_file
            }
            Self::Query { source, .. } => is_transient(source),
            Self::Migration(failure) => failure.is_transient(),
            Self::Autoflush { source, .. } => source.is_transient(),
            _ => false,
        }
    }
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
        if is_refused_sql && message.starts_with(CONFIG_ON_CONNECT) {
            return " Correct the SQL of `Config::on_connect`.";
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
            Self::Other => "",
            Self::ServerFull if is_limit_of_account(message, is_postgres) => {
                " The limit is that of the account or of the database, not the server's: end transactions of this \
                 account, lower `Config::max_size`, or have an administrator raise the limit."
            }
            Self::ServerFull => {
                " End transactions that are not needed, close connections of other programs, or raise the server's \
                 max_connections."
            }
            Self::Starting => " Wait until the server accepts connections.",
            Self::UnknownDatabase => " Create the database or correct its name in the URL.",
            Self::Unreachable => " Check host and port, and that the server runs.",
        }
    }
}

/// Whether the message of a full server names the account or the database as the one that is out of connections.
fn is_limit_of_account(message: &str, is_postgres: bool) -> bool {
    let english = if is_postgres { "too many connections for" } else { "max_user_con" };
    // Only these texts contain a name.
    let named = || translations::SERVER_FULL.iter().copied().filter(|text| text.contains('%')).collect::<Vec<_>>();
    message.contains(english)
        || is_postgres && (contains_any(message, &named()) || contains_any_masked(message, &named()))
}
