//! A row that a session tracks.
//!
//! Invariants: a row has original values exactly while it is among the dirty rows of its `EntityState`. A row has a
//! value in every phase except `Pending` and `Discarded`. A row does not change any more after its `UnitState` has
//! ended.
//!
//! A row is marked dirty when the program requests a write guard. The flush compares the value of a dirty row with its
//! original values. So the original values must be those that the present transaction sees: `begin_write` reads a row
//! again that may be outdated. If it cannot read the row, the original values are unverified, and the flush reads the
//! row before it compares.
//!
//! Code of the program (`Clone`, `Drop`, `PartialEq` of a row or its fields) may panic, and may use the session. So no
//! `RefCell` is borrowed while such code runs, and a replaced value is dropped last, when the tracked row is
//! consistent.

use std::cell::{Cell, OnceCell, RefCell};
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;

use super::entity::{Columns, Entity};
use super::entity_state::EntityState;
use super::fk::{Fk, KeyCell};
use super::unit_state::NEVER;
use crate::error::{Decision, Error, Place, Result, RowState, Undo, Verdict};
use crate::panic::{catch_panic, drop_catching_panic};
use crate::wording::phrase;

/// The state of a row, without what follows from the clock and the end of its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowPhase {
    /// The row was added and is not inserted yet.
    Pending,
    /// The row is in the database.
    Persistent,
    /// A rollback has undone the value in memory.
    RolledBack,
    /// The row is not in the database any more.
    Deleted,
    /// The row was added and then taken back, or its INSERT was rolled back.
    Discarded,
    /// The session does not track the row any more.
    Detached,
    /// A transaction whose commit was not answered has changed the row.
    Undecided,
}

impl RowPhase {
    /// Whether the row may be in the database. If so, this tracked row represents it.
    pub(crate) fn may_exist(self) -> bool {
        matches!(self, Self::Persistent | Self::RolledBack | Self::Undecided)
    }
}

/// The phases between which the verdict about a transaction decides.
struct PendingVerdict {
    verdict: Arc<Verdict>,
    committed: RowPhase,
    rolled_back: RowPhase,
}

/// The fields that a look-up by key reads come first, beside the counts of the `Rc`, so that they share a cache line.
#[repr(C)]
pub(crate) struct TrackedRow<T: Entity> {
    /// When the value was read.
    read_at: Cell<u64>,
    phase: Cell<RowPhase>,
    /// The next flush deletes the row.
    delete_scheduled: Cell<bool>,
    entity_state: Rc<EntityState<T>>,
    /// When the original values were known to be those in the database. `NEVER`: the flush has to read the row first.
    verified_at: Cell<u64>,
    /// When a query last returned a row that may be newer than the snapshot of the transaction, and what is known of
    /// that query.
    newest: Cell<(u64, Newest)>,
    /// The source location that requested the last write guard.
    last_write_at: Cell<Option<Place>>,
    pub(super) value: RefCell<Option<Rc<T>>>,
    /// The original values: the row in the database, from the first write guard until the flush.
    original: RefCell<Option<Rc<T>>>,
    /// The key for foreign keys that were made before the INSERT.
    key_cell: OnceCell<Rc<KeyCell<T::Id>>>,
    /// The number of the row among the dirty rows.
    pub(super) dirty_number: Cell<u64>,
    /// The number of the row among the pending inserts or the scheduled deletes.
    list_number: Cell<u64>,
    /// Present while the phase is `Undecided`.
    pending_verdict: RefCell<Option<PendingVerdict>>,
}

/// What is known of the rows that a query returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Newest {
    /// The rows are those that the transaction sees.
    No,
    /// The rows may be newer, because the effects of the query are unknown.
    Perhaps,
    /// The rows are the newest and are locked: no other transaction can change them before this one ends.
    Locked,
}

impl<T: Entity> TrackedRow<T> {
    pub(crate) fn pending(entity_state: &Rc<EntityState<T>>) -> Self {
        Self::new(entity_state, RowPhase::Pending, None)
    }

