//! The DELETEs of one entity, and the UPDATEs that make them possible.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::entity::{Entity, Persist};
use super::executor::{Executor, StatementKind, execute};
use super::identity_map::IdentityMap;
use super::key_comparison::normalized_key;
use super::relations::Reference;
use super::tracked_row::{RowPhase, TrackedRow};
use super::updates::{expect_deleted_by_cascade, not_unique, stale};
use crate::error::{Error, Place, Result, Undo};

/// The rows that one flush deletes. A row is addressed by its index in `rows`.
pub(super) struct Deletes<T: Entity> {
    pub(super) rows: Vec<ScheduledDelete<T>>,
    /// The indices of the rows by their normalized key.
    indices: HashMap<String, Vec<usize>>,
}

pub(super) struct ScheduledDelete<T: Entity> {
    pub(super) tracked: Rc<TrackedRow<T>>,
    /// The row in the database.
    pub(super) value: RefCell<Rc<T>>,
    /// The value that the program has written and that was not flushed.
    written: Option<Rc<T>>,
    /// The DELETE follows the UPDATEs of this flush.
    deferred: Cell<bool>,
    is_done: Cell<bool>,
}

impl<T: Entity> Default for Deletes<T> {
    fn default() -> Self {
        Self { rows: Vec::new(), indices: HashMap::new() }
    }
}

impl<T: Entity> Deletes<T> {
    pub(super) fn of(scheduled: &[Rc<TrackedRow<T>>], at: Place) -> Result<Self> {
        let mut deletes = Self::default();
        for tracked in scheduled.iter().filter(|tracked| tracked.phase() == RowPhase::Persistent) {
            let (value, written) = match tracked.is_marked_dirty() {
                // The DELETE names the version in the database, not one that the program has written.
                true => tracked.original_and_value(at).map(|(original, value)| (original, Some(value)))?,
                false => {
                    let value = tracked.value.try_borrow().ok().and_then(|value| value.clone());
                    (value.ok_or_else(|| tracked.write_in_progress(at))?, None)
                }
            };
            deletes.indices.entry(normalized_key(&value.id())).or_default().push(deletes.rows.len());
            deletes.rows.push(ScheduledDelete {
                tracked: Rc::clone(tracked),
                value: RefCell::new(value),
                written,
                deferred: Cell::new(false),
                is_done: Cell::new(false),
            });
        }
        Ok(deletes)
    }

    /// The rows that are not deleted yet.
    pub(super) fn remaining(&self, include_deferred: bool) -> Vec<usize> {
        let is_remaining = |row: &ScheduledDelete<T>| !row.is_done.get() && (include_deferred || !row.deferred.get());
        (0..self.rows.len()).filter(|&index| is_remaining(&self.rows[index])).collect()
    }

    /// The rows with this key. There is none if `key` is not of the entity's key type.
    pub(super) fn indices_of(&self, key: &dyn Any) -> Vec<usize> {
        let Some(id) = key.downcast_ref::<T::Id>() else { return Vec::new() };
        let Some(indices) = self.indices.get(&normalized_key(id)) else { return Vec::new() };
        let same: Vec<usize> =
            indices.iter().copied().filter(|&index| self.rows[index].value.borrow().id() == *id).collect();
        if same.is_empty() { indices.clone() } else { same }
    }

    pub(super) fn references_of(&self, index: usize) -> Vec<Reference> {
        self.rows[index].value.borrow().references()
    }

    pub(super) fn defer(&self, index: usize) {
        self.rows[index].deferred.set(true);
    }

    pub(super) fn release_deferred(&self) {
        self.rows.iter().for_each(|row| row.deferred.set(false));
    }
}

/// Sends the foreign keys that the program has written to a row that this flush deletes, if this breaks a circle of
/// deleted rows.
pub(super) fn send_moves<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    breaks_circle: &dyn Fn(&Reference) -> bool,
    is_pending: &dyn Fn(&Reference) -> bool,
) -> Result<()> {
    for index in map.deletes.borrow().remaining(true) {
        let moved = {
            let deletes = map.deletes.borrow();
            let row = &deletes.rows[index];
            let Some(written) = &row.written else { continue };
            let value = Rc::clone(&row.value.borrow());
            let moves = T::moves(&value, written);
            let is_wanted = moves.iter().any(|moved| moved.from.as_ref().is_some_and(breaks_circle))
                && !moves.iter().any(|moved| moved.to.as_ref().is_some_and(is_pending));
            is_wanted.then(|| {
                let mut moved = T::clone(&value);
                moved.take_references(written);
                moved
            })
        };
        if let Some(moved) = moved {
            rewrite(map, index, moved, executor)?;
        }
    }
    Ok(())
}

