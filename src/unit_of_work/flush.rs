//! The order in which a flush sends what has changed.
//!
//! 1. DELETEs of a table that has new or changed rows as well, because those may want a unique value that the deleted rows have; and of
//!    the rows of its child tables. A row whose child is moved to another parent by this flush waits for that UPDATE, as do the rows above
//!    it. This is decided row by row.
//! 2. UPDATEs, which may free unique values too. An UPDATE depends on an INSERT only if it writes a key that the program has made for
//!    a new row. Then the DELETEs that have waited for these UPDATEs.
//! 3. INSERTs, parents before children, and in waves as keys become known.
//! 4. The UPDATEs that depend on an INSERT.
//! 5. The other DELETEs.
//!
//! Children are deleted before parents. Rows of tables that refer to each other (or of a table that refers to itself) are deleted
//! in waves, each of rows to which no other row refers that is left. What remains is a circle. A foreign key that the program wrote
//! to a row of a circle is sent before step 1. If that does not break the circle, rows of one table go by one statement where the
//! database looks at foreign keys at its end; elsewhere foreign keys that can be NULL are set to NULL first.
//!
//! The types of the entities say which table is an ancestor of which, whether a session has used them or not. A row that is not found may
//! have been deleted, by `ON DELETE CASCADE`, with an ancestor of this transaction; it is looked for, and it is an error only if it is
//! there.

use std::any::TypeId;
use std::collections::HashSet;
use std::rc::Rc;

use super::executor::Executor;
use super::identity_map::{AnyIdentityMap, Known};
use super::relation::{Reference, Relations};
use super::writes::Depends;
use crate::error::Result;

/// A store and the type of its entity.
pub(super) type Kept<C> = (TypeId, Rc<dyn AnyIdentityMap<C>>);

/// An error if the flush would not get through; nothing has been sent.
pub(super) fn check<C>(stores: &[Kept<C>], at: crate::error::Place) -> Result<()> {
    stores.iter().try_for_each(|(_, store)| store.check(at))
}

pub(super) fn send<C>(stores: &[Kept<C>], sender: &dyn Executor<C>) -> Result<()> {
    let changed: Vec<&Kept<C>> =
        stores.iter().filter(|(_, store)| store.waiting() > 0 || store.has_updates() || store.has_deletes()).collect();
    let sent = send_in_order(stores, sender);
    // Another entity of the same table has other handles of the rows.
    let is_outdated =
        |(entity, store): &&Kept<C>| changed.iter().any(|(other, of)| other != entity && of.table() == store.table());
    stores.iter().filter(is_outdated).for_each(|(_, store)| store.expire());
    stores.iter().for_each(|(_, store)| store.end_flush());
    sent
}

fn send_in_order<C>(stores: &[Kept<C>], sender: &dyn Executor<C>) -> Result<()> {
    stores.iter().try_for_each(|(_, store)| store.begin_flush(sender.at()))?;
    let groups = parents_first(stores.to_vec());
    // Sessions that have used the types in another order lock them in this one as well.
    let by_name = {
        let mut stores = stores.to_vec();
        stores.sort_by_key(|(_, store)| store.name());
        parents_first(stores).concat()
    };
    let is_waiting = |to: &Reference| of_table(stores, to.parent).any(|parent| parent.is_waiting(&*to.key));
    let waiting: Depends<'_> = match stores.iter().any(|(_, store)| store.waiting() > 0) {
        true => Some(&is_waiting),
        false => None,
    };
    let early = early(stores);
    by_name.iter().try_for_each(|(_, store)| store.lock(sender, waiting))?;
    send_moves(stores, sender, &is_waiting)?;
    let delete_early = || match early.is_empty() {
        true => Ok(()),
        false => {
            hold_back(stores, sender)?;
            delete(&groups, stores, sender, |table| early.contains(&table).then_some(Some(false)))
        }
    };
    delete_early()?;
    let changed: Vec<_> = by_name.iter().filter(|(_, store)| store.has_updates()).collect();
    changed.iter().try_for_each(|(_, store)| store.update(sender, waiting))?;
    // Those whose children have been moved away by now.
    stores.iter().for_each(|(_, store)| store.release_held());
    delete_early()?;
    insert(&groups.concat(), stores, sender)?;
    changed.iter().filter(|(_, store)| store.has_updates()).try_for_each(|(_, store)| store.update(sender, None))?;
    delete(&groups, stores, sender, |_| Some(None))?;
    stores.iter().filter(|(_, store)| store.has_deletes()).for_each(|(_, store)| store.forget_deleted());
    Ok(())
}

/// The stores of one table: several entities may have one.
fn of_table<C>(stores: &[Kept<C>], table: TypeId) -> impl Iterator<Item = &dyn AnyIdentityMap<C>> {
    stores.iter().map(|(_, store)| &**store).filter(move |store| store.table() == table)
}

