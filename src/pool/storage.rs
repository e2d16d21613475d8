//! What the core of the pool needs of the connections. The library stores them in r2d2; the model imitates r2d2.

use std::time::Duration;

use super::connection_limit::LimitPermit;
use crate::sync::Instant;

/// Stores the idle connections of one pool, and makes new ones.
pub(crate) trait Storage: Send + Sync + Sized + 'static {
    /// A connection that is checked out of the storage, or the failure of a connect.
    type Conn: Send + 'static;
    /// Why a connect failed.
    type Failure: Clone + Send + 'static;
    /// A connection that has been closed here, and that the server may still have.
    type Closing;

    /// The connection that was put last. Never waits.
    fn try_get(&self) -> Option<Self::Conn>;

    /// Stores an idle connection. Never calls the driver.
    fn put(&self, conn: Self::Conn);

    /// The number of idle connections.
    fn idle(&self) -> usize;

    /// The number of open connections.
    fn open(&self) -> usize;

    /// Begins a connect. Nothing is idle when this is called. `connected` runs once the outcome is in the storage.
    fn connect(&self, permits: Vec<LimitPermit>, connected: impl FnOnce() + Send + 'static);

    /// Runs `job` on the pool's thread after a pause.
    fn run_after(&self, pause: Duration, job: impl FnOnce() + Send + 'static);

    /// Runs a job that closes connections: on the pool's thread if that may take time.
    fn run_closing(&self, job: impl FnOnce() + Send + 'static);

    /// The failure, if the connect failed.
    fn failure(conn: &Self::Conn) -> Option<Self::Failure>;

    /// What is to be done about a failure, after so many failures in a row.
    fn remedy(&self, failure: &Self::Failure, failures: u32) -> Remedy;

    /// Closes an idle connection of another pool on the same server, which may have several names.
    fn evict_another(&self, pool: u64);

    /// Closes an idle connection of another pool if this process has most of what the server allows, so that other programs
    /// find room there too.
    fn evict_above_threshold(&self, pool: u64);

    /// Lets go of an empty pool that nobody uses, once the caller has dropped it.
    fn drop_if_empty(&self, pool: u64) -> impl FnOnce() + 'static;

    /// The server's numbers of all open connections.
    fn sessions(&self) -> Vec<u64>;

    /// The server's number of the connection.
    fn session(conn: &Self::Conn) -> Option<u64>;

    /// Whether this process was forked from the one that the connections belong to.
    fn is_inherited(&self) -> bool {
        false
    }

    /// Whether other pools may have an idle connection closed.
    fn is_evictable(&self) -> bool {
        true
    }

    /// The rows that a connection answers within `timeout`. `None` if it has to be closed.
    fn query(&self, conn: &mut Self::Conn, sql: &str, timeout: Duration) -> Option<Vec<String>>;

    /// Whether an idle connection may stay in the pool, and when to look at it again.
    fn may_stay(&self, conn: &mut Self::Conn, now: Instant) -> (bool, Option<Instant>);

    /// Prepares a connection for its next holder. `false`: it has to be closed.
    fn reset(&self, conn: &mut Self::Conn, deadline: Option<Instant>) -> bool;

    /// Closes a connection. `waits_for_server`: the caller needs to know when the server has closed it too.
    fn close(&self, conn: Self::Conn, deadline: Option<Instant>, waits_for_server: bool) -> Self::Closing;

    /// Waits for the server's end of the connection, if that matters, and frees the permits.
    fn finish_closing(&self, closing: Self::Closing);
}

/// What is to be done about a failed connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remedy {
    /// Another attempt would fail in the same way.
    Fail,
    /// Another attempt may succeed after a pause.
    Retry(Duration),
    /// The server is full: another attempt may succeed once a connection is closed.
    Evict(Duration),
}
