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
use super::gate::{Permit, Refused};
use super::lease::{discard, live};
use super::ledger::Holder;
use super::manager::{ConnectFailure, Connecting, Seeking, Slot, shortened};
use super::order::Order;
use super::outage::{Probe, Turn};
use super::{Pool, Stored};
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result, Shortage, WaitLimit};

/// The pause before a full server is asked again; it doubles up to the second. A server has a slot free some 2 ms after its
/// client has closed.
const PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));

/// How long the server is given to notice that a connection was closed for this caller, before another one is.
const NOTICE: Duration = Duration::from_millis(20);

/// What came of one try, with the permit where it has come back.
enum Tried<P> {
    Served(P),
    Refused(P, ConnectFailure),
    /// Another's connect failed that should have served this caller, or its connection went to who has waited for longer.
    Missed(P),
    TimedOut(Duration, WaitLimit),
}

/// What a full server has been asked for so far.
struct Siege {
    pause: Duration,
    last_closed: Option<Instant>,
    /// What could not be understood has been tried once more.
    looked_again: bool,
}

impl<C: SessionConnection> Pool<C> {
    /// A permit with a connection, for one with nothing on it: a new one, or one that comes back meanwhile.
    pub(super) fn connect(self: &Arc<Self>, mut permit: Permit<Stored<C>>, wish: &Wish) -> Result<Permit<Stored<C>>> {
        let seeking = Seeking::begin(&self.control);
        // Others have to know of it before it opens anything.
        self.enter();
        let mut siege = Siege { pause: PAUSES.0, last_closed: None, looked_again: false };
        let mut refusal = None;
        loop {
            self.not_closed()?;
            self.find_idle(&mut permit);
            if permit.item.is_some() {
                return Ok(permit);
            }
            permit.seek(true);
            let probe = match self.server.presence().turn(wish.deadline, || self.is_closed()) {
                Turn::Back => None,
                Turn::Try(probe) => Some(probe),
                Turn::TimedOut(last) => {
                    self.not_closed()?;
                    return Err(self.refused(last, wish));
                }
            };
            let (probe, share) = match self.share_now() {
                Some(share) => (probe, share),
                None => {
                    // Whose turn it is to try waits for nothing else, as all others wait for what it finds.
                    drop(probe);
                    let Some(share) = self.share(&mut permit, wish)? else { continue };
                    match self.server.presence().turn_now() {
                        Some(Turn::Try(probe)) => (Some(probe), share),
                        Some(_) => (None, share),
                        None => continue,
                    }
                }
            };
            match self.try_connect(permit, share, &seeking, wish)? {
                Tried::Served(permit) => return Ok(permit),
                Tried::Missed(returned) => permit = returned,
                // The last try was cut short by the deadline; what the server said before tells more.
                Tried::TimedOut(waited, limit) => {
                    return Err(
                        refusal.map_or_else(|| self.timed_out(waited, limit, wish), |last| self.refused(last, wish))
                    );
                }
                Tried::Refused(returned, failure) => {
                    returned.seek(true);
                    permit = returned;
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
            ConnectErrorKind::Other => match self.server_is_full(wish.deadline) {
                Some(true) => ConnectErrorKind::ServerFull,
                // It may have been a moment ago.
                Some(false) if !std::mem::replace(&mut siege.looked_again, true) => return Ok(()),
                _ => ConnectErrorKind::Other,
            },
            known => known,
        };
        match kind {
            ConnectErrorKind::Unreachable if !presence.was_reached() => Err(self.refused(failure.clone(), wish)),
            ConnectErrorKind::Unreachable | ConnectErrorKind::Starting if self.spec.target.kind.can_go_stale() => {
                if presence.went_away(failure.clone()) {
                    let (server, message) = (&self.spec.target.shown, &failure.message);
                    crate::wording::log_line!(
                        warn,
                        "diesel_session::pool",
                        "{server} is away: {message}; it is asked again until it answers"
                    );
                }
                drop(probe);
                Ok(())
            }
            ConnectErrorKind::ServerFull => {
                self.answers();
                self.besiege(failure, siege, wish)
            }
            // A file is locked.
            ConnectErrorKind::Starting => {
                std::thread::sleep(self.next_pause(failure, siege, wish)?);
                Ok(())
            }
            _ => {
                self.answers();
                Err(self.refused(failure.clone(), wish))
            }
        }
    }

    /// The pause before the next try, if there is time for one.
    fn next_pause(&self, failure: &ConnectFailure, siege: &mut Siege, wish: &Wish) -> Result<Duration> {
        let pause = shortened(siege.pause);
        if wish.deadline.saturating_duration_since(Instant::now()) <= pause {
            return Err(self.refused(failure.clone(), wish));
        }
        siege.pause = (siege.pause * 2).min(PAUSES.1);
        Ok(pause)
    }

    /// The server is full: another application's idle connection is closed, and then it is waited a little.
    fn besiege(&self, failure: &ConnectFailure, siege: &mut Siege, wish: &Wish) -> Result<()> {
        let pause = self.next_pause(failure, siege, wish)?;
        let now = Instant::now();
        if siege.last_closed.is_some_and(|last| now - last < NOTICE) {
            std::thread::sleep(pause);
            return Ok(());
        }
        let room = self.server.room();
        // In the queue before anything idle is looked for, so that what comes back in between is not missed.
        let claim = room.claim(self.number, wish.since);
        self.take_census(wish.deadline);
        let closed = room.least_recently_used(self.number).is_some_and(|other| other.give_up());
        let served = claim.wait(now + pause);
        if closed || matches!(served, Served::Look) {
            *siege = Siege { pause: PAUSES.0, last_closed: Some(Instant::now()), ..*siege };
        }
        match served {
            Served::Closed => Err(self.disposed()),
            Served::Room(_) | Served::Look | Served::Hopeless(_) | Served::TimedOut => Ok(()),
        }
    }

    /// Whether a refusal whose text says nothing was one for want of room. It is asked over an idle connection of this process;
    /// `None` where there is none that answers.
    fn server_is_full(&self, deadline: Instant) -> Option<bool> {
        let answer = self.server.ask(self.spec.target.kind.is_full()?, deadline)?;
        answer.first().map(|full| full == "1")
    }

    /// Room for one connection in the budget of the database object, if it has one; `None` where that has to be waited for.
    fn share_now(&self) -> Option<Option<Share>> {
        match &self.budget {
            Some(budget) => budget.try_take().map(Some),
            None => Some(None),
        }
    }

    /// Room for one connection in the budget of the database object, if it has one. `None`: something has changed meanwhile.
    /// What comes back meanwhile serves this caller too, and before those who came later: it is on the permit then.
    fn share(&self, permit: &mut Permit<Stored<C>>, wish: &Wish) -> Result<Option<Option<Share>>> {
        let Some(budget) = &self.budget else { return Ok(Some(None)) };
        if let Some(share) = budget.try_take() {
            return Ok(Some(Some(share)));
        }
        let claim = budget.claim(self.number, wish.since);
        // A pool that was closed before has sent no claim away that came later.
        self.not_closed()?;
        let holder = Holder::new(Arc::clone(&self.spec.app), wish.place, wish.since, wish.in_transaction);
        let line = match permit.line_up_beside(holder, claim.bell()) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(None),
            Err(_) => return Err(self.disposed()),
        };
        budget.serve();
        let served = claim.wait_if_it_can_end(wish.place, wish.deadline);
        if line.leave(permit) {
            return Ok(None);
        }
        match served {
            Served::Room(share) => Ok(Some(Some(share))),
            Served::Look => Ok(None),
            Served::Closed => Err(self.disposed()),
            Served::Hopeless(holders) => Err(Error::WouldDeadlock {
                app: self.spec.app.to_string(),
                short: Shortage::Limit,
                holders,
                at: wish.place,
                pool: self.spec.pool_of(),
            }),
            Served::TimedOut => Err(Error::BudgetExhausted {
                app: self.spec.app.to_string(),
                waited: wish.since.elapsed(),
                max_connections: budget.limit().unwrap_or_default(),
                holders: budget.holders(),
                at: wish.place,
                limit: wish.limit(),
            }),
        }
    }

    /// Lets a helper thread connect with the permit, and lines up for what comes first: that, or what somebody gives back.
    fn try_connect(
        self: &Arc<Self>,
        mut permit: Permit<Stored<C>>,
        share: Option<Share>,
        seeking: &Seeking,
        wish: &Wish,
    ) -> Result<Tried<Permit<Stored<C>>>> {
        let patience = self.spec.config.connect_timeout;
        if self.server.is_stuck(patience) {
            return Ok(Tried::TimedOut(patience, WaitLimit::Connect));
        }
        self.keep_in_bounds();
        let started = Instant::now();
        let end = (started + patience).min(wish.deadline);
        let limit = if started + patience <= wish.deadline { WaitLimit::Connect } else { wish.limit() };
        let holder = Holder::new(Arc::clone(&self.spec.app), wish.place, wish.since, wish.in_transaction);
        let line = match permit.line_up(holder) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(Tried::Served(permit)),
            Err(_) => return Err(self.disposed()),
        };
        permit.bequeath(line.ticket());
        let order = self.connect_on_helper(permit, share, seeking.clone());
        match line.wait(end) {
            Ok(permit) if permit.item.is_some() => Ok(Tried::Served(permit)),
            Ok(permit) => Ok(match order.take_failure() {
                Some(failure) => Tried::Refused(permit, failure),
                None => Tried::Missed(permit),
            }),
            Err(refused) => {
                order.cancel();
                match refused {
                    Refused::Closed => Err(self.disposed()),
                    Refused::TimedOut { .. } | Refused::Hopeless(_) => Ok(Tried::TimedOut(started.elapsed(), limit)),
                }
            }
        }
    }

