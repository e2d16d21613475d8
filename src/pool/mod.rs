//! One application's pool: r2d2 makes and counts the connections, the gate in front of it lends them, helper threads behind
//! it connect.
//!
//! A connection stays with its permit in the gate, so that a loan costs one lock and not three. There are never more connections
//! than permits, and every touch of the r2d2 pool happens under a permit: whoever has one knows that r2d2 has room. Nobody waits in
//! r2d2, which wakes nobody when a broken connection comes back: all waiting is in the gate, also that for a connect, which a
//! helper thread makes with the caller's permit.

mod acquire;
mod blocker;
mod budget;
mod connect;
mod errand;
mod gate;
#[cfg(test)]
mod gate_tests;
mod generation;
mod handover;
mod helpers;
mod lane;
mod leak;
mod lease;
mod ledger;
mod limit;
mod manager;
mod order;
mod outage;
mod resident;
mod server;
mod socket;
mod status;
mod sync;
mod upkeep;
mod waits;
mod watchdog;
mod witness;
mod writers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

pub use blocker::{Blocker, Blockers};
use budget::Budget;
pub(crate) use budget::Home;
pub(crate) use gate::Permit;
pub(crate) use helpers::{Helpers, were_inherited};
pub(crate) use lane::{LOST, Lane, TAKEN};
pub(crate) use lease::Lease;
pub use ledger::{Holder, Holders};
pub(crate) use limit::Limit;
use manager::Control;
pub use status::AppStatus;
pub(crate) use watchdog::{GRACE, Watched};
pub(crate) use witness::{Notes, Reading, Witness, refuse_empty_statements};

use crate::config::Reset;
use crate::connection::SessionConnection;
use crate::error::{A_WRITE, Error, Place, Result, Shortage};
use crate::process::PerProcess;
use crate::spec::Spec;
use gate::{Gate, Refused};
use manager::{Manager, Slots};
use server::Server;
use waits::Waits;

/// The waits for connections of this process.
fn waits() -> Arc<Waits> {
    static WAITS: PerProcess<Arc<Waits>> = PerProcess::new();
    Arc::clone(WAITS.get_or_init(Arc::default))
}

/// What r2d2 lends; boxed, as it changes hands often.
type Stored<C> = Box<r2d2::PooledConnection<Slots<C>>>;

/// The connections of one application, from its first use to its disposal.
pub(crate) struct Pool<C: SessionConnection> {
    /// Tells it from others on the same server.
    number: u64,
    /// The one that made it, and that alone may touch its connections.
    process: u32,
    home: Weak<dyn Home>,
    storage: r2d2::Pool<Slots<C>>,
    manager: Manager<C>,
    gate: Arc<Gate<Stored<C>>>,
    control: Arc<Control>,
    server: Arc<Server>,
    spec: Arc<Spec<C>>,
    anchor: Arc<Mutex<Option<C>>>,
    /// What it shares with the other applications of its database object, where that has a limit.
    budget: Option<Arc<Budget>>,
    /// Where one writer at a time is all the database allows: the queue for it.
    writers: Option<Arc<Gate>>,
    ageing: AtomicBool,
    /// Something is to be done with every connection that comes back.
    tidies_all: bool,
}

impl<C: SessionConnection> std::fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("app", &self.spec.app).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Pool<C> {
    /// A pool that has opened nothing yet.
    pub(crate) fn new(spec: Arc<Spec<C>>, home: Weak<dyn Home>) -> Self {
        let gate = Arc::new(Gate::new(spec.config.max_size as usize, waits()));
        let control = Arc::new(Control::default());
        let server = Server::named(&spec.target.server);
        server.helpers().used();
        let anchor = Arc::new(Mutex::new(None));
        let manager = Manager::new(Arc::clone(&spec), Arc::clone(&control), Arc::clone(&server), Arc::clone(&anchor));
        let storage = r2d2::Pool::builder()
            .max_size(spec.config.max_size)
            .min_idle(Some(0))
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .error_handler(Box::new(r2d2::NopErrorHandler))
            .thread_pool(Arc::clone(server.slot_maker()))
            .build_unchecked(Slots::new(&control));
        let writers = spec.target.kind.has_one_writer().then(|| writers::of(&spec.target));
        let budget = spec.budget.as_ref().map(|limit| limit.budget());
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tidies_all = spec.config.reset == Reset::Always || spec.on_checkin.is_some();
        Self {
            number,
            process: std::process::id(),
            home,
            storage,
            manager,
            gate,
            control,
            server,
            spec,
            anchor,
            budget,
            writers,
            ageing: AtomicBool::new(false),
            tidies_all,
        }
    }

