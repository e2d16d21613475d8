//! The identity map of one entity: one tracked row for each key, the pending inserts and the scheduled deletes.
//!
//! Code of the program runs in here: `Clone`, `Hash` and `Eq` of keys, `Drop` of rows. So a borrow of the map lasts for
//! one look-up only, a removed row is dropped after the borrow, and a flushed change is recorded in the savepoint log
//! before anything else.

use std::any::TypeId;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::{Rc, Weak};

use diesel::result::QueryResult;
use foldhash::fast::RandomState;

use super::any_identity_map::AnyIdentityMap;
use super::changes::ChangeKind;
use super::deletes::{AnyDeletes, Deletes};
use super::entity::{Entity, Insert, Persist};
use super::entity_state::{EntityState, NumberedRows};
use super::executor::{Executor, StatementKind, execute, row_reader};
use super::key_comparison::{find_by_keys, is_exact};
use super::pending_inserts::{PendingInsert, fitting};
use super::savepoint_log::SavepointLog;
use super::tracked::Tracked;
use super::tracked_row::{Newest, TrackedRow};
use super::unit_state::UnitState;
use super::updates::{AnyUpdates, not_unique};
use crate::error::{Details, Result, RowState, SourceLocation, Undo};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct IdentityMap<C, T: Entity> {
    pub(super) entity_state: Rc<EntityState<T>>,
    session: Weak<dyn Executor<C>>,
    /// MySQL and MariaDB have no `RETURNING`, and a plain SELECT may return an older row than a locking SELECT.
    pub(super) is_mysql: bool,
    pub(super) rows: RefCell<HashMap<T::Id, Rc<TrackedRow<T>>, RandomState>>,
    /// The stored keys by the spellings that the program has used instead.
    pub(super) aliases: RefCell<HashMap<T::Id, T::Id, RandomState>>,
    /// The new rows in the order of `add`.
    pub(super) pending_inserts: RefCell<BTreeMap<u64, PendingInsert<C, T>>>,
    /// A cache of the keys of the pending inserts during a flush.
    pub(super) pending_keys: RefCell<Option<HashSet<String>>>,
    /// The rows that the next flush deletes, in the order of `delete`.
    pub(super) scheduled_deletes: RefCell<NumberedRows<T>>,
    /// The deletes of the present flush.
    pub(super) deletes: RefCell<Deletes<T>>,
    pub(super) ancestors: OnceCell<HashSet<TypeId>>,
    /// The lowest savepoint level at which this transaction has deleted rows of ancestors. None if it has deleted none.
    pub(super) ancestor_deleted_at: Cell<Option<u32>>,
    /// Maximum size of a statement in bytes, once the server was asked.
    max_statement_bytes: Cell<Option<usize>>,
    /// Whether the role may lock rows, once the server was asked.
    pub(super) may_lock: Cell<Option<bool>>,
    /// Expired rows that were read with a lock and then returned by a query without a lock. The query may have returned
    /// older values.
    pub(super) doubtful: RefCell<Vec<Rc<TrackedRow<T>>>>,
    pub(super) savepoint_log: SavepointLog<T>,
    /// The number of rows after the last sweep.
    rows_after_sweep: Cell<usize>,
}

/// Every server accepts a statement of fewer bytes than this.
const SAFE_STATEMENT_BYTES: usize = 1 << 14;

/// Estimated number of bytes that a statement needs for a key, beside the key itself.
const BYTES_BESIDE_KEY: usize = 16;

/// A map of fewer rows than this is not swept.
const SWEEP_THRESHOLD: usize = 1024;

