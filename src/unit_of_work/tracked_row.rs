//! A row as a session keeps it.
//!
//! Invariants: there is a `base` exactly while the entry is among the touched ones of its home. There is a value in every phase
//! but `Pending` and `Discarded`. An entry whose unit_state has ended changes no more.
//!
//! A flush compares a touched entry's value with its base. So the base has to be the row of the present transaction when the value is
//! given out for writing: `touch` reads a row again that may be outdated. Where that cannot be done, the base is unverified, and the
//! flush looks before it compares.
//!
//! Code of the program (`Clone`, `Drop`, `PartialEq` of a row or its fields) may panic, and may use the session. So nothing is borrowed
//! while it runs, and a value that is replaced is dropped last, when the entry is consistent.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;

use super::entity::{Columns, Entity};
use super::key::{Fk, KeyCell};
use super::unit_state::{NEVER, UnitState};
use crate::error::{Decision, Error, Place, Result, RowState, Undo, Verdict};
use crate::panic::{catch_panic, drop_catching_panic};
use crate::wording::phrase;

/// What becomes of an entry, but for what its session as a whole says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Added, not inserted yet.
    Pending,
    Kept,
    /// What is in memory was rolled back in the database.
    RolledBack,
    /// Not in the database any more.
    Deleted,
    /// Never came into the database.
    Discarded,
    /// Not the session's any more.
    Detached,
    /// It was changed by a transaction whose commit was not answered.
    Undecided,
}

impl Phase {
    /// Whether the row may be in the database, so that it is this entry's.
    pub(crate) fn may_be_there(self) -> bool {
        matches!(self, Self::Kept | Self::RolledBack | Self::Undecided)
    }
}

/// What became of an entry's transaction decides what becomes of the entry.
struct Doubt {
    verdict: Arc<Verdict>,
    committed: Phase,
    rolled_back: Phase,
}

/// Entries in the order in which they were listed. Taking one of them out does not search for it.
pub(crate) type Listed<T> = BTreeMap<u64, Rc<TrackedRow<T>>>;

/// What the entries of one type have in common.
pub(crate) struct Home<T: Entity> {
    pub(crate) unit_state: Rc<UnitState>,
    /// Rows of this type that were read before this moment may be outdated.
    epoch: Cell<u64>,
    /// Reads a row again; none where there is no session to do it.
    reader: Option<Reader<T>>,
    /// Entries that were given out for writing since the last flush.
    touched: RefCell<Listed<T>>,
}

/// Reads the row of a key through the session, without a flush before it. `true`: with a lock, where only that finds the newest row.
pub(super) type Reader<T> = Box<dyn Fn(&<T as Entity>::Id, bool, Place) -> Result<Option<T>>>;

impl<T: Entity> Home<T> {
    pub(crate) fn new(unit_state: Rc<UnitState>, reader: Option<Reader<T>>) -> Self {
        Self { unit_state, epoch: Cell::new(NEVER), reader, touched: RefCell::default() }
    }

    /// Whatever was read before this moment may be outdated.
    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.unit_state.epoch().max(self.epoch.get())
    }

    pub(crate) fn expire(&self) {
        self.epoch.set(self.unit_state.tick());
    }

    /// The entries that were given out for writing since the last flush, in the order of the first time.
    pub(crate) fn touched(&self) -> Vec<Rc<TrackedRow<T>>> {
        self.touched.borrow().values().cloned().collect()
    }

    pub(crate) fn has_touched(&self) -> bool {
        !self.touched.borrow().is_empty()
    }

    fn touch(&self, entry: &Rc<TrackedRow<T>>) {
        entry.touched_as.set(self.unit_state.next_number());
        self.touched.borrow_mut().insert(entry.touched_as.get(), Rc::clone(entry));
    }

    /// Takes an entry that has no base any more from the touched ones.
    pub(crate) fn untouch(&self, entry: &TrackedRow<T>) {
        let untouched = self.touched.borrow_mut().remove(&entry.touched_as.get());
        drop_catching_panic(untouched);
    }
}

