//! The state that all tracked rows of one entity share.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::entity::Entity;
use super::tracked_row::TrackedRow;
use super::unit_state::{NEVER, UnitState};
use crate::error::{Result, SourceLocation};
use crate::panic::drop_catching_panic;

/// Rows by the number under which they were inserted, in that order. A row is removed without a search.
pub(crate) type NumberedRows<T> = BTreeMap<u64, Rc<TrackedRow<T>>>;

/// The state that all tracked rows of one entity in one session share.
pub(crate) struct EntityState<T: Entity> {
    pub(super) unit_state: Rc<UnitState>,
    /// A row of this entity that was read before this moment may be outdated.
    epoch: Cell<u64>,
    /// The session has ended or has expunged all rows. The rows are detached.
    pub(super) has_ended: Cell<bool>,
    /// Reads a row again.
    pub(super) row_reader: RowReader<T>,
    /// The rows for which the program has requested a write guard since the last flush.
    dirty_rows: RefCell<NumberedRows<T>>,
}

/// Reads the row of a key through the session, without a flush. `true`: with a lock, if only a lock makes the database
/// return the newest row.
pub(super) type RowReader<T> = Box<dyn Fn(&<T as Entity>::Id, bool, SourceLocation) -> Result<Option<T>>>;

impl<T: Entity> EntityState<T> {
    pub(super) fn new(unit_state: &Rc<UnitState>, row_reader: RowReader<T>) -> Self {
        Self {
            unit_state: Rc::clone(unit_state),
            epoch: Cell::new(NEVER),
            has_ended: Cell::new(false),
            row_reader,
            dirty_rows: RefCell::default(),
        }
    }

    /// A row that was read before this moment may be outdated.
    #[inline]
    pub(super) fn epoch(&self) -> u64 {
        self.unit_state.epoch.get().max(self.epoch.get())
    }

    pub(super) fn expire(&self) {
        self.epoch.set(self.unit_state.tick());
    }

    /// The rows that are marked dirty, in the order in which they were marked.
    pub(super) fn dirty_rows(&self) -> Vec<Rc<TrackedRow<T>>> {
        self.dirty_rows.borrow().values().cloned().collect()
    }

    pub(super) fn has_dirty_rows(&self) -> bool {
        !self.dirty_rows.borrow().is_empty()
    }

    pub(super) fn mark_dirty(&self, tracked: &Rc<TrackedRow<T>>) {
        tracked.dirty_number.set(self.unit_state.next_number());
        self.dirty_rows.borrow_mut().insert(tracked.dirty_number.get(), Rc::clone(tracked));
    }

    /// Removes a row that has no original values any more from the dirty rows.
    pub(super) fn unmark_dirty(&self, tracked: &TrackedRow<T>) {
        let removed = self.dirty_rows.borrow_mut().remove(&tracked.dirty_number.get());
        drop_catching_panic(removed);
    }
}
