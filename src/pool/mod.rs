//! The pool of an application, as a program sees it: the state of the pool, the holders of its connections, and the
//! reports of their end.
//!
//! Every [`App`](crate::App) has one r2d2 pool. It opens a connection when a caller needs one, never before, and
//! r2d2 stores the idle connections and closes them. Callers wait in a queue in front of r2d2, each with a deadline
//! ([`Config::acquire_timeout`](crate::Config::acquire_timeout)). If a wait fails, the
//! [`Error`](crate::Error::holders) names the [`Holders`] of the connections. The applications of a process share a
//! server: an idle connection of one is closed if another needs its place, and
//! [`Database::max_connections`](crate::Database::max_connections) limits all of them together.
//!
//! * [`App::status`](crate::App::status) returns the [`AppStatus`]: counts of connections and waiters, and the holders.
//! * [`App::dispose`](crate::App::dispose) closes every connection; the [`DisposeReport`] says what it has closed.
//! * [`Reset`] says how a connection is reset between two holders.
//! * [`App::checkout`](crate::App::checkout) is for existing code that needs a connection.

// A checkout goes through `checkout.rs`, `admission.rs` and then r2d2 with `manager.rs`. No caller waits inside r2d2,
// because r2d2 serves its callers in no order, gives no reason when it refuses a caller, and wakes no caller when a
// broken connection is put back.

/// Writes one line to the log of the pools.
macro_rules! log_pool {
    ($level:ident, $($text:tt)+) => {
        crate::wording::log_line!($level, "diesel_session::pool", $($text)+)
    };
}

mod admission;
mod blockers;
mod call_deadline;
mod checkout;
#[cfg(all(test, feature = "sqlite"))]
mod checkout_tests;
mod connection_limit;
mod connections;
mod growth;
mod managed;
mod manager;
mod options;
mod program_use;
mod reset;
mod schema_version;
mod server;
#[cfg_attr(not(target_os = "linux"), path = "socket_elsewhere.rs")]
mod socket;
mod statement_observer;
mod storage;
mod thread;
mod transaction_style;
mod upkeep;
mod wait_graph;
mod waiter;
mod writer_queue;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use admission::{CheckoutGuard, Pool};
pub(crate) use call_deadline::{CallDeadline, GRACE};
use connection_limit::ConnectionLimit;
use connections::Connections;
pub(crate) use managed::Managed;
pub(crate) use options::{ConnectionHook, PoolOptions};
#[cfg(feature = "testing")]
pub(crate) use options::{ConnectionOwner, OwnedConnection};
use server::Server;
#[cfg(feature = "testing")]
pub(crate) use statement_observer::StatementListener;
pub(crate) use statement_observer::{ObservedEffects, SqlSource, StatementObserver, refuse_empty_statements};
use thread::PoolThread;
pub(crate) use thread::{end_idle_threads, guard_exit, were_inherited};
pub(crate) use transaction_style::{OuterTransaction, TransactionStyle};
use wait_graph::WaitGraph;
use waiter::Refused;
pub(crate) use writer_queue::WritePermit;

pub use crate::behind::Behind;
pub use crate::config::Reset;
use crate::connection::SessionConnection;
use crate::error::{A_WRITE, Blockers, Details, Error, Result, Shortage, SourceLocation};
pub use crate::error::{AppEnd, ConnectErrorKind, DisposeReport, Holder, Holders};
use crate::process::PerProcess;
use crate::wording::phrase;

/// The status of an application's pool at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AppStatus {
    /// The id of the application.
    pub app: String,
    /// The database and the server, without credentials.
    pub server: String,
    /// The maximum number of connections.
    pub max_size: u32,
    /// The number of open connections, as counted by r2d2. After a disposal that did not wait for all connections,
    /// this may exceed `max_size`, because the connections that the earlier pool still has in use count until they are
    /// closed.
    pub open: usize,
    /// The number of open connections that are not checked out, as counted by r2d2.
    pub idle: usize,
    /// The number of connections that are checked out.
    pub in_use: usize,
    /// The number of running connects, including those that hang.
    pub connecting: usize,
    /// The number of callers that wait for a connection.
    pub waiting: usize,
    /// The holders of the connections in use.
    pub holders: Holders,
}

impl AppStatus {
    pub(crate) fn at_rest<C: SessionConnection>(options: &PoolOptions<C>) -> Self {
        Self {
            app: options.app.to_string(),
            server: options.target.shown.clone(),
            max_size: options.config.max_size,
            open: 0,
            idle: 0,
            in_use: 0,
            connecting: 0,
            waiting: 0,
            holders: Holders::default(),
        }
    }
}

impl fmt::Display for AppStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "app `{}` on {}: {} of {} open ({} idle, {} in use), {} connecting, {} waiting; held: {}",
            self.app,
            self.server,
            self.open,
            self.max_size,
            self.idle,
            self.in_use,
            self.connecting,
            self.waiting,
            self.holders
        )
    }
}

/// The pool of one application.
pub(crate) type AppPool<C> = Pool<Connections<C>>;

/// A connection that is checked out of the pool of an application. Drop checks it in.
pub(crate) type CheckedOut<C> = CheckoutGuard<Connections<C>>;

/// The connection limit of a database object. Each process has its own permits.
pub(crate) struct PerProcessLimit {
    connections: usize,
    limit: PerProcess<Arc<ConnectionLimit>>,
}

impl PerProcessLimit {
    pub(crate) fn new(connections: usize) -> Self {
        Self { connections, limit: PerProcess::new() }
    }

