//! The identity map of one entity: one entry a key, and what is to become of it.
//!
//! Code of the program runs in here: `Clone`, `Hash` and `Eq` of keys, `Drop` of rows. So the map is not borrowed for longer than a look-up,
//! what is taken out of it is dropped afterwards, and what a transaction has sent is noted first.

use std::any::{Any, TypeId};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use diesel::result::QueryResult;
use foldhash::fast::RandomState;

use super::changes::{Change, ChangeKind};
use super::derive_support::{by_key, is_exact};
use super::entity::{Entity, Insert, Persist};
use super::executor::{Connected, Executor, StatementKind, ask, reader};
use super::pending_inserts::{DynQueue, Queue};
use super::relation::{Reference, Relations, alike};
use super::savepoint_log::SavepointLog;
use super::tracked_row::{Home, Listed, Newest, Phase, TrackedRow};
use super::unit_state::UnitState;
use super::writes::{Deletes, Depends, not_unique};
use crate::error::Verdict;
use crate::error::{Error, Place, Result, Undo};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct IdentityMap<C, T: Entity> {
    pub(super) home: Rc<Home<T>>,
    rows: RefCell<HashMap<T::Id, Rc<TrackedRow<T>>, RandomState>>,
    /// One for each type of new rows, in the order of their first use.
    queues: RefCell<Vec<Rc<dyn DynQueue<C, T>>>>,
    /// To be deleted, in the order of `delete`.
    doomed: RefCell<Listed<T>>,
    /// The same for as long as a flush lasts.
    pub(super) deletes: RefCell<Deletes<T>>,
    relations: OnceCell<Relations>,
    ancestors: OnceCell<HashSet<TypeId>>,
    /// The least number of open savepoints at which rows of ancestors were deleted in this transaction.
    lost_parents: Cell<Option<u32>>,
    /// Keys, as the program spells them, of rows that the database spells otherwise.
    aliases: RefCell<HashMap<T::Id, T::Id, RandomState>>,
    /// Most bytes of one statement, once that has been asked.
    most_bytes: Cell<Option<usize>>,
    /// Whether the role may lock rows, once that has been asked.
    may_lock: Cell<Option<bool>>,
    /// Whether a plain SELECT may find an older row than a locking one.
    has_snapshot: bool,
    /// Rows that were read with a lock, have expired, and have come with a query without a lock, which may have found older ones.
    doubtful: RefCell<Vec<Rc<TrackedRow<T>>>>,
    /// Keys of new rows, while a flush asks for them.
    waiting_keys: RefCell<Option<HashSet<String>>>,
    pub(super) savepoint_log: SavepointLog<T>,
    /// How many rows were left when those that nobody holds went last.
    swept: Cell<usize>,
    of: PhantomData<fn(&mut C)>,
}

/// Fewer bytes than this fit into a statement of any server.
const ASKED_FROM: usize = 1 << 14;

/// Bytes that a statement sends beside each key.
const BESIDE_KEY: usize = 16;

/// Drops what was in the map. A key and a row may have a `Drop` of the program each.
fn forget_each<T: Entity>(forgotten: impl IntoIterator<Item = (T::Id, Rc<TrackedRow<T>>)>) {
    for (id, entry) in forgotten {
        drop_catching_panic(id);
        drop_catching_panic(entry);
    }
}

/// Fewer rows than this are not worth a sweep.
const SWEPT_FROM: usize = 1024;

/// What is known of a row that others refer to.
pub(crate) enum Known {
    /// It is known, and what it refers to; `surely` if that cannot be out of date.
    Row {
        row: *const (),
        references: Vec<Reference>,
        surely: bool,
    },
    Nothing,
    /// What was asked for is no key of the entity.
    NoKey,
}

