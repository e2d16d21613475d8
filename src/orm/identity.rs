//! The identity map of one entity: one entry a key, and what is to become of it.

use std::any::{Any, TypeId};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet};
use std::marker::PhantomData;
use std::rc::Rc;

use foldhash::fast::RandomState;

use super::agenda::Agenda;
use super::changes::{Change, ChangeKind};
use super::derived::by_key;
use super::entity::{Entity, Insert, Persist};
use super::entry::{Entry, Home, Phase};
use super::history::History;
use super::queue::{DynQueue, Queue};
use super::relation::{Reference, Relations, alike};
use super::sender::{Sender, Sending, ask};
use super::writes::{Deletes, Depends, not_unique};
use crate::error::{Error, Place, Result};

pub(crate) struct Store<C, T: Entity> {
    pub(super) home: Rc<Home<T>>,
    rows: RefCell<HashMap<T::Id, Rc<Entry<T>>, RandomState>>,
    /// One for each type of new rows, in the order of their first use.
    queues: RefCell<Vec<Rc<dyn DynQueue<C, T>>>>,
    /// To be deleted, in the order of `delete`.
    pub(super) doomed: RefCell<Vec<Rc<Entry<T>>>>,
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
    /// Keys of new rows, while a flush asks for them.
    waiting_keys: RefCell<Option<HashSet<String>>>,
    pub(super) history: History<T>,
    /// How many rows were left when those that nobody holds went last.
    swept: Cell<usize>,
    of: PhantomData<fn(&mut C)>,
}

