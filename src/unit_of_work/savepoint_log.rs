//! What was flushed for one entity in the present transaction, savepoint by savepoint.

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
    notes: RefCell<Vec<Note<T>>>,
}

struct Note<T: Entity> {
    /// How many savepoints were open. Never less than in the note before.
    level: u32,
    number: u64,
    /// None for a row that was seen to be gone.
    kind: Option<ChangeKind>,
    entry: Rc<TrackedRow<T>>,
}

impl<T: Entity> SavepointLog<T> {
    pub(super) fn new(unit_state: Rc<UnitState>) -> Self {
        Self { unit_state, notes: RefCell::default() }
    }

    pub(super) fn note(&self, kind: ChangeKind, entry: &Rc<TrackedRow<T>>) {
        self.push(Some(kind), entry);
    }

    /// A row was gone that others, or statements that are not looked at, have deleted: with a rollback it may be there again.
    pub(super) fn note_gone(&self, entry: &Rc<TrackedRow<T>>) {
        self.push(None, entry);
    }

    fn push(&self, kind: Option<ChangeKind>, entry: &Rc<TrackedRow<T>>) {
        let (level, number) = (self.unit_state.level(), self.unit_state.count_change());
        self.notes.borrow_mut().push(Note { level, number, kind, entry: Rc::clone(entry) });
    }

    pub(super) fn reserve(&self, notes: usize) {
        self.notes.borrow_mut().reserve(notes);
    }

    /// Each row once: as new where it was inserted, and not at all where it went again.
    pub(super) fn tell(&self, changes: &mut Vec<Change>) {
        let notes = self.notes.borrow();
        let mut rows: HashMap<*const TrackedRow<T>, (Option<ChangeKind>, &Note<T>)> =
            HashMap::with_capacity(notes.len());
        for (note, kind) in notes.iter().filter_map(|note| Some((note, note.kind?))) {
            let row = rows.entry(Rc::as_ptr(&note.entry)).or_insert((Some(kind), note));
            row.0 = match (row.0, kind) {
                (Some(ChangeKind::Insert), ChangeKind::Delete) | (None, _) => None,
                (Some(ChangeKind::Insert), _) => Some(ChangeKind::Insert),
                (Some(_), kind) => Some(kind),
            };
        }
        changes
            .extend(rows.into_values().filter_map(|(kind, note)| Some(Change::new(kind?, &note.entry, note.number))));
    }

    /// What was sent in the savepoint of that level belongs to the one around it.
    pub(super) fn keep_level(&self, level: u32) {
        let mut notes = self.notes.borrow_mut();
        let kept = notes.iter_mut().rev().take_while(|note| note.level >= level);
        kept.for_each(|note| note.level = level - 1);
    }

    /// Takes out what was noted since `level` was opened, the last first.
    pub(super) fn take(&self, level: u32) -> Vec<(Option<ChangeKind>, Rc<TrackedRow<T>>)> {
        let mut notes = self.notes.borrow_mut();
        let from = notes.partition_point(|note| note.level < level);
        notes.split_off(from).into_iter().rev().map(|note| (note.kind, note.entry)).collect()
    }

    pub(super) fn forget(&self) {
        drop_each_catching_panics(self.notes.take().into_iter().map(|note| note.entry));
    }
}