/// What a look-up by key asks for comes first, beside the counts of its `Rc`: among thousands of rows it waits for memory.
#[repr(C)]
pub(crate) struct TrackedRow<T: Entity> {
    /// When the value was read.
    seen: Cell<u64>,
    phase: Cell<Phase>,
    /// It is to be deleted by the next flush.
    doomed: Cell<bool>,
    home: Rc<Home<T>>,
    /// When the base was known to be what the database has. `NEVER`: the flush has to look first.
    verified: Cell<u64>,
    /// When a query last gave the newest row whatever the transaction sees, and which one.
    newest: Cell<(u64, Newest)>,
    /// Who was given it for writing last.
    written_at: Cell<Option<Place>>,
    pub(super) value: RefCell<Option<Rc<T>>>,
    /// The value in the database, from the first writing to the flush.
    base: RefCell<Option<Rc<T>>>,
    /// For those who have asked for the key before there was one.
    awaited: OnceCell<Rc<KeyCell<T::Id>>>,
    /// Its number among the touched ones.
    touched_as: Cell<u64>,
    /// Its number among the new rows or among those to be deleted.
    listed_as: Cell<u64>,
    /// While it is `Undecided`.
    doubt: RefCell<Option<Doubt>>,
}

/// What a query says of the rows that it gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Newest {
    /// They are what the transaction sees.
    No,
    /// They may be newer than that: nobody knows what the query did.
    Perhaps,
    /// They are the newest, and nobody else can change them before the transaction ends.
    Locked,
}

impl<T: Entity> TrackedRow<T> {
    pub(crate) fn pending(home: &Rc<Home<T>>) -> Self {
        Self::new(home, Phase::Pending, None)
    }

    pub(crate) fn kept(home: &Rc<Home<T>>, row: T) -> Self {
        Self::new(home, Phase::Kept, Some(Rc::new(row)))
    }

    /// For a session that keeps nothing any more.
    pub(crate) fn discarded(home: &Rc<Home<T>>) -> Self {
        Self::new(home, Phase::Discarded, None)
    }

    fn new(home: &Rc<Home<T>>, phase: Phase, value: Option<Rc<T>>) -> Self {
        Self {
            phase: Cell::new(phase),
            seen: Cell::new(home.unit_state.read_now()),
            doomed: Cell::new(false),
            verified: Cell::new(NEVER),
            newest: Cell::new((NEVER, Newest::No)),
            written_at: Cell::new(None),
            value: RefCell::new(value),
            base: RefCell::new(None),
            awaited: OnceCell::new(),
            touched_as: Cell::new(0),
            listed_as: Cell::new(0),
            doubt: RefCell::new(None),
            home: Rc::clone(home),
        }
    }

    pub(crate) fn listed_as(&self) -> u64 {
        self.listed_as.get()
    }

    /// A number under which it can be listed.
    pub(crate) fn list(&self) -> u64 {
        self.listed_as.set(self.home.unit_state.next_number());
        self.listed_as.get()
    }

    pub(crate) fn belongs_to(&self, home: &Rc<Home<T>>) -> bool {
        Rc::ptr_eq(&self.home, home)
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.known_phase() {
            Phase::Kept | Phase::RolledBack if self.home.unit_state.has_ended() => Phase::Detached,
            Phase::Pending if self.home.unit_state.has_ended() => Phase::Discarded,
            phase => phase,
        }
    }

    /// The same whether the session has ended or not.
    fn known_phase(&self) -> Phase {
        if self.phase.get() == Phase::Undecided {
            let doubt = self.doubt.borrow();
            let decided = doubt.as_ref().and_then(|doubt| match doubt.verdict.decision()? {
                Decision::Committed => Some(doubt.committed),
                Decision::RolledBack => Some(doubt.rolled_back),
            });
            drop(doubt);
            match decided {
                Some(Phase::Discarded) => self.discard(),
                Some(phase) => self.set_phase(phase),
                None => {}
            }
        }
        self.phase.get()
    }

    /// Its transaction may have been committed or not. `rolled_back`: what it would be after a rollback.
    pub(crate) fn doubt(&self, verdict: &Arc<Verdict>, rolled_back: Phase) {
        self.doubt.replace(Some(Doubt { verdict: Arc::clone(verdict), committed: self.phase.get(), rolled_back }));
        self.phase.set(Phase::Undecided);
        self.expire();
        if rolled_back == Phase::Discarded
            && let Some(cell) = self.awaited.get()
        {
            cell.doubt(verdict);
        }
    }

    /// Whether its transaction is undecided and inserted it.
    pub(crate) fn may_be_new(&self) -> bool {
        self.phase() == Phase::Undecided
            && self.doubt.borrow().as_ref().is_some_and(|doubt| doubt.rolled_back == Phase::Discarded)
    }