/// Fewer bytes than this fit into a statement of any server.
const ASKED_FROM: usize = 1 << 14;

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
pub(crate) trait DynStore<C> {
    fn as_any(&self) -> &dyn Any;
    fn name(&self) -> &'static str;
    /// The foreign keys of the entity and of its ancestors.
    fn relations(&self) -> &Relations;
    /// Whether rows refer, directly or by others, to rows of that type.
    fn refers_to(&self, ancestor: TypeId) -> bool;
    /// Rows of an ancestor have been deleted, and with them perhaps rows of this type.
    fn lose_parents(&self);
    fn begin_flush(&self, at: Place) -> Result<()>;
    fn end_flush(&self);
    /// An error where something could not be flushed as it is; nothing has been sent.
    fn check(&self, at: Place) -> Result<()>;
    /// New rows.
    fn waiting(&self) -> usize;
    fn unresolved(&self, at: Place) -> Error;
    /// Whether a flush would send something.
    fn is_dirty(&self) -> bool;
    fn has_updates(&self) -> bool;
    fn has_deletes(&self) -> bool;
    /// What rows that are updated referred to and do not refer to any more.
    fn moves_from(&self, at: Place) -> Result<Vec<Reference>>;
    /// Whether the row of that key waits for its INSERT.
    fn is_waiting(&self, key: &dyn Any) -> bool;
    /// Holds back the DELETE of the row of that key.
    fn hold_back(&self, key: &dyn Any) -> Known;
    fn hold_all_back(&self);
    /// The places of rows to be deleted: the late ones, the early ones or all.
    fn doomed(&self, late: Option<bool>) -> Vec<usize>;
    fn places_of(&self, key: &dyn Any) -> Vec<usize>;
    fn references_of(&self, doomed: usize) -> Vec<Reference>;
    fn send_moves(
        &self,
        sender: &dyn Sender<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        waiting: &dyn Fn(&Reference) -> bool,
    ) -> Result<()>;
    fn unlink(&self, doomed: usize, parents: &[TypeId], sender: &dyn Sender<C>) -> Result<bool>;
    /// Whether so many rows can be deleted by one statement.
    fn deletes_at_once(&self, rows: usize) -> bool;
    fn lock(&self, sender: &dyn Sender<C>, waiting: Depends<'_>) -> Result<()>;
    fn insert_ready(&self, sender: &dyn Sender<C>) -> Result<usize>;
    fn update(&self, sender: &dyn Sender<C>, waiting: Depends<'_>) -> Result<()>;
    fn delete(&self, doomed: &[usize], together: bool, sender: &dyn Sender<C>) -> Result<()>;
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
    fn committed(&self);
    /// Lets go of all rows.
    fn clear(&self);
}

impl<C: 'static, T: Persist<C>> Store<C, T> {
    pub(super) fn new(agenda: &Rc<Agenda>) -> Self {
        Self {
            home: Rc::new(Home::new(Rc::clone(agenda))),
            rows: RefCell::default(),
            queues: RefCell::default(),
            doomed: RefCell::default(),
            deletes: RefCell::default(),
            relations: OnceCell::new(),
            ancestors: OnceCell::new(),
            lost_parents: Cell::new(None),
            aliases: RefCell::default(),
            most_bytes: Cell::new(None),
            waiting_keys: RefCell::default(),
            history: History::new(Rc::clone(agenda)),
            swept: Cell::new(0),
            of: PhantomData,
        }
    }

    pub(super) fn add<N: Insert<C, Entity = T>>(&self, new: N, at: Place) -> Rc<Entry<T>> {
        let entry = Rc::new(Entry::pending(&self.home));
        let mut queues = self.queues.borrow_mut();
        match queues.iter().find_map(|queue| queue.as_any().downcast_ref::<Queue<N>>()) {
            Some(queue) => queue.push(new, &entry),
            None => {
                let queue = Queue::new();
                queue.push(new, &entry);
                queues.push(Rc::new(queue));
            }
        }
        self.home.agenda.note_change(at);
        entry
    }

    /// The entry of a key that need not be read again.
    #[inline]
    pub(super) fn fresh(&self, id: &T::Id) -> Option<Rc<Entry<T>>> {
        let epoch = self.home.epoch();
        let rows = self.rows.borrow();
        let is_fresh = |entry: &&Rc<Entry<T>>| entry.is_fresh_at(epoch) && !entry.is_doomed();
        match rows.get(id) {
            Some(entry) => Some(entry).filter(is_fresh).cloned(),
            None => rows.get(self.aliases.borrow().get(id)?).filter(is_fresh).cloned(),
        }
    }

    /// The row of a key, read now.
    pub(super) fn fetch(&self, id: &T::Id, sender: &dyn Sender<C>) -> Result<Option<Rc<Entry<T>>>> {
        match self.ask_for(id, sender)? {
            Some(row) => Ok(Some(self.absorb_as(id, row))),
            None => {
                self.vanished(id);
                Ok(None)
            }
        }
    }

    /// The row that the database finds for a key.
    fn ask_for(&self, id: &T::Id, sender: &dyn Sender<C>) -> Result<Option<T>> {
        let mut rows = ask(sender, Sending::select::<T>(), |conn| T::find(conn, id))?;
        if rows.len() > 1 {
            return Err(not_unique(&rows[0], "SELECT", rows.len(), sender.at()));
        }
        Ok(rows.pop())
    }

    /// The rows of these keys, with one query for those that would have to be read one by one. What a key is equal to is for the
    /// database to say: rows that it finds under another spelling count.
    pub(super) fn get_many(&self, ids: &[T::Id], sender: &dyn Sender<C>) -> Result<Vec<Option<Rc<Entry<T>>>>> {
        let mut found: Vec<Option<Rc<Entry<T>>>> = ids.iter().map(|id| self.fresh(id)).collect();
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
        let mut read: Vec<Option<Rc<Entry<T>>>> = Vec::with_capacity(missing.len());
        for ids in missing.chunks(T::FINDS.max(1)) {
            let mut many = |ids: &[T::Id]| {
                let rows = ask(sender, Sending::select::<T>(), |conn| T::find_many(conn, ids))?;
                let mut seen = HashSet::with_capacity(rows.len());
                match rows.iter().find(|row| !seen.insert(row.id())) {
                    Some(twice) => Err(not_unique(twice, "SELECT", 2, sender.at())),
                    None => Ok(rows),
                }
            };
            let rows = by_key(ids, &mut many, &mut |id| self.ask_for(id, sender))?;
            for (id, row) in ids.iter().zip(rows) {
                read.push(row.map(|row| self.absorb_as(id, row)));
            }
        }
        missing.iter().zip(&read).filter(|(_, row)| row.is_none()).for_each(|(id, _)| self.vanished(id));
        for (id, place) in ids.iter().zip(&mut found).filter(|(_, place)| place.is_none()) {
            place.clone_from(&read[asked[id]]);
        }
        Ok(found)
    }

    /// The entry of a row that was asked for by a key.
    fn absorb_as(&self, asked: &T::Id, row: T) -> Rc<Entry<T>> {
        let id = row.id();
        if id != *asked {
            self.aliases.borrow_mut().insert(asked.clone(), id);
        }
        self.absorb(row)
    }

    /// The entry of a row that was read just now. What is known wins over what was read, unless it may be old.
    pub(super) fn absorb(&self, row: T) -> Rc<Entry<T>> {
        use std::collections::hash_map::Entry::{Occupied, Vacant};
        match self.rows.borrow_mut().entry(row.id()) {
            Occupied(known) => {
                let entry = known.get();
                if !entry.is_fresh() && !entry.is_touched() {
                    entry.renew(row);
                }
                Rc::clone(entry)
            }
            Vacant(place) => Rc::clone(place.insert(Rc::new(Entry::kept(&self.home, row)))),
        }
    }

    pub(super) fn refresh(&self, entry: &Rc<Entry<T>>, sender: &dyn Sender<C>) -> Result<()> {
        let at = sender.at();
        self.mine(entry, at)?;
        let id = match entry.phase() {
            Phase::Kept | Phase::Stale => entry.id().ok_or_else(|| entry.in_writing(at))?,
            _ => return Err(entry.wrong_state("refreshed", at)),
        };
        match self.ask_for(&id, sender)? {
            Some(row) => {
                self.untouch(entry);
                entry.renew(row);
                self.rows.borrow_mut().entry(id).or_insert_with(|| Rc::clone(entry));
                Ok(())
            }
            None => {
                self.untouch(entry);
                self.forget_row(entry);
                entry.set_phase(Phase::Deleted);
                self.history.note_gone(entry);
                Err(Error::NotFound { row: Some(format!("{} {id:?}", T::NAME)), at })
            }
        }
    }

    /// Dooms a row; a new one is taken out.
    pub(super) fn doom(&self, entry: &Rc<Entry<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        match entry.phase() {
            Phase::Pending => {
                self.queues.borrow().iter().for_each(|queue| queue.remove(entry));
                entry.discard();
            }
            Phase::Kept => {
                if !entry.is_doomed() {
                    entry.set_doomed(true);
                    self.doomed.borrow_mut().push(Rc::clone(entry));
                }
                self.home.agenda.note_change(at);
            }
            _ => return Err(entry.wrong_state("deleted", at)),
        }
        Ok(())
    }

    pub(super) fn expire_one(&self, entry: &Rc<Entry<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        if entry.phase() != Phase::Kept {
            return Err(entry.wrong_state("expired", at));
        }
        self.untouch(entry);
        entry.expire();
        Ok(())
    }

    pub(super) fn expunge(&self, entry: &Rc<Entry<T>>, at: Place) -> Result<()> {
        self.mine(entry, at)?;
        match entry.phase() {
            Phase::Pending => self.doom(entry, at)?,
            Phase::Kept | Phase::Stale => {
                self.untouch(entry);
                self.doomed.borrow_mut().retain(|other| !Rc::ptr_eq(entry, other));
                self.forget_row(entry);
                entry.set_phase(Phase::Detached);
            }
            _ => return Err(entry.wrong_state("expunged", at)),
        }
        Ok(())
    }

    fn mine(&self, entry: &Entry<T>, at: Place) -> Result<()> {
        if entry.belongs_to(&self.home) {
            return Ok(());
        }
        match entry.phase() {
            Phase::Kept | Phase::Pending | Phase::Stale => {
                Err(Error::NotMine { entity: T::NAME, key: entry.shown_key(), at })
            }
            _ => Err(entry.wrong_state("given to this session", at)),
        }
    }

    fn untouch(&self, entry: &Rc<Entry<T>>) {
        entry.revert();
        self.home.touched.borrow_mut().retain(|other| !Rc::ptr_eq(entry, other));
    }

    /// There is no row of that key any more.
    fn vanished(&self, id: &T::Id) {
        // One that is written to stays, for its flush to say so.
        let mut rows = self.rows.borrow_mut();
        let alias = self.aliases.borrow().get(id).cloned();
        let id = alias.as_ref().filter(|_| !rows.contains_key(id)).unwrap_or(id);
        if rows.get(id).is_some_and(|entry| !entry.is_touched() && !entry.is_doomed())
            && let Some(entry) = rows.remove(id)
        {
            entry.set_phase(Phase::Deleted);
            self.history.note_gone(&entry);
        }
    }

    /// Takes an entry out of the map, if it is what is there for its key.
    fn forget_row(&self, entry: &Rc<Entry<T>>) {
        let mut rows = self.rows.borrow_mut();
        match entry.id() {
            Some(id) => {
                if rows.get(&id).is_some_and(|known| Rc::ptr_eq(known, entry)) {
                    rows.remove(&id);
                }
            }
            // The key cannot be seen while the row is being written.
            None => rows.retain(|_, known| !Rc::ptr_eq(known, entry)),
        }
    }

    /// For so many rows that will be inserted.
    pub(super) fn reserve(&self, rows: usize) {
        self.rows.borrow_mut().reserve(rows);
        self.history.reserve(rows);
    }

    pub(super) fn inserted(&self, entry: &Rc<Entry<T>>, row: T) {
        let known = self.rows.borrow_mut().insert(row.id(), Rc::clone(entry));
        if let Some(known) = known.filter(|known| !Rc::ptr_eq(known, entry)) {
            self.untouch(&known);
            known.set_phase(Phase::Deleted);
            self.history.note_gone(&known);
        }
        entry.inserted(row);
        self.history.note(ChangeKind::Insert, entry);
    }

    pub(super) fn deleted(&self, entry: &Rc<Entry<T>>, id: &T::Id) {
        let mut rows = self.rows.borrow_mut();
        if rows.get(id).is_some_and(|known| Rc::ptr_eq(known, entry)) {
            rows.remove(id);
        }
        drop(rows);
        entry.set_phase(Phase::Deleted);
        self.history.note(ChangeKind::Delete, entry);
    }

    /// The row was deleted together with one that it referred to.
    pub(super) fn gone(&self, entry: &Rc<Entry<T>>, id: &T::Id) {
        entry.revert();
        let mut rows = self.rows.borrow_mut();
        if rows.get(id).is_some_and(|known| Rc::ptr_eq(known, entry)) {
            rows.remove(id);
        }
        drop(rows);
        entry.set_phase(Phase::Deleted);
        self.history.note_gone(entry);
    }

    pub(super) fn refers_to(&self, ancestor: TypeId) -> bool {
        let ancestors = self.ancestors.get_or_init(|| self.relations().ancestors(TypeId::of::<T>()));
        ancestors.contains(&ancestor)
    }

    /// Most bytes of one statement, for rows that have so many.
    pub(super) fn most_bytes(&self, bytes: usize, sender: &dyn Sender<C>) -> Result<usize> {
        // MySQL and MariaDB have no RETURNING, and they alone have such a limit.
        if bytes < ASKED_FROM || sender.returning() {
            return Ok(usize::MAX);
        }
        if self.most_bytes.get().is_none() {
            let most = ask(sender, Sending::select::<T>(), |conn| T::most_bytes(conn))?;
            self.most_bytes.set(Some(most.unwrap_or(usize::MAX)));
        }
        Ok(self.most_bytes.get().unwrap_or(usize::MAX))
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
        let level = self.home.agenda.level();
        self.lost_parents.set(Some(self.lost_parents.get().map_or(level, |lost| lost.min(level))));
        self.home.expire();
    }

    fn forget_new_rows(&self) {
        for queue in self.queues.borrow().iter() {
            queue.clear().iter().for_each(|entry| entry.discard());
        }
    }

    fn forget_deletes(&self) {
        std::mem::take(&mut *self.doomed.borrow_mut()).iter().for_each(|entry| entry.set_doomed(false));
    }

    /// Rows that nobody holds and that would be read again anyway.
    fn sweep(&self) {
        let mut rows = self.rows.borrow_mut();
        if rows.len() >= SWEPT_FROM.max(self.swept.get() * 2) {
            rows.retain(|_, entry| Rc::strong_count(entry) > 1);
            self.swept.set(rows.len());
            self.aliases.borrow_mut().retain(|_, id| rows.contains_key(id));
        }
    }
}

impl<C: 'static, T: Persist<C>> DynStore<C> for Store<C, T> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn name(&self) -> &'static str {
        std::any::type_name::<T>()
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
        let deletes = match self.doomed.borrow().as_slice() {
            [] => Deletes::default(),
            doomed => Deletes::of(doomed, at)?,
        };
        self.deletes.replace(deletes);
        Ok(())
    }

