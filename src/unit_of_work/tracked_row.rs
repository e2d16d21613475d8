//! A row that a session tracks.
//!
//! Invariants: a row has original values exactly while it is among the dirty rows of its `EntityState`. A row has a
//! value in every phase except `Pending` and `Discarded`. A row does not change any more after its `EntityState` has
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
use super::fk::Fk;
use super::unit_state::NEVER;
use crate::error::{Decision, Details, Error, Result, RowState, SourceLocation, Undo, Verdict};
use crate::panic::{catch_panic, drop_catching_panic};
use crate::wording::{log_line, phrase};

/// The phases between which the verdict about a transaction decides.
struct PendingVerdict {
    verdict: Arc<Verdict>,
    committed: RowState,
    rolled_back: RowState,
}

/// The fields that a look-up by key reads come first, beside the counts of the `Rc`, so that they share a cache line.
#[repr(C)]
pub(crate) struct TrackedRow<T: Entity> {
    /// When the value was read.
    read_at: Cell<u64>,
    /// The state of the row, without what follows from the clock and the end of its session: `Expired` is `Persistent`.
    phase: Cell<RowState>,
    /// The next flush deletes the row.
    pub(super) delete_scheduled: Cell<bool>,
    pub(super) entity_state: Rc<EntityState<T>>,
    /// When the original values were known to be those in the database. `NEVER`: the flush has to read the row first.
    verified_at: Cell<u64>,
    /// When a query last returned a row that may be newer than the snapshot of the transaction, and what is known of
    /// that query.
    newest: Cell<(u64, Newest)>,
    /// The source location that requested the last write guard.
    last_write_at: Cell<Option<SourceLocation>>,
    pub(super) value: RefCell<Option<Rc<T>>>,
    /// The original values: the row in the database, from the first write guard until the flush.
    original: RefCell<Option<Rc<T>>>,
    /// The key of an added row, for foreign keys that were made before the INSERT.
    inserted_key: OnceCell<T::Id>,
    /// The number of the row among the dirty rows.
    pub(super) dirty_number: Cell<u64>,
    /// The number of the row among the pending inserts or the scheduled deletes.
    pub(super) list_number: Cell<u64>,
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
    /// A row of the database, or, without a value, an added one.
    pub(super) fn new(entity_state: &Rc<EntityState<T>>, value: Option<T>) -> Self {
        Self {
            phase: Cell::new(if value.is_some() { RowState::Persistent } else { RowState::Pending }),
            read_at: Cell::new(entity_state.unit_state.read_now()),
            delete_scheduled: Cell::new(false),
            verified_at: Cell::new(NEVER),
            newest: Cell::new((NEVER, Newest::No)),
            last_write_at: Cell::new(None),
            value: RefCell::new(value.map(Rc::new)),
            original: RefCell::new(None),
            inserted_key: OnceCell::new(),
            dirty_number: Cell::new(0),
            list_number: Cell::new(0),
            pending_verdict: RefCell::new(None),
            entity_state: Rc::clone(entity_state),
        }
    }

    /// Gives the row a number for the pending inserts or the scheduled deletes.
    pub(super) fn assign_list_number(&self) -> u64 {
        self.list_number.set(self.entity_state.unit_state.next_number());
        self.list_number.get()
    }

    pub(super) fn phase(&self) -> RowState {
        match self.settled_phase() {
            RowState::Persistent | RowState::RolledBack if self.entity_state.has_ended.get() => RowState::Detached,
            RowState::Pending if self.entity_state.has_ended.get() => RowState::Discarded,
            phase => phase,
        }
    }

    /// The phase, without regard to the end of the session. Applies a verdict that has become known.
    fn settled_phase(&self) -> RowState {
        if self.phase.get() == RowState::Undecided {
            let decided = self.pending_verdict.borrow().as_ref().and_then(|pending| {
                pending.verdict.decision().map(|decision| match decision {
                    Decision::Committed => pending.committed,
                    Decision::RolledBack => pending.rolled_back,
                })
            });
            match decided {
                Some(RowState::Discarded) => self.discard(),
                Some(phase) => self.set_phase(phase),
                None => {}
            }
        }
        self.phase.get()
    }

    /// Whether the row may be in the database. If so, this tracked row represents it.
    pub(super) fn may_exist(&self) -> bool {
        matches!(self.phase(), RowState::Persistent | RowState::RolledBack | RowState::Undecided)
    }

