//! Several pools that share a limit on one server.

use std::sync::Arc;
use std::time::Duration;

use super::admission::{CheckoutGuard, Pool};
use super::connection_limit::ConnectionLimit;
use super::growth::Growth;
use super::imitation::{Failure, Imitation, Server, ServerBehavior};
use super::wait_graph::WaitGraph;
use super::waiter::Refused;
use crate::error::Holder;
use crate::sync::Instant;

pub(crate) type ModelPool = Pool<Imitation>;
pub(crate) type CheckedOut = CheckoutGuard<Imitation>;

/// No scenario advances the clock this far.
pub(crate) const FOREVER: Duration = Duration::from_secs(1_000_000);

/// A server that refuses no connect.
pub(crate) const WITHOUT_FAILURES: ServerBehavior = ServerBehavior { capacity: usize::MAX, failing: 0, faltering: 0 };

pub(crate) struct World {
    server: Arc<Server>,
    limit: Arc<ConnectionLimit>,
    pools: Vec<Arc<ModelPool>>,
    most: usize,
}

/// Checks out a connection.
pub(crate) fn acquire(pool: &Arc<ModelPool>, time: Duration) -> Result<CheckedOut, Refused<Failure>> {
    let since = Instant::now();
    let holder = Holder::new("app".into(), std::panic::Location::caller(), since, false);
    pool.get(holder, since + time, FOREVER)
}

pub(crate) fn break_connection(checked_out: &mut CheckedOut) {
    checked_out.conn.as_mut().unwrap().broken = true;
}

impl World {
    /// Creates pools of these sizes under the limit.
    pub(crate) fn new(limit: usize, sizes: &[usize], behavior: ServerBehavior) -> Self {
        let (server, graph) = (Arc::new(Server::new(behavior)), Arc::new(WaitGraph::default()));
        let limited = Arc::new(ConnectionLimit::new(Some(limit)));
        let pool = |(size, number): (&usize, u64)| {
            let limits = vec![Arc::clone(&server.limit), Arc::clone(&limited)];
            Pool::with_storage(number, *size, limits, Arc::clone(&graph), |_| {
                Imitation::new(*size, Arc::clone(&server))
            })
        };
        let pools = sizes.iter().zip(1..).map(pool).collect();
        Self { server, limit: limited, pools, most: limit.min(behavior.capacity) }
    }

    pub(crate) fn pool(&self, number: usize) -> Arc<ModelPool> {
        Arc::clone(&self.pools[number])
    }

    pub(crate) fn open(&self) -> usize {
        self.server.sessions().0
    }

    fn taken(&self) -> [usize; 2] {
        [self.limit.taken(), self.server.limit.taken()]
    }

    /// Asserts that the limit was kept, that no thread holds a connection or waits for one, and that each permit
    /// belongs to an open connection.
    pub(crate) fn assert_at_rest(&self) {
        // Connects and closings outlive the callers that have left. If they never end, the scheduler reports it.
        let rests =
            |pool: &Arc<ModelPool>| pool.counts() == (0, 0, 0) && matches!(pool.state.lock().growth, Growth::None);
        while !self.pools.iter().all(rests) || self.taken() != [self.open(); 2] {
            shuttle::thread::yield_now();
        }
        assert!(self.server.sessions().1 <= self.most, "{} sessions", self.server.sessions().1);
        assert!(!self.limit.has_queue() && !self.server.limit.has_queue());
    }
}
