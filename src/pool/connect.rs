//! What a caller does who has a permit and finds nothing idle: room in the budget, a connect, and what to do when the server
//! refuses. A connection that comes back meanwhile ends it too.
//!
//! A refusal that may pass is met inside the caller's deadline: where the server is full another application's idle connection
//! is closed; where it is away one caller in turn finds out when it is back, for all. Every other refusal is an error at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::acquire::Wish;
use super::budget::{Served, Share};
use super::gate::Permit;
use super::manager::{ConnectFailure, Slot, shortened};
use super::outage::{Probe, Turn};
use super::resident::give_up;
use super::{Pool, Stored};
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};

/// The pause before a full server is asked again; it doubles up to the second. A server has a slot free some 2 ms after its
/// client has closed.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));

/// How long the server is given to notice that a connection was closed for this caller, before another one is.
const NOTICE: Duration = Duration::from_millis(20);

/// What came of one try.
enum Tried {
    Connected,
    /// The order went to somebody else.
    Again,
    Refused(ConnectFailure),
    TimedOut(Duration),
}

/// What a full server has been asked for so far.
struct Siege {
    pause: Duration,
    last_closed: Option<Instant>,
}

impl<C: SessionConnection> Pool<C> {
    /// Gives the permit a new connection, or one that comes back meanwhile.
    pub(super) fn connect(self: &Arc<Self>, permit: &mut Permit<Stored<C>>, wish: &Wish) -> Result<()> {
        // What is made may come when nobody waits any more, and then nobody gives it back.
        self.age();
        let _seeker = loop {
            if let Some(seeker) = permit.seek() {
                break seeker;
            }
            self.find_idle(permit);
            if permit.item.is_some() {
                return Ok(());
            }
        };
        self.enter();
        let mut siege = Siege { pause: PAUSES.0, last_closed: None };
        let mut refusal = None;
        loop {
            self.not_closed()?;
            self.find_idle(permit);
            if permit.item.is_some() {
                return Ok(());
            }
            let probe = match self.server.presence().turn(wish.deadline, || self.is_closed()) {
                Turn::Back => None,
                Turn::Try(probe) => Some(probe),
                Turn::TimedOut(last) => {
                    self.not_closed()?;
                    return Err(self.refused(last));
                }
            };
            let Some(share) = self.share(wish)? else { continue };
            match self.try_connect(permit, share, wish)? {
                Tried::Connected => {
                    self.server.presence().is_back();
                    return Ok(());
                }
                Tried::Again => {}
                // The last try was cut short by the deadline; what the server said before tells more.
                Tried::TimedOut(waited) => {
                    return Err(refusal.map_or_else(|| self.timed_out(waited), |last| self.refused(last)));
                }
                Tried::Refused(failure) => {
                    self.wait_after(&failure, probe, &mut siege, wish)?;
                    refusal = Some(failure);
                }
            }
        }
    }

    /// Waits until trying again may help; an error where it never will, or where there is no time left.
    fn wait_after(
        &self,
        failure: &ConnectFailure,
        probe: Option<Probe<'_>>,
        siege: &mut Siege,
        wish: &Wish,
    ) -> Result<()> {
        let presence = self.server.presence();
        let kind = match failure.kind {
            ConnectErrorKind::Other if self.server_is_full(wish.deadline) => ConnectErrorKind::ServerFull,
            known => known,
        };
        match kind {
            ConnectErrorKind::Unreachable if !presence.was_reached() => Err(self.refused(failure.clone())),
            ConnectErrorKind::Unreachable | ConnectErrorKind::Starting if self.spec.target.kind.can_go_stale() => {
                presence.went_away(failure.clone());
                drop(probe);
                Ok(())
            }
            ConnectErrorKind::ServerFull | ConnectErrorKind::Starting => {
                if kind == ConnectErrorKind::ServerFull {
                    presence.is_back();
                }
                self.besiege(failure, siege, wish)
            }
            _ => {
                presence.is_back();
                Err(self.refused(failure.clone()))
            }
        }
    }

