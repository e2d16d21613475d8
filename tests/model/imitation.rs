//! An imitation of r2d2 and of a server, for the core of the pool.

use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::Rng;

use super::connection_limit::{ConnectionLimit, LimitPermit};
use super::storage::{Remedy, Storage};
use crate::error::Holder;
use crate::sync::{AtomicUsize, Instant, Mutex, Ordering};

/// The behavior of a server towards connects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ServerBehavior {
    /// The maximum number of sessions.
    pub(crate) capacity: usize,
    /// One in this number of connects fails for good. 0 means none.
    pub(crate) failing: u32,
    /// One in this number of connects fails and may be retried. 0 means none.
    pub(crate) faltering: u32,
}

/// A server that counts its sessions.
pub(crate) struct Server {
    behavior: ServerBehavior,
    sessions: Mutex<(usize, usize)>,
    pub(crate) limit: Arc<ConnectionLimit>,
}

impl Server {
    pub(crate) fn new(behavior: ServerBehavior) -> Self {
        Self { behavior, sessions: Mutex::default(), limit: Arc::new(ConnectionLimit::new(None)) }
    }

    /// The number of sessions, and its maximum so far.
    pub(crate) fn sessions(&self) -> (usize, usize) {
        *self.sessions.lock()
    }

    fn connect(self: &Arc<Self>) -> Result<Session, Failure> {
        let one_in = |number: u32| number > 0 && shuttle::rand::thread_rng().gen_range(0..number) == 0;
        if one_in(self.behavior.failing) {
            return Err(Failure::Final);
        }
        if one_in(self.behavior.faltering) {
            return Err(Failure::Passing);
        }
        let mut sessions = self.sessions.lock();
        if sessions.0 == self.behavior.capacity {
            return Err(Failure::Full);
        }
        sessions.0 += 1;
        sessions.1 = sessions.1.max(sessions.0);
        Ok(Session(Arc::clone(self)))
    }
}

/// A session on the server. Drop ends it.
struct Session(Arc<Server>);

impl Drop for Session {
    fn drop(&mut self) {
        self.0.sessions.lock().0 -= 1;
    }
}

/// The failure of a connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    Final,
    Passing,
    Full,
}

struct Connection {
    // Declared before `permits`, so that the session ends before the permits are released.
    session: Session,
    permits: Vec<LimitPermit>,
}

/// A connection that is checked out of the imitation. Drop puts it back or closes it.
pub(crate) struct ImitatedConnection {
    pub(crate) broken: bool,
    outcome: Option<Result<Connection, Failure>>,
    storage: Arc<Shared>,
    is_kept: bool,
}

impl Drop for ImitatedConnection {
    fn drop(&mut self) {
        let mut state = self.storage.state.lock();
        match self.outcome.take() {
            Some(outcome) if self.is_kept => state.idle.push(outcome),
            outcome => {
                // As in r2d2, the pool can connect again before the connection is closed.
                state.connections -= 1;
                drop(state);
                drop(outcome);
            }
        }
    }
}

#[derive(Default)]
struct State {
    idle: Vec<Result<Connection, Failure>>,
    connections: usize,
    pending: usize,
}

struct Shared {
    state: Mutex<State>,
    size: usize,
}

/// The imitation of an r2d2 pool.
pub(crate) struct Imitation {
    shared: Arc<Shared>,
    server: Arc<Server>,
    resets: AtomicUsize,
}

impl Imitation {
    pub(crate) fn new(size: usize, server: Arc<Server>) -> Self {
        Self { shared: Arc::new(Shared { state: Mutex::default(), size }), server, resets: AtomicUsize::new(0) }
    }
}

fn coin_flip() -> bool {
    shuttle::rand::thread_rng().r#gen()
}

impl Storage for Imitation {
    type Conn = ImitatedConnection;
    type Failure = Failure;
    type Closing = ();

    fn try_get(&self) -> Option<ImitatedConnection> {
        let outcome = self.shared.state.lock().idle.pop()?;
        Some(ImitatedConnection {
            broken: false,
            outcome: Some(outcome),
            storage: Arc::clone(&self.shared),
            is_kept: false,
        })
    }

    fn put(&self, mut conn: ImitatedConnection) {
        assert!(matches!(conn.outcome, Some(Ok(_))), "a failed connect is not an idle connection");
        conn.is_kept = true;
    }

    fn idle(&self) -> usize {
        self.shared.state.lock().idle.len()
    }

    fn open(&self) -> usize {
        self.shared.state.lock().connections
    }

    fn connect(&self, permits: Vec<LimitPermit>, connected: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        assert!(state.idle.is_empty(), "r2d2 would not connect");
        assert!(state.connections + state.pending < self.shared.size, "r2d2 is full");
        state.pending += 1;
        let (shared, server) = (Arc::clone(&self.shared), Arc::clone(&self.server));
        shuttle::thread::spawn(move || {
            let outcome = server.connect().map(|session| Connection { session, permits });
            let mut state = shared.state.lock();
            state.idle.push(outcome);
            state.pending -= 1;
            state.connections += 1;
            drop(state);
            connected();
        });
    }

    fn run_after(&self, _: Duration, job: impl FnOnce() + Send + 'static) {
        shuttle::thread::spawn(move || {
            // Other threads run during the pause.
            shuttle::thread::yield_now();
            job();
        });
    }

    fn run_closing(&self, job: impl FnOnce() + Send + 'static) {
        if coin_flip() {
            job();
        } else {
            shuttle::thread::spawn(job);
        }
    }

    fn failure(conn: &ImitatedConnection) -> Option<Failure> {
        conn.outcome.as_ref()?.as_ref().err().copied()
    }

    fn remedy(&self, failure: &Failure, _: u32) -> Remedy {
        match failure {
            Failure::Final => Remedy::Fail,
            Failure::Passing => Remedy::Retry(Duration::ZERO),
            Failure::Full => Remedy::Evict(Duration::ZERO),
        }
    }

    fn evict_another(&self, pool: u64) {
        if let Some((_, other)) = self.server.limit.least_recently_used(pool) {
            other.evict();
        }
    }

    fn may_stay(&self, _: &mut ImitatedConnection, _: Instant) -> (bool, Option<Instant>) {
        (coin_flip(), None)
    }

    fn reset(&self, conn: &mut ImitatedConnection, _: Option<Instant>) -> bool {
        self.resets.fetch_add(1, Ordering::SeqCst);
        !conn.broken
    }

    fn close(&self, conn: ImitatedConnection, _: Option<Instant>, _: bool) {
        drop(conn);
    }
}

impl Holder {
    pub(super) fn log_return(&self) {}
}
