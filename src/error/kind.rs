//! Why no connection could be made.

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
    pub(super) fn advice(self, server: &str) -> &'static str {
        match self {
            Self::Unreachable if server.starts_with("SQLite") => {
                "Check the path, and that the folder may be written to"
            }
            Self::Authentication => "Check user, password and pg_hba.conf or grants",
            Self::Other => "This is the driver's text or, with `Database::connect_with`, the program's own",
            Self::ServerFull => {
                "End the transactions listed, close connections of other programs or raise the server's max_connections"
            }
            Self::Starting => "Wait until the server accepts connections",
            Self::UnknownDatabase => "Create the database or correct its name in the URL",
            Self::Unreachable => "Check host and port, and that the server runs",
        }
    }

    /// Whether trying again a little later may help.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::ServerFull | Self::Starting)
    }
}
