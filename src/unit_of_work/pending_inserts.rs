//! New rows of one type that wait for their INSERT, in the order of `add`.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use super::entity::{Entity, Insert, NewEntity, Persist};
use super::executor::{Executor, StatementKind, ask};
use super::identity_map::IdentityMap;
use super::relation::{Reference, alike};
use super::returned_rows::pair;
use super::tracked_row::TrackedRow;
use super::writes::Depends;
use crate::error::{Error, Result, Undo};
use crate::panic::{drop_catching_panic, drop_each_catching_panics};

pub(super) struct Queue<N: NewEntity> {
    /// By the number under which the entry is listed.
    rows: RefCell<BTreeMap<u64, Waiting<N>>>,
}

type Waiting<N> = (N, Rc<TrackedRow<<N as NewEntity>::Entity>>);

/// How many of these rows, at least one, fit into one statement.
fn fitting<C: 'static, N: Insert<C>>(
    rows: &[Waiting<N>],
    store: &IdentityMap<C, N::Entity>,
    sender: &dyn Executor<C>,
) -> Result<usize> {
    if sender.returning() {
        return Ok(rows.len());
    }
    let bytes: Vec<usize> = rows.iter().map(|(new, _)| new.bytes()).collect();
    let limit = store.most_bytes(bytes.iter().sum(), sender)?;
    if bytes[0] > limit {
        let (entity, bytes, undo) = (N::Entity::NAME, bytes[0], Undo::default());
        return Err(Error::RowTooLarge { entity, key: None, bytes, limit, at: sender.at(), undo });
    }
    // What cannot be told of the sizes has to fit as well.
    let mut left = limit / 4 * 3;
    let fits = bytes.iter().take_while(|&&bytes| {
        let fits = bytes <= left;
        left = left.saturating_sub(bytes);
        fits
    });
    Ok(fits.count().max(1))
}

/// Inserts rows by one statement, and gives what the database has of each.
fn inserted<C: 'static, N: Insert<C>>(
    rows: &[Waiting<N>],
    store: &IdentityMap<C, N::Entity>,
    sender: &dyn Executor<C>,
) -> Result<Vec<N::Entity>> {
    let sent: Vec<&N> = rows.iter().map(|(new, _)| new).collect();
    let entity = N::Entity::NAME;
    if !sender.returning() && sent.iter().any(|new| new.key().is_none()) && !store.home.unit_state.counts_now() {
        ask(sender, StatementKind::Change, |conn| N::Entity::forget_counted(conn))?;
    }
    let returned = ask(sender, StatementKind::insert::<N>(), |conn| {
        N::insert(conn, &sent, sender.returning()).map_err(|error| unreadable(entity, error))
    })?;
    if returned.len() != sent.len() {
        let (sent, returned, at, undo) = (sent.len(), returned.len(), sender.at(), Undo::default());
        return Err(Error::NotReturned { entity, sent, returned, at, undo });
    }
    pair(&sent, returned).ok_or(Error::Unpaired { entity, at: sender.at(), undo: Undo::default() })
}

/// A row that came back and cannot be read as the entity.
fn unreadable(entity: &str, error: diesel::result::Error) -> diesel::result::Error {
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

/// Rows on their way. Those that did not get there, by an error or a panic, go back to their place.
struct Taken<'q, N: NewEntity> {
    queue: &'q Queue<N>,
    rows: Vec<Waiting<N>>,
    inserted: usize,
}

impl<N: NewEntity> Drop for Taken<'_, N> {
    fn drop(&mut self) {
        if self.inserted < self.rows.len() {
            let back = self.rows.drain(self.inserted..).map(|waiting| (waiting.1.listed_as(), waiting));
            self.queue.rows.borrow_mut().extend(back);
        }
        // Those that got there. What a new row owns may have a drop of the program's own.
        drop_each_catching_panics(std::mem::take(&mut self.rows));
    }
}

/// A queue of whatever new rows of one entity.
pub(super) trait DynQueue<C, T: Entity> {
    fn len(&self) -> usize;

    fn entries(&self) -> Vec<Rc<TrackedRow<T>>>;

    /// Inserts what refers to no row that waits itself; how many those were.
    fn insert_ready(&self, store: &IdentityMap<C, T>, waiting: Depends<'_>, sender: &dyn Executor<C>) -> Result<usize>;

    /// The keys that the program has made.
    fn keys(&self) -> Vec<String>;

    /// Takes one out.
    fn remove(&self, entry: &Rc<TrackedRow<T>>);

    fn clear(&self) -> Vec<Rc<TrackedRow<T>>>;

    fn as_any(&self) -> &dyn Any;
}

impl<N: NewEntity> Queue<N> {
    pub(super) fn new() -> Self {
        Self { rows: RefCell::default() }
    }