    fn of_this_process(&self) -> Arc<ConnectionLimit> {
        Arc::clone(self.limit.get_or_init(|| Arc::new(ConnectionLimit::new(Some(self.connections)))))
    }
}

/// The owner of a pool. It drops a pool that is empty and opens another at the next use, so an application that was
/// used once costs no more than one that was never used.
pub(crate) trait PoolOwner: Send + Sync {
    /// Drops the pool with this number if it is empty and not in use.
    fn drop_if_empty(&self, pool: u64);

    /// Opens another pool at the next use, because the connect of the pool with this number hangs and the pool has no
    /// open connection.
    fn abandon_hanging(&self, pool: u64);

    /// The reason why a pool is closed.
    fn app_end(&self) -> AppEnd;

    /// The connections that this thread holds of pools that were disposed of.
    fn held_by_this_thread(&self) -> Holders;
}

/// The wait-for graph of this process.
fn wait_graph() -> Arc<WaitGraph> {
    static GRAPH: PerProcess<Arc<WaitGraph>> = PerProcess::new();
    Arc::clone(GRAPH.get_or_init(Arc::default))
}

impl<C: SessionConnection> AppPool<C> {
    /// Creates a pool without a connection. Fails if the pool's thread cannot be started.
    pub(crate) fn new(
        options: Arc<PoolOptions<C>>,
        owner: Weak<dyn PoolOwner>,
        at: SourceLocation,
    ) -> Result<Arc<Self>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        guard_exit();
        let thread = PoolThread::take().map_err(|reason| {
            Error::from(Details::Connect {
                app: options.app.to_string(),
                server: options.target.shown.clone(),
                kind: ConnectErrorKind::Other,
                message: format!("the pool cannot start its thread: {}", phrase(reason)),
                at,
            })
        })?;
        let server = Server::named(&options.target.server);
        let limits = std::iter::once(Arc::clone(&server.limit))
            .chain(options.connection_limit.as_ref().map(|limit| limit.of_this_process()));
        let (number, max_size) = (NEXT.fetch_add(1, Ordering::Relaxed), options.config.max_size as usize);
        let limits = limits.collect();
        Ok(Self::with_storage(number, max_size, limits, wait_graph(), |pool| {
            Connections::new(options, owner, pool, server, thread)
        }))
    }

    /// Waits for the write permit, if the database allows one writer at a time.
    pub(crate) fn acquire_write_permit(
        &self,
        location: SourceLocation,
        limit: Option<Instant>,
    ) -> Result<Option<WritePermit>> {
        let Some(writers) = &self.storage.writers else { return Ok(None) };
        let options = &self.storage.options;
        let started = Instant::now();
        let deadline = started + options.config.lock_timeout.unwrap_or(crate::dialect::DEFAULT_BUSY_TIMEOUT);
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        let holder = Holder::new(Arc::clone(&options.app), location, started, true);
        let app = || options.app.to_string();
        writers.get(holder, deadline, options.config.connect_timeout).map(Some).map_err(|refused| match refused {
            Refused::Deadlock { holders, .. } => {
                let pool = options.pool_of;
                Error::from(Details::WouldDeadlock {
                    app: app(),
                    short: Shortage::WriteLock,
                    holders,
                    at: location,
                    pool,
                })
            }
            Refused::InUse { holders, .. } => Error::from(Details::LockTimeout {
                app: app(),
                operation: A_WRITE,
                waited: started.elapsed(),
                message: "SQLite has one writer at a time".into(),
                blockers: Blockers::of_queue(holders),
                left: "Nothing was written.".into(),
                at: location,
            }),
            Refused::Closed | Refused::Limited | Refused::Connecting { .. } => self.closed_error(),
            Refused::Failed(never) => match never {},
        })
    }

    /// The error of a caller that finds the pool closed.
    fn closed_error(&self) -> Error {
        let how = self.storage.owner.upgrade().map_or(AppEnd::Disposed, |owner| owner.app_end());
        Error::from(Details::Disposed { app: self.storage.options.app.to_string(), how })
    }

    /// Closes the connection that keeps a SQLite database in memory alive. The database ends with it.
    pub(crate) fn drop_memory_database(&self) {
        drop(self.storage.connector.anchor.lock().take());
    }

    /// Whether the pool has no connection and keeps no database in memory, so that another pool can take its place.
    pub(crate) fn holds_nothing(&self) -> bool {
        self.is_empty() && self.storage.connector.anchor.lock().is_none()
    }

    /// The number of connections that the server allows an ordinary role, or 0 if the server has not reported it.
    #[cfg(feature = "testing")]
    pub(crate) fn capacity(&self) -> usize {
        self.storage.server.capacity.load(Ordering::Relaxed)
    }

    /// The URL for the driver.
    #[cfg(feature = "testing")]
    pub(crate) fn url(&self) -> &str {
        &self.storage.connector.url
    }

    /// The number of connections that were closed since the pool was created.
    pub(crate) fn closings(&self) -> usize {
        self.storage.closings.load(Ordering::Acquire)
    }

    /// Adds the connections of this pool to the status of the application.
    pub(crate) fn add_to(&self, status: &mut AppStatus) {
        let (in_use, connecting, waiting) = self.counts();
        let state = self.storage.r2d2.state();
        status.open += state.connections as usize;
        status.idle += state.idle_connections as usize;
        status.in_use += in_use;
        status.connecting += connecting;
        status.waiting += waiting;
        status.holders.0.extend(self.holders().0);
    }
}