    pub(crate) fn persistent(entity_state: &Rc<EntityState<T>>, row: T) -> Self {
        Self::new(entity_state, RowPhase::Persistent, Some(Rc::new(row)))
    }

    /// A row for a session that tracks no rows any more.
    pub(crate) fn discarded(entity_state: &Rc<EntityState<T>>) -> Self {
        Self::new(entity_state, RowPhase::Discarded, None)
    }

    fn new(entity_state: &Rc<EntityState<T>>, phase: RowPhase, value: Option<Rc<T>>) -> Self {
        Self {
            phase: Cell::new(phase),
            read_at: Cell::new(entity_state.unit_state.read_now()),
            delete_scheduled: Cell::new(false),
            verified_at: Cell::new(NEVER),
            newest: Cell::new((NEVER, Newest::No)),
            last_write_at: Cell::new(None),
            value: RefCell::new(value),
            original: RefCell::new(None),
            key_cell: OnceCell::new(),
            dirty_number: Cell::new(0),
            list_number: Cell::new(0),
            pending_verdict: RefCell::new(None),
            entity_state: Rc::clone(entity_state),
        }
    }

    pub(crate) fn list_number(&self) -> u64 {
        self.list_number.get()
    }

    /// Gives the row a number for the pending inserts or the scheduled deletes.
    pub(crate) fn assign_list_number(&self) -> u64 {
        self.list_number.set(self.entity_state.unit_state.next_number());
        self.list_number.get()
    }

    pub(crate) fn belongs_to(&self, entity_state: &Rc<EntityState<T>>) -> bool {
        Rc::ptr_eq(&self.entity_state, entity_state)
    }

    pub(crate) fn phase(&self) -> RowPhase {
        match self.settled_phase() {
            RowPhase::Persistent | RowPhase::RolledBack if self.entity_state.unit_state.has_ended() => {
                RowPhase::Detached
            }
            RowPhase::Pending if self.entity_state.unit_state.has_ended() => RowPhase::Discarded,
            phase => phase,
        }
    }

    /// The phase, without regard to the end of the session. Applies a verdict that has become known.
    fn settled_phase(&self) -> RowPhase {
        if self.phase.get() == RowPhase::Undecided {
            let pending_verdict = self.pending_verdict.borrow();
            let decided =
                pending_verdict.as_ref().and_then(|pending_verdict| match pending_verdict.verdict.decision()? {
                    Decision::Committed => Some(pending_verdict.committed),
                    Decision::RolledBack => Some(pending_verdict.rolled_back),
                });
            drop(pending_verdict);
            match decided {
                Some(RowPhase::Discarded) => self.discard(),
                Some(phase) => self.set_phase(phase),
                None => {}
            }
        }
        self.phase.get()
    }

    /// Marks the row undecided: it is not known whether its transaction was committed. `rolled_back` is the phase after
    /// a rollback.
    pub(crate) fn mark_undecided(&self, verdict: &Arc<Verdict>, rolled_back: RowPhase) {
        self.pending_verdict.replace(Some(PendingVerdict {
            verdict: Arc::clone(verdict),
            committed: self.phase.get(),
            rolled_back,
        }));
        self.phase.set(RowPhase::Undecided);
        self.expire();
        if rolled_back == RowPhase::Discarded
            && let Some(cell) = self.key_cell.get()
        {
            cell.set_verdict(verdict);
        }
    }

    /// Whether an undecided transaction has inserted the row.
    pub(crate) fn may_be_new(&self) -> bool {
        self.phase() == RowPhase::Undecided
            && self
                .pending_verdict
                .borrow()
                .as_ref()
                .is_some_and(|pending_verdict| pending_verdict.rolled_back == RowPhase::Discarded)
    }

