//! The new rows of one entity that wait for their INSERT, in the order of `add`.

use std::any::Any;
use std::collections::HashMap;
use std::rc::Rc;

use super::entity::{Entity, Insert, NewEntity, Persist};
use super::executor::StatementKind;
use super::identity_map::IdentityMap;
use super::key_comparison::normalized_key;
use super::relations::Reference;
use super::returned_rows::match_rows;
use super::tracked_row::TrackedRow;
use super::updates::IsPending;
use crate::error::{Details, Error, Result, SourceLocation, Undo};
use crate::panic::{drop_catching_panic, drop_each_catching_panics};

/// The pending inserts of any entity.
pub(super) trait AnyInserts {
    /// The number of pending inserts.
    fn pending_count(&self) -> usize;
    /// The error for pending inserts whose foreign keys stay unknown.
    fn unresolved_keys(&self, at: SourceLocation) -> Error;
    /// Whether a reference with this key may be to a row that waits for its INSERT.
    fn may_be_pending(&self, key: &dyn Any) -> bool;
    /// Inserts the rows that refer to no pending row. Returns the number of inserted rows.
    fn insert_ready(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<usize>;
}

/// A new row of any type of new rows of one entity, and its tracked row.
pub(super) type PendingInsert<C, T> = (Rc<dyn NewRow<C, T>>, Rc<TrackedRow<T>>);

/// A new row of any type of new rows of one entity.
pub(super) trait NewRow<C, T: Entity>: Any {
    fn is_ready(&self) -> bool;
    fn known_key(&self) -> Option<T::Id>;
    fn known_references(&self) -> Vec<Reference>;
    fn estimated_bytes(&self) -> usize;
    /// Maximum number of rows of this type in one INSERT.
    fn max_rows(&self) -> usize;
    /// Inserts rows of this type by one statement. Returns the rows as the database has stored them, in the order of
    /// `rows`.
    fn insert(&self, rows: &[PendingInsert<C, T>], map: &IdentityMap<C, T>, at: SourceLocation) -> Result<Vec<T>>;
}

impl<C: 'static, N: Insert<C>> NewRow<C, N::Entity> for N {
    fn is_ready(&self) -> bool {
        NewEntity::is_ready(self)
    }

    fn known_key(&self) -> Option<<N::Entity as Entity>::Id> {
        self.key()
    }

    fn known_references(&self) -> Vec<Reference> {
        self.references()
    }

    fn estimated_bytes(&self) -> usize {
        self.bytes()
    }

    fn max_rows(&self) -> usize {
        if N::in_batches() { N::MAX_INSERT_ROWS.max(1) } else { 1 }
    }

    fn insert(
        &self,
        rows: &[PendingInsert<C, N::Entity>],
        map: &IdentityMap<C, N::Entity>,
        at: SourceLocation,
    ) -> Result<Vec<N::Entity>> {
        let sent: Vec<&N> = rows.iter().filter_map(|(new, _)| (&**new as &dyn Any).downcast_ref()).collect();
        let (entity, undo) = (N::Entity::NAME, Undo::default());
        if map.is_mysql && sent.iter().any(|new| new.key().is_none()) && !map.unit_state().note_auto_increment_insert()
        {
            map.change(at, |conn| N::Entity::reset_last_insert_id(conn))?;
        }
        let returned = map.execute(StatementKind::insert::<N>(), at, |conn| {
            <N as Insert<C>>::insert(conn, &sent, !map.is_mysql).map_err(|error| explain_unreadable(entity, error))
        })?;
        if returned.len() != sent.len() {
            let (sent, returned) = (sent.len(), returned.len());
            return Err(Details::NotReturned { entity, sent, returned, at, undo }.into());
        }
        match_rows(&sent, returned).ok_or(Error::from(Details::UnmatchedRows { entity, at, undo }))
    }
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

impl<C: 'static, T: Persist<C>> AnyInserts for IdentityMap<C, T> {
    fn pending_count(&self) -> usize {
        self.pending_inserts.borrow().len()
    }

    fn unresolved_keys(&self, at: SourceLocation) -> Error {
        Details::UnresolvedKeys { entity: T::NAME, rows: self.pending_count(), at, undo: Undo::default() }.into()
    }

    fn may_be_pending(&self, key: &dyn Any) -> bool {
        if self.pending_count() == 0 {
            return false;
        }
        // A foreign key to a column other than the key may refer to any pending row.
        let Some(id) = key.downcast_ref::<T::Id>() else { return true };
        let mut keys = self.pending_keys.borrow_mut();
        let keys = keys.get_or_insert_with(|| {
            let pending = self.pending_inserts.borrow();
            pending.values().filter_map(|(new, _)| new.known_key()).map(|key| normalized_key(&key)).collect()
        });
        !keys.is_empty() && keys.contains(&normalized_key(id))
    }

