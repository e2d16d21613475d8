//! SQLite.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{BeginOptions, millis};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::settings::Mode;

pub(super) const CONNECT_ERRORS: &[(&str, ConnectErrorKind)] = &[
    ("Unable to open the database file", ConnectErrorKind::Unreachable),
    ("unable to open database file", ConnectErrorKind::Unreachable),
    ("is locked", ConnectErrorKind::Starting),
];

/// `SQLITE_BUSY`.
pub(super) const BUSY_TEXT: &str = "database is locked";

/// `SQLITE_BUSY` and `SQLITE_LOCKED`, of a database, a table or the schema.
pub(super) const TRANSIENT_ERRORS: &[&str] = &[BUSY_TEXT, "database table is locked", "database schema is locked"];

pub(super) const INVENTORY: &str = "SELECT m.name || '.' || c.name AS value FROM sqlite_master m, pragma_table_info(m.name) c \
     WHERE m.type = 'table' UNION SELECT tbl_name || '.' || name FROM sqlite_master WHERE type = 'index' ORDER BY 1";

pub(super) const TABLES: &str = "SELECT name AS value FROM sqlite_master WHERE type = 'table'";

/// The longest wait of a statement for another writer, unless the configuration sets a limit.
pub(crate) const DEFAULT_BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest wait during the setup of a connection.
const SETUP_BUSY_TIMEOUT: Duration = Duration::from_millis(100);

pub(super) fn setup(config: &Config, no_wal: bool) -> Vec<String> {
    // The busy timeout comes first, because the other statements may have to wait. The pool sends each statement
    // separately, because a batch stops at the first statement that SQLite refuses. A new connection does not wait long
    // for a locked file: the caller tries again, and the worker thread can meanwhile serve other files.
    let mut statements = vec![busy_timeout(SETUP_BUSY_TIMEOUT), "PRAGMA foreign_keys = 1".into()];
    if config.wal && !no_wal {
        statements.push(WAL.into());
        statements.push("PRAGMA synchronous = NORMAL".into());
    }
    statements.push(busy_timeout(config.lock_timeout.unwrap_or(DEFAULT_BUSY_TIMEOUT)));
    statements
}

const WAL: &str = "PRAGMA journal_mode = WAL";

/// Whether the pool accepts a connection although the database refused a setup statement with this message. A read-only
/// file keeps its journal mode.
pub(super) fn tolerates_refusal(sql: &str, message: &str) -> bool {
    sql == WAL && message.contains("attempt to write a readonly database")
}

pub(super) fn busy_timeout(limit: Duration) -> String {
    format!("PRAGMA busy_timeout = {}", millis(limit).min(i32::MAX as u64))
}

/// A transaction that may write takes the write lock at its beginning. SQLite refuses a later request for the lock
/// without waiting, if another connection has written in between.
pub(super) fn begin(options: BeginOptions) -> Option<String> {
    (options.mode != Mode::ReadOnly).then(|| "BEGIN IMMEDIATE".into())
}

/// SQLite has no read-only transactions. A change of this setting makes SQLite prepare every statement again.
pub(super) const READ_ONLY: (&str, &str) = ("PRAGMA query_only = 1", "PRAGMA query_only = 0");

/// SQLite refuses a second `BEGIN` inside a transaction. Outside, the function ends the transaction that the `BEGIN`
/// has begun.
pub(super) fn probe_transaction<C: SessionConnection>(conn: &mut C) -> bool {
    match conn.batch_execute("BEGIN") {
        Err(error) => error.to_string().contains("within a transaction"),
        Ok(()) => {
            let _ = conn.batch_execute("ROLLBACK");
            false
        }
    }
}

/// A unique URL for the in-memory database of one application.
pub(crate) fn memory_url() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("file:/diesel-session-{}?vfs=memdb", NEXT.fetch_add(1, Ordering::Relaxed))
}
