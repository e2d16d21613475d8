//! A database server as seen by this process: its identity, its health, and the pools that have connections to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::connection_limit::{ConnectionLimit, EvictablePool};
use crate::error::{Holders, count};
use crate::kind::DatabaseKind;
use crate::process::SharedByName;
use crate::sync::Mutex;

/// A database server. It exists as long as a pool uses it.
pub(crate) struct Server {
    /// The permits of this process's connections to the server.
    pub(super) limit: Arc<ConnectionLimit>,
    /// The server has accepted a connection of this process before.
    pub(super) reached: AtomicBool,
    unreachable: AtomicBool,
    /// Raised when connections that were healthy before may be lost.
    suspicion: AtomicUsize,
    /// The numbers of sessions on the server, and the time at which they were asked for.
    session_counts: Mutex<Option<(Instant, Vec<String>)>>,
    /// The number of connections that the server allows an ordinary role, or 0 if it is unknown.
    pub(super) capacity: AtomicUsize,
    /// The identity that the server reports. The same server may have several names.
    instance: Mutex<Option<String>>,
    /// The port, if this is a PostgreSQL server on this machine.
    local_port: Option<u16>,
}

/// The time that one idle connection has to answer a query about its server, and the time for all of them together.
const QUERY_TIMEOUTS: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(600));

/// After this time, the next new connection queries the session counts again.
const COUNTS_AGE: Duration = Duration::from_secs(1);

static SERVERS: SharedByName<Server> = SharedByName::new();

/// The port of a PostgreSQL server on this machine, by the name of the server. Its Unix sockets and its addresses have
/// the same port.
fn local_port(name: &str) -> Option<u16> {
    let address = name.strip_prefix(DatabaseKind::Postgres.name())?.strip_prefix("://")?;
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
        _ => (address, 5432),
    };
    if address.contains(" hostaddr ") || address.contains("service ") {
        return None;
    }
    let is_local = host.starts_with('/')
        || ["localhost", "127.0.0.1", "[::1]", "::1", "the default host"].contains(&host.trim_end_matches('/'));
    is_local.then_some(port)
}

impl Server {
    /// The server with this name. All pools with the same name share it.
    pub(crate) fn named(name: &str) -> Arc<Self> {
        let new = || Self {
            limit: Arc::new(ConnectionLimit::new(None)),
            reached: AtomicBool::new(false),
            unreachable: AtomicBool::new(false),
            suspicion: AtomicUsize::new(0),
            session_counts: Mutex::default(),
            capacity: AtomicUsize::new(0),
            instance: Mutex::default(),
            local_port: local_port(name),
        };
        SERVERS.get_or_create(name, || Arc::new(new()))
    }

    /// Reports an answer of the server, whatever it was.
    pub(super) fn report_reachable(&self, shown: &str) {
        self.reached.store(true, Ordering::Release);
        if self.unreachable.load(Ordering::Acquire) && self.unreachable.swap(false, Ordering::AcqRel) {
            log_pool!(info, "{shown} is reachable again");
        }
    }

    /// Reports that the server is unreachable or does not accept connections yet.
    pub(super) fn report_unreachable(&self, shown: &str, message: &str) {
        if !self.unreachable.swap(true, Ordering::AcqRel) {
            self.suspect();
            log_pool!(warn, "{shown} is unreachable: {message}; retrying");
        }
    }

    /// The number of suspicions so far. A connection that was proven healthy at this number is trusted.
    #[inline]
    pub(super) fn suspicion(&self) -> usize {
        self.suspicion.load(Ordering::Acquire)
    }

    /// Reports the loss of a connection. Other connections may be lost too. Returns the number of suspicions.
    pub(super) fn suspect(&self) -> usize {
        self.suspicion.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The rows of `sql` on an idle connection of this process, if one answers in time.
    pub(super) fn query_idle(self: &Arc<Self>, sql: &str) -> Option<Vec<String>> {
        let deadline = Instant::now() + QUERY_TIMEOUTS.1;
        let names = self.under_all_names();
        for (_, pool) in names.iter().flat_map(|server| server.limit.pools()) {
            let timeout = QUERY_TIMEOUTS.0.min(deadline.saturating_duration_since(Instant::now()));
            if timeout.is_zero() {
                return None;
            }
            if let Some(answer) = pool.query_idle(sql, timeout) {
                return Some(answer);
            }
        }
        None
    }

    /// Sets the identity that the server has reported.
    pub(super) fn set_instance(&self, instance: &str) {
        *self.instance.lock() = Some(instance.to_owned());
    }

    /// This server under all its names in this process. A PostgreSQL server on this machine is recognised by its port
    /// until it has reported its identity.
    pub(super) fn under_all_names(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let instance = self.instance.lock().clone();
        let is_same = |other: &Arc<Self>| match (&instance, &*other.instance.lock()) {
            (Some(instance), Some(other)) => instance == other,
            _ => self.local_port.is_some() && self.local_port == other.local_port,
        };
        SERVERS.all().into_iter().filter(|other| Arc::ptr_eq(self, other) || is_same(other)).collect()
    }

    /// The least recently used pool on this server that has an idle connection, other than `except`.
    pub(super) fn least_recently_used(self: &Arc<Self>, except: u64) -> Option<Arc<dyn EvictablePool>> {
        let names = self.under_all_names();
        let idle = names.iter().filter_map(|server| server.limit.least_recently_used(except));
        idle.min_by_key(|(since, _)| *since).map(|(_, pool)| pool)
    }

    pub(super) fn session_counts_are_old(&self) -> bool {
        self.session_counts.lock().as_ref().is_none_or(|(asked, _)| asked.elapsed() > COUNTS_AGE)
    }

    pub(super) fn set_session_counts(&self, counts: Vec<String>) {
        *self.session_counts.lock() = Some((Instant::now(), counts));
    }

    /// A sentence about the sessions on the server, for an error.
    pub(super) fn session_counts_text(self: &Arc<Self>) -> String {
        let names = self.under_all_names();
        let pools: Vec<_> = names.iter().flat_map(|server| server.limit.pools()).collect();
        let own_count: usize = pools.iter().map(|(_, pool)| pool.open()).sum();
        let holders = Holders(pools.iter().flat_map(|(_, pool)| pool.holders().0).collect());
        let own = own_connections_text(own_count, &holders);
        match &*self.session_counts.lock() {
            Some((asked, counts)) => {
                format!(". {own}. Asked {:.1?} ago, the server had: {}", asked.elapsed(), counts.join(", "))
            }
            None => format!(". {own}, and could not ask who has the others"),
        }
    }
}

/// The connections of this process to the server, as the beginning of a sentence.
fn own_connections_text(open: usize, holders: &Holders) -> String {
    let held = if holders.is_empty() { String::new() } else { format!(", held: {holders}") };
    format!("This process has {} there{held}", count(open, "connection"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_connections_text_uses_the_singular_for_one() {
        let text = |open| own_connections_text(open, &Holders::default());
        assert_eq!(text(0), "This process has 0 connections there");
        assert_eq!(text(1), "This process has 1 connection there");
        assert_eq!(text(2), "This process has 2 connections there");
    }
}