/// A row waits for the rows that it refers to, also if the program has made their keys. Rows that refer to each other in a circle do not
/// wait: the database may look at foreign keys later.
fn insert<C>(groups: &[Kept<C>], stores: &[Kept<C>], sender: &dyn Executor<C>) -> Result<()> {
    let is_waiting = |to: &Reference| of_table(stores, to.parent).any(|parent| parent.waits_for_insert(&*to.key));
    let mut waiting: Depends<'_> = Some(&is_waiting);
    loop {
        let mut inserted = 0;
        for (_, store) in groups {
            if store.waiting() > 0 {
                inserted += store.insert_ready(waiting, sender)?;
            }
        }
        match groups.iter().find(|(_, store)| store.waiting() > 0) {
            None => return Ok(()),
            Some((_, store)) if inserted == 0 && waiting.is_none() => return Err(store.unresolved(sender.at())),
            Some(_) => waiting = if inserted == 0 { None } else { Some(&is_waiting) },
        }
    }
}

/// The tables of whose rows some are deleted before everything else.
fn early<C>(stores: &[Kept<C>]) -> HashSet<TypeId> {
    let tables_where = |is_so: &dyn Fn(&dyn AnyIdentityMap<C>) -> bool| -> HashSet<TypeId> {
        stores.iter().filter(|(_, store)| is_so(&**store)).map(|(_, store)| store.table()).collect()
    };
    let changed = tables_where(&|store| store.waiting() > 0 || store.has_updates());
    let freeing = tables_where(&|store| store.has_deletes() && changed.contains(&store.table()));
    tables_where(&|store| {
        store.has_deletes() && freeing.iter().any(|table| *table == store.table() || store.refers_to(*table))
    })
}

/// Holds back the DELETE of rows from which rows are moved away in this flush, and of all rows with which these might be deleted.
fn hold_back<C>(stores: &[Kept<C>], sender: &dyn Executor<C>) -> Result<()> {
    let mut left: Vec<Reference> = Vec::new();
    for (_, store) in stores.iter().filter(|(_, store)| store.has_updates()) {
        left.extend(store.moves_from(sender.at())?);
    }
    if left.is_empty() {
        return Ok(());
    }
    let mut relations = Relations::default();
    stores.iter().for_each(|(_, store)| relations.extend(store.relations()));
    let (mut rows, mut tables) = (HashSet::new(), HashSet::new());
    let mut hold_back_above = |table: TypeId| {
        if tables.insert(table) {
            relations
                .ancestors(table)
                .iter()
                .flat_map(|ancestor| of_table(stores, *ancestor))
                .for_each(AnyIdentityMap::hold_all_back);
        }
    };
    while let Some(Reference { parent, key }) = left.pop() {
        let mut is_known = false;
        for store in of_table(stores, parent) {
            match store.hold_back(&*key) {
                Known::Row { row, references, surely } => {
                    if rows.insert(row) {
                        left.extend(references);
                    }
                    is_known |= surely;
                }
                Known::Nothing => {}
                // It refers to another column than the key.
                Known::NoKey => store.hold_all_back(),
            }
        }
        if !is_known {
            hold_back_above(parent);
        }
    }
    Ok(())
}

/// Sends what was written to foreign keys of rows that are deleted, if it breaks a circle of rows that are deleted.
fn send_moves<C>(stores: &[Kept<C>], sender: &dyn Executor<C>, is_waiting: &dyn Fn(&Reference) -> bool) -> Result<()> {
    for (_, store) in stores.iter().filter(|(_, store)| store.has_deletes() && store.has_updates()) {
        let breaks_circle = |from: &Reference| {
            store.refers_to(from.parent)
                && of_table(stores, from.parent)
                    .any(|parent| parent.refers_to(store.table()) && !parent.places_of(&*from.key).is_empty())
        };
        store.send_moves(sender, &breaks_circle, is_waiting)?;
    }
    Ok(())
}

/// Deletes rows, children first. `which` says of a table whether late rows, the others or (inner `None`) all of them go.
fn delete<C>(
    groups: &[Vec<Kept<C>>],
    stores: &[Kept<C>],
    sender: &dyn Executor<C>,
    which: impl Fn(TypeId) -> Option<Option<bool>>,
) -> Result<()> {
    for group in groups.iter().rev() {
        let rows = |(_, store): &Kept<C>| match which(store.table()) {
            Some(late) if store.has_deletes() => store.doomed_places(late),
            _ => Vec::new(),
        };
        let rows: Vec<Vec<usize>> = group.iter().map(rows).collect();
        match &group[..] {
            [(_, store)] if !store.refers_to(store.table()) => {
                delete_rows(&**store, stores, &rows[0], false, sender)?;
            }
            _ => delete_in_waves(group, stores, &rows, sender)?,
        }
    }
    Ok(())
}

fn delete_rows<C>(
    store: &dyn AnyIdentityMap<C>,
    stores: &[Kept<C>],
    rows: &[usize],
    together: bool,
    sender: &dyn Executor<C>,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    store.delete(rows, together, sender)?;
    // Rows may have been deleted, or have lost their parent, with these.
    let table = store.table();
    stores.iter().filter(|(_, store)| store.refers_to(table)).for_each(|(_, store)| store.lose_parents());
    Ok(())
}