    fn end_flush(&self) {
        let (keys, deletes) = (self.waiting_keys.take(), self.deletes.take());
        drop((keys, deletes));
    }

    fn check(&self, at: Place) -> Result<()> {
        for entry in self.home.touched.borrow().iter() {
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
        Error::UnresolvedKeys { entity: T::NAME, rows: self.waiting(), at }
    }

    fn is_dirty(&self) -> bool {
        let touched = self.home.touched.borrow();
        self.waiting() > 0 || self.has_deletes() || touched.iter().any(|entry| entry.differences() != 0)
    }

    fn has_updates(&self) -> bool {
        !self.home.touched.borrow().is_empty()
    }

    fn has_deletes(&self) -> bool {
        !self.doomed.borrow().is_empty()
    }

    fn moves_from(&self, at: Place) -> Result<Vec<Reference>> {
        let mut from = Vec::new();
        for entry in self.home.touched.borrow().iter().filter(|entry| !entry.is_doomed()) {
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

    fn doomed(&self, late: Option<bool>) -> Vec<usize> {
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
        sender: &dyn Sender<C>,
        breaks_circle: &dyn Fn(&Reference) -> bool,
        waiting: &dyn Fn(&Reference) -> bool,
    ) -> Result<()> {
        super::writes::send_moves(self, sender, breaks_circle, waiting)
    }

    fn unlink(&self, doomed: usize, parents: &[TypeId], sender: &dyn Sender<C>) -> Result<bool> {
        super::writes::unlink(self, doomed, parents, sender)
    }

    fn deletes_at_once(&self, rows: usize) -> bool {
        rows <= T::DELETES
    }

    fn lock(&self, sender: &dyn Sender<C>, waiting: Depends<'_>) -> Result<()> {
        super::writes::lock(self, sender, waiting)
    }

    fn insert_ready(&self, sender: &dyn Sender<C>) -> Result<usize> {
        let queues = self.queues.borrow().clone();
        let mut inserted = 0;
        for queue in queues {
            inserted += queue.insert_ready(self, sender)?;
        }
        Ok(inserted)
    }

    fn update(&self, sender: &dyn Sender<C>, waiting: Depends<'_>) -> Result<()> {
        super::writes::update(self, sender, waiting)
    }

    fn delete(&self, doomed: &[usize], together: bool, sender: &dyn Sender<C>) -> Result<()> {
        super::writes::delete(self, doomed, together, sender)
    }

    fn unflushed(&self, kind: ChangeKind, changes: &mut Vec<Change>) {
        let mut note = |entry: &Rc<Entry<T>>| changes.push(Change::new(kind, entry, changes.len() as u64));
        match kind {
            ChangeKind::Insert => {
                self.queues.borrow().iter().for_each(|queue| queue.entries().iter().for_each(&mut note))
            }
            ChangeKind::Update => {
                let touched = self.home.touched.borrow();
                touched.iter().filter(|entry| !entry.is_doomed() && entry.differences() != 0).for_each(&mut note);
            }
            ChangeKind::Delete => self.doomed.borrow().iter().for_each(&mut note),
        }
    }

    fn flushed(&self, changes: &mut Vec<Change>) {
        self.history.tell(changes);
    }

    fn forget_unflushed(&self) {
        self.end_flush();
        self.forget_new_rows();
        self.forget_writes();
        self.forget_deletes();
    }

    fn forget_writes(&self) {
        std::mem::take(&mut *self.home.touched.borrow_mut()).iter().for_each(|entry| entry.revert());
    }

    fn keep_level(&self, level: u32) {
        self.lost_parents.set(self.lost_parents.get().map(|lost| lost.min(level.saturating_sub(1))));
        self.history.keep_level(level);
    }

    fn roll_back_to(&self, level: u32) {
        self.forget_unflushed();
        self.lost_parents.set(self.lost_parents.get().filter(|lost| *lost < level));
        self.history.undo(level, |kind, entry| match (kind, entry.id()) {
            (Some(ChangeKind::Insert), _) => {
                self.forget_row(entry);
                entry.discard();
            }
            (Some(ChangeKind::Update), _) if entry.phase() == Phase::Kept => entry.set_phase(Phase::Stale),
            (Some(ChangeKind::Delete) | None, Some(id)) if entry.phase() == Phase::Deleted => {
                let mut rows = self.rows.borrow_mut();
                let known = rows.entry(id).or_insert_with(|| Rc::clone(entry));
                // Where the key has been read again since, its row has another handle, and it can have but one.
                entry.set_phase(if Rc::ptr_eq(known, entry) { Phase::Kept } else { Phase::Detached });
            }
            _ => {}
        });
    }

    fn committed(&self) {
        self.lost_parents.set(None);
        self.history.forget();
        self.sweep();
    }

    fn clear(&self) {
        self.forget_unflushed();
        self.history.forget();
        // What a row owns may have a drop of the program's own.
        let (rows, queues, aliases) = (self.rows.take(), self.queues.take(), self.aliases.take());
        drop((rows, queues, aliases));
    }
}
