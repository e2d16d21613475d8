//! The new rows of one type that wait for their INSERT, in the order of `add`.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use super::entity::{Entity, Insert, NewEntity, Persist};
use super::executor::{Executor, StatementKind, execute};
use super::identity_map::IdentityMap;
use super::key_comparison::normalized_key;
use super::relations::Reference;
use super::returned_rows::match_rows;
use super::tracked_row::TrackedRow;
use super::updates::IsPending;
use crate::error::{Error, Result, Undo};
use crate::panic::{drop_catching_panic, drop_each_catching_panics};

pub(super) struct PendingInserts<N: NewEntity> {
    /// The rows by their list number.
    rows: RefCell<BTreeMap<u64, PendingInsert<N>>>,
}

type PendingInsert<N> = (N, Rc<TrackedRow<<N as NewEntity>::Entity>>);

/// How many of these rows, at least one, fit into one statement.
fn chunk_length<C: 'static, N: Insert<C>>(
    rows: &[PendingInsert<N>],
    map: &IdentityMap<C, N::Entity>,
    executor: &dyn Executor<C>,
) -> Result<usize> {
    if executor.has_returning() {
        return Ok(rows.len());
    }
    let bytes: Vec<usize> = rows.iter().map(|(new, _)| new.bytes()).collect();
    let limit = map.max_statement_bytes(bytes.iter().sum(), executor)?;
    if bytes[0] > limit {
        let (entity, bytes, undo) = (N::Entity::NAME, bytes[0], Undo::default());
        return Err(Error::RowTooLarge { entity, key: None, bytes, limit, at: executor.at(), undo });
    }
    // The sizes are estimates, so a quarter of the limit is kept in reserve.
    let mut available = limit / 4 * 3;
    let fits = bytes.iter().take_while(|&&bytes| {
        let fits = bytes <= available;
        available = available.saturating_sub(bytes);
        fits
    });
    Ok(fits.count().max(1))
}

/// Inserts rows by one statement. Returns the rows as the database has stored them, in the order of `rows`.
fn insert<C: 'static, N: Insert<C>>(
    rows: &[PendingInsert<N>],
    map: &IdentityMap<C, N::Entity>,
    executor: &dyn Executor<C>,
) -> Result<Vec<N::Entity>> {
    let sent: Vec<&N> = rows.iter().map(|(new, _)| new).collect();
    let entity = N::Entity::NAME;
    if !executor.has_returning()
        && sent.iter().any(|new| new.key().is_none())
        && !map.entity_state.unit_state.note_auto_increment_insert()
    {
        execute(executor, StatementKind::Change, |conn| N::Entity::reset_last_insert_id(conn))?;
    }
    let returned = execute(executor, StatementKind::insert::<N>(), |conn| {
        N::insert(conn, &sent, executor.has_returning()).map_err(|error| explain_unreadable(entity, error))
    })?;
    if returned.len() != sent.len() {
        let (sent, returned, at, undo) = (sent.len(), returned.len(), executor.at(), Undo::default());
        return Err(Error::NotReturned { entity, sent, returned, at, undo });
    }
    match_rows(&sent, returned).ok_or(Error::Unpaired { entity, at: executor.at(), undo: Undo::default() })
}

/// Explains why a returned row cannot be read as the entity.
fn explain_unreadable(entity: &str, error: diesel::result::Error) -> diesel::result::Error {
    match error {
        diesel::result::Error::DeserializationError(source) => diesel::result::Error::DeserializationError(
            format!(
                "a new row of `{entity}` was inserted, and what the INSERT gave back cannot be read: {source}. An INSERT gives back the \
                 values from before AFTER triggers. If such a trigger sets the column, let the column have a DEFAULT or a BEFORE \
                 trigger, or make the field an `Option` and `refresh` the row"
            )
            .into(),
        ),
        error => error,
    }
}

/// Rows that are being inserted. After an error or a panic, the rows that were not inserted return to the pending
/// inserts.
struct InFlight<'q, N: NewEntity> {
    pending: &'q PendingInserts<N>,
    rows: Vec<PendingInsert<N>>,
    inserted: usize,
}

impl<N: NewEntity> Drop for InFlight<'_, N> {
    fn drop(&mut self) {
        if self.inserted < self.rows.len() {
            let back = self.rows.drain(self.inserted..).map(|insert| (insert.1.list_number(), insert));
            self.pending.rows.borrow_mut().extend(back);
        }
        // The values of the inserted rows may have a `Drop` of the program.
        drop_each_catching_panics(std::mem::take(&mut self.rows));
    }
}

/// Pending inserts of any type of new rows of one entity.
pub(super) trait AnyPendingInserts<C, T: Entity> {
    fn len(&self) -> usize;

    fn tracked_rows(&self) -> Vec<Rc<TrackedRow<T>>>;

    /// Inserts the rows that refer to no pending row. Returns the number of inserted rows.
    fn insert_ready(
        &self,
        map: &IdentityMap<C, T>,
        is_pending: IsPending<'_>,
        executor: &dyn Executor<C>,
    ) -> Result<usize>;

    /// The normalized keys that the program has made.
    fn keys(&self) -> Vec<String>;

    fn remove(&self, tracked: &Rc<TrackedRow<T>>);

    fn clear(&self) -> Vec<Rc<TrackedRow<T>>>;

    fn as_any(&self) -> &dyn Any;
}

impl<N: NewEntity> PendingInserts<N> {
    pub(super) fn new() -> Self {
        Self { rows: RefCell::default() }
    }

