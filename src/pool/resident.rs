//! A pool among the others of its server and of its budget.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use super::Pool;
use super::budget::{Budget, Resident};
use super::ledger::{Holder, Holders};
use crate::connection::SessionConnection;

impl<C: SessionConnection> Pool<C> {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// From here on others know of it, until it is empty.
    pub(super) fn enter(self: &Arc<Self>) {
        for budget in self.budgets() {
            let pool: Weak<Self> = Arc::downgrade(self);
            budget.enter(self.number, pool);
        }
    }

    pub(super) fn leave_if_empty(&self) {
        if self.is_empty() {
            self.budgets().for_each(|budget| budget.leave(self.number));
        }
    }

    /// Whether a connection that comes back should make room for another pool, whose caller has waited for longer than the
    /// next of this one.
    pub(super) fn is_needed_elsewhere(&self) -> bool {
        self.budgets()
            .any(|budget| budget.is_wanted() && budget.prefers_another(self.number, self.gate.waiting_since()))
    }

    /// Gives what is idle to those who wait for room.
    pub(super) fn serve_others(&self) {
        self.budgets().filter(|budget| budget.is_wanted()).for_each(|budget| budget.serve());
    }

    /// Closes another application's idle connection where this process has most of what the server allows, so that other
    /// programs find room there too.
    pub(super) fn keep_in_bounds(&self) {
        let room = self.server.room();
        if room.taken() >= self.spec.target.kind.keeps_open(self.server.capacity())
            && let Some(other) = room.least_recently_used(self.number)
        {
            other.give_up();
        }
    }

    pub(super) fn take_census(&self, deadline: Instant) {
        if let Some(answer) = self.spec.target.kind.census().and_then(|question| self.server.ask(question, deadline)) {
            self.server.note_census(answer);
        }
    }

    /// It has the one connection of a test that is rolled back, which it does not close.
    pub(super) fn is_of_a_test(&self) -> bool {
        self.spec.lane.is_some()
    }

    pub(super) fn budgets(&self) -> impl Iterator<Item = &Arc<Budget>> {
        std::iter::once(self.server.room()).chain(&self.budget)
    }
}

impl<C: SessionConnection> Resident for Pool<C> {
    fn idle_since(&self) -> Option<Instant> {
        // Of what is never given up there is nothing to choose from.
        if self.is_of_a_test() { None } else { self.gate.idle_since() }
    }

    fn give_up(self: Arc<Self>) -> bool {
        // The server would not get its slot back.
        if self.is_of_a_test() {
            return false;
        }
        let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) else { return false };
        permit.refill();
        if permit.item.is_none() {
            return false;
        }
        crate::wording::log_line!(
            debug,
            "diesel_session::pool",
            "app `{}`: an idle connection makes room for another application",
            self.spec.app
        );
        self.close_soon(permit);
        true
    }

    fn ask(&self, question: &str, patience: Duration) -> Option<Vec<String>> {
        let mut permit = self.gate.try_acquire(self.housekeeper())?;
        permit.refill();
        permit.item.as_ref()?;
        let (tell, told) = mpsc::channel();
        let question = question.to_owned();
        let permit = self.errand(permit, patience, "did not say who has the server", move |live| {
            let answer = live.conn.texts(&question);
            live.witness.take();
            let sound = answer.is_ok();
            // Nobody may be there any more.
            let _ = tell.send(answer);
            sound
        });
        // Meanwhile somebody may have found nothing idle.
        let answered = permit.is_some();
        drop(permit);
        self.serve_others();
        if !answered {
            return None;
        }
        let rows = told.try_recv().ok()?.ok()?;
        Some(rows.into_iter().flatten().collect())
    }

    fn holders(&self) -> Holders {
        self.gate.holders()
    }

    fn open(&self) -> usize {
        self.control.open.load(Ordering::Acquire)
    }

    fn holding(&self) -> Option<(usize, Holders)> {
        // What moves while it is looked at shows in the number of grants.
        let (grants, holders) = self.gate.grants();
        let open = self.open();
        let moving = self.gate.idle_since().is_some() || self.gate.grants().0 != grants;
        // Who looks for a connection has none to give back; a helper thread that makes one may have it already.
        let has_one = |holder: &Holder| !holder.seeking || holder.lent;
        (!moving).then(|| (open, Holders(holders.0.into_iter().filter(has_one).collect())))
    }

    fn sessions(&self) -> Vec<(u64, Option<Holder>)> {
        self.gate.labels()
    }

    fn is_empty(&self) -> bool {
        // In the order in which a connection comes about, so that none is missed on its way.
        let count = |counter: &std::sync::atomic::AtomicUsize| counter.load(Ordering::Acquire);
        count(&self.control.seeking) == 0 && count(&self.control.open) == 0
    }
}
