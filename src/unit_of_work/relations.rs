//! Foreign keys between entities, as far as a flush needs them.

use std::any::{Any, TypeId};
use std::collections::HashSet;
use std::fmt;
use std::rc::Rc;

use super::entity::Entity;

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
    /// The foreign keys of `T` and of its ancestors.
    pub(super) fn of<T: Entity>() -> Self {
        let mut relations = Self::default();
        relations.visit::<T>();
        relations
    }

    /// Adds the foreign keys of a parent. Each type is visited once, because types may refer to each other in a circle.
    pub(super) fn visit<T: Entity>(&mut self) {
        if self.visited.insert(TypeId::of::<T>()) {
            T::parents(self);
        }
    }

    /// Adds a foreign key.
    pub fn add(&mut self, child: TypeId, parent: TypeId) {
        self.edges.insert((child, parent));
    }

    pub(super) fn extend(&mut self, other: &Self) {
        self.edges.extend(&other.edges);
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

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reference").finish_non_exhaustive()
    }
}

/// A foreign key that differs between the old and the new value of a row.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub struct Move {
    pub from: Option<Reference>,
    pub to: Option<Reference>,
}
