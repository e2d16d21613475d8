//! The identity map of any entity, as the flush uses it.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::changes::{Change, ChangeKind};
use super::deletes::{self, Deletes};
use super::entity::Persist;
use super::executor::{Executor, StatementKind, execute};
use super::identity_map::{IdentityMap, drop_rows};
use super::key_comparison::normalized_key;
use super::relations::{Reference, Relations};
use super::tracked_row::{RowPhase, TrackedRow};
use super::updates::{self, IsPending};
use crate::error::{Error, Place, Result, Undo, Verdict};
use crate::panic::{drop_catching_panic, drop_each_catching_panics};

/// What the identity map knows of a row that other rows refer to.
pub(crate) enum ReferencedRow {
    /// A known row and its own references. `is_current`: the references cannot be outdated.
    Known {
        row: *const (),
        references: Vec<Reference>,
        is_current: bool,
    },
    Unknown,
    /// The reference is to a column other than the key.
    OtherColumn,
}

/// The identity map of any entity.
pub(crate) trait AnyIdentityMap<C> {
    fn as_any(&self) -> &dyn Any;
    /// The type name of the entity.
    fn name(&self) -> &'static str;
    /// The type of the table. All entities of one table return the same type.
    fn table(&self) -> TypeId;
    /// Expires all rows, because another identity map may have changed rows of the table.
    fn expire(&self);
    /// The foreign keys of the entity and of its ancestors.
    fn relations(&self) -> &Relations;
    /// Whether rows refer to rows of `ancestor`, directly or through other tables.
    fn refers_to(&self, ancestor: TypeId) -> bool;
    /// Notes that rows of an ancestor were deleted, so that a cascade may have deleted rows of this table.
    fn note_ancestor_deleted(&self);
    fn begin_flush(&self, at: Place) -> Result<()>;
    fn end_flush(&self);
    /// Fails if a write guard of a row is alive.
    fn check_writers(&self, at: Place) -> Result<()>;
    /// Fails if a change cannot be flushed. Sends no statement.
    fn check(&self, at: Place) -> Result<()>;
    /// The number of pending inserts.
    fn pending_count(&self) -> usize;
    /// The error for pending inserts whose foreign keys stay unknown.
    fn unresolved_keys(&self, at: Place) -> Error;
    /// Whether a flush would send a statement.
    fn is_dirty(&self) -> bool;
    /// Whether a flush would send an UPDATE.
    fn has_changed_rows(&self) -> bool;
    /// Whether rows are marked dirty. They need not have changed.
    fn has_dirty_rows(&self) -> bool;
    fn has_scheduled_deletes(&self) -> bool;
    /// Reads rows again, with a lock, for which a query may have returned older values.
    fn read_doubtful(&self, executor: &dyn Executor<C>) -> Result<()>;
    /// Compares unverified original values with the database. Fails if a row has changed.
    fn verify(&self, executor: &dyn Executor<C>) -> Result<()>;
    /// The foreign keys that the UPDATEs of this flush replace.
    fn former_references(&self, at: Place) -> Result<Vec<Reference>>;
    /// Whether a reference with this key may be to a row that waits for its INSERT.
    fn may_be_pending(&self, key: &dyn Any) -> bool;
    /// Defers the DELETE of the row with this key until the UPDATEs were sent.
    fn defer_delete(&self, key: &dyn Any) -> ReferencedRow;
    fn defer_all_deletes(&self);
    /// Ends the deferral of all DELETEs.
    fn release_deferred_deletes(&self);
    /// The indices of the rows that this flush has still to delete.
    fn remaining_deletes(&self, include_deferred: bool) -> Vec<usize>;
    /// The indices of the deletes with this key.
    fn indices_of(&self, key: &dyn Any) -> Vec<usize>;
    /// The references of a row that this flush deletes.
    fn references_of(&self, index: usize) -> Vec<Reference>;
    /// See [`deletes::send_moves`].
    fn send_moves(
        &self,
        executor: &dyn Executor<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        is_pending: &dyn Fn(&Reference) -> bool,
    ) -> Result<()>;
    /// See [`deletes::unlink`].
    fn unlink(&self, index: usize, parents: &[TypeId], executor: &dyn Executor<C>) -> Result<bool>;
    /// Whether one statement can delete this number of rows.
    fn deletes_at_once(&self, rows: usize) -> bool;
    fn lock(&self, executor: &dyn Executor<C>, is_pending: IsPending<'_>) -> Result<()>;
    /// Inserts the rows that refer to no pending row. Returns the number of inserted rows.
    fn insert_ready(&self, is_pending: IsPending<'_>, executor: &dyn Executor<C>) -> Result<usize>;
    /// Whether the row with this key waits for its INSERT.
    fn is_pending(&self, key: &dyn Any) -> bool;
    /// Removes the deletes that were sent from the scheduled deletes.
    fn remove_sent_deletes(&self);
    fn update(&self, executor: &dyn Executor<C>, is_pending: IsPending<'_>) -> Result<()>;
    fn delete(&self, indices: &[usize], together: bool, executor: &dyn Executor<C>) -> Result<()>;
    /// Adds the changes of one kind that a flush would send.
    fn collect_unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>);
    /// Adds the changes that this transaction has flushed.
    fn collect_flushed(&self, changes: &mut Vec<Change>);
    /// Takes back all changes that are not flushed.
    fn discard_unflushed(&self);
    /// Takes back the writes that are not flushed. Pending inserts and scheduled deletes stay.
    fn revert_writes(&self);
    fn release_level(&self, level: u32);
    /// Takes back the changes since the savepoint `level`, after the database has rolled them back. Level 0 is the
    /// transaction.
    fn roll_back_to(&self, level: u32);
    /// Marks the changed rows of the transaction undecided, after a commit whose answer was lost.
    fn mark_undecided(&self, verdict: &Arc<Verdict>);
    fn committed(&self);
    /// Removes all rows and all changes.
    fn clear(&self);
}

impl<C: 'static, T: Persist<C>> AnyIdentityMap<C> for IdentityMap<C, T> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn name(&self) -> &'static str {
        std::any::type_name::<T>()
    }

    fn table(&self) -> TypeId {
        T::table()
    }

    fn expire(&self) {
        self.entity_state.expire();
    }

    fn relations(&self) -> &Relations {
        self.relations()
    }

    fn refers_to(&self, ancestor: TypeId) -> bool {
        self.refers_to(ancestor)
    }

    fn note_ancestor_deleted(&self) {
        self.note_ancestor_deleted();
    }

    fn begin_flush(&self, at: Place) -> Result<()> {
        self.pending_keys.take();
        let scheduled_deletes = self.scheduled_deletes();
        let deletes =
            if scheduled_deletes.is_empty() { Deletes::default() } else { Deletes::of(&scheduled_deletes, at)? };
        drop_catching_panic(self.deletes.replace(deletes));
        Ok(())
    }

    fn end_flush(&self) {
        self.pending_keys.take();
        drop_catching_panic(self.deletes.take());
    }

    fn check_writers(&self, at: Place) -> Result<()> {
        self.entity_state.dirty_rows().iter().try_for_each(|tracked| tracked.original_and_value(at).map(drop))
    }

    fn check(&self, at: Place) -> Result<()> {
        for tracked in self.entity_state.dirty_rows() {
            let (original, value) = tracked.original_and_value(at)?;
            if original.id() != value.id() {
                let (from, to) = (format!("{:?}", original.id()), format!("{:?}", value.id()));
                return Err(Error::KeyChanged { entity: T::NAME, from, to, at });
            }
        }
        Ok(())
    }

    fn pending_count(&self) -> usize {
        self.pending_inserts.borrow().iter().map(|pending| pending.len()).sum()
    }

    fn unresolved_keys(&self, at: Place) -> Error {
        Error::UnresolvedKeys { entity: T::NAME, rows: self.pending_count(), at, undo: Undo::default() }
    }

    fn is_dirty(&self) -> bool {
        self.pending_count() > 0 || self.has_scheduled_deletes() || self.has_changed_rows()
    }

    fn has_changed_rows(&self) -> bool {
        self.entity_state.dirty_rows().iter().any(|tracked| tracked.is_unverified() || tracked.differences() != 0)
    }

    fn has_dirty_rows(&self) -> bool {
        self.entity_state.has_dirty_rows()
    }

    fn has_scheduled_deletes(&self) -> bool {
        !self.scheduled_deletes.borrow().is_empty()
    }

    fn former_references(&self, at: Place) -> Result<Vec<Reference>> {
        let mut from = Vec::new();
        for tracked in self.entity_state.dirty_rows().iter().filter(|tracked| !tracked.is_delete_scheduled()) {
            let (original, value) = tracked.original_and_value(at)?;
            if !Rc::ptr_eq(&original, &value) {
                from.extend(T::moves(&original, &value).into_iter().filter_map(|moved| moved.from));
            }
        }
        Ok(from)
    }

    fn may_be_pending(&self, key: &dyn Any) -> bool {
        if self.pending_count() == 0 {
            return false;
        }
        // A foreign key to a column other than the key may refer to any pending row.
        let Some(id) = key.downcast_ref::<T::Id>() else { return true };
        let mut keys = self.pending_keys.borrow_mut();
        let keys = keys
            .get_or_insert_with(|| self.pending_inserts.borrow().iter().flat_map(|pending| pending.keys()).collect());
        !keys.is_empty() && keys.contains(&normalized_key(id))
    }

    fn defer_delete(&self, key: &dyn Any) -> ReferencedRow {
        let Some(id) = key.downcast_ref::<T::Id>() else { return ReferencedRow::OtherColumn };
        let deletes = self.deletes.borrow();
        let indices = deletes.indices_of(key);
        if let Some(&first) = indices.first() {
            indices.iter().for_each(|&index| deletes.defer(index));
            return ReferencedRow::Known {
                row: Rc::as_ptr(&deletes.rows[first].tracked).cast(),
                references: indices.iter().flat_map(|&index| deletes.references_of(index)).collect(),
                is_current: indices.iter().all(|&index| deletes.rows[index].tracked.is_fresh()),
            };
        }
        let rows = self.rows.borrow();
        let Some(tracked) = rows.get(id).filter(|tracked| tracked.is_fresh()) else { return ReferencedRow::Unknown };
        let value = match tracked.is_marked_dirty() {
            true => tracked.original_and_value(std::panic::Location::caller()).map(|(original, _)| original).ok(),
            false => tracked.value.try_borrow().ok().and_then(|value| value.clone()),
        };
        match value {
            Some(value) => ReferencedRow::Known {
                row: Rc::as_ptr(tracked).cast(),
                references: value.references(),
                is_current: true,
            },
            None => ReferencedRow::Unknown,
        }
    }

    fn defer_all_deletes(&self) {
        let deletes = self.deletes.borrow();
        (0..deletes.rows.len()).for_each(|index| deletes.defer(index));
    }

    fn release_deferred_deletes(&self) {
        self.deletes.borrow().release_deferred();
    }

    fn remaining_deletes(&self, include_deferred: bool) -> Vec<usize> {
        self.deletes.borrow().remaining(include_deferred)
    }

    fn indices_of(&self, key: &dyn Any) -> Vec<usize> {
        self.deletes.borrow().indices_of(key)
    }

    fn references_of(&self, index: usize) -> Vec<Reference> {
        self.deletes.borrow().references_of(index)
    }

    fn send_moves(
        &self,
        executor: &dyn Executor<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        is_pending: &dyn Fn(&Reference) -> bool,
    ) -> Result<()> {
        deletes::send_moves(self, executor, breaks_circle, is_pending)
    }

    fn unlink(&self, index: usize, parents: &[TypeId], executor: &dyn Executor<C>) -> Result<bool> {
        deletes::unlink(self, index, parents, executor)
    }

    fn deletes_at_once(&self, rows: usize) -> bool {
        rows <= T::MAX_DELETE_ROWS
    }

    fn lock(&self, executor: &dyn Executor<C>, is_pending: IsPending<'_>) -> Result<()> {
        updates::lock(self, executor, is_pending)
    }

    fn read_doubtful(&self, executor: &dyn Executor<C>) -> Result<()> {
        self.read_doubtful(executor)
    }

    fn verify(&self, executor: &dyn Executor<C>) -> Result<()> {
        let dirty_rows = self.entity_state.dirty_rows();
        let is_compared = |tracked: &&Rc<TrackedRow<T>>| !tracked.is_delete_scheduled() || tracked.may_be_rolled_back();
        for tracked in dirty_rows.iter().filter(|tracked| tracked.is_unverified()).filter(is_compared) {
            if tracked.phase() == RowPhase::Persistent
                && let Some(id) = tracked.id()
            {
                let mut rows = execute(executor, StatementKind::select::<T>(), |conn| self.find_newest(conn, &id))?;
                tracked.verify(rows.pop(), executor.at())?;
            }
        }
        Ok(())
    }

    fn insert_ready(&self, is_pending: IsPending<'_>, executor: &dyn Executor<C>) -> Result<usize> {
        let pending_inserts = self.pending_inserts.borrow().clone();
        let mut inserted = 0;
        for pending in pending_inserts {
            inserted += pending.insert_ready(self, is_pending, executor)?;
            // These rows are not pending any more for the next type of new rows.
            self.pending_keys.take();
        }
        Ok(inserted)
    }

    fn is_pending(&self, key: &dyn Any) -> bool {
        key.is::<T::Id>() && self.may_be_pending(key)
    }

    fn remove_sent_deletes(&self) {
        self.remove_sent_deletes();
    }

    fn update(&self, executor: &dyn Executor<C>, is_pending: IsPending<'_>) -> Result<()> {
        updates::update(self, executor, is_pending)
    }

    fn delete(&self, indices: &[usize], together: bool, executor: &dyn Executor<C>) -> Result<()> {
        deletes::delete(self, indices, together, executor)
    }

    fn collect_unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>) {
        let mut add = |tracked: &Rc<TrackedRow<T>>| changes.push(Change::new(kind, tracked, changes.len() as u64));
        match kind {
            ChangeKind::Insert => {
                let pending_inserts = self.pending_inserts.borrow().clone();
                pending_inserts.iter().for_each(|pending| pending.tracked_rows().iter().for_each(&mut add))
            }
            ChangeKind::Update => {
                self.entity_state
                    .dirty_rows()
                    .iter()
                    .filter(|tracked| !tracked.is_delete_scheduled() && tracked.differences() != 0)
                    .for_each(&mut add);
            }
            ChangeKind::Delete => self.scheduled_deletes().iter().for_each(&mut add),
        }
    }

