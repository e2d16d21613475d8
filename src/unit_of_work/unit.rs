//! The unit of work of one session: its identity maps and the state of its flushes.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::any_identity_map::AnyIdentityMap;
use super::changes::{ChangeKind, Changes};
use super::entity::Persist;
use super::executor::Executor;
use super::flush;
use super::identity_map::IdentityMap;
use super::unit_state::UnitState;
use crate::error::{Result, SourceLocation, Verdict};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct Unit<C> {
    pub(crate) state: Rc<UnitState>,
    /// The identity map of each entity, in the order of first use.
    maps: RefCell<Vec<(TypeId, Rc<dyn AnyIdentityMap>)>>,
    session: Weak<dyn Executor<C>>,
    /// Whether the database is MySQL or MariaDB.
    is_mysql: bool,
    is_flushing: Cell<bool>,
    /// The number of `no_autoflush` closures that are running.
    autoflush_disabled: Cell<u32>,
    /// The changes of the transaction that has just ended, while the hooks after its end run.
    ended_changes: RefCell<Option<Changes>>,
    /// How often unflushed changes were lost, by a rollback, by [`clear`](Self::clear) or by
    /// [`forget_writes`](Self::forget_writes).
    lost_changes: Cell<u64>,
}

impl<C: 'static> std::fmt::Debug for Unit<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unit").field("unflushed", &self.unflushed_since()).finish_non_exhaustive()
    }
}

