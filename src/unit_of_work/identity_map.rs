//! The identity map of one entity: one tracked row for each key, the pending inserts and the scheduled deletes.
//!
//! Code of the program runs in here: `Clone`, `Hash` and `Eq` of keys, `Drop` of rows. So a borrow of the map lasts for
//! one look-up only, a removed row is dropped after the borrow, and a flushed change is recorded in the savepoint log
//! before anything else.

use std::any::TypeId;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::rc::{Rc, Weak};

use diesel::result::QueryResult;
use foldhash::fast::RandomState;

use super::changes::ChangeKind;
use super::deletes::Deletes;
use super::entity::{Entity, Insert, Persist};
use super::entity_state::{EntityState, NumberedRows};
use super::executor::{Executor, SessionReader, StatementKind, execute, row_reader};
use super::key_comparison::{find_by_keys, is_exact};
use super::pending_inserts::{AnyPendingInserts, PendingInserts};
use super::relations::Relations;
use super::savepoint_log::SavepointLog;
use super::tracked_row::{Newest, RowPhase, TrackedRow};
use super::unit_state::UnitState;
use super::updates::not_unique;
use crate::error::{Error, Place, Result};
use crate::panic::{catch_panic, drop_catching_panic, drop_each_catching_panics};

pub(crate) struct IdentityMap<C, T: Entity> {
    pub(super) entity_state: Rc<EntityState<T>>,
    pub(super) rows: RefCell<HashMap<T::Id, Rc<TrackedRow<T>>, RandomState>>,
    /// One item for each type of new rows, in the order of their first use.
    pub(super) pending_inserts: RefCell<Vec<Rc<dyn AnyPendingInserts<C, T>>>>,
    /// The rows that the next flush deletes, in the order of `delete`.
    pub(super) scheduled_deletes: RefCell<NumberedRows<T>>,
    /// The deletes of the present flush.
    pub(super) deletes: RefCell<Deletes<T>>,
    pub(super) relations: OnceCell<Relations>,
    pub(super) ancestors: OnceCell<HashSet<TypeId>>,
    /// The lowest savepoint level at which this transaction has deleted rows of ancestors. None if it has deleted none.
    pub(super) ancestor_deleted_at: Cell<Option<u32>>,
    /// The stored keys by the spellings that the program has used instead.
    pub(super) aliases: RefCell<HashMap<T::Id, T::Id, RandomState>>,
    /// Maximum size of a statement in bytes, once the server was asked.
    pub(super) max_statement_bytes: Cell<Option<usize>>,
    /// Whether the role may lock rows, once the server was asked.
    pub(super) may_lock: Cell<Option<bool>>,
    /// Whether a plain SELECT may return an older row than a locking SELECT.
    pub(super) has_snapshot: bool,
    /// Expired rows that were read with a lock and then returned by a query without a lock. The query may have returned
    /// older values.
    pub(super) doubtful: RefCell<Vec<Rc<TrackedRow<T>>>>,
    /// A cache of the keys of the pending inserts during a flush.
    pub(super) pending_keys: RefCell<Option<HashSet<String>>>,
    pub(super) savepoint_log: SavepointLog<T>,
    /// The number of rows after the last sweep.
    pub(super) rows_after_sweep: Cell<usize>,
    pub(super) connection: PhantomData<fn(&mut C)>,
}

/// Every server accepts a statement of fewer bytes than this.
const SAFE_STATEMENT_BYTES: usize = 1 << 14;

/// Estimated number of bytes that a statement needs for a key, beside the key itself.
const BYTES_BESIDE_KEY: usize = 16;

/// Drops rows that were removed from the map. Keys and rows may have a `Drop` of the program.
pub(super) fn drop_rows<T: Entity>(removed: impl IntoIterator<Item = (T::Id, Rc<TrackedRow<T>>)>) {
    for (id, tracked) in removed {
        drop_catching_panic(id);
        drop_catching_panic(tracked);
    }
}