    /// Marks the row undecided: it is not known whether its transaction was committed. `rolled_back` is the phase after
    /// a rollback.
    pub(super) fn mark_undecided(&self, verdict: &Arc<Verdict>, rolled_back: RowState) {
        let committed = self.phase.replace(RowState::Undecided);
        self.pending_verdict.replace(Some(PendingVerdict { verdict: Arc::clone(verdict), committed, rolled_back }));
        self.expire();
    }

    /// Whether an undecided transaction has inserted the row.
    pub(super) fn may_be_new(&self) -> bool {
        let is_new = |pending: &PendingVerdict| pending.rolled_back == RowState::Discarded;
        self.phase() == RowState::Undecided && self.pending_verdict.borrow().as_ref().is_some_and(is_new)
    }

    pub(super) fn state(&self) -> RowState {
        match self.phase() {
            RowState::Persistent if !self.is_fresh() => RowState::Expired,
            phase => phase,
        }
    }

    /// Whether the value is valid in the present transaction, so that the row need not be read again.
    #[inline]
    pub(super) fn is_fresh(&self) -> bool {
        self.is_fresh_at(self.entity_state.epoch())
    }

    /// The same with a known epoch of the `EntityState`.
    #[inline]
    pub(super) fn is_fresh_at(&self, epoch: u64) -> bool {
        self.phase.get() == RowState::Persistent && self.read_at.get() >= epoch
    }

    pub(super) fn is_marked_dirty(&self) -> bool {
        self.original.borrow().is_some()
    }

    /// Whether the present transaction has read the newest row with a lock. A plain SELECT may return an older row.
    pub(super) fn is_locked(&self) -> bool {
        self.newest.get().1 == Newest::Locked && self.may_be_locked()
    }

    /// The same, or the query may have taken a lock.
    pub(super) fn may_be_locked(&self) -> bool {
        let (moment, newest) = self.newest.get();
        newest != Newest::No && self.entity_state.unit_state.is_of_transaction(moment)
    }

    pub(super) fn note_newest(&self, newest: Newest) {
        if newest == Newest::Locked || newest == Newest::Perhaps && !self.is_locked() {
            self.newest.set((self.entity_state.unit_state.read_now(), newest));
        }
    }

    /// Whether the row is dirty and its original values may be outdated.
    pub(super) fn is_unverified(&self) -> bool {
        self.is_marked_dirty() && self.verified_at.get() == NEVER
    }

    /// Whether the value was read before the present attempt of `retry`.
    #[inline]
    pub(super) fn was_read_before_attempt(&self) -> bool {
        self.read_at.get() < self.entity_state.unit_state.attempt_began.get()
    }

    /// Whether the value may show changes that were rolled back. Since then, another transaction may have given the row
    /// the same version.
    pub(super) fn may_be_rolled_back(&self) -> bool {
        T::VERSIONED && self.entity_state.unit_state.may_be_rolled_back(self.read_at.get())
    }

    /// Whether the row in the database is still the known one. The versions decide, or all columns if the known version
    /// may have been rolled back.
    fn is_unchanged(&self, known: &T, row: &T) -> bool {
        known.has_version_of(row) && (!self.may_be_rolled_back() || changed_columns(known, row) == 0)
    }

    /// The columns that a flush would write.
    pub(super) fn differences(&self) -> Columns {
        let Some(original) = self.original.borrow().clone() else { return 0 };
        // The borrow fails while a write guard is alive.
        let Ok(value) = self.value.try_borrow().map(|value| value.clone()) else { return Columns::MAX };
        value.map_or(0, |value| differences(&original, &value))
    }

    pub(super) fn is_dirty(&self) -> bool {
        match self.phase() {
            RowState::Pending => true,
            RowState::Persistent => self.delete_scheduled.get() || self.differences() != 0,
            _ => false,
        }
    }

    /// The row in the database, as far as it is known. None while a write guard of an unchanged row is alive.
    pub(super) fn stored(&self) -> Option<Rc<T>> {
        let original = self.original.borrow().clone();
        original.or_else(|| self.value.try_borrow().ok()?.clone())
    }

    /// The key in the database, even if the program has changed the key in memory.
    pub(super) fn id(&self) -> Option<T::Id> {
        Some(self.stored()?.id())
    }

    /// The key, for error texts.
    pub(super) fn key_text(&self) -> Option<String> {
        catch_panic("the `Clone` or `Debug` of a key", || self.id().map(|id| format!("{id:?}"))).flatten()
    }

