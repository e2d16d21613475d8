//! How a caller gets a connection: a permit, then what is idle, then a connect.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::gate::{Permit, Refused};
use super::lease::{Lease, discard, live};
use super::ledger::Holder;
use super::manager::{ConnectFailure, Slot};
use super::{Pool, Stored};
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

/// Lent less than that ago, a connection is handed out as it is.
const FRESH: Duration = Duration::from_millis(500);

/// The pause before a refusal by a full server is tried again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

impl<C: SessionConnection> Pool<C> {
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
    pub(super) fn fill(&self, permit: &mut Permit<Stored<C>>) {
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
        let permit = self.errand(permit, patience, "gave no sign of life", |live| {
            let answer = live.conn.ping();
            live.witness.take();
            answer.is_ok()
        })?;
        permit.item.is_some().then_some(permit)
    }
}
