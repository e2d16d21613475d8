//! The order in which a flush sends what has changed.
//!
//! Deletes that may free a unique value, then INSERTs, parents before children and in waves as keys become known, then UPDATEs, then the
//! other deletes, children first.

use std::any::TypeId;
use std::rc::Rc;

use super::identity::DynStore;
use super::sender::Sender;
use crate::error::Result;

/// A store and what it is one of.
pub(super) type Kept<C> = (TypeId, Rc<dyn DynStore<C>>);

/// An error where the flush would not get through; nothing has been sent.
pub(super) fn check<C>(stores: &[Kept<C>], at: crate::error::Place) -> Result<()> {
    stores.iter().try_for_each(|(_, store)| store.check(at))
}

pub(super) fn send<C>(stores: &[Kept<C>], sender: &dyn Sender<C>) -> Result<()> {
    let stores = parents_first(stores);
    let early = goes_first(&stores);
    delete(&stores, sender, |place| early[place])?;
    insert(&stores, sender)?;
    for (_, store) in &stores {
        if store.has_updates() {
            store.update(sender)?;
        }
    }
    delete(&stores, sender, |_| true)
}

fn insert<C>(stores: &[Kept<C>], sender: &dyn Sender<C>) -> Result<()> {
    loop {
        let mut inserted = 0;
        for (_, store) in stores {
            if store.waiting() > 0 {
                inserted += store.insert_ready(sender)?;
            }
        }
        match stores.iter().find(|(_, store)| store.waiting() > 0) {
            None => return Ok(()),
            Some((_, store)) if inserted == 0 => return Err(store.unresolved(sender.at())),
            Some(_) => {}
        }
    }
}

fn delete<C>(stores: &[Kept<C>], sender: &dyn Sender<C>, goes: impl Fn(usize) -> bool) -> Result<()> {
    for place in (0..stores.len()).rev() {
        let (entity, store) = &stores[place];
        if store.has_deletes() && goes(place) {
            store.delete(sender)?;
            expire_children(stores, *entity);
        }
    }
    Ok(())
}

/// Rows may have been deleted, or have lost their parent, with a row of `parent`.
fn expire_children<C>(stores: &[Kept<C>], parent: TypeId) {
    let mut gone = vec![parent];
    let mut next = 0;
    while next < gone.len() {
        let parent = gone[next];
        for (entity, store) in stores.iter().filter(|(_, store)| store.parents().contains(&parent)) {
            store.expire();
            if !gone.contains(entity) {
                gone.push(*entity);
            }
        }
        next += 1;
    }
}

/// Whose deletes go before everything else, where something that is inserted or updated may want a unique value that they free. Those
/// of a type stay last where a row is to be moved away from what is deleted.
fn goes_first<C>(stores: &[Kept<C>]) -> Vec<bool> {
    let frees = |store: &dyn DynStore<C>| store.has_deletes() && (store.waiting() > 0 || store.has_updates());
    if !stores.iter().any(|(_, store)| frees(&**store)) {
        return vec![false; stores.len()];
    }
    let mut late: Vec<bool> =
        stores.iter().map(|(entity, _)| stores.iter().any(|(_, child)| child.moves_away_from(*entity))).collect();
    // Parents first, so from the end: a parent is as late as its children.
    for place in (0..stores.len()).rev() {
        let (entity, _) = &stores[place];
        let by_child = stores.iter().enumerate().any(|(child, (_, store))| {
            child != place && late[child] && store.has_deletes() && store.parents().contains(entity)
        });
        late[place] |= by_child;
    }
    late.into_iter().map(|late| !late).collect()
}

/// Types that refer to each other in a circle keep the order of their first use.
fn parents_first<C>(stores: &[Kept<C>]) -> Vec<Kept<C>> {
    let mut left: Vec<Kept<C>> = stores.to_vec();
    let mut ordered = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let waits =
            |store: &Kept<C>| left.iter().any(|(other, _)| *other != store.0 && store.1.parents().contains(other));
        let next = left.iter().position(|store| !waits(store)).unwrap_or(0);
        ordered.push(left.remove(next));
    }
    ordered
}