    /// Whether this process is not the one that made it but was forked from that.
    pub(crate) fn is_inherited(&self) -> bool {
        crate::process::id_at(Instant::now()) != self.process
    }

    /// The threads that end with the last pool on its server.
    pub(crate) fn helpers(&self) -> Arc<Helpers> {
        Arc::clone(self.server.helpers())
    }

    /// The turn to write, where writers have to take turns.
    pub(crate) fn turn_to_write(&self, place: Place, limit: Option<Instant>) -> Result<Option<Permit>> {
        let Some(writers) = &self.writers else { return Ok(None) };
        let started = Instant::now();
        let deadline = started + self.spec.config.lock_timeout.unwrap_or(crate::backend::BUSY);
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        let holder = Holder::new(Arc::clone(&self.spec.app), place, started, true);
        let app = || self.spec.app.to_string();
        writers.acquire(holder, deadline).map(Some).map_err(|refused| match refused {
            Refused::Closed => Error::Disposed { app: app() },
            Refused::Hopeless(holders) => {
                let pool = self.spec.pool_of();
                Error::WouldDeadlock { app: app(), short: Shortage::WriteLock, holders, at: place, pool }
            }
            Refused::TimedOut { holders, .. } => Error::LockTimeout {
                app: app(),
                operation: A_WRITE,
                waited: started.elapsed(),
                message: "SQLite has one writer at a time".into(),
                blockers: Blockers::of_queue(holders),
                left: "Nothing was written.".into(),
                at: place,
            },
        })
    }

    /// Lends nothing any more, sends waiters away and closes what is idle. What is out is closed when it comes back.
    pub(crate) fn close(&self, deadline: Instant) {
        self.control.closed.store(true, Ordering::SeqCst);
        self.gate.close();
        self.budgets().for_each(|budget| budget.close(self.number));
        self.server.presence().nudge();
        let patience = || self.spec.config.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
        while let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) {
            permit.refill();
            if permit.item.is_none() {
                break;
            }
            self.dismiss_within(permit, patience());
        }
    }

    /// Waits until nothing is out, or being connected, except what the calling thread holds itself.
    pub(crate) fn wait_until_drained(&self, deadline: Instant) -> bool {
        let me = std::thread::current().id();
        self.gate.wait_until(deadline, |holders| holders.iter().all(|holder| holder.is_on(me)))
    }

    /// The last of a closed pool: a SQLite database in memory ends with this.
    pub(crate) fn forget_memory(&self) {
        drop(self.anchor.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Nothing is open, out or being connected. A pool that is about to be closed is not drained yet.
    pub(crate) fn is_drained(&self) -> bool {
        let Control { open, connecting, .. } = &*self.control;
        self.gate.counts().0 == 0 && connecting.load(Ordering::Acquire) == 0 && open.load(Ordering::Acquire) == 0
    }

    /// Another pool would be no different: nothing is open, and no database lives in it.
    pub(crate) fn is_worthless(&self) -> bool {
        self.is_drained() && self.anchor.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub(crate) fn holders(&self) -> Holders {
        self.gate.holders()
    }

    /// How many connections the server allows an ordinary role, where it has told; else 0.
    pub(crate) fn capacity(&self) -> usize {
        self.server.capacity()
    }

    /// What the driver gets.
    pub(crate) fn url(&self) -> &str {
        self.manager.url()
    }

    pub(crate) fn closings(&self) -> usize {
        self.control.closings.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> AppStatus {
        let holders = self.gate.holders();
        let open = self.control.open.load(Ordering::Acquire);
        let connecting = self.control.connecting.load(Ordering::Acquire);
        let in_use = holders.len().saturating_sub(self.control.seeking.load(Ordering::Acquire)).min(open);
        AppStatus {
            open,
            connecting,
            in_use,
            suspect: self.control.suspect.load(Ordering::Acquire),
            idle: open - in_use,
            waiting: self.gate.counts().1,
            holders,
            ..AppStatus::at_rest(&self.spec)
        }
    }

    #[track_caller]
    fn housekeeper(&self) -> Holder {
        Holder::new(Arc::clone(&self.spec.app), std::panic::Location::caller(), Instant::now(), false)
    }
}

impl<C: SessionConnection> Drop for Pool<C> {
    fn drop(&mut self) {
        self.budgets().for_each(|budget| budget.leave(self.number));
        self.server.helpers().left();
    }
}