/// A store of whatever entity.
pub(crate) trait AnyIdentityMap<C> {
    fn as_any(&self) -> &dyn Any;
    fn name(&self) -> &'static str;
    /// The type of the table. Entities of one table have the same.
    fn table(&self) -> TypeId;
    /// Rows may have been changed otherwise than through this store.
    fn expire(&self);
    /// The foreign keys of the entity and of its ancestors.
    fn relations(&self) -> &Relations;
    /// Whether rows refer, directly or by others, to rows of that table.
    fn refers_to(&self, ancestor: TypeId) -> bool;
    /// Rows of an ancestor have been deleted, and with them perhaps rows of this table.
    fn lose_parents(&self);
    fn begin_flush(&self, at: Place) -> Result<()>;
    fn end_flush(&self);
    /// An error where a row is being written at this moment.
    fn check_writers(&self, at: Place) -> Result<()>;
    /// An error where something could not be flushed as it is; nothing has been sent.
    fn check(&self, at: Place) -> Result<()>;
    /// New rows.
    fn waiting(&self) -> usize;
    fn unresolved(&self, at: Place) -> Error;
    /// Whether a flush would send something.
    fn is_dirty(&self) -> bool;
    /// Whether a flush would send an UPDATE.
    fn has_writes(&self) -> bool;
    fn has_updates(&self) -> bool;
    fn has_deletes(&self) -> bool;
    /// Reads rows again for which a query may have found older ones than are known.
    fn read_doubtful(&self, sender: &dyn Executor<C>) -> Result<()>;
    /// Compares what may be outdated with what the database has; an error where it is.
    fn verify(&self, sender: &dyn Executor<C>) -> Result<()>;
    /// What rows that are updated referred to and do not refer to any more.
    fn moves_from(&self, at: Place) -> Result<Vec<Reference>>;
    /// Whether the row of that key waits for its INSERT.
    fn is_waiting(&self, key: &dyn Any) -> bool;
    /// Holds back the DELETE of the row of that key.
    fn hold_back(&self, key: &dyn Any) -> Known;
    fn hold_all_back(&self);
    /// From here on no DELETE is held back.
    fn release_held(&self);
    /// The places of rows to be deleted: the late ones, the early ones or all.
    fn doomed_places(&self, late: Option<bool>) -> Vec<usize>;
    fn places_of(&self, key: &dyn Any) -> Vec<usize>;
    fn references_of(&self, doomed: usize) -> Vec<Reference>;
    fn send_moves(
        &self,
        sender: &dyn Executor<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        waiting: &dyn Fn(&Reference) -> bool,
    ) -> Result<()>;
    fn unlink(&self, doomed: usize, parents: &[TypeId], sender: &dyn Executor<C>) -> Result<bool>;
    /// Whether so many rows can be deleted by one statement.
    fn deletes_at_once(&self, rows: usize) -> bool;
    fn lock(&self, sender: &dyn Executor<C>, waiting: Depends<'_>) -> Result<()>;
    /// Inserts new rows that refer to no row that waits itself; how many those were.
    fn insert_ready(&self, waiting: Depends<'_>, sender: &dyn Executor<C>) -> Result<usize>;
    /// Whether the row of that key waits for its INSERT at this moment.
    fn waits_for_insert(&self, key: &dyn Any) -> bool;
    /// Forgets which rows were to be deleted, of those that were.
    fn forget_deleted(&self);
    fn update(&self, sender: &dyn Executor<C>, waiting: Depends<'_>) -> Result<()>;
    fn delete(&self, doomed: &[usize], together: bool, sender: &dyn Executor<C>) -> Result<()>;
    /// What a flush would send.
    fn unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>);
    /// What was sent in this transaction.
    fn flushed(&self, changes: &mut Vec<Change>);
    /// Forgets what has not been flushed.
    fn forget_unflushed(&self);
    /// Forgets what has been written and not been flushed; new rows and deletes stay.
    fn forget_writes(&self);
    fn keep_level(&self, level: u32);
    /// After what was sent since the savepoint of that level was rolled back; 0 is the transaction.
    fn roll_back_to(&self, level: u32);
    /// After a commit whose answer was lost.
    fn undecided(&self, verdict: &Arc<Verdict>);
    fn committed(&self);
    /// Lets go of all rows.
    fn clear(&self);
}

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    pub(super) fn new(unit_state: &Rc<UnitState>, session: &Weak<dyn Connected<C>>) -> Self {
        Self {
            home: Rc::new(Home::new(Rc::clone(unit_state), Some(reader::<C, T>(session)))),
            rows: RefCell::default(),
            queues: RefCell::default(),
            doomed: RefCell::default(),
            deletes: RefCell::default(),
            relations: OnceCell::new(),
            ancestors: OnceCell::new(),
            lost_parents: Cell::new(None),
            aliases: RefCell::default(),
            most_bytes: Cell::new(None),
            may_lock: Cell::new(None),
            doubtful: RefCell::default(),
            has_snapshot: session.upgrade().is_some_and(|session| session.has_snapshot()),
            waiting_keys: RefCell::default(),
            savepoint_log: SavepointLog::new(Rc::clone(unit_state)),
            swept: Cell::new(0),
            of: PhantomData,
        }
    }

    pub(super) fn add<N: Insert<C, Entity = T>>(&self, new: N, at: Place) -> Rc<TrackedRow<T>> {
        let entry = Rc::new(TrackedRow::pending(&self.home));
        let mut queues = self.queues.borrow_mut();
        match queues.iter().find_map(|queue| queue.as_any().downcast_ref::<Queue<N>>()) {
            Some(queue) => queue.push(new, &entry),
            None => {
                let queue = Queue::new();
                queue.push(new, &entry);
                queues.push(Rc::new(queue));
            }
        }
        self.home.unit_state.note_change(at);
        entry
    }

    /// The entry of a key that need not be read again.
    #[inline]
    pub(super) fn fresh(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        let epoch = self.home.epoch();
        let rows = self.rows.borrow();
        let is_fresh = |entry: &&Rc<TrackedRow<T>>| entry.is_fresh_at(epoch) && !entry.is_doomed();
        match rows.get(id) {
            Some(entry) => Some(entry).filter(is_fresh).cloned(),
            None => rows.get(self.aliases.borrow().get(id)?).filter(is_fresh).cloned(),
        }
    }

    fn known(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        self.rows.borrow().get(id).cloned()
    }

    /// The same, where the key may be spelled otherwise than the database spells it.
    fn known_as(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        let known = self.known(id);
        known.or_else(|| {
            let alias = self.aliases.borrow().get(id).cloned();
            alias.and_then(|id| self.known(&id))
        })
    }

    fn remember(&self, id: T::Id, entry: &Rc<TrackedRow<T>>) -> Option<Rc<TrackedRow<T>>> {
        self.rows.borrow_mut().insert(id, Rc::clone(entry))
    }

    /// The row of a key, read now.
    pub(super) fn fetch(&self, id: &T::Id, sender: &dyn Executor<C>) -> Result<Option<Rc<TrackedRow<T>>>> {
        let known = self.known_as(id);
        match self.read(id, known.as_ref(), sender)? {
            Some((row, newest)) => Ok(Some(self.absorb_as(id, row, newest))),
            None => {
                self.vanished(id);
                Ok(None)
            }
        }
    }

    /// The row that the database finds for a key. One that was read with a lock is read so again, as a plain SELECT may find an
    /// older one.
    fn read(
        &self,
        id: &T::Id,
        known: Option<&Rc<TrackedRow<T>>>,
        sender: &dyn Executor<C>,
    ) -> Result<Option<(T, Newest)>> {
        let locked = self.has_snapshot && known.is_some_and(|entry| entry.is_locked());
        let newest = if locked { Newest::Locked } else { Newest::No };
        let mut rows = ask(sender, StatementKind::select::<T>(), |conn| match locked {
            true => self.find_newest(conn, id),
            false => T::find(conn, id),
        })?;
        if rows.len() > 1 {
            return Err(not_unique(&rows[0], "SELECT", rows.len(), sender.at()));
        }
        Ok(rows.pop().map(|row| (row, newest)))
    }

    /// The newest row of a key, whatever the transaction sees.
    fn find_newest(&self, conn: &mut C, id: &T::Id) -> QueryResult<Vec<T>> {
        if self.has_snapshot { T::find_newest(conn, id) } else { T::find(conn, id) }
    }

    /// The rows of these keys, with one query for those that would have to be read one by one. What a key is equal to is for the
    /// database to say: rows that it finds under another spelling count.
    pub(super) fn get_many(&self, ids: &[T::Id], sender: &dyn Executor<C>) -> Result<Vec<Option<Rc<TrackedRow<T>>>>> {
        let mut found: Vec<Option<Rc<TrackedRow<T>>>> = ids.iter().map(|id| self.fresh(id)).collect();
        let mut asked: HashMap<&T::Id, usize> = HashMap::with_capacity(ids.len());
        let mut missing: Vec<T::Id> = Vec::new();
        for id in ids.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(id, _)| id) {
            asked.entry(id).or_insert_with(|| {
                missing.push(id.clone());
                missing.len() - 1
            });
        }
        if missing.is_empty() {
            return Ok(found);
        }
        let mut read: Vec<Option<Rc<TrackedRow<T>>>> = Vec::with_capacity(missing.len());
        let mut left = &missing[..];
        for length in self.lengths(&missing, T::FINDS, sender)? {
            let (ids, rest) = left.split_at(length);
            left = rest;
            let mut many = |ids: &[T::Id]| {
                let rows = ask(sender, StatementKind::select::<T>(), |conn| T::find_many(conn, ids))?;
                let mut seen = HashSet::with_capacity(rows.len());
                match rows.iter().find(|row| !seen.insert(row.id())) {
                    Some(twice) => Err(not_unique(twice, "SELECT", 2, sender.at())),
                    None => Ok(rows),
                }
            };
            let mut one = |id: &T::Id| Ok(self.read(id, None, sender)?.map(|(row, _)| row));
            let rows = by_key(ids, &mut many, &mut one)?;
            for (id, row) in ids.iter().zip(rows) {
                let entry = row.map(|row| self.absorb_as(id, row, Newest::No));
                read.push(entry.filter(|entry| !entry.is_doomed()));
            }
        }
        self.read_doubtful(sender)?;
        missing.iter().zip(&read).filter(|(_, row)| row.is_none()).for_each(|(id, _)| self.vanished(id));
        for (id, place) in ids.iter().zip(&mut found).filter(|(_, place)| place.is_none()) {
            place.clone_from(&read[asked[id]]);
        }
        Ok(found)
    }

