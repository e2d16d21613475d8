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
use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use super::any_identity_map::AnyIdentityMap;
use super::relations::{Reference, Relations};
use super::updates::IsPending;
use crate::error::{Result, SourceLocation};

type Map = Rc<dyn AnyIdentityMap>;

/// Sends all changes of these identity maps. `checks_at_end`: whether the database checks foreign keys at the end of a
/// statement, and not at each row.
pub(super) fn send(maps: &[Map], checks_at_end: bool, at: SourceLocation) -> Result<()> {
    let has_changes = |map: &&Map| map.pending_count() > 0 || map.has_dirty_rows() || map.has_scheduled_deletes();
    let changed: Vec<&Map> = maps.iter().filter(has_changes).collect();
    let sent = Flush { maps, groups: parents_first(maps.to_vec()), checks_at_end, at }.send();
    for map in maps {
        // Other entities of the same table have their own values of the changed rows.
        if changed.iter().any(|other| !Rc::ptr_eq(other, map) && other.table() == map.table()) {
            map.expire();
        }
        map.end_flush();
    }
    sent
}

struct Flush<'m> {
    maps: &'m [Map],
    /// Parents first. The tables of a group refer to each other.
    groups: Vec<Vec<Map>>,
    checks_at_end: bool,
    at: SourceLocation,
}

/// Rows that a flush deletes: the address of the map and the index of the row.
type Rows = HashSet<(*const (), usize)>;

fn rows_of(map: &Map, indices: Vec<usize>) -> impl Iterator<Item = (*const (), usize)> {
    let address = Rc::as_ptr(map).cast();
    indices.into_iter().map(move |index| (address, index))
}

