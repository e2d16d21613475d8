//! Random programs, compared with a plain model after each step.

use std::panic::{AssertUnwindSafe, catch_unwind};

use diesel_session::unit_of_work::RowState;
use proptest::prelude::ProptestConfig;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{RngSeed, TestRunner};

use super::*;
use crate::unit_model::handles::{Handle, Locks, with_handle, with_table};
use crate::unit_model::model::{Insert, Model, Plan, Rules, Write};
use crate::unit_model::number;
use crate::unit_model::program::{Closure, Pick, Program, ScopeOf, Step, Value, programs, smaller};
use crate::unit_model::rows::{Column, Key, Row, Rows, Table, told};
use crate::unit_model::tables::{
    FIRST_ROWS, NewBadge, NewComment, NewCounter, NewLink, NewNode, NewPost, NewUser, Stored, all_rows, counters,
};

/// How many programs run: fewer in the worlds of the enum, which behave as the others do.
fn cases() -> u64 {
    let is_enum = std::any::type_name::<Conn>() == std::any::type_name::<AnyConnection>();
    number("DIESEL_SESSION_MODEL_CASES").unwrap_or(if is_enum { 50 } else { 400 })
}

/// Why a sequence of steps ends early.
enum Stop {
    /// The session is wrong.
    Wrong(String),
    /// Something failed that may fail; what was done has to be undone.
    Failed(Error),
    /// The program itself wants it undone.
    Undo,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

type Done<T = ()> = Result<T, Stop>;

struct Run<'r> {
    session: Session<Conn>,
    other: &'r mut OtherConnection,
    model: Model,
    /// Every handle that there has been, with its row's key.
    handles: Vec<(Key, Handle)>,
    /// What was done, for people.
    log: Vec<String>,
    /// Closures of `transaction`, `savepoint` and `retry` that are open.
    depth: usize,
    /// In a later attempt of `retry` no other connection writes.
    is_alone: bool,
    is_retrying: bool,
}

fn wrong<T>(what: impl Into<String>) -> Done<T> {
    Err(Stop::Wrong(what.into()))
}

fn any_of(rows: &[Option<Row>]) -> String {
    if rows.is_empty() {
        return "not there".into();
    }
    rows.iter().map(|row| told(row.as_ref())).collect::<Vec<_>>().join("; or ")
}