    /// The entry of a row that was asked for by a key.
    fn absorb_as(&self, asked: &T::Id, row: T, newest: Newest) -> Rc<TrackedRow<T>> {
        let id = row.id();
        if id != *asked {
            self.aliases.borrow_mut().insert(asked.clone(), id);
        }
        self.absorb(row, newest)
    }

    /// The entry of a row that was read just now. What is known wins over what was read, unless it may be outdated or the query gave the
    /// newest row.
    pub(super) fn absorb(&self, row: T, newest: Newest) -> Rc<TrackedRow<T>> {
        let id = row.id();
        let entry = match self.known(&id).filter(|entry| entry.phase().may_be_there()) {
            Some(entry) => {
                // A plain SELECT may have found an older row than the query before it, which locked the row or may have done so.
                let outdated = self.has_snapshot && newest == Newest::No && entry.may_be_locked();
                if newest == Newest::No && (entry.is_fresh() || outdated && entry.is_touched()) {
                    drop_catching_panic(row);
                } else if outdated && entry.is_locked() && entry.phase() == Phase::Kept {
                    self.doubtful.borrow_mut().push(Rc::clone(&entry));
                    drop_catching_panic(row);
                } else {
                    entry.take_in(row);
                    if outdated {
                        entry.expire();
                    }
                }
                entry
            }
            None => {
                let entry = Rc::new(TrackedRow::kept(&self.home, row));
                drop_catching_panic(self.remember(id, &entry));
                entry
            }
        };
        entry.note_newest(newest);
        entry
    }

