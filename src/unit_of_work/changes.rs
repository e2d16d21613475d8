//! The changes that a flush will send, and those that a transaction has flushed.

use std::any::Any;
use std::fmt;
use std::rc::Rc;

use super::entity::Entity;
use super::tracked::Tracked;
use super::tracked_row::TrackedRow;

/// The kind of a change to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums, reason = "there is no fourth")]
pub enum ChangeKind {
    /// The row is inserted.
    Insert,
    /// Columns of the row are updated.
    Update,
    /// The row is deleted.
    Delete,
}

/// A `Tracked<T>` of any entity.
trait Handle: Any + fmt::Debug {
    fn entity(&self) -> &'static str;
}

impl<T: Entity> Handle for Tracked<T> {
    fn entity(&self) -> &'static str {
        T::NAME
    }
}

/// A change to one row.
#[derive(Clone)]
pub struct Change {
    kind: ChangeKind,
    handle: Rc<dyn Handle>,
    /// Changes are ordered by this number.
    number: u64,
}

impl Change {
    pub(super) fn new<T: Entity>(kind: ChangeKind, tracked: &Rc<TrackedRow<T>>, number: u64) -> Self {
        Self { kind, handle: Rc::new(Tracked(Rc::clone(tracked))), number }
    }

    /// The kind of the change.
    pub fn kind(&self) -> ChangeKind {
        self.kind
    }

    /// The name of the entity.
    pub fn entity(&self) -> &'static str {
        self.handle.entity()
    }

    /// The handle of the row, if the row is a `T`.
    pub fn handle<T: Entity>(&self) -> Option<&Tracked<T>> {
        (&*self.handle as &dyn Any).downcast_ref()
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.kind, self.handle)
    }
}

/// Changes to rows, at most one for each row.
///
/// ```
/// # use diesel_session::Entity;
/// # use diesel_session::unit_of_work::{ChangeKind, Changes};
/// # fn names<User: Entity>(changes: &Changes, name: impl Fn(&User) -> String) -> Vec<String> {
/// let users = changes.of::<User>();
/// users.filter(|(kind, _)| *kind != ChangeKind::Delete).map(|(_, user)| name(&user.read())).collect()
/// # }
/// ```
#[derive(Debug, Clone, Default)]
pub struct Changes(Vec<Change>);

impl Changes {
    pub(super) fn in_order(mut changes: Vec<Change>) -> Self {
        changes.sort_unstable_by_key(|change| change.number);
        Self(changes)
    }

    /// Iterates over all changes.
    pub fn iter(&self) -> std::slice::Iter<'_, Change> {
        self.0.iter()
    }

    /// Iterates over the changes to rows of one entity.
    pub fn of<T: Entity>(&self) -> impl Iterator<Item = (ChangeKind, &Tracked<T>)> {
        self.0.iter().filter_map(|change| Some((change.kind, change.handle()?)))
    }

    /// The number of changes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no change.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'c> IntoIterator for &'c Changes {
    type Item = &'c Change;
    type IntoIter = std::slice::Iter<'c, Change>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl IntoIterator for Changes {
    type Item = Change;
    type IntoIter = std::vec::IntoIter<Change>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