    pub(crate) fn state(&self) -> RowState {
        match self.phase() {
            RowPhase::Pending => RowState::Pending,
            RowPhase::Persistent if self.is_fresh() => RowState::Persistent,
            RowPhase::Persistent => RowState::Expired,
            RowPhase::RolledBack => RowState::RolledBack,
            RowPhase::Deleted => RowState::Deleted,
            RowPhase::Discarded => RowState::Discarded,
            RowPhase::Detached => RowState::Detached,
            RowPhase::Undecided => RowState::Undecided,
        }
    }

    /// Whether the value is valid in the present transaction, so that the row need not be read again.
    #[inline]
    pub(crate) fn is_fresh(&self) -> bool {
        self.is_fresh_at(self.entity_state.epoch())
    }

    /// The same with a known epoch of the `EntityState`.
    #[inline]
    pub(crate) fn is_fresh_at(&self, epoch: u64) -> bool {
        self.phase.get() == RowPhase::Persistent && self.read_at.get() >= epoch
    }

    pub(crate) fn is_marked_dirty(&self) -> bool {
        self.original.borrow().is_some()
    }

    pub(crate) fn is_delete_scheduled(&self) -> bool {
        self.delete_scheduled.get()
    }

    pub(crate) fn set_delete_scheduled(&self, delete_scheduled: bool) {
        self.delete_scheduled.set(delete_scheduled);
    }

    /// Whether the present transaction has read the newest row with a lock. A plain SELECT may return an older row.
    pub(crate) fn is_locked(&self) -> bool {
        self.newest.get().1 == Newest::Locked && self.may_be_locked()
    }

    /// The same, or the query may have taken a lock.
    pub(crate) fn may_be_locked(&self) -> bool {
        let (moment, newest) = self.newest.get();
        newest != Newest::No && self.entity_state.unit_state.is_of_transaction(moment)
    }

    pub(crate) fn note_newest(&self, newest: Newest) {
        if newest == Newest::Locked || newest == Newest::Perhaps && !self.is_locked() {
            self.newest.set((self.entity_state.unit_state.read_now(), newest));
        }
    }

    /// Whether the row is dirty and its original values may be outdated.
    pub(crate) fn is_unverified(&self) -> bool {
        self.is_marked_dirty() && self.verified_at.get() == NEVER
    }

    /// Whether the value was read before the present attempt of `retry`.
    #[inline]
    pub(crate) fn was_read_before_attempt(&self) -> bool {
        self.read_at.get() < self.entity_state.unit_state.attempt_began()
    }

    /// Whether the value may show changes that were rolled back. Since then, another transaction may have given the row
    /// the same version.
    pub(crate) fn may_be_rolled_back(&self) -> bool {
        T::VERSIONED && self.entity_state.unit_state.may_be_rolled_back(self.read_at.get())
    }

    /// Whether the row in the database is still the known one. The versions decide, or all columns if the known version
    /// may have been rolled back.
    fn is_unchanged(&self, known: &T, row: &T) -> bool {
        known.has_version_of(row) && (!self.may_be_rolled_back() || changed_columns(known, row) == 0)
    }

    /// The columns that a flush would write.
    pub(crate) fn differences(&self) -> Columns {
        let Some(original) = self.original.borrow().clone() else { return 0 };
        let value = match self.value.try_borrow() {
            Ok(value) => value.clone(),
            // A write guard is alive.
            Err(_) => return Columns::MAX,
        };
        value.filter(|value| !Rc::ptr_eq(&original, value)).map_or(0, |value| T::differences(&original, &value))
    }

    pub(crate) fn is_dirty(&self) -> bool {
        match self.phase() {
            RowPhase::Pending => true,
            RowPhase::Persistent => self.delete_scheduled.get() || self.differences() != 0,
            RowPhase::RolledBack
            | RowPhase::Deleted
            | RowPhase::Discarded
            | RowPhase::Detached
            | RowPhase::Undecided => false,
        }
    }

    /// The key, for error texts.
    pub(crate) fn key_text(&self) -> Option<String> {
        catch_panic("the `Clone` or `Debug` of a key", || self.id().map(|id| format!("{id:?}"))).flatten()
    }