    fn collect_flushed(&self, changes: &mut Vec<Change>) {
        self.savepoint_log.collect_changes(changes);
    }

    fn discard_unflushed(&self) {
        self.end_flush();
        self.discard_pending_inserts();
        self.revert_writes();
        self.unschedule_deletes();
    }

    fn revert_writes(&self) {
        self.entity_state.dirty_rows().iter().for_each(|tracked| self.revert(tracked));
    }

    fn release_level(&self, level: u32) {
        self.ancestor_deleted_at
            .set(self.ancestor_deleted_at.get().map(|deleted_at| deleted_at.min(level.saturating_sub(1))));
        self.savepoint_log.release_level(level);
    }

    fn roll_back_to(&self, level: u32) {
        self.discard_unflushed();
        self.ancestor_deleted_at.set(self.ancestor_deleted_at.get().filter(|deleted_at| *deleted_at < level));
        let undone = self.savepoint_log.take(level);
        for (kind, tracked) in &undone {
            match (kind, tracked.phase()) {
                (Some(ChangeKind::Insert), _) => {
                    tracked.discard();
                    self.remove(tracked);
                }
                (Some(ChangeKind::Update), RowPhase::Persistent) => tracked.set_phase(RowPhase::RolledBack),
                (Some(ChangeKind::Delete) | None, RowPhase::Deleted) => tracked.set_phase(self.restore(tracked)),
                _ => {}
            }
        }
        drop_each_catching_panics(undone);
        if level == 0 {
            self.sweep();
        }
    }

