//! A `create_all` or `drop_all` under way.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use diesel::QueryResult;
use diesel::migration::CREATE_MIGRATIONS_TABLE;
use diesel::result::Error as DieselError;

use super::channel::Channel;
use super::reversal::{EMPTY_FILE, ends_its_transaction, has_no_way_back};
use super::{Known, Trouble, applied, caught};
use crate::app::App;
use crate::connection::SessionConnection;
use crate::dialect::{BEGIN, Beginning, State, TRY_LOCK_IN_TRANSACTION, is_connection_lost, needs_too_many_locks};
use crate::error::{Error, MigrationFailure, MigrationOutcome, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::{CheckedOut, Reading, WritePermit};
use crate::wording::phrase;

/// How long a schema operation waits for another session's locks where the configuration does not say.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long it waits for another `create_all` or `drop_all` to finish.
const TURN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long it waits for a second connection by which a pooler is recognised.
const SECOND_CONNECTION: Duration = Duration::from_secs(1);

/// How long to wait before the lock is asked for again, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));

/// What a migration has left behind is the difference of two of these.
type Inventory = Vec<Option<String>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// One connection, the lock held on it, and what has been done so far.
///
/// On PostgreSQL the connection is in a transaction from the moment at which it takes the lock to the moment at which it gives the
/// lock back: a commit and the next `BEGIN` are one message. So a pooler in transaction mode never gives the session of the server,
/// and the lock with it, to another client. Only a migration that is not to run in a transaction needs a connection without a
/// pooler.
pub(super) struct Change<'a, C: SessionConnection> {
    app: &'a App<C>,
    operation: &'static str,
    at: Place,
    kind: DatabaseKind,
    plan: Vec<Known<C>>,
    /// `None` after the connection was lost.
    pooled: Option<CheckedOut<C>>,
    /// SQLite's writers of this process.
    _turn: Option<WritePermit>,
    lock_timeout: Duration,
    started: Instant,
    done: Vec<String>,
    /// Something may have been changed in the transaction that is open.
    changed: bool,
    /// Whether the lock is held.
    locked: bool,
    /// The connection as it came from the pool, if the operation's limits were set for the session.
    original: Option<State>,
    /// The connection before each migration.
    before: State,
    /// `search_path` while a migration is reverted.
    path: Option<String>,
    /// What the schema consisted of before the migration that is under way sent a text that ends its transaction.
    before_ending: Option<Inventory>,
    /// The migration that is under way names the bookkeeping table.
    names_bookkeeping: bool,
}

impl<'a, C: SessionConnection> Change<'a, C> {
    pub(super) fn start(app: &'a App<C>, operation: &'static str, at: Place) -> Result<Self> {
        let mut plan = app.known_migrations()?;
        let pool = app.pool()?;
        let mine = pool.holders().on_this_thread();
        if !mine.is_empty() {
            return Err(Error::TransactionOpen { app: app.id().into(), operation, holders: mine });
        }
        let pooled = pool.acquire(at, false, None)?;
        let turn = pooled.pool().turn_to_write(at, None)?;
        let options = app.options();
        let kind = options.target.kind;
        if operation == "drop_all" && kind != DatabaseKind::Mysql && options.pinned.is_none() {
            // After its `COMMIT` or `ROLLBACK` nothing holds that was set or done for the transaction, `search_path` included.
            for known in plan.iter_mut().filter(|known| known.in_transaction) {
                known.in_transaction = !ends_its_transaction(&*known.migration, kind);
            }
        }
        let mut change = Change {
            app,
            operation,
            at,
            kind,
            plan,
            pooled: Some(pooled),
            _turn: turn,
            lock_timeout: options.config.lock_timeout.unwrap_or(LOCK_TIMEOUT),
            started: Instant::now(),
            done: Vec::new(),
            changed: false,
            locked: false,
            original: None,
            before: State::default(),
            path: None,
            before_ending: None,
            names_bookkeeping: false,
        };
        // Until it is finished in order: with the connection, whatever it has locked goes too.
        change.pooled().doom();
        if change.is_chained() {
            change.refuse_pooler()?;
            change.lock()?;
            let limits = change.kind.local_limits(change.lock_timeout);
            change.send(&limits)?;
            change.before = change.state()?;
            return Ok(change);
        }
        change.original = Some(change.state()?);
        change.lock()?;
        for limit in change.kind.begin_limits(change.lock_timeout) {
            change.send(&limit)?;
        }
        if change.is_inside() {
            let begun = change.kind.begin_inside(change.conn(), Beginning::plain(), None);
            change.told(begun)?;
        }
        change.before = change.state()?;
        Ok(change)
    }

    /// Whether everything is inside of a transaction that a test never commits.
    fn is_inside(&self) -> bool {
        self.app.options().pinned.is_some()
    }

    /// Whether the connection stays in a transaction between two migrations.
    fn is_chained(&self) -> bool {
        self.kind == DatabaseKind::Postgres && !self.is_inside()
    }

    fn pooled(&mut self) -> &mut CheckedOut<C> {
        self.pooled.as_mut().expect("nothing is sent after the connection was lost")
    }