    /// The key in the database, even if the program has changed the key in memory.
    pub(crate) fn id(&self) -> Option<T::Id> {
        let original = self.original.borrow().clone();
        let known = match original {
            Some(original) => original,
            None => self.value.try_borrow().ok()?.clone()?,
        };
        Some(known.id())
    }

    pub(crate) fn fk(&self) -> Fk<T> {
        match (self.phase(), self.id()) {
            (
                RowPhase::Persistent
                | RowPhase::RolledBack
                | RowPhase::Deleted
                | RowPhase::Detached
                | RowPhase::Undecided,
                Some(id),
            ) => Fk::new(id),
            (phase, _) => {
                let cell = self.key_cell.get_or_init(|| Rc::new(KeyCell::new()));
                if phase == RowPhase::Discarded {
                    cell.invalidate();
                }
                Fk::pending(Rc::clone(cell))
            }
        }
    }

    pub(crate) fn read(&self, at: Place) -> Result<Rc<T>> {
        match self.phase() {
            RowPhase::Pending | RowPhase::RolledBack | RowPhase::Discarded => Err(self.wrong_state("read", at)),
            // The session has ended, and it had rolled back this value.
            RowPhase::Detached if self.phase.get() == RowPhase::RolledBack => Err(self.wrong_state("read", at)),
            RowPhase::Persistent | RowPhase::Deleted | RowPhase::Detached | RowPhase::Undecided => {
                match self.value.try_borrow().as_deref() {
                    Ok(Some(value)) => Ok(Rc::clone(value)),
                    Ok(None) => Err(self.wrong_state("read", at)),
                    Err(_) => Err(self.write_in_progress(at)),
                }
            }
        }
    }

    /// Marks the row dirty before a write guard is given out. Reads a row first that may be outdated.
    pub(crate) fn begin_write(self: &Rc<Self>, at: Place) -> Result<()> {
        let reread_heals = self.phase() == RowPhase::RolledBack && self.was_read_before_attempt();
        if self.phase() != RowPhase::Persistent && !reread_heals {
            return Err(self.wrong_state("written", at));
        }
        if self.value.try_borrow_mut().is_err() {
            return Err(self.write_in_progress(at));
        }
        let read = if self.is_marked_dirty() { self.verified_at.get() } else { self.read_at.get() };
        // On SQLite, a row that was read before the transaction may have changed since.
        let reads_before_transaction =
            self.entity_state.unit_state.reads_before_transaction() && !self.is_marked_dirty();
        let verified_at =
            !reread_heals && !reads_before_transaction && read >= self.entity_state.epoch() || self.read_again(at);
        if self.phase() != RowPhase::Persistent {
            return Err(self.wrong_state("written", at));
        }
        self.last_write_at.set(Some(at));
        self.mark_dirty(verified_at, at)
    }

    fn mark_dirty(self: &Rc<Self>, verified_at: bool, at: Place) -> Result<()> {
        let Ok(value) = self.value.try_borrow_mut() else { return Err(self.write_in_progress(at)) };
        let mut original = self.original.borrow_mut();
        if original.is_none() {
            original.clone_from(&value);
            self.verified_at.set(self.entity_state.unit_state.now());
            self.entity_state.mark_dirty(self);
        }
        if !verified_at {
            self.verified_at.set(NEVER);
        }
        self.entity_state.unit_state.note_unflushed(at);
        Ok(())
    }

    /// Reads a row whose known value must not be used: the value was read before the present attempt of `retry`, or it
    /// may show changes that were rolled back.
    #[cold]
    pub(crate) fn read_before_use(self: &Rc<Self>, at: Place) {
        if !matches!(self.phase(), RowPhase::Persistent | RowPhase::RolledBack) || self.value.try_borrow_mut().is_err()
        {
            return;
        }
        if !self.read_again(at) && self.phase() == RowPhase::Persistent {
            // The program gets the known value. The flush verifies that the row still has it.
            let _ = self.mark_dirty(false, at);
        }
    }