    /// The permit comes back with a connection, or to its heir with the reason why not. A connection that comes when its caller
    /// has left is kept.
    fn connect_on_helper(
        self: &Arc<Self>,
        permit: Permit<Stored<C>>,
        share: Option<Share>,
        seeking: Seeking,
    ) -> Arc<Order<Stored<C>>> {
        permit.lend();
        let connecting = Connecting::begin(&self.control);
        let order = Arc::new(Order::new(permit, share));
        let (pool, ordered) = (Arc::clone(self), Arc::clone(&order));
        self.server.help(move || {
            if let Some((mut permit, share)) = ordered.begin() {
                // Whoever waited may have been served otherwise.
                if !pool.is_closed() && pool.gate.counts().1 > 0 {
                    let call = pool.server.call();
                    match pool.make(share) {
                        Ok(stored) => pool.hand_over(&mut permit, stored),
                        Err(failure) => ordered.fail(failure),
                    }
                    drop(call);
                }
                drop(connecting);
                let closes = |live: &mut _| pool.control.must_close(live) || pool.is_needed_elsewhere();
                if permit.item.is_some() && closes(live(&mut permit)) {
                    discard(&mut permit);
                }
                drop(permit);
            }
            drop(seeking);
            pool.serve_others();
            pool.leave_if_empty();
        });
        order
    }