/// Runs the closure when it is dropped.
struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl<C: 'static> Unit<C> {
    pub(crate) fn new(session: Weak<dyn Executor<C>>, is_mysql: bool) -> Self {
        Self {
            session,
            is_mysql,
            state: Rc::new(UnitState::new()),
            maps: RefCell::default(),
            is_flushing: Cell::new(false),
            autoflush_disabled: Cell::new(0),
            ended_changes: RefCell::new(None),
            lost_changes: Cell::new(0),
        }
    }

    /// The identity map of `T`.
    #[inline]
    pub(crate) fn map<T: Persist<C>>(&self) -> Rc<IdentityMap<C, T>> {
        let entity = TypeId::of::<T>();
        let known = self.maps.borrow().iter().find(|(other, _)| *other == entity).map(|(_, map)| Rc::clone(map));
        if let Some(Ok(map)) = known.map(|map| (map as Rc<dyn Any>).downcast()) {
            return map;
        }
        let map = Rc::new(IdentityMap::new(&self.state, &self.session, self.is_mysql));
        self.maps.borrow_mut().push((entity, Rc::clone(&map) as _));
        map
    }

    /// All identity maps. They are not borrowed, because their operations may run code of the program.
    fn maps(&self) -> Vec<Rc<dyn AnyIdentityMap>> {
        self.maps.borrow().iter().map(|(_, map)| Rc::clone(map)).collect()
    }

    /// Reads rows again for which a query may have returned older values than the tracked ones.
    pub(crate) fn read_doubtful(&self, at: SourceLocation) -> Result<()> {
        self.maps().iter().try_for_each(|map| map.read_doubtful(at))
    }

    /// The source location of the first change that is not flushed.
    pub(crate) fn unflushed_since(&self) -> Option<SourceLocation> {
        self.state.unflushed.get()
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
        OnDrop(|| self.is_flushing.set(false))
    }

    /// Disables autoflush until the returned guard is dropped.
    pub(crate) fn disable_autoflush(&self) -> impl Drop + '_ {
        self.autoflush_disabled.update(|count| count + 1);
        OnDrop(|| self.autoflush_disabled.update(|count| count - 1))
    }

    pub(crate) fn is_dirty(&self) -> bool {
        let is_dirty = |map: &Rc<dyn AnyIdentityMap>| {
            map.pending_count() > 0 || map.has_scheduled_deletes() || map.has_changed_rows()
        };
        self.unflushed_since().is_some() && self.maps().iter().any(is_dirty)
    }

    pub(crate) fn lost_changes(&self) -> u64 {
        self.lost_changes.get()
    }

    fn count_loss(&self, is_lost: bool) {
        self.lost_changes.set(self.lost_changes.get() + u64::from(is_lost));
    }

    /// Unmarks the dirty rows, none of which has changed.
    pub(crate) fn forget_unchanged_writes(&self) {
        self.maps().iter().for_each(|map| map.revert_writes());
        self.state.unflushed.set(None);
    }

    /// The changes that a flush would send.
    pub(crate) fn unflushed(&self, kinds: &[ChangeKind]) -> Changes {
        let mut all = Vec::new();
        let maps = self.maps();
        kinds.iter().for_each(|kind| maps.iter().for_each(|map| map.collect_unflushed(*kind, &mut all)));
        Changes::in_order(all)
    }

    /// The flushed changes of this transaction. In a hook after the end of a transaction, these are the changes of the
    /// ended transaction until another one flushes a change.
    pub(crate) fn flushed(&self) -> Changes {
        let changes = self.flushed_now();
        if changes.is_empty() { self.ended_changes.borrow().clone().unwrap_or_default() } else { changes }
    }

    /// Keeps the changes of a transaction that has ended, until the returned guard is dropped. The guard restores what
    /// was kept before: a hook may have ended another transaction.
    pub(crate) fn keep_ended_changes(&self, changes: Changes) -> impl Drop + '_ {
        let mut before = self.ended_changes.replace(Some(changes));
        OnDrop(move || drop_catching_panic(self.ended_changes.replace(before.take())))
    }

    /// The flushed changes of this transaction.
    pub(crate) fn flushed_now(&self) -> Changes {
        let mut changes = Vec::new();
        self.maps().iter().for_each(|map| map.collect_flushed(&mut changes));
        Changes::in_order(changes)
    }

    /// Fails if a write guard of a row is alive.
    pub(crate) fn check_writers(&self, at: SourceLocation) -> Result<()> {
        self.maps().iter().try_for_each(|map| map.check_writers(at))
    }

    /// Fails if a change cannot be flushed. Sends no statement.
    pub(crate) fn check(&self, at: SourceLocation) -> Result<()> {
        self.maps().iter().try_for_each(|map| map.check(at))
    }

    pub(crate) fn send(&self, at: SourceLocation) -> Result<()> {
        let maps = self.maps();
        maps.iter().try_for_each(|map| map.verify(at))?;
        // A change that code of the program makes during the flush waits for the next flush.
        let since = self.state.unflushed.take();
        let unfinished = OnDrop(|| self.state.unflushed.set(since.or(self.unflushed_since())));
        flush::send(&maps, !self.is_mysql, at)?;
        std::mem::forget(unfinished);
        Ok(())
    }

    /// Expires all rows and takes back the writes that are not flushed.
    pub(crate) fn forget_writes(&self) {
        let mut is_lost = false;
        for map in self.maps() {
            is_lost |= map.has_dirty_rows() && map.has_changed_rows();
            map.revert_writes();
        }
        self.count_loss(is_lost);
        self.state.expire();
        if !self.is_dirty() {
            self.state.unflushed.set(None);
        }
    }

    pub(crate) fn release_savepoint(&self) {
        let level = self.state.level.get();
        self.maps().iter().for_each(|map| map.release_level(level));
        self.state.level.set(level.saturating_sub(1));
    }

    pub(crate) fn roll_back_savepoint(&self) {
        let level = self.state.level.get();
        self.state.unflushed.set(None);
        self.state.note_rollback();
        self.maps().iter().for_each(|map| map.roll_back_to(level));
        self.state.level.set(level.saturating_sub(1));
        self.state.expire();
    }

    /// Ends the transaction after a commit.
    pub(crate) fn committed(&self) {
        self.maps().iter().for_each(|map| map.committed());
        self.state.end_transaction();
    }

    /// Ends the transaction after a rollback. Without a transaction, only takes back the changes that are not flushed.
    pub(crate) fn rolled_back(&self) {
        self.count_loss(self.is_dirty_or_panics());
        // This precedes the drop of rows, because rows that a `Drop` of the program adds are not rolled back.
        self.state.unflushed.set(None);
        self.state.note_rollback();
        self.maps().iter().for_each(|map| map.roll_back_to(0));
        self.state.end_transaction();
    }

    /// Ends the transaction after a commit whose answer was lost. The rows that it changed are undecided until
    /// `verdict` is known.
    pub(crate) fn undecided(&self, verdict: &Arc<Verdict>) {
        self.state.unflushed.set(None);
        self.state.note_rollback();
        self.maps().iter().for_each(|map| map.mark_undecided(verdict));
        self.state.end_transaction();
    }

    /// The comparison of rows is code of the program. If it panics, the rows count as different.
    fn is_dirty_or_panics(&self) -> bool {
        catch_panic("a comparison of rows", || self.is_dirty()).unwrap_or(true)
    }

    /// Removes all rows. Their handles are detached, as after the end of the session.
    pub(crate) fn clear(&self) {
        self.count_loss(self.is_dirty_or_panics());
        self.state.unflushed.set(None);
        let maps = self.maps.take();
        maps.iter().for_each(|(_, map)| map.detach());
        drop_catching_panic(self.ended_changes.take());
        // A dirty row and its `EntityState` own each other, so the maps are cleared before the drop.
        maps.iter().for_each(|(_, map)| map.clear());
        drop_each_catching_panics(maps);
    }
}