    pub(crate) fn state(&self) -> RowState {
        match self.phase() {
            Phase::Pending => RowState::Pending,
            Phase::Kept if self.is_fresh() => RowState::Persistent,
            Phase::Kept => RowState::Expired,
            Phase::RolledBack => RowState::RolledBack,
            Phase::Deleted => RowState::Deleted,
            Phase::Discarded => RowState::Discarded,
            Phase::Detached => RowState::Detached,
            Phase::Undecided => RowState::Undecided,
        }
    }

    /// What was read need not be read again.
    #[inline]
    pub(crate) fn is_fresh(&self) -> bool {
        self.is_fresh_at(self.home.epoch())
    }

    /// The same for who knows the home's epoch.
    #[inline]
    pub(crate) fn is_fresh_at(&self, epoch: u64) -> bool {
        self.phase.get() == Phase::Kept && self.seen.get() >= epoch
    }

    pub(crate) fn is_touched(&self) -> bool {
        self.base.borrow().is_some()
    }

    pub(crate) fn is_doomed(&self) -> bool {
        self.doomed.get()
    }

    pub(crate) fn set_doomed(&self, doomed: bool) {
        self.doomed.set(doomed);
    }

    /// Whether the newest row was read, and locked, in the present transaction. A plain SELECT may find an older one.
    pub(crate) fn is_locked(&self) -> bool {
        self.newest.get().1 == Newest::Locked && self.may_be_locked()
    }

    /// The same, also where nobody knows whether the query took a lock.
    pub(crate) fn may_be_locked(&self) -> bool {
        let (moment, newest) = self.newest.get();
        newest != Newest::No && self.home.unit_state.is_of_transaction(moment)
    }

    pub(crate) fn note_newest(&self, newest: Newest) {
        if newest == Newest::Locked || newest == Newest::Perhaps && !self.is_locked() {
            self.newest.set((self.home.unit_state.read_now(), newest));
        }
    }

    /// Whether it was given out although nobody could say that its value was not outdated.
    pub(crate) fn is_unverified(&self) -> bool {
        self.is_touched() && self.verified.get() == NEVER
    }

    /// Whether what is known of it was read before the present attempt of `retry`.
    #[inline]
    pub(crate) fn is_from_before_attempt(&self) -> bool {
        self.seen.get() < self.home.unit_state.attempt()
    }

    /// Whether its value may show changes that were rolled back. Another transaction may since have given the row the same version.
    pub(crate) fn may_be_rolled_back(&self) -> bool {
        T::VERSIONED && self.home.unit_state.may_be_rolled_back(self.seen.get())
    }

    /// Whether what was known of the row is what a query gave now: its version says so, if that was committed.
    fn is_still(&self, known: &T, row: &T) -> bool {
        known.has_version_of(row) && (!self.may_be_rolled_back() || changes(known, row) == 0)
    }

    /// The columns that a flush would write.
    pub(crate) fn differences(&self) -> Columns {
        let Some(base) = self.base.borrow().clone() else { return 0 };
        let value = match self.value.try_borrow() {
            Ok(value) => value.clone(),
            // It is being written at this moment.
            Err(_) => return Columns::MAX,
        };
        value.filter(|value| !Rc::ptr_eq(&base, value)).map_or(0, |value| T::differences(&base, &value))
    }

    pub(crate) fn is_dirty(&self) -> bool {
        match self.phase() {
            Phase::Pending => true,
            Phase::Kept => self.doomed.get() || self.differences() != 0,
            Phase::RolledBack | Phase::Deleted | Phase::Discarded | Phase::Detached | Phase::Undecided => false,
        }
    }

    /// For error texts.
    pub(crate) fn shown_key(&self) -> Option<String> {
        catch_panic("the `Clone` or `Debug` of a key", || self.id().map(|id| format!("{id:?}"))).flatten()
    }

    /// The key in the database, whatever is in memory.
    pub(crate) fn id(&self) -> Option<T::Id> {
        let base = self.base.borrow().clone();
        let known = match base {
            Some(base) => base,
            None => self.value.try_borrow().ok()?.clone()?,
        };
        Some(known.id())
    }

    pub(crate) fn fk(&self) -> Fk<T> {
        match (self.phase(), self.id()) {
            (Phase::Kept | Phase::RolledBack | Phase::Deleted | Phase::Detached | Phase::Undecided, Some(id)) => {
                Fk::new(id)
            }
            (phase, _) => {
                let cell = self.awaited.get_or_init(|| Rc::new(KeyCell::new()));
                if phase == Phase::Discarded {
                    cell.void();
                }
                Fk::awaited(Rc::clone(cell))
            }
        }
    }

