//! What a pool looks like at one moment.

use std::fmt;

use super::ledger::Holders;
use crate::connection::SessionConnection;
use crate::spec::Spec;

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
    /// Open connections.
    pub open: usize,
    /// Open connections that nobody has.
    pub idle: usize,
    /// Open connections that somebody has.
    pub in_use: usize,
    /// Open connections that did not answer in time; each is closed when it does.
    pub suspect: usize,
    /// Connects under way.
    pub connecting: usize,
    /// Callers waiting in line.
    pub waiting: usize,
    /// Who has a connection, or is waiting for one to be made.
    pub holders: Holders,
}

impl AppStatus {
    pub(crate) fn at_rest<C: SessionConnection>(spec: &Spec<C>) -> Self {
        Self {
            app: spec.app.to_string(),
            server: spec.target.shown.clone(),
            max_size: spec.config.max_size,
            open: 0,
            idle: 0,
            in_use: 0,
            suspect: 0,
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
        self.suspect += other.suspect;
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
            "app `{}` on {}: {} of {} open ({} idle, {} in use, {} suspect), {} connecting, {} waiting; held: {}",
            self.app,
            self.server,
            self.open,
            self.max_size,
            self.idle,
            self.in_use,
            self.suspect,
            self.connecting,
            self.waiting,
            self.holders
        )
    }
}
