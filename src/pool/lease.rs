//! A connection on loan.

use std::sync::Arc;
use std::time::Instant;

use super::gate::Permit;
use super::manager::{Live, Slot};
use super::{Pool, Stored};
use crate::connection::SessionConnection;

/// A connection on loan; drop gives it back, or closes it.
#[derive(Debug)]
pub(crate) struct Lease<C: SessionConnection> {
    /// With a connection that is live; only drop takes it.
    permit: Option<Permit<Stored<C>>>,
    pool: Arc<Pool<C>>,
    /// Whose it is has been looked at a moment ago.
    is_own: bool,
    /// The end of the scope's time: its return waits for nothing beyond that.
    until: Option<Instant>,
}

impl<C: SessionConnection> Lease<C> {
    /// The connection on `permit` is live.
    pub(super) fn new(permit: Permit<Stored<C>>, pool: Arc<Pool<C>>) -> Self {
        Self { permit: Some(permit), pool, is_own: false, until: None }
    }

    #[inline]
    pub(crate) fn live(&mut self) -> &mut Live<C> {
        live(self.permit.as_mut().expect(ONLY_DROP))
    }

    #[inline]
    pub(crate) fn conn(&mut self) -> &mut C {
        &mut self.live().conn
    }

    pub(crate) fn conn_ref(&self) -> &C {
        match self.permit.as_ref().and_then(|permit| permit.item.as_deref()).map(|stored| &**stored) {
            Some(Slot::Live(live)) => &live.conn,
            _ => unreachable!("{NOT_LIVE}"),
        }
    }

    /// Closes the connection when it goes back.
    pub(crate) fn doom(&mut self) {
        self.live().doomed = true;
    }

    /// The schema is, or is about to be, another. No connection from before stays in use, except this one where it has
    /// prepared nothing before.
    pub(crate) fn schema_changes(&mut self) {
        let prepared_nothing = self.pool.spec.on_connect.is_none();
        let live = self.live();
        if let Some(lane) = live.conn.lane() {
            lane.schema_changes();
        }
        // Migrations are anybody's SQL.
        live.marked = true;
        live.schema.change(live.unused && prepared_nothing);
    }

    pub(crate) fn pool(&self) -> &Arc<Pool<C>> {
        &self.pool
    }

    /// Whether the process that took it is not this one: then nothing may be sent on it.
    pub(crate) fn is_inherited(&self) -> bool {
        self.pool.is_inherited()
    }

    /// The scope's time ends then.
    pub(crate) fn returns_by(&mut self, end: Instant) {
        self.until = Some(end);
    }

    /// Gives it back. That it is not inherited has just been asked.
    pub(crate) fn give_back(mut self) {
        self.is_own = true;
    }

    /// Leaves it to the parent, untouched: its permit too, as the gate's lock may be held by a thread that is not here.
    fn abandon(&mut self) {
        std::mem::forget(self.permit.take());
        std::mem::forget(Arc::clone(&self.pool));
    }
}

impl<C: SessionConnection> Drop for Lease<C> {
    /// Gives it back, from whatever state it is in.
    fn drop(&mut self) {
        if !self.is_own && self.is_inherited() {
            return self.abandon();
        }
        let Some(mut permit) = self.permit.take() else { return };
        let live = live(&mut permit);
        live.was_used = true;
        live.unused = false;
        if live.lost {
            self.pool.server.presence().doubt();
        }
        if self.pool.control.must_close(live) || !self.pool.is_of_a_test() && self.pool.is_needed_elsewhere() {
            self.pool.dismiss(permit, self.until);
        } else if live.may_have_leftovers() || self.pool.tidies_all {
            self.pool.tidy(permit, self.until);
        } else {
            drop(permit);
            self.pool.serve_others();
        }
        self.pool.age();
    }
}

/// What a lease holds is live: it is checked once, when it is taken.
#[inline]
pub(super) fn live<C: SessionConnection>(permit: &mut Permit<Stored<C>>) -> &mut Live<C> {
    match permit.item.as_deref_mut().map(|stored| &mut **stored) {
        Some(Slot::Live(live)) => live,
        _ => unreachable!("{NOT_LIVE}"),
    }
}

/// Closes the connection, if there is one, before its permit is free.
pub(super) fn discard<C: SessionConnection>(permit: &mut Permit<Stored<C>>) {
    if let Some(mut stored) = permit.item.take() {
        // While r2d2 counts it: r2d2 has room for another before what it drops is closed.
        **stored = Slot::Empty;
        permit.label(None);
    }
}

const NOT_LIVE: &str = "a permit without a live connection was lent";
const ONLY_DROP: &str = "only drop takes the permit";
