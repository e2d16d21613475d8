//! What the entries of one session have to know of it, and it of them, whatever their type.

use std::cell::Cell;

use crate::error::Place;

#[derive(Debug)]
pub(crate) struct UnitState {
    /// Counts the moments at which something that was read may have become outdated. It begins at 1.
    clock: Cell<u64>,
    /// Whatever was read before this moment may be outdated.
    epoch: Cell<u64>,
    /// When the present attempt of `retry` began; 0 outside of one.
    attempt: Cell<u64>,
    /// When the last transaction ended.
    transaction: Cell<u64>,
    /// When the present transaction sent its first statement that may change rows; `NEVER` if it has sent none.
    changing: Cell<u64>,
    /// A row that was read from the first of these moments on and before the second one may show changes that were rolled back.
    rolled_back: Cell<(u64, u64)>,
    /// What is read now is valid for no longer than its statement, which is committed by itself.
    fleeting: Cell<bool>,
    /// Where the first change was made that has not been flushed.
    unflushed: Cell<Option<Place>>,
    /// Open savepoints of the session.
    level: Cell<u32>,
    /// Changes flushed so far.
    flushed: Cell<u64>,
    /// Numbers given to entries so far.
    numbers: Cell<u64>,
    /// When a row was inserted last whose key the database counts.
    counted: Cell<u64>,
    /// A row that is read now is read outside of the transaction that a write of it will begin.
    outside: Cell<bool>,
    /// The session is over, or has been emptied: nothing of this unit_state is kept any more.
    ended: Cell<bool>,
}

/// The moment of a read whose answer is valid no longer.
pub(super) const NEVER: u64 = 0;

impl Default for UnitState {
    fn default() -> Self {
        Self {
            clock: Cell::new(1),
            epoch: Cell::new(1),
            attempt: Cell::new(NEVER),
            transaction: Cell::new(1),
            changing: Cell::new(NEVER),
            rolled_back: Cell::new((u64::MAX, NEVER)),
            fleeting: Cell::new(false),
            unflushed: Cell::new(None),
            level: Cell::new(0),
            flushed: Cell::new(0),
            ended: Cell::new(false),
            numbers: Cell::new(0),
            counted: Cell::new(NEVER),
            outside: Cell::new(false),
        }
    }
}

impl UnitState {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    pub(crate) fn expire(&self) {
        self.epoch.set(self.tick());
    }

    /// A new moment, after all that were.
    pub(super) fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.get()
    }

    /// The moment to note for a row that is read now.
    pub(super) fn read_now(&self) -> u64 {
        if self.fleeting.get() { NEVER } else { self.clock.get() }
    }

    #[inline]
    pub(crate) fn set_fleeting(&self, fleeting: bool) {
        self.fleeting.set(fleeting);
    }

    #[inline]
    pub(super) fn attempt(&self) -> u64 {
        self.attempt.get()
    }

    /// An attempt of `retry` begins: nothing is known.
    pub(super) fn begin_attempt(&self) {
        self.expire();
        self.attempt.set(self.clock.get());
    }

    /// The transaction has ended, and with it the attempt that it was.
    pub(super) fn end_transaction(&self) {
        self.expire();
        self.attempt.set(NEVER);
        self.changing.set(NEVER);
        self.transaction.set(self.clock.get());
        self.counted.set(NEVER);
        self.outside.set(false);
    }

    /// The present transaction sends a statement that may change rows.
    #[inline]
    pub(super) fn note_changing(&self) {
        if self.changing.get() == NEVER {
            self.changing.set(self.clock.get());
        }
    }

    /// The transaction, or a savepoint in it, was rolled back, or may have been. The interval only grows, so rows that were read
    /// between two such transactions are in it too.
    pub(super) fn note_rollback(&self) {
        if self.changing.get() != NEVER {
            let (from, _) = self.rolled_back.get();
            self.rolled_back.set((from.min(self.changing.get()), self.tick()));
        }
    }

    /// Whether a row that was read at `moment` may show changes that were rolled back. Of a row that was expired by itself the moment
    /// is not known.
    pub(super) fn may_be_rolled_back(&self, moment: u64) -> bool {
        let (from, to) = self.rolled_back.get();
        moment < to && (moment >= from || moment == NEVER)
    }

    /// Whether something that was done at `moment` was done in the present transaction.
    pub(super) fn is_of_transaction(&self, moment: u64) -> bool {
        moment >= self.transaction.get()
    }

    /// An INSERT is sent for which the database counts. Whether the database certainly has not counted for another statement of this
    /// transaction, so that there is nothing to forget.
    pub(super) fn counts_now(&self) -> bool {
        let is_first = self.counted.get() == NEVER && self.epoch.get() == self.transaction.get();
        self.counted.set(self.clock.get());
        is_first
    }

    #[inline]
    pub(crate) fn set_outside(&self, outside: bool) {
        self.outside.set(outside);
    }

    #[inline]
    pub(super) fn is_outside(&self) -> bool {
        self.outside.get()
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
