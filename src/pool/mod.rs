//! One application's pool: r2d2 makes and counts the connections, the gate in front of it lends them, helper threads behind
//! it connect.
//!
//! A connection that comes back stays with its permit in the gate, so that a loan costs one lock and not three. Only while
//! somebody waits for a connect is it given to r2d2, which wakes that caller. There are never more connections than permits, and
//! every touch of the r2d2 pool happens under a permit. A caller with a permit who finds nothing idle therefore knows that r2d2
//! has room for one more, and r2d2's own waiting, which wakes nobody when a broken connection comes back, is used for nothing
//! but a connect that is under way.

mod gate;
mod lease;
mod ledger;
mod manager;
mod server;
mod status;
mod witness;
mod writers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

pub(crate) use gate::Permit;
pub(crate) use lease::Lease;
use lease::{discard, live};
pub use ledger::{Holder, Holders};
use manager::{ConnectFailure, Control, Slot};
pub use status::AppStatus;
pub(crate) use witness::{Notes, Witness};

use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::spec::Spec;
use gate::{Gate, Refused};
use manager::Manager;
use server::Server;

/// Lent less than that ago, a connection is handed out as it is.
const FRESH: Duration = Duration::from_millis(500);

/// The pause before a refusal by a full server is tried again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What r2d2 lends; boxed, as it changes hands often.
type Stored<C> = Box<r2d2::PooledConnection<Manager<C>>>;

/// The connections of one application, from its first use to its disposal.
pub(crate) struct Pool<C: SessionConnection> {
    storage: r2d2::Pool<Manager<C>>,
    gate: Arc<Gate<Stored<C>>>,
    control: Arc<Control>,
    server: Arc<Server>,
    spec: Arc<Spec<C>>,
    anchor: Arc<Mutex<Option<C>>>,
    /// Where one writer at a time is all the database allows: the queue for it.
    writers: Option<Arc<Gate>>,
    ageing: AtomicBool,
}

impl<C: SessionConnection> std::fmt::Debug for Pool<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("app", &self.spec.app).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Pool<C> {
    /// A pool that has opened nothing yet.
    pub(crate) fn new(spec: Arc<Spec<C>>) -> Self {
        let gate = Arc::new(Gate::new(spec.config.max_size as usize));
        let control = Arc::new(Control::default());
        let server = Server::named(&spec.target.server);
        let anchor = Arc::new(Mutex::new(None));
        let manager = Manager::new(
            Arc::clone(&spec),
            Arc::clone(&control),
            Arc::clone(&server),
            Arc::downgrade(&gate),
            Arc::clone(&anchor),
        );
        let storage = r2d2::Pool::builder()
            .max_size(spec.config.max_size)
            .min_idle(Some(0))
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .error_handler(Box::new(r2d2::NopErrorHandler))
            .thread_pool(Arc::clone(server.threads()))
            .build_unchecked(manager);
        let writers = spec.target.kind.has_one_writer().then(|| writers::of(&spec.target));
        Self { storage, gate, control, server, spec, anchor, writers, ageing: AtomicBool::new(false) }
    }

