//! The state that all tracked rows of one session share, whatever their entity.

use std::cell::Cell;

use crate::error::Place;

#[derive(Debug)]
pub(crate) struct UnitState {
    /// A logical clock. It advances whenever values that were read may have become outdated. It begins at 1.
    clock: Cell<u64>,
    /// A row that was read before this moment may be outdated.
    epoch: Cell<u64>,
    /// When the present attempt of `retry` began; `NEVER` outside of an attempt.
    attempt_began: Cell<u64>,
    /// When the last transaction ended.
    last_transaction_end: Cell<u64>,
    /// When the present transaction sent its first statement that may change rows; `NEVER` if there was none.
    first_change: Cell<u64>,
    /// A row that was read at or after the first moment and before the second may show changes that were rolled back.
    rolled_back: Cell<(u64, u64)>,
    /// The session is in autocommit mode and outside of a transaction: a read is valid for its own statement only.
    autocommit_reads: Cell<bool>,
    /// The source location of the first change that is not flushed.
    unflushed: Cell<Option<Place>>,
    /// The number of open savepoints of the session.
    level: Cell<u32>,
    /// The number of the last flushed change.
    last_change: Cell<u64>,
    /// The last number that `next_number` has returned.
    last_number: Cell<u64>,
    /// When the last row with an AUTO_INCREMENT key was inserted.
    last_auto_increment_insert: Cell<u64>,
    /// A read now happens before the transaction that the first write will begin.
    reads_before_transaction: Cell<bool>,
    /// The session has ended or has expunged all rows. Rows of this state are detached.
    ended: Cell<bool>,
}

/// A moment before the first: the row was never read, or its value is not valid any more.
pub(super) const NEVER: u64 = 0;

impl Default for UnitState {
    fn default() -> Self {
        Self {
            clock: Cell::new(1),
            epoch: Cell::new(1),
            attempt_began: Cell::new(NEVER),
            last_transaction_end: Cell::new(1),
            first_change: Cell::new(NEVER),
            rolled_back: Cell::new((u64::MAX, NEVER)),
            autocommit_reads: Cell::new(false),
            unflushed: Cell::new(None),
            level: Cell::new(0),
            last_change: Cell::new(0),
            ended: Cell::new(false),
            last_number: Cell::new(0),
            last_auto_increment_insert: Cell::new(NEVER),
            reads_before_transaction: Cell::new(false),
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

    /// Advances the clock.
    pub(super) fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.get()
    }

    /// The moment of a read that happens now.
    pub(super) fn read_now(&self) -> u64 {
        if self.autocommit_reads.get() { NEVER } else { self.clock.get() }
    }

    #[inline]
    pub(crate) fn set_autocommit_reads(&self, autocommit_reads: bool) {
        self.autocommit_reads.set(autocommit_reads);
    }

    #[inline]
    pub(super) fn attempt_began(&self) -> u64 {
        self.attempt_began.get()
    }

    /// Begins an attempt of `retry`, in which every known value is outdated.
    pub(super) fn begin_attempt(&self) {
        self.expire();
        self.attempt_began.set(self.clock.get());
    }

    /// Ends the transaction, and the attempt of `retry` that it belongs to.
    pub(super) fn end_transaction(&self) {
        self.expire();
        self.attempt_began.set(NEVER);
        self.first_change.set(NEVER);
        self.last_transaction_end.set(self.clock.get());
        self.last_auto_increment_insert.set(NEVER);
        self.reads_before_transaction.set(false);
    }

    /// Notes that the present transaction sends a statement that may change rows.
    #[inline]
    pub(super) fn note_changing(&self) {
        if self.first_change.get() == NEVER {
            self.first_change.set(self.clock.get());
        }
    }

    /// Notes that the transaction or a savepoint was rolled back, or may have been. The interval only grows, so it also
    /// contains rows that were read between two such transactions.
    pub(super) fn note_rollback(&self) {
        if self.first_change.get() != NEVER {
            let (from, _) = self.rolled_back.get();
            self.rolled_back.set((from.min(self.first_change.get()), self.tick()));
        }
    }

    /// Whether a row that was read at `moment` may show changes that were rolled back. The moment is `NEVER` for a row
    /// that was expired individually.
    pub(super) fn may_be_rolled_back(&self, moment: u64) -> bool {
        let (from, to) = self.rolled_back.get();
        moment < to && (moment >= from || moment == NEVER)
    }

    /// Whether `moment` is in the present transaction.
    pub(super) fn is_of_transaction(&self, moment: u64) -> bool {
        moment >= self.last_transaction_end.get()
    }

    /// Notes an INSERT of rows with AUTO_INCREMENT keys. Returns whether LAST_INSERT_ID is certainly not set by an
    /// earlier statement of this transaction, so that it need not be reset.
    pub(super) fn note_auto_increment_insert(&self) -> bool {
        let is_first =
            self.last_auto_increment_insert.get() == NEVER && self.epoch.get() == self.last_transaction_end.get();
        self.last_auto_increment_insert.set(self.clock.get());
        is_first
    }

    #[inline]
    pub(crate) fn set_reads_before_transaction(&self, reads_before_transaction: bool) {
        self.reads_before_transaction.set(reads_before_transaction);
    }

    #[inline]
    pub(super) fn reads_before_transaction(&self) -> bool {
        self.reads_before_transaction.get()
    }

    pub(crate) fn note_unflushed(&self, at: Place) {
        if self.unflushed.get().is_none() {
            self.unflushed.set(Some(at));
        }
    }

    pub(crate) fn unflushed(&self) -> Option<Place> {
        self.unflushed.get()
    }

    pub(crate) fn clear_unflushed(&self) {
        self.unflushed.set(None);
    }

    pub(crate) fn level(&self) -> u32 {
        self.level.get()
    }

    pub(crate) fn set_level(&self, level: u32) {
        self.level.set(level);
    }

    /// Numbers the next flushed change.
    pub(crate) fn count_change(&self) -> u64 {
        self.last_change.set(self.last_change.get() + 1);
        self.last_change.get()
    }

    /// A number that is greater than all earlier ones.
    pub(crate) fn next_number(&self) -> u64 {
        self.last_number.set(self.last_number.get() + 1);
        self.last_number.get()
    }

    pub(crate) fn end(&self) {
        self.ended.set(true);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }
}
