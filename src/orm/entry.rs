//! A row as a session keeps it.
//!
//! Invariants: there is a `base` exactly while the entry is among the touched ones of its home. There is a value in every phase
//! but `Pending` and `Discarded`. An entry whose agenda has ended changes no more.

use std::cell::{Cell, OnceCell, RefCell};
use std::panic::Location;
use std::rc::Rc;

use super::agenda::Agenda;
use super::entity::{Columns, Entity};
use super::handle::State;
use super::key::{Fk, KeyCell};
use crate::error::{Error, Place, Result};

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
    epoch: Cell<u64>,
    /// Entries that were given out for writing since the last flush, in the order of the first time.
    pub(crate) touched: RefCell<Vec<Rc<Entry<T>>>>,
}

impl<T: Entity> Home<T> {
    pub(crate) fn new(agenda: Rc<Agenda>) -> Self {
        Self { agenda, epoch: Cell::new(0), touched: RefCell::default() }
    }

    /// Both only grow, so their sum is another after either has grown.
    pub(crate) fn epoch(&self) -> u64 {
        self.agenda.epoch() + self.epoch.get()
    }

    pub(crate) fn expire(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }
}

/// What a look-up by key asks for comes first, beside the counts of its `Rc`: among thousands of rows it waits for memory.
#[repr(C)]
pub(crate) struct Entry<T: Entity> {
    /// The home's epoch when the value was read.
    seen: Cell<u64>,
    phase: Cell<Phase>,
    /// It is to be deleted by the next flush.
    doomed: Cell<bool>,
    home: Rc<Home<T>>,
    /// Who was given it for writing last.
    written_at: Cell<Option<Place>>,
    pub(super) value: RefCell<Option<Rc<T>>>,
    /// The value in the database, from the first writing to the flush.
    base: RefCell<Option<Rc<T>>>,
    /// For those who have asked for the key before there was one.
    awaited: OnceCell<Rc<KeyCell<T::Id>>>,
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
            seen: Cell::new(home.epoch()),
            doomed: Cell::new(false),
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
        self.phase.get() == Phase::Kept && self.seen.get() == epoch
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

    /// Notes that the value is about to be written.
    pub(crate) fn touch(self: &Rc<Self>, at: Place) -> Result<()> {
        if self.phase() != Phase::Kept {
            return Err(self.wrong_state("written", at));
        }
        let Ok(value) = self.value.try_borrow_mut() else { return Err(self.in_writing(at)) };
        self.written_at.set(Some(at));
        let mut base = self.base.borrow_mut();
        if base.is_none() {
            base.clone_from(&value);
            self.home.touched.borrow_mut().push(Rc::clone(self));
        }
        self.home.agenda.note_change(at);
        Ok(())
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
        self.seen.set(self.home.epoch());
    }

    /// The row is there, but what is known of it may be old.
    pub(crate) fn expire(&self) {
        // Never an epoch, as those begin at 0 and are raised by one.
        self.seen.set(u64::MAX);
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
