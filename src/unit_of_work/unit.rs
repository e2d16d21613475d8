//! The unit of work of one session: its identity maps and the state of its flushes.

use std::any::TypeId;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::any_identity_map::AnyIdentityMap;
use super::changes::{Change, ChangeKind, Changes};
use super::entity::{Insert, Persist};
use super::entity_state::EntityState;
use super::executor::{Executor, SessionReader};
use super::flush::{self, TypedMap};
use super::identity_map::IdentityMap;
use super::tracked::Tracked;
use super::tracked_row::{Newest, TrackedRow};
use super::unit_state::UnitState;
use crate::error::Verdict;
use crate::error::{Place, Result};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct Unit<C> {
    unit_state: RefCell<Rc<UnitState>>,
    /// The identity map of each entity, in the order of first use.
    maps: RefCell<Vec<TypedMap<C>>>,
    is_flushing: Cell<bool>,
    /// The number of `no_autoflush` closures that are running.
    autoflush_disabled: Cell<u32>,
    /// The changes of the last transaction, for the hooks that run after its end.
    last_changes: RefCell<Option<Changes>>,
    session: Weak<dyn SessionReader<C>>,
    /// How often unflushed changes were lost.
    lost_changes: Cell<u64>,
}

impl<C: 'static> std::fmt::Debug for Unit<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unit").field("unflushed", &self.unflushed_since()).finish_non_exhaustive()
    }
}

impl<C> Unit<C> {
    pub(crate) fn new(session: Weak<dyn SessionReader<C>>) -> Self {
        Self {
            session,
            unit_state: RefCell::default(),
            maps: RefCell::default(),
            is_flushing: Cell::new(false),
            autoflush_disabled: Cell::new(0),
            last_changes: RefCell::new(None),
            lost_changes: Cell::new(0),
        }
    }
}

