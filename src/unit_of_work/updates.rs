//! The dirty rows of one entity in a flush: their UPDATEs, and the locks that precede UPDATEs and DELETEs.

use std::rc::Rc;

use super::changes::ChangeKind;
use super::entity::{Columns, Entity, Persist};
use super::identity_map::IdentityMap;
use super::pending_inserts::AnyInserts;
use super::relations::{Reference, moves};
use super::tracked_row::{TrackedRow, differences};
use crate::error::{Details, Error, Result, RowState, SourceLocation, Undo};

/// Tells whether a reference is to a row that has not been inserted yet. `None`: no row waits for its INSERT.
pub(super) type IsPending<'d> = Option<&'d dyn Fn(&Reference) -> bool>;

/// The dirty rows of any entity.
pub(super) trait AnyUpdates {
    /// Whether rows are marked dirty. They need not have changed.
    fn has_dirty_rows(&self) -> bool;
    /// Whether a flush would send an UPDATE.
    fn has_changed_rows(&self) -> bool;
    /// Fails if a write guard of a row is alive.
    fn check_writers(&self, at: SourceLocation) -> Result<()>;
    /// Fails if a change cannot be flushed. Sends no statement.
    fn check(&self, at: SourceLocation) -> Result<()>;
    /// Compares unverified original values with the database. Fails if a row has changed.
    fn verify(&self, at: SourceLocation) -> Result<()>;
    /// The foreign keys that the UPDATEs of this flush replace.
    fn former_references(&self, at: SourceLocation) -> Result<Vec<Reference>>;
    /// Locks the rows of the UPDATEs and DELETEs in the order of their keys, if more than one statement would lock
    /// them.
    fn lock(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<()>;
    /// Sends the UPDATEs that depend on no pending INSERT, in the order of the first write to each row.
    fn update(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<()>;
    /// Takes back the writes that are not flushed. Pending inserts and scheduled deletes stay.
    fn revert_writes(&self);
}

impl<C: 'static, T: Persist<C>> AnyUpdates for IdentityMap<C, T> {
    fn has_dirty_rows(&self) -> bool {
        self.entity_state.has_dirty_rows()
    }

    fn has_changed_rows(&self) -> bool {
        self.entity_state.dirty_rows().iter().any(|tracked| tracked.is_unverified() || tracked.differences() != 0)
    }

    fn check_writers(&self, at: SourceLocation) -> Result<()> {
        self.entity_state.dirty_rows().iter().try_for_each(|tracked| tracked.original_and_value(at).map(drop))
    }

    fn check(&self, at: SourceLocation) -> Result<()> {
        for tracked in self.entity_state.dirty_rows() {
            let (original, value) = tracked.original_and_value(at)?;
            if original.id() != value.id() {
                let (from, to) = (format!("{:?}", original.id()), format!("{:?}", value.id()));
                return Err(Details::KeyChanged { entity: T::NAME, from, to, at }.into());
            }
        }
        Ok(())
    }

    fn verify(&self, at: SourceLocation) -> Result<()> {
        for tracked in self.entity_state.dirty_rows() {
            let is_compared = !tracked.delete_scheduled.get() || tracked.may_be_rolled_back();
            if tracked.is_unverified()
                && is_compared
                && tracked.phase() == RowState::Persistent
                && let Some(id) = tracked.id()
            {
                let find = if self.is_mysql { T::find_newest } else { T::find };
                let mut rows = self.select(at, |conn| find(conn, &id))?;
                tracked.verify(rows.pop(), at)?;
            }
        }
        Ok(())
    }

    fn former_references(&self, at: SourceLocation) -> Result<Vec<Reference>> {
        let mut from = Vec::new();
        for tracked in self.entity_state.dirty_rows().iter().filter(|tracked| !tracked.delete_scheduled.get()) {
            let (original, value) = tracked.original_and_value(at)?;
            if !Rc::ptr_eq(&original, &value) {
                from.extend(moves(&*original, &*value).into_iter().filter_map(|(from, _)| from));
            }
        }
        Ok(from)
    }

    fn lock(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<()> {
        if T::MAX_LOCK_ROWS == 0 {
            return Ok(());
        }
        let changed = self.changed_rows(None, at)?;
        let deleted: Vec<Rc<T>> = self.deletes.borrow().rows.iter().map(|row| row.value.borrow().clone()).collect();
        let locked_by_update = deleted.is_empty()
            && changed.len() <= T::MAX_UPDATE_ROWS
            && changed.windows(2).all(|pair| Self::share_statement(&pair[0], &pair[1]))
            && !changed.iter().any(|row| self.depends_on_insert(&row.old, &row.new, is_pending));
        if locked_by_update || changed.len() + deleted.len() < 2 || changed.is_empty() && !self.may_lock(at)? {
            return Ok(());
        }
        let rows: Vec<&T> = changed.iter().map(|row| &*row.old).chain(deleted.iter().map(|row| &**row)).collect();
        for chunk in rows.chunks(T::MAX_LOCK_ROWS) {
            self.change(at, |conn| T::lock(conn, chunk, changed.is_empty()))?;
        }
        Ok(())
    }

    fn update(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<()> {
        let changed = self.changed_rows(is_pending, at)?;
        let mut is_missing = Vec::with_capacity(changed.len());
        for same_columns in changed.chunk_by(Self::share_statement) {
            for chunk in same_columns.chunks(T::MAX_UPDATE_ROWS.max(1)) {
                let counts = match chunk {
                    [one] => vec![self.update_one(one, at)?],
                    several => self.update_many(several, at)?,
                };
                for (row, count) in chunk.iter().zip(counts) {
                    is_missing.push(count == 0);
                    self.check_count(&row.old, count, "update", at)?;
                }
            }
        }
        for (ChangedRow { tracked, old, new, .. }, is_missing) in changed.into_iter().zip(is_missing) {
            if is_missing {
                drop((old, new));
                self.mark_deleted_by_cascade(&tracked);
            } else {
                // The log comes first: a clone of the row may panic, and the rollback that follows has to know that
                // the UPDATE was sent.
                self.savepoint_log.record(Some(ChangeKind::Update), &tracked);
                drop((old, new));
                tracked.mark_flushed(T::VERSIONED);
                self.entity_state.unmark_dirty(&tracked);
            }
        }
        // A remaining dirty row is scheduled for a DELETE, depends on an INSERT, or has its original values.
        for tracked in self.entity_state.dirty_rows() {
            let is_left = tracked.phase() == RowState::Persistent
                && (tracked.delete_scheduled.get() || tracked.differences() != 0);
            if !is_left {
                self.revert(&tracked);
            }
        }
        Ok(())
    }

    fn revert_writes(&self) {
        self.entity_state.dirty_rows().iter().for_each(|tracked| self.revert(tracked));
    }
}

/// A tracked row whose value differs from its original values.
struct ChangedRow<T: Entity> {
    tracked: Rc<TrackedRow<T>>,
    old: Rc<T>,
    new: Rc<T>,
    columns: Columns,
}

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    /// Whether one UPDATE can write both rows.
    fn share_statement(one: &ChangedRow<T>, other: &ChangedRow<T>) -> bool {
        one.columns == other.columns && !one.old.goes_alone() && !other.old.goes_alone()
    }

    /// The changed rows whose UPDATE depends on no pending INSERT, in the order of their first write.
    fn changed_rows(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<Vec<ChangedRow<T>>> {
        let mut changed = Vec::new();
        for tracked in self.entity_state.dirty_rows() {
            if tracked.delete_scheduled.get() || tracked.phase() != RowState::Persistent {
                continue;
            }
            let (old, new) = tracked.original_and_value(at)?;
            let columns = differences(&old, &new);
            if columns != 0 && !self.depends_on_insert(&old, &new, is_pending) {
                changed.push(ChangedRow { tracked, old, new, columns });
            }
        }
        Ok(changed)
    }

    /// Whether an UPDATE has to follow the INSERTs: it writes the key of a new row, or a new row has the key of the
    /// updated row.
    fn depends_on_insert(&self, old: &T, new: &T, is_pending: IsPending<'_>) -> bool {
        is_pending.is_some_and(|is_pending| {
            self.may_be_pending(&old.id()) || moves(old, new).iter().any(|(_, to)| to.as_ref().is_some_and(is_pending))
        })
    }

    /// Updates one row. Returns the number of updated rows.
    fn update_one(&self, row: &ChangedRow<T>, at: SourceLocation) -> Result<usize> {
        if self.is_mysql {
            let bytes = row.new.bytes(row.columns);
            self.statement_limit(bytes, bytes, || Some(format!("{:?}", row.old.id())), at)?;
        }
        self.change(at, |conn| T::update(conn, &row.old, &row.new))
    }

    /// Updates several rows by one statement. Returns how often each row was updated.
    fn update_many(&self, rows: &[ChangedRow<T>], at: SourceLocation) -> Result<Vec<usize>> {
        let pairs: Vec<(&T, &T)> = rows.iter().map(|row| (&*row.old, &*row.new)).collect();
        let found = self.change(at, |conn| T::update_many(conn, &pairs, rows[0].columns))?;
        let mut counts = vec![0; rows.len()];
        found.into_iter().for_each(|index| counts[index] += 1);
        Ok(counts)
    }

    /// Checks how many rows an UPDATE has found. A row that it did not find may have been deleted by a cascade,
    /// together with a row that it referred to and that this transaction has deleted. If it still exists, the statement
    /// did not match its version: the row is stale.
    pub(super) fn check_count(&self, row: &T, count: usize, purpose: &'static str, at: SourceLocation) -> Result<()> {
        let id = row.id();
        match count {
            1 => Ok(()),
            0 if self.may_be_deleted_by_cascade(row) && self.select(at, |conn| T::find(conn, &id))?.is_empty() => {
                Ok(())
            }
            0 => Err(stale::<T>(format!("{id:?}"), purpose, at)),
            rows => Err(not_unique::<T>(format!("{id:?}"), "UPDATE", rows, at)),
        }
    }

    /// Whether the role may lock rows that it does not update. This needs the UPDATE privilege, which a role with the
    /// DELETE privilege may lack.
    fn may_lock(&self, at: SourceLocation) -> Result<bool> {
        let may_lock = match self.may_lock.get() {
            Some(may_lock) => may_lock,
            None => self.select(at, |conn| T::may_lock(conn))?,
        };
        self.may_lock.set(Some(may_lock));
        Ok(may_lock)
    }
}

pub(super) fn not_unique<T: Entity>(key: String, operation: &'static str, rows: usize, at: SourceLocation) -> Error {
    Details::NotUnique { entity: T::NAME, key, operation, rows, at, undo: Undo::default() }.into()
}

pub(super) fn stale<T: Entity>(key: String, operation: &'static str, at: SourceLocation) -> Error {
    Details::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() }.into()
}
