//! How many connections several pools have together, and which of them gives one up for another.
//!
//! There is one budget per database server, whose limit only the server knows, and one per `Database` that has a limit of its
//! own. An open connection holds a [`Share`] of each until it is closed. Who needs room makes a claim; claims are served in the
//! order in which their callers began to wait. What is in use is never taken: an idle connection goes, of the pool that was
//! used least recently.
//!
//! Invariant: no wake-up is lost. A claim is in the queue before its caller looks for something idle, and a connection that
//! comes back is idle before its holder looks for claims.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::gate::Bell;
use super::ledger::{Holder, Holders};
use super::sync::{AtomicUsize, Condvar, Instant, Mutex, Ordering, ThreadId, Timer, current_thread, sleep};
use super::waits::{Awaited, Waits};
use crate::error::Place;

/// A pool, as those see it that share a budget with it.
pub(super) trait Resident: Send + Sync {
    /// When the connection was lent that it would give up; `None` where it has none idle.
    fn idle_since(&self) -> Option<Instant>;

    /// Has an idle connection closed; `false` where there is none any more.
    fn give_up(self: Arc<Self>) -> bool;

    /// The column `value` that an idle connection answers; `None` where there is none, or no answer within `patience`.
    fn ask(&self, question: &str, patience: Duration) -> Option<Vec<String>>;

    /// Who has its connections.
    fn holders(&self) -> Holders;

    /// How many connections it has open.
    fn open(&self) -> usize;

    /// The same, and who holds them; `None` where one is idle or on its way.
    fn holding(&self) -> Option<(usize, Holders)>;

    /// The server's numbers of its connections, with who has them.
    fn sessions(&self) -> Vec<(u64, Option<Holder>)>;

    /// Whether nothing is open or will soon be.
    fn is_empty(&self) -> bool;
}

/// Where a pool is kept: it lets go of one that has become empty, and makes another when it is needed again. Ten thousand
/// applications used once are then no heavier than ten thousand that were never used.
pub(crate) trait Home: Send + Sync {
    /// Lets go of the pool of that number, if it is empty and nobody uses it.
    fn let_go(&self, pool: u64);

    /// What this thread has from pools that were disposed of.
    fn lent_to_this_thread(&self) -> Holders {
        Holders::default()
    }
}

/// The connections that several pools have together.
pub(crate) struct Budget {
    /// `None`: somebody else sets the limit.
    limit: Option<usize>,
    state: Mutex<State>,
    /// As many as there are claims.
    waiting: AtomicUsize,
    waits: Arc<Waits>,
}

#[derive(Default)]
struct State {
    taken: usize,
    /// Who began to wait first comes first.
    claims: VecDeque<Arc<Waiter>>,
    /// The pools with something open, by their numbers.
    residents: BTreeMap<u64, Weak<dyn Resident>>,
}

struct Waiter {
    pool: u64,
    thread: ThreadId,
    since: Instant,
    answer: Mutex<Answer>,
    wake: Condvar,
}

enum Answer {
    Waiting,
    Share(Share),
    Look,
    Closed,
    Taken,
}

/// A place in the queue; left by drop.
pub(super) struct Claim {
    budget: Arc<Budget>,
    waiter: Arc<Waiter>,
}

/// What became of a claim.
pub(super) enum Served {
    /// Room for one connection.
    Room(Share),
    /// Something has changed: look again.
    Look,
    Closed,
    /// All is held by threads that wait themselves, and none of those waits can end.
    Hopeless(Holders),
    TimedOut,
}

/// One open connection, or one that is being made.
pub(super) struct Share {
    /// Only drop takes it.
    budget: Option<Arc<Budget>>,
    /// The connection was open: who is to give the share back a little later.
    after: Option<Arc<Timer>>,
}

/// How long a server still has a session whose client has closed its connection. Until then its share of a limited budget is
/// not free, so that the server, too, never has more sessions than the limit says.
const LINGERING: Duration = Duration::from_millis(3);

impl Share {
    fn of(budget: &Arc<Budget>) -> Self {
        Self { budget: Some(Arc::clone(budget)), after: None }
    }

    /// From here on there is a session for it.
    pub(super) fn opened(&mut self, timer: &Arc<Timer>) {
        self.after = Some(Arc::clone(timer));
    }
}