    /// Reads doubtful rows once more, with their locks.
    pub(super) fn read_doubtful(&self, sender: &dyn Executor<C>) -> Result<()> {
        for entry in self.doubtful.take() {
            // After a failed query and the end of its transaction there is no lock any more.
            let is_doubtful = entry.is_locked() && !entry.is_fresh() && !entry.is_touched();
            if let Some(id) = entry.id().filter(|_| is_doubtful) {
                self.fetch(&id, sender)?;
            }
        }
        Ok(())
    }

    pub(super) fn refresh(&self, entry: &Rc<TrackedRow<T>>, sender: &dyn Executor<C>) -> Result<()> {
        let at = sender.at();
        self.mine(entry, at)?;
        let id = match entry.phase() {
            Phase::Kept | Phase::RolledBack | Phase::Undecided => entry.id().ok_or_else(|| entry.in_writing(at))?,
            _ => return Err(entry.wrong_state("refreshed", at)),
        };
        match self.read(&id, Some(entry), sender)? {
            Some((row, _)) => {
                self.untouch(entry);
                entry.renew(row);
                if self.known(&id).is_none_or(|known| !known.phase().may_be_there()) {
                    drop_catching_panic(self.remember(id, entry));
                }
                Ok(())
            }
            None => {
                self.untouch(entry);
                self.gone(entry);
                self.forget_row(entry);
                Err(Error::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at })
            }
        }
    }

    /// Dooms a row; a new one is taken out.
    pub(super) fn doom(&self, entry: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        let is_uncertain = entry.may_be_rolled_back() && entry.phase() == Phase::Kept && !entry.is_fresh();
        if is_uncertain || entry.is_from_before_attempt() && (T::VERSIONED || entry.phase() == Phase::RolledBack) {
            entry.read_before_use(at);
        }
        match entry.phase() {
            Phase::Pending => {
                entry.discard();
                let queues = self.queues.borrow().clone();
                queues.iter().for_each(|queue| queue.remove(entry));
            }
            Phase::Kept => {
                if !entry.is_doomed() {
                    entry.set_doomed(true);
                    self.doomed.borrow_mut().insert(entry.list(), Rc::clone(entry));
                }
                self.home.unit_state.note_change(at);
            }
            _ => return Err(entry.wrong_state("deleted", at)),
        }
        Ok(())
    }

    pub(super) fn expire_one(&self, entry: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        if entry.phase() != Phase::Kept {
            return Err(entry.wrong_state("expired", at));
        }
        self.untouch(entry);
        entry.expire();
        Ok(())
    }

    pub(super) fn expunge(&self, entry: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        match entry.phase() {
            Phase::Pending => self.doom(entry, at)?,
            Phase::Kept | Phase::RolledBack | Phase::Undecided => {
                self.untouch(entry);
                if entry.is_doomed() {
                    let doomed = self.doomed.borrow_mut().remove(&entry.listed_as());
                    drop_catching_panic(doomed);
                }
                entry.set_phase(Phase::Detached);
                self.forget_row(entry);
            }
            _ => return Err(entry.wrong_state("expunged", at)),
        }
        Ok(())
    }

    fn mine(&self, entry: &TrackedRow<T>, at: Place) -> Result<()> {
        if entry.belongs_to(&self.home) {
            return Ok(());
        }
        match entry.phase() {
            Phase::Kept | Phase::Pending | Phase::RolledBack | Phase::Undecided => {
                Err(Error::NotMine { entity: T::NAME, key: entry.shown_key(), at })
            }
            _ => Err(entry.wrong_state("given to this session", at)),
        }
    }

    /// Forgets what was written to an entry.
    pub(super) fn untouch(&self, entry: &Rc<TrackedRow<T>>) {
        if entry.is_touched() {
            entry.revert();
            self.home.untouch(entry);
        }
    }

    pub(super) fn doomed(&self) -> Vec<Rc<TrackedRow<T>>> {
        self.doomed.borrow().values().cloned().collect()
    }

    /// There is no row of that key any more.
    fn vanished(&self, id: &T::Id) {
        // One that is written to stays, for its flush to say so.
        if let Some(entry) = self.known_as(id).filter(|entry| !entry.is_touched() && !entry.is_doomed()) {
            self.gone(&entry);
            self.forget_row(&entry);
        }
    }

    /// An entry's row is not there.
    fn gone(&self, entry: &Rc<TrackedRow<T>>) {
        match entry.phase() {
            // Either its INSERT was not committed, or its row was deleted afterwards. A rollback changes neither.
            Phase::Undecided => entry.set_phase(Phase::Deleted),
            Phase::Kept | Phase::RolledBack => {
                self.savepoint_log.note_gone(entry);
                entry.set_phase(Phase::Deleted);
            }
            _ => {}
        }
    }

    /// Takes an entry out of the map, if it is what is there for its key.
    fn forget_row(&self, entry: &Rc<TrackedRow<T>>) {
        let by_key = || {
            // The key cannot be seen while the row is being written.
            let id = entry.id()?;
            let is_known = self.rows.borrow().get(&id).is_some_and(|known| Rc::ptr_eq(known, entry));
            Some(if is_known { self.rows.borrow_mut().remove_entry(&id) } else { None })
        };
        match catch_panic("`Clone`, `Hash` or `Eq` of a key", by_key).flatten() {
            Some(forgotten) => forget_each(forgotten),
            None => self.forget_rows(|known| Rc::ptr_eq(known, entry)),
        }
    }

    /// Takes entries out of the map without a look at their keys.
    fn forget_rows(&self, which: impl Fn(&Rc<TrackedRow<T>>) -> bool) {
        let forgotten: Vec<_> = self.rows.borrow_mut().extract_if(|_, entry| which(entry)).collect();
        forget_each(forgotten);
    }

    /// Puts an entry whose row is there again into the map. Where the key has been read again since, its row has another handle, and it
    /// can have but one: this one is not the session's any more.
    fn restore(&self, entry: &Rc<TrackedRow<T>>) -> Phase {
        let restore = || {
            let id = entry.id()?;
            match self.known(&id) {
                Some(known) if known.phase().may_be_there() => Some(Rc::ptr_eq(&known, entry)),
                _ => {
                    drop_catching_panic(self.remember(id, entry));
                    Some(true)
                }
            }
        };
        match catch_panic("`Clone`, `Hash` or `Eq` of a key", restore).flatten() {
            Some(true) => Phase::Kept,
            _ => Phase::Detached,
        }
    }

    /// For so many rows that will be inserted.
    pub(super) fn reserve(&self, rows: usize) {
        self.rows.borrow_mut().reserve(rows);
        self.savepoint_log.reserve(rows);
    }

    pub(super) fn inserted(&self, entry: &Rc<TrackedRow<T>>, row: T) {
        let id = row.id();
        // What is undone last is noted first.
        let known = self.known(&id).filter(|known| !Rc::ptr_eq(known, entry));
        if let Some(known) = &known {
            self.untouch(known);
            match known.may_be_new() {
                // The key is free, so its INSERT was not committed.
                true => known.discard(),
                false => self.gone(known),
            }
        }
        self.savepoint_log.note(ChangeKind::Insert, entry);
        drop_catching_panic(self.remember(id, entry));
        drop_catching_panic(known);
        entry.inserted(row);
    }

    pub(super) fn deleted(&self, entry: &Rc<TrackedRow<T>>) {
        self.savepoint_log.note(ChangeKind::Delete, entry);
        entry.set_phase(Phase::Deleted);
        self.forget_row(entry);
    }

    /// The row was deleted together with one that it referred to.
    pub(super) fn gone_with_parent(&self, entry: &Rc<TrackedRow<T>>) {
        self.untouch(entry);
        self.gone(entry);
        self.forget_row(entry);
    }

    pub(super) fn refers_to(&self, ancestor: TypeId) -> bool {
        let ancestors = self.ancestors.get_or_init(|| self.relations().ancestors(T::table()));
        ancestors.contains(&ancestor)
    }

    /// Whether the role may lock rows that it does not update: that takes the right to update, which one who may delete need not have.
    pub(super) fn may_lock(&self, sender: &dyn Executor<C>) -> Result<bool> {
        if self.may_lock.get().is_none() {
            self.may_lock.set(Some(ask(sender, StatementKind::select::<T>(), |conn| T::may_lock(conn))?));
        }
        Ok(self.may_lock.get().unwrap_or(true))
    }

    /// Most bytes of one statement, for rows that have so many.
    pub(super) fn most_bytes(&self, bytes: usize, sender: &dyn Executor<C>) -> Result<usize> {
        // MySQL and MariaDB have no RETURNING, and they alone have such a limit.
        if bytes < ASKED_FROM || sender.returning() {
            return Ok(usize::MAX);
        }
        if self.most_bytes.get().is_none() {
            let most = ask(sender, StatementKind::select::<T>(), |conn| T::most_bytes(conn))?;
            self.most_bytes.set(Some(most.unwrap_or(usize::MAX)));
        }
        Ok(self.most_bytes.get().unwrap_or(usize::MAX))
    }

    /// How many of these keys go with one statement, of which `most` could, and how many with the next.
    pub(super) fn lengths(&self, ids: &[T::Id], most: usize, sender: &dyn Executor<C>) -> Result<Vec<usize>> {
        let most = most.max(1);
        let mut lengths: Vec<usize> = Vec::with_capacity(ids.len() / most + 1);
        if sender.returning() || is_exact::<T::Id>() {
            lengths.extend(ids.chunks(most).map(<[_]>::len));
            return Ok(lengths);
        }
        // No key is shorter than it is shown.
        let bytes: Vec<usize> = ids.iter().map(|id| format!("{id:?}").len() + BESIDE_KEY).collect();
        let room = self.most_bytes(bytes.iter().sum(), sender)? / 4 * 3;
        let (mut length, mut taken) = (0, 0_usize);
        for bytes in bytes {
            if length == most || length > 0 && taken + bytes > room {
                lengths.push(length);
                (length, taken) = (0, 0);
            }
            (length, taken) = (length + 1, taken + bytes);
        }
        lengths.extend((length > 0).then_some(length));
        Ok(lengths)
    }

    fn relations(&self) -> &Relations {
        self.relations.get_or_init(Relations::of::<T>)
    }

    /// Rows that this row refers to may have been deleted in this transaction, and with them this row.
    pub(super) fn may_be_gone(&self, row: &T) -> bool {
        self.has_lost_parents() && !row.references().is_empty()
    }

    pub(super) fn has_lost_parents(&self) -> bool {
        self.lost_parents.get().is_some()
    }

    pub(super) fn lose_parents(&self) {
        let level = self.home.unit_state.level();
        self.lost_parents.set(Some(self.lost_parents.get().map_or(level, |lost| lost.min(level))));
        self.home.expire();
    }

    fn forget_new_rows(&self) {
        let queues = self.queues.borrow().clone();
        for queue in queues {
            let entries = queue.clear();
            entries.iter().for_each(|entry| entry.discard());
            drop_each_catching_panics(entries);
        }
    }

    pub(super) fn forget_doomed(&self, entry: &Rc<TrackedRow<T>>) {
        let doomed = self.doomed.borrow_mut().remove(&entry.listed_as());
        drop_catching_panic(doomed);
    }

    /// Forgets which rows were to be deleted, of those that were.
    pub(super) fn forget_deleted(&self) {
        let (doomed, deleted): (Listed<T>, Listed<T>) =
            self.doomed.take().into_iter().partition(|(_, entry)| entry.phase() == Phase::Kept);
        self.doomed.borrow_mut().extend(doomed);
        drop_each_catching_panics(deleted.into_values());
        let touched = self.home.touched();
        touched.iter().filter(|entry| entry.phase() != Phase::Kept).for_each(|entry| self.untouch(entry));
    }

    pub(super) fn forget_deletes(&self) {
        let doomed = self.doomed.take();
        doomed.values().for_each(|entry| entry.set_doomed(false));
        drop_each_catching_panics(doomed.into_values());
    }

    /// Rows that nobody holds and that would be read again anyway.
    fn sweep(&self) {
        let rows = self.rows.borrow().len();
        if rows >= SWEPT_FROM.max(self.swept.get() * 2) {
            self.forget_rows(|entry| Rc::strong_count(entry) == 1);
            self.swept.set(self.rows.borrow().len());
            let rows = self.rows.borrow();
            let forgotten: Vec<_> = self.aliases.borrow_mut().extract_if(|_, id| !rows.contains_key(id)).collect();
            drop(rows);
            drop_each_catching_panics(forgotten);
        }
    }
}

