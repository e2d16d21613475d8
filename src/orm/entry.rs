//! A row as a session keeps it.
//!
//! Invariants: there is a `base` exactly while the entry is among the touched ones of its home. There is a value in every phase
//! but `Pending` and `Discarded`. An entry whose agenda has ended changes no more.
//!
//! A flush compares a touched entry's value with its base. So the base has to be the row of the present transaction when the value is
//! given out for writing: `touch` reads a row again that may be outdated. Where that cannot be done, the base is unverified, and the
//! flush looks before it compares.

use std::cell::{Cell, OnceCell, RefCell};
use std::panic::Location;
use std::rc::Rc;

use super::agenda::{Agenda, NEVER};
use super::entity::{Columns, Entity};
use super::handle::State;
use super::key::{Fk, KeyCell};
use crate::error::{Error, Place, Result};
use crate::wording::phrase;

/// What becomes of an entry, but for what its session as a whole says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Added, not inserted yet.
    Pending,
    Kept,
    /// What is in memory was rolled back in the database.
    Stale,
    /// Not in the database any more.
    Deleted,
    /// Never came into the database.
    Discarded,
    /// Not the session's any more.
    Detached,
}

/// What the entries of one type have in common.
pub(crate) struct Home<T: Entity> {
    pub(crate) agenda: Rc<Agenda>,
    /// Rows of this type that were read before this moment may be outdated.
    epoch: Cell<u64>,
    /// Reads a row again; none where there is no session to do it.
    reader: Option<Reader<T>>,
    /// Entries that were given out for writing since the last flush, in the order of the first time.
    pub(crate) touched: RefCell<Vec<Rc<Entry<T>>>>,
}

/// Reads the row of a key through the session, without a flush before it. `true`: with a lock, where only that finds the newest row.
pub(super) type Reader<T> = Box<dyn Fn(&<T as Entity>::Id, bool, Place) -> Result<Option<T>>>;

impl<T: Entity> Home<T> {
    pub(crate) fn new(agenda: Rc<Agenda>, reader: Option<Reader<T>>) -> Self {
        Self { agenda, epoch: Cell::new(NEVER), reader, touched: RefCell::default() }
    }

    /// Whatever was read before this moment may be outdated.
    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.agenda.epoch().max(self.epoch.get())
    }

    pub(crate) fn expire(&self) {
        self.epoch.set(self.agenda.tick());
    }
}

