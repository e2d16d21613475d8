//! The identity map of any entity: what concerns its table, the changes of its rows and the end of a transaction.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::changes::{Change, ChangeKind};
use super::deletes::AnyDeletes;
use super::entity::Persist;
use super::identity_map::{IdentityMap, drop_rows};
use super::pending_inserts::AnyInserts;
use super::relations::Relations;
use super::tracked_row::TrackedRow;
use super::updates::AnyUpdates;
use crate::error::{Result, RowState, SourceLocation, Verdict};
use crate::panic::drop_each_catching_panics;

/// The identity map of any entity. A flush uses the supertraits.
pub(super) trait AnyIdentityMap: Any + AnyInserts + AnyUpdates + AnyDeletes {
    /// The type name of the entity.
    fn name(&self) -> &'static str;
    /// The type of the table. All entities of one table return the same type.
    fn table(&self) -> TypeId;
    /// Expires all rows, because another identity map may have changed rows of the table.
    fn expire(&self);
    /// Adds the foreign keys of the entity and of its ancestors.
    fn add_relations(&self, found: &mut Relations);
    /// Whether rows refer to rows of `ancestor`, directly or through other tables.
    fn refers_to(&self, ancestor: TypeId) -> bool;
    /// Notes that rows of an ancestor were deleted, so that a cascade may have deleted rows of this table.
    fn note_ancestor_deleted(&self);
    /// Reads rows again, with a lock, for which a query may have returned older values.
    fn read_doubtful(&self, at: SourceLocation) -> Result<()>;
    /// Adds the changes of one kind that a flush would send.
    fn collect_unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>);
    /// Adds the changes that this transaction has flushed.
    fn collect_flushed(&self, changes: &mut Vec<Change>);
    fn release_level(&self, level: u32);
    /// Takes back the changes since the savepoint `level`, after the database has rolled them back. Level 0 is the
    /// transaction.
    fn roll_back_to(&self, level: u32);
    /// Marks the changed rows of the transaction undecided, after a commit whose answer was lost.
    fn mark_undecided(&self, verdict: &Arc<Verdict>);
    fn committed(&self);
    /// Detaches all rows, before the first `Drop` of the program runs.
    fn detach(&self);
    /// Removes all rows and all changes.
    fn clear(&self);
}

impl<C: 'static, T: Persist<C>> AnyIdentityMap for IdentityMap<C, T> {
    fn name(&self) -> &'static str {
        std::any::type_name::<T>()
    }

    fn table(&self) -> TypeId {
        T::table()
    }

    fn expire(&self) {
        self.entity_state.expire();
    }

    fn add_relations(&self, found: &mut Relations) {
        found.visit::<T>();
    }

    fn refers_to(&self, ancestor: TypeId) -> bool {
        let ancestors = self.ancestors.get_or_init(|| {
            let mut relations = Relations::default();
            self.add_relations(&mut relations);
            relations.ancestors(T::table())
        });
        ancestors.contains(&ancestor)
    }

    fn note_ancestor_deleted(&self) {
        let level = self.unit_state().level.get();
        let deleted_at = self.ancestor_deleted_at.get().map_or(level, |deleted_at| deleted_at.min(level));
        self.ancestor_deleted_at.set(Some(deleted_at));
        self.expire();
    }

    fn read_doubtful(&self, at: SourceLocation) -> Result<()> {
        for tracked in self.doubtful.take() {
            // The row is not locked any more if the transaction has ended after a failed query.
            let is_doubtful = tracked.is_locked() && !tracked.is_fresh() && !tracked.is_marked_dirty();
            if let Some(id) = tracked.id().filter(|_| is_doubtful) {
                self.fetch(&id, at)?;
            }
        }
        Ok(())
    }

    fn collect_unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>) {
        let rows = match kind {
            ChangeKind::Insert => self.pending_rows(),
            ChangeKind::Update => self.entity_state.dirty_rows(),
            ChangeKind::Delete => self.scheduled_deletes(),
        };
        let is_sent = |tracked: &&Rc<TrackedRow<T>>| {
            kind != ChangeKind::Update || !tracked.delete_scheduled.get() && tracked.differences() != 0
        };
        for tracked in rows.iter().filter(is_sent) {
            changes.push(Change::new(kind, tracked, changes.len() as u64));
        }
    }

    fn collect_flushed(&self, changes: &mut Vec<Change>) {
        self.savepoint_log.collect_changes(changes);
    }

    fn release_level(&self, level: u32) {
        let deleted_at = self.ancestor_deleted_at.get();
        self.ancestor_deleted_at.set(deleted_at.map(|deleted_at| deleted_at.min(level.saturating_sub(1))));
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
                (Some(ChangeKind::Update), RowState::Persistent) => tracked.set_phase(RowState::RolledBack),
                (Some(ChangeKind::Delete) | None, RowState::Deleted) => tracked.set_phase(self.restore(tracked)),
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
        let mut rolled_back: HashMap<*const TrackedRow<T>, RowState> = HashMap::with_capacity(records.len());
        for (kind, tracked) in &records {
            let phase = rolled_back.entry(Rc::as_ptr(tracked)).or_insert_with(|| tracked.phase());
            *phase = match (kind, *phase) {
                (Some(ChangeKind::Insert), RowState::Persistent | RowState::RolledBack | RowState::Deleted) => {
                    RowState::Discarded
                }
                (Some(ChangeKind::Update), RowState::Persistent) => RowState::RolledBack,
                (Some(ChangeKind::Delete) | None, RowState::Deleted) => RowState::Persistent,
                (_, phase) => phase,
            };
        }
        for (_, tracked) in &records {
            let Some(phase) = rolled_back.remove(&Rc::as_ptr(tracked)) else { continue };
            if phase != tracked.phase() {
                // A deleted row may exist after all, if the commit failed. This tracked row represents it only if the
                // map has no other.
                let represents_row = tracked.phase() != RowState::Deleted
                    || phase == RowState::Discarded
                    || self.restore(tracked) == RowState::Persistent;
                tracked.mark_undecided(verdict, if represents_row { phase } else { RowState::Detached });
            }
        }
        drop_each_catching_panics(records);
        self.sweep();
    }

    fn committed(&self) {
        self.ancestor_deleted_at.set(None);
        drop_each_catching_panics(self.savepoint_log.take(0));
        self.sweep();
    }

    fn detach(&self) {
        self.entity_state.has_ended.set(true);
    }

    fn clear(&self) {
        self.discard_unflushed();
        drop_each_catching_panics(self.savepoint_log.take(0));
        // Keys and rows may have a `Drop` of the program.
        drop_rows(self.rows.take());
        drop_each_catching_panics(self.aliases.take());
        drop_each_catching_panics(self.doubtful.take());
    }
}
