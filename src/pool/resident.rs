//! A pool among the others of its server and of its budget.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use super::Pool;
use super::budget::{Budget, Resident};
use super::ledger::Holders;
use crate::connection::SessionConnection;

/// Where a pool is kept: it lets go of one that has become empty, and makes another when it is needed again. Ten thousand
/// applications used once are then no heavier than ten thousand that were never used.
pub(crate) trait Home: Send + Sync {
    /// Lets go of the pool of that number, if it is empty and nobody uses it.
    fn let_go(&self, pool: u64);
}

/// Makes a pool give up an idle connection; `false` where it has none any more.
pub(super) fn give_up(resident: Arc<dyn Resident>) -> bool {
    let given_up = resident.give_up();
    let (number, home) = (resident.number(), resident.home());
    let empty = resident.is_empty();
    drop(resident);
    if let (true, Some(home)) = (empty, home) {
        home.let_go(number);
    }
    given_up
}

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
        if room.taken() >= self.spec.target.kind.keeps_open(self.server.capacity()) {
            if let Some(other) = room.least_recently_used(self.number) {
                give_up(other);
            }
        }
    }

    pub(super) fn take_census(&self, deadline: Instant) {
        if let Some(answer) = self.spec.target.kind.census().and_then(|question| self.server.ask(question, deadline)) {
            self.server.note_census(answer);
        }
    }

    pub(super) fn budgets(&self) -> impl Iterator<Item = &Arc<Budget>> {
        std::iter::once(self.server.room()).chain(&self.budget)
    }
}

impl<C: SessionConnection> Resident for Pool<C> {
    fn idle_since(&self) -> Option<Instant> {
        let in_storage = || {
            let has_permit = self.gate.counts().0 < self.spec.config.max_size as usize;
            (has_permit && self.storage.state().idle_connections > 0).then_some(Instant::now())
        };
        // What lies in storage came a moment ago, for somebody who was served otherwise.
        self.gate.idle_since().or_else(in_storage)
    }

    fn number(&self) -> u64 {
        self.number
    }

    fn home(&self) -> Option<Arc<dyn Home>> {
        self.home.upgrade()
    }

    fn give_up(&self) -> bool {
        let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) else { return false };
        self.fill(&mut permit);
        let found = permit.item.is_some();
        if found {
            log::debug!(target: "diesel_session::pool", "app `{}`: an idle connection makes room for another application", self.spec.app);
            self.dismiss(permit);
        }
        found
    }

    fn ask(&self, question: &str, patience: Duration) -> Option<Vec<String>> {
        let mut permit = self.gate.try_acquire(self.housekeeper())?;
        self.fill(&mut permit);
        permit.item.as_ref()?;
        let (tell, told) = mpsc::channel();
        let question = question.to_owned();
        self.errand(permit, patience, "did not say who has the server", move |live| {
            let answer = live.conn.texts(&question);
            live.witness.take();
            let sound = answer.is_ok();
            // Nobody may be there any more.
            let _ = tell.send(answer);
            sound
        })?;
        let rows = told.try_recv().ok()?.ok()?;
        Some(rows.into_iter().flatten().collect())
    }

    fn holders(&self) -> Holders {
        self.gate.holders()
    }

    fn is_stirring(&self) -> bool {
        let idle = || self.storage.state().idle_connections > 0;
        self.control.connecting.load(Ordering::Acquire) > 0 || self.gate.idle_since().is_some() || idle()
    }

    fn is_empty(&self) -> bool {
        let count = |counter: &std::sync::atomic::AtomicUsize| counter.load(Ordering::Acquire);
        count(&self.control.open) == 0 && count(&self.control.connecting) == 0 && self.gate.seekers() == 0
    }
}