impl std::fmt::Debug for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Budget").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Budget {
    pub(super) fn new(limit: Option<usize>, waits: Arc<Waits>) -> Self {
        Self { limit, state: Mutex::default(), waiting: AtomicUsize::new(0), waits }
    }

    pub(super) fn limit(&self) -> Option<usize> {
        self.limit
    }

    /// Open connections and those being made.
    pub(super) fn taken(&self) -> usize {
        self.state.lock().taken
    }

    /// A share, where that keeps nobody waiting.
    pub(super) fn try_take(self: &Arc<Self>) -> Option<Share> {
        let mut state = self.state.lock();
        let free = self.limit.is_none_or(|limit| state.taken < limit && state.claims.is_empty());
        free.then(|| {
            state.taken += 1;
            Share::of(self)
        })
    }

    /// A place in the queue for `pool`, as of `since`.
    pub(super) fn claim(self: &Arc<Self>, pool: u64, since: Instant) -> Claim {
        let thread = current_thread().id();
        let waiter =
            Arc::new(Waiter { pool, thread, since, answer: Mutex::new(Answer::Waiting), wake: Condvar::new() });
        let mut state = self.state.lock();
        let place = state.claims.partition_point(|other| other.since <= since);
        state.claims.insert(place, Arc::clone(&waiter));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // Something may have become free since the caller looked.
        if self.limit.is_some() {
            self.grant(&mut state);
        }
        drop(state);
        Claim { budget: Arc::clone(self), waiter }
    }

    /// Whether somebody waits.
    #[inline]
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Whether another pool's claim is older than `since`, that of whoever would get a connection of `pool` next.
    pub(super) fn prefers_another(&self, pool: u64, since: Option<Instant>) -> bool {
        let state = self.state.lock();
        state.claims.front().is_some_and(|first| first.pool != pool && since.is_none_or(|since| first.since < since))
    }

    /// Gives what is idle to the first claim: by telling its pool, or by closing another pool's.
    pub(super) fn serve(&self) {
        loop {
            let Some((pool, resident)) = self.first_and_idle() else { return };
            match resident {
                None => return,
                Some((number, _)) if number == pool => {
                    self.tell(pool);
                    return;
                }
                Some((_, resident)) => {
                    if resident.give_up() {
                        return;
                    }
                }
            }
        }
    }

    /// The least recently used pool with something idle, other than `except`.
    pub(super) fn least_recently_used(&self, except: u64) -> Option<Arc<dyn Resident>> {
        self.idle_ones()
            .into_iter()
            .filter(|(number, ..)| *number != except)
            .min_by_key(|(_, _, since)| *since)
            .map(|(_, resident, _)| resident)
    }

    /// Open connections of all its pools.
    pub(super) fn open(&self) -> usize {
        self.residents().iter().map(|(_, resident)| resident.open()).sum()
    }

    /// The pools with something open.
    pub(super) fn residents(&self) -> Vec<(u64, Arc<dyn Resident>)> {
        let state = self.state.lock();
        state.residents.iter().filter_map(|(number, resident)| Some((*number, resident.upgrade()?))).collect()
    }

    pub(super) fn enter(&self, number: u64, resident: Weak<dyn Resident>) {
        self.state.lock().residents.insert(number, resident);
    }

    /// Forgets a pool that has nothing open any more. It comes back before it opens anything: that it is empty is asked under
    /// the lock that [`enter`](Self::enter) takes.
    pub(super) fn leave(&self, number: u64) {
        let mut state = self.state.lock();
        let resident = state.residents.get(&number).map(Weak::upgrade);
        if resident.is_some_and(|resident| resident.is_none_or(|resident| resident.is_empty())) {
            state.residents.remove(&number);
        }
    }

    /// Who has the connections of all its pools.
    pub(super) fn holders(&self) -> Holders {
        let each = self.residents().into_iter().flat_map(|(_, resident)| resident.holders().0);
        let mut holders: Vec<_> = each.filter(|holder| !holder.seeking).collect();
        holders.sort_by_key(|holder| holder.since);
        Holders(holders)
    }

    /// Sends the claims of a pool away.
    pub(super) fn close(&self, pool: u64) {
        let mut state = self.state.lock();
        self.answer_all(&mut state, |waiter| waiter.pool == pool, || Answer::Closed);
    }

    /// The pool of the first claim, with the one that has something idle: that pool itself, or the least recently used.
    #[allow(clippy::type_complexity)]
    fn first_and_idle(&self) -> Option<(u64, Option<(u64, Arc<dyn Resident>)>)> {
        let pool = self.state.lock().claims.front()?.pool;
        let idle = self.idle_ones();
        let chosen = idle
            .iter()
            .find(|(number, ..)| *number == pool)
            .or_else(|| idle.iter().min_by_key(|(_, _, since)| *since))
            .map(|(number, resident, _)| (*number, Arc::clone(resident)));
        Some((pool, chosen))
    }

    /// Asked without the lock: what they answer takes locks of their own.
    fn idle_ones(&self) -> Vec<(u64, Arc<dyn Resident>, Instant)> {
        let residents = self.residents();
        residents
            .into_iter()
            .filter_map(|(number, resident)| {
                let since = resident.idle_since()?;
                Some((number, resident, since))
            })
            .collect()
    }

    /// Tells the first claim of that pool to look again.
    fn tell(&self, pool: u64) {
        let mut state = self.state.lock();
        if let Some(place) = state.claims.iter().position(|waiter| waiter.pool == pool) {
            self.answer(&mut state, place, Answer::Look);
        }
    }

    /// A connection was closed, or not made.
    fn freed(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.taken -= 1;
        self.grant(&mut state);
    }

    /// Gives what is free to those who wait.
    fn grant(self: &Arc<Self>, state: &mut State) {
        match self.limit {
            Some(limit) => {
                while state.taken < limit && !state.claims.is_empty() {
                    state.taken += 1;
                    self.answer(state, 0, Answer::Share(Share::of(self)));
                }
            }
            // The server may have room now; only it knows.
            None => {
                if !state.claims.is_empty() {
                    self.answer(state, 0, Answer::Look);
                }
            }
        }
    }

    fn answer(&self, state: &mut State, place: usize, answer: Answer) {
        if let Some(waiter) = state.claims.remove(place) {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            *waiter.answer.lock() = answer;
            waiter.wake.notify_one();
        }
    }

    fn answer_all(&self, state: &mut State, which: impl Fn(&Waiter) -> bool, answer: impl Fn() -> Answer) {
        while let Some(place) = state.claims.iter().position(|waiter| which(waiter)) {
            self.answer(state, place, answer());
        }
    }
}

