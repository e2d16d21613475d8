//! One database server as this process sees it: what it says it is, whether it can be reached, and which pools have connections to it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::connection_limit::{ConnectionLimit, EvictablePool};
use crate::error::{Holders, count};
use crate::kind::DatabaseKind;
use crate::process::PerProcess;

/// It lives while a pool uses it.
#[derive(Debug)]
pub(crate) struct Server {
    /// The connections to it of this whole process.
    limit: Arc<ConnectionLimit>,
    /// It has let this process in before.
    reached: AtomicBool,
    unreachable: AtomicBool,
    /// Raised when connections that were sound a moment ago may be lost.
    suspicion: AtomicUsize,
    session_counts: Mutex<Option<SessionCounts>>,
    /// The connections an ordinary role may have there; 0 if that is not known.
    capacity: AtomicUsize,
    /// What it says it is; the same server may have another name.
    instance: Mutex<Option<String>>,
    /// The port, if it is a PostgreSQL server of this machine.
    local_port: Option<u16>,
}

/// Who had connections to the server at one moment.
#[derive(Debug)]
struct SessionCounts {
    taken: Instant,
    counts: Vec<String>,
}

/// How long one idle connection has for the answer to a sql about its server, and all of them together.
const QUERY_TIMEOUTS: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(600));

/// The session counts are taken again when a connection is opened after that time.
const COUNTS_AGE: Duration = Duration::from_secs(1);

static SERVERS: PerProcess<Mutex<HashMap<String, Weak<Server>>>> = PerProcess::new();

/// The port of a PostgreSQL server of this machine, by its name. Its sockets and its addresses have the same.
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
    /// The server of that name; two pools with equal names share it.
    pub(crate) fn named(name: &str) -> Arc<Self> {
        let mut servers = SERVERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(name).and_then(Weak::upgrade) {
            return server;
        }
        servers.retain(|_, server| server.strong_count() > 0);
        let server = Arc::new(Self {
            limit: Arc::new(ConnectionLimit::new(None)),
            reached: AtomicBool::new(false),
            unreachable: AtomicBool::new(false),
            suspicion: AtomicUsize::new(0),
            session_counts: Mutex::default(),
            capacity: AtomicUsize::new(0),
            instance: Mutex::default(),
            local_port: local_port(name),
        });
        servers.insert(name.to_owned(), Arc::downgrade(&server));
        server
    }

    pub(super) fn limit(&self) -> &Arc<ConnectionLimit> {
        &self.limit
    }

    pub(super) fn was_reached(&self) -> bool {
        self.reached.load(Ordering::Acquire)
    }

    /// It has answered, whatever it said.
    pub(super) fn report_reachable(&self, shown: &str) {
        self.reached.store(true, Ordering::Release);
        if self.unreachable.load(Ordering::Acquire) && self.unreachable.swap(false, Ordering::AcqRel) {
            crate::wording::log_line!(info, "diesel_session::pool", "{shown} is reachable again");
        }
    }

    /// It cannot be reached, or does not accept connections yet.
    pub(super) fn report_unreachable(&self, shown: &str, message: &str) {
        if !self.unreachable.swap(true, Ordering::AcqRel) {
            self.suspect();
            crate::wording::log_line!(warn, "diesel_session::pool", "{shown} is unreachable: {message}; retrying");
        }
    }

    /// The number of suspicions so far: a connection that was proven sound at that number is not suspected.
    #[inline]
    pub(super) fn suspicion(&self) -> usize {
        self.suspicion.load(Ordering::Acquire)
    }

    /// A connection was lost: others may be too. Returns the number of suspicions.
    pub(super) fn suspect(&self) -> usize {
        self.suspicion.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// What an idle connection of this process answers, if there is one that answers soon.
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

    /// It has told what it is.
    pub(super) fn set_instance(&self, instance: &str) {
        let mut known = self.instance();
        if known.as_deref() != Some(instance) {
            *known = Some(instance.to_owned());
        }
    }

    /// This server under all the names that it has in this process. Until it has told what it is, a PostgreSQL server of this machine
    /// is known by its port.
    pub(super) fn under_all_names(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let instance = self.instance().clone();
        let is_same = |other: &Arc<Self>| match (&instance, &*other.instance()) {
            (Some(instance), Some(other)) => instance == other,
            _ => self.local_port.is_some() && self.local_port == other.local_port,
        };
        let servers: Vec<_> = {
            let servers = SERVERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            servers.values().filter_map(Weak::upgrade).collect()
        };
        servers.into_iter().filter(|other| Arc::ptr_eq(self, other) || is_same(other)).collect()
    }

    /// The least recently used pool on this server that has an idle connection, other than `except`.
    pub(super) fn least_recently_used(self: &Arc<Self>, except: u64) -> Option<Arc<dyn EvictablePool>> {
        let names = self.under_all_names();
        let idle = names.iter().filter_map(|server| server.limit.least_recently_used(except));
        idle.min_by_key(|(since, _)| *since).map(|(_, pool)| pool)
    }

    fn instance(&self) -> MutexGuard<'_, Option<String>> {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It lets an ordinary role have so many connections.
    pub(super) fn set_capacity(&self, capacity: usize) {
        self.capacity.store(capacity, Ordering::Relaxed);
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(super) fn session_counts_are_old(&self) -> bool {
        self.session_counts().as_ref().is_none_or(|counts| counts.taken.elapsed() > COUNTS_AGE)
    }

    pub(super) fn set_session_counts(&self, counts: Vec<String>) {
        *self.session_counts() = Some(SessionCounts { taken: Instant::now(), counts });
    }

    /// A sentence on who has connections to the server.
    pub(super) fn session_counts_text(self: &Arc<Self>) -> String {
        let names = self.under_all_names();
        let pools: Vec<_> = names.iter().flat_map(|server| server.limit.pools()).collect();
        let mine: usize = pools.iter().map(|(_, pool)| pool.open()).sum();
        let holders = Holders(pools.iter().flat_map(|(_, pool)| pool.holders().0).collect());
        let own = own_connections_text(mine, &holders);
        match &*self.session_counts() {
            Some(SessionCounts { taken, counts }) => {
                format!(". {own}. Asked {:.1?} ago, the server had: {}", taken.elapsed(), counts.join(", "))
            }
            None => format!(". {own}, and could not ask who has the others"),
        }
    }

    fn session_counts(&self) -> MutexGuard<'_, Option<SessionCounts>> {
        self.session_counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What this process has of the server, as the beginning of a sentence.
fn own_connections_text(open: usize, holders: &Holders) -> String {
    let held = if holders.is_empty() { String::new() } else { format!(", held: {holders}") };
    format!("This process has {} there{held}", count(open, "connection"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_is_singular() {
        let text = |open| own_connections_text(open, &Holders::default());
        assert_eq!(text(0), "This process has 0 connections there");
        assert_eq!(text(1), "This process has 1 connection there");
        assert_eq!(text(2), "This process has 2 connections there");
    }
}
