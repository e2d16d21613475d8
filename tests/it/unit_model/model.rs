//! What the database has, what the session's transaction has changed, and what the session may know.

use std::collections::{BTreeMap, BTreeSet};

use super::rows::{Column, Key, Row, Rows, Table, first_rows};

/// A row that was added and not flushed.
#[derive(Debug, Clone)]
pub struct Insert {
    pub key: Key,
    pub row: Row,
}

/// What was written to a row and not flushed.
#[derive(Debug, Clone)]
pub struct Write {
    /// The row in memory before it was written.
    pub base: Row,
    pub columns: BTreeMap<Column, Option<i32>>,
    /// The base was read in another transaction.
    pub is_outdated: bool,
}

impl Write {
    /// The row in memory.
    pub fn row(&self) -> Row {
        let mut row = self.base.clone();
        self.columns.iter().for_each(|(column, value)| row.set(*column, *value));
        row
    }

    /// Whether there is something to send.
    fn sends(&self) -> bool {
        self.is_outdated || self.columns.keys().any(|column| !self.is_idle(*column))
    }

    /// Columns whose value is that of the base; the session need not send them.
    fn is_idle(&self, column: Column) -> bool {
        self.columns.get(&column).is_some_and(|value| *value == self.base.get(column))
    }
}

/// What was changed and not flushed.
#[derive(Debug, Clone, Default)]
pub struct Pending {
    pub inserts: Vec<Insert>,
    pub writes: BTreeMap<Key, Write>,
    /// With the row that the session knows.
    pub deletes: BTreeMap<Key, Row>,
}

/// What the session knows of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    pub row: Row,
    /// It was read in this transaction, and nothing has happened since after which the session may read it again.
    pub is_certain: bool,
}

/// What a flush does.
#[derive(Debug, Clone)]
pub enum Plan {
    /// It succeeds.
    Must(Rows),
    /// It succeeds with these rows, or fails.
    May(Rows),
    Fails(&'static str),
}

/// What depends on the database and the scope.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub autocommit: bool,
    /// A transaction reads what was committed before it began.
    pub has_snapshot: bool,
    /// It fails where it would change what was committed since.
    pub refuses_conflicts: bool,
    /// Foreign keys are checked row by row, not once a statement.
    pub checks_row_by_row: bool,
    /// The database may give a new row the key of one that is gone.
    pub reuses_keys: bool,
    /// What is read before the first write is read outside of the transaction.
    pub reads_outside: bool,
}

#[derive(Debug)]
pub struct Model {
    pub rules: Rules,
    /// The newest rows: what is committed and what the session has changed.
    pub current: Rows,
    /// For the transaction and each savepoint, what the session's changes replaced.
    levels: Vec<BTreeMap<Key, Option<Row>>>,
    pub snapshot: Option<Rows>,
    /// Whether there was a snapshot when each savepoint was opened.
    had_snapshot: Vec<bool>,
    /// Another connection has committed something since the snapshot.
    pub has_conflicts: bool,
    pub known: BTreeMap<Key, Known>,
    pub pending: Pending,
    /// Whether an autocommit scope is in a transaction.
    pub has_begun: bool,
    /// The session has sent something in this transaction that may write.
    pub has_written: bool,
    /// Rows that were read with their locks in this transaction, whatever a savepoint has undone since.
    locked: BTreeSet<Key>,
    /// Rows that a flush of this transaction has deleted, or a cascade of it.
    deleted: BTreeSet<Key>,
    /// Every version of a row that was ever committed.
    committed_ever: BTreeSet<(Key, Row)>,
    next_key: i32,
}

impl Model {
    pub fn new(rules: Rules) -> Self {
        let current = first_rows();
        Self {
            rules,
            committed_ever: current.0.clone().into_iter().collect(),
            current,
            levels: vec![BTreeMap::new()],
            snapshot: None,
            had_snapshot: Vec::new(),
            has_conflicts: false,
            known: BTreeMap::new(),
            pending: Pending::default(),
            has_begun: false,
            has_written: false,
            locked: BTreeSet::new(),
            deleted: BTreeSet::new(),
            next_key: 0,
        }
    }

    /// Until the database makes one.
    pub fn key_for_now(&mut self) -> i32 {
        self.next_key -= 1;
        self.next_key
    }

    fn is_changed(&self, key: Key) -> bool {
        self.levels.iter().any(|level| level.contains_key(&key))
    }

