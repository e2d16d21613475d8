//! The status of a pool at one moment.

use std::fmt;

use super::options::PoolOptions;
use crate::connection::SessionConnection;
use crate::error::Holders;

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

impl AppStatus {
    /// Adds the status of another pool of the same application.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.open += other.open;
        self.idle += other.idle;
        self.in_use += other.in_use;
        self.connecting += other.connecting;
        self.waiting += other.waiting;
        self.holders.0.extend(other.holders.0);
        self
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
