//! The UPDATEs and DELETEs of one entity.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::changes::ChangeKind;
use super::entity::{Columns, Entity, Persist};
use super::executor::{Executor, StatementKind, ask};
use super::identity_map::{AnyIdentityMap, IdentityMap};
use super::relation::{Reference, alike};
use super::tracked_row::{Phase, TrackedRow};
use crate::error::{Error, Place, Result, Undo};

/// A row that differs.
struct Written<T: Entity> {
    entry: Rc<TrackedRow<T>>,
    old: Rc<T>,
    new: Rc<T>,
    columns: Columns,
}

impl<T: Entity> Written<T> {
    fn goes_with<C>(&self, next: &Self) -> bool
    where
        T: Persist<C>,
    {
        self.columns == next.columns && !self.old.goes_alone() && !next.old.goes_alone()
    }
}

/// Whether a reference is to a row that waits for its INSERT.
pub(super) type Depends<'d> = Option<&'d dyn Fn(&Reference) -> bool>;

/// Whether an UPDATE has to wait for the INSERTs: it writes the key of a new row, or a new row has its own key.
fn depends<C: 'static, T: Persist<C>>(store: &IdentityMap<C, T>, old: &T, new: &T, depends: Depends<'_>) -> bool {
    depends.is_some_and(|depends| {
        AnyIdentityMap::is_waiting(store, &old.id())
            || T::moves(old, new).iter().any(|moved| moved.to.as_ref().is_some_and(depends))
    })
}

/// The rows that differ and depend on no row that waits for its INSERT, in the order of the first write.
fn written<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    waiting: Depends<'_>,
    at: Place,
) -> Result<Vec<Written<T>>> {
    let touched = store.home.touched();
    let mut written = Vec::new();
    for entry in touched {
        if entry.is_doomed() || entry.phase() != Phase::Kept {
            continue;
        }
        let (old, new) = entry.versions(at)?;
        let columns = if Rc::ptr_eq(&old, &new) { 0 } else { T::differences(&old, &new) };
        if columns != 0 && !depends(store, &*old, &*new, waiting) {
            written.push(Written { entry, old, new, columns });
        }
    }
    Ok(written)
}

/// Sends what differs and depends on no row that waits for its INSERT, in the order of the first write.
pub(super) fn update<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    waiting: Depends<'_>,
) -> Result<()> {
    let written = written(store, waiting, sender.at())?;
    let mut gone = vec![false; written.len()];
    let mut first = 0;
    // Neighbours that differ in the same columns go together.
    for alike in written.chunk_by(|one, next| one.goes_with::<C>(next)) {
        for chunk in alike.chunks(T::UPDATES.max(1)) {
            let gone = &mut gone[first..first + chunk.len()];
            match chunk {
                [one] => gone[0] = update_one(store, sender, one)?,
                several => update_many(store, sender, several, gone)?,
            }
            first += chunk.len();
        }
    }
    for (Written { entry, old, new, .. }, gone) in written.into_iter().zip(gone) {
        if gone {
            drop((old, new));
            store.gone_with_parent(&entry);
        } else {
            // Noted first: a clone of the row may panic, and the rollback that follows has to know that the UPDATE was sent.
            store.savepoint_log.note(ChangeKind::Update, &entry);
            drop((old, new));
            entry.settle(T::VERSIONED);
            store.home.untouch(&entry);
        }
    }
    // What is left is to be deleted, depends on an INSERT, or is as it was.
    for entry in store.home.touched() {
        let is_left = entry.phase() == Phase::Kept && (entry.is_doomed() || entry.differences() != 0);
        if !is_left {
            store.untouch(&entry);
        }
    }
    Ok(())
}