impl<C: 'static, T: Persist<C>> AnyIdentityMap<C> for IdentityMap<C, T> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn name(&self) -> &'static str {
        std::any::type_name::<T>()
    }

    fn table(&self) -> TypeId {
        T::table()
    }

    fn expire(&self) {
        self.home.expire();
    }

    fn relations(&self) -> &Relations {
        self.relations()
    }

    fn refers_to(&self, ancestor: TypeId) -> bool {
        self.refers_to(ancestor)
    }

    fn lose_parents(&self) {
        self.lose_parents();
    }

    fn begin_flush(&self, at: Place) -> Result<()> {
        self.waiting_keys.take();
        let doomed = self.doomed();
        let deletes = if doomed.is_empty() { Deletes::default() } else { Deletes::of(&doomed, at)? };
        drop_catching_panic(self.deletes.replace(deletes));
        Ok(())
    }

    fn end_flush(&self) {
        self.waiting_keys.take();
        drop_catching_panic(self.deletes.take());
    }

    fn check_writers(&self, at: Place) -> Result<()> {
        self.home.touched().iter().try_for_each(|entry| entry.versions(at).map(drop))
    }

    fn check(&self, at: Place) -> Result<()> {
        for entry in self.home.touched() {
            let (base, value) = entry.versions(at)?;
            if base.id() != value.id() {
                let (from, to) = (format!("{:?}", base.id()), format!("{:?}", value.id()));
                return Err(Error::KeyChanged { entity: T::NAME, from, to, at });
            }
        }
        Ok(())
    }

    fn waiting(&self) -> usize {
        self.queues.borrow().iter().map(|queue| queue.len()).sum()
    }

    fn unresolved(&self, at: Place) -> Error {
        Error::UnresolvedKeys { entity: T::NAME, rows: self.waiting(), at, undo: Undo::default() }
    }

    fn is_dirty(&self) -> bool {
        self.waiting() > 0 || self.has_deletes() || self.has_writes()
    }

    fn has_writes(&self) -> bool {
        self.home.touched().iter().any(|entry| entry.is_unverified() || entry.differences() != 0)
    }

    fn has_updates(&self) -> bool {
        self.home.has_touched()
    }

    fn has_deletes(&self) -> bool {
        !self.doomed.borrow().is_empty()
    }

    fn moves_from(&self, at: Place) -> Result<Vec<Reference>> {
        let mut from = Vec::new();
        for entry in self.home.touched().iter().filter(|entry| !entry.is_doomed()) {
            let (base, value) = entry.versions(at)?;
            if !Rc::ptr_eq(&base, &value) {
                from.extend(T::moves(&base, &value).into_iter().filter_map(|moved| moved.from));
            }
        }
        Ok(from)
    }

    fn is_waiting(&self, key: &dyn Any) -> bool {
        if self.waiting() == 0 {
            return false;
        }
        // A foreign key to another column than the key may be one to any of them.
        let Some(id) = key.downcast_ref::<T::Id>() else { return true };
        let mut keys = self.waiting_keys.borrow_mut();
        let keys = keys.get_or_insert_with(|| self.queues.borrow().iter().flat_map(|queue| queue.keys()).collect());
        !keys.is_empty() && keys.contains(&alike(id))
    }

    fn hold_back(&self, key: &dyn Any) -> Known {
        let Some(id) = key.downcast_ref::<T::Id>() else { return Known::NoKey };
        let deletes = self.deletes.borrow();
        let places = deletes.places_of(key);
        if let Some(&first) = places.first() {
            places.iter().for_each(|&place| deletes.hold_back(place));
            return Known::Row {
                row: Rc::as_ptr(&deletes.rows[first].entry).cast(),
                references: places.iter().flat_map(|&place| deletes.references_of(place)).collect(),
                surely: places.iter().all(|&place| deletes.rows[place].entry.is_fresh()),
            };
        }
        let rows = self.rows.borrow();
        let Some(entry) = rows.get(id).filter(|entry| entry.is_fresh()) else { return Known::Nothing };
        let value = match entry.is_touched() {
            true => entry.versions(std::panic::Location::caller()).map(|(base, _)| base).ok(),
            false => entry.value.try_borrow().ok().and_then(|value| value.clone()),
        };
        match value {
            Some(value) => Known::Row { row: Rc::as_ptr(entry).cast(), references: value.references(), surely: true },
            None => Known::Nothing,
        }
    }

    fn hold_all_back(&self) {
        let deletes = self.deletes.borrow();
        (0..deletes.rows.len()).for_each(|place| deletes.hold_back(place));
    }

    fn release_held(&self) {
        self.deletes.borrow().release();
    }

    fn doomed_places(&self, late: Option<bool>) -> Vec<usize> {
        self.deletes.borrow().left(late)
    }

    fn places_of(&self, key: &dyn Any) -> Vec<usize> {
        self.deletes.borrow().places_of(key)
    }

    fn references_of(&self, doomed: usize) -> Vec<Reference> {
        self.deletes.borrow().references_of(doomed)
    }

    fn send_moves(
        &self,
        sender: &dyn Executor<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        waiting: &dyn Fn(&Reference) -> bool,
    ) -> Result<()> {
        super::writes::send_moves(self, sender, breaks_circle, waiting)
    }

    fn unlink(&self, doomed: usize, parents: &[TypeId], sender: &dyn Executor<C>) -> Result<bool> {
        super::writes::unlink(self, doomed, parents, sender)
    }

    fn deletes_at_once(&self, rows: usize) -> bool {
        rows <= T::DELETES
    }

    fn lock(&self, sender: &dyn Executor<C>, waiting: Depends<'_>) -> Result<()> {
        super::writes::lock(self, sender, waiting)
    }

    fn read_doubtful(&self, sender: &dyn Executor<C>) -> Result<()> {
        self.read_doubtful(sender)
    }

    fn verify(&self, sender: &dyn Executor<C>) -> Result<()> {
        let touched = self.home.touched();
        let is_compared = |entry: &&Rc<TrackedRow<T>>| !entry.is_doomed() || entry.may_be_rolled_back();
        for entry in touched.iter().filter(|entry| entry.is_unverified()).filter(is_compared) {
            if entry.phase() == Phase::Kept
                && let Some(id) = entry.id()
            {
                let mut rows = ask(sender, StatementKind::select::<T>(), |conn| self.find_newest(conn, &id))?;
                entry.verify(rows.pop(), sender.at())?;
            }
        }
        Ok(())
    }

    fn insert_ready(&self, waiting: Depends<'_>, sender: &dyn Executor<C>) -> Result<usize> {
        let queues = self.queues.borrow().clone();
        let mut inserted = 0;
        for queue in queues {
            inserted += queue.insert_ready(self, waiting, sender)?;
            // Rows of the next queue may have waited for these.
            self.waiting_keys.take();
        }
        Ok(inserted)
    }

    fn waits_for_insert(&self, key: &dyn Any) -> bool {
        key.is::<T::Id>() && self.is_waiting(key)
    }

    fn forget_deleted(&self) {
        self.forget_deleted();
    }

    fn update(&self, sender: &dyn Executor<C>, waiting: Depends<'_>) -> Result<()> {
        super::writes::update(self, sender, waiting)
    }

    fn delete(&self, doomed: &[usize], together: bool, sender: &dyn Executor<C>) -> Result<()> {
        super::writes::delete(self, doomed, together, sender)
    }

    fn unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>) {
        let mut note = |entry: &Rc<TrackedRow<T>>| changes.push(Change::new(kind, entry, changes.len() as u64));
        match kind {
            ChangeKind::Insert => {
                let queues = self.queues.borrow().clone();
                queues.iter().for_each(|queue| queue.entries().iter().for_each(&mut note))
            }
            ChangeKind::Update => {
                self.home
                    .touched()
                    .iter()
                    .filter(|entry| !entry.is_doomed() && entry.differences() != 0)
                    .for_each(&mut note);
            }
            ChangeKind::Delete => self.doomed().iter().for_each(&mut note),
        }
    }

    fn flushed(&self, changes: &mut Vec<Change>) {
        self.savepoint_log.tell(changes);
    }

    fn forget_unflushed(&self) {
        self.end_flush();
        self.forget_new_rows();
        self.forget_writes();
        self.forget_deletes();
    }

    fn forget_writes(&self) {
        self.home.touched().iter().for_each(|entry| self.untouch(entry));
    }

    fn keep_level(&self, level: u32) {
        self.lost_parents.set(self.lost_parents.get().map(|lost| lost.min(level.saturating_sub(1))));
        self.savepoint_log.keep_level(level);
    }

    fn roll_back_to(&self, level: u32) {
        self.forget_unflushed();
        self.lost_parents.set(self.lost_parents.get().filter(|lost| *lost < level));
        let undone = self.savepoint_log.take(level);
        for (kind, entry) in &undone {
            match (kind, entry.phase()) {
                (Some(ChangeKind::Insert), _) => {
                    entry.discard();
                    self.forget_row(entry);
                }
                (Some(ChangeKind::Update), Phase::Kept) => entry.set_phase(Phase::RolledBack),
                (Some(ChangeKind::Delete) | None, Phase::Deleted) => entry.set_phase(self.restore(entry)),
                _ => {}
            }
        }
        drop_each_catching_panics(undone);
        if level == 0 {
            self.sweep();
        }
    }

    fn undecided(&self, verdict: &Arc<Verdict>) {
        self.forget_unflushed();
        let notes = self.savepoint_log.take(0);
        let mut rolled_back: HashMap<*const TrackedRow<T>, Phase> = HashMap::with_capacity(notes.len());
        for (kind, entry) in &notes {
            let phase = rolled_back.entry(Rc::as_ptr(entry)).or_insert_with(|| entry.phase());
            *phase = match (kind, *phase) {
                (Some(ChangeKind::Insert), Phase::Kept | Phase::RolledBack | Phase::Deleted) => Phase::Discarded,
                (Some(ChangeKind::Update), Phase::Kept) => Phase::RolledBack,
                (Some(ChangeKind::Delete) | None, Phase::Deleted) => Phase::Kept,
                (_, phase) => phase,
            };
        }
        for (_, entry) in &notes {
            let Some(phase) = rolled_back.remove(&Rc::as_ptr(entry)) else { continue };
            if phase != entry.phase() {
                // The row of one that was deleted may be there, and then it is this entry's.
                let is_known =
                    entry.phase() != Phase::Deleted || phase == Phase::Discarded || self.restore(entry) == Phase::Kept;
                entry.doubt(verdict, if is_known { phase } else { Phase::Detached });
            }
        }
        drop_each_catching_panics(notes);
        self.sweep();
    }

    fn committed(&self) {
        self.lost_parents.set(None);
        self.savepoint_log.forget();
        self.sweep();
    }

    fn clear(&self) {
        self.forget_unflushed();
        self.savepoint_log.forget();
        // What a row owns may have a drop of the program's own.
        forget_each(self.rows.take());
        drop_each_catching_panics(self.queues.take());
        drop_each_catching_panics(self.aliases.take());
        drop_each_catching_panics(self.doubtful.take());
    }
}
