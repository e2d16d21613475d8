//! What stands between the program and its server.

/// What stands between the program and a PostgreSQL server, for [`Config::behind`](crate::Config::behind).
///
/// A connection pooler gives its clients sessions of the server that other clients have used. The crate has to know
/// that, because state of a session (a setting, an advisory lock, a prepared statement) then belongs to several clients:
///
/// | | `Nothing` | `SessionPooler` | `TransactionPooler` |
/// |---|---|---|---|
/// | Diesel's prepared statements | kept | kept | off, unless the pooler keeps them |
/// | `statement_timeout`, `lock_timeout` | set once for each connection | the same | set with each `BEGIN`, for the transaction |
/// | statement of an `autocommit` scope | is sent alone | the same | has a transaction of its own if a time limit applies, or if it is raw SQL or calls functions of the program |
/// | reset after raw SQL | after the checkin | the same, and restores `application_name` | in the message of the `COMMIT` or `ROLLBACK` |
/// | `connection_init_sql`, `options` in the URL | applied | the same | refused by `init_app` |
/// | `create_all`, `drop_all` | by the application's URL | the same | by [`Config::schema_url`](crate::Config::schema_url), or in one transaction |
///
/// The library detects a pooler if the server's session is older than the connection to it. It refuses such a
/// connection unless the configuration declares the pooler: [`ConnectErrorKind::UndeclaredPooler`]. It cannot detect a
/// pooler that happens to open a new session for each connection, so declare the pooler in any case.
///
/// [`ConnectErrorKind::UndeclaredPooler`]: crate::pool::ConnectErrorKind::UndeclaredPooler
///
/// ```
/// use diesel_session::Config;
/// use diesel_session::pool::Behind;
///
/// let config = Config::new("postgres://app@pooler:6432/shop")
///     .behind(Behind::TransactionPooler { keeps_prepared: false })
///     .schema_url("postgres://app@db:5432/shop");
/// # drop(config);
/// ```
///
/// **What others leave.** Another program behind the same pooler may leave its settings on a session that this program
/// gets. Only the pooler can prevent that: PgBouncer's `server_reset_query_always = 1` resets each session.
///
/// **Limits behind a pooler in transaction mode.** These use the session of another client, or leave state to one, and
/// the library cannot help it: code that takes a connection by [`App::checkout`](crate::App::checkout), the hooks of
/// connections ([`Database::on_connect`](crate::Database::on_connect) and its siblings), and code that has the
/// connection and ends the transaction itself. `LISTEN`, `WITH HOLD` cursors, session-level advisory locks and temporary
/// tables end with the transaction. A statement that PostgreSQL refuses inside of a transaction, such as `VACUUM`, needs
/// [`App::checkout`](crate::App::checkout) or an application with the URL of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Behind {
    /// The URL is the server's own.
    #[default]
    Nothing,
    /// A pooler that gives a client one session of the server until the client disconnects: PgBouncer in session mode,
    /// Pgpool-II.
    SessionPooler,
    /// A pooler that gives a client a session of the server for each transaction: PgBouncer in transaction mode,
    /// Supavisor, the poolers of hosted servers.
    TransactionPooler {
        /// Whether the pooler keeps a client's prepared statements: PgBouncer 1.21 and newer, unless its
        /// `max_prepared_statements` is 0. If this is set and the pooler keeps none, a statement may run as the
        /// statement of another client.
        keeps_prepared: bool,
    },
}

impl Behind {
    pub(crate) fn is_transaction_pooler(self) -> bool {
        matches!(self, Self::TransactionPooler { .. })
    }

    /// Whether the driver may keep prepared statements.
    pub(crate) fn keeps_prepared(self) -> bool {
        !matches!(self, Self::TransactionPooler { keeps_prepared: false })
    }
}