/// Deletes rows that may refer to each other, in waves: none refers to a row of an earlier wave or of its own, so that it does not
/// matter whether the database looks at foreign keys row by row, as MariaDB does.
fn delete_in_waves<C>(
    group: &[Kept<C>],
    stores: &[Kept<C>],
    rows: &[Vec<usize>],
    sender: &dyn Executor<C>,
) -> Result<()> {
    let nodes: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(store, rows)| rows.iter().map(move |&row| (store, row))).collect();
    let at: std::collections::HashMap<(usize, usize), usize> =
        nodes.iter().enumerate().map(|(node, place)| (*place, node)).collect();
    let mut parents: Vec<Vec<usize>> = Vec::with_capacity(nodes.len());
    for (node, &(store, row)) in nodes.iter().enumerate() {
        let mut found = Vec::new();
        for reference in group[store].1.references_of(row) {
            for (parent, (_, store)) in
                group.iter().enumerate().filter(|(_, (_, store))| store.table() == reference.parent)
            {
                let places = store.places_of(&*reference.key);
                found.extend(places.into_iter().filter_map(|row| at.get(&(parent, row))));
            }
        }
        // Where foreign keys are checked row by row, a row that refers to itself cannot be deleted either.
        if found.contains(&node) && !sender.checks_at_end() {
            group[store].1.unlink(row, &[group[store].1.table()], sender)?;
        }
        found.retain(|&parent| parent != node);
        parents.push(found);
    }
    let mut children = vec![0_usize; nodes.len()];
    parents.iter().flatten().for_each(|&parent| children[parent] += 1);
    let mut is_left = vec![true; nodes.len()];
    let mut wave: Vec<usize> = (0..nodes.len()).filter(|&node| children[node] == 0).collect();
    loop {
        while !wave.is_empty() {
            let mut next = Vec::new();
            for &node in &wave {
                is_left[node] = false;
                release(std::mem::take(&mut parents[node]), &mut children, &mut next);
            }
            for place in (0..group.len()).rev() {
                let rows: Vec<usize> = wave
                    .iter()
                    .map(|&node| nodes[node])
                    .filter(|(store, _)| *store == place)
                    .map(|(_, row)| row)
                    .collect();
                delete_rows(&*group[place].1, stores, &rows, false, sender)?;
            }
            next.retain(|&node| is_left[node]);
            wave = next;
        }
        let circle: Vec<usize> = (0..nodes.len()).filter(|&node| is_left[node]).collect();
        if circle.is_empty() {
            return Ok(());
        }
        if let [kept] = group
            && sender.checks_at_end()
            && kept.1.deletes_at_once(circle.len())
        {
            let rows: Vec<usize> = circle.iter().map(|&node| nodes[node].1).collect();
            return delete_rows(&*kept.1, stores, &rows, true, sender);
        }
        for &node in &circle {
            let (store, row) = nodes[node];
            let tables: Vec<TypeId> = parents[node].iter().map(|&parent| group[nodes[parent].0].1.table()).collect();
            if !tables.is_empty() && group[store].1.unlink(row, &tables, sender)? {
                // What it still refers to could not be set to NULL.
                let left = group[store].1.references_of(row);
                let still = |parent: &usize| {
                    let (store, row) = nodes[*parent];
                    let parent = &group[store].1;
                    left.iter().any(|to| to.parent == parent.table() && parent.places_of(&*to.key).contains(&row))
                };
                let (kept, released) = std::mem::take(&mut parents[node]).into_iter().partition(|parent| still(parent));
                parents[node] = kept;
                release(released, &mut children, &mut wave);
                if !wave.is_empty() {
                    break;
                }
            }
        }
        wave.retain(|&node| is_left[node]);
        if wave.is_empty() {
            // The database has the last word: it may delete a circle in a cascade, or refuse.
            wave.push(circle[0]);
        }
    }
}

/// One child less for each of these.
fn release(parents: Vec<usize>, children: &mut [usize], free: &mut Vec<usize>) {
    for parent in parents {
        children[parent] -= 1;
        if children[parent] == 0 {
            free.push(parent);
        }
    }
}

/// Tables that refer to each other in a circle are one group, in the order of `stores`.
fn parents_first<C>(stores: Vec<Kept<C>>) -> Vec<Vec<Kept<C>>> {
    let mut left = stores;
    let mut groups = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let is_free = |(entity, store): &Kept<C>| {
            left.iter()
                .all(|(other, of)| other == entity || !store.refers_to(of.table()) || of.refers_to(store.table()))
        };
        let next = left.iter().position(is_free).unwrap_or(0);
        let (entity, store) = left.remove(next);
        let (group, others) =
            left.into_iter().partition(|(_, of)| store.refers_to(of.table()) && of.refers_to(store.table()));
        left = others;
        let mut group: Vec<Kept<C>> = group;
        group.insert(0, (entity, store));
        groups.push(group);
    }
    groups
}
