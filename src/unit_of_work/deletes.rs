//! The DELETEs of one entity in a flush, and the UPDATEs that make them possible.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::any_identity_map::AnyIdentityMap;
use super::entity::{Entity, Persist};
use super::identity_map::IdentityMap;
use super::key_comparison::normalized_key;
use super::relations::{Reference, moves};
use super::tracked_row::TrackedRow;
use super::updates::{not_unique, stale};
use crate::error::{Result, RowState, SourceLocation};
use crate::panic::drop_catching_panic;

/// The scheduled deletes of any entity. A flush addresses a row that it deletes by its index.
pub(super) trait AnyDeletes {
    fn has_scheduled_deletes(&self) -> bool;
    /// Collects the rows that this flush deletes.
    fn begin_flush(&self, at: SourceLocation) -> Result<()>;
    fn end_flush(&self);
    /// The rows that are not deleted yet.
    fn remaining_deletes(&self) -> Vec<usize>;
    /// Whether the entity's key has the type of `key`. If not, `key` refers to another column.
    fn has_key_type(&self, key: &dyn Any) -> bool;
    /// The deletes of rows with this key. There is none if `key` is not of the entity's key type.
    fn deletes_of(&self, key: &dyn Any) -> Vec<usize>;
    /// The references of a row that this flush deletes.
    fn references_of(&self, index: usize) -> Vec<Reference>;
    /// The state of the row with this key, as far as the session knows it.
    fn known_row(&self, key: &dyn Any) -> Option<KnownRow>;
    /// Sends the foreign keys that the program has written to a row that this flush deletes, if this breaks a circle of
    /// deleted rows.
    fn send_moves(
        &self,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        is_pending: &dyn Fn(&Reference) -> bool,
        at: SourceLocation,
    ) -> Result<()>;
    /// Sets the foreign keys of a row that this flush deletes to NULL, as far as they refer to tables in `parents` and
    /// can be NULL. Returns whether there was such a foreign key.
    fn unlink(&self, index: usize, parents: &[TypeId], at: SourceLocation) -> Result<bool>;
    /// Whether one statement can delete this number of rows.
    fn deletes_at_once(&self, rows: usize) -> bool;
    /// Deletes these rows. `together`: by one statement, because the rows refer to each other.
    fn delete(&self, indices: &[usize], together: bool, at: SourceLocation) -> Result<()>;
}

/// A row that the identity map knows.
pub(super) struct KnownRow {
    pub(super) identity: *const (),
    pub(super) references: Vec<Reference>,
    /// Whether the references cannot be outdated.
    pub(super) is_current: bool,
}

/// The rows that one flush deletes.
pub(super) struct Deletes<T: Entity> {
    pub(super) rows: Vec<Rc<ScheduledDelete<T>>>,
    /// The indices of the rows by their normalized key.
    indices: HashMap<String, Vec<usize>>,
}

pub(super) struct ScheduledDelete<T: Entity> {
    tracked: Rc<TrackedRow<T>>,
    /// The row in the database.
    pub(super) value: RefCell<Rc<T>>,
    /// The value that the program has written and that was not flushed.
    written: Option<Rc<T>>,
}

impl<T: Entity> Default for Deletes<T> {
    fn default() -> Self {
        Self { rows: Vec::new(), indices: HashMap::new() }
    }
}