/// A map of fewer rows than this is not swept.
const SWEEP_THRESHOLD: usize = 1024;

impl<C: 'static, T: Persist<C>> IdentityMap<C, T> {
    pub(super) fn new(unit_state: &Rc<UnitState>, session: &Weak<dyn SessionReader<C>>) -> Self {
        Self {
            entity_state: Rc::new(EntityState::new(Rc::clone(unit_state), Some(row_reader::<C, T>(session)))),
            rows: RefCell::default(),
            pending_inserts: RefCell::default(),
            scheduled_deletes: RefCell::default(),
            deletes: RefCell::default(),
            relations: OnceCell::new(),
            ancestors: OnceCell::new(),
            ancestor_deleted_at: Cell::new(None),
            aliases: RefCell::default(),
            max_statement_bytes: Cell::new(None),
            may_lock: Cell::new(None),
            doubtful: RefCell::default(),
            has_snapshot: session.upgrade().is_some_and(|session| session.has_snapshot()),
            pending_keys: RefCell::default(),
            savepoint_log: SavepointLog::new(Rc::clone(unit_state)),
            rows_after_sweep: Cell::new(0),
            connection: PhantomData,
        }
    }

    pub(super) fn add<N: Insert<C, Entity = T>>(&self, new: N, at: Place) -> Rc<TrackedRow<T>> {
        let tracked = Rc::new(TrackedRow::pending(&self.entity_state));
        let mut pending_inserts = self.pending_inserts.borrow_mut();
        match pending_inserts.iter().find_map(|pending| pending.as_any().downcast_ref::<PendingInserts<N>>()) {
            Some(pending) => pending.push(new, &tracked),
            None => {
                let pending = PendingInserts::new();
                pending.push(new, &tracked);
                pending_inserts.push(Rc::new(pending));
            }
        }
        self.entity_state.unit_state.note_unflushed(at);
        tracked
    }

    /// The tracked row of a key, if its value is valid in the present transaction.
    #[inline]
    pub(super) fn fresh(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        let epoch = self.entity_state.epoch();
        let rows = self.rows.borrow();
        let is_fresh = |tracked: &&Rc<TrackedRow<T>>| tracked.is_fresh_at(epoch) && !tracked.is_delete_scheduled();
        match rows.get(id) {
            Some(tracked) => Some(tracked).filter(is_fresh).cloned(),
            None => rows.get(self.aliases.borrow().get(id)?).filter(is_fresh).cloned(),
        }
    }

    pub(super) fn get(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        self.rows.borrow().get(id).cloned()
    }

    /// The same, also for a spelling of the key other than the stored one.
    fn get_by_alias(&self, id: &T::Id) -> Option<Rc<TrackedRow<T>>> {
        let known = self.get(id);
        known.or_else(|| {
            let alias = self.aliases.borrow().get(id).cloned();
            alias.and_then(|id| self.get(&id))
        })
    }

    fn insert(&self, id: T::Id, tracked: &Rc<TrackedRow<T>>) -> Option<Rc<TrackedRow<T>>> {
        self.rows.borrow_mut().insert(id, Rc::clone(tracked))
    }

    /// Reads the row of a key.
    pub(super) fn fetch(&self, id: &T::Id, executor: &dyn Executor<C>) -> Result<Option<Rc<TrackedRow<T>>>> {
        let tracked = self.get_by_alias(id);
        match self.read(id, tracked.as_ref(), executor)? {
            Some((row, newest)) => Ok(Some(self.merge_as(id, row, newest))),
            None => {
                self.remove_missing(id);
                Ok(None)
            }
        }
    }

    /// Reads the row of a key from the database. A row that was read with a lock is read with a lock again, because a
    /// plain SELECT may return an older row.
    fn read(
        &self,
        id: &T::Id,
        tracked: Option<&Rc<TrackedRow<T>>>,
        executor: &dyn Executor<C>,
    ) -> Result<Option<(T, Newest)>> {
        let locked = self.has_snapshot && tracked.is_some_and(|tracked| tracked.is_locked());
        let newest = if locked { Newest::Locked } else { Newest::No };
        let mut rows = execute(executor, StatementKind::select::<T>(), |conn| match locked {
            true => self.find_newest(conn, id),
            false => T::find(conn, id),
        })?;
        if rows.len() > 1 {
            return Err(not_unique(&rows[0], "SELECT", rows.len(), executor.at()));
        }
        Ok(rows.pop().map(|row| (row, newest)))
    }

    /// The newest row of a key, even if the snapshot of the transaction is older.
    pub(super) fn find_newest(&self, conn: &mut C, id: &T::Id) -> QueryResult<Vec<T>> {
        if self.has_snapshot { T::find_newest(conn, id) } else { T::find(conn, id) }
    }

    /// The rows of these keys. One query reads all rows that are not valid in memory. The database compares the keys,
    /// so a row may have another spelling of its key.
    pub(super) fn get_many(&self, ids: &[T::Id], executor: &dyn Executor<C>) -> Result<Vec<Option<Rc<TrackedRow<T>>>>> {
        let mut found: Vec<Option<Rc<TrackedRow<T>>>> = ids.iter().map(|id| self.fresh(id)).collect();
        let mut positions: HashMap<&T::Id, usize> = HashMap::with_capacity(ids.len());
        let mut missing: Vec<T::Id> = Vec::new();
        for id in ids.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(id, _)| id) {
            positions.entry(id).or_insert_with(|| {
                missing.push(id.clone());
                missing.len() - 1
            });
        }
        if missing.is_empty() {
            return Ok(found);
        }
        let mut read: Vec<Option<Rc<TrackedRow<T>>>> = Vec::with_capacity(missing.len());
        let mut remaining = &missing[..];
        for length in self.chunk_lengths(&missing, T::MAX_FIND_KEYS, executor)? {
            let (ids, rest) = remaining.split_at(length);
            remaining = rest;
            let mut many = |ids: &[T::Id]| {
                let rows = execute(executor, StatementKind::select::<T>(), |conn| T::find_many(conn, ids))?;
                let mut seen = HashSet::with_capacity(rows.len());
                match rows.iter().find(|row| !seen.insert(row.id())) {
                    Some(twice) => Err(not_unique(twice, "SELECT", 2, executor.at())),
                    None => Ok(rows),
                }
            };
            let mut one = |id: &T::Id| Ok(self.read(id, None, executor)?.map(|(row, _)| row));
            let rows = find_by_keys(ids, &mut many, &mut one)?;
            for (id, row) in ids.iter().zip(rows) {
                let tracked = row.map(|row| self.merge_as(id, row, Newest::No));
                read.push(tracked.filter(|tracked| !tracked.is_delete_scheduled()));
            }
        }
        self.read_doubtful(executor)?;
        missing.iter().zip(&read).filter(|(_, row)| row.is_none()).for_each(|(id, _)| self.remove_missing(id));
        for (id, found) in ids.iter().zip(&mut found).filter(|(_, found)| found.is_none()) {
            found.clone_from(&read[positions[id]]);
        }
        Ok(found)
    }

    /// Merges a row that was read by the key `requested`.
    fn merge_as(&self, requested: &T::Id, row: T, newest: Newest) -> Rc<TrackedRow<T>> {
        let id = row.id();
        if id != *requested {
            self.aliases.borrow_mut().insert(requested.clone(), id);
        }
        self.merge(row, newest)
    }

    /// Merges a row that was read just now into the map, and returns its tracked row. A tracked row keeps its value,
    /// unless the value may be outdated or the query has returned the newest row.
    pub(super) fn merge(&self, row: T, newest: Newest) -> Rc<TrackedRow<T>> {
        let id = row.id();
        let tracked = match self.get(&id).filter(|tracked| tracked.phase().may_exist()) {
            Some(tracked) => {
                // The row may be older than the tracked one, because an earlier query has locked the row or may have
                // locked it.
                let may_be_older = self.has_snapshot && newest == Newest::No && tracked.may_be_locked();
                if newest == Newest::No && (tracked.is_fresh() || may_be_older && tracked.is_marked_dirty()) {
                    drop_catching_panic(row);
                } else if may_be_older && tracked.is_locked() && tracked.phase() == RowPhase::Persistent {
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
                let tracked = Rc::new(TrackedRow::persistent(&self.entity_state, row));
                drop_catching_panic(self.insert(id, &tracked));
                tracked
            }
        };
        tracked.note_newest(newest);
        tracked
    }

    /// Reads the doubtful rows again, with a lock.
    pub(super) fn read_doubtful(&self, executor: &dyn Executor<C>) -> Result<()> {
        for tracked in self.doubtful.take() {
            // The row is not locked any more if the transaction has ended after a failed query.
            let is_doubtful = tracked.is_locked() && !tracked.is_fresh() && !tracked.is_marked_dirty();
            if let Some(id) = tracked.id().filter(|_| is_doubtful) {
                self.fetch(&id, executor)?;
            }
        }
        Ok(())
    }

    pub(super) fn refresh(&self, tracked: &Rc<TrackedRow<T>>, executor: &dyn Executor<C>) -> Result<()> {
        let at = executor.at();
        self.check_owner(tracked, at)?;
        let id = match tracked.phase() {
            RowPhase::Persistent | RowPhase::RolledBack | RowPhase::Undecided => {
                tracked.id().ok_or_else(|| tracked.write_in_progress(at))?
            }
            _ => return Err(tracked.wrong_state("refreshed", at)),
        };
        match self.read(&id, Some(tracked), executor)? {
            Some((row, _)) => {
                self.revert(tracked);
                tracked.refresh(row);
                if self.get(&id).is_none_or(|known| !known.phase().may_exist()) {
                    drop_catching_panic(self.insert(id, tracked));
                }
                Ok(())
            }
            None => {
                self.revert(tracked);
                self.mark_missing(tracked);
                self.remove(tracked);
                Err(Error::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at })
            }
        }
    }

    /// Schedules the DELETE of a row. A pending insert is taken back.
    pub(super) fn schedule_delete(&self, tracked: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.check_owner(tracked, at)?;
        let is_uncertain =
            tracked.may_be_rolled_back() && tracked.phase() == RowPhase::Persistent && !tracked.is_fresh();
        if is_uncertain
            || tracked.was_read_before_attempt() && (T::VERSIONED || tracked.phase() == RowPhase::RolledBack)
        {
            tracked.read_before_use(at);
        }
        match tracked.phase() {
            RowPhase::Pending => {
                tracked.discard();
                let pending_inserts = self.pending_inserts.borrow().clone();
                pending_inserts.iter().for_each(|pending| pending.remove(tracked));
            }
            RowPhase::Persistent => {
                if !tracked.is_delete_scheduled() {
                    tracked.set_delete_scheduled(true);
                    self.scheduled_deletes.borrow_mut().insert(tracked.assign_list_number(), Rc::clone(tracked));
                }
                self.entity_state.unit_state.note_unflushed(at);
            }
            _ => return Err(tracked.wrong_state("deleted", at)),
        }
        Ok(())
    }

    pub(super) fn expire_one(&self, tracked: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.check_owner(tracked, at)?;
        if tracked.phase() != RowPhase::Persistent {
            return Err(tracked.wrong_state("expired", at));
        }
        self.revert(tracked);
        tracked.expire();
        Ok(())
    }

    pub(super) fn expunge(&self, tracked: &Rc<TrackedRow<T>>, at: Place) -> Result<()> {
        self.check_owner(tracked, at)?;
        match tracked.phase() {
            RowPhase::Pending => self.schedule_delete(tracked, at)?,
            RowPhase::Persistent | RowPhase::RolledBack | RowPhase::Undecided => {
                self.revert(tracked);
                if tracked.is_delete_scheduled() {
                    self.unschedule_delete(tracked);
                }
                tracked.set_phase(RowPhase::Detached);
                self.remove(tracked);
            }
            _ => return Err(tracked.wrong_state("expunged", at)),
        }
        Ok(())
    }

    fn check_owner(&self, tracked: &TrackedRow<T>, at: Place) -> Result<()> {
        if tracked.belongs_to(&self.entity_state) {
            return Ok(());
        }
        match tracked.phase() {
            RowPhase::Persistent | RowPhase::Pending | RowPhase::RolledBack | RowPhase::Undecided => {
                Err(Error::NotMine { entity: T::NAME, key: tracked.key_text(), at })
            }
            _ => Err(tracked.wrong_state("given to this session", at)),
        }
    }

    /// Restores the original values of a row that is marked dirty.
    pub(super) fn revert(&self, tracked: &Rc<TrackedRow<T>>) {
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
        if let Some(tracked) =
            self.get_by_alias(id).filter(|tracked| !tracked.is_marked_dirty() && !tracked.is_delete_scheduled())
        {
            self.mark_missing(&tracked);
            self.remove(&tracked);
        }
    }

    /// Marks a row that the database does not have any more.
    pub(super) fn mark_missing(&self, tracked: &Rc<TrackedRow<T>>) {
        match tracked.phase() {
            // Either the INSERT was not committed, or the row was deleted afterwards. A rollback changes neither.
            RowPhase::Undecided => tracked.set_phase(RowPhase::Deleted),
            RowPhase::Persistent | RowPhase::RolledBack => {
                self.savepoint_log.record_missing(tracked);
                tracked.set_phase(RowPhase::Deleted);
            }
            _ => {}
        }
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
    pub(super) fn restore(&self, tracked: &Rc<TrackedRow<T>>) -> RowPhase {
        let restore = || {
            let id = tracked.id()?;
            match self.get(&id) {
                Some(known) if known.phase().may_exist() => Some(Rc::ptr_eq(&known, tracked)),
                _ => {
                    drop_catching_panic(self.insert(id, tracked));
                    Some(true)
                }
            }
        };
        match catch_panic("`Clone`, `Hash` or `Eq` of a key", restore).flatten() {
            Some(true) => RowPhase::Persistent,
            _ => RowPhase::Detached,
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
        self.savepoint_log.record(ChangeKind::Insert, tracked);
        drop_catching_panic(self.insert(id, tracked));
        drop_catching_panic(known);
        tracked.inserted(row);
    }

    pub(super) fn deleted(&self, tracked: &Rc<TrackedRow<T>>) {
        self.savepoint_log.record(ChangeKind::Delete, tracked);
        tracked.set_phase(RowPhase::Deleted);
        self.remove(tracked);
    }

    /// Marks a row that a cascade has deleted.
    pub(super) fn mark_deleted_by_cascade(&self, tracked: &Rc<TrackedRow<T>>) {
        self.revert(tracked);
        self.mark_missing(tracked);
        self.remove(tracked);
    }

    pub(super) fn refers_to(&self, ancestor: TypeId) -> bool {
        let ancestors = self.ancestors.get_or_init(|| self.relations().ancestors(T::table()));
        ancestors.contains(&ancestor)
    }

    /// Whether the role may lock rows that it does not update. This needs the UPDATE privilege, which a role with the
    /// DELETE privilege may lack.
    pub(super) fn may_lock(&self, executor: &dyn Executor<C>) -> Result<bool> {
        if self.may_lock.get().is_none() {
            self.may_lock.set(Some(execute(executor, StatementKind::select::<T>(), |conn| T::may_lock(conn))?));
        }
        Ok(self.may_lock.get().unwrap_or(true))
    }

    /// Maximum size of a statement in bytes, for rows of `bytes` bytes. Small statements need no question to the
    /// server.
    pub(super) fn max_statement_bytes(&self, bytes: usize, executor: &dyn Executor<C>) -> Result<usize> {
        // Only MySQL and MariaDB have a limit, and they are the databases without RETURNING.
        if bytes < SAFE_STATEMENT_BYTES || executor.has_returning() {
            return Ok(usize::MAX);
        }
        if self.max_statement_bytes.get().is_none() {
            let most = execute(executor, StatementKind::select::<T>(), |conn| T::max_statement_bytes(conn))?;
            self.max_statement_bytes.set(Some(most.unwrap_or(usize::MAX)));
        }
        Ok(self.max_statement_bytes.get().unwrap_or(usize::MAX))
    }

    /// Splits these keys into chunks of at most `most` keys of which each fits into one statement. Returns the lengths
    /// of the chunks.
    pub(super) fn chunk_lengths(&self, ids: &[T::Id], most: usize, executor: &dyn Executor<C>) -> Result<Vec<usize>> {
        let most = most.max(1);
        let mut chunk_lengths: Vec<usize> = Vec::with_capacity(ids.len() / most + 1);
        if executor.has_returning() || is_exact::<T::Id>() {
            chunk_lengths.extend(ids.chunks(most).map(<[_]>::len));
            return Ok(chunk_lengths);
        }
        // The `Debug` text of a key estimates its size.
        let bytes: Vec<usize> = ids.iter().map(|id| format!("{id:?}").len() + BYTES_BESIDE_KEY).collect();
        let limit = self.max_statement_bytes(bytes.iter().sum(), executor)? / 4 * 3;
        let (mut length, mut taken) = (0, 0_usize);
        for bytes in bytes {
            if length == most || length > 0 && taken + bytes > limit {
                chunk_lengths.push(length);
                (length, taken) = (0, 0);
            }
            (length, taken) = (length + 1, taken + bytes);
        }
        chunk_lengths.extend((length > 0).then_some(length));
        Ok(chunk_lengths)
    }

    pub(super) fn relations(&self) -> &Relations {
        self.relations.get_or_init(Relations::of::<T>)
    }

    /// Whether a cascade of this transaction may have deleted the row.
    pub(super) fn may_be_deleted_by_cascade(&self, row: &T) -> bool {
        self.has_deleted_ancestors() && !row.references().is_empty()
    }

    pub(super) fn has_deleted_ancestors(&self) -> bool {
        self.ancestor_deleted_at.get().is_some()
    }

    pub(super) fn note_ancestor_deleted(&self) {
        let level = self.entity_state.unit_state.level();
        self.ancestor_deleted_at
            .set(Some(self.ancestor_deleted_at.get().map_or(level, |deleted_at| deleted_at.min(level))));
        self.entity_state.expire();
    }

    pub(super) fn discard_pending_inserts(&self) {
        let pending_inserts = self.pending_inserts.borrow().clone();
        for pending in pending_inserts {
            let tracked_rows = pending.clear();
            tracked_rows.iter().for_each(|tracked| tracked.discard());
            drop_each_catching_panics(tracked_rows);
        }
    }

    pub(super) fn unschedule_delete(&self, tracked: &Rc<TrackedRow<T>>) {
        let removed = self.scheduled_deletes.borrow_mut().remove(&tracked.list_number());
        drop_catching_panic(removed);
    }

    /// Removes the deletes that were sent from the scheduled deletes.
    pub(super) fn remove_sent_deletes(&self) {
        let (remaining, deleted): (NumberedRows<T>, NumberedRows<T>) =
            self.scheduled_deletes.take().into_iter().partition(|(_, tracked)| tracked.phase() == RowPhase::Persistent);
        self.scheduled_deletes.borrow_mut().extend(remaining);
        drop_each_catching_panics(deleted.into_values());
        let dirty_rows = self.entity_state.dirty_rows();
        dirty_rows
            .iter()
            .filter(|tracked| tracked.phase() != RowPhase::Persistent)
            .for_each(|tracked| self.revert(tracked));
    }

    pub(super) fn unschedule_deletes(&self) {
        let scheduled = self.scheduled_deletes.take();
        scheduled.values().for_each(|tracked| tracked.set_delete_scheduled(false));
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