/// Sets the foreign keys of a row that this flush deletes to NULL, as far as they refer to tables in `parents` and can
/// be NULL. Returns whether there was such a foreign key.
pub(super) fn unlink<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    index: usize,
    parents: &[TypeId],
    executor: &dyn Executor<C>,
) -> Result<bool> {
    let value = Rc::clone(&map.deletes.borrow().rows[index].value.borrow());
    let mut unlinked = T::clone(&value);
    unlinked.unlink(parents);
    if T::differences(&value, &unlinked) == 0 {
        return Ok(false);
    }
    rewrite(map, index, unlinked, executor)?;
    Ok(true)
}

/// Updates a row that this flush deletes. The handle keeps its value in memory.
fn rewrite<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    index: usize,
    mut new: T,
    executor: &dyn Executor<C>,
) -> Result<()> {
    let old = Rc::clone(&map.deletes.borrow().rows[index].value.borrow());
    match execute(executor, StatementKind::Change, |conn| T::update(conn, &old, &new))? {
        0 => expect_deleted_by_cascade(map, executor, &old, "delete")?,
        1 => {}
        rows => return Err(not_unique(&*old, "UPDATE", rows, executor.at())),
    }
    if T::VERSIONED {
        new.bump_version();
    }
    map.deletes.borrow().rows[index].value.replace(Rc::new(new));
    Ok(())
}

/// A row to delete: its index, the tracked row and the row in the database.
type DeletedRow<T> = (usize, Rc<TrackedRow<T>>, Rc<T>);

/// Splits the rows into chunks of which each fits into one statement. `together` puts no limit on the number of rows.
fn chunks<'r, C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    mut rows: &'r [DeletedRow<T>],
    together: bool,
    executor: &dyn Executor<C>,
) -> Result<impl Iterator<Item = &'r [DeletedRow<T>]>> {
    let ids: Vec<T::Id> = rows.iter().map(|(_, _, value)| value.id()).collect();
    let chunk_lengths = map.chunk_lengths(&ids, if together { usize::MAX } else { T::MAX_DELETE_ROWS }, executor)?;
    Ok(chunk_lengths.into_iter().map(move |length| rows.split_off(..length).unwrap_or_default()))
}

/// Deletes these rows. `together`: by one statement, because the rows refer to each other.
pub(super) fn delete<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    indices: &[usize],
    together: bool,
    executor: &dyn Executor<C>,
) -> Result<()> {
    let rows: Vec<DeletedRow<T>> = {
        let deletes = map.deletes.borrow();
        let row = |&index: &usize| {
            let row = &deletes.rows[index];
            (index, Rc::clone(&row.tracked), Rc::clone(&row.value.borrow()))
        };
        indices.iter().map(row).collect()
    };
    rows.iter().for_each(|(_, tracked, _)| map.revert(tracked));
    // A cascade may already have deleted rows of the first kind. Rows of the second kind have statements of their own,
    // so that a missing row is an error.
    let refers_to_own = map.refers_to(T::table());
    let (may_be_missing, must_exist): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, _, value)| {
        together || (refers_to_own || map.has_deleted_ancestors()) && !value.references().is_empty()
    });
    for (chunk, may_be_missing) in chunks(map, &must_exist, together, executor)?
        .map(|chunk| (chunk, false))
        .chain(chunks(map, &may_be_missing, together, executor)?.map(|chunk| (chunk, true)))
    {
        let values: Vec<&T> = chunk.iter().map(|(_, _, value)| &**value).collect();
        let deleted = execute(executor, StatementKind::Change, |conn| T::delete(conn, &values))?;
        let key = || match chunk {
            [(_, _, one)] => format!("{:?}", one.id()),
            several => format!("(one of {})", several.len()),
        };
        if deleted > chunk.len() {
            return Err(Error::NotUnique {
                entity: T::NAME,
                key: key(),
                operation: "DELETE",
                rows: deleted,
                at: executor.at(),
                undo: Undo::default(),
            });
        }
        if deleted < chunk.len() {
            let stale = |key| stale::<T>(key, "delete", executor.at());
            // A cascade of an earlier DELETE of this transaction, or of this statement, may have deleted the missing
            // rows.
            if !may_be_missing || !map.has_deleted_ancestors() && deleted == 0 {
                return Err(stale(key()));
            }
            let ids: Vec<T::Id> = values.iter().map(|value| value.id()).collect();
            for ids in ids.chunks(T::MAX_FIND_KEYS.max(1)) {
                let found = execute(executor, StatementKind::select::<T>(), |conn| T::find_many(conn, ids))?;
                if let Some(existing) = found.first() {
                    return Err(stale(format!("{:?}", existing.id())));
                }
            }
        }
        if refers_to_own && deleted > 0 {
            map.note_ancestor_deleted();
        }
        for (index, tracked, _) in chunk {
            map.deletes.borrow().rows[*index].is_done.set(true);
            map.deleted(tracked);
            map.unschedule_delete(tracked);
        }
    }
    Ok(())
}
