//! What can be asked of a field whose type is not known to the macro: the most special of these traits that its type has wins, because
//! it takes the fewest references.

use super::entity::Entity;
use super::key::Fk;

/// One field.
#[derive(Debug)]
pub struct Probe<'p, T>(pub &'p T);

pub trait IsKey {
    type Id;
    fn is_known(&self) -> bool;
    fn part(&self) -> Option<Self::Id>;
}

impl<E: Entity> IsKey for Probe<'_, Fk<E>> {
    type Id = E::Id;

    fn is_known(&self) -> bool {
        self.0.id().is_some()
    }

    fn part(&self) -> Option<E::Id> {
        self.0.id().cloned()
    }
}

pub trait IsOtherKey {
    fn is_known(&self) -> bool;
}

impl<E: Entity> IsOtherKey for Probe<'_, Option<Fk<E>>> {
    fn is_known(&self) -> bool {
        self.0.as_ref().is_none_or(|key| key.id().is_some())
    }
}

pub trait IsValue {
    type Value;

    fn is_known(&self) -> bool {
        true
    }

    fn part(&self) -> Option<Self::Value>;
}

impl<T: Clone> IsValue for &Probe<'_, T> {
    type Value = T;

    fn part(&self) -> Option<T> {
        Some(self.0.clone())
    }
}

/// A field of a new row, and the same of the row.
#[derive(Debug)]
pub struct Compare<'p, A, B>(pub &'p A, pub &'p B);

pub trait SameKey {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> SameKey for Compare<'_, Fk<E>, K> {
    fn differs(&self) -> bool {
        self.0.id() != Some(self.1)
    }
}

pub trait OtherKey {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> OtherKey for Compare<'_, Option<Fk<E>>, Option<K>> {
    fn differs(&self) -> bool {
        self.0.as_ref().and_then(Fk::id) != self.1.as_ref()
    }
}

pub trait Comparable {
    fn differs(&self) -> bool;
}

impl<A: PartialEq<B>, B> Comparable for &Compare<'_, A, B> {
    fn differs(&self) -> bool {
        self.0 != self.1
    }
}

pub trait Uncomparable {
    fn differs(&self) -> bool {
        false
    }
}

impl<A, B> Uncomparable for &&Compare<'_, A, B> {}
