//! The unit of work of one session: its stores, and when they are flushed.

use std::any::TypeId;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::changes::{Change, ChangeKind, Changes};
use super::entity::{Insert, Persist};
use super::executor::{Connected, Executor};
use super::flush::{self, Kept};
use super::handle::Tracked;
use super::identity_map::{AnyIdentityMap, IdentityMap};
use super::tracked_row::{Home, Newest, TrackedRow};
use super::unit_state::UnitState;
use crate::error::Verdict;
use crate::error::{Place, Result};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct Unit<C> {
    unit_state: RefCell<Rc<UnitState>>,
    /// In the order of their first use.
    stores: RefCell<Vec<Kept<C>>>,
    flushing: Cell<bool>,
    /// Closures of `no_autoflush` that are open.
    quiet: Cell<u32>,
    /// What the last transaction sent, for the hooks of its end.
    ended: RefCell<Option<Changes>>,
    session: Weak<dyn Connected<C>>,
    /// How often unflushed changes were dropped.
    losses: Cell<u64>,
}

impl<C: 'static> std::fmt::Debug for Unit<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unit").field("unflushed", &self.unflushed_since()).finish_non_exhaustive()
    }
}

impl<C> Unit<C> {
    pub(crate) fn new(session: Weak<dyn Connected<C>>) -> Self {
        Self {
            session,
            unit_state: RefCell::default(),
            stores: RefCell::default(),
            flushing: Cell::new(false),
            quiet: Cell::new(0),
            ended: RefCell::new(None),
            losses: Cell::new(0),
        }
    }
}