    /// Takes out the rows that can be inserted now, in an order in which a row comes after those that it refers to.
    fn take_ready(&self, waiting: Depends<'_>) -> Vec<Waiting<N>> {
        let rows = self.rows.borrow();
        let ready: Vec<u64> = rows.iter().filter(|(_, (new, _))| new.is_ready()).map(|(number, _)| *number).collect();
        let ready = match waiting {
            Some(waiting) => Self::in_order(&rows, ready, waiting),
            None => ready,
        };
        let all = ready.len() == rows.len() && ready.is_sorted();
        drop(rows);
        if all {
            return self.rows.take().into_values().collect();
        }
        let mut rows = self.rows.borrow_mut();
        ready.iter().filter_map(|number| rows.remove(number)).collect()
    }

    /// Of these rows those that refer to none that waits elsewhere. The order is that of `add` as far as it can be.
    fn in_order(rows: &BTreeMap<u64, Waiting<N>>, ready: Vec<u64>, waiting: &dyn Fn(&Reference) -> bool) -> Vec<u64> {
        // Foreign keys to rows that wait, and the keys of the rows themselves once one of those is met.
        let references: Vec<Vec<Reference>> = ready
            .iter()
            .map(|number| rows[number].0.references().into_iter().filter(|to| waiting(to)).collect())
            .collect();
        if references.iter().all(Vec::is_empty) {
            return ready;
        }
        let mut places: HashMap<String, usize> = HashMap::with_capacity(ready.len());
        for (place, number) in ready.iter().enumerate() {
            if let Some(key) = rows[number].0.key() {
                places.entry(alike(&key)).or_insert(place);
            }
        }
        // None: it refers to a row that waits elsewhere.
        let parents = |references: &[Reference]| -> Option<Vec<usize>> {
            references
                .iter()
                .map(|to| {
                    let key = to
                        .key
                        .downcast_ref::<<N::Entity as Entity>::Id>()
                        .filter(|_| to.parent == N::Entity::table())?;
                    places.get(&alike(key)).copied()
                })
                .collect()
        };
        let parents: Vec<Option<Vec<usize>>> = references.iter().map(|references| parents(references)).collect();
        let mut children: Vec<Vec<usize>> = vec![Vec::new(); ready.len()];
        let mut left: Vec<usize> = vec![0; ready.len()];
        for (place, parents) in parents.iter().enumerate() {
            match parents {
                // A row may refer to itself.
                Some(parents) => parents.iter().filter(|&&parent| parent != place).for_each(|&parent| {
                    children[parent].push(place);
                    left[place] += 1;
                }),
                None => left[place] = usize::MAX,
            }
        }
        let mut free: BTreeSet<usize> = (0..ready.len()).filter(|&place| left[place] == 0).collect();
        let mut ordered = Vec::with_capacity(ready.len());
        while let Some(place) = free.pop_first() {
            ordered.push(ready[place]);
            for &child in &children[place] {
                if left[child] != usize::MAX {
                    left[child] -= 1;
                    if left[child] == 0 {
                        free.insert(child);
                    }
                }
            }
        }
        ordered
    }

    pub(super) fn push(&self, new: N, entry: &Rc<TrackedRow<N::Entity>>) {
        self.rows.borrow_mut().insert(entry.list(), (new, Rc::clone(entry)));
    }
}

impl<C, N> DynQueue<C, N::Entity> for Queue<N>
where
    N: Insert<C>,
    C: 'static,
{
    fn len(&self) -> usize {
        self.rows.borrow().len()
    }

    fn entries(&self) -> Vec<Rc<TrackedRow<N::Entity>>> {
        self.rows.borrow().values().map(|(_, entry)| Rc::clone(entry)).collect()
    }

    fn insert_ready(
        &self,
        store: &IdentityMap<C, N::Entity>,
        waiting: Depends<'_>,
        sender: &dyn Executor<C>,
    ) -> Result<usize> {
        let mut taken = Taken { queue: self, rows: self.take_ready(waiting), inserted: 0 };
        store.reserve(taken.rows.len());
        let most = if N::in_batches() { N::ROWS.max(1) } else { 1 };
        while taken.inserted < taken.rows.len() {
            let left = &taken.rows[taken.inserted..];
            let chunk = &left[..fitting(&left[..most.min(left.len())], store, sender)?];
            let rows = inserted(chunk, store, sender)?;
            let length = chunk.len();
            rows.into_iter().zip(chunk).for_each(|(row, (_, entry))| store.inserted(entry, row));
            taken.inserted += length;
        }
        Ok(taken.inserted)
    }

    fn keys(&self) -> Vec<String> {
        self.rows.borrow().values().filter_map(|(new, _)| new.key()).map(|key| alike(&key)).collect()
    }

    fn remove(&self, entry: &Rc<TrackedRow<N::Entity>>) {
        let removed = self.rows.borrow_mut().remove(&entry.listed_as());
        drop_catching_panic(removed.map(|(new, _)| new));
    }

    fn clear(&self) -> Vec<Rc<TrackedRow<N::Entity>>> {
        let (new, entries): (Vec<N>, Vec<_>) = self.rows.take().into_values().unzip();
        // What a new row owns may have a drop of the program's own.
        drop_each_catching_panics(new);
        entries
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
