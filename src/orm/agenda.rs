//! What the entries of one session have to know of it, and it of them, whatever their type.

use std::cell::Cell;

use crate::error::Place;

#[derive(Debug, Default)]
pub(crate) struct Agenda {
    /// Raised whenever what has been read may have become old.
    epoch: Cell<u64>,
    /// Where the first change was made that has not been flushed.
    unflushed: Cell<Option<Place>>,
    /// Open savepoints of the session.
    level: Cell<u32>,
    /// Changes flushed so far.
    flushed: Cell<u64>,
    /// Numbers given to entries so far.
    numbers: Cell<u64>,
    /// The session is over, or has been emptied: nothing of this agenda is kept any more.
    ended: Cell<bool>,
}

impl Agenda {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    pub(crate) fn expire(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }

    pub(crate) fn note_change(&self, at: Place) {
        if self.unflushed.get().is_none() {
            self.unflushed.set(Some(at));
        }
    }

    pub(crate) fn unflushed(&self) -> Option<Place> {
        self.unflushed.get()
    }

    pub(crate) fn nothing_unflushed(&self) {
        self.unflushed.set(None);
    }

    pub(crate) fn level(&self) -> u32 {
        self.level.get()
    }

    pub(crate) fn set_level(&self, level: u32) {
        self.level.set(level);
    }

    /// The number of one more change.
    pub(crate) fn count_change(&self) -> u64 {
        self.flushed.set(self.flushed.get() + 1);
        self.flushed.get()
    }

    /// A number that is greater than all before.
    pub(crate) fn next_number(&self) -> u64 {
        self.numbers.set(self.numbers.get() + 1);
        self.numbers.get()
    }

    pub(crate) fn end(&self) {
        self.ended.set(true);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }
}