    /// What other connections see.
    pub fn committed(&self) -> Rows {
        let mut rows = self.current.clone();
        self.levels.iter().rev().for_each(|level| restore(&mut rows, level));
        rows
    }

    pub fn was_committed(&self, key: Key, row: &Row) -> bool {
        self.committed_ever.contains(&(key, row.clone()))
    }

    /// What the session's next SELECT sees.
    pub fn seen(&self, key: Key) -> Option<Row> {
        let rows = match &self.snapshot {
            Some(snapshot) if !self.is_changed(key) => snapshot,
            _ => &self.current,
        };
        rows.get(key).cloned()
    }

    pub fn all_seen(&self, table: Table) -> BTreeMap<i32, Row> {
        let keys: BTreeSet<i32> =
            self.current.of(table).chain(self.snapshot.iter().flat_map(|rows| rows.of(table))).collect();
        keys.into_iter().filter_map(|id| Some((id, self.seen((table, id))?))).collect()
    }

    /// What a `find` may give.
    pub fn found(&self, key: Key) -> Vec<Option<Row>> {
        match self.known.get(&key) {
            Some(known) if known.is_certain => vec![Some(known.row.clone())],
            Some(known) => vec![Some(known.row.clone()), self.seen(key)],
            // A row that was locked is read with its lock again.
            None if self.locked.contains(&key) => vec![self.seen(key), self.current.get(key).cloned()],
            None => vec![self.seen(key)],
        }
    }

    /// What the session may have in memory for a row that it says is as in the database.
    pub fn in_memory(&self, key: Key) -> Vec<Row> {
        match self.pending.writes.get(&key) {
            Some(write) => vec![write.row()],
            None => self.found(key).into_iter().flatten().collect(),
        }
    }

    pub fn read(&mut self, key: Key, row: Option<Row>) {
        match row {
            Some(row) => self
                .known
                .entry(key)
                .or_insert_with(|| Known { row: row.clone(), is_certain: true })
                .row
                .clone_from(&row),
            None => drop(self.known.remove(&key)),
        }
    }

    /// A locking read, of the newest row.
    pub fn read_locked(&mut self, key: Key, row: Row) {
        self.locked.insert(key);
        self.known.insert(key, Known { row, is_certain: true });
    }

    pub fn expire(&mut self) {
        self.known.clear();
    }

    /// Whether what the session knows was read before its transaction, so that a write reads it again.
    pub fn is_outside(&self) -> bool {
        self.rules.reads_outside && !self.has_written
    }

    /// The session sends something that may write.
    pub fn write_begins(&mut self) {
        if self.is_outside() {
            self.expire();
        }
        self.has_written = true;
    }

    /// The session may read again what it knows.
    pub fn doubt(&mut self) {
        self.known.values_mut().for_each(|known| known.is_certain = false);
    }

    /// After each step: what an autocommit scope did is committed, and was read in no transaction.
    pub fn rest(&mut self) {
        if self.rules.autocommit && !self.has_begun {
            self.commit();
        }
    }

    /// What a flush does.
    pub fn plan(&self) -> Plan {
        let (writes, deletes) = (&self.pending.writes, &self.pending.deletes);
        let mut may_fail = self.rules.refuses_conflicts && self.has_conflicts;
        for (key, write) in writes.iter().filter(|(key, write)| write.sends() && !deletes.contains_key(key)) {
            match self.current.get(*key) {
                // A new row has its key.
                None if self.pending.inserts.iter().any(|insert| insert.key == *key) => may_fail = true,
                None => return Plan::Fails("a row that was written is gone"),
                Some(row) if self.is_conflict(*key, &write.base, row) => {
                    return Plan::Fails("a version that was written is old");
                }
                Some(row) => may_fail |= self.is_other_row(*key, &write.base, row),
            }
        }
        for (key, known) in deletes {
            match self.current.get(*key) {
                None if self.deleted.contains(key) => {}
                None => may_fail = true,
                Some(row) if self.is_conflict(*key, known, row) => {
                    return Plan::Fails("a version that was to be deleted is old");
                }
                Some(row) => may_fail |= self.is_other_row(*key, known, row),
            }
        }
        let end = self.end();
        if end.violates() || self.has_duplicates() {
            if self.rules.reuses_keys && self.pending.inserts.iter().any(|insert| insert.key.0.is_counted()) {
                // A new row may get the key of one that is gone, to which another refers.
                return Plan::May(end);
            }
            return Plan::Fails("a constraint does not hold in the end");
        }
        may_fail |= !self.has_an_order(&end);
        if may_fail { Plan::May(end) } else { Plan::Must(end) }
    }