    fn conn(&mut self) -> &mut C {
        self.pooled().conn()
    }

    /// The levels that are open where no migration is under way.
    fn base(&self) -> u32 {
        u32::from(self.is_inside() || self.is_chained())
    }

    fn depth(&mut self) -> Option<u32> {
        self.conn().depth()
    }

    /// An answer of the server to a statement of the operation's own.
    fn told<T>(&mut self, answer: QueryResult<T>) -> Result<T> {
        answer.map_err(|error| match is_connection_lost(&error) {
            true => self.lost(None, "a statement of its own", Trouble::of_query(&error), &[]),
            false => Error::from_query(error, self.at),
        })
    }

    fn send(&mut self, sql: &str) -> Result<()> {
        let sent = self.conn().batch_execute(sql);
        self.told(sent)
    }

    fn texts(&mut self, sql: &str) -> Result<Inventory> {
        let answer = self.conn().texts(sql);
        self.told(answer)
    }

    fn state(&mut self) -> Result<State> {
        let query = self.kind.state();
        self.texts(query).map(State::read)
    }

    fn applied(&mut self, state: &State) -> Result<Vec<String>> {
        let kind = self.kind;
        let applied = applied(self.conn(), kind, state);
        self.told(applied)
    }

    /// MySQL commits every change of the schema, and the look whether there is a bookkeeping table too.
    fn refuse_inside(&mut self) -> Result<()> {
        let before = self.before.clone();
        let applied = self.applied(&before)?;
        if self.operation == "create_all" && self.plan.iter().all(|known| applied.contains(&known.version)) {
            return Ok(());
        }
        let app = self.app.id().into();
        let cause = format!(
            "{} would be committed, as {} commits every change of the schema",
            self.operation,
            self.kind.name()
        );
        if let Some(pinned) = &self.app.options().pinned {
            pinned.poison(&cause, Some(self.at));
        }
        Err(Error::TestSpoiled { app, cause, at: Some(self.at) })
    }

    /// A migration that does not run in one transaction needs one session of the server from the lock to its end. A pooler in
    /// transaction mode gives another one to each transaction, or the same one to two clients in turn.
    fn refuse_pooler(&mut self) -> Result<()> {
        if self.plan.iter().all(|known| known.in_transaction) {
            return Ok(());
        }
        let begun = self.conn().begin_with(BEGIN);
        self.told(begun)?;
        let state = self.state()?;
        let applied = self.applied(&state)?;
        let ended = self.conn().leave_with("ROLLBACK");
        self.told(ended)?;
        let process = state.process().map(str::to_owned);
        self.original = Some(state);
        let is_next = |known: &&Known<C>| applied.contains(&known.version) != (self.operation == "create_all");
        let mut next = self.plan.iter().filter(|known| !known.in_transaction).filter(is_next);
        let Some(name) = next.next().map(|known| known.name.clone()) else { return Ok(()) };
        if self.process()? == process && !self.shares_its_session(process.as_deref())? {
            return Ok(());
        }
        let detail = format!(
            "Migration {} does not run in one transaction, so its lock would stay with the pooler. Nothing was changed.",
            phrase(name)
        );
        Err(Error::PooledConnection { app: self.app.id().into(), operation: self.operation, detail })
    }

    /// The server's process of the connection in its next transaction.
    fn process(&mut self) -> Result<Option<String>> {
        let begun = self.conn().begin_with(BEGIN);
        self.told(begun)?;
        let state = self.state()?;
        let ended = self.conn().leave_with("ROLLBACK");
        self.told(ended)?;
        Ok(state.process().map(str::to_owned))
    }

    /// Whether a second connection, if there is one to be had, meets the session of the first, or takes it away.
    fn shares_its_session(&mut self, process: Option<&str>) -> Result<bool> {
        let deadline = Instant::now() + SECOND_CONNECTION;
        let second = self.app.pool().and_then(|pool| pool.acquire(self.at, true, Some(deadline)));
        let Ok(mut second) = second else { return Ok(false) };
        let query = self.kind.state();
        let asked = second.conn().begin_with(BEGIN).and_then(|()| second.conn().texts(query));
        let met = asked.is_ok_and(|rows| State::read(rows).process() == process);
        // A pooler with one session has none left for the first connection while the second is in a transaction.
        let moved = !met && self.process()?.as_deref() != process;
        if second.conn().leave_with("ROLLBACK").is_err() {
            second.doom();
        }
        Ok(met || moved)
    }

