//! What can be asked of a field whose type is not known to the macro: the most special of these traits that its type has wins, because
//! it takes the fewest references.

use std::any::TypeId;
use std::fmt;
use std::marker::PhantomData;

use super::entity::Entity;
use super::key::Fk;
use super::relation::{Reference, Relations};

/// The type that a foreign key refers to, which need not be an entity.
pub struct Parent<P>(PhantomData<P>);

impl<P> Parent<P> {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

impl<P> fmt::Debug for Parent<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Parent")
    }
}

pub trait EntityParent {
    fn visit(&self, found: &mut Relations);

    fn table(&self) -> TypeId;
}

impl<P: Entity> EntityParent for &Parent<P> {
    fn visit(&self, found: &mut Relations) {
        found.visit::<P>();
    }

    fn table(&self) -> TypeId {
        P::table()
    }
}

/// Of its table nothing is known, so its type stands for that.
pub trait OtherParent {
    fn visit(&self, _: &mut Relations) {}

    fn table(&self) -> TypeId;
}

impl<P: 'static> OtherParent for Parent<P> {
    fn table(&self) -> TypeId {
        TypeId::of::<P>()
    }
}

/// One field.
#[derive(Debug)]
pub struct Probe<'p, T>(pub &'p T);

pub trait IsKey {
    type Id;
    fn is_known(&self) -> bool;
    fn reference(&self) -> Option<Reference>;
    fn part(&self) -> Option<Self::Id>;
}

impl<E: Entity> IsKey for Probe<'_, Fk<E>> {
    type Id = E::Id;

    fn is_known(&self) -> bool {
        self.0.id().is_some()
    }

    fn reference(&self) -> Option<Reference> {
        self.0.id().map(|id| Reference::new(E::table(), id.clone()))
    }

    fn part(&self) -> Option<E::Id> {
        self.0.id().cloned()
    }
}

pub trait IsOtherKey {
    fn is_known(&self) -> bool;
    fn reference(&self) -> Option<Reference>;
}

impl<E: Entity> IsOtherKey for Probe<'_, Option<Fk<E>>> {
    fn is_known(&self) -> bool {
        self.0.as_ref().is_none_or(|key| key.id().is_some())
    }

    fn reference(&self) -> Option<Reference> {
        self.0.as_ref()?.id().map(|id| Reference::new(E::table(), id.clone()))
    }
}

pub trait IsValue {
    type Value;

    fn is_known(&self) -> bool {
        true
    }

    fn reference(&self) -> Option<Reference> {
        None
    }

    fn part(&self) -> Option<Self::Value>;
}

impl<T: Clone> IsValue for &Probe<'_, T> {
    type Value = T;

    fn part(&self) -> Option<T> {
        Some(self.0.clone())
    }
}

/// How many bytes a value has on its way to the database, as far as can be told. The derive calls `(&&&Probe(..)).bytes()`.
pub trait HasBytes {
    fn bytes(&self) -> usize;
}

impl<T: AsRef<[u8]>> HasBytes for &&Probe<'_, T> {
    fn bytes(&self) -> usize {
        VALUE + self.0.as_ref().len()
    }
}

pub trait MayHaveBytes {
    fn bytes(&self) -> usize;
}

impl<T: AsRef<[u8]>> MayHaveBytes for &&Probe<'_, Option<T>> {
    fn bytes(&self) -> usize {
        VALUE + self.0.as_ref().map_or(0, |value| value.as_ref().len())
    }
}

pub trait HasSize {
    fn bytes(&self) -> usize;
}

impl<T> HasSize for Probe<'_, T> {
    fn bytes(&self) -> usize {
        VALUE + size_of::<T>()
    }
}

/// What a value has beside its bytes: its type, its length.
const VALUE: usize = 16;

/// A field of a new row, and the same field of the row. The derive calls `(&&&Compare(..)).differs()`: method resolution begins with the
/// traits that are implemented for `&&Compare`, so those are the most special ones, and those of `Compare` itself come last.
#[derive(Debug)]
pub struct Compare<'p, A, B>(pub &'p A, pub &'p B);

pub trait SameKey {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> SameKey for &&Compare<'_, Fk<E>, K> {
    fn differs(&self) -> bool {
        self.0.id() != Some(self.1)
    }
}

pub trait OtherKey {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> OtherKey for &&Compare<'_, Option<Fk<E>>, Option<K>> {
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

impl<A, B> Uncomparable for Compare<'_, A, B> {}