impl<C: 'static, T: Persist<C>> AnyDeletes for IdentityMap<C, T> {
    fn has_scheduled_deletes(&self) -> bool {
        !self.scheduled_deletes.borrow().is_empty()
    }

    fn begin_flush(&self, at: SourceLocation) -> Result<()> {
        self.pending_keys.take();
        let mut deletes = Deletes::default();
        for tracked in self.scheduled_deletes() {
            if tracked.phase() != RowState::Persistent {
                self.unschedule_delete(&tracked);
                continue;
            }
            // The DELETE names the version in the database, not one that the program has written.
            let value = tracked.stored().ok_or_else(|| tracked.write_in_progress(at))?;
            let written = tracked.is_marked_dirty().then(|| tracked.original_and_value(at)).transpose()?;
            deletes.indices.entry(normalized_key(&value.id())).or_default().push(deletes.rows.len());
            let (value, written) = (RefCell::new(value), written.map(|(_, written)| written));
            deletes.rows.push(Rc::new(ScheduledDelete { tracked, value, written }));
        }
        drop_catching_panic(self.deletes.replace(deletes));
        Ok(())
    }

    fn end_flush(&self) {
        self.pending_keys.take();
        drop_catching_panic(self.deletes.take());
    }

    fn remaining_deletes(&self) -> Vec<usize> {
        let deletes = self.deletes.borrow();
        (0..deletes.rows.len()).filter(|&index| deletes.rows[index].tracked.phase() == RowState::Persistent).collect()
    }

    fn has_key_type(&self, key: &dyn Any) -> bool {
        key.is::<T::Id>()
    }

    fn deletes_of(&self, key: &dyn Any) -> Vec<usize> {
        let deletes = self.deletes.borrow();
        let Some(id) = key.downcast_ref::<T::Id>().filter(|_| !deletes.rows.is_empty()) else { return Vec::new() };
        let Some(indices) = deletes.indices.get(&normalized_key(id)) else { return Vec::new() };
        let is_same = |index: &usize| deletes.rows[*index].value.borrow().id() == *id;
        let same: Vec<usize> = indices.iter().copied().filter(is_same).collect();
        if same.is_empty() { indices.clone() } else { same }
    }

    fn references_of(&self, index: usize) -> Vec<Reference> {
        self.deletes.borrow().rows[index].value.borrow().references()
    }

    fn known_row(&self, key: &dyn Any) -> Option<KnownRow> {
        let tracked = self.get(key.downcast_ref()?)?;
        let references = tracked.stored()?.references();
        Some(KnownRow { identity: Rc::as_ptr(&tracked).cast(), references, is_current: tracked.is_fresh() })
    }

    fn send_moves(
        &self,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        is_pending: &dyn Fn(&Reference) -> bool,
        at: SourceLocation,
    ) -> Result<()> {
        let rows = self.deletes.borrow().rows.clone();
        for row in &rows {
            let Some(written) = &row.written else { continue };
            let value = Rc::clone(&row.value.borrow());
            let moves = moves(&*value, &**written);
            if moves.iter().any(|(from, _)| from.as_ref().is_some_and(breaks_circle))
                && !moves.iter().any(|(_, to)| to.as_ref().is_some_and(is_pending))
            {
                let columns = value.foreign_keys().iter().fold(0, |columns, key| columns | key.columns);
                let mut moved = T::clone(&value);
                moved.swap_columns(&mut T::clone(written), columns);
                self.rewrite(row, moved, at)?;
            }
        }
        Ok(())
    }

    fn unlink(&self, index: usize, parents: &[TypeId], at: SourceLocation) -> Result<bool> {
        let row = Rc::clone(&self.deletes.borrow().rows[index]);
        let value = Rc::clone(&row.value.borrow());
        let keys = value.foreign_keys().into_iter().filter(|key| parents.contains(&key.parent));
        let mut unlinked = T::clone(&value);
        unlinked.set_null(keys.fold(0, |columns, key| columns | key.columns));
        if T::differences(&value, &unlinked) == 0 {
            return Ok(false);
        }
        self.rewrite(&row, unlinked, at)?;
        Ok(true)
    }

    fn deletes_at_once(&self, rows: usize) -> bool {
        rows <= T::MAX_DELETE_ROWS
    }

    fn delete(&self, indices: &[usize], together: bool, at: SourceLocation) -> Result<()> {
        let rows: Vec<DeletedRow<T>> = {
            let deletes = self.deletes.borrow();
            let rows = indices.iter().map(|&index| &deletes.rows[index]);
            rows.map(|row| (Rc::clone(&row.tracked), Rc::clone(&row.value.borrow()))).collect()
        };
        rows.iter().for_each(|(tracked, _)| self.revert(tracked));
        // A cascade may already have deleted rows of the first kind. Rows of the second kind have statements of their
        // own, so that a missing row is an error.
        let refers_to_own = self.refers_to(T::table());
        let (may_be_missing, must_exist): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, value)| {
            together || (refers_to_own || self.has_deleted_ancestors()) && !value.references().is_empty()
        });
        self.delete_in_chunks(&must_exist, together, false, at)?;
        self.delete_in_chunks(&may_be_missing, together, true, at)
    }
}

/// A row to delete: the tracked row and the row in the database.
type DeletedRow<T> = (Rc<TrackedRow<T>>, Rc<T>);

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    /// Updates a row that this flush deletes. The handle keeps its value in memory.
    fn rewrite(&self, row: &ScheduledDelete<T>, mut new: T, at: SourceLocation) -> Result<()> {
        let old = Rc::clone(&row.value.borrow());
        let updated = self.change(at, |conn| T::update(conn, &old, &new))?;
        self.check_count(&old, updated, "delete", at)?;
        new.bump_version();
        row.value.replace(Rc::new(new));
        Ok(())
    }

    /// Deletes these rows by as few statements as possible. `together`: by one statement. `may_be_missing`: a cascade of
    /// an earlier DELETE of this transaction, or of the same statement, may have deleted rows.
    fn delete_in_chunks(
        &self,
        mut rows: &[DeletedRow<T>],
        together: bool,
        may_be_missing: bool,
        at: SourceLocation,
    ) -> Result<()> {
        let ids: Vec<T::Id> = rows.iter().map(|(_, value)| value.id()).collect();
        for length in self.chunk_lengths(&ids, if together { usize::MAX } else { T::MAX_DELETE_ROWS }, at)? {
            let (chunk, rest) = rows.split_at(length);
            rows = rest;
            let values: Vec<&T> = chunk.iter().map(|(_, value)| &**value).collect();
            let deleted = self.change(at, |conn| T::delete(conn, &values))?;
            let key = || match values[..] {
                [one] => format!("{:?}", one.id()),
                _ => format!("(one of {})", values.len()),
            };
            if deleted > values.len() {
                return Err(not_unique::<T>(key(), "DELETE", deleted, at));
            }
            if deleted < values.len() {
                if !may_be_missing || !self.has_deleted_ancestors() && deleted == 0 {
                    return Err(stale::<T>(key(), "delete", at));
                }
                let ids: Vec<T::Id> = values.iter().map(|value| value.id()).collect();
                for ids in ids.chunks(T::MAX_FIND_KEYS.max(1)) {
                    if let Some(existing) = self.select(at, |conn| T::find_many(conn, ids))?.first() {
                        return Err(stale::<T>(format!("{:?}", existing.id()), "delete", at));
                    }
                }
            }
            if deleted > 0 && self.refers_to(T::table()) {
                self.note_ancestor_deleted();
            }
            for (tracked, _) in chunk {
                self.deleted(tracked);
                self.unschedule_delete(tracked);
            }
        }
        Ok(())
    }
}