impl<C: 'static> Unit<C> {
    /// Runs `f` with the store of `T`. Nothing is borrowed then, as `f` may run code of the program.
    #[inline]
    fn with<T: Persist<C>, R>(&self, f: impl FnOnce(&IdentityMap<C, T>) -> R) -> R {
        let entity = TypeId::of::<T>();
        let known = self.stores.borrow().iter().find(|(other, _)| *other == entity).map(|(_, store)| Rc::clone(store));
        match known {
            Some(store) => f(store.as_any().downcast_ref().expect("kept under its own type")),
            None => {
                let store = Rc::new(IdentityMap::<C, T>::new(&self.unit_state.borrow(), &self.session));
                self.stores.borrow_mut().push((entity, Rc::clone(&store) as _));
                f(&store)
            }
        }
    }

    fn each(&self, mut f: impl FnMut(&dyn AnyIdentityMap<C>)) {
        let stores = self.stores.borrow().clone();
        stores.iter().for_each(|(_, store)| f(&**store));
    }

    pub(crate) fn add<N: Insert<C>>(&self, new: N, at: Place) -> Tracked<N::Entity> {
        Tracked(self.with(|store: &IdentityMap<C, N::Entity>| store.add(new, at)))
    }

    #[inline]
    pub(crate) fn fresh<T: Persist<C>>(&self, id: &T::Id) -> Option<Tracked<T>> {
        self.with(|store: &IdentityMap<C, T>| store.fresh(id)).map(Tracked)
    }

    pub(crate) fn fetch<T: Persist<C>>(&self, id: &T::Id, sender: &dyn Executor<C>) -> Result<Option<Tracked<T>>> {
        Ok(self.with(|store: &IdentityMap<C, T>| store.fetch(id, sender))?.map(Tracked))
    }

    pub(crate) fn get_many<T: Persist<C>>(
        &self,
        ids: &[T::Id],
        sender: &dyn Executor<C>,
    ) -> Result<Vec<Option<Tracked<T>>>> {
        let found = self.with(|store: &IdentityMap<C, T>| store.get_many(ids, sender))?;
        Ok(found.into_iter().map(|found| found.map(Tracked)).collect())
    }

    #[inline]
    pub(crate) fn absorb<T: Persist<C>>(&self, row: T, newest: Newest) -> Tracked<T> {
        Tracked(self.with(|store: &IdentityMap<C, T>| store.absorb(row, newest)))
    }

    /// Whether what is read now is committed by itself, and so valid for no longer than its statement.
    #[inline]
    pub(crate) fn set_fleeting(&self, fleeting: bool) {
        self.unit_state.borrow().set_fleeting(fleeting);
    }

    /// Whether what is read now is read before the transaction that a write of it will begin.
    #[inline]
    pub(crate) fn set_outside(&self, outside: bool) {
        self.unit_state.borrow().set_outside(outside);
    }

    /// The transaction sends a statement that may change rows.
    #[inline]
    pub(crate) fn note_changing(&self) {
        self.unit_state.borrow().note_changing();
    }

    /// An attempt of `retry` begins, in a new transaction.
    pub(crate) fn begin_attempt(&self) {
        self.unit_state.borrow().begin_attempt();
    }

    /// Reads rows again for which a query may have found older ones than are known.
    pub(crate) fn read_doubtful(&self, sender: &dyn Executor<C>) -> Result<()> {
        let stores = self.stores.borrow().clone();
        stores.iter().try_for_each(|(_, store)| store.read_doubtful(sender))
    }

    pub(crate) fn refresh<T: Persist<C>>(&self, handle: &Tracked<T>, sender: &dyn Executor<C>) -> Result<()> {
        self.with(|store: &IdentityMap<C, T>| store.refresh(&handle.0, sender))
    }

    pub(crate) fn delete<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|store: &IdentityMap<C, T>| store.doom(&handle.0, at))
    }

    pub(crate) fn expire<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|store: &IdentityMap<C, T>| store.expire_one(&handle.0, at))
    }

    pub(crate) fn expunge<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|store: &IdentityMap<C, T>| store.expunge(&handle.0, at))
    }

    /// Where the first change was made that has not been flushed.
    pub(crate) fn unflushed_since(&self) -> Option<Place> {
        self.unit_state.borrow().unflushed()
    }

    pub(crate) fn autoflushes(&self) -> bool {
        self.unflushed_since().is_some() && !self.flushing.get() && self.quiet.get() == 0
    }

    pub(crate) fn is_flushing(&self) -> bool {
        self.flushing.get()
    }

    /// Until what is returned is dropped, this is the one flush.
    pub(crate) fn begin_flush(&self) -> impl Drop + '_ {
        self.flushing.set(true);
        Reset(&self.flushing)
    }

    /// Until what is returned is dropped, queries flush nothing.
    pub(crate) fn quiet(&self) -> impl Drop + '_ {
        self.quiet.set(self.quiet.get() + 1);
        Louder(&self.quiet)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        let stores = self.stores.borrow().clone();
        self.unflushed_since().is_some() && stores.iter().any(|(_, store)| store.is_dirty())
    }

    /// How often unflushed changes were dropped, by a rollback, by [`clear`](Self::clear) or by [`forget_writes`](Self::forget_writes).
    pub(crate) fn losses(&self) -> u64 {
        self.losses.get()
    }

    fn count_loss(&self, is_lost: bool) {
        self.losses.set(self.losses.get() + u64::from(is_lost));
    }

    /// Rows were given out for writing, and are as they were.
    pub(crate) fn nothing_differs(&self) {
        self.each(|store| store.forget_writes());
        self.unit_state.borrow().nothing_unflushed();
    }

    /// What a flush would send.
    pub(crate) fn unflushed(&self, kinds: &[ChangeKind]) -> Changes {
        let mut all = Vec::new();
        let stores = self.stores.borrow().clone();
        for &kind in kinds {
            for (_, store) in stores.iter() {
                store.unflushed(kind, &mut all);
            }
        }
        Changes::in_order(all)
    }

    /// What was sent in this transaction; after its end, until something is sent in the next, in that one.
    pub(crate) fn flushed(&self) -> Changes {
        let changes = self.flushed_now();
        if changes.is_empty() { self.ended.borrow().clone().unwrap_or_default() } else { changes }
    }

    /// What was sent in this transaction.
    pub(crate) fn flushed_now(&self) -> Changes {
        let mut changes: Vec<Change> = Vec::new();
        self.each(|store| store.flushed(&mut changes));
        Changes::in_order(changes)
    }

    /// An error where a row is being written at this moment.
    pub(crate) fn check_writers(&self, at: Place) -> Result<()> {
        let stores = self.stores.borrow().clone();
        stores.iter().try_for_each(|(_, store)| store.check_writers(at))
    }

    pub(crate) fn check(&self, at: Place) -> Result<()> {
        let stores = self.stores.borrow().clone();
        flush::check(&stores, at)
    }

    pub(crate) fn send(&self, sender: &dyn Executor<C>) -> Result<()> {
        drop_catching_panic(self.ended.take());
        let stores = self.stores.borrow().clone();
        stores.iter().try_for_each(|(_, store)| store.verify(sender))?;
        // What code of the program changes while this is sent waits for the next flush.
        let sent = Sent::begin(&self.unit_state.borrow());
        flush::send(&stores, sender)?;
        sent.all();
        Ok(())
    }

    /// What has been read may be old by now.
    pub(crate) fn expire_all(&self) {
        self.unit_state.borrow().expire();
    }

    /// The same, and what was written and not flushed is forgotten.
    pub(crate) fn forget_writes(&self) {
        let mut is_lost = false;
        self.each(|store| {
            is_lost |= store.has_updates() && store.has_writes();
            store.forget_writes();
        });
        self.count_loss(is_lost);
        self.expire_all();
        if !self.is_dirty() {
            self.unit_state.borrow().nothing_unflushed();
        }
    }

    /// How many savepoints are open.
    pub(crate) fn set_level(&self, level: u32) {
        self.unit_state.borrow().set_level(level);
    }

    pub(crate) fn open_level(&self) {
        let unit_state = self.unit_state.borrow();
        unit_state.set_level(unit_state.level() + 1);
    }

    pub(crate) fn keep_level(&self) {
        let unit_state = Rc::clone(&self.unit_state.borrow());
        let level = unit_state.level();
        self.each(|store| store.keep_level(level));
        unit_state.set_level(level.saturating_sub(1));
    }

    pub(crate) fn undo_level(&self) {
        let unit_state = Rc::clone(&self.unit_state.borrow());
        let level = unit_state.level();
        unit_state.nothing_unflushed();
        unit_state.note_rollback();
        self.each(|store| store.roll_back_to(level));
        unit_state.set_level(level.saturating_sub(1));
        unit_state.expire();
    }

    /// After a commit. `told` is whether somebody may ask what was sent.
    pub(crate) fn committed(&self, told: bool) {
        if told {
            drop_catching_panic(self.ended.replace(Some(self.flushed_now())));
        }
        self.each(|store| store.committed());
        self.unit_state.borrow().end_transaction();
    }

    /// After a rollback of the transaction, or where there was none and what is not flushed is not wanted.
    pub(crate) fn rolled_back(&self, told: bool) {
        if told {
            drop_catching_panic(self.ended.replace(Some(self.flushed_now())));
        }
        self.count_loss(self.is_dirty_whatever_panics());
        // Before rows are dropped: what a `Drop` adds is not rolled back.
        self.unit_state.borrow().nothing_unflushed();
        self.unit_state.borrow().note_rollback();
        self.each(|store| store.roll_back_to(0));
        self.begin_anew();
    }

    /// After a commit whose answer was lost: the rows that the transaction changed are undecided until `verdict` is known.
    pub(crate) fn undecided(&self, verdict: &Arc<Verdict>) {
        self.unit_state.borrow().nothing_unflushed();
        self.unit_state.borrow().note_rollback();
        self.each(|store| store.undecided(verdict));
        self.begin_anew();
    }

    fn begin_anew(&self) {
        let unit_state = self.unit_state.borrow();
        unit_state.set_level(0);
        unit_state.end_transaction();
    }

    /// A comparison of rows is code of the program; where it panics they count as different.
    fn is_dirty_whatever_panics(&self) -> bool {
        catch_panic("a comparison of rows", || self.is_dirty()).unwrap_or(true)
    }

    /// Lets go of every row; handles are of a session that is no more.
    pub(crate) fn clear(&self) {
        self.count_loss(self.is_dirty_whatever_panics());
        let (unit_state, stores) = (self.unit_state.take(), self.stores.take());
        self.set_level(unit_state.level());
        unit_state.end();
        drop_catching_panic(self.ended.take());
        // An entry and its home hold each other while it is touched.
        stores.iter().for_each(|(_, store)| store.clear());
        drop_each_catching_panics(stores);
    }
}

impl<C> Unit<C> {
    /// A handle to a row that will never be.
    pub(crate) fn discarded<T: Persist<C>>(&self) -> Tracked<T> {
        let home = Rc::new(Home::new(Rc::default(), None));
        Tracked(Rc::new(TrackedRow::discarded(&home)))
    }
}

/// What is sent is unflushed again where not all of it was sent.
struct Sent {
    unit_state: Rc<UnitState>,
    since: Option<Place>,
}

impl Sent {
    fn begin(unit_state: &Rc<UnitState>) -> Self {
        let since = unit_state.unflushed();
        unit_state.nothing_unflushed();
        Self { unit_state: Rc::clone(unit_state), since }
    }

    fn all(mut self) {
        self.since = None;
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        if let Some(since) = self.since {
            self.unit_state.note_change(since);
        }
    }
}

struct Reset<'u>(&'u Cell<bool>);

impl Drop for Reset<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

struct Louder<'u>(&'u Cell<u32>);

impl Drop for Louder<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
