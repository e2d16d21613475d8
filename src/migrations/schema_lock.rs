//! The lock of all schema operations on a database, and the poolers that would lose it.

use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::schema_operation::SchemaOperation;
use crate::connection::SessionConnection;
use crate::dialect::{BEGIN, ConnectionSnapshot, TRY_LOCK_IN_TRANSACTION};
use crate::error::{Details, Error, Result};
use crate::kind::DatabaseKind;
use crate::wording::phrase;

/// The longest wait for another `create_all` or `drop_all`.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest wait for a second connection, with which the operation detects a pooler.
const SECOND_CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);

/// The first pause between two attempts to take the lock. Each pause is twice as long as the previous one.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// The result of the release of the lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unlocked {
    Released,
    /// The session that was asked did not hold the lock. It belongs to this process of the server.
    NotHeld(Option<String>),
}

impl<C: SessionConnection> SchemaOperation<'_, C> {
    /// Returns an error if a pooler would separate the session from its lock.
    ///
    /// A migration that does not run in one transaction needs the same session of the server from the lock to its end.
    /// A pooler in transaction mode may use another session for each transaction, or one session for two clients in
    /// turn.
    pub(super) fn refuse_pooler(&mut self) -> Result<()> {
        if self.migrations.iter().all(|known| known.in_transaction) {
            return Ok(());
        }
        let (snapshot, applied) = self.in_own_transaction(|this| {
            let snapshot = this.snapshot()?;
            let applied = this.applied_versions(&snapshot)?;
            Ok((snapshot, applied))
        })?;
        let process = snapshot.process().map(str::to_owned);
        self.original = Some(snapshot);
        let applies = self.applies();
        let mut without_transaction = self.migrations.iter().filter(|known| !known.in_transaction);
        let next = without_transaction.find(|known| applied.contains(&known.version) != applies);
        let Some(name) = next.map(|known| known.name.clone()) else { return Ok(()) };
        let has_own_session = !self.app.options().shares_sessions()
            && self.process_of_next_transaction()? == process
            && !self.shares_session(process.as_deref())?;
        if has_own_session {
            return Ok(());
        }
        let detail = format!(
            "Migration {} does not run in one transaction, so its lock would stay with the pooler. Nothing was changed.",
            phrase(name)
        );
        Err(self.pooler_error(detail))
    }

    pub(super) fn pooler_error(&self, detail: String) -> Error {
        Details::PoolerInTransactionMode { app: self.app.id().into(), operation: self.operation, detail }.into()
    }

    fn in_own_transaction<T>(&mut self, query: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let result = self.conn().begin_with(BEGIN);
        self.check(result)?;
        let answer = query(self)?;
        let result = self.conn().leave_with("ROLLBACK");
        self.check(result)?;
        Ok(answer)
    }

    fn process_of_next_transaction(&mut self) -> Result<Option<String>> {
        let snapshot = self.in_own_transaction(Self::snapshot)?;
        Ok(snapshot.process().map(str::to_owned))
    }

    /// Whether a second connection gets the session of the first, or forces the first into another session. The result
    /// is false if the pool has no second connection.
    fn shares_session(&mut self, process: Option<&str>) -> Result<bool> {
        let deadline = Instant::now() + SECOND_CONNECTION_TIMEOUT;
        let second = self.app.pool().and_then(|pool| pool.acquire(self.at, true, Some(deadline)));
        let Ok(mut second) = second else { return Ok(false) };
        let query = self.kind.texts().snapshot_query;
        let rows = second.conn().begin_with(BEGIN).and_then(|()| second.conn().texts(query));
        let is_same = rows.is_ok_and(|rows| ConnectionSnapshot::from_rows(rows).process() == process);
        // While the second connection is in a transaction, a pooler has to use another session for the first one.
        let was_moved = !is_same && self.process_of_next_transaction()?.as_deref() != process;
        if second.conn().leave_with("ROLLBACK").is_err() {
            second.close_at_checkin();
        }
        Ok(is_same || was_moved)
    }

    /// Takes the lock, after other schema operations of this process and of other processes. On PostgreSQL the
    /// transaction in which the operation takes the lock stays open.
    pub(super) fn lock(&mut self) -> Result<()> {
        let is_chained = self.is_chained();
        let database = &self.app.options().target.database;
        let Some(sql) = self.kind.dialect().try_lock_schema(database).filter(|_| self.needs_lock) else {
            let begun = if is_chained { self.conn().begin_with(BEGIN) } else { Ok(()) };
            return self.check(begun);
        };
        let is_locked = poll(self.conn(), &sql, is_chained, Instant::now() + LOCK_TIMEOUT);
        self.has_lock = self.check(is_locked)?;
        if self.has_lock {
            return Ok(());
        }
        let holders = self.kind.dialect().schema_lock_holders(database);
        let message = "another create_all or drop_all is at work on this database".into();
        Err(self.lock_timeout_of(LOCK_TIMEOUT, message, &holders, "Nothing was changed.".into()))
    }

    /// Releases the lock, if the operation has it. On PostgreSQL the transaction ends.
    pub(super) fn unlock(&mut self) -> QueryResult<Unlocked> {
        let Some(sql) = self.kind.dialect().unlock_schema(&self.app.options().target.database) else {
            return Ok(Unlocked::Released);
        };
        let (has_lock, is_chained) = (std::mem::take(&mut self.has_lock), self.is_chained());
        let conn = self.conn();
        if is_chained && conn.depth() == Some(0) {
            conn.begin_with(BEGIN)?;
        }
        let unlocked = match has_lock.then(|| conn.texts(&sql)).transpose()?.map(|rows| rows.into_iter().next()) {
            None | Some(Some(None)) => Unlocked::Released,
            Some(process) => Unlocked::NotHeld(process.flatten()),
        };
        if is_chained {
            // Before the pooler gives the session to another client.
            let options = self.app.options();
            let reset = options.shares_sessions().then(|| format!("{}; COMMIT", options.reset_sql(false)));
            self.conn().leave_with(reset.as_deref().unwrap_or("COMMIT"))?;
        }
        Ok(unlocked)
    }
}

/// Waits on another connection until the server has ended the session that held the lock. `None` if the server does not
/// answer before `deadline`. On PostgreSQL the connection is in a transaction afterwards.
pub(super) fn wait_for_lock<C: SessionConnection>(
    conn: &mut C,
    kind: DatabaseKind,
    database: &str,
    deadline: Instant,
) -> Option<()> {
    let Some(session_lock) = kind.dialect().try_lock_schema(database) else { return Some(()) };
    let in_transaction = kind == DatabaseKind::Postgres;
    let sql = if in_transaction { TRY_LOCK_IN_TRANSACTION } else { &*session_lock };
    poll(conn, sql, in_transaction, deadline).is_ok_and(|is_locked| is_locked).then_some(())
}

/// Asks for a lock until `deadline`, and returns whether the session has it. Each attempt may be in a transaction, and
/// the last transaction stays open.
fn poll<C: SessionConnection>(conn: &mut C, sql: &str, in_transaction: bool, deadline: Instant) -> QueryResult<bool> {
    let mut pause = FIRST_PAUSE;
    loop {
        if in_transaction {
            conn.begin_with(BEGIN)?;
        }
        let is_locked = is_answer(&conn.texts(sql)?, "1");
        if is_locked || Instant::now() >= deadline {
            return Ok(is_locked);
        }
        if in_transaction {
            conn.leave_with("ROLLBACK")?;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether the first row of a result is `expected`.
fn is_answer(rows: &[Option<String>], expected: &str) -> bool {
    rows.first().and_then(Option::as_deref) == Some(expected)
}