impl<C: 'static> Unit<C> {
    /// Runs `f` with the identity map of `T`. No `RefCell` is borrowed meanwhile, because `f` may run code of the
    /// program.
    #[inline]
    fn with<T: Persist<C>, R>(&self, f: impl FnOnce(&IdentityMap<C, T>) -> R) -> R {
        let entity = TypeId::of::<T>();
        let found = self.maps.borrow().iter().find(|(other, _)| *other == entity).map(|(_, map)| Rc::clone(map));
        match found {
            Some(map) => f(map.as_any().downcast_ref().expect("the map is stored under the type of its entity")),
            None => {
                let map = Rc::new(IdentityMap::<C, T>::new(&self.unit_state.borrow(), &self.session));
                self.maps.borrow_mut().push((entity, Rc::clone(&map) as _));
                f(&map)
            }
        }
    }

    fn each(&self, mut f: impl FnMut(&dyn AnyIdentityMap<C>)) {
        let maps = self.maps.borrow().clone();
        maps.iter().for_each(|(_, map)| f(&**map));
    }

    pub(crate) fn add<N: Insert<C>>(&self, new: N, at: Place) -> Tracked<N::Entity> {
        Tracked(self.with(|map: &IdentityMap<C, N::Entity>| map.add(new, at)))
    }

    #[inline]
    pub(crate) fn fresh<T: Persist<C>>(&self, id: &T::Id) -> Option<Tracked<T>> {
        self.with(|map: &IdentityMap<C, T>| map.fresh(id)).map(Tracked)
    }

    pub(crate) fn fetch<T: Persist<C>>(&self, id: &T::Id, executor: &dyn Executor<C>) -> Result<Option<Tracked<T>>> {
        Ok(self.with(|map: &IdentityMap<C, T>| map.fetch(id, executor))?.map(Tracked))
    }

    pub(crate) fn get_many<T: Persist<C>>(
        &self,
        ids: &[T::Id],
        executor: &dyn Executor<C>,
    ) -> Result<Vec<Option<Tracked<T>>>> {
        let found = self.with(|map: &IdentityMap<C, T>| map.get_many(ids, executor))?;
        Ok(found.into_iter().map(|found| found.map(Tracked)).collect())
    }

    #[inline]
    pub(crate) fn merge<T: Persist<C>>(&self, row: T, newest: Newest) -> Tracked<T> {
        Tracked(self.with(|map: &IdentityMap<C, T>| map.merge(row, newest)))
    }

    /// Sets whether each read is a transaction of its own, so that a value is valid for its statement only.
    #[inline]
    pub(crate) fn set_autocommit_reads(&self, autocommit_reads: bool) {
        self.unit_state.borrow().set_autocommit_reads(autocommit_reads);
    }

    /// Sets whether reads happen before the transaction that the first write will begin.
    #[inline]
    pub(crate) fn set_reads_before_transaction(&self, reads_before_transaction: bool) {
        self.unit_state.borrow().set_reads_before_transaction(reads_before_transaction);
    }

    /// Notes that the transaction sends a statement that may change rows.
    #[inline]
    pub(crate) fn note_changing(&self) {
        self.unit_state.borrow().note_changing();
    }

    /// Begins an attempt of `retry`, in a new transaction.
    pub(crate) fn begin_attempt(&self) {
        self.unit_state.borrow().begin_attempt();
    }

    /// Reads rows again for which a query may have returned older values than the tracked ones.
    pub(crate) fn read_doubtful(&self, executor: &dyn Executor<C>) -> Result<()> {
        let maps = self.maps.borrow().clone();
        maps.iter().try_for_each(|(_, map)| map.read_doubtful(executor))
    }

    pub(crate) fn refresh<T: Persist<C>>(&self, handle: &Tracked<T>, executor: &dyn Executor<C>) -> Result<()> {
        self.with(|map: &IdentityMap<C, T>| map.refresh(&handle.0, executor))
    }

    pub(crate) fn delete<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|map: &IdentityMap<C, T>| map.schedule_delete(&handle.0, at))
    }

    pub(crate) fn expire<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|map: &IdentityMap<C, T>| map.expire_one(&handle.0, at))
    }

    pub(crate) fn expunge<T: Persist<C>>(&self, handle: &Tracked<T>, at: Place) -> Result<()> {
        self.with(|map: &IdentityMap<C, T>| map.expunge(&handle.0, at))
    }

    /// The source location of the first change that is not flushed.
    pub(crate) fn unflushed_since(&self) -> Option<Place> {
        self.unit_state.borrow().unflushed()
    }

    pub(crate) fn autoflushes(&self) -> bool {
        self.unflushed_since().is_some() && !self.is_flushing.get() && self.autoflush_disabled.get() == 0
    }

    pub(crate) fn is_flushing(&self) -> bool {
        self.is_flushing.get()
    }

    /// Begins a flush, which ends when the returned guard is dropped.
    pub(crate) fn begin_flush(&self) -> impl Drop + '_ {
        self.is_flushing.set(true);
        EndFlush(&self.is_flushing)
    }

    /// Disables autoflush until the returned guard is dropped.
    pub(crate) fn disable_autoflush(&self) -> impl Drop + '_ {
        self.autoflush_disabled.set(self.autoflush_disabled.get() + 1);
        EnableAutoflush(&self.autoflush_disabled)
    }

    pub(crate) fn is_dirty(&self) -> bool {
        let maps = self.maps.borrow().clone();
        self.unflushed_since().is_some() && maps.iter().any(|(_, map)| map.is_dirty())
    }

    /// How often unflushed changes were lost by a rollback, by [`clear`](Self::clear) or by
    /// [`forget_writes`](Self::forget_writes).
    pub(crate) fn lost_changes(&self) -> u64 {
        self.lost_changes.get()
    }

    fn count_loss(&self, is_lost: bool) {
        self.lost_changes.set(self.lost_changes.get() + u64::from(is_lost));
    }

    /// Unmarks the dirty rows, none of which has changed.
    pub(crate) fn forget_unchanged_writes(&self) {
        self.each(|map| map.revert_writes());
        self.unit_state.borrow().clear_unflushed();
    }

    /// The changes that a flush would send.
    pub(crate) fn unflushed(&self, kinds: &[ChangeKind]) -> Changes {
        let mut all = Vec::new();
        let maps = self.maps.borrow().clone();
        for &kind in kinds {
            for (_, map) in maps.iter() {
                map.collect_unflushed(kind, &mut all);
            }
        }
        Changes::in_order(all)
    }

    /// The flushed changes of this transaction. After its end, they stay until the next transaction flushes a change.
    pub(crate) fn flushed(&self) -> Changes {
        let changes = self.flushed_now();
        if changes.is_empty() { self.last_changes.borrow().clone().unwrap_or_default() } else { changes }
    }

    /// The flushed changes of this transaction.
    pub(crate) fn flushed_now(&self) -> Changes {
        let mut changes: Vec<Change> = Vec::new();
        self.each(|map| map.collect_flushed(&mut changes));
        Changes::in_order(changes)
    }

    /// Fails if a write guard of a row is alive.
    pub(crate) fn check_writers(&self, at: Place) -> Result<()> {
        let maps = self.maps.borrow().clone();
        maps.iter().try_for_each(|(_, map)| map.check_writers(at))
    }

    pub(crate) fn check(&self, at: Place) -> Result<()> {
        let maps = self.maps.borrow().clone();
        flush::check(&maps, at)
    }

    pub(crate) fn send(&self, executor: &dyn Executor<C>) -> Result<()> {
        drop_catching_panic(self.last_changes.take());
        let maps = self.maps.borrow().clone();
        maps.iter().try_for_each(|(_, map)| map.verify(executor))?;
        // A change that code of the program makes during the flush waits for the next flush.
        let in_progress = FlushInProgress::begin(&self.unit_state.borrow());
        flush::send(&maps, executor)?;
        in_progress.complete();
        Ok(())
    }

    /// Expires all rows.
    pub(crate) fn expire_all(&self) {
        self.unit_state.borrow().expire();
    }

    /// Expires all rows and takes back the writes that are not flushed.
    pub(crate) fn forget_writes(&self) {
        let mut is_lost = false;
        self.each(|map| {
            is_lost |= map.has_dirty_rows() && map.has_changed_rows();
            map.revert_writes();
        });
        self.count_loss(is_lost);
        self.expire_all();
        if !self.is_dirty() {
            self.unit_state.borrow().clear_unflushed();
        }
    }

    /// Sets the number of open savepoints.
    pub(crate) fn set_level(&self, level: u32) {
        self.unit_state.borrow().set_level(level);
    }

    pub(crate) fn open_savepoint(&self) {
        let unit_state = self.unit_state.borrow();
        unit_state.set_level(unit_state.level() + 1);
    }

    pub(crate) fn release_savepoint(&self) {
        let unit_state = Rc::clone(&self.unit_state.borrow());
        let level = unit_state.level();
        self.each(|map| map.release_level(level));
        unit_state.set_level(level.saturating_sub(1));
    }

    pub(crate) fn roll_back_savepoint(&self) {
        let unit_state = Rc::clone(&self.unit_state.borrow());
        let level = unit_state.level();
        unit_state.clear_unflushed();
        unit_state.note_rollback();
        self.each(|map| map.roll_back_to(level));
        unit_state.set_level(level.saturating_sub(1));
        unit_state.expire();
    }

    /// Ends the transaction after a commit. `keep_changes`: a hook may ask for its changes.
    pub(crate) fn committed(&self, keep_changes: bool) {
        if keep_changes {
            drop_catching_panic(self.last_changes.replace(Some(self.flushed_now())));
        }
        self.each(|map| map.committed());
        self.unit_state.borrow().end_transaction();
    }

    /// Ends the transaction after a rollback. Without a transaction, only takes back the changes that are not flushed.
    pub(crate) fn rolled_back(&self, keep_changes: bool) {
        if keep_changes {
            drop_catching_panic(self.last_changes.replace(Some(self.flushed_now())));
        }
        self.count_loss(self.is_dirty_or_panics());
        // This precedes the drop of rows, because rows that a `Drop` of the program adds are not rolled back.
        self.unit_state.borrow().clear_unflushed();
        self.unit_state.borrow().note_rollback();
        self.each(|map| map.roll_back_to(0));
        self.end_transaction();
    }

    /// Ends the transaction after a commit whose answer was lost. The rows that it changed are undecided until
    /// `verdict` is known.
    pub(crate) fn undecided(&self, verdict: &Arc<Verdict>) {
        self.unit_state.borrow().clear_unflushed();
        self.unit_state.borrow().note_rollback();
        self.each(|map| map.mark_undecided(verdict));
        self.end_transaction();
    }

    fn end_transaction(&self) {
        let unit_state = self.unit_state.borrow();
        unit_state.set_level(0);
        unit_state.end_transaction();
    }

    /// The comparison of rows is code of the program. If it panics, the rows count as different.
    fn is_dirty_or_panics(&self) -> bool {
        catch_panic("a comparison of rows", || self.is_dirty()).unwrap_or(true)
    }

    /// Removes all rows. Their handles are detached, as after the end of the session.
    pub(crate) fn clear(&self) {
        self.count_loss(self.is_dirty_or_panics());
        let (unit_state, maps) = (self.unit_state.take(), self.maps.take());
        self.set_level(unit_state.level());
        unit_state.end();
        drop_catching_panic(self.last_changes.take());
        // A dirty row and its `EntityState` own each other, so the maps are cleared before the drop.
        maps.iter().for_each(|(_, map)| map.clear());
        drop_each_catching_panics(maps);
    }
}

impl<C> Unit<C> {
    /// A handle to a row that will never be inserted.
    pub(crate) fn discarded<T: Persist<C>>(&self) -> Tracked<T> {
        let entity_state = Rc::new(EntityState::new(Rc::default(), None));
        Tracked(Rc::new(TrackedRow::discarded(&entity_state)))
    }
}

/// Marks the changes unflushed again, unless the flush completes.
struct FlushInProgress {
    unit_state: Rc<UnitState>,
    since: Option<Place>,
}

impl FlushInProgress {
    fn begin(unit_state: &Rc<UnitState>) -> Self {
        let since = unit_state.unflushed();
        unit_state.clear_unflushed();
        Self { unit_state: Rc::clone(unit_state), since }
    }

    fn complete(mut self) {
        self.since = None;
    }
}

impl Drop for FlushInProgress {
    fn drop(&mut self) {
        if let Some(since) = self.since {
            self.unit_state.note_unflushed(since);
        }
    }
}

struct EndFlush<'u>(&'u Cell<bool>);

impl Drop for EndFlush<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

struct EnableAutoflush<'u>(&'u Cell<u32>);

impl Drop for EnableAutoflush<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
