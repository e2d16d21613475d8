//! The kind of failure of a connect.

/// The kind of failure of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectErrorKind {
    /// The user, the password or a permission is wrong.
    Authentication,
    /// The server refused the connection for another reason, which its message tells.
    Other,
    /// The server has no free session.
    ServerFull,
    /// The server is starting, recovering or shutting down.
    Starting,
    /// The database does not exist.
    UnknownDatabase,
    /// No server answers at the address.
    Unreachable,
}

impl ConnectErrorKind {
    /// Whether another attempt may succeed a little later.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::ServerFull | Self::Starting)
    }
}

/// The start of the message if SQL of the configuration has failed on a new connection.
pub(crate) const CONFIG_ON_CONNECT: &str = "`Config::on_connect` failed";

/// The start of the message if the function of the database object has failed on a new connection.
pub(crate) const DATABASE_ON_CONNECT: &str = "`Database::on_connect` failed";
