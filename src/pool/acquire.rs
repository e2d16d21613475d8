//! How a caller gets a connection: a permit, then what is idle, then a connect (`connect.rs`), and in the end a sign of life.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::gate::{Permit, Refused};
use super::lease::{Lease, discard, live};
use super::ledger::Holder;
use super::manager::Slot;
use super::{Pool, Stored};
use crate::backend;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result, Shortage, WaitLimit};

/// Lent less than that ago, a connection is handed out as it is.
const FRESH: Duration = Duration::from_millis(500);

/// Lent less than that ago, nobody looks whether the server has hung up meanwhile.
const JUST_NOW: Duration = Duration::from_millis(1);

/// Somebody's wish for a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish {
    pub(super) place: Place,
    pub(super) in_transaction: bool,
    pub(super) since: Instant,
    pub(super) deadline: Instant,
    /// Whether `deadline` is that of the scope.
    pub(super) of_scope: bool,
}

impl Wish {
    /// What ended a wait that went on until the deadline.
    pub(super) fn limit(&self) -> WaitLimit {
        if self.of_scope { WaitLimit::Scope } else { WaitLimit::Acquire }
    }
}

impl<C: SessionConnection> Pool<C> {
    /// A connection, within the application's `acquire_timeout` and before `limit`.
    pub(crate) fn acquire(
        self: Arc<Self>,
        place: Place,
        in_transaction: bool,
        limit: Option<Instant>,
    ) -> Result<Lease<C>> {
        self.acquire_since(Instant::now(), place, in_transaction, limit)
    }

    /// The same for a caller who has just read the clock.
    pub(crate) fn acquire_since(
        self: Arc<Self>,
        since: Instant,
        place: Place,
        in_transaction: bool,
        limit: Option<Instant>,
    ) -> Result<Lease<C>> {
        if let Some(lane) = &self.spec.lane {
            lane.check(&self.spec.app)?;
        }
        let deadline = since + self.spec.config.acquire_timeout;
        let of_scope = limit.is_some_and(|limit| limit < deadline);
        let deadline = limit.map_or(deadline, |limit| limit.min(deadline));
        let wish = Wish { place, in_transaction, since, deadline, of_scope };
        let mut asked = since;
        loop {
            let mut permit = self.permit(&wish, asked)?;
            self.find_idle(&mut permit);
            while permit.item.is_none() {
                if let Some(lane) = self.spec.lane.as_ref().filter(|lane| lane.is_lent()) {
                    let holders = self.home.upgrade().map(|home| home.lent_to_this_thread()).unwrap_or_default();
                    if !holders.is_empty() {
                        let (app, short) = (self.spec.app.to_string(), Shortage::TestConnection);
                        let pool = self.spec.pool_of();
                        return Err(Error::WouldDeadlock { app, short, holders, at: place, pool });
                    }
                    lane.wait_until_parked(deadline);
                }
                permit = self.connect(permit, &wish)?;
                // What came back may be too old.
                self.find_idle(&mut permit);
            }
            let ready = match (self.alive(permit, deadline), self.spec.on_checkout) {
                (Some(permit), Some(hook)) => self.greeted(permit, hook, limit)?,
                (alive, _) => alive,
            };
            if let Some(mut permit) = ready {
                live(&mut permit).lent = permit.since();
                return Ok(Lease::new(permit, self));
            }
            asked = Instant::now();
            // Who has no time left would find no other alive either, and close them all.
            if asked >= deadline {
                return Err(self.timed_out(since.elapsed(), wish.limit(), &wish));
            }
        }
    }

    fn permit(&self, wish: &Wish, asked: Instant) -> Result<Permit<Stored<C>>> {
        let app = || self.spec.app.to_string();
        let Wish { place, in_transaction, since, deadline, .. } = *wish;
        let holder = Holder::new(Arc::clone(&self.spec.app), place, asked, in_transaction);
        self.gate.acquire(holder, deadline).map_err(|refused| match refused {
            Refused::Closed => Error::Disposed { app: app() },
            Refused::Hopeless(holders) => {
                let short = if self.spec.lane.is_some() { Shortage::TestConnection } else { Shortage::Pool };
                Error::WouldDeadlock { app: app(), short, holders, at: place, pool: self.spec.pool_of() }
            }
            Refused::TimedOut { waiting, holders } => Error::AcquireTimeout {
                app: app(),
                waited: since.elapsed(),
                max_size: self.spec.config.max_size,
                waiting,
                holders,
                at: place,
                limit: wish.limit(),
                pool: self.spec.pool_of(),
            },
        })
    }

    /// Gives the permit an idle connection that may be lent, if there is one; those that may not are closed on the way.
    pub(super) fn find_idle(&self, permit: &mut Permit<Stored<C>>) {
        let now = permit.since();
        loop {
            permit.refill();
            match permit.item.as_deref().map(|stored| &**stored) {
                Some(Slot::Live(live)) if !live.may_be_lent(now) => discard(permit),
                _ => return,
            }
        }
    }

    /// The permit, if its connection has been lent just now or gives a sign of life. It is asked on a helper thread: one that
    /// does not answer keeps its permit until it does, and is closed then.
    fn alive(&self, mut permit: Permit<Stored<C>>, deadline: Instant) -> Option<Permit<Stored<C>>> {
        if !self.spec.target.kind.can_go_stale() {
            return Some(permit);
        }
        let doubts = self.server.presence().doubts();
        let since = permit.since();
        let live = live(&mut permit);
        let idle = since.saturating_duration_since(live.lent);
        if idle < JUST_NOW && live.doubts == doubts {
            return Some(permit);
        }
        if backend::has_hung_up(&mut *live.conn) {
            self.server.presence().doubt();
            discard(&mut permit);
            return None;
        }
        if idle < FRESH && live.doubts == doubts {
            return Some(permit);
        }
        let patience = self.spec.config.connect_timeout.min(deadline.saturating_duration_since(Instant::now()));
        let permit = self.errand(permit, patience, "gave no sign of life", move |live| {
            let answer = live.conn.ping();
            live.witness.take();
            live.doubts = doubts;
            answer.is_ok()
        })?;
        if permit.item.is_none() {
            self.server.presence().doubt();
        }
        permit.item.is_some().then_some(permit)
    }
}