impl Flush<'_> {
    fn send(&self) -> Result<()> {
        self.maps.iter().try_for_each(|map| map.begin_flush(self.at))?;
        // All sessions lock tables in this order, whatever the order in which they have used the entities.
        let mut by_name = self.maps.to_vec();
        by_name.sort_unstable_by_key(|map| map.name());
        let by_name = parents_first(by_name).concat();
        let may_be_pending = |to: &Reference| self.of_table(to.parent).any(|map| map.may_be_pending(&*to.key));
        let has_pending = self.maps.iter().any(|map| map.pending_count() > 0);
        let is_pending: IsPending<'_> = has_pending.then_some(&may_be_pending);
        let early_tables = self.early_tables();
        by_name.iter().try_for_each(|map| map.lock(is_pending, self.at))?;
        self.send_moves(&may_be_pending)?;
        if !early_tables.is_empty() {
            self.delete(&self.deferred_deletes()?, |table| early_tables.contains(&table))?;
        }
        let changed: Vec<_> = by_name.iter().filter(|map| map.has_dirty_rows()).collect();
        changed.iter().try_for_each(|map| map.update(is_pending, self.at))?;
        // The UPDATEs have moved the children of the deferred rows away.
        self.delete(&Rows::new(), |table| early_tables.contains(&table))?;
        self.insert()?;
        changed.iter().filter(|map| map.has_dirty_rows()).try_for_each(|map| map.update(None, self.at))?;
        self.delete(&Rows::new(), |_| true)
    }

    /// The identity maps of one table. Several entities may share a table.
    fn of_table(&self, table: TypeId) -> impl Iterator<Item = &Map> {
        self.maps.iter().filter(move |map| map.table() == table)
    }

    /// Inserts all pending rows. A row follows the rows that it refers to, even if the program has made their keys. Rows
    /// that refer to each other in a circle are sent in any order, because the database may check foreign keys later.
    fn insert(&self) -> Result<()> {
        let is_pending = |to: &Reference| {
            self.of_table(to.parent).any(|map| map.has_key_type(&*to.key) && map.may_be_pending(&*to.key))
        };
        let maps = self.groups.concat();
        let mut waits_for: IsPending<'_> = Some(&is_pending);
        loop {
            let mut inserted = 0;
            for map in maps.iter().filter(|map| map.pending_count() > 0) {
                inserted += map.insert_ready(waits_for, self.at)?;
            }
            match maps.iter().find(|map| map.pending_count() > 0) {
                None => return Ok(()),
                Some(map) if inserted == 0 && waits_for.is_none() => return Err(map.unresolved_keys(self.at)),
                Some(_) => waits_for = if inserted == 0 { None } else { Some(&is_pending) },
            }
        }
    }

    /// The tables whose rows are deleted in step 1.
    fn early_tables(&self) -> HashSet<TypeId> {
        let deleting = || self.maps.iter().filter(|map| map.has_scheduled_deletes());
        let is_changed = |map: &Map| map.pending_count() > 0 || map.has_dirty_rows();
        let freeing: HashSet<TypeId> =
            deleting().map(|map| map.table()).filter(|&table| self.of_table(table).any(is_changed)).collect();
        let is_early = |map: &&Map| freeing.iter().any(|table| *table == map.table() || map.refers_to(*table));
        deleting().filter(is_early).map(|map| map.table()).collect()
    }

    /// The deletes that have to wait for the UPDATEs: those of rows whose children this flush moves to other parents,
    /// and those of all rows whose DELETE might cascade to these rows.
    fn deferred_deletes(&self) -> Result<Rows> {
        let mut references: Vec<Reference> = Vec::new();
        for map in self.maps.iter().filter(|map| map.has_dirty_rows()) {
            references.extend(map.former_references(self.at)?);
        }
        let mut relations = Relations::default();
        self.maps.iter().for_each(|map| map.add_relations(&mut relations));
        let (mut deferred, mut visited, mut tables) = (Rows::new(), HashSet::new(), HashSet::new());
        while let Some(Reference { parent, key }) = references.pop() {
            let mut is_current = false;
            for map in self.of_table(parent) {
                let is_key = map.has_key_type(&*key);
                let deletes = if is_key { map.deletes_of(&*key) } else { map.remaining_deletes() };
                deferred.extend(rows_of(map, deletes));
                if let Some(known) = map.known_row(&*key) {
                    if visited.insert(known.identity) {
                        references.extend(known.references);
                    }
                    is_current |= known.is_current;
                }
            }
            if !is_current && tables.insert(parent) {
                let ancestors = relations.ancestors(parent);
                let maps = self.maps.iter().filter(|map| ancestors.contains(&map.table()));
                deferred.extend(maps.flat_map(|map| rows_of(map, map.remaining_deletes())));
            }
        }
        Ok(deferred)
    }

    /// Sends the foreign keys that the program has written to deleted rows, if this breaks a circle of deleted rows.
    fn send_moves(&self, may_be_pending: &dyn Fn(&Reference) -> bool) -> Result<()> {
        for map in self.maps.iter().filter(|map| map.has_scheduled_deletes() && map.has_dirty_rows()) {
            let is_in_circle = |parent: &Map, from: &Reference| {
                parent.refers_to(map.table()) && !parent.deletes_of(&*from.key).is_empty()
            };
            let breaks_circle = |from: &Reference| {
                map.refers_to(from.parent) && self.of_table(from.parent).any(|parent| is_in_circle(parent, from))
            };
            map.send_moves(&breaks_circle, may_be_pending, self.at)?;
        }
        Ok(())
    }

    /// Deletes the remaining rows of the tables that `is_included` accepts, except the deferred ones, children first.
    fn delete(&self, deferred: &Rows, is_included: impl Fn(TypeId) -> bool) -> Result<()> {
        for group in self.groups.iter().rev() {
            let mut rows = Vec::new();
            for (index, map) in group.iter().enumerate().filter(|(_, map)| is_included(map.table())) {
                let remaining = rows_of(map, map.remaining_deletes()).filter(|row| !deferred.contains(row));
                rows.extend(remaining.map(|(_, row)| (index, row)));
            }
            match &group[..] {
                _ if rows.is_empty() => {}
                [map] if !map.refers_to(map.table()) => {
                    self.delete_rows(map, rows.iter().map(|(_, row)| *row), false)?
                }
                _ => self.delete_in_waves(group, &rows)?,
            }
        }
        Ok(())
    }

    fn delete_rows(&self, map: &Map, rows: impl Iterator<Item = usize>, together: bool) -> Result<()> {
        let rows: Vec<usize> = rows.collect();
        if !rows.is_empty() {
            map.delete(&rows, together, self.at)?;
            // A cascade may have deleted or changed rows of the tables below.
            let table = map.table();
            self.maps.iter().filter(|map| map.refers_to(table)).for_each(|map| map.note_ancestor_deleted());
        }
        Ok(())
    }

    /// Deletes rows of a group, which may refer to each other, in waves. `rows` has the index of the map in the group and
    /// the index of the row; a node is an index in `rows`. No remaining row refers to a row of the present wave, and no
    /// row refers to another row of its own wave. So the waves also work if the database checks foreign keys at each
    /// row, as MariaDB does.
    fn delete_in_waves(&self, group: &[Map], rows: &[(usize, usize)]) -> Result<()> {
        let nodes: HashMap<_, _> = rows.iter().enumerate().map(|(node, row)| (*row, node)).collect();
        let parents_of = |node: usize| -> Vec<usize> {
            let (map, row) = rows[node];
            let mut parents = Vec::new();
            for to in group[map].references_of(row) {
                for (index, map) in group.iter().enumerate().filter(|(_, map)| map.table() == to.parent) {
                    let deletes = map.deletes_of(&*to.key).into_iter();
                    parents.extend(deletes.filter_map(|row| nodes.get(&(index, row)).copied()));
                }
            }
            parents
        };
        let mut parents: Vec<Vec<usize>> = (0..rows.len()).map(parents_of).collect();
        // How many of the remaining rows refer to each row.
        let mut children = vec![0_usize; rows.len()];
        for (node, &(map, row)) in rows.iter().enumerate() {
            // If foreign keys are checked at each row, a row that refers to itself cannot be deleted.
            if parents[node].contains(&node) && !self.checks_at_end {
                group[map].unlink(row, &[group[map].table()], self.at)?;
            }
            parents[node].retain(|&parent| parent != node);
            parents[node].iter().for_each(|&parent| children[parent] += 1);
        }
        let mut left: BTreeSet<usize> = (0..rows.len()).collect();
        let mut free: Vec<usize> = left.iter().copied().filter(|&node| children[node] == 0).collect();
        while let Some(&first) = left.first() {
            let mut wave: Vec<usize> = free.drain(..).filter(|node| left.contains(node)).collect();
            if wave.is_empty() {
                if let [map] = group
                    && self.checks_at_end
                    && map.deletes_at_once(left.len())
                {
                    return self.delete_rows(map, left.iter().map(|&node| rows[node].1), true);
                }
                let mut unlinked = None;
                for &node in &left {
                    let (map, row) = rows[node];
                    let tables: Vec<TypeId> = parents[node].iter().map(|&node| group[rows[node].0].table()).collect();
                    if group[map].unlink(row, &tables, self.at)? {
                        unlinked = Some(node);
                        break;
                    }
                }
                if let Some(node) = unlinked {
                    // Some of its foreign keys may not be NULL.
                    let others = parents_of(node).into_iter().filter(|&parent| parent != node).collect();
                    let former = std::mem::replace(&mut parents[node], others);
                    parents[node].iter().for_each(|&parent| children[parent] += 1);
                    release(former, &mut children, &mut free);
                    continue;
                }
                // The database decides: a cascade may delete the circle, or the database refuses the DELETE.
                wave.push(first);
            }
            for (index, map) in group.iter().enumerate().rev() {
                let of_map = wave.iter().map(|&node| rows[node]).filter(|(map, _)| *map == index);
                self.delete_rows(map, of_map.map(|(_, row)| row), false)?;
            }
            for node in wave {
                left.remove(&node);
                release(std::mem::take(&mut parents[node]), &mut children, &mut free);
            }
        }
        Ok(())
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
fn parents_first(mut left: Vec<Map>) -> Vec<Vec<Map>> {
    let mut groups = Vec::with_capacity(left.len());
    while !left.is_empty() {
        let is_free = |map: &Map| {
            left.iter()
                .all(|other| Rc::ptr_eq(other, map) || !map.refers_to(other.table()) || other.refers_to(map.table()))
        };
        let next = left.iter().position(is_free).unwrap_or(0);
        let map = left.remove(next);
        let is_in_circle = |other: &Map| map.refers_to(other.table()) && other.refers_to(map.table());
        let (circle, others): (Vec<Map>, Vec<Map>) = left.into_iter().partition(is_in_circle);
        left = others;
        groups.push([vec![map], circle].concat());
    }
    groups
}
