//! The kind of failure of a connect.

/// The kind of failure of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectErrorKind {
    /// The user, the password or a permission is wrong.
    Authentication,
    /// The server accepts no writes, but the URL asks for a server that does (`target_session_attrs`).
    NotPrimary,
    /// The server refused the connection for another reason, which its message tells.
    Other,
    /// The server has no free session.
    ServerFull,
    /// The server is starting, recovering or shutting down.
    Starting,
    /// The database does not exist.
    UnknownDatabase,
    /// A connection pooler that [`Config::behind`](crate::Config::behind) does not declare is in front of the server.
    UndeclaredPooler,
    /// No server answers at the address.
    Unreachable,
}

impl ConnectErrorKind {
    /// Whether another attempt may succeed a little later.
    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::NotPrimary | Self::ServerFull | Self::Starting)
    }

    /// Whether a database that does not exist may be the reason. A connection of an enum does not report that reason,
    /// and MySQL and MariaDB refuse an account without rights on the database before they look for the database.
    pub(crate) fn may_hide_missing_database(self) -> bool {
        matches!(self, Self::UnknownDatabase | Self::Authentication | Self::Other)
    }
}

/// The start of the message if SQL of the configuration has failed on a new connection.
pub(crate) const CONFIG_INIT_SQL: &str = "`Config::connection_init_sql` failed";

/// The start of the message if the function of the database object has failed on a new connection.
pub(crate) const DATABASE_ON_CONNECT: &str = "`Database::on_connect` failed";
