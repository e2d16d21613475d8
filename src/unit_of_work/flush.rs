//! The order in which a flush sends the changes.
//!
//! 1. The early DELETEs: rows of tables that also have new or changed rows, because a new or changed row may need a
//!    unique value of a deleted row, and rows of the child tables of these tables. If this flush moves a child of a
//!    deleted row to another parent, the DELETE of the row and of its ancestors is deferred until the UPDATEs were
//!    sent. This is decided for each row.
//! 2. The UPDATEs, which may also free unique values. An UPDATE depends on an INSERT only if it writes a key that the
//!    program has made for a new row. The deferred DELETEs follow.
//! 3. The INSERTs, parents before children, in waves as keys become known.
//! 4. The UPDATEs that depend on an INSERT.
//! 5. The other DELETEs.
//!
//! Children are deleted before parents. If tables refer to each other, or a table refers to itself, their rows are
//! deleted in waves: a wave has the rows to which no remaining row refers. The rest is a circle. A foreign key that the
//! program has written to a row of a circle is sent before step 1. If this does not break the circle, and the database
//! checks foreign keys at the end of a statement, one statement deletes the rows of one table. Otherwise, foreign keys
//! that can be NULL are set to NULL first.
//!
//! The types of the entities define which table is an ancestor of which, whether or not a session has used them. An
//! UPDATE or DELETE may not find a row because `ON DELETE CASCADE` has deleted it together with an ancestor. So the
//! flush looks for the row, and fails only if the row exists.

use std::any::TypeId;
use std::collections::HashSet;
use std::rc::Rc;

use super::any_identity_map::{AnyIdentityMap, ReferencedRow};
use super::executor::Executor;
use super::relations::{Reference, Relations};
use super::updates::IsPending;
use crate::error::Result;

/// An identity map and the type of its entity.
pub(super) type TypedMap<C> = (TypeId, Rc<dyn AnyIdentityMap<C>>);

/// Fails if a change cannot be flushed. Sends no statement.
pub(super) fn check<C>(maps: &[TypedMap<C>], at: crate::error::Place) -> Result<()> {
    maps.iter().try_for_each(|(_, map)| map.check(at))
}

pub(super) fn send<C>(maps: &[TypedMap<C>], executor: &dyn Executor<C>) -> Result<()> {
    let changed: Vec<&TypedMap<C>> = maps
        .iter()
        .filter(|(_, map)| map.pending_count() > 0 || map.has_dirty_rows() || map.has_scheduled_deletes())
        .collect();
    let sent = send_in_order(maps, executor);
    // Other entities of the same table have their own values of the changed rows.
    let is_outdated =
        |(entity, map): &&TypedMap<C>| changed.iter().any(|(other, of)| other != entity && of.table() == map.table());
    maps.iter().filter(is_outdated).for_each(|(_, map)| map.expire());
    maps.iter().for_each(|(_, map)| map.end_flush());
    sent
}

fn send_in_order<C>(maps: &[TypedMap<C>], executor: &dyn Executor<C>) -> Result<()> {
    maps.iter().try_for_each(|(_, map)| map.begin_flush(executor.at()))?;
    let groups = parents_first(maps.to_vec());
    // All sessions lock tables in this order, whatever the order in which they have used the entities.
    let by_name = {
        let mut maps = maps.to_vec();
        maps.sort_by_key(|(_, map)| map.name());
        parents_first(maps).concat()
    };
    let may_be_pending = |to: &Reference| of_table(maps, to.parent).any(|parent| parent.may_be_pending(&*to.key));
    let is_pending: IsPending<'_> = match maps.iter().any(|(_, map)| map.pending_count() > 0) {
        true => Some(&may_be_pending),
        false => None,
    };
    let early_tables = early_tables(maps);
    by_name.iter().try_for_each(|(_, map)| map.lock(executor, is_pending))?;
    send_moves(maps, executor, &may_be_pending)?;
    let delete_early = || match early_tables.is_empty() {
        true => Ok(()),
        false => {
            defer_deletes(maps, executor)?;
            delete(&groups, maps, executor, false, |table| early_tables.contains(&table))
        }
    };
    delete_early()?;
    let changed: Vec<_> = by_name.iter().filter(|(_, map)| map.has_dirty_rows()).collect();
    changed.iter().try_for_each(|(_, map)| map.update(executor, is_pending))?;
    // The UPDATEs have moved the children of the deferred rows away.
    maps.iter().for_each(|(_, map)| map.release_deferred_deletes());
    delete_early()?;
    insert(&groups.concat(), maps, executor)?;
    changed.iter().filter(|(_, map)| map.has_dirty_rows()).try_for_each(|(_, map)| map.update(executor, None))?;
    delete(&groups, maps, executor, true, |_| true)?;
    maps.iter().filter(|(_, map)| map.has_scheduled_deletes()).for_each(|(_, map)| map.remove_sent_deletes());
    Ok(())
}

/// The identity maps of one table. Several entities may share a table.
fn of_table<C>(maps: &[TypedMap<C>], table: TypeId) -> impl Iterator<Item = &dyn AnyIdentityMap<C>> {
    maps.iter().map(|(_, map)| &**map).filter(move |map| map.table() == table)
}

