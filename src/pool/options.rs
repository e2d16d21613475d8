//! The options of a pool: its configuration, the hooks of the program, and where its connections come from and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use diesel::result::{ConnectionResult, QueryResult};

use super::PerProcessLimit;
use super::socket::Socket;
use super::statement_observer::StatementListener;
use super::transaction_style::TransactionStyle;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::PoolOf;
use crate::url::Target;

/// A function of the program that runs on a connection. The application that it receives is inside the closure, because
/// the layer of the application is above this one.
pub(crate) type ConnectionHook<C> = Arc<dyn Fn(&mut C) -> QueryResult<()> + Send + Sync>;

/// The options of a pool. They are set when the application is registered and never change.
pub(crate) struct PoolOptions<C: SessionConnection> {
    pub(crate) app: Arc<str>,
    pub(crate) config: Config,
    pub(crate) target: Target,
    /// The limit on the connections of all applications of the database object, if there is one.
    pub(crate) connection_limit: Option<Arc<PerProcessLimit>>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) on_connect: Option<ConnectionHook<C>>,
    pub(crate) on_checkout: Option<ConnectionHook<C>>,
    pub(crate) on_checkin: Option<ConnectionHook<C>>,
    pub(crate) on_close: Option<ConnectionHook<C>>,
    pub(crate) transactions: TransactionStyle<C>,
    /// `None` if the pool opens and closes its connections.
    pub(crate) owner: Option<Arc<dyn ConnectionOwner<C>>>,
    /// The kind of pool, for the advice in errors.
    pub(crate) pool_of: PoolOf,
    /// A connection was opened whose default isolation level is stricter than READ COMMITTED.
    pub(crate) strict_isolation: AtomicBool,
}

impl<C: SessionConnection> PoolOptions<C> {
    /// The settings that the program's own setup of a connection may have changed and on which the library relies.
    pub(super) fn settings_to_repeat(&self) -> Option<&'static str> {
        self.target.kind.texts().required_settings.filter(|_| self.has_own_setup())
    }

    /// Whether a transaction without a level of its own may run under a stricter isolation level than READ COMMITTED.
    #[inline]
    pub(crate) fn has_strict_isolation(&self) -> bool {
        self.strict_isolation.load(Ordering::Relaxed)
    }

    /// Records that a connection has a default isolation level that is stricter than READ COMMITTED.
    pub(super) fn note_strict_isolation(&self) {
        self.strict_isolation.store(true, Ordering::Relaxed);
    }

    /// Whether the program sets up new connections itself.
    pub(super) fn has_own_setup(&self) -> bool {
        !self.config.connection_init_sql.is_empty() || self.on_connect.is_some()
    }

    /// Whether each transaction may have another session of the server. The test kit never uses such sessions.
    #[inline]
    pub(crate) fn shares_sessions(&self) -> bool {
        self.config.behind.is_transaction_pooler()
    }

    /// SQL that restores the state of a new connection. `checks_client` as for [`Dialect::reset`].
    ///
    /// [`Dialect::reset`]: crate::dialect::Dialect::reset
    pub(crate) fn reset_sql(&self, checks_client: bool) -> String {
        let Self { app, config, target, .. } = self;
        let of_url = target.parameter("application_name").filter(|name| !name.is_empty());
        let name = config.application_name.as_deref().or(of_url);
        let default = format!("diesel-session/{app}");
        target.kind.dialect().reset(config, checks_client, name.unwrap_or(&default))
    }

    /// The options for changes of the schema, if they have a URL of their own.
    pub(crate) fn for_schema(&self) -> Option<Result<Self, String>> {
        let config = self.config.for_schema()?;
        Some(Target::parse(&config.url, Some(self.target.kind)).map(|target| Self {
            connection_limit: self.connection_limit.clone(),
            connect_with: self.connect_with,
            on_connect: self.on_connect.clone(),
            on_checkout: self.on_checkout.clone(),
            on_checkin: self.on_checkin.clone(),
            on_close: self.on_close.clone(),
            pool_of: self.pool_of,
            ..Self::new(Arc::clone(&self.app), config, target)
        }))
    }

    /// The options of an application of the program, without hooks and limits.
    pub(crate) fn new(app: Arc<str>, config: Config, target: Target) -> Self {
        Self {
            app,
            config,
            target,
            connection_limit: None,
            connect_with: None,
            on_connect: None,
            on_checkout: None,
            on_checkin: None,
            on_close: None,
            transactions: TransactionStyle(None),
            owner: None,
            pool_of: PoolOf::Program,
            strict_isolation: AtomicBool::new(false),
        }
    }
}

/// The owner of the one connection that several pools use in turn. A pool with an owner takes the connection instead
/// of opening another one, and gives it back instead of closing it.
pub(crate) trait ConnectionOwner<C: SessionConnection>: Send + Sync {
    /// Takes the connection. If the result is `None`, the connection is not open, and the pool has to open it.
    ///
    /// # Errors
    /// The reason why the connection cannot be used.
    fn take(&self) -> Result<Option<OwnedConnection<C>>, &'static str>;

    /// Completes the setup of the connection by a pool.
    fn complete_setup(&self, conn: &mut C) -> Result<(), String>;

    /// Takes the connection back. `None` means that it could not be opened or set up. `is_clean` means that it is in the
    /// state in which it was taken, except for the outer transaction.
    fn give_back(&self, connection: Option<OwnedConnection<C>>, is_clean: bool);

    /// Whether a pool has the connection.
    fn is_in_use(&self) -> bool;

    /// Waits until no pool has the connection.
    fn wait_until_unused(&self, deadline: Instant);

    /// The listener for the text of raw statements on the connection.
    fn statement_listener(&self) -> StatementListener;
}

/// A connection that an owner and its pools hand to each other.
pub(crate) struct OwnedConnection<C> {
    pub(crate) conn: C,
    /// The socket of the connection, if it is known.
    pub(super) socket: Option<Socket>,
    /// The setup of the connection is complete.
    pub(crate) is_set_up: bool,
}
