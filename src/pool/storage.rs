//! The interface between the core of the pool and the connections. The library stores them in r2d2. The model imitates
//! r2d2.

use std::time::Duration;

use super::connection_limit::LimitPermit;
use crate::sync::Instant;

/// Stores the idle connections of one pool and opens new ones.
pub(crate) trait Storage: Send + Sync + Sized + 'static {
    /// A connection that is checked out of the storage, or the failure of a connect.
    type Conn: Send + 'static;
    /// The failure of a connect.
    type Failure: Clone + Send + 'static;
    /// A connection that is closed in this process and whose session may still exist on the server. Drop waits until
    /// the session has ended, if that matters, and releases the permits.
    type Closing;

    /// Takes the connection that was stored last. Never waits.
    fn try_get(&self) -> Option<Self::Conn>;

    /// Stores an idle connection. Never calls the driver.
    fn put(&self, conn: Self::Conn);

    /// The number of idle connections.
    fn idle(&self) -> usize;

    /// The number of open connections.
    fn open(&self) -> usize;

    /// Starts a connect. It must be called only if no connection is idle. `connected` runs when the storage has the
    /// outcome.
    fn connect(&self, permits: Vec<LimitPermit>, connected: impl FnOnce() + Send + 'static);

    /// Runs `job` on the pool's thread after a pause.
    fn run_after(&self, pause: Duration, job: impl FnOnce() + Send + 'static);

    /// Runs a job that closes connections. If that may take time, the job runs on the pool's thread.
    fn run_closing(&self, job: impl FnOnce() + Send + 'static);

    /// The failure, if the connect failed.
    fn failure(conn: &Self::Conn) -> Option<Self::Failure>;

    /// The remedy for a failure after this number of consecutive `failures`.
    fn remedy(&self, failure: &Self::Failure, failures: u32) -> Remedy;

    /// Closes an idle connection of another pool on the same server, which may have several names.
    fn evict_another(&self, _pool: u64) {}

    /// Closes an idle connection of another pool if this process uses most of the server's capacity, so that other
    /// programs can connect.
    fn evict_above_threshold(&self, _pool: u64) {}

    /// Returns a function that drops the pool from its owner if it is empty and not in use. The caller has to drop its
    /// own reference before it calls the function.
    fn drop_if_empty(&self, _pool: u64) -> impl FnOnce() + 'static {
        || {}
    }

    /// The session ids of all open connections on the server.
    fn sessions(&self) -> Vec<u64> {
        Vec::new()
    }

    /// The id of the connection's session on the server.
    fn session(_conn: &Self::Conn) -> Option<u64> {
        None
    }

    /// Whether this process was forked from the process that owns the connections.
    fn is_inherited(&self) -> bool {
        false
    }

    /// Whether other pools may evict an idle connection.
    fn is_evictable(&self) -> bool {
        true
    }

    /// The rows of `sql`. `None` if the connection has not answered within `timeout` or has failed, so that it has to
    /// be closed.
    fn query(&self, _conn: &mut Self::Conn, _sql: &str, _timeout: Duration) -> Option<Vec<String>> {
        None
    }

    /// Whether an idle connection may stay in the pool, and the time of the next check.
    fn may_stay(&self, conn: &mut Self::Conn, now: Instant) -> (bool, Option<Instant>);

    /// Resets a connection for its next holder. Returns `false` if the connection has to be closed.
    fn reset(&self, conn: &mut Self::Conn, deadline: Option<Instant>) -> bool;

    /// Closes a connection. `waits_for_server` means that the caller needs to know when the session on the server has
    /// ended.
    fn close(&self, conn: Self::Conn, deadline: Option<Instant>, waits_for_server: bool) -> Self::Closing;
}

/// The reaction to a failed connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Another attempt would fail in the same way.
    Fail,
    /// Another attempt may succeed after this pause.
    Retry(Duration),
    /// The server is full. Another attempt may succeed when a connection is closed.
    Evict(Duration),
}
