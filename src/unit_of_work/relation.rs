//! Foreign keys between entities, as far as a flush has to know them.

use std::any::{Any, TypeId};
use std::collections::HashSet;
use std::fmt;
use std::rc::Rc;

use super::entity::Entity;

/// The foreign keys of an entity type and of all its ancestors, whether a session has used those types or not. They are those of the
/// tables: several entities may have one.
#[doc(hidden)]
#[derive(Debug, Clone, Default)]
pub struct Relations {
    /// The tables of child and parent.
    edges: HashSet<(TypeId, TypeId)>,
    visited: HashSet<TypeId>,
}

impl Relations {
    /// Those of `T` and of its ancestors.
    pub(super) fn of<T: Entity>() -> Self {
        let mut relations = Self::default();
        relations.visit::<T>();
        relations
    }

    /// An entity type that is a parent. Types may refer to each other in a circle.
    pub(super) fn visit<T: Entity>(&mut self) {
        if self.visited.insert(TypeId::of::<T>()) {
            T::parents(self);
        }
    }

    /// A foreign key between these tables.
    pub fn add(&mut self, child: TypeId, parent: TypeId) {
        self.edges.insert((child, parent));
    }

    pub(super) fn extend(&mut self, other: &Self) {
        self.edges.extend(&other.edges);
    }

    /// The tables of the rows without which a row of the table `child` may not be: parents, their parents and so on; `child` itself if
    /// its rows refer, directly or not, to rows of their own table.
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
    /// The parent's `Id`. Another type if the foreign key refers to another column than the parent's key.
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

/// A foreign key that differs between two values of one row.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub struct Move {
    pub from: Option<Reference>,
    pub to: Option<Reference>,
}

/// A key without what databases may pass over when they compare: letter case and blanks. Keys that are equal for the database are
/// alike; others may be.
pub(super) fn alike(key: &impl fmt::Debug) -> String {
    let mut text = format!("{key:?}").to_lowercase();
    text.retain(|c| c != ' ');
    text
}