    /// A connection, within the application's `acquire_timeout` and before `limit`.
    pub(crate) fn acquire(
        self: Arc<Self>,
        place: Place,
        in_transaction: bool,
        limit: Option<Instant>,
    ) -> Result<Lease<C>> {
        let started = Instant::now();
        let deadline = started + self.spec.config.acquire_timeout;
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        let mut pause = FIRST_PAUSE;
        let mut refusal = None;
        let mut asked = started;
        loop {
            let holder = Holder::new(Arc::clone(&self.spec.app), place, asked, in_transaction);
            let mut permit = self.permit(holder, started, deadline)?;
            self.find_idle(&mut permit);
            if permit.item.is_none() {
                match self.connect(&mut permit, deadline) {
                    Ok(Ok(())) => {}
                    // The server is full or starting: without the permit, so that the others can go on meanwhile.
                    Ok(Err(failure)) => {
                        drop(permit);
                        let left = deadline.saturating_duration_since(Instant::now());
                        if left <= pause {
                            return Err(self.refused(failure));
                        }
                        std::thread::sleep(pause);
                        pause = (pause * 2).min(LONGEST_PAUSE);
                        refusal = Some(failure);
                        asked = Instant::now();
                        continue;
                    }
                    // The last try was cut short by the deadline; what the server said before tells more.
                    Err(error) => match refusal {
                        Some(failure) if matches!(error, Error::ConnectTimeout { .. }) => {
                            return Err(self.refused(failure));
                        }
                        _ => return Err(error),
                    },
                }
            }
            if let Some(mut permit) = self.alive(permit, deadline) {
                live(&mut permit).lent = permit.since();
                return Ok(Lease::new(permit, self));
            }
            asked = Instant::now();
        }
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
            Refused::HeldByCaller(holders) => {
                Error::WouldDeadlock { app: app(), what: "the write lock of this SQLite database", holders, at: place }
            }
            Refused::TimedOut { holders, .. } => Error::LockTimeout {
                app: app(),
                operation: "a write",
                waited: started.elapsed(),
                message: format!("SQLite has one writer at a time; now {holders}"),
                left: "Nothing was written.".into(),
            },
        })
    }

    /// Lends nothing any more, sends waiters away and closes what is idle. What is out is closed when it comes back.
    pub(crate) fn close(&self) {
        self.control.closed.store(true, Ordering::SeqCst);
        self.gate.close();
        while let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) {
            self.fill(&mut permit);
            if permit.item.is_none() {
                break;
            }
            discard(&mut permit);
        }
    }

    /// Waits until nothing is out or being connected, except what the calling thread holds itself.
    pub(crate) fn wait_until_drained(&self, deadline: Instant) -> bool {
        let me = std::thread::current().id();
        self.gate.wait_until(deadline, |holders| {
            holders.iter().all(|holder| holder.is_on(me)) && self.control.connecting.load(Ordering::SeqCst) == 0
        })
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

    /// Makes every connection that is open now one from before the last change of the schema.
    fn schema_changed(&self) -> usize {
        self.control.schema.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(crate) fn holders(&self) -> Holders {
        self.gate.holders()
    }

    pub(crate) fn closings(&self) -> usize {
        self.control.closings.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> AppStatus {
        let holders = self.gate.holders();
        let open = self.control.open.load(Ordering::Acquire);
        let connecting = self.control.connecting.load(Ordering::Acquire);
        let in_use = holders.len().saturating_sub(self.gate.seekers()).min(open);
        AppStatus {
            open,
            connecting,
            in_use,
            idle: open - in_use,
            waiting: self.gate.counts().1,
            holders,
            ..AppStatus::at_rest(&self.spec)
        }
    }

    fn permit(&self, holder: Holder, started: Instant, deadline: Instant) -> Result<Permit<Stored<C>>> {
        let app = || self.spec.app.to_string();
        let place = holder.place;
        self.gate.acquire(holder, deadline).map_err(|refused| match refused {
            Refused::Closed => Error::Disposed { app: app() },
            Refused::HeldByCaller(holders) => {
                Error::WouldDeadlock { app: app(), what: "every connection of the pool", holders, at: place }
            }
            Refused::TimedOut { waiting, holders } => Error::AcquireTimeout {
                app: app(),
                waited: started.elapsed(),
                max_size: self.spec.config.max_size,
                waiting,
                holders,
            },
        })
    }

    /// Gives the permit an idle connection that may be lent, if there is one; those that may not are closed on the way.
    fn find_idle(&self, permit: &mut Permit<Stored<C>>) {
        let now = permit.since();
        loop {
            self.fill(permit);
            match permit.item.as_deref().map(|stored| &**stored) {
                Some(Slot::Live(live)) if !live.is_fit(&self.control, now) => discard(permit),
                Some(Slot::Failed(_) | Slot::Surplus) => permit.item = None,
                Some(Slot::Live(_)) | None => return,
            }
        }
    }

    /// Gives the permit an idle connection: the one left on it, on another, or one that came when nobody waited any more.
    fn fill(&self, permit: &mut Permit<Stored<C>>) {
        permit.refill();
        if permit.item.is_none() {
            permit.item = self.storage.try_get().map(Box::new);
        }
    }

    /// Gives the permit a new connection, or one that comes back meanwhile; or says for which reason, that passes, the server
    /// refused one.
    fn connect(
        self: &Arc<Self>,
        permit: &mut Permit<Stored<C>>,
        deadline: Instant,
    ) -> Result<Result<(), ConnectFailure>> {
        // What is made may come when nobody waits any more, and then nobody gives it back.
        self.age();
        let patience = self.spec.config.connect_timeout;
        let timed_out = |waited| Error::ConnectTimeout {
            app: self.spec.app.to_string(),
            server: self.spec.target.shown.clone(),
            waited,
        };
        if self.server.is_stuck(patience) {
            return Err(timed_out(patience));
        }
        let started = Instant::now();
        let end = (started + patience).min(deadline);
        let _seeker = loop {
            if let Some(seeker) = permit.seek() {
                break seeker;
            }
            self.find_idle(permit);
            if permit.item.is_some() {
                return Ok(Ok(()));
            }
        };
        loop {
            if self.control.closed.load(Ordering::Acquire) {
                return Err(Error::Disposed { app: self.spec.app.to_string() });
            }
            let left = end.saturating_duration_since(Instant::now());
            let Ok(mut stored) = self.storage.get_timeout(left).map(Box::new) else {
                return Err(timed_out(started.elapsed()));
            };
            match &mut **stored {
                // However short its lifetime, it serves once: another would be no younger.
                Slot::Live(live) if live.is_current(&self.control) => {
                    permit.item = Some(stored);
                    return Ok(Ok(()));
                }
                slot @ (Slot::Live(_) | Slot::Surplus) => *slot = Slot::Surplus,
                Slot::Failed(failure) if failure.kind.is_transient() => return Ok(Err(failure.clone())),
                Slot::Failed(failure) => return Err(self.refused(failure.clone())),
            }
        }
    }

    fn refused(&self, failure: ConnectFailure) -> Error {
        let ConnectFailure { kind, message } = failure;
        log::debug!(target: "diesel_session::pool", "app `{}` cannot connect: {message}", self.spec.app);
        Error::Connect { app: self.spec.app.to_string(), server: self.spec.target.shown.clone(), kind, message }
    }

    /// The permit, if its connection has been lent just now or gives a sign of life. It is asked on a helper thread: one that
    /// does not answer keeps its permit until it does, and is closed then.
    fn alive(&self, mut permit: Permit<Stored<C>>, deadline: Instant) -> Option<Permit<Stored<C>>> {
        let age = permit.since().saturating_duration_since(live(&mut permit).lent);
        if age < FRESH || !self.spec.target.kind.can_go_stale() {
            return Some(permit);
        }
        let patience = self.spec.config.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
        let server = Arc::clone(&self.server);
        let (answer, answered) = mpsc::sync_channel(1);
        // From here on it is not the caller who holds it, and who would wait for itself.
        permit.lend();
        self.server.threads().execute(move || {
            permit.adopt();
            let call = server.call();
            let pinged = catch_unwind(AssertUnwindSafe(|| live(&mut permit).conn.ping()));
            drop(call);
            live(&mut permit).witness.take();
            if !matches!(pinged, Ok(Ok(()))) {
                discard(&mut permit);
            }
            if let Err(mpsc::SendError(mut late)) = answer.send(permit) {
                discard(&mut late);
            }
        });
        match answered.recv_timeout(patience) {
            Ok(permit) => {
                permit.adopt();
                permit.item.is_some().then_some(permit)
            }
            Err(_) => {
                log::warn!(
                    target: "diesel_session::pool",
                    "app `{}`: an idle connection to {} gave no sign of life within {patience:?}; it is closed when it does",
                    self.spec.app,
                    self.spec.target.shown
                );
                None
            }
        }
    }

    /// Closes what has been idle, or has lived, for too long, and comes again when the next is due.
    fn age(self: &Arc<Self>) {
        let Some(idle_timeout) = self.spec.config.idle_timeout else { return };
        let ageing = || self.ageing.load(Ordering::Acquire) || self.ageing.swap(true, Ordering::AcqRel);
        if self.control.closed.load(Ordering::Acquire) || ageing() {
            return;
        }
        let pool = Arc::downgrade(self);
        self.server.threads().execute_after(idle_timeout, move || {
            let Some(pool) = pool.upgrade() else { return };
            pool.ageing.store(false, Ordering::Release);
            pool.close_aged(idle_timeout);
            let control = &pool.control;
            if control.connecting.load(Ordering::Acquire) > 0 || control.open.load(Ordering::Acquire) > 0 {
                pool.age();
            }
        });
    }

    /// What was left last is lent first, so all are taken out before any is put back, each under a permit of its own.
    fn close_aged(&self, idle_timeout: Duration) {
        let mut kept = Vec::new();
        let now = Instant::now();
        while let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) {
            self.fill(&mut permit);
            let Some(stored) = &mut permit.item else { break };
            let stays = match &mut ***stored {
                Slot::Live(live) => live.stays_idle(&self.control, now, idle_timeout),
                Slot::Failed(_) | Slot::Surplus => false,
            };
            if stays {
                kept.push(permit);
            } else {
                discard(&mut permit);
            }
        }
        // The one left longest ago goes back first.
        while let Some(permit) = kept.pop() {
            drop(permit);
        }
    }

    #[track_caller]
    fn housekeeper(&self) -> Holder {
        Holder::new(Arc::clone(&self.spec.app), std::panic::Location::caller(), Instant::now(), false)
    }
}
