//! Foreign keys between entities, as far as a flush needs them.

use std::any::{Any, TypeId};
use std::collections::HashSet;
use std::rc::Rc;

use super::entity::{Columns, Entity};

/// The foreign keys of an entity and of all its ancestors, whether or not a session has used those types. A foreign key
/// connects tables, and several entities may share a table.
#[doc(hidden)]
#[derive(Debug, Clone, Default)]
pub struct Relations {
    /// Pairs of a child table and its parent table.
    edges: HashSet<(TypeId, TypeId)>,
    visited: HashSet<TypeId>,
}

impl Relations {
    /// Adds the foreign keys of an entity and of its ancestors. Each type is visited once, because types may refer to each other in a circle.
    pub(super) fn visit<T: Entity>(&mut self) {
        if self.visited.insert(TypeId::of::<T>()) {
            T::parents(self);
        }
    }

    /// Adds a foreign key.
    pub fn add(&mut self, child: TypeId, parent: TypeId) {
        self.edges.insert((child, parent));
    }

    /// The ancestor tables of `child`: its parents, their parents and so on. They include `child` if its rows refer to
    /// rows of their own table, directly or through other tables.
    pub(super) fn ancestors(&self, child: TypeId) -> HashSet<TypeId> {
        let mut found = HashSet::new();
        let mut next = vec![child];
        while let Some(child) = next.pop() {
            for (_, parent) in self.edges.iter().filter(|(other, _)| *other == child) {
                if found.insert(*parent) {
                    next.push(*parent);
                }
            }
        }
        found
    }
}

/// A foreign key that is not NULL.
#[doc(hidden)]
#[derive(Clone)]
#[allow(missing_debug_implementations)]
pub struct Reference {
    /// The parent's table.
    pub(super) parent: TypeId,
    /// The parent's `Id`. It has another type if the foreign key refers to a column other than the parent's key.
    pub(super) key: Rc<dyn Any>,
}

impl Reference {
    pub fn new(parent: TypeId, key: impl Any) -> Self {
        Self { parent, key: Rc::new(key) }
    }
}

/// A foreign key of a row.
#[doc(hidden)]
#[allow(missing_debug_implementations)]
pub struct ForeignKey {
    /// The columns that an UPDATE may set.
    pub columns: Columns,
    /// The parent's table.
    pub parent: TypeId,
    /// None if the key is NULL.
    pub reference: Option<Reference>,
}

/// The foreign keys that differ between two values of a row: the former reference and the new one.
pub(super) fn moves<T: Entity>(old: &T, new: &T) -> Vec<(Option<Reference>, Option<Reference>)> {
    let columns = T::differences(old, new);
    let keys = std::iter::zip(old.foreign_keys(), new.foreign_keys());
    keys.filter(|(old, _)| old.columns & columns != 0).map(|(old, new)| (old.reference, new.reference)).collect()
}
