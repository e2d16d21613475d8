//! A pool as the library puts it together: the same steps in the same order.

use std::sync::{Arc, Weak};
use std::time::Duration;

use shuttle::rand::Rng;

use super::budget::{Budget, Resident, Served, Share};
use super::gate::{Gate, Permit, Refused};
use super::ledger::{Holder, Holders};
use super::manager::{ConnectFailure, Control, Server, Storage, Stored};
use super::order::Order;
use super::sync::{Instant, Ordering, current_thread};
use super::waits::Waits;

/// What a caller is told who gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Closed,
    Failed,
    Hopeless,
    TimedOut,
}

pub(crate) struct Pool {
    number: u64,
    myself: Weak<Pool>,
    gate: Arc<Gate<Stored>>,
    storage: Arc<Storage>,
    control: Arc<Control>,
    server: Arc<Server>,
    budget: Arc<Budget>,
    size: usize,
    /// One connect in so many fails; 0 is none.
    failing: u32,
}

pub(crate) struct Lease {
    permit: Option<Permit<Stored>>,
    pool: Arc<Pool>,
}

#[derive(Clone, Copy)]
struct Wish {
    since: Instant,
    deadline: Instant,
}

/// One in [`Control::seeking`].
struct Seeking(Arc<Control>);

impl Seeking {
    fn begin(control: &Arc<Control>) -> Self {
        control.seeking.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(control))
    }
}

impl Drop for Seeking {
    fn drop(&mut self) {
        self.0.seeking.fetch_sub(1, Ordering::SeqCst);
    }
}

#[track_caller]
fn holder(since: Instant) -> Holder {
    Holder::new("app".into(), std::panic::Location::caller(), since, false)
}

impl Pool {
    pub(crate) fn new(
        number: u64,
        size: usize,
        failing: u32,
        budget: &Arc<Budget>,
        waits: &Arc<Waits>,
        server: &Arc<Server>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|myself| Self {
            number,
            myself: myself.clone(),
            gate: Arc::new(Gate::new(size, Arc::clone(waits))),
            storage: Arc::new(Storage::new(size)),
            control: Arc::default(),
            server: Arc::clone(server),
            budget: Arc::clone(budget),
            size,
            failing,
        })
    }

    pub(crate) fn acquire(self: &Arc<Self>, time: Duration) -> Result<Lease, Told> {
        let since = Instant::now();
        let wish = Wish { since, deadline: since + time };
        let mut permit = self.gate.acquire(holder(since), wish.deadline).map_err(|refused| match refused {
            Refused::Closed => Told::Closed,
            Refused::Hopeless(_) => Told::Hopeless,
            Refused::TimedOut { .. } => Told::TimedOut,
        })?;
        permit.refill();
        if permit.item.is_none() {
            permit = self.connect(permit, &wish)?;
        }
        Ok(Lease { permit: Some(permit), pool: Arc::clone(self) })
    }

    fn connect(self: &Arc<Self>, mut permit: Permit<Stored>, wish: &Wish) -> Result<Permit<Stored>, Told> {
        let _seeking = Seeking::begin(&self.control);
        self.budget.enter(self.number, self.myself.clone() as Weak<dyn Resident>);
        loop {
            if self.control.is_closed() {
                return Err(Told::Closed);
            }
            permit.refill();
            if permit.item.is_some() {
                return Ok(permit);
            }
            permit.seek(true);
            let Some(share) = self.share(&mut permit, wish)? else { continue };
            let line = match permit.line_up(holder(wish.since)) {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(permit),
                Err(_) => return Err(Told::Closed),
            };
            permit.bequeath(line.ticket());
            let order = self.connect_on_helper(permit, Some(share));
            match line.wait(wish.deadline) {
                Ok(returned) if returned.item.is_some() => return Ok(returned),
                Ok(returned) => match order.take_failure() {
                    Some(_) => return Err(Told::Failed),
                    None => permit = returned,
                },
                Err(refused) => {
                    order.cancel();
                    return Err(if matches!(refused, Refused::Closed) { Told::Closed } else { Told::TimedOut });
                }
            }
        }
    }

    fn connect_on_helper(self: &Arc<Self>, permit: Permit<Stored>, share: Option<Share>) -> Arc<Order<Stored>> {
        permit.lend();
        let seeking = Seeking::begin(&self.control);
        let order = Arc::new(Order::new(permit, share));
        let (pool, ordered) = (Arc::clone(self), Arc::clone(&order));
        shuttle::thread::spawn(move || {
            if let Some((mut permit, share)) = ordered.begin() {
                if !pool.control.is_closed() && pool.gate.counts().1 > 0 {
                    match pool.make(share) {
                        Ok(stored) => permit.item = Some(stored),
                        Err(failure) => ordered.fail(failure),
                    }
                }
                let must_close =
                    |stored: &Stored| stored.broken || pool.control.is_closed() || pool.is_needed_elsewhere();
                if permit.item.as_ref().is_some_and(must_close) {
                    permit.item = None;
                }
                drop(permit);
            }
            drop(seeking);
            pool.serve_others();
            pool.leave_if_empty();
        });
        order
    }

    fn make(&self, share: Option<Share>) -> Result<Stored, ConnectFailure> {
        if self.failing > 0 && shuttle::rand::thread_rng().gen_range(0..self.failing) == 0 {
            return Err(ConnectFailure);
        }
        Ok(Stored::open(&self.storage, &self.server, &self.control, share))
    }

    fn share(&self, permit: &mut Permit<Stored>, wish: &Wish) -> Result<Option<Share>, Told> {
        if let Some(share) = self.budget.try_take() {
            return Ok(Some(share));
        }
        let claim = self.budget.claim(self.number, wish.since);
        if self.control.is_closed() {
            return Err(Told::Closed);
        }
        let line = match permit.line_up_beside(holder(wish.since), claim.bell()) {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(None),
            Err(_) => return Err(Told::Closed),
        };
        self.budget.serve();
        let served = claim.wait_if_it_can_end(std::panic::Location::caller(), wish.deadline);
        if line.leave(permit) {
            return Ok(None);
        }
        match served {
            Served::Room(share) => Ok(Some(share)),
            Served::Look => Ok(None),
            Served::Closed => Err(Told::Closed),
            Served::Hopeless(_) => Err(Told::Hopeless),
            Served::TimedOut => Err(Told::TimedOut),
        }
    }

    /// Lends nothing any more and waits until everything is closed; `false` where the time was not enough.
    pub(crate) fn dispose(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        self.control.closed.store(1, Ordering::SeqCst);
        self.gate.close();
        self.budget.close(self.number);
        while let Some(mut permit) = self.gate.try_acquire(holder(Instant::now())) {
            permit.refill();
            if permit.item.is_none() {
                break;
            }
            self.dismiss(permit);
        }
        let me = current_thread().id();
        self.gate.wait_until(deadline, |holders| holders.iter().all(|holder| holder.is_on(me)))
    }

    /// Closes the connection on another thread, and waits for that.
    fn dismiss(&self, mut permit: Permit<Stored>) {
        permit.lend();
        let helper = shuttle::thread::spawn(move || {
            permit.item = None;
            permit
        });
        let permit = helper.join().unwrap();
        permit.adopt();
        drop(permit);
        self.leave_if_empty();
    }

    fn leave_if_empty(&self) {
        if self.is_empty() {
            self.budget.leave(self.number);
        }
    }

    fn is_needed_elsewhere(&self) -> bool {
        self.budget.is_wanted() && self.budget.prefers_another(self.number, self.gate.waiting_since())
    }

    fn serve_others(&self) {
        if self.budget.is_wanted() {
            self.budget.serve();
        }
    }

    pub(crate) fn open(&self) -> usize {
        self.control.open.load(Ordering::SeqCst)
    }

    /// Nobody has anything, and nobody waits.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.gate.counts() == (0, 0) && self.control.seeking.load(Ordering::SeqCst) == 0
    }

    /// Takes every permit there is; `false` where one was lost.
    pub(crate) fn has_every_permit(&self) -> bool {
        let permits: Vec<_> = (0..self.size).map(|_| self.gate.try_acquire(holder(Instant::now()))).collect();
        permits.iter().all(Option::is_some) && self.gate.try_acquire(holder(Instant::now())).is_none()
    }
}