    /// Reads the row again, if its session can do so now. Returns whether the original values (or the value, if the row
    /// is not dirty) are now those in the database.
    fn read_again(&self, at: Place) -> bool {
        let (Some(id), Some(read)) = (self.id(), &self.entity_state.row_reader) else { return false };
        let row = match read(&id, self.may_be_locked(), at) {
            Ok(Some(row)) => row,
            Ok(None) => return false,
            Err(error) => {
                crate::wording::log_line!(
                    debug,
                    "diesel_session::session",
                    "{} {} could not be read at {at}; the next flush reads it: {}",
                    T::NAME,
                    phrase(format_args!("{id:?}")),
                    phrase(error)
                );
                return false;
            }
        };
        if self.is_marked_dirty() {
            return self.replace_original(row);
        }
        // With a version, a write is compared with the version that the program knew, except in an attempt of `retry`,
        // which starts from the newest row.
        let keeps_known = T::VERSIONED && self.phase() == RowPhase::Persistent && !self.was_read_before_attempt();
        if keeps_known
            && self
                .value
                .try_borrow()
                .is_ok_and(|value| value.as_ref().is_some_and(|known| !self.is_unchanged(known, &row)))
        {
            return false;
        }
        self.refresh(row);
        self.phase() == RowPhase::Persistent
    }

    /// Updates the value from a row that a query has returned. Writes that are not flushed stay.
    pub(crate) fn merge(&self, row: T) {
        if self.is_marked_dirty() {
            self.replace_original(row);
        } else if !(T::VERSIONED && self.is_delete_scheduled()) {
            self.refresh(row);
        }
    }

    /// Replaces the original values of a dirty row by the row that the database has now, and merges its values into the
    /// columns that the program has not written. If the version has changed, or if the row has changed and the original
    /// values were unverified, the program has computed its values from an outdated row: then the original values stay
    /// unverified, and the flush fails.
    fn replace_original(&self, mut row: T) -> bool {
        let value = self.value.try_borrow().map(|value| value.clone());
        let Ok(value) = value else {
            self.verified_at.set(NEVER);
            return false;
        };
        let (Some(original), Some(value)) = (self.original.borrow().clone(), value) else { return false };
        let is_unchanged = self.is_unchanged(&original, &row);
        if !is_unchanged || changed_columns(&*original, &row) != 0 {
            if !is_unchanged || self.verified_at.get() == NEVER {
                self.verified_at.set(NEVER);
                return false;
            }
            let newest = Rc::new(row.clone());
            let mut merged = T::clone(&value);
            T::merge_unwritten(&original, &mut merged, &mut row);
            let old_value = match self.value.try_borrow_mut() {
                Ok(mut value) => value.replace(Rc::new(merged)),
                Err(_) => return false,
            };
            let old_base = self.original.replace(Some(newest));
            drop_catching_panic(old_value);
            drop_catching_panic(old_base);
            drop_catching_panic(row);
        }
        self.verified_at.set(self.entity_state.unit_state.now());
        self.read_at.set(self.entity_state.unit_state.read_now());
        drop_catching_panic(original);
        drop_catching_panic(value);
        true
    }