    pub(super) fn fk(self: &Rc<Self>) -> Fk<T> {
        let is_inserted = !matches!(self.phase(), RowState::Pending | RowState::Discarded);
        self.id().filter(|_| is_inserted).map_or_else(|| Fk::added(self), Fk::new)
    }

    /// The key of an added row, once it is inserted and unless its INSERT was rolled back.
    pub(super) fn inserted_key(&self) -> Option<&T::Id> {
        self.inserted_key.get().filter(|_| self.phase() != RowState::Discarded)
    }

    pub(super) fn read(&self, at: SourceLocation) -> Result<Rc<T>> {
        let has_value = match self.phase() {
            RowState::Pending | RowState::RolledBack | RowState::Discarded => false,
            // If the session has ended, it may have rolled back this value before.
            RowState::Detached => self.phase.get() != RowState::RolledBack,
            _ => true,
        };
        match self.value.try_borrow().as_deref() {
            Ok(Some(value)) if has_value => Ok(Rc::clone(value)),
            Err(_) if has_value => Err(self.write_in_progress(at)),
            _ => Err(self.wrong_state("read", at)),
        }
    }

    /// Marks the row dirty before a write guard is given out. Reads a row first that may be outdated.
    pub(super) fn begin_write(self: &Rc<Self>, at: SourceLocation) -> Result<()> {
        let reread_heals = self.phase() == RowState::RolledBack && self.was_read_before_attempt();
        if self.phase() != RowState::Persistent && !reread_heals {
            return Err(self.wrong_state("written", at));
        }
        if self.value.try_borrow_mut().is_err() {
            return Err(self.write_in_progress(at));
        }
        let read = if self.is_marked_dirty() { self.verified_at.get() } else { self.read_at.get() };
        let verified_at = !reread_heals && read >= self.entity_state.epoch() || self.read_again(at);
        if self.phase() != RowState::Persistent {
            return Err(self.wrong_state("written", at));
        }
        self.last_write_at.set(Some(at));
        self.mark_dirty(verified_at, at)
    }

