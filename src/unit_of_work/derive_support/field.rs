//! Operations on fields whose types the macro does not know. Method resolution chooses the most specific trait that the
//! type of the field implements, because this trait needs the fewest references (autoref specialization).

use std::any::TypeId;
use std::marker::PhantomData;

use super::super::entity::Entity;
use super::super::fk::Fk;
use super::super::relations::{Reference, Relations};

/// The type that a foreign key refers to. It need not be an entity.
pub struct Parent<P>(pub PhantomData<P>);

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

/// A parent that is not an entity. Its table is unknown, so its own type identifies the table.
pub trait OtherParent {
    fn visit(&self, _: &mut Relations) {}
    fn table(&self) -> TypeId;
}

impl<P: 'static> OtherParent for Parent<P> {
    fn table(&self) -> TypeId {
        TypeId::of::<P>()
    }
}

/// One field of a row or of a new row.
pub struct Field<'p, T>(pub &'p T);

pub trait ForeignKeyField {
    type Id;
    /// The reference of the field. The outer `None`: the key is not known yet. The inner `None`: there is none.
    fn reference(&self) -> Option<Option<Reference>>;
    fn key_part(&self) -> Option<Self::Id>;
}

impl<E: Entity> ForeignKeyField for Field<'_, Fk<E>> {
    type Id = E::Id;

    fn reference(&self) -> Option<Option<Reference>> {
        self.key_part().map(|id| Some(Reference::new(E::table(), id)))
    }

    fn key_part(&self) -> Option<E::Id> {
        self.0.id().cloned()
    }
}

pub trait OptionalForeignKeyField {
    fn reference(&self) -> Option<Option<Reference>>;
}

impl<E: Entity> OptionalForeignKeyField for Field<'_, Option<Fk<E>>> {
    fn reference(&self) -> Option<Option<Reference>> {
        self.0.as_ref().map_or(Some(None), |key| Field(key).reference())
    }
}

pub trait ValueField {
    type Value;

    fn reference(&self) -> Option<Option<Reference>> {
        Some(None)
    }

    fn key_part(&self) -> Option<Self::Value>;
}

impl<T: Clone> ValueField for &Field<'_, T> {
    type Value = T;

    fn key_part(&self) -> Option<T> {
        Some(self.0.clone())
    }
}

/// The estimated size of a value in a statement, in bytes. The derive calls `(&&&Field(..)).bytes()`.
pub trait BytesField {
    fn bytes(&self) -> usize;
}

impl<T: AsRef<[u8]>> BytesField for &&Field<'_, T> {
    fn bytes(&self) -> usize {
        BYTES_BESIDE_VALUE + self.0.as_ref().len()
    }
}

pub trait OptionalBytesField {
    fn bytes(&self) -> usize;
}

impl<T: AsRef<[u8]>> OptionalBytesField for &&Field<'_, Option<T>> {
    fn bytes(&self) -> usize {
        BYTES_BESIDE_VALUE + self.0.as_ref().map_or(0, |value| value.as_ref().len())
    }
}

pub trait SizedField {
    fn bytes(&self) -> usize;
}

impl<T> SizedField for Field<'_, T> {
    fn bytes(&self) -> usize {
        BYTES_BESIDE_VALUE + size_of::<T>()
    }
}

/// Estimated number of bytes that a statement needs for a value beside its content: the type and the length.
const BYTES_BESIDE_VALUE: usize = 16;

/// A field of a new row, and the same field of the returned row. The derive calls `(&&&FieldPair(..)).differs()`.
/// Method resolution begins with the traits that are implemented for `&&FieldPair`, so these are the most specific
/// ones. The trait of `FieldPair` itself comes last.
pub struct FieldPair<'p, A, B>(pub &'p A, pub &'p B);

pub trait ForeignKeyPair {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> ForeignKeyPair for &&FieldPair<'_, Fk<E>, K> {
    fn differs(&self) -> bool {
        self.0.id() != Some(self.1)
    }
}

pub trait OptionalForeignKeyPair {
    fn differs(&self) -> bool;
}

impl<E: Entity<Id = K>, K: PartialEq> OptionalForeignKeyPair for &&FieldPair<'_, Option<Fk<E>>, Option<K>> {
    fn differs(&self) -> bool {
        self.0.as_ref().and_then(Fk::id) != self.1.as_ref()
    }
}

pub trait ComparablePair {
    fn differs(&self) -> bool;
}

impl<A: PartialEq<B>, B> ComparablePair for &FieldPair<'_, A, B> {
    fn differs(&self) -> bool {
        self.0 != self.1
    }
}

pub trait IncomparablePair {
    fn differs(&self) -> bool {
        false
    }
}

impl<A, B> IncomparablePair for FieldPair<'_, A, B> {}