    /// Compares unverified original values with the row that the database has now. If the row has changed, the flush
    /// fails. A missing row is reported by its UPDATE or DELETE, or here if the flush sends neither.
    pub(crate) fn verify(&self, row: Option<T>, at: Place) -> Result<()> {
        let operation = match (self.delete_scheduled.get(), self.differences() != 0) {
            (true, _) => "delete",
            (false, true) => "update",
            (false, false) => "read",
        };
        if row.map_or(operation != "read", |row| self.replace_original(row)) {
            return Ok(());
        }
        let key = self.key_text().unwrap_or_default();
        Err(Error::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() })
    }

    /// The original values and the value of a dirty row. An error if a write guard of the row is alive.
    pub(crate) fn original_and_value(&self, at: Place) -> Result<(Rc<T>, Rc<T>)> {
        let value = self.value.try_borrow().map_err(|_| self.write_in_progress(at))?;
        let value = value.as_ref().expect("a dirty row has a value");
        let original = self.original.borrow();
        Ok((Rc::clone(original.as_ref().expect("a dirty row has original values")), Rc::clone(value)))
    }

    /// Drops the original values after the UPDATE of the row was sent.
    ///
    /// If a clone of the row panics, the original values are still there for the rollback.
    pub(crate) fn mark_flushed(&self, bump_version: bool) {
        if bump_version {
            self.bump_version();
        }
        drop_catching_panic(self.original.take());
    }

    fn bump_version(&self) {
        let shared = match self.value.try_borrow_mut().as_deref_mut() {
            Ok(Some(value)) => match Rc::get_mut(value) {
                Some(value) => return value.bump_version(),
                None => Rc::clone(value),
            },
            _ => return,
        };
        let mut bumped = T::clone(&shared);
        bumped.bump_version();
        drop(shared);
        let old = self.value.try_borrow_mut().ok().and_then(|mut value| value.replace(Rc::new(bumped)));
        drop_catching_panic(old);
    }

    /// Restores the original values. Writes that are not flushed are lost.
    pub(crate) fn revert(&self) {
        let Some(original) = self.original.take() else { return };
        let written = match self.value.try_borrow_mut() {
            Ok(mut value) => value.replace(original),
            // A write guard is alive, so the value in memory will differ from the database.
            Err(_) => {
                if self.phase.get() == RowPhase::Persistent {
                    self.phase.set(RowPhase::RolledBack);
                }
                Some(original)
            }
        };
        drop_catching_panic(written);
    }

    /// Sets the value to a row that was read just now.
    pub(crate) fn refresh(&self, row: T) {
        let Ok(mut value) = self.value.try_borrow_mut() else {
            self.settle_phase(RowPhase::RolledBack);
            return drop_catching_panic(row);
        };
        let old = value.replace(Rc::new(row));
        drop(value);
        self.settle_phase(RowPhase::Persistent);
        self.read_at.set(self.entity_state.unit_state.read_now());
        drop_catching_panic(old);
    }

    fn settle_phase(&self, phase: RowPhase) {
        self.pending_verdict.take();
        self.phase.set(phase);
    }

    /// Marks the value as possibly outdated.
    pub(crate) fn expire(&self) {
        self.read_at.set(NEVER);
    }

    pub(crate) fn inserted(&self, row: T) {
        if let Some(cell) = self.key_cell.get() {
            cell.set(row.id());
        }
        self.refresh(row);
    }

    /// Marks the row as never inserted: its INSERT was rolled back or will not be sent.
    pub(crate) fn discard(&self) {
        self.set_phase(RowPhase::Discarded);
        if let Some(cell) = self.key_cell.get() {
            cell.invalidate();
        }
        drop_catching_panic(self.original.take());
    }

    pub(crate) fn set_phase(&self, phase: RowPhase) {
        self.settle_phase(phase);
        self.delete_scheduled.set(false);
    }

    pub(crate) fn wrong_state(&self, operation: &'static str, at: Place) -> Error {
        Error::WrongState { entity: T::NAME, key: self.key_text(), state: self.state(), operation, at }
    }

    pub(crate) fn write_in_progress(&self, at: Place) -> Error {
        let held_at = self.last_write_at.get().unwrap_or(Location::caller());
        let key = self.key_text();
        Error::WriteInProgress { entity: T::NAME, key, held_at, at }
    }
}

/// The columns in which `row` differs from the known value. A field that is not equal to itself (NaN) counts as
/// unchanged.
fn changed_columns<T: Entity>(known: &T, row: &T) -> Columns {
    T::differences(known, row) & !T::differences(known, known)
}