/// Drops rows that were removed from the map. Keys and rows may have a `Drop` of the program.
pub(super) fn drop_rows<T: Entity>(removed: impl IntoIterator<Item = (T::Id, Rc<TrackedRow<T>>)>) {
    for (id, tracked) in removed {
        drop_catching_panic(id);
        drop_catching_panic(tracked);
    }
}

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    pub(super) fn new(unit_state: &Rc<UnitState>, session: &Weak<dyn Executor<C>>, is_mysql: bool) -> Self {
        let row_reader = row_reader::<C, T>(session, is_mysql);
        Self {
            entity_state: Rc::new(EntityState::new(unit_state, row_reader)),
            session: Weak::clone(session),
            is_mysql,
            rows: RefCell::default(),
            aliases: RefCell::default(),
            pending_inserts: RefCell::default(),
            pending_keys: RefCell::default(),
            scheduled_deletes: RefCell::default(),
            deletes: RefCell::default(),
            ancestors: OnceCell::new(),
            ancestor_deleted_at: Cell::new(None),
            max_statement_bytes: Cell::new(None),
            may_lock: Cell::new(None),
            doubtful: RefCell::default(),
            savepoint_log: SavepointLog::default(),
            rows_after_sweep: Cell::new(0),
        }
    }

    pub(super) fn unit_state(&self) -> &UnitState {
        &self.entity_state.unit_state
    }

    /// Sends one statement and returns its result.
    pub(super) fn execute<R>(
        &self,
        kind: StatementKind,
        at: SourceLocation,
        run: impl FnMut(&mut C) -> QueryResult<R>,
    ) -> Result<R> {
        let session = self.session.upgrade().expect("a session that sends a statement exists");
        execute(&*session, kind, at, run)
    }

    /// Sends a SELECT of the entity's columns.
    pub(super) fn select<R>(&self, at: SourceLocation, run: impl FnMut(&mut C) -> QueryResult<R>) -> Result<R> {
        self.execute(StatementKind::select::<T>(), at, run)
    }

    /// Sends a statement that may change rows.
    pub(super) fn change<R>(&self, at: SourceLocation, run: impl FnMut(&mut C) -> QueryResult<R>) -> Result<R> {
        self.execute(StatementKind::Change, at, run)
    }

    pub(crate) fn add<N: Insert<C, Entity = T>>(&self, new: N, at: SourceLocation) -> Tracked<T> {
        let tracked = Rc::new(TrackedRow::new(&self.entity_state, None));
        let insert = (Rc::new(new) as _, Rc::clone(&tracked));
        self.pending_inserts.borrow_mut().insert(tracked.assign_list_number(), insert);
        self.unit_state().note_unflushed(at);
        Tracked(tracked)
    }

    /// The tracked row of a key, if its value is valid in the present transaction.
    #[inline]
    pub(crate) fn fresh(&self, id: &T::Id) -> Option<Tracked<T>> {
        let epoch = self.entity_state.epoch();
        let rows = self.rows.borrow();
        let known = match rows.get(id) {
            Some(tracked) => tracked,
            None => rows.get(self.aliases.borrow().get(id)?)?,
        };
        (known.is_fresh_at(epoch) && !known.delete_scheduled.get()).then(|| Tracked(Rc::clone(known)))
    }

    pub(super) fn get(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        self.rows.borrow().get(id).cloned()
    }

    /// The same, also for a spelling of the key other than the stored one.
    fn get_by_alias(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        self.get(id).or_else(|| {
            let alias = self.aliases.borrow().get(id).cloned();
            self.get(&alias?)
        })
    }

    fn insert(&self, id: T::Id, tracked: &Rc<TrackedRow<T>>) {
        let replaced = self.rows.borrow_mut().insert(id, Rc::clone(tracked));
        drop_catching_panic(replaced);
    }

    /// Reads the row of a key.
    pub(crate) fn fetch(&self, id: &T::Id, at: SourceLocation) -> Result<Option<Tracked<T>>> {
        let tracked = self.get_by_alias(id);
        match self.read(id, tracked.as_ref(), at)? {
            Some((row, newest)) => Ok(Some(self.merge_as(id, row, newest))),
            None => {
                self.remove_missing(id);
                Ok(None)
            }
        }
    }

    /// Reads the row of a key from the database. A row that was read with a lock is read with a lock again, because a
    /// plain SELECT may return an older row.
    fn read(&self, id: &T::Id, tracked: Option<&Rc<TrackedRow<T>>>, at: SourceLocation) -> Result<Option<(T, Newest)>> {
        let is_locked = self.is_mysql && tracked.is_some_and(|tracked| tracked.is_locked());
        let find = if is_locked { T::find_newest } else { T::find };
        let mut rows = self.select(at, |conn| find(conn, id))?;
        if rows.len() > 1 {
            return Err(not_unique::<T>(format!("{:?}", rows[0].id()), "SELECT", rows.len(), at));
        }
        let newest = if is_locked { Newest::Locked } else { Newest::No };
        Ok(rows.pop().map(|row| (row, newest)))
    }

    /// The rows of these keys. One query reads all rows that are not valid in memory. The database compares the keys,
    /// so a row may have another spelling of its key.
    pub(crate) fn get_many(&self, ids: &[T::Id], at: SourceLocation) -> Result<Vec<Option<Tracked<T>>>> {
        let mut found: Vec<Option<Tracked<T>>> = ids.iter().map(|id| self.fresh(id)).collect();
        let mut read: HashMap<&T::Id, Option<Tracked<T>>> = HashMap::new();
        let mut missing: Vec<T::Id> = Vec::new();
        for (id, _) in ids.iter().zip(&found).filter(|(_, found)| found.is_none()) {
            if read.insert(id, None).is_none() {
                missing.push(id.clone());
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        let mut remaining = &missing[..];
        for length in self.chunk_lengths(&missing, T::MAX_FIND_KEYS, at)? {
            let (chunk, rest) = remaining.split_at(length);
            remaining = rest;
            let rows = find_by_keys(chunk, |ids| {
                let rows = self.select(at, |conn| T::find_many(conn, ids))?;
                let mut seen = HashSet::with_capacity(rows.len());
                let twice = rows.iter().map(T::id).find(|id| !seen.insert(id.clone()));
                match twice.or_else(|| rows.get(ids.len()).map(T::id)) {
                    Some(id) => Err(not_unique::<T>(format!("{id:?}"), "SELECT", 2, at)),
                    None => Ok(rows),
                }
            })?;
            for (id, row) in chunk.iter().zip(rows) {
                let tracked = row.map(|row| self.merge_as(id, row, Newest::No));
                if let Some(read) = read.get_mut(id) {
                    *read = tracked.filter(|tracked| !tracked.0.delete_scheduled.get());
                }
            }
        }
        self.read_doubtful(at)?;
        missing.iter().filter(|id| read[id].is_none()).for_each(|id| self.remove_missing(id));
        for (id, found) in ids.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
            found.clone_from(&read[id]);
        }
        Ok(found)
    }

    /// Merges a row that was read by the key `requested`.
    fn merge_as(&self, requested: &T::Id, row: T, newest: Newest) -> Tracked<T> {
        let id = row.id();
        if id != *requested {
            self.aliases.borrow_mut().insert(requested.clone(), id);
        }
        self.merge(row, newest)
    }

    /// Merges a row that was read just now into the map, and returns its tracked row. A tracked row keeps its value,
    /// unless the value may be outdated or the query has returned the newest row.
    pub(super) fn merge(&self, row: T, newest: Newest) -> Tracked<T> {
        let id = row.id();
        let tracked = match self.get(&id).filter(|tracked| tracked.may_exist()) {
            Some(tracked) => {
                // The row may be older than the tracked one, because an earlier query has locked the row or may have
                // locked it.
                let may_be_older = self.is_mysql && newest == Newest::No && tracked.may_be_locked();
                if newest == Newest::No && (tracked.is_fresh() || may_be_older && tracked.is_marked_dirty()) {
                    drop_catching_panic(row);
                } else if may_be_older && tracked.is_locked() && tracked.phase() == RowState::Persistent {
                    self.doubtful.borrow_mut().push(Rc::clone(&tracked));
                    drop_catching_panic(row);
                } else {
                    tracked.merge(row);
                    if may_be_older {
                        tracked.expire();
                    }
                }
                tracked
            }
            None => {
                let tracked = Rc::new(TrackedRow::new(&self.entity_state, Some(row)));
                self.insert(id, &tracked);
                tracked
            }
        };
        tracked.note_newest(newest);
        Tracked(tracked)
    }

    pub(crate) fn refresh(&self, tracked: &Rc<TrackedRow<T>>, at: SourceLocation) -> Result<()> {
        self.check_owner(tracked, at)?;
        if !tracked.may_exist() {
            return Err(tracked.wrong_state("refreshed", at));
        }
        let id = tracked.id().ok_or_else(|| tracked.write_in_progress(at))?;
        let read = self.read(&id, Some(tracked), at)?;
        self.revert(tracked);
        match read {
            Some((row, _)) => {
                tracked.refresh(row);
                if self.get(&id).is_none_or(|known| !known.may_exist()) {
                    self.insert(id, tracked);
                }
                Ok(())
            }
            None => {
                self.mark_missing(tracked);
                Err(Details::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at }.into())
            }
        }
    }

    /// Schedules the DELETE of a row. A pending insert is taken back.
    pub(crate) fn schedule_delete(&self, tracked: &Rc<TrackedRow<T>>, at: SourceLocation) -> Result<()> {
        self.check_owner(tracked, at)?;
        let is_uncertain =
            tracked.may_be_rolled_back() && tracked.phase() == RowState::Persistent && !tracked.is_fresh();
        if is_uncertain
            || tracked.was_read_before_attempt() && (T::VERSIONED || tracked.phase() == RowState::RolledBack)
        {
            tracked.read_before_use(at);
        }
        match tracked.phase() {
            RowState::Pending => {
                tracked.discard();
                self.remove_pending(tracked);
            }
            RowState::Persistent => {
                if !tracked.delete_scheduled.replace(true) {
                    self.scheduled_deletes.borrow_mut().insert(tracked.assign_list_number(), Rc::clone(tracked));
                }
                self.unit_state().note_unflushed(at);
            }
            _ => return Err(tracked.wrong_state("deleted", at)),
        }
        Ok(())
    }

    pub(crate) fn expire_one(&self, tracked: &Rc<TrackedRow<T>>, at: SourceLocation) -> Result<()> {
        self.check_owner(tracked, at)?;
        if tracked.phase() != RowState::Persistent {
            return Err(tracked.wrong_state("expired", at));
        }
        self.revert(tracked);
        tracked.expire();
        Ok(())
    }

    pub(crate) fn expunge(&self, tracked: &Rc<TrackedRow<T>>, at: SourceLocation) -> Result<()> {
        self.check_owner(tracked, at)?;
        match tracked.phase() {
            RowState::Pending => self.schedule_delete(tracked, at)?,
            _ if tracked.may_exist() => {
                self.revert(tracked);
                if tracked.delete_scheduled.get() {
                    self.unschedule_delete(tracked);
                }
                tracked.set_phase(RowState::Detached);
                self.remove(tracked);
            }
            _ => return Err(tracked.wrong_state("expunged", at)),
        }
        Ok(())
    }

    fn check_owner(&self, tracked: &TrackedRow<T>, at: SourceLocation) -> Result<()> {
        if Rc::ptr_eq(&tracked.entity_state, &self.entity_state) {
            Ok(())
        } else if tracked.may_exist() || tracked.phase() == RowState::Pending {
            Err(Details::ForeignHandle { entity: T::NAME, key: tracked.key_text(), at }.into())
        } else {
            Err(tracked.wrong_state("given to this session", at))
        }
    }

    /// Restores the original values of a row that is marked dirty.
    pub(super) fn revert(&self, tracked: &TrackedRow<T>) {
        if tracked.is_marked_dirty() {
            tracked.revert();
            self.entity_state.unmark_dirty(tracked);
        }
    }

    pub(super) fn scheduled_deletes(&self) -> Vec<Rc<TrackedRow<T>>> {
        self.scheduled_deletes.borrow().values().cloned().collect()
    }

    /// Removes the row of a key that the database does not have any more.
    fn remove_missing(&self, id: &T::Id) {
        // A row that is dirty or scheduled for a delete stays, so that its flush reports the missing row.
        let stays = |tracked: &Rc<TrackedRow<T>>| tracked.is_marked_dirty() || tracked.delete_scheduled.get();
        if let Some(tracked) = self.get_by_alias(id).filter(|tracked| !stays(tracked)) {
            self.mark_missing(&tracked);
        }
    }

    /// Removes a row that the database does not have any more.
    pub(super) fn mark_missing(&self, tracked: &Rc<TrackedRow<T>>) {
        match tracked.phase() {
            // Either the INSERT was not committed, or the row was deleted afterwards. A rollback changes neither.
            RowState::Undecided => tracked.set_phase(RowState::Deleted),
            RowState::Persistent | RowState::RolledBack => {
                self.savepoint_log.record(None, tracked);
                tracked.set_phase(RowState::Deleted);
            }
            _ => {}
        }
        self.remove(tracked);
    }

    /// Removes a tracked row from the map, if the map has it under its key.
    pub(super) fn remove(&self, tracked: &Rc<TrackedRow<T>>) {
        let find_by_keys = || {
            // There is no key while a write guard of the row is alive.
            let id = tracked.id()?;
            let is_mapped = self.rows.borrow().get(&id).is_some_and(|known| Rc::ptr_eq(known, tracked));
            Some(if is_mapped { self.rows.borrow_mut().remove_entry(&id) } else { None })
        };
        match catch_panic("`Clone`, `Hash` or `Eq` of a key", find_by_keys).flatten() {
            Some(removed) => drop_rows(removed),
            None => self.remove_where(|known| Rc::ptr_eq(known, tracked)),
        }
    }

    /// Removes all rows that match, without a comparison of keys.
    fn remove_where(&self, which: impl Fn(&Rc<TrackedRow<T>>) -> bool) {
        let removed: Vec<_> = self.rows.borrow_mut().extract_if(|_, tracked| which(tracked)).collect();
        drop_rows(removed);
    }

    /// Puts a row that exists again after a rollback back into the map. If the key was read again meanwhile, another
    /// tracked row represents it, and this one is detached.
    pub(super) fn restore(&self, tracked: &Rc<TrackedRow<T>>) -> RowState {
        let restore = || {
            let id = tracked.id()?;
            match self.get(&id) {
                Some(known) if known.may_exist() => Some(Rc::ptr_eq(&known, tracked)),
                _ => {
                    self.insert(id, tracked);
                    Some(true)
                }
            }
        };
        match catch_panic("`Clone`, `Hash` or `Eq` of a key", restore).flatten() {
            Some(true) => RowState::Persistent,
            _ => RowState::Detached,
        }
    }

    /// Reserves capacity for rows that will be inserted.
    pub(super) fn reserve(&self, rows: usize) {
        self.rows.borrow_mut().reserve(rows);
        self.savepoint_log.reserve(rows);
    }

    pub(super) fn inserted(&self, tracked: &Rc<TrackedRow<T>>, row: T) {
        let id = row.id();
        // A rollback undoes the records in reverse order, so the end of the known row is recorded before the INSERT.
        let known = self.get(&id).filter(|known| !Rc::ptr_eq(known, tracked));
        if let Some(known) = &known {
            self.revert(known);
            match known.may_be_new() {
                // The key was free, so the INSERT of the known row was not committed.
                true => known.discard(),
                false => self.mark_missing(known),
            }
        }
        self.savepoint_log.record(Some(ChangeKind::Insert), tracked);
        self.insert(id, tracked);
        drop_catching_panic(known);
        tracked.inserted(row);
    }

    pub(super) fn deleted(&self, tracked: &Rc<TrackedRow<T>>) {
        self.savepoint_log.record(Some(ChangeKind::Delete), tracked);
        tracked.set_phase(RowState::Deleted);
        self.remove(tracked);
    }

    /// Marks a row that a cascade has deleted.
    pub(super) fn mark_deleted_by_cascade(&self, tracked: &Rc<TrackedRow<T>>) {
        self.revert(tracked);
        self.mark_missing(tracked);
    }

    /// Maximum size of a statement in bytes, for rows of `total` bytes. Small statements need no question to the server.
    /// Only MySQL and MariaDB have a limit. An error if the first row alone exceeds it.
    pub(super) fn statement_limit(
        &self,
        total: usize,
        first: usize,
        key: impl FnOnce() -> Option<String>,
        at: SourceLocation,
    ) -> Result<usize> {
        if total < SAFE_STATEMENT_BYTES || !self.is_mysql {
            return Ok(usize::MAX);
        }
        let limit = match self.max_statement_bytes.get() {
            Some(limit) => limit,
            None => self.select(at, |conn| T::max_statement_bytes(conn))?.unwrap_or(usize::MAX),
        };
        self.max_statement_bytes.set(Some(limit));
        if first > limit {
            let (key, undo) = (key(), Undo::default());
            return Err(Details::RowTooLarge { entity: T::NAME, key, bytes: first, limit, at, undo }.into());
        }
        Ok(limit)
    }

    /// Splits these keys into chunks of at most `most` keys of which each fits into one statement. Returns the lengths
    /// of the chunks.
    pub(super) fn chunk_lengths(&self, ids: &[T::Id], most: usize, at: SourceLocation) -> Result<Vec<usize>> {
        let chunks = ids.chunks(most.max(1));
        if !self.is_mysql || is_exact::<T::Id>() {
            return Ok(chunks.map(<[_]>::len).collect());
        }
        let mut lengths = Vec::new();
        for chunk in chunks {
            // The `Debug` text of a key estimates its size.
            let bytes: Vec<usize> = chunk.iter().map(|id| format!("{id:?}").len() + BYTES_BESIDE_KEY).collect();
            let limit = self.statement_limit(bytes.iter().sum(), 0, || None, at)?;
            let mut remaining = &bytes[..];
            while !remaining.is_empty() {
                lengths.push(fitting(remaining, limit));
                remaining = &remaining[lengths[lengths.len() - 1]..];
            }
        }
        Ok(lengths)
    }

    /// Whether a cascade of this transaction may have deleted the row.
    pub(super) fn may_be_deleted_by_cascade(&self, row: &T) -> bool {
        self.has_deleted_ancestors() && !row.references().is_empty()
    }

    pub(super) fn has_deleted_ancestors(&self) -> bool {
        self.ancestor_deleted_at.get().is_some()
    }

    pub(super) fn unschedule_delete(&self, tracked: &TrackedRow<T>) {
        let removed = self.scheduled_deletes.borrow_mut().remove(&tracked.list_number.get());
        drop_catching_panic(removed);
    }

    /// Takes back all changes that are not flushed.
    pub(super) fn discard_unflushed(&self) {
        self.end_flush();
        self.discard_pending_inserts();
        self.revert_writes();
        let scheduled = self.scheduled_deletes.take();
        scheduled.values().for_each(|tracked| tracked.delete_scheduled.set(false));
        drop_each_catching_panics(scheduled.into_values());
    }

    /// Drops the rows without a handle, if the map has at least doubled since the last sweep. The end of the
    /// transaction, which precedes a sweep, expires them anyway.
    pub(super) fn sweep(&self) {
        let rows = self.rows.borrow().len();
        if rows >= SWEEP_THRESHOLD.max(self.rows_after_sweep.get() * 2) {
            self.remove_where(|tracked| Rc::strong_count(tracked) == 1);
            self.rows_after_sweep.set(self.rows.borrow().len());
            let rows = self.rows.borrow();
            let removed: Vec<_> = self.aliases.borrow_mut().extract_if(|_, id| !rows.contains_key(id)).collect();
            drop(rows);
            drop_each_catching_panics(removed);
        }
    }
}
