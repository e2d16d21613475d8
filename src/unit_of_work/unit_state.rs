//! The state that all tracked rows of one session share, whatever their entity.

use std::cell::Cell;

use crate::error::SourceLocation;

#[derive(Debug, Default)]
pub(crate) struct UnitState {
    /// A logical clock. It advances whenever values that were read may have become outdated.
    clock: Cell<u64>,
    /// A row that was read before this moment may be outdated.
    pub(super) epoch: Cell<u64>,
    /// When the present attempt of `retry` began; `NEVER` outside of an attempt.
    pub(super) attempt_began: Cell<u64>,
    /// When the last transaction ended.
    last_transaction_end: Cell<u64>,
    /// When the present transaction sent its first statement that may change rows; `NEVER` if there was none.
    first_change: Cell<u64>,
    /// A row that was read at or after the first moment and before the second may show changes that were rolled back.
    rolled_back: Cell<Option<(u64, u64)>>,
    /// The session is in autocommit mode and outside of a transaction: a read is valid for its own statement only.
    pub(crate) autocommit_reads: Cell<bool>,
    /// The source location of the first change that is not flushed.
    pub(crate) unflushed: Cell<Option<SourceLocation>>,
    /// The number of open savepoints of the session.
    pub(crate) level: Cell<u32>,
    /// The last number that `next_number` has returned.
    last_number: Cell<u64>,
    /// When the last row with an AUTO_INCREMENT key was inserted.
    last_auto_increment_insert: Cell<u64>,
}

/// A moment before the first: the row was never read, or its value is not valid any more.
pub(super) const NEVER: u64 = 0;

impl UnitState {
    pub(super) fn new() -> Self {
        let state = Self::default();
        // The clock begins after `NEVER`.
        state.end_transaction();
        state
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

    /// Expires all rows.
    pub(crate) fn expire(&self) {
        self.epoch.set(self.tick());
    }

    /// Begins an attempt of `retry`, in a new transaction, in which every known value is outdated.
    pub(crate) fn begin_attempt(&self) {
        self.expire();
        self.attempt_began.set(self.clock.get());
    }

    /// Ends the transaction, and the attempt of `retry` that it belongs to.
    pub(super) fn end_transaction(&self) {
        self.expire();
        self.level.set(0);
        self.attempt_began.set(NEVER);
        self.first_change.set(NEVER);
        self.last_transaction_end.set(self.clock.get());
        self.last_auto_increment_insert.set(NEVER);
    }

    /// Notes that the present transaction sends a statement that may change rows.
    #[inline]
    pub(crate) fn note_changing(&self) {
        if self.first_change.get() == NEVER {
            self.first_change.set(self.clock.get());
        }
    }

    /// Notes that the transaction or a savepoint was rolled back, or may have been. The interval only grows, so it also
    /// contains rows that were read between two such transactions.
    pub(super) fn note_rollback(&self) {
        let first = self.first_change.get();
        if first != NEVER {
            let from = self.rolled_back.get().map_or(first, |(from, _)| from.min(first));
            self.rolled_back.set(Some((from, self.tick())));
        }
    }

    /// Whether a row that was read at `moment` may show changes that were rolled back. The moment is `NEVER` for a row
    /// that was expired individually.
    pub(super) fn may_be_rolled_back(&self, moment: u64) -> bool {
        self.rolled_back.get().is_some_and(|(from, to)| moment < to && (moment >= from || moment == NEVER))
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

    pub(crate) fn note_unflushed(&self, at: SourceLocation) {
        self.unflushed.set(self.unflushed.get().or(Some(at)));
    }

    /// A number that is greater than all earlier ones.
    pub(super) fn next_number(&self) -> u64 {
        self.last_number.set(self.last_number.get() + 1);
        self.last_number.get()
    }
}