    pub(crate) fn read(&self, at: Place) -> Result<Rc<T>> {
        match self.phase() {
            Phase::Pending | Phase::RolledBack | Phase::Discarded => Err(self.wrong_state("read", at)),
            // The session has ended; the value is one that it rolled back.
            Phase::Detached if self.phase.get() == Phase::RolledBack => Err(self.wrong_state("read", at)),
            Phase::Kept | Phase::Deleted | Phase::Detached | Phase::Undecided => {
                match self.value.try_borrow().as_deref() {
                    Ok(Some(value)) => Ok(Rc::clone(value)),
                    Ok(None) => Err(self.wrong_state("read", at)),
                    Err(_) => Err(self.in_writing(at)),
                }
            }
        }
    }

    /// ObservedEffects that the value is about to be written. A row that may be outdated is read first.
    pub(crate) fn touch(self: &Rc<Self>, at: Place) -> Result<()> {
        let heals = self.phase() == Phase::RolledBack && self.is_from_before_attempt();
        if self.phase() != Phase::Kept && !heals {
            return Err(self.wrong_state("written", at));
        }
        if self.value.try_borrow_mut().is_err() {
            return Err(self.in_writing(at));
        }
        let read = if self.is_touched() { self.verified.get() } else { self.seen.get() };
        // What SQLite has read before the transaction may have changed since.
        let outside = self.home.unit_state.is_outside() && !self.is_touched();
        let verified = !heals && !outside && read >= self.home.epoch() || self.read_again(at);
        if self.phase() != Phase::Kept {
            return Err(self.wrong_state("written", at));
        }
        self.written_at.set(Some(at));
        self.note_touched(verified, at)
    }

    fn note_touched(self: &Rc<Self>, verified: bool, at: Place) -> Result<()> {
        let Ok(value) = self.value.try_borrow_mut() else { return Err(self.in_writing(at)) };
        let mut base = self.base.borrow_mut();
        if base.is_none() {
            base.clone_from(&value);
            self.verified.set(self.home.unit_state.now());
            self.home.touch(self);
        }
        if !verified {
            self.verified.set(NEVER);
        }
        self.home.unit_state.note_change(at);
        Ok(())
    }

    /// Reads a row whose known value does not count: in an attempt of `retry` one that was read before it, and one that may show
    /// changes that were rolled back.
    #[cold]
    pub(crate) fn read_before_use(self: &Rc<Self>, at: Place) {
        if !matches!(self.phase(), Phase::Kept | Phase::RolledBack) || self.value.try_borrow_mut().is_err() {
            return;
        }
        if !self.read_again(at) && self.phase() == Phase::Kept {
            // The program gets what was known before. The transaction can be committed if that turns out to be still so.
            let _ = self.note_touched(false, at);
        }
    }

    /// Reads the row again, as far as its session can do that now. Whether the base, or the value of a row that nobody has written to, is
    /// by now what the database has.
    fn read_again(&self, at: Place) -> bool {
        let (Some(id), Some(read)) = (self.id(), &self.home.reader) else { return false };
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
        if self.is_touched() {
            return self.rebase(row);
        }
        // With a version, what the program knew is what its write is compared with. An attempt of `retry` begins with nothing known.
        let keeps = T::VERSIONED && self.phase() == Phase::Kept && !self.is_from_before_attempt();
        if keeps
            && self
                .value
                .try_borrow()
                .is_ok_and(|value| value.as_ref().is_some_and(|known| !self.is_still(known, &row)))
        {
            return false;
        }
        self.renew(row);
        self.phase() == Phase::Kept
    }

    /// Takes in a row that a query gave. What the program has written and not flushed stays.
    pub(crate) fn take_in(&self, row: T) {
        if self.is_touched() {
            self.rebase(row);
        } else if !(T::VERSIONED && self.is_doomed()) {
            self.renew(row);
        }
    }

    /// Makes what the database has by now the base of a touched entry; columns that were not written get its values. Not where the
    /// program's own values were made of a row that has changed since, as the version says or as nobody knows: then the flush fails.
    fn rebase(&self, mut row: T) -> bool {
        let value = self.value.try_borrow().map(|value| value.clone());
        let Ok(value) = value else {
            self.verified.set(NEVER);
            return false;
        };
        let (Some(base), Some(value)) = (self.base.borrow().clone(), value) else { return false };
        let is_still = self.is_still(&base, &row);
        if !is_still || changes(&*base, &row) != 0 {
            if !is_still || self.verified.get() == NEVER {
                self.verified.set(NEVER);
                return false;
            }
            let newest = Rc::new(row.clone());
            let mut merged = T::clone(&value);
            T::take_unwritten(&base, &mut merged, &mut row);
            let old_value = match self.value.try_borrow_mut() {
                Ok(mut value) => value.replace(Rc::new(merged)),
                Err(_) => return false,
            };
            let old_base = self.base.replace(Some(newest));
            drop_catching_panic(old_value);
            drop_catching_panic(old_base);
            drop_catching_panic(row);
        }
        self.verified.set(self.home.unit_state.now());
        self.seen.set(self.home.unit_state.read_now());
        drop_catching_panic(base);
        drop_catching_panic(value);
        true
    }

