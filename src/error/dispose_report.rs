//! The report of a disposal.

use std::fmt;
use std::time::Duration;

use super::count;
use super::holder::Holders;

/// The report of a disposal.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct DisposeReport {
    /// The applications that were disposed of.
    pub apps: Vec<String>,
    /// The number of connections that were closed.
    pub closed: usize,
    /// The time for which the disposal waited for connections in use.
    pub waited: Duration,
    /// The holders of connections that are still in use. Each of these connections is closed when it is checked in. If
    /// the disposal succeeded, the calling thread holds all of them.
    pub still_out: Holders,
    /// The number of connects that are still running. Their connections are closed as soon as they are open.
    pub connecting: usize,
}

impl DisposeReport {
    /// Whether no connection is left.
    pub fn is_complete(&self) -> bool {
        self.still_out.is_empty() && self.connecting == 0
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.apps.extend(other.apps);
        self.closed += other.closed;
        self.waited = self.waited.max(other.waited);
        self.still_out.0.extend(other.still_out.0);
        self.connecting += other.connecting;
    }
}

impl fmt::Display for DisposeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let apps = self.apps.iter().map(|app| format!("`{app}`")).collect::<Vec<_>>().join(", ");
        let s = if self.apps.len() == 1 { "" } else { "s" };
        write!(f, "app{s} {apps}: {} closed, waited {:.3?}", count(self.closed, "connection"), self.waited)?;
        match self.connecting {
            0 => {}
            1 => f.write_str(", 1 connect is in progress and is closed when it has succeeded")?,
            many => write!(f, ", {many} connects are in progress and are closed when they have succeeded")?,
        }
        let advice = match self.still_out.len() {
            0 => return Ok(()),
            1 => "It is closed at its checkin; end what holds it",
            _ => "Each is closed at its checkin; end what holds them",
        };
        write!(f, ", {} still in use: {}. {advice}", self.still_out.len(), self.still_out)
    }
}