    fn mark_undecided(&self, verdict: &Arc<Verdict>) {
        self.discard_unflushed();
        let records = self.savepoint_log.take(0);
        let mut rolled_back: HashMap<*const TrackedRow<T>, RowPhase> = HashMap::with_capacity(records.len());
        for (kind, tracked) in &records {
            let phase = rolled_back.entry(Rc::as_ptr(tracked)).or_insert_with(|| tracked.phase());
            *phase = match (kind, *phase) {
                (Some(ChangeKind::Insert), RowPhase::Persistent | RowPhase::RolledBack | RowPhase::Deleted) => {
                    RowPhase::Discarded
                }
                (Some(ChangeKind::Update), RowPhase::Persistent) => RowPhase::RolledBack,
                (Some(ChangeKind::Delete) | None, RowPhase::Deleted) => RowPhase::Persistent,
                (_, phase) => phase,
            };
        }
        for (_, tracked) in &records {
            let Some(phase) = rolled_back.remove(&Rc::as_ptr(tracked)) else { continue };
            if phase != tracked.phase() {
                // A deleted row may exist after all, if the commit failed. This tracked row represents it only if the
                // map has no other.
                let represents_row = tracked.phase() != RowPhase::Deleted
                    || phase == RowPhase::Discarded
                    || self.restore(tracked) == RowPhase::Persistent;
                tracked.mark_undecided(verdict, if represents_row { phase } else { RowPhase::Detached });
            }
        }
        drop_each_catching_panics(records);
        self.sweep();
    }

    fn committed(&self) {
        self.ancestor_deleted_at.set(None);
        self.savepoint_log.clear();
        self.sweep();
    }

    fn clear(&self) {
        self.discard_unflushed();
        self.savepoint_log.clear();
        // Keys and rows may have a `Drop` of the program.
        drop_rows(self.rows.take());
        drop_each_catching_panics(self.pending_inserts.take());
        drop_each_catching_panics(self.aliases.take());
        drop_each_catching_panics(self.doubtful.take());
    }
}
