//! The lock of all schema operations on a database, and the poolers that would lose it.

use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::schema_operation::SchemaOperation;
use crate::connection::SessionConnection;
use crate::dialect::{BEGIN, ConnectionSnapshot, TRY_LOCK_IN_TRANSACTION};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::wording::phrase;

/// The longest wait for another `create_all` or `drop_all`.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest wait for a second connection, with which the operation detects a pooler.
const SECOND_CONNECTION_TIMEOUT: Duration = Duration::from_secs(1);

/// The first pause between two attempts to take the lock. Each pause is twice as long as the previous one.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

const LONGEST_PAUSE: Duration = Duration::from_millis(50);

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
        let result = self.conn().begin_with(BEGIN);
        self.check(result)?;
        let snapshot = self.snapshot()?;
        let applied = self.applied_versions(&snapshot)?;
        let result = self.conn().leave_with("ROLLBACK");
        self.check(result)?;
        let process = snapshot.process().map(str::to_owned);
        self.original = Some(snapshot);
        let creates = self.operation == "create_all";
        let mut without_transaction = self.migrations.iter().filter(|known| !known.in_transaction);
        let next = without_transaction.find(|known| applied.contains(&known.version) != creates);
        let Some(name) = next.map(|known| known.name.clone()) else { return Ok(()) };
        if self.process_of_next_transaction()? == process && !self.shares_session(process.as_deref())? {
            return Ok(());
        }
        let detail = format!(
            "Migration {} does not run in one transaction, so its lock would stay with the pooler. Nothing was changed.",
            phrase(name)
        );
        Err(Error::PooledConnection { app: self.app.id().into(), operation: self.operation, detail })
    }

    fn process_of_next_transaction(&mut self) -> Result<Option<String>> {
        let result = self.conn().begin_with(BEGIN);
        self.check(result)?;
        let snapshot = self.snapshot()?;
        let result = self.conn().leave_with("ROLLBACK");
        self.check(result)?;
        Ok(snapshot.process().map(str::to_owned))
    }

    /// Whether a second connection gets the session of the first, or forces the first into another session. The result
    /// is false if the pool has no second connection.
    fn shares_session(&mut self, process: Option<&str>) -> Result<bool> {
        let deadline = Instant::now() + SECOND_CONNECTION_TIMEOUT;
        let second = self.app.pool().and_then(|pool| pool.acquire(self.at, true, Some(deadline)));
        let Ok(mut second) = second else { return Ok(false) };
        let query = self.kind.snapshot_query();
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
        let Some(sql) = self.kind.try_lock_schema(&self.app.options().target.database) else { return Ok(()) };
        let deadline = Instant::now() + LOCK_TIMEOUT;
        let mut pause = FIRST_PAUSE;
        loop {
            if self.is_chained() {
                let result = self.conn().begin_with(BEGIN);
                self.check(result)?;
            }
            let rows = self.texts(&sql)?;
            if is_answer(&rows, "1") {
                self.has_lock = true;
                return Ok(());
            }
            if Instant::now() >= deadline {
                let holders = self.kind.schema_lock_holders(&self.app.options().target.database);
                return Err(Error::LockTimeout {
                    app: self.app.id().into(),
                    operation: self.operation,
                    waited: LOCK_TIMEOUT,
                    message: "another create_all or drop_all is at work on this database".into(),
                    blockers: self.pooled().blockers(&holders),
                    left: "Nothing was changed.".into(),
                    at: self.at,
                });
            }
            if self.is_chained() {
                let result = self.conn().leave_with("ROLLBACK");
                self.check(result)?;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Releases the lock. The result is false if this session of the server did not hold the lock. On PostgreSQL the
    /// transaction ends.
    pub(super) fn unlock(&mut self) -> QueryResult<bool> {
        let Some(sql) = self.kind.unlock_schema(&self.app.options().target.database) else { return Ok(true) };
        let (has_lock, is_chained) = (std::mem::take(&mut self.has_lock), self.is_chained());
        let released = if self.kind == DatabaseKind::Mysql { "1" } else { "true" };
        let conn = self.conn();
        if is_chained && conn.depth() == Some(0) {
            conn.begin_with(BEGIN)?;
        }
        let held_lock = !has_lock || is_answer(&conn.texts(&sql)?, released);
        if is_chained {
            self.conn().leave_with("COMMIT")?;
        }
        Ok(held_lock)
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
    let Some(session_lock) = kind.try_lock_schema(database) else { return Some(()) };
    let sql = if kind == DatabaseKind::Postgres { TRY_LOCK_IN_TRANSACTION } else { &*session_lock };
    let mut pause = FIRST_PAUSE;
    loop {
        if kind == DatabaseKind::Postgres {
            conn.begin_with(BEGIN).ok()?;
        }
        if is_answer(&conn.texts(sql).ok()?, "1") {
            return Some(());
        }
        if kind == DatabaseKind::Postgres {
            conn.leave_with("ROLLBACK").ok()?;
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether the first row of a result is `expected`.
fn is_answer(rows: &[Option<String>], expected: &str) -> bool {
    rows.first().and_then(Option::as_deref) == Some(expected)
}