    /// Compares an unverified base with the row as it is now; an error of the flush if that has changed. If the row is gone, the
    /// UPDATE or DELETE tells, if there is one.
    pub(crate) fn verify(&self, row: Option<T>, at: Place) -> Result<()> {
        let operation = match (self.doomed.get(), self.differences() != 0) {
            (true, _) => "delete",
            (false, true) => "update",
            (false, false) => "read",
        };
        if row.map_or(operation != "read", |row| self.rebase(row)) {
            return Ok(());
        }
        let key = self.shown_key().unwrap_or_default();
        Err(Error::Stale { entity: T::NAME, key, operation, at, undo: Undo::default() })
    }

    /// Both values, of a touched entry that nobody is writing.
    pub(crate) fn versions(&self, at: Place) -> Result<(Rc<T>, Rc<T>)> {
        let value = self.value.try_borrow().map_err(|_| self.in_writing(at))?;
        let value = value.as_ref().expect("a touched entry has a value");
        let base = self.base.borrow();
        Ok((Rc::clone(base.as_ref().expect("a touched entry has a base")), Rc::clone(value)))
    }

    /// The value is what is in the database: after it was flushed.
    ///
    /// Where a clone of the row panics, the base is still there, so that a rollback finds it.
    pub(crate) fn settle(&self, bump: bool) {
        if bump {
            self.bump();
        }
        drop_catching_panic(self.base.take());
    }

    fn bump(&self) {
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

    /// The value is what was in the database: whatever was written is forgotten.
    pub(crate) fn revert(&self) {
        let Some(base) = self.base.take() else { return };
        let written = match self.value.try_borrow_mut() {
            Ok(mut value) => value.replace(base),
            // It is being written at this moment: what will be in memory then is not in the database.
            Err(_) => {
                if self.phase.get() == Phase::Kept {
                    self.phase.set(Phase::RolledBack);
                }
                Some(base)
            }
        };
        drop_catching_panic(written);
    }

    /// The row as it was read just now.
    pub(crate) fn renew(&self, row: T) {
        let Ok(mut value) = self.value.try_borrow_mut() else {
            self.set_phase_of_row(Phase::RolledBack);
            return drop_catching_panic(row);
        };
        let old = value.replace(Rc::new(row));
        drop(value);
        self.set_phase_of_row(Phase::Kept);
        self.seen.set(self.home.unit_state.read_now());
        drop_catching_panic(old);
    }

    fn set_phase_of_row(&self, phase: Phase) {
        self.doubt.take();
        self.phase.set(phase);
    }

    /// The row is there, but what is known of it may be old.
    pub(crate) fn expire(&self) {
        self.seen.set(NEVER);
    }

    pub(crate) fn inserted(&self, row: T) {
        if let Some(cell) = self.awaited.get() {
            cell.fill(row.id());
        }
        self.renew(row);
    }

    /// Its insert was rolled back, or will not be.
    pub(crate) fn discard(&self) {
        self.set_phase(Phase::Discarded);
        if let Some(cell) = self.awaited.get() {
            cell.void();
        }
        drop_catching_panic(self.base.take());
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.set_phase_of_row(phase);
        self.doomed.set(false);
    }

    pub(crate) fn wrong_state(&self, operation: &'static str, at: Place) -> Error {
        Error::WrongState { entity: T::NAME, key: self.shown_key(), state: self.state(), operation, at }
    }

    pub(crate) fn in_writing(&self, at: Place) -> Error {
        let held_at = self.written_at.get().unwrap_or(Location::caller());
        let key = self.shown_key();
        Error::WriteInProgress { entity: T::NAME, key, held_at, at }
    }
}

/// The columns in which `row` differs from what was known. A value that is not equal to itself has not changed.
fn changes<T: Entity>(known: &T, row: &T) -> Columns {
    T::differences(known, row) & !T::differences(known, known)
}