    /// Waits for other schema operations, of this process and of others. On PostgreSQL the lock is taken in a transaction, which
    /// stays open.
    fn lock(&mut self) -> Result<()> {
        let Some(sql) = self.kind.try_lock_schema(&self.app.options().target.database) else { return Ok(()) };
        let deadline = Instant::now() + TURN_TIMEOUT;
        let mut pause = PAUSES.0;
        loop {
            if self.is_chained() {
                let begun = self.conn().begin_with(BEGIN);
                self.told(begun)?;
            }
            let answer = self.texts(&sql)?;
            if is(&answer, "1") {
                self.locked = true;
                return Ok(());
            }
            if Instant::now() >= deadline {
                let holders = self.kind.schema_lock_holders(&self.app.options().target.database);
                return Err(Error::LockTimeout {
                    app: self.app.id().into(),
                    operation: self.operation,
                    waited: TURN_TIMEOUT,
                    message: "another create_all or drop_all is at work on this database".into(),
                    blockers: self.pooled().blockers(&holders),
                    left: "Nothing was changed.".into(),
                    at: self.at,
                });
            }
            if self.is_chained() {
                let ended = self.conn().leave_with("ROLLBACK");
                self.told(ended)?;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Gives the lock back; whether this session of the server had it. On PostgreSQL it ends the transaction.
    fn unlock(&mut self) -> QueryResult<bool> {
        let Some(sql) = self.kind.unlock_schema(&self.app.options().target.database) else { return Ok(true) };
        let (locked, chained) = (std::mem::take(&mut self.locked), self.is_chained());
        let conn = self.conn();
        if chained && conn.depth() == Some(0) {
            conn.begin_with(BEGIN)?;
        }
        let had_it = !locked || is(&conn.texts(&sql)?, if self.kind == DatabaseKind::Mysql { "1" } else { "true" });
        if chained {
            self.conn().leave_with("COMMIT")?;
        }
        Ok(had_it)
    }

    pub(super) fn create(&mut self) -> Result<()> {
        if self.kind == DatabaseKind::Mysql && self.is_inside() {
            return self.refuse_inside();
        }
        if self.kind == DatabaseKind::Sqlite {
            return self.create_one_by_one();
        }
        let applied = self.applied_after_setup()?;
        for index in 0..self.plan.len() {
            if !applied.contains(&self.plan[index].version) {
                self.apply(index)?;
            }
        }
        Ok(())
    }

    /// SQLite has no lock but that of writing: each migration is looked for and applied in one transaction.
    fn create_one_by_one(&mut self) -> Result<()> {
        loop {
            self.begin_to_write()?;
            let applied = self.applied_after_setup()?;
            let next = (0..self.plan.len()).find(|&index| !applied.contains(&self.plan[index].version));
            let Some(index) = next else {
                return self.commit();
            };
            if !self.plan[index].in_transaction {
                self.commit()?;
            }
            self.apply(index)?;
        }
    }

    fn apply(&mut self, index: usize) -> Result<()> {
        self.before_ending = None;
        let before = self.inventory(index);
        self.changes();
        let outcome = self.enter(index).and_then(|()| self.run(index, Direction::Up));
        self.changes();
        let outcome = outcome.and_then(|()| self.note(index, Direction::Up, true));
        self.changes();
        match outcome {
            Ok(()) => {
                self.done.push(self.plan[index].version.clone());
                Ok(())
            }
            Err(trouble) => Err(self.failed(Some(index), "", trouble, &before)),
        }
    }

    /// Begins what the migration runs in.
    fn enter(&mut self, index: usize) -> Result<(), Trouble> {
        let in_transaction = self.plan[index].in_transaction;
        let entered = match (self.is_chained(), in_transaction) {
            (true, true) => Ok(()),
            (true, false) => self.leave_chain(),
            (false, true) if self.depth() == Some(self.base()) => self.begin_level(),
            (false, _) => Ok(()),
        };
        entered.map_err(|error| Trouble::of_query(&error))
    }

    /// The limits are the session's until the operation ends.
    fn leave_chain(&mut self) -> QueryResult<()> {
        self.conn().leave_with("COMMIT")?;
        let limits = self.kind.begin_limits(self.lock_timeout);
        limits.iter().try_for_each(|limit| self.conn().batch_execute(limit))
    }

    fn begin_level(&mut self) -> QueryResult<()> {
        match self.kind {
            DatabaseKind::Sqlite if !self.is_inside() => self.conn().begin_with("BEGIN IMMEDIATE"),
            _ => self.conn().begin_level(),
        }
    }

    /// Runs the migration itself.
    fn run(&mut self, index: usize, direction: Direction) -> Result<(), Trouble> {
        let kind = self.kind;
        if let Some(path) = self.path.as_ref().filter(|_| direction == Direction::Down) {
            let local = if self.plan[index].in_transaction { "LOCAL " } else { "" };
            let set = format!("SET {local}search_path = {path}");
            self.conn().batch_execute(&set).map_err(|error| Trouble::of_query(&error))?;
        }
        let others = if direction == Direction::Down { self.objects_elsewhere()? } else { Vec::new() };
        let migration = &*self.plan[index].migration;
        let managed = self.pooled.as_mut().expect("nothing is sent after the connection was lost").managed();
        managed.observer.read_statements(Reading::Raw);
        let mut channel = Channel { conn: managed.take_out(), kind, said: None, sent: Vec::new(), before_ending: None };
        let ran = caught(|| match direction {
            Direction::Up => migration.run(&mut channel),
            Direction::Down => migration.revert(&mut channel),
        });
        let Channel { conn, said, sent, before_ending, .. } = channel;
        managed.put_back(conn);
        managed.observer.stop_reading();
        self.before_ending = before_ending;
        self.names_bookkeeping = sent.iter().any(|sql| sql.to_lowercase().contains("__diesel_schema_migrations"));
        if self.before_ending.is_some()
            && kind == DatabaseKind::Sqlite
            && self.plan[index].in_transaction
            && !self.is_inside()
        {
            // It has ended the transaction itself, and is noted in one of its own. There may be one of its own already.
            let _ = self.conn().batch_execute("BEGIN IMMEDIATE");
        }
        match ran {
            // Of a file without a single character Diesel sends nothing.
            Err(trouble) if direction == Direction::Up && trouble.message.contains(EMPTY_FILE) => Ok(()),
            Err(mut trouble) => {
                let said = said.unwrap_or_default();
                if !trouble.message.contains(&said.more) {
                    trouble.message.push_str(&said.more);
                }
                trouble.lost |= said.lost;
                trouble.out_of_locks |= said.out_of_locks;
                Err(trouble)
            }
            Ok(()) => self.spares_others(&others, &sent),
        }
    }

    /// What temporary and attached databases of SQLite consist of: a name without a database means one of theirs where the main
    /// database has no such table.
    fn objects_elsewhere(&mut self) -> Result<Vec<(String, Inventory)>, Trouble> {
        let Some(query) = self.kind.other_databases() else { return Ok(Vec::new()) };
        let kind = self.kind;
        let conn = self.conn();
        let read = conn.texts(query).and_then(|names| {
            let each = names.into_iter().flatten().map(|name| {
                let objects = conn.texts(&kind.objects_of(&name))?;
                Ok((name, objects))
            });
            each.collect::<QueryResult<Vec<_>>>()
        });
        read.map_err(|error| Trouble::of_query(&error))
    }

    /// An error if a migration has changed another database that its SQL does not name.
    fn spares_others(&mut self, before: &[(String, Inventory)], sent: &[String]) -> Result<(), Trouble> {
        if before.is_empty() {
            return Ok(());
        }
        let now = self.objects_elsewhere()?;
        for ((database, before), (_, now)) in before.iter().zip(&now) {
            let named = format!("{}.", database.to_lowercase());
            let is_named = sent.iter().any(|sql| sql.to_lowercase().replace(['"', '`', '[', ']'], "").contains(&named));
            if before != now && !is_named {
                let message = format!(
                    "it would change the database `{database}` of the connection, which its SQL does not name: {}",
                    list(&difference(before, now))
                );
                return Err(Trouble { message, ..Trouble::default() });
            }
        }
        Ok(())
    }

    /// Puts the connection's settings back and notes the migration as applied or reverted.
    fn note(&mut self, index: usize, direction: Direction, commit: bool) -> Result<(), Trouble> {
        self.note_it(index, direction, commit).map_err(|error| Trouble::of_query(&error))
    }

    fn note_it(&mut self, index: usize, direction: Direction, commit: bool) -> QueryResult<()> {
        let (kind, in_transaction) = (self.kind, self.plan[index].in_transaction);
        let begin = kind.begin_limited(self.lock_timeout);
        if self.is_chained() && in_transaction {
            if self.depth() == Some(0) {
                // It has ended the transaction itself, and what it did is committed.
                self.conn().begin_with(&begin)?;
            }
            // What waits for the commit is done with the migration's settings.
            self.conn().batch_execute("SET CONSTRAINTS ALL IMMEDIATE")?;
            if !commit {
                self.defer_again()?;
            }
        }
        let now = State::read(self.conn().texts(kind.state())?);
        for sql in kind.restore(&self.before, &now) {
            self.conn().batch_execute(&sql)?;
        }
        let table = kind.bookkeeping(self.before.schema());
        let version = kind.literal(&self.plan[index].version);
        let noted = match direction {
            Direction::Up => format!("INSERT INTO {table} (version) VALUES ({version})"),
            Direction::Down if kind == DatabaseKind::Postgres => {
                format!("DELETE FROM {table} WHERE version OPERATOR(pg_catalog.=) {version}")
            }
            Direction::Down => format!("DELETE FROM {table} WHERE version = {version}"),
        };
        if !self.is_chained() {
            if kind == DatabaseKind::Mysql && self.names_bookkeeping {
                // A temporary table of that name would take the row, whatever database is named.
                self.conn().batch_execute(&format!("DROP TEMPORARY TABLE IF EXISTS {table}"))?;
            }
            self.conn().batch_execute(&noted)?;
            return if commit && in_transaction { self.conn().commit_level() } else { Ok(()) };
        }
        if in_transaction && commit {
            return self.conn().batch_execute(&format!("{noted}; COMMIT; {begin}"));
        }
        self.conn().batch_execute(&noted)?;
        if in_transaction {
            return Ok(());
        }
        if self.depth() != Some(0) {
            self.conn().leave_with("COMMIT")?;
        }
        self.conn().begin_with(&begin)
    }

    /// Several migrations are reverted in one transaction: for the next one constraints are as they are at its beginning.
    fn defer_again(&mut self) -> QueryResult<()> {
        let query = self.kind.deferred_constraints(self.before.schema().unwrap_or_default());
        let names: Vec<String> = self.conn().texts(&query)?.into_iter().flatten().collect();
        match names.is_empty() {
            true => Ok(()),
            false => self.conn().batch_execute(&format!("SET CONSTRAINTS {} DEFERRED", names.join(", "))),
        }
    }

    pub(super) fn drop_everything(&mut self) -> Result<()> {
        if self.kind == DatabaseKind::Mysql && self.is_inside() {
            return self.refuse_inside();
        }
        if let Some(missing) = self.before.missing_schema().filter(|_| self.kind == DatabaseKind::Postgres) {
            let reason = format!(
                "drop_all reverts nothing, as `{}`, the first schema of search_path, does not exist or may not be used; {}",
                phrase(missing),
                match self.before.schema() {
                    Some(schema) => format!(
                        "the names of the migrations would mean the tables of `{}`. Correct search_path, or create the schema",
                        phrase(schema)
                    ),
                    None => "correct search_path, or create it".into(),
                }
            );
            return Err(Error::InvalidConfig { app: self.app.id().into(), reason });
        }
        let atomic_start = self.kind == DatabaseKind::Sqlite;
        if atomic_start {
            self.begin_to_write()?;
        }
        let before = self.before.clone();
        let Some(schema) = before.schema().map(str::to_owned) else { return Ok(()) };
        let exists = self.texts(&self.kind.has_bookkeeping(&schema))?;
        if exists.is_empty() {
            return if atomic_start { self.commit() } else { Ok(()) };
        }
        let applied = self.applied(&before)?;
        let order = self.order_of_reverting(&applied)?;
        self.warn(order.len());
        self.limit_path(&schema)?;
        let in_transactions = order.iter().all(|&index| self.plan[index].in_transaction);
        let atomic = match self.kind {
            DatabaseKind::Mysql => false,
            DatabaseKind::Sqlite => in_transactions,
            DatabaseKind::Postgres => in_transactions && (self.is_inside() || !self.is_too_large(&schema)?),
        };
        match (self.kind, atomic) {
            (DatabaseKind::Mysql, _) => self.meet_blockers()?,
            (DatabaseKind::Sqlite, false) => self.commit()?,
            (DatabaseKind::Postgres, true) if self.is_inside() => {
                let begun = self.conn().begin_level();
                self.told(begun)?;
            }
            _ => {}
        }
        if atomic {
            match self.revert_all(&order, true)? {
                Reverted::All => return Ok(()),
                // Nothing of it remains, and one by one they need fewer locks.
                Reverted::OutOfLocks => {}
            }
        }
        self.revert_all(&order, false).map(drop)
    }

    fn revert_all(&mut self, order: &[usize], atomic: bool) -> Result<Reverted> {
        for &index in order {
            if let Reverted::OutOfLocks = self.revert(index, atomic)? {
                return Ok(Reverted::OutOfLocks);
            }
        }
        let bookkeeping = format!("DROP TABLE {}", self.kind.bookkeeping(self.before.schema()));
        self.changes();
        let dropped = self.conn().batch_execute(&bookkeeping);
        self.changes();
        let ended = dropped.and_then(|()| match (self.is_chained(), atomic) {
            (true, _) => {
                let begin = self.kind.begin_limited(self.lock_timeout);
                self.conn().batch_execute(&format!("COMMIT; {begin}"))
            }
            (false, true) => self.conn().commit_level(),
            (false, false) => Ok(()),
        });
        self.changes();
        match ended {
            Ok(()) => Ok(Reverted::All),
            Err(error) => {
                let trouble = Trouble::of_query(&error);
                if atomic && trouble.out_of_locks && !trouble.lost {
                    return self.without_atomicity(trouble);
                }
                if atomic {
                    self.done.clear();
                }
                Err(self.failed(None, REMOVAL, trouble, &[]))
            }
        }
    }

    /// Undoes the one transaction in which everything was to be reverted.
    fn without_atomicity(&mut self, trouble: Trouble) -> Result<Reverted> {
        self.done.clear();
        match self.roll_back() {
            Ok(()) => Ok(Reverted::OutOfLocks),
            Err(_) => Err(self.failed(None, "the rollback", trouble, &[])),
        }
    }

    /// The log tells what is about to be removed, and by whom.
    fn warn(&self, migrations: usize) {
        let options = self.app.options();
        if migrations == 0 || options.is_of_test || options.target.in_memory {
            return;
        }
        crate::wording::log_line!(
            warn,
            "diesel_session::schema",
            "app `{}`: drop_all, called at {}, reverts {migrations} migrations and removes their tables from {}",
            self.app.id(),
            self.at,
            options.target.shown
        );
    }

    /// While a migration is reverted a name without a schema means something of the own schema, or of an extension.
    fn limit_path(&mut self, schema: &str) -> Result<()> {
        let Some(query) = self.kind.extension_schemas() else { return Ok(()) };
        let mut path = vec![self.kind.quote(schema)];
        path.extend(self.texts(query)?.into_iter().flatten().map(|name| self.kind.quote(&name)));
        path.push("pg_temp".into());
        self.path = Some(path.join(", "));
        Ok(())
    }

    /// Whether the removal of the whole schema may need more locks than the server has.
    fn is_too_large(&mut self, schema: &str) -> Result<bool> {
        let Some(query) = self.kind.locks_of_schema(schema) else { return Ok(false) };
        let answer = self.texts(&query)?;
        Ok(answer.into_iter().flatten().any(|answer| needs_too_many_locks(&answer)))
    }

    /// The applied migrations, the newest first; an error where one of them cannot be reverted.
    fn order_of_reverting(&self, applied: &[String]) -> Result<Vec<usize>> {
        let (mut order, mut unknown, mut irreversible) = (Vec::new(), Vec::new(), Vec::new());
        for applied in applied {
            match self.plan.iter().position(|known| known.version == *applied) {
                None => unknown.push(applied.clone()),
                Some(index) if has_no_way_back(&*self.plan[index].migration, self.kind) => {
                    irreversible.push(self.plan[index].name.clone())
                }
                Some(index) => order.push(index),
            }
        }
        if unknown.is_empty() && irreversible.is_empty() {
            Ok(order)
        } else {
            Err(Error::NotReversible { app: self.app.id().into(), unknown, irreversible })
        }
    }

    /// MySQL commits each DDL statement, so it is met before the first one whether another session is in the way. An account that
    /// may not lock tables finds out at the first statement that waits.
    fn meet_blockers(&mut self) -> Result<()> {
        let kind = self.kind;
        let tables = self.texts(kind.tables())?;
        let list: Vec<String> = tables.iter().flatten().map(|table| format!("{} WRITE", kind.quote(table))).collect();
        if list.is_empty() {
            return Ok(());
        }
        let Err(error) = self.conn().batch_execute(&format!("LOCK TABLES {}", list.join(", "))) else {
            return self.send("UNLOCK TABLES");
        };
        if is_connection_lost(&error) || kind.is_lock_timeout(&error.to_string()) {
            return Err(self.failed(None, "locking all tables", Trouble::of_query(&error), &[]));
        }
        let app = self.app.id();
        crate::wording::log_line!(
            debug,
            "diesel_session::schema",
            "app `{app}`: the tables could not be locked first: {}",
            phrase(error)
        );
        Ok(())
    }

    fn revert(&mut self, index: usize, atomic: bool) -> Result<Reverted> {
        self.before_ending = None;
        let before = self.inventory(index);
        self.changes();
        let outcome = if atomic { Ok(()) } else { self.enter(index) };
        let outcome = outcome.and_then(|()| self.run(index, Direction::Down));
        self.changes();
        let outcome = outcome.and_then(|()| self.note(index, Direction::Down, !atomic));
        self.changes();
        match outcome {
            Ok(()) => {
                self.done.push(self.plan[index].version.clone());
                Ok(Reverted::All)
            }
            Err(trouble) if atomic && trouble.out_of_locks && !trouble.lost && !self.is_inside() => {
                self.without_atomicity(trouble)
            }
            Err(trouble) => {
                if atomic {
                    // The transaction around all of them is rolled back.
                    self.done.clear();
                }
                Err(self.failed(Some(index), "", trouble, &before))
            }
        }
    }

    /// Before a change, so that no connection of the old schema is checked out while it takes effect, and after it, for those that were
    /// opened meanwhile.
    fn changes(&mut self) {
        self.changed = true;
        if let Some(pooled) = &mut self.pooled {
            pooled.schema_changes();
        }
    }

    /// What the schema consists of; nothing where a failure of that migration leaves nothing behind.
    fn inventory(&mut self, index: usize) -> Inventory {
        if self.kind != DatabaseKind::Mysql && self.plan[index].in_transaction {
            return Vec::new();
        }
        self.texts_or_none(self.kind.inventory())
    }

    fn texts_or_none(&mut self, query: &str) -> Inventory {
        self.conn().texts(query).unwrap_or_default()
    }

    /// Undoes what is open. On PostgreSQL the next transaction begins.
    fn roll_back(&mut self) -> QueryResult<()> {
        let (base, begin) = (self.base(), self.kind.begin_limited(self.lock_timeout));
        if self.is_chained() {
            return match self.depth() {
                Some(0) => self.conn().begin_with(&begin),
                Some(_) => self.conn().batch_execute(&format!("ROLLBACK; {begin}")),
                None => Err(DieselError::BrokenTransactionManager),
            };
        }
        while self.depth().ok_or(DieselError::BrokenTransactionManager)? > base {
            self.conn().rollback_level()?;
        }
        Ok(())
    }

    /// A failure as an error: a lock that was not to be had, the loss of the connection, or the step's own. Without an index it is a
    /// step that is no migration.
    fn failed(&mut self, index: Option<usize>, step: &str, mut trouble: Trouble, before: &[Option<String>]) -> Error {
        let undone = self.roll_back();
        // It ended its transaction itself, so what came before is kept.
        let before_ending = self.before_ending.take();
        let before = before_ending.as_deref().unwrap_or(before);
        if trouble.lost || undone.is_err_and(|error| is_connection_lost(&error)) {
            return self.lost(index, step, trouble, before);
        }
        let is_kept = before_ending.is_some();
        let left_behind = index.map(|index| match is_kept {
            true => difference(before, &self.texts_or_none(self.kind.inventory())),
            false => difference(before, &self.inventory(index)),
        });
        let left_behind = left_behind.unwrap_or_default();
        let name = index.map_or_else(|| step.to_owned(), |index| self.plan[index].name.clone());
        trouble.message = trouble.message.trim_end().replace('\n', " ");
        if self.kind.is_lock_timeout(&trouble.message) {
            let done = self.kept();
            let mut left = Vec::new();
            if !done.is_empty() {
                left.push(format!("Done before it, and kept: {}.", list(&done)));
            }
            if !left_behind.is_empty() {
                left.push(format!("Left of {name}: {}.", list(&left_behind)));
            }
            if left.is_empty() {
                left.push("The schema is as it was.".into());
            }
            // Whoever asks for blockers ends the transaction.
            if self.is_chained() && self.unlock().is_err() {
                self.pooled().doom();
            }
            let blockers = self.kind.blockers(self.lock_timeout);
            return Error::LockTimeout {
                app: self.app.id().into(),
                operation: self.operation,
                waited: self.started.elapsed(),
                message: trouble.message,
                blockers: self.pooled().blockers(&blockers),
                left: left.join(" "),
                at: self.at,
            };
        }
        Error::Migration(Box::new(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: name,
            message: trouble.message,
            done: self.kept(),
            left_behind,
            outcome: MigrationOutcome::NotDone,
            connection_lost: false,
            is_migration: index.is_some(),
            of_test_database: false,
            advice: None,
        }))
    }

    /// What was done and stays so. Inside of a test's transaction all of a failed operation is undone.
    fn kept(&self) -> Vec<String> {
        if self.is_inside() { Vec::new() } else { self.done.clone() }
    }

    /// The connection was lost: what became of the step is asked on another one.
    fn lost(&mut self, index: Option<usize>, step: &str, trouble: Trouble, before: &[Option<String>]) -> Error {
        if let Some(mut pooled) = self.pooled.take() {
            let managed = pooled.managed();
            managed.lost = true;
            managed.doomed = true;
        }
        // What is inside of a test's transaction is never committed, and a statement of the operation's own changes nothing.
        let decides = !self.is_inside() && (index.is_some() || step == REMOVAL);
        let (outcome, left_behind) = match decides.then(|| self.ask_again(index)) {
            None => (MigrationOutcome::NotDone, Vec::new()),
            Some(Some((true, _))) => (MigrationOutcome::Done, Vec::new()),
            Some(Some((false, now))) => (MigrationOutcome::NotDone, difference(before, &now)),
            Some(None) => (MigrationOutcome::Unknown, Vec::new()),
        };
        let name = index.map_or_else(|| step.to_owned(), |index| self.plan[index].name.clone());
        Error::Migration(Box::new(MigrationFailure {
            app: self.app.id().into(),
            operation: self.operation,
            migration: name,
            message: trouble.message.trim_end().replace('\n', " "),
            done: self.kept(),
            left_behind,
            outcome,
            connection_lost: true,
            is_migration: index.is_some(),
            of_test_database: false,
            advice: None,
        }))
    }

    /// Whether the step is done, and what the schema consists of now. The old session of the server has ended when its lock is free.
    fn ask_again(&mut self, index: Option<usize>) -> Option<(bool, Inventory)> {
        let mut pooled = self.app.pool().ok()?.acquire(self.at, false, None).ok()?;
        pooled.doom();
        let (kind, target) = (self.kind, &self.app.options().target);
        let deadline = Instant::now() + self.app.options().config.acquire_timeout;
        let conn = pooled.conn();
        if let Some(own) = kind.try_lock_schema(&target.database) {
            let sql = if kind == DatabaseKind::Postgres { TRY_LOCK_IN_TRANSACTION } else { &*own };
            let mut pause = PAUSES.0;
            loop {
                if kind == DatabaseKind::Postgres {
                    conn.begin_with(BEGIN).ok()?;
                }
                if is(&conn.texts(sql).ok()?, "1") {
                    break;
                }
                if kind == DatabaseKind::Postgres {
                    conn.leave_with("ROLLBACK").ok()?;
                }
                if Instant::now() >= deadline {
                    return None;
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSES.1);
            }
        }
        let state = State::read(conn.texts(kind.state()).ok()?);
        let applied = applied(conn, kind, &state).ok()?;
        let done = match index.map(|index| applied.contains(&self.plan[index].version)) {
            Some(applied) => applied == (self.operation == "create_all"),
            None => conn.texts(&kind.has_bookkeeping(state.schema()?)).ok()?.is_empty(),
        };
        let needs_inventory =
            index.is_some_and(|index| kind == DatabaseKind::Mysql || !self.plan[index].in_transaction);
        let now = if needs_inventory { conn.texts(kind.inventory()).ok()? } else { Vec::new() };
        Some((done, now))
    }

    fn begin_to_write(&mut self) -> Result<()> {
        let begun = self.begin_level();
        begun.map_err(|error| self.failed(None, "the beginning of a transaction", Trouble::of_query(&error), &[]))
    }

    fn commit(&mut self) -> Result<()> {
        let committed = self.conn().commit_level();
        // Nobody saw the change before this.
        if self.changed {
            self.changes();
        }
        committed.map_err(|error| self.failed(None, "the commit", Trouble::of_query(&error), &[]))
    }

    /// The applied versions, after the bookkeeping table was made if there was none.
    fn applied_after_setup(&mut self) -> Result<HashSet<String>> {
        let before = self.before.clone();
        let exists = match before.schema() {
            Some(schema) => !self.texts(&self.kind.has_bookkeeping(schema))?.is_empty(),
            None => false,
        };
        if !exists {
            let table = match self.kind {
                // Made in the main database whatever temporary tables there are, and with Diesel's own text.
                DatabaseKind::Sqlite => "__diesel_schema_migrations".to_owned(),
                kind => kind.bookkeeping(before.schema()),
            };
            self.send(&CREATE_MIGRATIONS_TABLE.replacen("__diesel_schema_migrations", &table, 1))?;
            if self.is_chained() {
                let begin = self.kind.begin_limited(self.lock_timeout);
                self.send(&format!("COMMIT; {begin}"))?;
            }
        }
        Ok(self.applied(&before)?.into_iter().collect())
    }

    /// Keeps what was done inside of a test's transaction, or undoes it.
    fn leave(&mut self, outcome: Result<()>) -> Result<()> {
        if self.pooled.is_none() {
            return outcome;
        }
        let kind = self.kind;
        let had_orphans = self.app.options().pinned.as_ref().is_some_and(|pinned| pinned.had_orphans());
        let kept = outcome.and_then(|()| {
            let kept = kind.commit_inside(self.conn(), had_orphans);
            kept.map_err(|error| Error::from_query(error, self.at))
        });
        if kept.is_err() {
            self.done.clear();
            kind.undo_inside(self.conn());
        }
        kept
    }

    /// Gives the connection back as it was; after an error it is closed.
    pub(super) fn finish(mut self, outcome: Result<()>) -> Result<Vec<String>> {
        let mut outcome = if self.is_inside() { self.leave(outcome) } else { outcome };
        if self.pooled.is_some() {
            let process = self.before.process().map(str::to_owned);
            let unlocked = self.unlock();
            if outcome.is_ok() && matches!(unlocked, Ok(false)) {
                let detail = format!(
                    "Its lock stays with the pooler until that closes its connection{}. Done: {}.",
                    process.map(|process| format!(" to the server's process {process}")).unwrap_or_default(),
                    phrase(list(&self.done))
                );
                let app = self.app.id().into();
                outcome = Err(Error::PooledConnection { app, operation: self.operation, detail });
            }
            let restored = (outcome.is_ok() || self.is_inside())
                && matches!(unlocked, Ok(true))
                && self.depth() == Some(0)
                && self.restore_limits();
            let managed = self.pooled().managed();
            managed.doomed = !restored;
            managed.observer.take();
        }
        drop(self.pooled.take());
        let (app, done) = (self.app.id(), phrase(list(&self.done)));
        match &outcome {
            Ok(()) => crate::wording::log_line!(
                info,
                "diesel_session::schema",
                "app `{app}`: {} is done: {done}",
                self.operation
            ),
            Err(error) => crate::wording::log_line!(warn, "diesel_session::schema", "{error}"),
        }
        outcome.map(|()| self.done)
    }

    /// Puts the session's own limits back, if they were changed.
    fn restore_limits(&mut self) -> bool {
        let Some(original) = self.original.take() else { return true };
        let limits = self.kind.end_limits(&original);
        limits.iter().all(|limit| self.conn().batch_execute(limit).is_ok())
    }
}

/// The one step of `drop_all` that decides by itself whether everything is removed.
const REMOVAL: &str = "the removal of the bookkeeping table";

/// How far a revert came.
enum Reverted {
    All,
    /// Not at all: one transaction for everything needs more locks than the server has.
    OutOfLocks,
}

fn is(answer: &[Option<String>], wanted: &str) -> bool {
    answer.first().and_then(Option::as_deref) == Some(wanted)
}

/// What one list has and the other has not, with its sign.
fn difference(before: &[Option<String>], after: &[Option<String>]) -> Vec<String> {
    let (before, after): (HashSet<_>, HashSet<_>) =
        (before.iter().flatten().collect(), after.iter().flatten().collect());
    let mut changes: Vec<String> = after.difference(&before).map(|name| format!("+{name}")).collect();
    changes.extend(before.difference(&after).map(|name| format!("-{name}")));
    changes.sort();
    changes
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing".into() } else { items.join(", ") }
}