/// True if the row is gone because a row that it referred to was deleted.
fn update_one<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    row: &Written<T>,
) -> Result<bool> {
    if !sender.returning() {
        let bytes = row.new.bytes(row.columns);
        let limit = store.most_bytes(bytes, sender)?;
        if bytes > limit {
            let key = Some(format!("{:?}", row.old.id()));
            let (at, undo) = (sender.at(), Undo::default());
            return Err(Error::RowTooLarge { entity: T::NAME, key, bytes, limit, at, undo });
        }
    }
    match ask(sender, StatementKind::Change, |conn| T::update(conn, &row.old, &row.new))? {
        0 => is_gone_or_stale(store, sender, &row.old, "update"),
        1 => Ok(false),
        rows => Err(not_unique(&*row.old, "UPDATE", rows, sender.at())),
    }
}

fn update_many<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    rows: &[Written<T>],
    gone: &mut [bool],
) -> Result<()> {
    let pairs: Vec<(&T, &T)> = rows.iter().map(|row| (&*row.old, &*row.new)).collect();
    let found = ask(sender, StatementKind::Change, |conn| T::update_many(conn, &pairs, rows[0].columns))?;
    let mut counts = vec![0_usize; rows.len()];
    for place in found {
        if let Some(count) = counts.get_mut(place) {
            *count += 1;
        }
    }
    for (place, count) in counts.into_iter().enumerate() {
        match count {
            0 => gone[place] = is_gone_or_stale(store, sender, &rows[place].old, "update")?,
            1 => {}
            rows_changed => return Err(not_unique(&*rows[place].old, "UPDATE", rows_changed, sender.at())),
        }
    }
    Ok(())
}

/// After a statement that did not find a row. The row may have been deleted with a row that it refers to, as the program wanted.
fn is_gone_or_stale<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    row: &T,
    operation: &'static str,
) -> Result<bool> {
    let id = row.id();
    if store.may_be_gone(row) && ask(sender, StatementKind::select::<T>(), |conn| T::find(conn, &id))?.is_empty() {
        return Ok(true);
    }
    Err(stale::<T>(format!("{id:?}"), operation, sender.at()))
}

pub(super) fn not_unique<T: Entity>(row: &T, operation: &'static str, rows: usize, at: Place) -> Error {
    Error::NotUnique { entity: T::NAME, key: format!("{:?}", row.id()), operation, rows, at, undo: Undo::default() }
}

fn stale<T: Entity>(key: String, operation: &'static str, at: Place) -> Error {
    Error::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() }
}

/// Locks the rows that are updated and deleted in the order of their keys, if more than one statement will lock them.
pub(super) fn lock<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    waiting: Depends<'_>,
) -> Result<()> {
    if T::LOCKS == 0 {
        return Ok(());
    }
    let written = written(store, None, sender.at())?;
    let some_depend = written.iter().any(|row| depends(store, &*row.old, &*row.new, waiting));
    let doomed: Vec<Rc<T>> = store.deletes.borrow().rows.iter().map(|row| row.value.borrow().clone()).collect();
    let locked_by_update = doomed.is_empty()
        && !some_depend
        && written.len() <= T::UPDATES
        && written.windows(2).all(|pair| pair[0].goes_with::<C>(&pair[1]));
    if locked_by_update || written.len() + doomed.len() < 2 {
        return Ok(());
    }
    if written.is_empty() && !store.may_lock(sender)? {
        return Ok(());
    }
    let rows: Vec<&T> = written.iter().map(|row| &*row.old).chain(doomed.iter().map(|row| &**row)).collect();
    for chunk in rows.chunks(T::LOCKS) {
        ask(sender, StatementKind::Change, |conn| T::lock(conn, chunk, written.is_empty()))?;
    }
    Ok(())
}

/// The rows that a flush deletes.
pub(super) struct Deletes<T: Entity> {
    pub(super) rows: Vec<Doomed<T>>,
    /// Their places by their keys.
    places: HashMap<String, Vec<usize>>,
}

pub(super) struct Doomed<T: Entity> {
    pub(super) entry: Rc<TrackedRow<T>>,
    /// What the database has.
    value: RefCell<Rc<T>>,
    /// What the program has written to it.
    written: Option<Rc<T>>,
    /// It goes after the UPDATEs.
    late: Cell<bool>,
    done: Cell<bool>,
}