    fn insert_ready(&self, is_pending: IsPending<'_>, at: SourceLocation) -> Result<usize> {
        let ready = self.ready_inserts(is_pending);
        self.reserve(ready.len());
        let mut remaining = &ready[..];
        while !remaining.is_empty() {
            let chunk = self.first_chunk(remaining, at)?;
            remaining = &remaining[chunk.len().max(1)..];
            if let Some((new, _)) = chunk.first() {
                let rows = new.insert(&chunk, self, at)?;
                std::iter::zip(rows, &chunk).for_each(|(row, (_, tracked))| self.inserted(tracked, row));
            }
            // If the statement or code of the program has failed before, the rows are still pending.
            chunk.iter().for_each(|(_, tracked)| self.remove_pending(tracked));
            drop_each_catching_panics(chunk);
        }
        self.pending_keys.take();
        Ok(ready.len())
    }
}

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    pub(super) fn pending_rows(&self) -> Vec<Rc<TrackedRow<T>>> {
        self.pending_inserts.borrow().values().map(|(_, tracked)| Rc::clone(tracked)).collect()
    }

    /// The numbers of the rows that can be inserted now, those that refer to no other pending row. The order is that of
    /// `add`, except that a row follows the rows that it refers to.
    fn ready_inserts(&self, is_pending: IsPending<'_>) -> Vec<u64> {
        let pending = self.pending_inserts.borrow();
        let ready: Vec<_> = pending.iter().filter(|(_, (new, _))| new.is_ready()).collect();
        let is_pending = |to: &Reference| is_pending.is_some_and(|is_pending| is_pending(to));
        let references = |new: &dyn NewRow<C, T>| new.known_references().into_iter().filter(&is_pending).collect();
        let references: Vec<Vec<Reference>> = ready.iter().map(|(_, (new, _))| references(&**new)).collect();
        let mut indices: HashMap<String, usize> = HashMap::new();
        if !references.iter().all(Vec::is_empty) {
            let keys = ready.iter().enumerate().filter_map(|(index, (_, (new, _)))| Some((new.known_key()?, index)));
            indices.extend(keys.map(|(key, index)| (normalized_key(&key), index)));
        }
        let parent = |to: &Reference| {
            let key = to.key.downcast_ref::<T::Id>().filter(|_| to.parent == T::table())?;
            indices.get(&normalized_key(key)).copied()
        };
        // For each row, the rows that it refers to. None: such a row is not ready.
        let parents: Vec<Vec<Option<usize>>> =
            references.iter().map(|references| references.iter().map(parent).collect()).collect();
        // Whether each row that was visited is taken: all rows that it refers to are taken.
        let mut is_taken: Vec<Option<bool>> = vec![None; ready.len()];
        let mut ordered = Vec::with_capacity(ready.len());
        for index in 0..ready.len() {
            let mut path = if is_taken[index].is_none() { vec![index] } else { Vec::new() };
            while let Some(&row) = path.last() {
                is_taken[row] = Some(false);
                if let Some(&parent) = parents[row].iter().flatten().find(|&&parent| is_taken[parent].is_none()) {
                    path.push(parent);
                    continue;
                }
                path.pop();
                // A row may refer to itself.
                let is_before = |parent: usize| parent == row || is_taken[parent] == Some(true);
                if parents[row].iter().all(|parent| parent.is_some_and(is_before)) {
                    is_taken[row] = Some(true);
                    ordered.push(*ready[row].0);
                }
            }
        }
        ordered
    }

    /// The first of these pending inserts, as many as fit into one statement.
    fn first_chunk(&self, numbers: &[u64], at: SourceLocation) -> Result<Vec<PendingInsert<C, T>>> {
        let row_type = |insert: &PendingInsert<C, T>| (&*insert.0 as &dyn Any).type_id();
        let mut chunk: Vec<PendingInsert<C, T>> = Vec::new();
        for insert in numbers.iter().map_while(|number| self.pending_inserts.borrow().get(number).cloned()) {
            if chunk
                .first()
                .is_some_and(|first| chunk.len() == first.0.max_rows() || row_type(first) != row_type(&insert))
            {
                break;
            }
            chunk.push(insert);
        }
        let bytes: Vec<usize> = chunk.iter().map(|(new, _)| new.estimated_bytes()).collect();
        let first = bytes.first().copied().unwrap_or(0);
        let limit = self.statement_limit(bytes.iter().sum(), first, || None, at)?;
        chunk.truncate(fitting(&bytes, limit));
        Ok(chunk)
    }

    /// Removes a row from the pending inserts.
    pub(super) fn remove_pending(&self, tracked: &TrackedRow<T>) {
        let removed = self.pending_inserts.borrow_mut().remove(&tracked.list_number.get());
        drop_catching_panic(removed.map(|(new, _)| new));
    }

    pub(super) fn discard_pending_inserts(&self) {
        let (new, tracked_rows): (Vec<_>, Vec<_>) = self.pending_inserts.take().into_values().unzip();
        // The new rows may have a `Drop` of the program.
        drop_each_catching_panics(new);
        tracked_rows.iter().for_each(|tracked| tracked.discard());
        drop_each_catching_panics(tracked_rows);
    }
}

/// How many values of these sizes, at least one, fit into a statement. The sizes are estimates, so a quarter of the
/// limit is kept in reserve.
pub(super) fn fitting(bytes: &[usize], limit: usize) -> usize {
    let mut available = limit / 4 * 3;
    let fits = bytes.iter().take_while(|&&bytes| {
        let fits = bytes <= available;
        available = available.saturating_sub(bytes);
        fits
    });
    fits.count().max(1)
}
