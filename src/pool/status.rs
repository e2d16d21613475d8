//! What a pool looks like at one moment.

use std::fmt;

use super::options::PoolOptions;
use crate::connection::SessionConnection;
use crate::error::Holders;

/// One application's pool at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AppStatus {
    /// The application's id.
    pub app: String,
    /// Database and server, without credentials.
    pub server: String,
    /// Most connections at one time.
    pub max_size: u32,
    /// Open connections, as r2d2 counts them. They may be more than `max_size` after a disposal that gave up: those that are still out of
    /// the earlier pool are counted until they are closed.
    pub open: usize,
    /// Open connections that are not checked out, as r2d2 counts them.
    pub idle: usize,
    /// Connections that are checked out.
    pub in_use: usize,
    /// Connects under way; a connect that hangs stays here.
    pub connecting: usize,
    /// Callers that wait for a connection.
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
    /// Two pools of one application as one.
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