    /// Whether the row is not the one that the session knows: it has another version, or the known version was rolled
    /// back and then given to another row.
    fn is_conflict(&self, key: Key, known: &Row, row: &Row) -> bool {
        key.0.is_versioned() && (row.version != known.version || known != row && !self.was_committed(key, known))
    }

    /// Whether a committed row of that version was replaced by another one of the same version: deleted, and added
    /// again.
    fn is_other_row(&self, key: Key, known: &Row, row: &Row) -> bool {
        key.0.is_versioned() && known != row
    }

    fn has_duplicates(&self) -> bool {
        let mut keys = BTreeSet::new();
        let is_taken = |key: &Key| self.current.get(*key).is_some() && !self.pending.deletes.contains_key(key);
        self.pending.inserts.iter().any(|insert| !keys.insert(insert.key) || is_taken(&insert.key))
    }

    fn write(rows: &mut Rows, key: Key, write: &Write) {
        if let Some(row) = rows.0.get_mut(&key) {
            let idle = |column: Column| write.is_idle(column) && !write.is_outdated;
            let columns = write.columns.iter().filter(|(column, _)| !idle(**column)).collect::<Vec<_>>();
            columns.iter().for_each(|(column, value)| row.set(**column, **value));
            if key.0.is_versioned() && !columns.is_empty() {
                row.version += 1;
            }
        }
    }

    /// The rows after a flush.
    fn end(&self) -> Rows {
        let mut rows = self.current.clone();
        let deletes = &self.pending.deletes;
        for (key, write) in self.pending.writes.iter().filter(|(key, _)| !deletes.contains_key(key)) {
            Self::write(&mut rows, *key, write);
        }
        deletes.keys().for_each(|key| rows.delete(*key));
        for insert in &self.pending.inserts {
            rows.0.insert(insert.key, insert.row.clone());
        }
        rows
    }

    /// Whether it is not clear what the program wants: a row that it adds or moves would go with a parent that it
    /// deletes.
    pub fn is_unclear(&self) -> bool {
        let mut gone = self.current.clone();
        let deletes = &self.pending.deletes;
        let mut under = Vec::new();
        for (key, write) in self.pending.writes.iter().filter(|(key, _)| !deletes.contains_key(key)) {
            Self::write(&mut gone, *key, write);
            if write.columns.contains_key(&Column::Parent) {
                under.push(*key);
            }
        }
        for insert in &self.pending.inserts {
            gone.0.entry(insert.key).or_insert_with(|| insert.row.clone());
        }
        let before = gone.clone();
        deletes.keys().for_each(|key| gone.delete(*key));
        let is_gone = |key: Key| before.get(key).is_some() && gone.get(key).is_none();
        under.iter().any(|key| is_gone(*key) || parent(*key, before.get(*key)).is_some_and(is_gone))
            || self.pending.inserts.iter().any(|insert| parent(insert.key, Some(&insert.row)).is_some_and(is_gone))
    }

    /// Whether the flush can be sent so that each statement succeeds: some DELETEs, UPDATEs, INSERTs, UPDATEs that need
    /// them, and the other DELETEs.
    fn has_an_order(&self, end: &Rows) -> bool {
        let Pending { inserts, writes, deletes } = &self.pending;
        // That one UPDATE takes the value which another frees is not promised.
        let takes = |key: &Key, write: &Write| {
            let code = write.columns.get(&Column::Code).copied().flatten();
            let frees = |other: &Key| {
                other != key && other.0 == key.0 && self.current.get(*other).is_some_and(|row| row.code == code)
            };
            code.is_some() && writes.keys().any(|other| frees(other) && !deletes.contains_key(other))
        };
        if writes.iter().any(|(key, write)| takes(key, write)) {
            return false;
        }
        let mut steps: Vec<Statement> = inserts.iter().map(Statement::Insert).collect();
        for (key, write) in writes {
            match deletes.contains_key(key) {
                false if !write.sends() => {}
                false => steps.push(Statement::Update(*key, write)),
                true if write.columns.get(&Column::Parent) == Some(&None) => steps.push(Statement::Clear(*key)),
                true => {}
            }
        }
        steps.extend(deletes.keys().map(|key| Statement::Delete(*key)));
        steps.len() <= 7 && self.can_finish(&self.current, &mut steps, 0, end)
    }

