//! The changes to one entity that this transaction has flushed, with the savepoint of each.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::changes::{Change, ChangeKind};
use super::entity::Entity;
use super::tracked_row::TrackedRow;
use super::unit_state::UnitState;
use crate::panic::drop_each_catching_panics;

pub(super) struct SavepointLog<T: Entity> {
    unit_state: Rc<UnitState>,
    records: RefCell<Vec<LogRecord<T>>>,
}

struct LogRecord<T: Entity> {
    /// How many savepoints were open. The level never decreases from one record to the next.
    level: u32,
    number: u64,
    /// None for a row that a read did not find.
    kind: Option<ChangeKind>,
    tracked: Rc<TrackedRow<T>>,
}

impl<T: Entity> SavepointLog<T> {
    pub(super) fn new(unit_state: Rc<UnitState>) -> Self {
        Self { unit_state, records: RefCell::default() }
    }

    pub(super) fn record(&self, kind: ChangeKind, tracked: &Rc<TrackedRow<T>>) {
        self.push(Some(kind), tracked);
    }

    /// Records a row that was deleted by another transaction or by a statement of the program. A rollback may bring the
    /// row back.
    pub(super) fn record_missing(&self, tracked: &Rc<TrackedRow<T>>) {
        self.push(None, tracked);
    }

    fn push(&self, kind: Option<ChangeKind>, tracked: &Rc<TrackedRow<T>>) {
        let (level, number) = (self.unit_state.level(), self.unit_state.count_change());
        self.records.borrow_mut().push(LogRecord { level, number, kind, tracked: Rc::clone(tracked) });
    }

    pub(super) fn reserve(&self, records: usize) {
        self.records.borrow_mut().reserve(records);
    }

    /// Adds one change for each row: an insert if this transaction inserted the row, and nothing if it inserted and
    /// deleted the row.
    pub(super) fn collect_changes(&self, changes: &mut Vec<Change>) {
        let records = self.records.borrow();
        let mut rows: HashMap<*const TrackedRow<T>, (Option<ChangeKind>, &LogRecord<T>)> =
            HashMap::with_capacity(records.len());
        for (record, kind) in records.iter().filter_map(|record| Some((record, record.kind?))) {
            let row = rows.entry(Rc::as_ptr(&record.tracked)).or_insert((Some(kind), record));
            row.0 = match (row.0, kind) {
                (Some(ChangeKind::Insert), ChangeKind::Delete) | (None, _) => None,
                (Some(ChangeKind::Insert), _) => Some(ChangeKind::Insert),
                (Some(_), kind) => Some(kind),
            };
        }
        changes.extend(
            rows.into_values().filter_map(|(kind, record)| Some(Change::new(kind?, &record.tracked, record.number))),
        );
    }

    /// After a savepoint was released: its records now belong to the enclosing savepoint or transaction.
    pub(super) fn release_level(&self, level: u32) {
        let mut records = self.records.borrow_mut();
        let released = records.iter_mut().rev().take_while(|record| record.level >= level);
        released.for_each(|record| record.level = level - 1);
    }

    /// Removes and returns the records since the savepoint `level` was opened, the last one first.
    pub(super) fn take(&self, level: u32) -> Vec<(Option<ChangeKind>, Rc<TrackedRow<T>>)> {
        let mut records = self.records.borrow_mut();
        let from = records.partition_point(|record| record.level < level);
        records.split_off(from).into_iter().rev().map(|record| (record.kind, record.tracked)).collect()
    }

    pub(super) fn clear(&self) {
        drop_each_catching_panics(self.records.take().into_iter().map(|record| record.tracked));
    }
}
