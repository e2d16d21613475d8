//! The connection pooler between the program and its server, if there is one.

/// The connection pooler between the program and a PostgreSQL server, if there is one, for
/// [`Config::behind`](crate::Config::behind).
///
/// A connection pooler gives its clients sessions of the server that other clients have used. The crate has to know
/// that, because state of a session (a setting, an advisory lock, a prepared statement) then belongs to several clients:
///
/// | | `Nothing` | `SessionPooler` | `TransactionPooler` |
/// |---|---|---|---|
/// | Diesel's prepared statements | kept | kept | off, unless the pooler keeps them |
/// | `statement_timeout`, `lock_timeout` | set once for each connection | the same | set with each `BEGIN`, for the transaction |
/// | default scope with a deadline or a timeout | begins at the first write | the same | begins at the first statement |
/// | statement of an `autocommit` scope | is sent alone | the same | has a transaction of its own if a deadline or a timeout applies, or if it is raw SQL or calls functions of the program |
/// | reset after raw SQL | after the checkin | the same, and restores `application_name` | is sent together with the `COMMIT` or `ROLLBACK` |
/// | `connection_init_sql` | applied | applied | refused by `init_app` |
/// | `options` in the URL | applied | refused by PgBouncer 1.18; use `connection_init_sql` | refused by `init_app` |
/// | `create_all`, `drop_all` | by the application's URL | the same | by [`Config::schema_url`](crate::Config::schema_url); without it in transactions that follow each other without a gap |
///
/// The library detects a pooler if the server's session is older than the connection to it. It refuses such a
/// connection unless the configuration declares the pooler: [`ConnectErrorKind::UndeclaredPooler`]. A pooler that opens
/// a new session for the connection is not detected. So the first run of a program may work and a later one fail:
/// declare the pooler in any case. PgBouncer calls its mode `pool_mode`.
///
/// Behind a pooler in session mode, each open connection holds a session of the server, even while it is idle. The
/// pooler should have at least as many sessions (PgBouncer: `default_pool_size`) as all its programs together have
/// connections ([`Config::max_size`](crate::Config::max_size)). Otherwise a connect waits for a session of another
/// connection.
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
/// **Limits behind a pooler in transaction mode:**
///
/// * A `SET` holds until its transaction ends. In an autocommit scope it holds for its own statement. `LISTEN`, `WITH
///   HOLD` cursors, session-level advisory locks, temporary tables and, if `keeps_prepared` is false, SQL's
///   `PREPARE` end with the transaction too.
/// * A connection of [`App::checkout`](crate::App::checkout) is not reset. Its settings and locks stay with other
///   clients.
/// * The test kit needs [`Config::schema_url`](crate::Config::schema_url), and runs the tests with that URL.
/// * The hooks of connections ([`Database::on_connect`](crate::Database::on_connect) and its siblings) run outside of a
///   transaction. Their settings reach other clients, and not always this one.
/// * [`Session::connection`](crate::Session::connection) is refused in an autocommit scope, because the drop of a guard
///   cannot return the error of a commit. Use [`Session::with`](crate::Session::with).
/// * Code that has the connection and ends the transaction itself leaves its settings to other clients. The session
///   returns an error.
/// * PostgreSQL refuses some raw statements inside of a transaction, such as `VACUUM`. Send them by
///   [`App::checkout`](crate::App::checkout), or by an application with the URL of the server.
///
/// **Costs.** Client, PgBouncer 1.18 and server on one CPU, by TCP: a context with one SELECT takes 3.5 times as long
/// behind the pooler as without it (92 and 26 µs). The pooler accounts for a factor of 1.5 (86 and 58 µs with plain
/// Diesel and without prepared statements); the rest is the price of doing without prepared statements. A scope with a
/// deadline takes three round trips instead of one.
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
        /// `max_prepared_statements` is 0. If this is set and the pooler keeps none, a statement may run the SQL of
        /// another client, with its result and its effects.
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