    fn can_finish(&self, rows: &Rows, left: &mut Vec<Statement>, phase: u8, end: &Rows) -> bool {
        if left.is_empty() {
            return rows == end;
        }
        for place in 0..left.len() {
            let step = left.remove(place);
            let next = self.after(rows, step, phase);
            if next.is_some_and(|(rows, phase)| self.can_finish(&rows, left, phase, end)) {
                return true;
            }
            left.insert(place, step);
        }
        false
    }

    /// The rows after one step of a flush, and how far the flush is; nothing where that is refused.
    fn after(&self, rows: &Rows, step: Statement, phase: u8) -> Option<(Rows, u8)> {
        let mut after = rows.clone();
        let phase = match step {
            Statement::Insert(insert) => {
                (phase <= 2 && after.0.insert(insert.key, insert.row.clone()).is_none()).then_some(2)
            }
            Statement::Update(key, write) => {
                Self::write(&mut after, key, write);
                (phase <= 3 && rows.get(key).is_some()).then_some(if phase <= 1 { 1 } else { 3 })
            }
            Statement::Clear(key) => {
                if let Some(row) = after.0.get_mut(&key) {
                    row.parent = None;
                }
                Some(phase)
            }
            Statement::Delete(key) => {
                let together = if self.rules.checks_row_by_row { vec![key] } else { self.with_referrers(rows, key) };
                together.iter().for_each(|key| after.delete(*key));
                // Before the UPDATEs, between them and the INSERTs, or at the end.
                Some(if phase <= 1 { phase } else { 4 })
            }
        };
        phase.filter(|_| !after.violates()).map(|phase| (after, phase))
    }

    /// A row that is to be deleted, and those of its table that are to be deleted too and refer to it.
    fn with_referrers(&self, rows: &Rows, key: Key) -> Vec<Key> {
        let deleted = self.pending.deletes.keys().filter(|other| other.0 == key.0);
        deleted.filter(|other| rows.comes_from(**other, key)).copied().collect()
    }

    /// After a flush that led to these rows.
    pub fn flushed(&mut self, end: Rows) {
        let Pending { inserts, writes, deletes } = std::mem::take(&mut self.pending);
        // What was read before the transaction is read again, also what was written then.
        let was_outside = self.is_outside();
        if !(inserts.is_empty() && deletes.is_empty()) || writes.values().any(Write::sends) {
            self.write_begins();
        }
        for (key, write) in writes {
            let (before, after) = (self.current.get(key).cloned(), end.get(key).cloned());
            let (Some(before), Some(after)) = (before, after) else { continue };
            let mut row = write.row();
            row.version = write.base.version + after.version - before.version;
            let is_certain =
                !write.is_outdated && !was_outside && self.known.get(&key).is_none_or(|known| known.is_certain);
            self.known.insert(key, Known { row, is_certain });
        }
        // Children may have gone or have lost their parent, so the session may read them again.
        for table in deletes.keys().map(|key| key.0).collect::<BTreeSet<_>>() {
            let known = self.known.iter_mut().filter(|(key, _)| key.0.descends_from(table));
            known.for_each(|(_, known)| known.is_certain = false);
        }
        let before = self.change(end);
        for key in before.0.keys().filter(|key| before.get(**key) != self.current.get(**key)) {
            let Some(row) = self.current.get(*key) else {
                self.deleted.insert(*key);
                self.known.remove(key);
                continue;
            };
            // The database took the reference away.
            if before.get(*key).is_some_and(|old| old.parent != row.parent)
                && self.known.get(key).is_some_and(|known| known.row.parent != row.parent)
            {
                self.known.remove(key);
            }
        }
        for insert in inserts {
            self.deleted.remove(&insert.key);
            self.known.insert(insert.key, Known { row: insert.row, is_certain: true });
        }
    }

    /// Changes the rows, in the session's transaction; returns the old ones.
    pub fn change(&mut self, rows: Rows) -> Rows {
        let keys: BTreeSet<Key> = self.current.0.keys().chain(rows.0.keys()).copied().collect();
        let level = self.levels.last_mut().expect("there is always the transaction's");
        for key in keys.into_iter().filter(|key| self.current.get(*key) != rows.get(*key)) {
            level.entry(key).or_insert_with(|| self.current.get(key).cloned());
        }
        std::mem::replace(&mut self.current, rows)
    }

