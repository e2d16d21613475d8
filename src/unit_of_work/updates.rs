//! The UPDATEs of one entity, and the locks that precede its UPDATEs and DELETEs.

use std::rc::Rc;

use super::any_identity_map::AnyIdentityMap;
use super::changes::ChangeKind;
use super::entity::{Columns, Entity, Persist};
use super::executor::{Executor, StatementKind, execute};
use super::identity_map::IdentityMap;
use super::relations::Reference;
use super::tracked_row::{RowPhase, TrackedRow};
use crate::error::{Error, Place, Result, Undo};

/// A tracked row whose value differs from its original values.
struct ChangedRow<T: Entity> {
    tracked: Rc<TrackedRow<T>>,
    old: Rc<T>,
    new: Rc<T>,
    columns: Columns,
}

impl<T: Entity> ChangedRow<T> {
    /// Whether one UPDATE can write both rows.
    fn shares_statement<C>(&self, next: &Self) -> bool
    where
        T: Persist<C>,
    {
        self.columns == next.columns && !self.old.goes_alone() && !next.old.goes_alone()
    }
}

/// Tells whether a reference is to a row that has not been inserted yet. `None`: no row waits for its INSERT.
pub(super) type IsPending<'d> = Option<&'d dyn Fn(&Reference) -> bool>;

/// Whether an UPDATE has to follow the INSERTs: it writes the key of a new row, or a new row has the key of the updated
/// row.
fn depends_on_insert<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    old: &T,
    new: &T,
    is_pending: IsPending<'_>,
) -> bool {
    is_pending.is_some_and(|is_pending| {
        AnyIdentityMap::may_be_pending(map, &old.id())
            || T::moves(old, new).iter().any(|moved| moved.to.as_ref().is_some_and(is_pending))
    })
}

/// The changed rows whose UPDATE depends on no pending INSERT, in the order of their first write.
fn changed_rows<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    is_pending: IsPending<'_>,
    at: Place,
) -> Result<Vec<ChangedRow<T>>> {
    let mut changed = Vec::new();
    for tracked in map.entity_state.dirty_rows() {
        if tracked.is_delete_scheduled() || tracked.phase() != RowPhase::Persistent {
            continue;
        }
        let (old, new) = tracked.original_and_value(at)?;
        let columns = if Rc::ptr_eq(&old, &new) { 0 } else { T::differences(&old, &new) };
        if columns != 0 && !depends_on_insert(map, &*old, &*new, is_pending) {
            changed.push(ChangedRow { tracked, old, new, columns });
        }
    }
    Ok(changed)
}

/// Sends the UPDATEs that depend on no pending INSERT, in the order of the first write to each row.
pub(super) fn update<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    is_pending: IsPending<'_>,
) -> Result<()> {
    let changed = changed_rows(map, is_pending, executor.at())?;
    let mut is_missing = vec![false; changed.len()];
    let mut first = 0;
    for same_columns in changed.chunk_by(|one, next| one.shares_statement::<C>(next)) {
        for chunk in same_columns.chunks(T::MAX_UPDATE_ROWS.max(1)) {
            let is_missing = &mut is_missing[first..first + chunk.len()];
            match chunk {
                [one] => is_missing[0] = update_one(map, executor, one)?,
                several => update_many(map, executor, several, is_missing)?,
            }
            first += chunk.len();
        }
    }
    for (ChangedRow { tracked, old, new, .. }, is_missing) in changed.into_iter().zip(is_missing) {
        if is_missing {
            drop((old, new));
            map.mark_deleted_by_cascade(&tracked);
        } else {
            // The log comes first: a clone of the row may panic, and the rollback that follows has to know that the
            // UPDATE was sent.
            map.savepoint_log.record(ChangeKind::Update, &tracked);
            drop((old, new));
            tracked.mark_flushed(T::VERSIONED);
            map.entity_state.unmark_dirty(&tracked);
        }
    }
    // A remaining dirty row is scheduled for a DELETE, depends on an INSERT, or has its original values.
    for tracked in map.entity_state.dirty_rows() {
        let is_left =
            tracked.phase() == RowPhase::Persistent && (tracked.is_delete_scheduled() || tracked.differences() != 0);
        if !is_left {
            map.revert(&tracked);
        }
    }
    Ok(())
}

