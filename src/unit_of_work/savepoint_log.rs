//! The changes to one entity that this transaction has flushed, with the savepoint of each.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use super::changes::{Change, ChangeKind};
use super::entity::Entity;
use super::tracked_row::TrackedRow;

pub(super) struct SavepointLog<T: Entity>(RefCell<Vec<LogRecord<T>>>);

impl<T: Entity> Default for SavepointLog<T> {
    fn default() -> Self {
        Self(RefCell::default())
    }
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
    /// `kind` is None for a row that was deleted by another transaction or by a statement of the program. A rollback may
    /// bring the row back.
    pub(super) fn record(&self, kind: Option<ChangeKind>, tracked: &Rc<TrackedRow<T>>) {
        let unit_state = &tracked.entity_state.unit_state;
        let (level, number) = (unit_state.level.get(), unit_state.next_number());
        self.0.borrow_mut().push(LogRecord { level, number, kind, tracked: Rc::clone(tracked) });
    }

    pub(super) fn reserve(&self, records: usize) {
        self.0.borrow_mut().reserve(records);
    }

    /// Adds one change for each row: an insert if this transaction inserted the row, and nothing if it inserted and
    /// deleted the row.
    pub(super) fn collect_changes(&self, changes: &mut Vec<Change>) {
        let records = self.0.borrow();
        let mut rows: HashMap<*const TrackedRow<T>, (Option<ChangeKind>, &LogRecord<T>)> = HashMap::new();
        for record in records.iter().filter(|record| record.kind.is_some()) {
            rows.entry(Rc::as_ptr(&record.tracked))
                .and_modify(|(kind, _)| {
                    *kind = match (*kind, record.kind) {
                        (Some(ChangeKind::Insert), Some(ChangeKind::Delete)) | (None, _) => None,
                        (Some(ChangeKind::Insert), _) => Some(ChangeKind::Insert),
                        (_, kind) => kind,
                    }
                })
                .or_insert((record.kind, record));
        }
        let changes_of_rows = rows.into_values();
        changes
            .extend(changes_of_rows.filter_map(|(kind, first)| Some(Change::new(kind?, &first.tracked, first.number))));
    }

    /// After a savepoint was released: its records now belong to the enclosing savepoint or transaction.
    pub(super) fn release_level(&self, level: u32) {
        let mut records = self.0.borrow_mut();
        let released = records.iter_mut().rev().take_while(|record| record.level >= level);
        released.for_each(|record| record.level = level - 1);
    }

    /// Removes and returns the records since the savepoint `level` was opened, the last one first.
    pub(super) fn take(&self, level: u32) -> Vec<(Option<ChangeKind>, Rc<TrackedRow<T>>)> {
        let mut records = self.0.borrow_mut();
        let from = records.partition_point(|record| record.level < level);
        records.split_off(from).into_iter().rev().map(|record| (record.kind, record.tracked)).collect()
    }
}