/// What a look-up by key asks for comes first, beside the counts of its `Rc`: among thousands of rows it waits for memory.
#[repr(C)]
pub(crate) struct Entry<T: Entity> {
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

impl<T: Entity> Entry<T> {
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
            seen: Cell::new(home.agenda.read_now()),
            doomed: Cell::new(false),
            verified: Cell::new(NEVER),
            newest: Cell::new((NEVER, Newest::No)),
            written_at: Cell::new(None),
            value: RefCell::new(value),
            base: RefCell::new(None),
            awaited: OnceCell::new(),
            home: Rc::clone(home),
        }
    }

    pub(crate) fn belongs_to(&self, home: &Rc<Home<T>>) -> bool {
        Rc::ptr_eq(&self.home, home)
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.phase.get() {
            Phase::Kept if self.home.agenda.has_ended() => Phase::Detached,
            Phase::Pending if self.home.agenda.has_ended() => Phase::Discarded,
            phase => phase,
        }
    }

    pub(crate) fn state(&self) -> State {
        match self.phase() {
            Phase::Pending => State::Pending,
            Phase::Kept if self.is_fresh() => State::Persistent,
            Phase::Kept => State::Expired,
            Phase::Stale => State::Stale,
            Phase::Deleted => State::Deleted,
            Phase::Discarded => State::Discarded,
            Phase::Detached => State::Detached,
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
        let (moment, newest) = self.newest.get();
        newest == Newest::Locked && self.home.agenda.is_of_transaction(moment)
    }

    pub(crate) fn note_newest(&self, newest: Newest) {
        if newest == Newest::Locked || newest == Newest::Perhaps && !self.is_locked() {
            self.newest.set((self.home.agenda.read_now(), newest));
        }
    }

    /// Whether it was given out although nobody could say that its value was not outdated.
    pub(crate) fn is_unverified(&self) -> bool {
        self.is_touched() && self.verified.get() == NEVER
    }

    /// Whether what is known of it was read before the present attempt of `retry`.
    #[inline]
    pub(crate) fn is_from_before_attempt(&self) -> bool {
        self.seen.get() < self.home.agenda.attempt()
    }

    /// The columns that a flush would write.
    pub(crate) fn differences(&self) -> Columns {
        match (&*self.base.borrow(), self.value.try_borrow().as_deref()) {
            (Some(base), Ok(Some(value))) if !Rc::ptr_eq(base, value) => T::differences(base, value),
            // It is being written at this moment.
            (Some(_), Err(_)) => Columns::MAX,
            _ => 0,
        }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        match self.phase() {
            Phase::Pending => true,
            Phase::Kept => self.doomed.get() || self.differences() != 0,
            Phase::Stale | Phase::Deleted | Phase::Discarded | Phase::Detached => false,
        }
    }

    /// For error texts.
    pub(crate) fn shown_key(&self) -> Option<String> {
        self.id().map(|id| format!("{id:?}"))
    }

    /// The key in the database, whatever is in memory.
    pub(crate) fn id(&self) -> Option<T::Id> {
        if let Some(base) = &*self.base.borrow() {
            return Some(base.id());
        }
        self.value.try_borrow().ok()?.as_ref().map(|value| value.id())
    }

    pub(crate) fn fk(&self) -> Fk<T> {
        match (self.phase(), self.id()) {
            (Phase::Kept | Phase::Stale | Phase::Deleted | Phase::Detached, Some(id)) => Fk::new(id),
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
            Phase::Pending | Phase::Stale | Phase::Discarded => Err(self.wrong_state("read", at)),
            Phase::Kept | Phase::Deleted | Phase::Detached => match self.value.try_borrow().as_deref() {
                Ok(Some(value)) => Ok(Rc::clone(value)),
                Ok(None) => Err(self.wrong_state("read", at)),
                Err(_) => Err(self.in_writing(at)),
            },
        }
    }

    /// Notes that the value is about to be written. A row that may be outdated is read first.
    pub(crate) fn touch(self: &Rc<Self>, at: Place) -> Result<()> {
        let heals = self.phase() == Phase::Stale && self.is_from_before_attempt();
        if self.phase() != Phase::Kept && !heals {
            return Err(self.wrong_state("written", at));
        }
        if self.value.try_borrow_mut().is_err() {
            return Err(self.in_writing(at));
        }
        let read = if self.is_touched() { self.verified.get() } else { self.seen.get() };
        let verified = !heals && read >= self.home.epoch() || self.read_again(at);
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
            self.verified.set(self.home.agenda.now());
            self.home.touched.borrow_mut().push(Rc::clone(self));
        }
        if !verified {
            self.verified.set(NEVER);
        }
        self.home.agenda.note_change(at);
        Ok(())
    }

    /// In an attempt of `retry` nothing is known that was read before it: such a row is read first.
    #[cold]
    pub(crate) fn read_for_attempt(self: &Rc<Self>, at: Place) {
        if !matches!(self.phase(), Phase::Kept | Phase::Stale) || self.value.try_borrow_mut().is_err() {
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
        let (moment, newest) = self.newest.get();
        let locked = newest != Newest::No && self.home.agenda.is_of_transaction(moment);
        let row = match read(&id, locked, at) {
            Ok(Some(row)) => row,
            Ok(None) => return false,
            Err(error) => {
                log::debug!(
                    target: "diesel_session::session",
                    "{} {} could not be read at {at}; the next flush reads it: {}", T::NAME, phrase(format_args!("{id:?}")), phrase(error)
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
                .is_ok_and(|value| value.as_ref().is_some_and(|known| !known.has_version_of(&row)))
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
        let Ok(mut value) = self.value.try_borrow_mut() else {
            self.verified.set(NEVER);
            return false;
        };
        let mut base = self.base.borrow_mut();
        let (Some(base), Some(value)) = (base.as_mut(), value.as_mut()) else { return false };
        let same_version = base.has_version_of(&row);
        let unequal_to_itself = T::differences(base, base);
        if !same_version || T::differences(base, &row) & !unequal_to_itself != 0 {
            if !same_version || self.verified.get() == NEVER {
                self.verified.set(NEVER);
                return false;
            }
            let newest = Rc::new(row.clone());
            T::take_unwritten(base, Rc::make_mut(value), &mut row);
            *base = newest;
        }
        self.verified.set(self.home.agenda.now());
        self.seen.set(self.home.agenda.read_now());
        true
    }

    /// Compares an unverified base with the row as it is now; an error of the flush where that has changed. Of one that is gone the UPDATE
    /// will tell, where there is one.
    pub(crate) fn verify(&self, row: Option<T>, at: Place) -> Result<()> {
        let written = self.differences() != 0;
        if row.map_or(written, |row| self.rebase(row)) {
            return Ok(());
        }
        let key = self.shown_key().unwrap_or_default();
        Err(Error::Stale { entity: T::NAME, key, operation: if written { "update" } else { "read" }, at })
    }

    /// Both values, of a touched entry that nobody is writing.
    pub(crate) fn versions(&self, at: Place) -> Result<(Rc<T>, Rc<T>)> {
        let value = self.value.try_borrow().map_err(|_| self.in_writing(at))?;
        let value = value.as_ref().expect("a touched entry has a value");
        let base = self.base.borrow();
        Ok((Rc::clone(base.as_ref().expect("a touched entry has a base")), Rc::clone(value)))
    }

    /// The value is what is in the database: after it was flushed.
    pub(crate) fn settle(&self, bump: bool) {
        *self.base.borrow_mut() = None;
        if bump
            && let Ok(mut value) = self.value.try_borrow_mut()
            && let Some(value) = &mut *value
        {
            Rc::make_mut(value).bump_version();
        }
    }

    /// The value is what was in the database: whatever was written is forgotten.
    pub(crate) fn revert(&self) {
        let base = self.base.borrow_mut().take();
        let Some(base) = base else { return };
        match self.value.try_borrow_mut() {
            Ok(mut value) => *value = Some(base),
            // It is being written at this moment: what will be in memory then is not in the database.
            Err(_) if self.phase.get() == Phase::Kept => self.phase.set(Phase::Stale),
            Err(_) => {}
        }
    }

    /// The row as it was read just now.
    pub(crate) fn renew(&self, row: T) {
        let Ok(mut value) = self.value.try_borrow_mut() else { return self.phase.set(Phase::Stale) };
        *value = Some(Rc::new(row));
        drop(value);
        self.phase.set(Phase::Kept);
        self.seen.set(self.home.agenda.read_now());
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
        self.phase.set(Phase::Discarded);
        self.doomed.set(false);
        self.base.borrow_mut().take();
        if let Some(cell) = self.awaited.get() {
            cell.void();
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.set(phase);
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
