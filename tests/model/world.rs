//! Some pools that share a limit on one server.

use std::sync::Arc;

use super::budget::Budget;
use super::manager::Server;
use super::waits::Waits;
use super::whole::Pool;

pub(crate) struct World {
    server: Arc<Server>,
    budget: Arc<Budget>,
    pools: Vec<Arc<Pool>>,
    limit: usize,
}

/// Makes room of its own accord.
pub(crate) struct Evictor(Arc<Budget>);

impl World {
    /// Pools of these sizes; where `failing` is not 0, one connect in so many fails.
    pub(crate) fn new(limit: usize, sizes: &[usize], failing: u32) -> Self {
        let (server, waits) = (Arc::new(Server::default()), Arc::new(Waits::default()));
        let budget = Arc::new(Budget::new(Some(limit), Arc::clone(&waits)));
        let pool = |(size, number): (&usize, u64)| Pool::new(number, *size, failing, &budget, &waits, &server);
        let pools = sizes.iter().zip(1..).map(pool).collect();
        Self { server, budget, pools, limit }
    }

    pub(crate) fn pool(&self, number: usize) -> Arc<Pool> {
        Arc::clone(&self.pools[number])
    }

    pub(crate) fn evictor(&self) -> Evictor {
        Evictor(Arc::clone(&self.budget))
    }

    pub(crate) fn open(&self) -> usize {
        self.server.open()
    }

    /// The limit was kept, and in the end nobody has anything or waits for it.
    pub(crate) fn assert_quiet(&self) {
        // Connects outlive those who left, and a share its connection; the scheduler gives up on what never ends.
        while !self.pools.iter().all(|pool| pool.is_at_rest()) || self.budget.taken() != self.server.open() {
            shuttle::thread::yield_now();
        }
        assert!(self.server.most() <= self.limit, "{} connections", self.server.most());
        assert!(!self.budget.is_wanted());
    }

    /// It is quiet, and no permit was lost.
    pub(crate) fn assert_at_rest(&self) {
        self.assert_quiet();
        assert!(self.pools.iter().all(|pool| pool.has_every_permit()));
    }
}

impl Evictor {
    pub(crate) fn evict(&self) {
        if let Some(resident) = self.0.least_recently_used(0) {
            resident.give_up();
        }
    }
}