impl Run<'_> {
    fn say(&mut self, what: impl std::fmt::Display) {
        let indent = "    ".repeat(self.depth);
        self.log.push(format!("{indent}{what}"));
    }

    fn say_of(&mut self, what: impl std::fmt::Display, note: impl std::fmt::Display) {
        let what = format!("{}{what}", "    ".repeat(self.depth));
        self.log.push(format!("{what:<48}// {note}"));
    }

    fn run(&mut self, steps: &[Step]) -> Done {
        steps.iter().try_for_each(|step| {
            self.step(step)?;
            self.model.rest();
            self.pin_snapshot()?;
            self.check_memory()
        })
    }

    /// Runs the steps of a whole program; what fails is rolled back.
    fn run_outermost(&mut self, steps: &[Step]) -> Done {
        for step in steps {
            match self.run(std::slice::from_ref(step)) {
                Err(Stop::Failed(error)) => {
                    self.say_of("rollback", format!("after {error}"));
                    self.session.rollback()?;
                    self.rolled_back()?;
                }
                done => done?,
            }
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Done {
        match step {
            Step::Add { table, key, parent, code } => self.add(*table, *key, *parent, *code),
            Step::Find(pick) => self.pick(*pick).map_or(Ok(()), |key| self.find(key).map(drop)),
            Step::Track(table) => self.track(*table),
            Step::Lock(pick) => self.pick(*pick).map_or(Ok(()), |key| self.lock(key)),
            Step::Refresh(pick) => self.pick(*pick).map_or(Ok(()), |key| self.refresh(key)),
            Step::Write { pick, column, value } => self.write(*pick, *column, *value),
            Step::Delete(pick) => self.delete(*pick),
            Step::RawUpdate { pick, value, is_text } => self.raw_update(*pick, *value, *is_text),
            Step::RawDelete { pick } => self.raw_delete(*pick),
            Step::OtherUpdate { pick, column, value } => self.update_elsewhere(*pick, *column, *value),
            Step::OtherDelete(pick) => self.delete_elsewhere(*pick),
            Step::Flush => {
                self.say("flush");
                self.flush()
            }
            Step::FindAll => self.find_all(),
            Step::Savepoint(closure) => self.savepoint(closure),
            Step::Transaction(closure) => self.transaction(closure),
            Step::Retry(closure) => self.retry(closure),
            Step::Begin => self.begin(),
            Step::Commit => self.commit(),
            Step::Rollback if self.depth == 0 => {
                self.say("rollback");
                self.session.rollback()?;
                self.rolled_back()
            }
            Step::Rollback => Ok(()),
        }
    }

    /// Does something that flushes first.
    fn flushing<T>(&mut self, does: impl FnOnce(&Session<Conn>) -> Result<T>) -> Done<T> {
        let plan = self.model.plan();
        let session = self.session.clone();
        let done = does(&session).and_then(|value| match session.is_dirty() {
            true => session.flush().map(|()| value),
            false => Ok(value),
        });
        self.flushed(plan, done)
    }

    fn flushed<T>(&mut self, plan: Plan, done: Result<T>) -> Done<T> {
        match (plan, done) {
            (Plan::Must(rows) | Plan::May(rows), Ok(value)) => {
                self.model.flushed(rows);
                self.learn_keys()?;
                Ok(value)
            }
            (Plan::Must(_), Err(error)) => wrong(format!("a valid flush fails: {error}")),
            (Plan::May(_) | Plan::Fails(_), Err(error)) => Err(Stop::Failed(error)),
            (Plan::Fails(why), Ok(_)) => wrong(format!("a flush succeeds although {why}")),
        }
    }

    /// The database has made the keys of new rows.
    fn learn_keys(&mut self) -> Done {
        for place in 0..self.handles.len() {
            let (key, handle) = self.handles[place].clone();
            if key.1 < 0 && matches!(handle.state(), RowState::Persistent | RowState::Expired) {
                let id = handle.id()?;
                self.model.rename(key, id);
                self.handles[place].0.1 = id;
                self.say_of("", format!("{} {} is {id}", key.0.name(), key.1));
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Done {
        self.flushing(|session| session.flush())
    }

    fn has_pending(&self) -> bool {
        let pending = &self.model.pending;
        !(pending.inserts.is_empty() && pending.writes.is_empty() && pending.deletes.is_empty())
    }

    /// A key that is or was in the table.
    fn pick(&self, pick: Pick) -> Option<Key> {
        let held = self.handles.iter().map(|(key, _)| *key).filter(|key| key.0 == pick.table && key.1 > 0);
        let stored = self.model.current.of(pick.table).filter(|id| *id > 0).map(|id| (pick.table, id));
        let keys: std::collections::BTreeSet<Key> = held.chain(stored).collect();
        keys.iter().nth(pick.place % keys.len().max(1)).copied()
    }

    /// The handle by which a row can be written.
    fn live(&self, key: Key) -> Option<Handle> {
        let is_live = |handle: &Handle| matches!(handle.state(), RowState::Persistent | RowState::Expired);
        let handle = self.handles.iter().rev().find(|(other, handle)| *other == key && is_live(handle));
        handle.map(|(_, handle)| handle.clone())
    }

    fn handle(&mut self, pick: Pick) -> Done<Option<(Key, Handle)>> {
        let Some(key) = self.pick(pick) else { return Ok(None) };
        let live = self.live(key).filter(|_| !pick.is_found);
        let handle = match live {
            Some(handle) => Some(handle),
            None => self.find(key)?,
        };
        Ok(handle.map(|handle| (key, handle)))
    }

    fn keep(&mut self, key: Key, handle: Handle) -> Done {
        match self.live(key) {
            Some(live) if live != handle => {
                return wrong(format!("{} {} has two handles: {live:?} and {handle:?}", key.0.name(), key.1));
            }
            Some(_) => {}
            None => self.handles.push((key, handle)),
        }
        Ok(())
    }

    fn find(&mut self, key: Key) -> Done<Option<Handle>> {
        self.say(format!("find {} {}", key.0.name(), key.1));
        let get = |session: &Session<Conn>| -> Result<Option<Handle>> {
            Ok(with_table!(key.0, T, _table => session.get::<T>(key.1)?.map(Handle::from)))
        };
        if self.model.pending.writes.contains_key(&key) || self.model.pending.deletes.contains_key(&key) {
            self.flush()?;
            self.model.rest();
        }
        let had_changes = self.session.is_dirty();
        let plan = self.model.plan();
        let handle = match get(&self.session) {
            // The session knew the row. Otherwise it reads the row, after a flush.
            Ok(handle) if had_changes == self.session.is_dirty() => handle,
            done => self.flushed(plan, done)?,
        };
        self.is_read(key, handle.as_ref())?;
        if let Some(handle) = handle.clone() {
            self.keep(key, handle)?;
        }
        Ok(handle)
    }

    /// A row was read by a SELECT without a lock.
    fn is_read(&mut self, key: Key, handle: Option<&Handle>) -> Done {
        let row = handle.map(Handle::read).transpose()?;
        let expected = self.model.found(key);
        if !expected.contains(&row) {
            let (table, row) = (key.0.name(), told(row.as_ref()));
            return wrong(format!("{table} {} is read as {row}; it is {}", key.1, any_of(&expected)));
        }
        self.model.read(key, row);
        Ok(())
    }

    fn find_all(&mut self) -> Done {
        self.say("find every row");
        self.flush()?;
        for table in Table::ALL {
            let held = self.handles.iter().map(|(key, _)| *key).filter(|key| key.0 == table && key.1 > 0);
            let mut keys: std::collections::BTreeSet<Key> = held.collect();
            keys.extend(self.model.current.of(table).map(|id| (table, id)));
            for key in keys {
                self.find(key)?;
                self.log.pop();
                self.model.rest();
            }
        }
        Ok(())
    }

    fn track(&mut self, table: Table) -> Done {
        self.say(format!("track {}", table.name()));
        let handles: Vec<Handle> = self.flushing(|session| {
            Ok(with_table!(table, T, table => {
                session.track::<T>(table::table.select(T::as_select()))?.into_iter().map(Handle::from).collect()
            }))
        })?;
        self.model.rest();
        let mut seen = self.model.all_seen(table);
        for handle in handles {
            let key = (table, handle.id()?);
            if seen.remove(&key.1).is_none() {
                return wrong(format!("{} {} is not there, and a query gives it", table.name(), key.1));
            }
            self.is_read(key, Some(&handle))?;
            self.keep(key, handle)?;
        }
        match seen.is_empty() {
            true => Ok(()),
            false => wrong(format!("a query does not give these rows of {}: {seen:?}", table.name())),
        }
    }

    fn lock(&mut self, key: Key) -> Done {
        if !<Conn as Locks>::CAN_LOCK {
            return Ok(());
        }
        self.say(format!("find {} {}, for update", key.0.name(), key.1));
        let mut handles = self.flushing(|session| <Conn as Locks>::lock(session, key.0, key.1))?;
        let row = self.model.current.get(key).cloned();
        match (handles.pop(), row) {
            (None, None) => Ok(()),
            (Some(handle), Some(row)) => {
                let read = handle.read()?;
                self.model.read_locked(key, row.clone());
                if read != row {
                    let (read, row) = (told(Some(&read)), told(Some(&row)));
                    return wrong(format!("{} {} is locked and read as {read}; it is {row}", key.0.name(), key.1));
                }
                self.keep(key, handle)
            }
            (handle, row) => wrong(format!("{handle:?} is locked; it is {}", told(row.as_ref()))),
        }
    }

    fn refresh(&mut self, key: Key) -> Done {
        let Some(handle) = self.live(key) else { return Ok(()) };
        self.flush()?;
        let Some(row) = self.model.seen(key) else { return Ok(()) };
        if self.live(key).as_ref() != Some(&handle) {
            return Ok(());
        }
        self.say(format!("refresh {} {}", key.0.name(), key.1));
        with_handle!(&handle, tracked => self.session.refresh(tracked))?;
        let read = handle.read()?;
        self.model.read_locked(key, row.clone());
        if read != row {
            let (read, row) = (told(Some(&read)), told(Some(&row)));
            return wrong(format!("{} {} is refreshed as {read}; it is {row}", key.0.name(), key.1));
        }
        Ok(())
    }

    fn add(&mut self, table: Table, key: i32, parent: usize, code: i32) -> Done {
        let model = &self.model;
        let mut row = Row::default();
        let mut above = None;
        if let Some(over) = table.parent() {
            let held = |key: &Key| key.1 > 0 || self.handles.iter().any(|(other, _)| other == key);
            let stored = model.current.of(over).map(|id| (over, id));
            let pending = model.pending.inserts.iter().map(|insert| insert.key).filter(|key| key.0 == over);
            let keys: Vec<Key> = stored.chain(pending).filter(held).collect();
            let place = parent % (keys.len() + 1);
            above = keys.get(place).copied().or_else(|| keys.first().copied().filter(|_| !table.may_be_alone()));
            if above.is_none() && !table.may_be_alone() {
                return Ok(());
            }
            row.parent = above.map(|(_, id)| id);
        }
        if table.has(Column::Code) {
            row.code = Some(code).filter(|code| *code > 0);
        }
        let key = (table, if table.is_counted() { self.model.key_for_now() } else { key });
        let is_there = self.model.current.get(key).is_some() && !self.model.pending.deletes.contains_key(&key);
        if is_there || self.model.pending.inserts.iter().any(|insert| insert.key == key) {
            return Ok(());
        }
        self.model.pending.inserts.push(Insert { key, row: row.clone() });
        if self.model.is_unclear() {
            self.model.pending.inserts.pop();
            return Ok(());
        }
        self.say(format!("add {} {}: {}", table.name(), key.1, told(Some(&row))));
        let of = |key: Key| self.handles.iter().rev().find(|(other, _)| *other == key).map(|(_, handle)| handle);
        let (id, Row { parent: plain, code, n, m, .. }) = (key.1, row);
        let session = &self.session;
        let handle: Handle = match table {
            Table::User => session.add(NewUser { id, code, n, m })?.into(),
            Table::Post => session.add(NewPost { parent: plain.expect("a user").into(), n, m })?.into(),
            Table::Comment => {
                let parent = match above.and_then(of) {
                    Some(Handle::Post(post)) if above.is_some_and(|(_, id)| id < 0) => post.key(),
                    _ => plain.expect("a post").into(),
                };
                session.add(NewComment { id, parent, n, m })?.into()
            }
            Table::Badge => session.add(NewBadge { id, parent: plain.map(Into::into), n, m })?.into(),
            Table::Node => {
                let parent = match above.and_then(of) {
                    Some(Handle::Node(node)) if above.is_some_and(|(_, id)| id < 0) => Some(node.key()),
                    _ => plain.map(Into::into),
                };
                session.add(NewNode { parent, code, n, m })?.into()
            }
            Table::Link => session.add(NewLink { id, parent: plain.map(Into::into), n, m })?.into(),
            Table::Counter => session.add(NewCounter { id, n, m })?.into(),
        };
        self.handles.push((key, handle));
        Ok(())
    }

    fn write(&mut self, pick: Pick, column: Column, value: Value) -> Done {
        if !pick.table.has(column) {
            return Ok(());
        }
        let Some((key, handle)) = self.handle(pick)? else { return Ok(()) };
        let table = key.0;
        if self.model.pending.deletes.contains_key(&key) {
            return Ok(());
        }
        let is_outside = self.model.is_outside() && !self.model.pending.writes.contains_key(&key);
        let known = self.model.known.get(&key).map(|known| known.row.clone()).filter(|_| !is_outside);
        let mut is_expired = known.is_none();
        if is_expired && !table.is_versioned() && self.has_pending() && !self.model.pending.writes.contains_key(&key) {
            // Writing may read, and reading may flush.
            self.flush()?;
            // SQLite gives the key of a row that is gone to a new one.
            if self.live(key).as_ref() != Some(&handle) {
                return Ok(());
            }
            is_expired = !self.model.known.contains_key(&key);
        }
        let number = matches!(column, Column::N | Column::M);
        let (base, row, is_outdated) = match self.model.pending.writes.get(&key) {
            // What it would be read as now is anybody's guess.
            Some(_) if is_expired && !matches!(value, Value::Of(_)) => return Ok(()),
            Some(write) => (write.base.clone(), write.row(), write.is_outdated),
            None if is_expired && table.is_versioned() => {
                if self.is_retrying {
                    return Ok(());
                }
                let row = handle.read()?;
                (row.clone(), row, true)
            }
            None => {
                let Some(row) = known.or_else(|| self.model.seen(key)) else { return Ok(()) };
                (row.clone(), row, false)
            }
        };
        let (value, how) = match value {
            Value::Of(value) if number => (Some(value), Value::Of(value)),
            Value::Of(value) if column == Column::Parent => {
                let parents: Vec<i32> =
                    self.model.current.of(table.parent().expect("it has one")).filter(|id| *id > 0).collect();
                let value = parents.get(value as usize % (parents.len() + 1)).copied();
                if value.is_none() && !table.may_be_alone() {
                    return Ok(());
                }
                // A circle of nodes would go as a whole.
                if table == Table::Node && value.is_some_and(|id| self.model.current.comes_from((table, id), key)) {
                    return Ok(());
                }
                (value, Value::Of(0))
            }
            Value::Of(value) => (Some(value).filter(|value| *value > 0), Value::Of(0)),
            Value::Read if number && self.is_retrying => (row.get(column).map(|value| value + 1), Value::Read),
            Value::Update | Value::Read if number => (row.get(column).map(|value| value + 1), Value::Update),
            Value::Update | Value::Read => return Ok(()),
        };
        let current = self.model.current.get(key);
        let is_idle = base.get(column) == value;
        // It is not documented whether such a write is sent.
        let is_unclear = match is_outdated {
            true => {
                let is_of_base = |row: &Row| row.version == base.version;
                is_idle && (current.is_some_and(is_of_base) || self.model.seen(key).as_ref().is_some_and(is_of_base))
            }
            false => is_idle && current != Some(&base),
        };
        if is_unclear {
            return Ok(());
        }
        let mut pending = self.model.pending.clone();
        let write = Write { base: base.clone(), columns: Default::default(), is_outdated };
        pending.writes.entry(key).or_insert(write).columns.insert(column, value);
        let before = std::mem::replace(&mut self.model.pending, pending);
        if self.model.is_unclear() {
            self.model.pending = before;
            return Ok(());
        }
        let shown = value.map_or("NULL".into(), |value| value.to_string());
        let state = format!("{:?}", handle.state());
        let written = match how {
            Value::Of(_) => {
                self.say_of(format!("{} {} {column:?} = {shown}", table.name(), key.1), state);
                handle.update(column, |_| value)
            }
            Value::Update => {
                self.say_of(format!("{} {} {column:?} += 1", table.name(), key.1), format!("{state}, now {shown}"));
                handle.update(column, |row| row.get(column).map(|value| value + 1))
            }
            Value::Read => {
                let what = format!("{} {} write().{column:?} = read().{column:?} + 1", table.name(), key.1);
                self.say_of(what, format!("{state}, now {shown}"));
                let read = handle.read()?.get(column).map(|value| value + 1);
                handle.update(column, |_| read)
            }
        };
        if let Err(error) = written {
            return wrong(format!("a row that can be written is refused: {error}"));
        }
        if is_expired && !is_outdated {
            self.model.read(key, Some(base));
        }
        Ok(())
    }

    fn delete(&mut self, pick: Pick) -> Done {
        let Some((key, handle)) = self.handle(pick)? else { return Ok(()) };
        if self.model.pending.deletes.contains_key(&key) {
            return Ok(());
        }
        let written = self.model.pending.writes.get(&key);
        let known = written.map_or_else(|| handle.read(), |write| Ok(write.base.clone()))?;
        // In a later attempt of `retry` even a read of the value reads the row.
        if self.is_retrying && handle.state() == RowState::Persistent && !self.model.known.contains_key(&key) {
            self.model.read(key, Some(known.clone()));
        }
        self.model.pending.deletes.insert(key, known);
        if self.model.is_unclear() {
            self.model.pending.deletes.remove(&key);
            return Ok(());
        }
        self.say_of(format!("delete {} {}", key.0.name(), key.1), format!("{:?}", handle.state()));
        match with_handle!(&handle, tracked => self.session.delete(tracked)) {
            Ok(()) => Ok(()),
            Err(error) => wrong(format!("a row cannot be deleted: {error}")),
        }
    }

    fn raw_update(&mut self, pick: Pick, value: i32, is_text: bool) -> Done {
        let Some((table, id)) = self.pick(pick) else { return Ok(()) };
        let sql = format!("UPDATE {} SET n = {value}, version = version + 1 WHERE id = {id}", table.name());
        self.say(format!("execute: {sql}"));
        self.flushing(|session| match is_text {
            true => session.with(|conn| conn.batch_execute(&sql)),
            false => session.execute(sql_query(&sql)).map(drop),
        })?;
        let mut rows = self.model.current.clone();
        if let Some(row) = rows.0.get_mut(&(table, id)) {
            row.n = value;
            row.version += i32::from(table.is_versioned());
            // Its column `version` changes in any case.
            self.model.note_change((table, id));
        }
        self.changed_by_sql(rows)
    }

    fn raw_delete(&mut self, pick: Pick) -> Done {
        let Some((table, id)) = self.pick(pick).filter(|(table, _)| *table != Table::Link) else { return Ok(()) };
        self.say(format!("execute: DELETE FROM {} WHERE id = {id}", table.name()));
        self.flushing(
            |session| with_table!(table, T, table => session.execute(diesel::delete(table::table.find(id))).map(drop)),
        )?;
        let mut rows = self.model.current.clone();
        rows.delete((table, id));
        self.changed_by_sql(rows)
    }

    fn changed_by_sql(&mut self, rows: Rows) -> Done {
        self.model.change(rows);
        self.model.has_written = true;
        self.model.expire();
        Ok(())
    }

    fn update_elsewhere(&mut self, pick: Pick, column: Column, value: i32) -> Done {
        let Some(key) = self.pick(pick).filter(|key| key.0.has(column)) else { return Ok(()) };
        if column == Column::Parent || self.is_alone || self.model.is_idle(key) {
            return Ok(());
        }
        let value = Some(value).filter(|value| column != Column::Code || *value > 0);
        let name = format!("{column:?}").to_lowercase();
        let shown = value.map_or("NULL".into(), |value| value.to_string());
        let version = if key.0.is_versioned() { ", version = version + 1" } else { "" };
        let sql = format!("UPDATE {} SET {name} = {shown}{version} WHERE id = {}", key.0.name(), key.1);
        if self.other.write(&sql) {
            self.say(format!("another connection: {sql}"));
            self.model.change_elsewhere(key, |rows| {
                if let Some(row) = rows.0.get_mut(&key) {
                    row.set(column, value);
                    row.version += i32::from(key.0.is_versioned());
                }
            });
        }
        Ok(())
    }

    fn delete_elsewhere(&mut self, pick: Pick) -> Done {
        let Some(key) = self.pick(pick).filter(|_| !self.is_alone) else { return Ok(()) };
        let sql = format!("DELETE FROM {} WHERE id = {}", key.0.name(), key.1);
        if self.other.write(&sql) {
            self.say(format!("another connection: {sql}"));
            self.model.change_elsewhere(key, |rows| rows.delete(key));
        }
        Ok(())
    }

    fn begin(&mut self) -> Done {
        if self.depth > 0 {
            return Ok(());
        }
        let had_begun = self.session.in_transaction();
        match self.session.begin() {
            Ok(()) => self.model.expire(),
            Err(error) if had_begun && error.kind() == ErrorKind::AlreadyBegun => return Ok(()),
            Err(error) => return wrong(format!("no transaction begins: {error}")),
        }
        self.say("begin");
        self.model.has_begun = true;
        self.model.has_written = true;
        Ok(())
    }

    fn commit(&mut self) -> Done {
        if self.depth > 0 {
            return Ok(());
        }
        self.say("commit");
        self.flushing(|session| session.commit())?;
        self.committed()
    }

    fn committed(&mut self) -> Done {
        self.model.commit();
        self.check_tables()
    }

    fn rolled_back(&mut self) -> Done {
        self.model.rollback();
        let pending = self.handles.iter().find(|(_, handle)| handle.state() == RowState::Pending);
        if let Some((_, handle)) = pending {
            return wrong(format!("after a rollback there is {handle:?}"));
        }
        self.check_tables()
    }

    fn savepoint(&mut self, closure: &Closure) -> Done {
        if self.model.rules.autocommit && !self.model.has_begun {
            return self.whole_transaction("savepoint", closure);
        }
        self.flush()?;
        self.level("savepoint", closure)
    }

    fn transaction(&mut self, closure: &Closure) -> Done {
        match self.depth {
            0 => self.whole_transaction("transaction", closure),
            _ => {
                self.flush()?;
                self.level("transaction", closure)
            }
        }
    }

    /// Runs the closure's steps, and what they leave to flush.
    fn inside(&mut self, closure: &Closure) -> Done {
        self.depth += 1;
        let done = self.pin_snapshot().and_then(|()| self.run(&closure.steps));
        self.depth -= 1;
        match done {
            Ok(()) if closure.is_kept => Ok(()),
            Ok(()) => Err(Stop::Undo),
            stopped => stopped,
        }
    }

    fn level(&mut self, name: &str, closure: &Closure) -> Done {
        self.say(format!("{name} {{"));
        self.model.open_level();
        let session = self.session.clone();
        let mut plan = None;
        let call = |session: &Session<Conn>, body: &mut dyn FnMut() -> Done| match name {
            "savepoint" => session.savepoint(|_| body()),
            _ => session.transaction(|_| body()),
        };
        let done = call(&session, &mut || {
            self.inside(closure)?;
            plan = Some(self.model.plan());
            Ok(())
        });
        let done = match (plan, done) {
            (Some(plan), Ok(())) => self.flushed(plan, Ok(())),
            (Some(plan), Err(Stop::Failed(error))) => self.flushed(plan, Err(error)),
            (_, done) => done,
        };
        match done {
            Ok(()) => {
                self.say("} kept");
                self.model.keep_level();
                Ok(())
            }
            Err(Stop::Wrong(what)) => wrong(what),
            Err(stop) => {
                self.say_of("} undone", why(&stop));
                self.model.undo_level();
                Ok(())
            }
        }
    }

    /// A transaction that the closure begins, or that has begun and ends with it.
    fn whole_transaction(&mut self, name: &str, closure: &Closure) -> Done {
        self.say(format!("{name} {{"));
        // SQLite is in no transaction as long as it only reads.
        match KIND {
            Kind::Sqlite if !self.model.has_written => self.model.expire(),
            _ if self.session.in_transaction() => self.model.doubt(),
            _ => self.model.expire(),
        }
        self.model.has_begun = true;
        let session = self.session.clone();
        let mut plan = None;
        let mut body = || {
            self.inside(closure)?;
            plan = Some(self.model.plan());
            Ok(())
        };
        let done = match name {
            "savepoint" => session.savepoint(|_| body()),
            _ => session.transaction(|_| body()),
        };
        self.end(plan, done)
    }

    fn end(&mut self, plan: Option<Plan>, done: Done) -> Done {
        let done = match (plan, done) {
            (Some(plan), Ok(())) => self.flushed(plan, Ok(())),
            (Some(plan), Err(Stop::Failed(error))) => self.flushed(plan, Err(error)),
            (_, done) => done,
        };
        match done {
            Ok(()) => {
                self.say("} committed");
                self.committed()
            }
            Err(Stop::Wrong(what)) => wrong(what),
            Err(stop) => {
                self.say_of("} rolled back", why(&stop));
                self.rolled_back()
            }
        }
    }

    fn retry(&mut self, closure: &Closure) -> Done {
        if self.depth > 0 || self.session.in_transaction() || self.session.is_dirty() || self.has_pending() {
            return Ok(());
        }
        self.say("retry {");
        let session = self.session.clone();
        let mut plan = None;
        let mut attempts = 0;
        self.is_retrying = true;
        let done = session.retry(3, |_| {
            attempts += 1;
            if attempts > 1 {
                self.say_of("} {", "once more");
                if let Some(Plan::Must(_)) = plan.take() {
                    return wrong("a valid flush was repeated");
                }
            }
            self.model.rollback();
            self.model.has_begun = true;
            self.is_alone = attempts > 1;
            self.inside(closure)?;
            plan = Some(self.model.plan());
            Ok(())
        });
        (self.is_retrying, self.is_alone) = (false, false);
        self.end(plan, done)
    }

    /// From here on the transaction sees what it sees now, and the model knows since when.
    fn pin_snapshot(&mut self) -> Done {
        if !self.model.rules.has_snapshot || self.model.snapshot.is_some() || !self.session.in_transaction() {
            return Ok(());
        }
        let read = |session: &Session<Conn>| session.load::<i32>(counters::table.select(counters::id).limit(1));
        self.session.no_autoflush(read)?;
        self.model.take_snapshot();
        Ok(())
    }

    /// What the handles say is what the session's transaction has.
    fn check_memory(&self) -> Done {
        for (key, handle) in self.handles.iter().filter(|(_, handle)| handle.state() == RowState::Persistent) {
            let (row, expected) = (handle.read()?, self.model.in_memory(*key));
            if !expected.contains(&row) {
                let expected: Vec<_> = expected.into_iter().map(Some).collect();
                let row = told(Some(&row));
                return wrong(format!("{handle:?} has {row}; it is {}", any_of(&expected)));
            }
        }
        Ok(())
    }

    /// What is committed is what the program did.
    fn check_tables(&mut self) -> Done {
        let stored = self.other.load::<Stored>(&all_rows());
        let rows = stored.into_iter().map(|row| {
            let Stored { name, id, parent, code, n, m, version } = row;
            let table = Table::named(&name);
            let version = if table.is_versioned() { version } else { 1 };
            ((table, id), Row { parent, code, n, m, version })
        });
        let (stored, expected) = (Rows(rows.collect()), self.model.committed());
        match stored == expected {
            true => Ok(()),
            false => wrong(format!("the database | what the program did: {}", stored.difference(&expected))),
        }
    }
}

fn why(stop: &Stop) -> String {
    match stop {
        Stop::Failed(error) => error.to_string(),
        Stop::Wrong(_) | Stop::Undo => "as the program wants".into(),
    }
}

fn rules(scope: ScopeOf) -> Rules {
    let (has_snapshot, refuses_conflicts) = match (KIND, scope) {
        (Kind::Postgres, ScopeOf::Serializable) => (true, true),
        (Kind::Mariadb, ScopeOf::Default | ScopeOf::Autocommit) => (true, false),
        _ => (false, false),
    };
    Rules {
        autocommit: scope == ScopeOf::Autocommit,
        has_snapshot,
        refuses_conflicts,
        checks_row_by_row: KIND == Kind::Mariadb,
        reuses_keys: KIND == Kind::Sqlite,
        reads_outside: KIND == Kind::Sqlite && scope == ScopeOf::Default,
    }
}

/// Runs a program in a context of its own; an error tells what was done and what is wrong.
fn run(shop: &Shop<Conn>, other: &mut OtherConnection, program: &Program) -> Result<(), String> {
    assert!(other.write(FIRST_ROWS), "the first rows");
    let scope = match program.scope {
        ScopeOf::Default => shop.scope(),
        ScopeOf::Autocommit => shop.scope().autocommit(),
        ScopeOf::Serializable => shop.scope().isolation(Isolation::Serializable),
    };
    let mut log = Vec::new();
    let done = catch_unwind(AssertUnwindSafe(|| {
        scope.run(|| {
            let mut run = Run {
                session: DB.session()?,
                other,
                model: Model::new(rules(program.scope)),
                handles: Vec::new(),
                log: Vec::new(),
                depth: 0,
                is_alone: false,
                is_retrying: false,
            };
            let last = [Step::Commit, Step::FindAll, Step::Commit];
            let done = run.run_outermost(&program.steps).and_then(|()| run.run_outermost(&last));
            log = run.log;
            Ok::<_, Error>(done)
        })
    }));
    let what = match done {
        Ok(Ok(Ok(()))) => return Ok(()),
        Ok(Ok(Err(Stop::Wrong(what)))) => what,
        Ok(Ok(Err(Stop::Failed(error))) | Err(error)) => format!("an unexpected error: {error}"),
        Ok(Ok(Err(Stop::Undo))) => "the program was undone as a whole".into(),
        Err(panic) => format!("a panic: {:?}", panic.downcast_ref::<String>()),
    };
    Err(format!("in a scope of {:?}:\n    {}\n{what}", program.scope, log.join("\n    ")))
}

/// The smallest program that fails, and how; programs get smaller as long as that takes no more than so many runs.
fn smallest(mut program: Program, mut reason: String, run: &mut dyn FnMut(&Program) -> Result<(), String>) -> String {
    let mut left = 1000;
    'smaller: loop {
        for candidate in smaller(&program) {
            if left == 0 {
                break 'smaller;
            }
            left -= 1;
            if let Err(other) = run(&candidate) {
                (program, reason) = (candidate, other);
                continue 'smaller;
            }
        }
        break;
    }
    reason
}

#[test]
fn session_agrees_with_a_plain_model_of_the_tables() {
    let fixture = Fixture::sql("model", crate::unit_model::tables::tables(KIND));
    test_on(fixture, |shop| {
        let mut other = shop.other_connection();
        let seed = number("DIESEL_SESSION_MODEL_SEED").unwrap_or(1);
        let mut chance =
            TestRunner::new(ProptestConfig { rng_seed: RngSeed::Fixed(seed), ..ProptestConfig::default() });
        let programs = programs();
        for case in 0..cases() {
            let program = programs.new_tree(&mut chance).expect("nothing is rejected").current();
            let mut run = |program: &Program| run(shop, &mut other, program);
            if let Err(reason) = run(&program) {
                let reason = smallest(program, reason, &mut run);
                panic!("program {case} of seed {seed}, {reason}");
            }
        }
        Ok(())
    });
}

/// Random programs seldom have these steps in a row.
#[test]
fn value_that_is_read_in_a_retry_is_the_one_that_its_transaction_sees() {
    let fixture = Fixture::sql("model", crate::unit_model::tables::tables(KIND));
    test_on(fixture, |shop| {
        let user = |is_found| Pick { table: Table::User, place: 1, is_found };
        let write = Step::Write { pick: user(false), column: Column::N, value: Value::Read };
        let steps = vec![
            Step::Find(user(true)),
            Step::Commit,
            Step::OtherUpdate { pick: user(false), column: Column::N, value: 2 },
            Step::Retry(Closure { steps: vec![write], is_kept: true }),
        ];
        for scope in [ScopeOf::Default, ScopeOf::Autocommit, ScopeOf::Serializable] {
            run(shop, &mut shop.other_connection(), &Program { scope, steps: steps.clone() }).unwrap();
        }
        Ok(())
    });
}

#[test]
fn rows_that_lead_to_a_row_which_refers_to_itself_are_deleted_in_one_flush() {
    let fixture = Fixture::sql("model", crate::unit_model::tables::tables(KIND));
    test_on(fixture, |shop| {
        let link = |place| Pick { table: Table::Link, place, is_found: true };
        let steps = vec![
            Step::Write { pick: link(2), column: Column::Parent, value: Value::Of(2) },
            Step::Find(link(1)),
            Step::Find(link(0)),
            Step::Delete(Pick { is_found: false, ..link(1) }),
            Step::Delete(Pick { is_found: false, ..link(0) }),
            Step::Delete(Pick { is_found: false, ..link(2) }),
            Step::Commit,
        ];
        run(shop, &mut shop.other_connection(), &Program { scope: ScopeOf::Default, steps }).unwrap();
        Ok(())
    });
}