    /// Removes and returns the rows that can be inserted now. A row follows the rows that it refers to.
    fn take_ready(&self, is_pending: IsPending<'_>) -> Vec<PendingInsert<N>> {
        let rows = self.rows.borrow();
        let ready: Vec<u64> = rows.iter().filter(|(_, (new, _))| new.is_ready()).map(|(number, _)| *number).collect();
        let ready = match is_pending {
            Some(is_pending) => Self::in_order(&rows, ready, is_pending),
            None => ready,
        };
        let takes_all = ready.len() == rows.len() && ready.is_sorted();
        drop(rows);
        if takes_all {
            return self.rows.take().into_values().collect();
        }
        let mut rows = self.rows.borrow_mut();
        ready.iter().filter_map(|number| rows.remove(number)).collect()
    }

    /// The rows of `ready` that refer to no pending row outside of `ready`. The order is that of `add`, except that a
    /// row follows the rows that it refers to.
    fn in_order(
        rows: &BTreeMap<u64, PendingInsert<N>>,
        ready: Vec<u64>,
        is_pending: &dyn Fn(&Reference) -> bool,
    ) -> Vec<u64> {
        // The foreign keys to pending rows.
        let references: Vec<Vec<Reference>> = ready
            .iter()
            .map(|number| rows[number].0.references().into_iter().filter(|to| is_pending(to)).collect())
            .collect();
        if references.iter().all(Vec::is_empty) {
            return ready;
        }
        let mut indices: HashMap<String, usize> = HashMap::with_capacity(ready.len());
        for (index, number) in ready.iter().enumerate() {
            if let Some(key) = rows[number].0.key() {
                indices.entry(normalized_key(&key)).or_insert(index);
            }
        }
        // None: the row refers to a pending row outside of `ready`.
        let parents = |references: &[Reference]| -> Option<Vec<usize>> {
            references
                .iter()
                .map(|to| {
                    let key = to
                        .key
                        .downcast_ref::<<N::Entity as Entity>::Id>()
                        .filter(|_| to.parent == N::Entity::table())?;
                    indices.get(&normalized_key(key)).copied()
                })
                .collect()
        };
        let parents: Vec<Option<Vec<usize>>> = references.iter().map(|references| parents(references)).collect();
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); ready.len()];
        let mut remaining_parents: Vec<usize> = vec![0; ready.len()];
        for (index, parents) in parents.iter().enumerate() {
            match parents {
                // A row may refer to itself, which delays nothing.
                Some(parents) => parents.iter().filter(|&&parent| parent != index).for_each(|&parent| {
                    children[parent].push(index);
                    remaining_parents[index] += 1;
                }),
                None => remaining_parents[index] = usize::MAX,
            }
        }
        let mut free: BTreeSet<usize> = (0..ready.len()).filter(|&index| remaining_parents[index] == 0).collect();
        let mut ordered = Vec::with_capacity(ready.len());
        while let Some(index) = free.pop_first() {
            ordered.push(ready[index]);
            for &child in &children[index] {
                if remaining_parents[child] != usize::MAX {
                    remaining_parents[child] -= 1;
                    if remaining_parents[child] == 0 {
                        free.insert(child);
                    }
                }
            }
        }
        ordered
    }

    pub(super) fn push(&self, new: N, tracked: &Rc<TrackedRow<N::Entity>>) {
        self.rows.borrow_mut().insert(tracked.assign_list_number(), (new, Rc::clone(tracked)));
    }
}

impl<C, N> AnyPendingInserts<C, N::Entity> for PendingInserts<N>
where
    N: Insert<C>,
    C: 'static,
{
    fn len(&self) -> usize {
        self.rows.borrow().len()
    }

    fn tracked_rows(&self) -> Vec<Rc<TrackedRow<N::Entity>>> {
        self.rows.borrow().values().map(|(_, tracked)| Rc::clone(tracked)).collect()
    }

    fn insert_ready(
        &self,
        map: &IdentityMap<C, N::Entity>,
        is_pending: IsPending<'_>,
        executor: &dyn Executor<C>,
    ) -> Result<usize> {
        let mut in_flight = InFlight { pending: self, rows: self.take_ready(is_pending), inserted: 0 };
        map.reserve(in_flight.rows.len());
        let max_rows = if N::in_batches() { N::MAX_INSERT_ROWS.max(1) } else { 1 };
        while in_flight.inserted < in_flight.rows.len() {
            let remaining = &in_flight.rows[in_flight.inserted..];
            let chunk = &remaining[..chunk_length(&remaining[..max_rows.min(remaining.len())], map, executor)?];
            let rows = insert(chunk, map, executor)?;
            let length = chunk.len();
            rows.into_iter().zip(chunk).for_each(|(row, (_, tracked))| map.inserted(tracked, row));
            in_flight.inserted += length;
        }
        Ok(in_flight.inserted)
    }

    fn keys(&self) -> Vec<String> {
        self.rows.borrow().values().filter_map(|(new, _)| new.key()).map(|key| normalized_key(&key)).collect()
    }

    fn remove(&self, tracked: &Rc<TrackedRow<N::Entity>>) {
        let removed = self.rows.borrow_mut().remove(&tracked.list_number());
        drop_catching_panic(removed.map(|(new, _)| new));
    }

    fn clear(&self) -> Vec<Rc<TrackedRow<N::Entity>>> {
        let (new, tracked_rows): (Vec<N>, Vec<_>) = self.rows.take().into_values().unzip();
        // The new rows may have a `Drop` of the program.
        drop_each_catching_panics(new);
        tracked_rows
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
