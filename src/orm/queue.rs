//! New rows of one type that wait for their INSERT, in the order of `add`.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::entity::{Entity, Insert, NewEntity};
use super::entry::Entry;
use super::identity::Store;
use super::pairing::pair;
use super::relation::alike;
use super::sender::{Sender, Sending, ask};
use crate::contain::{drop_contained, drop_each};
use crate::error::{Error, Result, Undo};

pub(super) struct Queue<N: NewEntity> {
    /// By the number under which the entry is listed.
    rows: RefCell<BTreeMap<u64, Waiting<N>>>,
}

type Waiting<N> = (N, Rc<Entry<<N as NewEntity>::Entity>>);

/// How many of these rows, at least one, fit into one statement.
fn fitting<C: 'static, N: Insert<C>>(
    rows: &[Waiting<N>],
    store: &Store<C, N::Entity>,
    sender: &dyn Sender<C>,
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
fn inserted<C: 'static, N: Insert<C>>(rows: &[Waiting<N>], sender: &dyn Sender<C>) -> Result<Vec<N::Entity>> {
    let sent: Vec<&N> = rows.iter().map(|(new, _)| new).collect();
    let entity = N::Entity::NAME;
    let returned = ask(sender, Sending::insert::<N>(), |conn| {
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
        drop_each(std::mem::take(&mut self.rows));
    }
}

/// A queue of whatever new rows of one entity.
pub(super) trait DynQueue<C, T: Entity> {
    fn len(&self) -> usize;

    fn entries(&self) -> Vec<Rc<Entry<T>>>;

    /// Inserts what refers to no row that waits itself; how many those were.
    fn insert_ready(&self, store: &Store<C, T>, sender: &dyn Sender<C>) -> Result<usize>;

    /// The keys that the program has made.
    fn keys(&self) -> Vec<String>;

    /// Takes one out.
    fn remove(&self, entry: &Rc<Entry<T>>);

    fn clear(&self) -> Vec<Rc<Entry<T>>>;

    fn as_any(&self) -> &dyn Any;
}

impl<N: NewEntity> Queue<N> {
    pub(super) fn new() -> Self {
        Self { rows: RefCell::default() }
    }

    pub(super) fn push(&self, new: N, entry: &Rc<Entry<N::Entity>>) {
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

    fn entries(&self) -> Vec<Rc<Entry<N::Entity>>> {
        self.rows.borrow().values().map(|(_, entry)| Rc::clone(entry)).collect()
    }

    fn insert_ready(&self, store: &Store<C, N::Entity>, sender: &dyn Sender<C>) -> Result<usize> {
        let mut taken = Taken { queue: self, rows: self.rows.take().into_values().collect(), inserted: 0 };
        if !taken.rows.iter().all(|(new, _)| new.is_ready()) {
            let (ready, waiting): (Vec<_>, Vec<_>) =
                std::mem::take(&mut taken.rows).into_iter().partition(|(new, _)| new.is_ready());
            taken.rows = ready;
            self.rows.borrow_mut().extend(waiting.into_iter().map(|waiting| (waiting.1.listed_as(), waiting)));
        }
        store.reserve(taken.rows.len());
        let most = if N::in_batches() { N::ROWS.max(1) } else { 1 };
        while taken.inserted < taken.rows.len() {
            let left = &taken.rows[taken.inserted..];
            let chunk = &left[..fitting(&left[..most.min(left.len())], store, sender)?];
            let rows = inserted(chunk, sender)?;
            let length = chunk.len();
            rows.into_iter().zip(chunk).for_each(|(row, (_, entry))| store.inserted(entry, row));
            taken.inserted += length;
        }
        Ok(taken.inserted)
    }

    fn keys(&self) -> Vec<String> {
        self.rows.borrow().values().filter_map(|(new, _)| new.key()).map(|key| alike(&key)).collect()
    }

    fn remove(&self, entry: &Rc<Entry<N::Entity>>) {
        let removed = self.rows.borrow_mut().remove(&entry.listed_as());
        drop_contained(removed.map(|(new, _)| new));
    }

    fn clear(&self) -> Vec<Rc<Entry<N::Entity>>> {
        let (new, entries): (Vec<N>, Vec<_>) = self.rows.take().into_values().unzip();
        // What a new row owns may have a drop of the program's own.
        drop_each(new);
        entries
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
