//! New rows of one type that wait for their INSERT, in the order of `add`.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use super::entity::{Entity, Insert, NewEntity};
use super::entry::Entry;
use super::identity::Store;
use super::pairing::pair;
use super::sender::{Sender, Sending, ask};
use crate::error::{Error, Result};

pub(super) struct Queue<N: NewEntity> {
    rows: RefCell<Vec<Waiting<N>>>,
}

type Waiting<N> = (N, Rc<Entry<<N as NewEntity>::Entity>>);

/// Rows on their way. Those that did not get there, by an error or a panic, go back to their place.
struct Taken<'q, N: NewEntity> {
    queue: &'q Queue<N>,
    rows: Vec<Waiting<N>>,
    inserted: usize,
}

impl<N: NewEntity> Drop for Taken<'_, N> {
    fn drop(&mut self) {
        if self.inserted < self.rows.len() {
            self.queue.rows.borrow_mut().splice(..0, self.rows.drain(self.inserted..));
        }
    }
}

/// A queue of whatever new rows of one entity.
pub(super) trait DynQueue<C, T: Entity> {
    fn len(&self) -> usize;

    fn entries(&self) -> Vec<Rc<Entry<T>>>;

    /// Inserts what refers to no row that waits itself; how many those were.
    fn insert_ready(&self, store: &Store<C, T>, sender: &dyn Sender<C>) -> Result<usize>;

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
        self.rows.borrow_mut().push((new, Rc::clone(entry)));
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
        self.rows.borrow().iter().map(|(_, entry)| Rc::clone(entry)).collect()
    }

    fn insert_ready(&self, store: &Store<C, N::Entity>, sender: &dyn Sender<C>) -> Result<usize> {
        let mut taken = Taken { queue: self, rows: std::mem::take(&mut *self.rows.borrow_mut()), inserted: 0 };
        if !taken.rows.iter().all(|(new, _)| new.is_ready()) {
            let waiting;
            (taken.rows, waiting) = std::mem::take(&mut taken.rows).into_iter().partition(|(new, _)| new.is_ready());
            *self.rows.borrow_mut() = waiting;
        }
        let most = if N::IN_BATCHES { N::ROWS.max(1) } else { 1 };
        store.reserve(taken.rows.len());
        for chunk in taken.rows.chunks(most) {
            let sent: Vec<&N> = chunk.iter().map(|(new, _)| new).collect();
            let rows = ask(sender, Sending::insert::<N>(), |conn| N::insert(conn, &sent, sender.returning()))?;
            let rows = pair(&sent, rows).ok_or(Error::Unpaired { entity: N::Entity::NAME, at: sender.at() })?;
            rows.into_iter().zip(chunk).for_each(|(row, (_, entry))| store.inserted(entry, row));
            taken.inserted += chunk.len();
        }
        Ok(taken.inserted)
    }

    fn remove(&self, entry: &Rc<Entry<N::Entity>>) {
        self.rows.borrow_mut().retain(|(_, other)| !Rc::ptr_eq(entry, other));
    }

    fn clear(&self) -> Vec<Rc<Entry<N::Entity>>> {
        // What a new row owns may have a drop of the program's own.
        let rows = std::mem::take(&mut *self.rows.borrow_mut());
        rows.into_iter().map(|(_, entry)| entry).collect()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