impl<T: Entity> Default for Deletes<T> {
    fn default() -> Self {
        Self { rows: Vec::new(), places: HashMap::new() }
    }
}

impl<T: Entity> Deletes<T> {
    pub(super) fn of(doomed: &[Rc<TrackedRow<T>>], at: Place) -> Result<Self> {
        let mut deletes = Self::default();
        for entry in doomed.iter().filter(|entry| entry.phase() == Phase::Kept) {
            let (value, written) = match entry.is_touched() {
                true => entry.versions(at).map(|(base, value)| (base, Some(value)))?,
                // A row that was written to is deleted by what the database has of it.
                false => {
                    let value = entry.value.try_borrow().ok().and_then(|value| value.clone());
                    (value.ok_or_else(|| entry.in_writing(at))?, None)
                }
            };
            deletes.places.entry(alike(&value.id())).or_default().push(deletes.rows.len());
            deletes.rows.push(Doomed {
                entry: Rc::clone(entry),
                value: RefCell::new(value),
                written,
                late: Cell::new(false),
                done: Cell::new(false),
            });
        }
        Ok(deletes)
    }

    /// Rows that are not deleted yet: the late ones, the early ones or all.
    pub(super) fn left(&self, late: Option<bool>) -> Vec<usize> {
        let wanted = |row: &Doomed<T>| !row.done.get() && late.is_none_or(|late| row.late.get() == late);
        (0..self.rows.len()).filter(|&place| wanted(&self.rows[place])).collect()
    }

    /// The rows of a key, which has another type if it is not that of this entity's key.
    pub(super) fn places_of(&self, key: &dyn Any) -> Vec<usize> {
        let Some(id) = key.downcast_ref::<T::Id>() else { return Vec::new() };
        let Some(places) = self.places.get(&alike(id)) else { return Vec::new() };
        let same: Vec<usize> =
            places.iter().copied().filter(|&place| self.rows[place].value.borrow().id() == *id).collect();
        if same.is_empty() { places.clone() } else { same }
    }

    pub(super) fn references_of(&self, place: usize) -> Vec<Reference> {
        self.rows[place].value.borrow().references()
    }

    pub(super) fn hold_back(&self, place: usize) {
        self.rows[place].late.set(true);
    }

    pub(super) fn release(&self) {
        self.rows.iter().for_each(|row| row.late.set(false));
    }
}

/// Sends what was written to foreign keys of a row that is to be deleted, if the row that it referred to is deleted as well, so that
/// the one does not wait for the other.
pub(super) fn send_moves<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    sender: &dyn Executor<C>,
    breaks_circle: &dyn Fn(&Reference) -> bool,
    waiting: &dyn Fn(&Reference) -> bool,
) -> Result<()> {
    for place in store.deletes.borrow().left(None) {
        let moved = {
            let deletes = store.deletes.borrow();
            let row = &deletes.rows[place];
            let Some(written) = &row.written else { continue };
            let value = Rc::clone(&row.value.borrow());
            let moves = T::moves(&value, written);
            let is_wanted = moves.iter().any(|moved| moved.from.as_ref().is_some_and(breaks_circle))
                && !moves.iter().any(|moved| moved.to.as_ref().is_some_and(waiting));
            is_wanted.then(|| {
                let mut moved = T::clone(&value);
                moved.take_references(written);
                moved
            })
        };
        if let Some(moved) = moved {
            rewrite(store, place, moved, sender)?;
        }
    }
    Ok(())
}

/// Sets foreign keys of a row that is to be deleted to NULL; false if none can be.
pub(super) fn unlink<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    place: usize,
    parents: &[TypeId],
    sender: &dyn Executor<C>,
) -> Result<bool> {
    let value = Rc::clone(&store.deletes.borrow().rows[place].value.borrow());
    let mut unlinked = T::clone(&value);
    unlinked.unlink(parents);
    if T::differences(&value, &unlinked) == 0 {
        return Ok(false);
    }
    rewrite(store, place, unlinked, sender)?;
    Ok(true)
}

