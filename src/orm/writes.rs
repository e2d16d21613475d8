//! The UPDATEs and DELETEs of one entity.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::changes::ChangeKind;
use super::entity::{Columns, Entity, Persist};
use super::entry::{Entry, Phase};
use super::identity::Store;
use super::sender::{Sender, Sending, ask};
use crate::error::{Error, Result};

/// A row that differs.
struct Written<T: Entity> {
    entry: Rc<Entry<T>>,
    old: Rc<T>,
    new: Rc<T>,
    columns: Columns,
}

/// Writes what differs, in the order of the first writing.
pub(super) fn update<C: 'static, T: Persist<C>>(store: &Store<C, T>, sender: &dyn Sender<C>) -> Result<()> {
    let touched = store.home.touched();
    let mut written = Vec::new();
    for entry in touched {
        let (old, new) = entry.versions(sender.at())?;
        let columns = if Rc::ptr_eq(&old, &new) { 0 } else { T::differences(&old, &new) };
        if columns == 0 || entry.is_doomed() || entry.phase() != Phase::Kept {
            drop(new);
            store.untouch(&entry);
        } else {
            written.push(Written { entry, old, new, columns });
        }
    }
    // Neighbours that differ in the same columns go together.
    for alike in written.chunk_by(|one, next| one.columns == next.columns) {
        for chunk in alike.chunks(T::UPDATES.max(1)) {
            match chunk {
                [one] => update_one(sender, one)?,
                several => update_many(sender, several)?,
            }
        }
    }
    for Written { entry, old, new, .. } in written {
        // Noted first: a clone of the row may panic, and the rollback that follows has to know that the UPDATE was sent.
        store.history.note(ChangeKind::Update, &entry);
        drop((old, new));
        entry.settle(T::VERSIONED);
        store.home.untouch(&entry);
    }
    Ok(())
}

fn update_one<C, T: Persist<C>>(sender: &dyn Sender<C>, row: &Written<T>) -> Result<()> {
    match ask(sender, Sending::Change, |conn| T::update(conn, &row.old, &row.new))? {
        0 => Err(stale(row, sender)),
        _ => Ok(()),
    }
}

fn update_many<C, T: Persist<C>>(sender: &dyn Sender<C>, rows: &[Written<T>]) -> Result<()> {
    let pairs: Vec<(&T, &T)> = rows.iter().map(|row| (&*row.old, &*row.new)).collect();
    let found = ask(sender, Sending::Change, |conn| T::update_many(conn, &pairs, rows[0].columns))?;
    if found.len() == rows.len() {
        return Ok(());
    }
    let found: HashSet<T::Id> = found.into_iter().collect();
    match rows.iter().find(|row| !found.contains(&row.old.id())) {
        Some(row) => Err(stale(row, sender)),
        None => Ok(()),
    }
}

fn stale<C, T: Entity>(row: &Written<T>, sender: &dyn Sender<C>) -> Error {
    Error::Stale { entity: T::NAME, key: format!("{:?}", row.old.id()), operation: "update", at: sender.at() }
}

/// Deletes what is doomed. Rows that others among them refer to go after those.
pub(super) fn delete<C: 'static, T: Persist<C>>(store: &Store<C, T>, sender: &dyn Sender<C>) -> Result<()> {
    let doomed: Vec<Rc<Entry<T>>> = store.doomed();
    let mut rows = Vec::with_capacity(doomed.len());
    for entry in doomed.iter().filter(|entry| entry.phase() == Phase::Kept) {
        // A row that was written to is deleted by what the database has of it.
        store.untouch(entry);
        rows.push((Rc::clone(entry), entry.read(sender.at())?));
    }
    for wave in children_first(rows) {
        for chunk in wave.chunks(T::DELETES.max(1)) {
            let values: Vec<&T> = chunk.iter().map(|(_, value)| &**value).collect();
            let deleted = ask(sender, Sending::Change, |conn| T::delete(conn, &values))?;
            if deleted < chunk.len() {
                let key = match chunk {
                    [(_, one)] => format!("{:?}", one.id()),
                    several => format!("(one of {})", several.len()),
                };
                return Err(Error::Stale { entity: T::NAME, key, operation: "delete", at: sender.at() });
            }
            chunk.iter().for_each(|(entry, _)| store.deleted(entry));
        }
    }
    store.forget_deletes();
    Ok(())
}

type Doomed<T> = (Rc<Entry<T>>, Rc<T>);

/// Rows to be deleted, in turns: none refers to a row of an earlier turn or of its own, so that it does not matter whether the database
/// looks at foreign keys row by row, as MariaDB does. What goes round in a circle comes last, one by one.
fn children_first<T: Entity>(rows: Vec<Doomed<T>>) -> Vec<Vec<Doomed<T>>> {
    let at: HashMap<T::Id, usize> = rows.iter().enumerate().map(|(place, (_, value))| (value.id(), place)).collect();
    let parents: Vec<Vec<usize>> = rows
        .iter()
        .enumerate()
        .map(|(place, (_, value))| {
            let among = value.own_parents().into_iter().filter_map(|id| at.get(&id).copied());
            among.filter(|&parent| parent != place).collect()
        })
        .collect();
    if parents.iter().all(Vec::is_empty) {
        return vec![rows];
    }
    let mut children = vec![0_usize; rows.len()];
    parents.iter().flatten().for_each(|&parent| children[parent] += 1);
    let mut rows: Vec<Option<Doomed<T>>> = rows.into_iter().map(Some).collect();
    let mut waves = Vec::new();
    let mut leaves: Vec<usize> = (0..rows.len()).filter(|&row| children[row] == 0).collect();
    while !leaves.is_empty() {
        let mut next = Vec::new();
        for &leaf in &leaves {
            for &parent in &parents[leaf] {
                children[parent] -= 1;
                if children[parent] == 0 {
                    next.push(parent);
                }
            }
        }
        waves.push(leaves.iter().filter_map(|&leaf| rows[leaf].take()).collect());
        leaves = next;
    }
    waves.extend(rows.into_iter().flatten().map(|row| vec![row]));
    waves
}