impl Awaited for Budget {
    fn is_awaited_by(&self, thread: ThreadId) -> bool {
        self.state.lock().claims.iter().any(|waiter| waiter.thread == thread)
    }

    /// A share that is not that of an open connection is on its way, to a new one or back.
    fn holding_threads(&self) -> Option<Vec<ThreadId>> {
        let taken = self.taken();
        if self.limit.is_none_or(|limit| taken < limit) {
            return None;
        }
        let (mut open, mut threads) = (0, Vec::new());
        for (_, resident) in self.residents() {
            let (connections, holders) = resident.holding()?;
            open += connections;
            for holder in &*holders {
                threads.push(holder.on_thread()?);
            }
        }
        (taken <= open).then_some(threads)
    }
}

impl Claim {
    /// Has it look again, whatever its place in the queue.
    pub(super) fn bell(&self) -> Bell {
        let (budget, waiter) = (Arc::clone(&self.budget), Arc::clone(&self.waiter));
        Bell(Box::new(move || {
            let mut state = budget.state.lock();
            if let Some(place) = state.claims.iter().position(|other| Arc::ptr_eq(other, &waiter)) {
                budget.answer(&mut state, place, Answer::Look);
            }
        }))
    }

    /// [`wait`](Self::wait), unless that can never be served.
    pub(super) fn wait_if_it_can_end(self, place: Place, deadline: Instant) -> Served {
        let what: Arc<Budget> = Arc::clone(&self.budget);
        let waits = Arc::clone(&what.waits);
        match waits.begin(self.waiter.thread, Arc::clone(&what) as Arc<dyn Awaited>, place) {
            Ok(_waiting) => self.wait(deadline),
            Err(hopeless) if self.withdraw() => Served::Hopeless(hopeless.explain(what.holders())),
            Err(_) => self.wait(deadline),
        }
    }

    /// What becomes of it until `deadline`. Afterwards it has left the queue.
    pub(super) fn wait(self, deadline: Instant) -> Served {
        let mut answer = self.waiter.answer.lock();
        loop {
            match std::mem::replace(&mut *answer, Answer::Taken) {
                Answer::Waiting => *answer = Answer::Waiting,
                Answer::Share(share) => return Served::Room(share),
                Answer::Look | Answer::Taken => return Served::Look,
                Answer::Closed => return Served::Closed,
            }
            if Instant::now() < deadline {
                self.waiter.wake.wait_until(&mut answer, deadline);
                continue;
            }
            drop(answer);
            if self.withdraw() {
                return Served::TimedOut;
            }
            answer = self.waiter.answer.lock();
        }
    }

    /// Leaves the queue; `false` where it has been answered.
    fn withdraw(&self) -> bool {
        let mut state = self.budget.state.lock();
        let place = state.claims.iter().position(|waiter| Arc::ptr_eq(waiter, &self.waiter));
        if let Some(place) = place {
            state.claims.remove(place);
            self.budget.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        place.is_some()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some(budget) = self.budget.take() else { return };
        match &self.after {
            Some(timer) if budget.limit.is_some() => {
                let lingering = Lingering { budget, until: Instant::now() + LINGERING };
                timer.execute_after(LINGERING, move || drop(lingering));
            }
            _ => budget.freed(),
        }
    }
}

/// A share whose connection was closed a moment ago. Threads that end discard what is scheduled, so it is drop that gives it back.
struct Lingering {
    budget: Arc<Budget>,
    until: Instant,
}

impl Drop for Lingering {
    fn drop(&mut self) {
        sleep(self.until.saturating_duration_since(Instant::now()));
        self.budget.freed();
    }
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Share")
    }
}
