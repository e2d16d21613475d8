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
    /// Whether trying again a little later may help.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::ServerFull | Self::Starting)
    }
}

/// How the message begins if SQL of the configuration has failed on a new connection.
pub(crate) const CONFIG_ON_CONNECT: &str = "`Config::on_connect` failed";

/// The same of the function of the database object.
pub(crate) const DATABASE_ON_CONNECT: &str = "`Database::on_connect` failed";