    /// Gives the permit a connection that is new.
    fn hand_over(&self, permit: &mut Permit<Stored<C>>, stored: Stored<C>) {
        permit.item = Some(stored);
        let session = live(permit).session;
        permit.label(session);
        self.watch();
    }

    /// A new connection, in a slot of r2d2's. There is room for it, as the caller has a permit.
    fn make(&self, share: Option<Share>) -> Result<Stored<C>, ConnectFailure> {
        let slot = self.storage.get_timeout(self.spec.config.connect_timeout);
        let mut stored = Box::new(slot.map_err(|error| self.manager.failure(&format!("r2d2 made no room: {error}")))?);
        **stored = Slot::Live(self.manager.make(share)?);
        self.answers();
        crate::wording::log_line!(debug, "diesel_session::pool", "app `{}` has opened a connection", self.spec.app);
        Ok(stored)
    }

    /// The server has answered, whatever it said.
    fn answers(&self) {
        if self.server.presence().is_back() {
            crate::wording::log_line!(info, "diesel_session::pool", "{} is back", self.spec.target.shown);
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

    pub(super) fn timed_out(&self, waited: Duration, limit: WaitLimit, wish: &Wish) -> Error {
        let (app, server) = (self.spec.app.to_string(), self.spec.target.shown.clone());
        Error::ConnectTimeout { app, server, waited, at: wish.place, limit }
    }

    fn refused(&self, failure: ConnectFailure, wish: &Wish) -> Error {
        let ConnectFailure { kind, mut message } = failure;
        if kind == ConnectErrorKind::ServerFull {
            message.push_str(&self.server.occupants());
        }
        crate::wording::log_line!(debug, "diesel_session::pool", "app `{}` cannot connect: {message}", self.spec.app);
        let (app, server) = (self.spec.app.to_string(), self.spec.target.shown.clone());
        Error::Connect { app, server, kind, message, at: wish.place }
    }
}