    /// The server is full, or the file is locked: another application's idle connection is closed, and then it is waited a
    /// little.
    fn besiege(&self, failure: &ConnectFailure, siege: &mut Siege, wish: &Wish) -> Result<()> {
        let now = Instant::now();
        let pause = shortened(siege.pause);
        if wish.deadline.saturating_duration_since(now) <= pause {
            return Err(self.refused(failure.clone()));
        }
        siege.pause = (siege.pause * 2).min(PAUSES.1);
        if siege.last_closed.is_some_and(|last| now - last < NOTICE) {
            std::thread::sleep(pause);
            return Ok(());
        }
        let room = self.server.room();
        // In the queue before anything idle is looked for, so that what comes back in between is not missed.
        let claim = room.claim(self.number, wish.since);
        self.take_census(wish.deadline);
        let closed = room.least_recently_used(self.number).is_some_and(give_up);
        let served = claim.wait(now + pause);
        if closed || matches!(served, Served::Look) {
            *siege = Siege { pause: PAUSES.0, last_closed: Some(Instant::now()) };
        }
        match served {
            Served::Closed => Err(self.disposed()),
            Served::Room(_) | Served::Look | Served::TimedOut => Ok(()),
        }
    }

    /// Whether a refusal whose text says nothing was one for want of room. It is asked over an idle connection of this process.
    fn server_is_full(&self, deadline: Instant) -> bool {
        let Some(question) = self.spec.target.kind.is_full() else { return false };
        self.server.ask(question, deadline).is_some_and(|answer| answer.first().is_some_and(|full| full == "1"))
    }

    /// Room for one connection in the budget of the database object, if it has one. `None`: something has changed meanwhile.
    fn share(&self, wish: &Wish) -> Result<Option<Option<Share>>> {
        let Some(budget) = &self.budget else { return Ok(Some(None)) };
        if let Some(share) = budget.try_take() {
            return Ok(Some(Some(share)));
        }
        let claim = budget.claim(self.number, wish.since);
        budget.serve();
        match claim.wait(wish.deadline) {
            Served::Room(share) => Ok(Some(Some(share))),
            Served::Look => Ok(None),
            Served::Closed => Err(self.disposed()),
            Served::TimedOut => Err(Error::BudgetExhausted {
                app: self.spec.app.to_string(),
                waited: wish.since.elapsed(),
                max_connections: budget.limit().unwrap_or_default(),
                holders: budget.holders(),
            }),
        }
    }

    fn try_connect(&self, permit: &mut Permit<Stored<C>>, share: Option<Share>, wish: &Wish) -> Result<Tried> {
        let patience = self.spec.config.connect_timeout;
        if self.server.is_stuck(patience) {
            return Ok(Tried::TimedOut(patience));
        }
        self.keep_in_bounds();
        let started = Instant::now();
        let end = (started + patience).min(wish.deadline);
        let _order = self.control.orders.place(share);
        loop {
            self.not_closed()?;
            let left = end.saturating_duration_since(Instant::now());
            let Ok(mut stored) = self.storage.get_timeout(left).map(Box::new) else {
                return Ok(Tried::TimedOut(started.elapsed()));
            };
            match &mut **stored {
                // However short its lifetime, a new one serves once: another would be no younger.
                Slot::Live(live)
                    if live.unused && live.is_current(&self.control) || live.is_fit(&self.control, Instant::now()) =>
                {
                    permit.item = Some(stored);
                    return Ok(Tried::Connected);
                }
                slot @ (Slot::Live(_) | Slot::Surplus) => {
                    *slot = Slot::Surplus;
                    if self.budget.is_some() {
                        return Ok(Tried::Again);
                    }
                }
                Slot::Failed(failure) => return Ok(Tried::Refused(failure.clone())),
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.control.closed.load(Ordering::Acquire)
    }

    fn not_closed(&self) -> Result<()> {
        if self.is_closed() { Err(self.disposed()) } else { Ok(()) }
    }

    fn disposed(&self) -> Error {
        Error::Disposed { app: self.spec.app.to_string() }
    }

    fn timed_out(&self, waited: Duration) -> Error {
        Error::ConnectTimeout { app: self.spec.app.to_string(), server: self.spec.target.shown.clone(), waited }
    }

    fn refused(&self, failure: ConnectFailure) -> Error {
        let ConnectFailure { kind, mut message } = failure;
        if kind == ConnectErrorKind::ServerFull {
            message.push_str(&self.server.occupants());
        }
        log::debug!(target: "diesel_session::pool", "app `{}` cannot connect: {message}", self.spec.app);
        Error::Connect { app: self.spec.app.to_string(), server: self.spec.target.shown.clone(), kind, message }
    }
}