/// Inserts all pending rows. A row follows the rows that it refers to, even if the program has made their keys. Rows
/// that refer to each other in a circle are sent in any order, because the database may check foreign keys later.
fn insert<C>(groups: &[TypedMap<C>], maps: &[TypedMap<C>], executor: &dyn Executor<C>) -> Result<()> {
    let is_pending = |to: &Reference| of_table(maps, to.parent).any(|parent| parent.is_pending(&*to.key));
    let mut waits_for: IsPending<'_> = Some(&is_pending);
    loop {
        let mut inserted = 0;
        for (_, map) in groups {
            if map.pending_count() > 0 {
                inserted += map.insert_ready(waits_for, executor)?;
            }
        }
        match groups.iter().find(|(_, map)| map.pending_count() > 0) {
            None => return Ok(()),
            Some((_, map)) if inserted == 0 && waits_for.is_none() => return Err(map.unresolved_keys(executor.at())),
            Some(_) => waits_for = if inserted == 0 { None } else { Some(&is_pending) },
        }
    }
}

/// The tables whose rows are deleted in step 1.
fn early_tables<C>(maps: &[TypedMap<C>]) -> HashSet<TypeId> {
    let tables_where = |condition: &dyn Fn(&dyn AnyIdentityMap<C>) -> bool| -> HashSet<TypeId> {
        maps.iter().filter(|(_, map)| condition(&**map)).map(|(_, map)| map.table()).collect()
    };
    let changed = tables_where(&|map| map.pending_count() > 0 || map.has_dirty_rows());
    let freeing = tables_where(&|map| map.has_scheduled_deletes() && changed.contains(&map.table()));
    tables_where(&|map| {
        map.has_scheduled_deletes() && freeing.iter().any(|table| *table == map.table() || map.refers_to(*table))
    })
}

/// Defers the DELETEs of rows whose children this flush moves to other parents, and of all rows whose DELETE might
/// cascade to these rows.
fn defer_deletes<C>(maps: &[TypedMap<C>], executor: &dyn Executor<C>) -> Result<()> {
    let mut references: Vec<Reference> = Vec::new();
    for (_, map) in maps.iter().filter(|(_, map)| map.has_dirty_rows()) {
        references.extend(map.former_references(executor.at())?);
    }
    if references.is_empty() {
        return Ok(());
    }
    let mut relations = Relations::default();
    maps.iter().for_each(|(_, map)| relations.extend(map.relations()));
    let (mut rows, mut tables) = (HashSet::new(), HashSet::new());
    let mut defer_ancestors = |table: TypeId| {
        if tables.insert(table) {
            relations
                .ancestors(table)
                .iter()
                .flat_map(|ancestor| of_table(maps, *ancestor))
                .for_each(AnyIdentityMap::defer_all_deletes);
        }
    };
    while let Some(Reference { parent, key }) = references.pop() {
        let mut is_current = false;
        for map in of_table(maps, parent) {
            match map.defer_delete(&*key) {
                ReferencedRow::Known { row, references: further, is_current: row_is_current } => {
                    if rows.insert(row) {
                        references.extend(further);
                    }
                    is_current |= row_is_current;
                }
                ReferencedRow::Unknown => {}
                ReferencedRow::OtherColumn => map.defer_all_deletes(),
            }
        }
        if !is_current {
            defer_ancestors(parent);
        }
    }
    Ok(())
}

/// Sends the foreign keys that the program has written to deleted rows, if this breaks a circle of deleted rows.
fn send_moves<C>(
    maps: &[TypedMap<C>],
    executor: &dyn Executor<C>,
    may_be_pending: &dyn Fn(&Reference) -> bool,
) -> Result<()> {
    for (_, map) in maps.iter().filter(|(_, map)| map.has_scheduled_deletes() && map.has_dirty_rows()) {
        let breaks_circle = |from: &Reference| {
            map.refers_to(from.parent)
                && of_table(maps, from.parent)
                    .any(|parent| parent.refers_to(map.table()) && !parent.indices_of(&*from.key).is_empty())
        };
        map.send_moves(executor, &breaks_circle, may_be_pending)?;
    }
    Ok(())
}

/// Deletes the remaining rows of the tables that `is_included` accepts, children first.
fn delete<C>(
    groups: &[Vec<TypedMap<C>>],
    maps: &[TypedMap<C>],
    executor: &dyn Executor<C>,
    include_deferred: bool,
    is_included: impl Fn(TypeId) -> bool,
) -> Result<()> {
    for group in groups.iter().rev() {
        let rows = |(_, map): &TypedMap<C>| match map.has_scheduled_deletes() && is_included(map.table()) {
            true => map.remaining_deletes(include_deferred),
            false => Vec::new(),
        };
        let rows: Vec<Vec<usize>> = group.iter().map(rows).collect();
        match &group[..] {
            [(_, map)] if !map.refers_to(map.table()) => {
                delete_rows(&**map, maps, &rows[0], false, executor)?;
            }
            _ => delete_in_waves(group, maps, &rows, executor)?,
        }
    }
    Ok(())
}

