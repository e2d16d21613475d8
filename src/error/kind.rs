//! Why no connection could be made.

use crate::backend;

/// Why a connection could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectErrorKind {
    /// User, password or permission.
    Authentication,
    /// The server refused for another reason; its text tells.
    Other,
    /// The server has no free slot.
    ServerFull,
    /// The server is starting, recovering or shutting down.
    Starting,
    /// The database does not exist.
    UnknownDatabase,
    /// Nothing answers at that address.
    Unreachable,
}

impl ConnectErrorKind {
    /// A sentence with a blank before it; nothing if `message` says what can be done.
    pub(super) fn advice(self, server: &str, message: &str) -> &'static str {
        let (is_sqlite, is_postgres) = (server.starts_with("SQLite"), server.starts_with("postgres"));
        match self {
            Self::Unreachable if is_sqlite => " Check the path, and that the folder may be written to.",
            Self::Starting if is_sqlite => " End the transaction of the connection that has locked the file.",
            Self::Authentication if is_postgres => {
                " Check the user and the password in the URL, and the server's pg_hba.conf."
            }
            Self::Authentication => " Check the user and the password in the URL, and the rights of the account.",
            Self::Other if message.contains("`Database::connect_with`") => "",
            Self::Other => " This is the driver's text or, with `Database::connect_with`, the program's own.",
            Self::ServerFull if backend::is_limit_of_account(message, is_postgres) => {
                " The limit is that of the account or of the database, not the server's: end transactions of this account, lower \
                 `Config::max_size`, or have an administrator raise the limit."
            }
            Self::ServerFull => {
                " End transactions that are not needed, close connections of other programs, or raise the server's max_connections."
            }
            Self::Starting => " Wait until the server accepts connections.",
            Self::UnknownDatabase => " Create the database or correct its name in the URL.",
            Self::Unreachable => " Check host and port, and that the server runs.",
        }
    }

    /// Whether trying again a little later may help.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::ServerFull | Self::Starting)
    }
}