/// Updates one row. Returns whether a cascade has deleted the row.
fn update_one<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    row: &ChangedRow<T>,
) -> Result<bool> {
    if !executor.has_returning() {
        let bytes = row.new.bytes(row.columns);
        let limit = map.max_statement_bytes(bytes, executor)?;
        if bytes > limit {
            let key = Some(format!("{:?}", row.old.id()));
            let (at, undo) = (executor.at(), Undo::default());
            return Err(Error::RowTooLarge { entity: T::NAME, key, bytes, limit, at, undo });
        }
    }
    match execute(executor, StatementKind::Change, |conn| T::update(conn, &row.old, &row.new))? {
        0 => expect_deleted_by_cascade(map, executor, &row.old, "update").map(|()| true),
        1 => Ok(false),
        rows => Err(not_unique(&*row.old, "UPDATE", rows, executor.at())),
    }
}

/// Updates several rows by one statement. Sets `is_missing` for the rows that a cascade has deleted.
fn update_many<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    rows: &[ChangedRow<T>],
    is_missing: &mut [bool],
) -> Result<()> {
    let pairs: Vec<(&T, &T)> = rows.iter().map(|row| (&*row.old, &*row.new)).collect();
    let found = execute(executor, StatementKind::Change, |conn| T::update_many(conn, &pairs, rows[0].columns))?;
    let mut counts = vec![0_usize; rows.len()];
    for index in found {
        if let Some(count) = counts.get_mut(index) {
            *count += 1;
        }
    }
    for (index, count) in counts.into_iter().enumerate() {
        match count {
            0 => {
                expect_deleted_by_cascade(map, executor, &rows[index].old, "update")?;
                is_missing[index] = true;
            }
            1 => {}
            rows_changed => return Err(not_unique(&*rows[index].old, "UPDATE", rows_changed, executor.at())),
        }
    }
    Ok(())
}

/// Checks a row that an UPDATE or DELETE did not find. The row may have been deleted by a cascade, together with a row
/// that it referred to and that this transaction has deleted. If it still exists, the statement did not match its
/// version: the row is stale.
pub(super) fn expect_deleted_by_cascade<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    row: &T,
    operation: &'static str,
) -> Result<()> {
    let id = row.id();
    if map.may_be_deleted_by_cascade(row)
        && execute(executor, StatementKind::select::<T>(), |conn| T::find(conn, &id))?.is_empty()
    {
        return Ok(());
    }
    Err(stale::<T>(format!("{id:?}"), operation, executor.at()))
}

pub(super) fn not_unique<T: Entity>(row: &T, operation: &'static str, rows: usize, at: Place) -> Error {
    Error::NotUnique { entity: T::NAME, key: format!("{:?}", row.id()), operation, rows, at, undo: Undo::default() }
}

pub(super) fn stale<T: Entity>(key: String, operation: &'static str, at: Place) -> Error {
    Error::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() }
}

/// Locks the rows of the UPDATEs and DELETEs in the order of their keys, if more than one statement would lock them.
pub(super) fn lock<C: 'static, T: Persist<C>>(
    map: &IdentityMap<C, T>,
    executor: &dyn Executor<C>,
    is_pending: IsPending<'_>,
) -> Result<()> {
    if T::MAX_LOCK_ROWS == 0 {
        return Ok(());
    }
    let changed = changed_rows(map, None, executor.at())?;
    let some_depend = changed.iter().any(|row| depends_on_insert(map, &*row.old, &*row.new, is_pending));
    let deleted: Vec<Rc<T>> = map.deletes.borrow().rows.iter().map(|row| row.value.borrow().clone()).collect();
    let locked_by_update = deleted.is_empty()
        && !some_depend
        && changed.len() <= T::MAX_UPDATE_ROWS
        && changed.windows(2).all(|pair| pair[0].shares_statement::<C>(&pair[1]));
    if locked_by_update || changed.len() + deleted.len() < 2 {
        return Ok(());
    }
    if changed.is_empty() && !map.may_lock(executor)? {
        return Ok(());
    }
    let rows: Vec<&T> = changed.iter().map(|row| &*row.old).chain(deleted.iter().map(|row| &**row)).collect();
    for chunk in rows.chunks(T::MAX_LOCK_ROWS) {
        execute(executor, StatementKind::Change, |conn| T::lock(conn, chunk, changed.is_empty()))?;
    }
    Ok(())
}