fn delete_rows<C>(
    map: &dyn AnyIdentityMap<C>,
    maps: &[TypedMap<C>],
    rows: &[usize],
    together: bool,
    executor: &dyn Executor<C>,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    map.delete(rows, together, executor)?;
    // A cascade may have deleted or changed rows of the tables below.
    let table = map.table();
    maps.iter().filter(|(_, map)| map.refers_to(table)).for_each(|(_, map)| map.note_ancestor_deleted());
    Ok(())
}

/// Deletes rows that may refer to each other, in waves. No remaining row refers to a row of the present wave, and no
/// row refers to another row of its own wave. So the waves also work if the database checks foreign keys at each row,
/// as MariaDB does.
fn delete_in_waves<C>(
    group: &[TypedMap<C>],
    maps: &[TypedMap<C>],
    rows: &[Vec<usize>],
    executor: &dyn Executor<C>,
) -> Result<()> {
    let nodes: Vec<(usize, usize)> =
        rows.iter().enumerate().flat_map(|(map, rows)| rows.iter().map(move |&row| (map, row))).collect();
    let at: std::collections::HashMap<(usize, usize), usize> =
        nodes.iter().enumerate().map(|(node, index)| (*index, node)).collect();
    let mut parents: Vec<Vec<usize>> = Vec::with_capacity(nodes.len());
    for (node, &(map, row)) in nodes.iter().enumerate() {
        let mut found = Vec::new();
        for reference in group[map].1.references_of(row) {
            for (parent, (_, map)) in group.iter().enumerate().filter(|(_, (_, map))| map.table() == reference.parent) {
                let indices = map.indices_of(&*reference.key);
                found.extend(indices.into_iter().filter_map(|row| at.get(&(parent, row))));
            }
        }
        // If foreign keys are checked at each row, a row that refers to itself cannot be deleted.
        if found.contains(&node) && !executor.checks_foreign_keys_at_end() {
            group[map].1.unlink(row, &[group[map].1.table()], executor)?;
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
            for index in (0..group.len()).rev() {
                let rows: Vec<usize> =
                    wave.iter().map(|&node| nodes[node]).filter(|(map, _)| *map == index).map(|(_, row)| row).collect();
                delete_rows(&*group[index].1, maps, &rows, false, executor)?;
            }
            next.retain(|&node| is_left[node]);
            wave = next;
        }
        let circle: Vec<usize> = (0..nodes.len()).filter(|&node| is_left[node]).collect();
        if circle.is_empty() {
            return Ok(());
        }
        if let [persistent] = group
            && executor.checks_foreign_keys_at_end()
            && persistent.1.deletes_at_once(circle.len())
        {
            let rows: Vec<usize> = circle.iter().map(|&node| nodes[node].1).collect();
            return delete_rows(&*persistent.1, maps, &rows, true, executor);
        }
        for &node in &circle {
            let (map, row) = nodes[node];
            let tables: Vec<TypeId> = parents[node].iter().map(|&parent| group[nodes[parent].0].1.table()).collect();
            if !tables.is_empty() && group[map].1.unlink(row, &tables, executor)? {
                // These foreign keys cannot be NULL.
                let remaining = group[map].1.references_of(row);
                let still = |parent: &usize| {
                    let (map, row) = nodes[*parent];
                    let parent = &group[map].1;
                    remaining.iter().any(|to| to.parent == parent.table() && parent.indices_of(&*to.key).contains(&row))
                };
                let (persistent, released) =
                    std::mem::take(&mut parents[node]).into_iter().partition(|parent| still(parent));
                parents[node] = persistent;
                release(released, &mut children, &mut wave);
                if !wave.is_empty() {
                    break;
                }
            }
        }
        wave.retain(|&node| is_left[node]);
        if wave.is_empty() {
            // The database decides: a cascade may delete the circle, or the database refuses the DELETE.
            wave.push(circle[0]);
        }
    }
}

/// Removes one child from each of `parents`, and adds the parents without children to `free`.
fn release(parents: Vec<usize>, children: &mut [usize], free: &mut Vec<usize>) {
    for parent in parents {
        children[parent] -= 1;
        if children[parent] == 0 {
            free.push(parent);
        }
    }
}

/// Groups the maps, parents before children. Tables that refer to each other in a circle form one group, in the order
/// of `maps`.
fn parents_first<C>(maps: Vec<TypedMap<C>>) -> Vec<Vec<TypedMap<C>>> {
    let mut left = maps;
    let mut groups = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let is_free = |(entity, map): &TypedMap<C>| {
            left.iter().all(|(other, of)| other == entity || !map.refers_to(of.table()) || of.refers_to(map.table()))
        };
        let next = left.iter().position(is_free).unwrap_or(0);
        let (entity, map) = left.remove(next);
        let (group, others) =
            left.into_iter().partition(|(_, of)| map.refers_to(of.table()) && of.refers_to(map.table()));
        left = others;
        let mut group: Vec<TypedMap<C>> = group;
        group.insert(0, (entity, map));
        groups.push(group);
    }
    groups
}
