//! The report of a disposal.

use std::fmt;
use std::time::Duration;

use super::count;
use super::holder::Holders;

/// What a disposal did.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct DisposeReport {
    /// The applications disposed of.
    pub apps: Vec<String>,
    /// Connections closed.
    pub closed: usize,
    /// How long it waited for connections that were out.
    pub waited: Duration,
    /// Connections that are still out; each is closed when it comes back. In a report that is no error these are held by the
    /// calling thread itself.
    pub still_out: Holders,
    /// Connects that have not come back; what they make is closed.
    pub connecting: usize,
}

impl DisposeReport {
    /// Whether nothing is left.
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
            1 => f.write_str(", 1 connect is still under way and is closed when it is there")?,
            many => write!(f, ", {many} connects are still under way and are closed when they are there")?,
        }
        let advice = match self.still_out.len() {
            0 => return Ok(()),
            1 => "It is closed when it comes back; end what holds it",
            _ => "Each is closed when it comes back; end what holds them",
        };
        write!(f, ", {} still out: {}. {advice}", self.still_out.len(), self.still_out)
    }
}