/// Updates a row that is to be deleted. The handle keeps the value that it has.
fn rewrite<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    place: usize,
    mut new: T,
    sender: &dyn Executor<C>,
) -> Result<()> {
    let old = Rc::clone(&store.deletes.borrow().rows[place].value.borrow());
    match ask(sender, StatementKind::Change, |conn| T::update(conn, &old, &new))? {
        0 => is_gone_or_stale(store, sender, &old, "delete").map(drop)?,
        1 => {}
        rows => return Err(not_unique(&*old, "UPDATE", rows, sender.at())),
    }
    if T::VERSIONED {
        new.bump_version();
    }
    store.deletes.borrow().rows[place].value.replace(Rc::new(new));
    Ok(())
}

/// A row to be deleted: its place, its handle and its value in the database.
type Going<T> = (usize, Rc<TrackedRow<T>>, Rc<T>);

/// These rows, so many at a time as go with one statement.
fn chunks<'r, C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    mut rows: &'r [Going<T>],
    together: bool,
    sender: &dyn Executor<C>,
) -> Result<impl Iterator<Item = &'r [Going<T>]>> {
    let ids: Vec<T::Id> = rows.iter().map(|(_, _, value)| value.id()).collect();
    let lengths = store.lengths(&ids, if together { usize::MAX } else { T::DELETES }, sender)?;
    Ok(lengths.into_iter().map(move |length| rows.split_off(..length).unwrap_or_default()))
}

/// Deletes these rows; `together` is whether by one statement, as they refer to each other.
pub(super) fn delete<C: 'static, T: Persist<C>>(
    store: &IdentityMap<C, T>,
    places: &[usize],
    together: bool,
    sender: &dyn Executor<C>,
) -> Result<()> {
    let rows: Vec<Going<T>> = {
        let deletes = store.deletes.borrow();
        let row = |&place: &usize| {
            let row = &deletes.rows[place];
            (place, Rc::clone(&row.entry), Rc::clone(&row.value.borrow()))
        };
        places.iter().map(row).collect()
    };
    rows.iter().for_each(|(_, entry, _)| store.untouch(entry));
    // Rows that cannot be gone with others have statements of their own, so that it is known of which a row is missing.
    let refers_to_own = store.refers_to(T::table());
    let (loose, strict): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, _, value)| {
        together || (refers_to_own || store.has_lost_parents()) && !value.references().is_empty()
    });
    for (chunk, is_loose) in chunks(store, &strict, together, sender)?
        .map(|chunk| (chunk, false))
        .chain(chunks(store, &loose, together, sender)?.map(|chunk| (chunk, true)))
    {
        let values: Vec<&T> = chunk.iter().map(|(_, _, value)| &**value).collect();
        let deleted = ask(sender, StatementKind::Change, |conn| T::delete(conn, &values))?;
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
                at: sender.at(),
                undo: Undo::default(),
            });
        }
        if deleted < chunk.len() {
            let stale = |key| stale::<T>(key, "delete", sender.at());
            // Rows may have gone with others that this transaction, or this very statement, has deleted.
            if !is_loose || !store.has_lost_parents() && deleted == 0 {
                return Err(stale(key()));
            }
            let ids: Vec<T::Id> = values.iter().map(|value| value.id()).collect();
            for ids in ids.chunks(T::FINDS.max(1)) {
                let left = ask(sender, StatementKind::select::<T>(), |conn| T::find_many(conn, ids))?;
                if let Some(left) = left.first() {
                    return Err(stale(format!("{:?}", left.id())));
                }
            }
        }
        if refers_to_own && deleted > 0 {
            store.lose_parents();
        }
        for (place, entry, _) in chunk {
            store.deletes.borrow().rows[*place].done.set(true);
            store.deleted(entry);
            store.forget_doomed(entry);
        }
    }
    Ok(())
}