impl Lease {
    pub(crate) fn break_it(&mut self) {
        if let Some(stored) = self.permit.as_mut().and_then(|permit| permit.item.as_mut()) {
            stored.broken = true;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        let broken = permit.item.as_ref().expect("a connection was lent").broken;
        if broken || self.pool.control.is_closed() || self.pool.is_needed_elsewhere() {
            self.pool.dismiss(permit);
        } else {
            drop(permit);
            self.pool.serve_others();
        }
    }
}

impl Resident for Pool {
    fn idle_since(&self) -> Option<Instant> {
        self.gate.idle_since()
    }

    fn give_up(self: Arc<Self>) -> bool {
        let Some(mut permit) = self.gate.try_acquire(holder(Instant::now())) else { return false };
        permit.refill();
        let found = permit.item.is_some();
        if found {
            permit.lend();
            shuttle::thread::spawn(move || {
                permit.item = None;
                drop(permit);
                self.leave_if_empty();
            });
        }
        found
    }

    fn ask(&self, _: &str, _: Duration) -> Option<Vec<String>> {
        None
    }

    fn holders(&self) -> Holders {
        self.gate.holders()
    }

    fn open(&self) -> usize {
        Pool::open(self)
    }

    fn sessions(&self) -> Vec<(u64, Option<Holder>)> {
        self.gate.labels()
    }

    fn holding(&self) -> Option<(usize, Holders)> {
        let (grants, holders) = self.gate.grants();
        let open = self.open();
        let moving = self.idle_since().is_some() || self.gate.grants().0 != grants;
        let has_one = |holder: &Holder| !holder.seeking || holder.lent;
        (!moving).then(|| (open, Holders(holders.0.into_iter().filter(has_one).collect())))
    }

    fn is_empty(&self) -> bool {
        self.control.seeking.load(Ordering::SeqCst) == 0 && self.open() == 0
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.budget.leave(self.number);
    }
}
