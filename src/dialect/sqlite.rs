//! SQLite.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Beginning, millis};
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

/// How long a statement waits for another writer where the configuration does not say.
pub(crate) const BUSY: Duration = Duration::from_secs(5);

/// The same while a connection is being set up.
const BUSY_AT_FIRST: Duration = Duration::from_millis(100);

pub(super) fn setup(config: &Config, no_log: bool) -> Vec<String> {
    // A busy timeout comes first, because the others may have to wait; each by itself, because a batch stops at the first
    // statement that is refused. A new connection does not wait long for a locked file: it is the caller who tries again,
    // and the helper thread is free for other files meanwhile.
    let mut statements = vec![busy_timeout(BUSY_AT_FIRST), "PRAGMA foreign_keys = 1".into()];
    if config.wal && !no_log {
        statements.push(WAL.into());
        statements.push("PRAGMA synchronous = NORMAL".into());
    }
    statements.push(busy_timeout(config.lock_timeout.unwrap_or(BUSY)));
    statements
}

const WAL: &str = "PRAGMA journal_mode = WAL";

/// Whether a connection is used without a statement of its setup that was refused with that message: of a file that cannot be
/// written the journal stays what it is.
pub(super) fn goes_without(sql: &str, message: &str) -> bool {
    sql == WAL && message.contains("attempt to write a readonly database")
}

pub(super) fn busy_timeout(limit: Duration) -> String {
    format!("PRAGMA busy_timeout = {}", millis(limit).min(i32::MAX as u64))
}

/// A transaction that may write takes the write lock at once: one that asks for it later is refused without waiting
/// when another has written in between.
pub(super) fn begin(how: Beginning) -> Option<String> {
    (how.mode != Mode::ReadOnly).then(|| "BEGIN IMMEDIATE".into())
}

/// Nothing in a transaction itself keeps it from writing. Changing this makes SQLite prepare every statement anew.
pub(super) const READ_ONLY: (&str, &str) = ("PRAGMA query_only = 1", "PRAGMA query_only = 0");

/// A second `BEGIN` is refused while there is a transaction, and harmless.
pub(super) fn is_in_transaction<C: SessionConnection>(conn: &mut C) -> bool {
    match conn.batch_execute("BEGIN") {
        Err(error) => error.to_string().contains("within a transaction"),
        Ok(()) => {
            let _ = conn.batch_execute("ROLLBACK");
            false
        }
    }
}

/// A name for a database in memory that no other application has.
pub(crate) fn memory_url() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("file:/diesel-session-{}?vfs=memdb", NEXT.fetch_add(1, Ordering::Relaxed))
}