    /// The session's transaction has changed a row, if only in what the model does not know of it.
    pub fn note_change(&mut self, key: Key) {
        let row = self.current.get(key).cloned();
        self.levels.last_mut().expect("there is always the transaction's").entry(key).or_insert(row);
    }

    /// The database has made a key.
    pub fn rename(&mut self, old: Key, id: i32) {
        let new = (old.0, id);
        self.deleted.remove(&new);
        if let Some(row) = self.current.0.remove(&old) {
            self.current.0.insert(new, row);
        }
        for (key, row) in &mut self.current.0 {
            if parent(*key, Some(row)) == Some(old) {
                row.parent = Some(id);
            }
        }
        for (key, known) in &mut self.known {
            if parent(*key, Some(&known.row)) == Some(old) {
                known.row.parent = Some(id);
            }
        }
        if let Some(known) = self.known.remove(&old) {
            self.known.insert(new, known);
        }
        for level in &mut self.levels {
            // SQLite gives a key once more when its row is gone: then the level has what was there before.
            if let Some(row) = level.remove(&old) {
                level.entry(new).or_insert(row);
            }
        }
    }

    /// A committed change of another connection.
    pub fn change_elsewhere(&mut self, key: Key, change: impl FnOnce(&mut Rows)) {
        if self.is_changed(key) {
            // It did not see the row.
            return;
        }
        change(&mut self.current);
        self.has_conflicts = self.snapshot.is_some();
        self.committed_ever.extend(self.committed().0);
    }

    /// The write of another connection would make it unclear whether the session's own write has to be sent.
    pub fn is_idle(&self, key: Key) -> bool {
        let idle = |write: &Write| write.columns.keys().any(|column| write.is_idle(*column));
        self.pending.writes.get(&key).is_some_and(idle)
    }

    pub fn open_level(&mut self) {
        self.write_begins();
        self.levels.push(BTreeMap::new());
        self.had_snapshot.push(self.snapshot.is_some());
    }

    pub fn keep_level(&mut self) {
        let level = self.levels.pop().expect("opened before");
        self.had_snapshot.pop();
        let outer = self.levels.last_mut().expect("there is always the transaction's");
        for (key, row) in level {
            outer.entry(key).or_insert(row);
        }
    }

    pub fn undo_level(&mut self) {
        let level = self.levels.pop().expect("opened before");
        restore(&mut self.current, &level);
        // MariaDB ends its snapshot with the savepoint in which the transaction first read. PostgreSQL keeps it.
        if self.had_snapshot.pop() == Some(false) && !self.rules.refuses_conflicts {
            self.snapshot = None;
            self.has_conflicts = false;
        }
        self.pending = Pending::default();
        // What the savepoint had deleted is there again.
        self.deleted.retain(|key| self.current.get(*key).is_none());
        self.expire();
    }

    pub fn commit(&mut self) {
        self.end_transaction();
        self.committed_ever.extend(self.current.0.clone());
    }

    pub fn rollback(&mut self) {
        self.current = self.committed();
        self.pending = Pending::default();
        self.end_transaction();
    }

    fn end_transaction(&mut self) {
        self.levels = vec![BTreeMap::new()];
        self.has_written = false;
        self.locked.clear();
        self.deleted.clear();
        self.snapshot = None;
        self.had_snapshot.clear();
        self.has_conflicts = false;
        self.has_begun = false;
        self.expire();
    }

    /// From here on the transaction sees no more of what others commit.
    pub fn take_snapshot(&mut self) {
        if self.rules.has_snapshot && self.snapshot.is_none() {
            self.snapshot = Some(self.committed());
        }
    }
}

fn restore(rows: &mut Rows, level: &BTreeMap<Key, Option<Row>>) {
    for (key, row) in level {
        match row {
            Some(row) => drop(rows.0.insert(*key, row.clone())),
            None => drop(rows.0.remove(key)),
        }
    }
}

fn parent(key: Key, row: Option<&Row>) -> Option<Key> {
    key.0.parent().zip(row.and_then(|row| row.parent))
}

/// One statement of a flush.
#[derive(Debug, Clone, Copy)]
enum Statement<'p> {
    Insert(&'p Insert),
    Update(Key, &'p Write),
    /// A reference of a row that is to be deleted is set to NULL.
    Clear(Key),
    Delete(Key),
}
