//! The pool of one application. r2d2 opens the connections, stores the idle ones and closes them. Admission decides
//! which caller gets the next connection.
//!
//! A checkout goes through `checkout.rs`, `admission.rs` and then r2d2 with `manager.rs`. No caller waits inside r2d2,
//! because r2d2 serves its callers in no order, gives no reason when it refuses a caller, and wakes no caller when a
//! broken connection is put back.

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
mod pinned_connection;
mod reset;
mod schema_version;
mod server;
mod socket;
mod statement_observer;
mod status;
mod storage;
mod thread;
mod upkeep;
mod wait_graph;
mod waiter;
mod writer_queue;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use admission::{Pool, PooledConnection};
pub(crate) use call_deadline::{CallDeadline, GRACE};
use connection_limit::ConnectionLimit;
use connections::Connections;
pub(crate) use options::PoolOptions;
pub(crate) use pinned_connection::PinnedConnection;
#[cfg(feature = "testing")]
pub(crate) use pinned_connection::TAKEN;
use server::Server;
pub(crate) use statement_observer::{ObservedEffects, SqlSource, StatementObserver, refuse_empty_statements};
pub use status::AppStatus;
use thread::PoolThread;
pub(crate) use thread::{end_idle_threads, guard_exit, were_inherited};
use wait_graph::WaitGraph;
use waiter::Refused;
pub(crate) use writer_queue::WritePermit;

use crate::connection::SessionConnection;
use crate::error::{A_WRITE, AppEnd, Blockers, ConnectErrorKind, Error, Holder, Holders, Place, Result, Shortage};
use crate::process::PerProcess;
use crate::wording::phrase;

/// The pool of one application.
pub(crate) type AppPool<C> = Pool<Connections<C>>;

/// A connection that is checked out of the pool of an application. Drop checks it in.
pub(crate) type CheckedOut<C> = PooledConnection<Connections<C>>;

/// The connection limit of a database object. Each process has its own permits.
#[derive(Debug)]
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
    fn app_end(&self) -> AppEnd {
        AppEnd::Disposed
    }

    /// The connections that this thread holds of pools that were disposed of.
    fn held_by_this_thread(&self) -> Holders {
        Holders::default()
    }
}

/// The wait-for graph of this process.
fn wait_graph() -> Arc<WaitGraph> {
    static GRAPH: PerProcess<Arc<WaitGraph>> = PerProcess::new();
    Arc::clone(GRAPH.get_or_init(Arc::default))
}

impl<C: SessionConnection> AppPool<C> {
    /// Creates a pool without a connection. Fails if the pool's thread cannot be started.
    pub(crate) fn new(options: Arc<PoolOptions<C>>, owner: Weak<dyn PoolOwner>, at: Place) -> Result<Arc<Self>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        guard_exit();
        let thread = PoolThread::take().map_err(|reason| Error::Connect {
            app: options.app.to_string(),
            server: options.target.shown.clone(),
            kind: ConnectErrorKind::Other,
            message: format!("the pool cannot start its thread: {}", phrase(reason)),
            at,
        })?;
        let server = Server::named(&options.target.server);
        let limits = std::iter::once(Arc::clone(server.limit()))
            .chain(options.connection_limit.as_ref().map(|limit| limit.of_this_process()));
        let (number, max_size) = (NEXT.fetch_add(1, Ordering::Relaxed), options.config.max_size as usize);
        let limits = limits.collect();
        Ok(Self::with_storage(number, max_size, limits, wait_graph(), |pool| {
            Connections::new(options, owner, pool, server, thread)
        }))
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Waits for the write permit, if the database allows one writer at a time.
    pub(crate) fn acquire_write_permit(&self, location: Place, limit: Option<Instant>) -> Result<Option<WritePermit>> {
        let Some(writers) = &self.storage.writers else { return Ok(None) };
        let options = &self.storage.options;
        let started = Instant::now();
        let deadline = started + options.config.lock_timeout.unwrap_or(crate::dialect::DEFAULT_BUSY_TIMEOUT);
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        let holder = Holder::new(Arc::clone(&options.app), location, started, true);
        let app = || options.app.to_string();
        writers.get(holder, deadline, options.config.connect_timeout).map(Some).map_err(|refused| match refused {
            Refused::Deadlock { holders, .. } => {
                let pool = options.pool_of();
                Error::WouldDeadlock { app: app(), short: Shortage::WriteLock, holders, at: location, pool }
            }
            Refused::InUse { holders, .. } => Error::LockTimeout {
                app: app(),
                operation: A_WRITE,
                waited: started.elapsed(),
                message: "SQLite has one writer at a time".into(),
                blockers: Blockers::of_queue(holders),
                left: "Nothing was written.".into(),
                at: location,
            },
            Refused::Closed | Refused::Limited | Refused::Connecting { .. } => self.closed_error(),
            Refused::Failed(never) => match never {},
        })
    }

    /// The error of a caller that finds the pool closed.
    fn closed_error(&self) -> Error {
        let how = self.storage.owner.upgrade().map_or(AppEnd::Disposed, |owner| owner.app_end());
        Error::Disposed { app: self.storage.options.app.to_string(), how }
    }

    /// Closes the connection that keeps a SQLite database in memory alive. The database ends with it.
    pub(crate) fn drop_memory_database(&self) {
        drop(self.storage.anchor.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Whether the pool has no connection and keeps no database in memory, so that another pool can take its place.
    pub(crate) fn holds_nothing(&self) -> bool {
        self.is_empty() && self.storage.anchor.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// The number of connections that the server allows an ordinary role, or 0 if the server has not reported it.
    #[cfg(feature = "testing")]
    pub(crate) fn capacity(&self) -> usize {
        self.storage.server.capacity()
    }

    /// The URL for the driver.
    #[cfg(feature = "testing")]
    pub(crate) fn url(&self) -> &str {
        &self.storage.url
    }

    /// The number of connections that were closed since the pool was created.
    pub(crate) fn closings(&self) -> usize {
        self.storage.closings.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> AppStatus {
        let (in_use, connecting, waiting) = self.counts();
        let state = self.storage.r2d2.state();
        AppStatus {
            open: state.connections as usize,
            idle: state.idle_connections as usize,
            connecting,
            in_use,
            waiting,
            holders: self.holders(),
            ..AppStatus::at_rest(&self.storage.options)
        }
    }
}