    fn mark_dirty(self: &Rc<Self>, verified_at: bool, at: SourceLocation) -> Result<()> {
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
    pub(super) fn read_before_use(self: &Rc<Self>, at: SourceLocation) {
        if !matches!(self.phase(), RowState::Persistent | RowState::RolledBack) || self.value.try_borrow_mut().is_err()
        {
            return;
        }
        if !self.read_again(at) && self.phase() == RowState::Persistent {
            // The program gets the known value. The flush verifies that the row still has it.
            let _ = self.mark_dirty(false, at);
        }
    }

    /// Reads the row again, if its session can do so now. Returns whether the original values (or the value, if the row
    /// is not dirty) are now those in the database.
    fn read_again(&self, at: SourceLocation) -> bool {
        let Some(id) = self.id() else { return false };
        let read = (self.entity_state.row_reader)(&id, self.may_be_locked(), at).unwrap_or_else(|error| {
            log_line!(
                debug,
                "diesel_session::session",
                "{} {} could not be read at {at}; the next flush reads it: {}",
                T::NAME,
                phrase(format_args!("{id:?}")),
                phrase(error)
            );
            None
        });
        let Some(row) = read else { return false };
        if self.is_marked_dirty() {
            return self.replace_original(row);
        }
        // With a version, a write is compared with the version that the program knew, except in an attempt of `retry`,
        // which starts from the newest row.
        let keeps_known = T::VERSIONED && self.phase() == RowState::Persistent && !self.was_read_before_attempt();
        if keeps_known && self.stored().is_some_and(|known| !self.is_unchanged(&known, &row)) {
            return false;
        }
        self.refresh(row);
        self.phase() == RowState::Persistent
    }

    /// Updates the value from a row that a query has returned. Writes that are not flushed stay.
    pub(super) fn merge(&self, row: T) {
        if self.is_marked_dirty() {
            self.replace_original(row);
        } else if !(T::VERSIONED && self.delete_scheduled.get()) {
            self.refresh(row);
        }
    }

    /// Replaces the original values of a dirty row by the row that the database has now, and merges its values into the
    /// columns that the program has not written. If the version has changed, or if the row has changed and the original
    /// values were unverified, the program has computed its values from an outdated row: then the original values stay
    /// unverified, and the flush fails.
    fn replace_original(&self, mut row: T) -> bool {
        let value = self.value.try_borrow().map(|value| value.clone());
        let (Some(original), Ok(Some(value))) = (self.original.borrow().clone(), value) else {
            self.verified_at.set(NEVER);
            return false;
        };
        let has_changed = changed_columns(&*original, &row) != 0;
        if !self.is_unchanged(&original, &row) || has_changed && self.verified_at.get() == NEVER {
            self.verified_at.set(NEVER);
            return false;
        }
        if has_changed {
            let newest = Rc::new(row.clone());
            let mut merged = T::clone(&value);
            merged.swap_columns(&mut row, !differences(&original, &value));
            let old_value = match self.value.try_borrow_mut() {
                Ok(mut value) => value.replace(Rc::new(merged)),
                Err(_) => return false,
            };
            let old_original = self.original.replace(Some(newest));
            drop_catching_panic(old_value);
            drop_catching_panic(old_original);
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
    pub(super) fn verify(&self, row: Option<T>, at: SourceLocation) -> Result<()> {
        let operation = match (self.delete_scheduled.get(), self.differences() != 0) {
            (true, _) => "delete",
            (false, true) => "update",
            (false, false) => "read",
        };
        if row.map_or(operation != "read", |row| self.replace_original(row)) {
            return Ok(());
        }
        let key = self.key_text().unwrap_or_default();
        Err(Details::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() }.into())
    }

    /// The original values and the value of a dirty row. An error if a write guard of the row is alive.
    pub(super) fn original_and_value(&self, at: SourceLocation) -> Result<(Rc<T>, Rc<T>)> {
        let value = self.value.try_borrow().map_err(|_| self.write_in_progress(at))?;
        let value = value.as_ref().expect("a dirty row has a value");
        let original = self.original.borrow();
        Ok((Rc::clone(original.as_ref().expect("a dirty row has original values")), Rc::clone(value)))
    }

    /// Drops the original values after the UPDATE of the row was sent.
    ///
    /// If a clone of the row panics, the original values are still there for the rollback.
    pub(super) fn mark_flushed(&self, bump_version: bool) {
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
    pub(super) fn revert(&self) {
        let Some(original) = self.original.take() else { return };
        let written = match self.value.try_borrow_mut() {
            Ok(mut value) => value.replace(original),
            // A write guard is alive, so the value in memory will differ from the database.
            Err(_) => {
                if self.phase.get() == RowState::Persistent {
                    self.phase.set(RowState::RolledBack);
                }
                Some(original)
            }
        };
        drop_catching_panic(written);
    }

    /// Sets the value to a row that was read just now.
    pub(super) fn refresh(&self, row: T) {
        let Ok(mut value) = self.value.try_borrow_mut() else {
            self.settle_phase(RowState::RolledBack);
            return drop_catching_panic(row);
        };
        let old = value.replace(Rc::new(row));
        drop(value);
        self.settle_phase(RowState::Persistent);
        self.read_at.set(self.entity_state.unit_state.read_now());
        drop_catching_panic(old);
    }

    fn settle_phase(&self, phase: RowState) {
        self.pending_verdict.take();
        self.phase.set(phase);
    }

    /// Marks the value as possibly outdated.
    pub(super) fn expire(&self) {
        self.read_at.set(NEVER);
    }

    pub(super) fn inserted(&self, row: T) {
        let _ = self.inserted_key.set(row.id());
        self.refresh(row);
    }

    /// Marks the row as never inserted: its INSERT was rolled back or will not be sent.
    pub(super) fn discard(&self) {
        self.set_phase(RowState::Discarded);
        drop_catching_panic(self.original.take());
    }

    pub(super) fn set_phase(&self, phase: RowState) {
        self.settle_phase(phase);
        self.delete_scheduled.set(false);
    }

    pub(super) fn wrong_state(&self, operation: &'static str, at: SourceLocation) -> Error {
        Error::from(Details::WrongState { entity: T::NAME, key: self.key_text(), state: self.state(), operation, at })
    }

    pub(super) fn write_in_progress(&self, at: SourceLocation) -> Error {
        let held_at = self.last_write_at.get().unwrap_or(Location::caller());
        let key = self.key_text();
        Error::from(Details::WriteInProgress { entity: T::NAME, key, held_at, at })
    }
}

/// The columns that differ between two values of a row, which may be the same value.
pub(super) fn differences<T: Entity>(old: &Rc<T>, new: &Rc<T>) -> Columns {
    if Rc::ptr_eq(old, new) { 0 } else { T::differences(old, new) }
}

/// The columns in which `row` differs from the known value. A field that is not equal to itself (NaN) counts as
/// unchanged.
fn changed_columns<T: Entity>(known: &T, row: &T) -> Columns {
    T::differences(known, row) & !T::differences(known, known)
}
