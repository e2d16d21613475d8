//! SQLite.

use std::borrow::Cow;
use std::time::Duration;

use super::migrations::{BOOKKEEPING_TABLE, changed};
use super::{BeginOptions, ConnectionSnapshot, DEFAULT_BUSY_TIMEOUT, Dialect, Texts, TransactionCheck, millis};
use crate::config::Config;
use crate::connection::Inspect;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::settings::Mode;

pub(super) struct Sqlite;

static TEXTS: Texts = Texts {
    required_settings: None,
    server_info_query: None,
    defaults_query: None,
    ping: None,
    client_port_query: None,
    session_counts_query: None,
    full_server_query: None,
    catalog_search_path: None,
    // SQLite has no read-only transactions. A change of this setting makes SQLite prepare every statement again.
    read_only_guard: Some(("PRAGMA query_only = 1", "PRAGMA query_only = 0")),
    guarded_commit: None,
    transaction_number: None,
    server_identity: None,
    is_read_only: None,
    begin_nested: "SAVEPOINT diesel_session",
    probe_nested: None,
    commit_nested: "RELEASE SAVEPOINT diesel_session",
    tables: "SELECT name AS value FROM sqlite_master WHERE type = 'table'",
    inventory: "SELECT m.name || '.' || c.name AS value FROM sqlite_master m, pragma_table_info(m.name) c \
         WHERE m.type = 'table' UNION SELECT tbl_name || '.' || name FROM sqlite_master WHERE type = 'index' ORDER BY 1",
    snapshot_query: "SELECT 'schema' || char(31) || 'main' AS value \
         UNION ALL SELECT 'set.busy_timeout' || char(31) || timeout FROM pragma_busy_timeout \
         UNION ALL SELECT 'set.foreign_keys' || char(31) || foreign_keys FROM pragma_foreign_keys \
         UNION ALL SELECT 'set.recursive_triggers' || char(31) || recursive_triggers FROM pragma_recursive_triggers \
         UNION ALL SELECT 'set.legacy_alter_table' || char(31) || legacy_alter_table FROM pragma_legacy_alter_table \
         UNION ALL SELECT 'set.ignore_check_constraints' || char(31) || ignore_check_constraints FROM pragma_ignore_check_constraints \
         UNION ALL SELECT 'set.query_only' || char(31) || query_only FROM pragma_query_only \
         UNION ALL SELECT 'set.writable_schema' || char(31) || writable_schema FROM pragma_writable_schema",
    connect_errors: &[
        ("Unable to open the database file", ConnectErrorKind::Unreachable),
        ("unable to open database file", ConnectErrorKind::Unreachable),
        ("is locked", ConnectErrorKind::Starting),
    ],
    account_full: &[],
    // `SQLITE_BUSY` and `SQLITE_LOCKED`, of a database, a table or the schema.
    transient: &["database is locked", "database table is locked", "database schema is locked"],
    lock_timeout: &["is locked"],
    deadlock: &[],
    connection_lost: &[],
    outdated: &[],
    other_type: &[],
    read_only: &["attempt to write a readonly database"],
};

/// The longest wait during the setup of a connection.
const SETUP_BUSY_TIMEOUT: Duration = Duration::from_millis(100);

const WAL: &str = "PRAGMA journal_mode = WAL";

impl Dialect for Sqlite {
    fn texts(&self) -> &'static Texts {
        &TEXTS
    }

    fn setup(&self, config: &Config, no_wal: bool, _checks_client: bool) -> Vec<String> {
        // The busy timeout comes first, because the other statements may have to wait. The pool sends each statement
        // separately, because a batch stops at the first statement that SQLite refuses. A new connection does not wait
        // long for a locked file: the caller tries again, and the worker thread can meanwhile serve other files.
        let mut statements = vec![self.lock_limit(SETUP_BUSY_TIMEOUT), "PRAGMA foreign_keys = 1".into()];
        if config.wal && !no_wal {
            statements.push(WAL.into());
            statements.push("PRAGMA synchronous = NORMAL".into());
        }
        statements.push(self.lock_limit(config.lock_timeout.unwrap_or(DEFAULT_BUSY_TIMEOUT)));
        statements
    }

    /// A read-only file keeps its journal mode.
    fn tolerates_refusal(&self, sql: &str, message: &str) -> bool {
        sql == WAL && message.contains("attempt to write a readonly database")
    }

    /// A transaction that may write takes the write lock at its beginning. SQLite refuses a later request for the lock
    /// without waiting, if another connection has written in between.
    fn begin(&self, options: BeginOptions) -> Option<Cow<'static, str>> {
        (options.mode != Mode::ReadOnly).then(|| "BEGIN IMMEDIATE".into())
    }

    fn lock_limit(&self, limit: Duration) -> String {
        format!("PRAGMA busy_timeout = {}", millis(limit).min(i32::MAX as u64))
    }

    fn transaction_exists(&self, conn: &mut dyn Inspect, _check: TransactionCheck) -> bool {
        self.may_be_in_transaction(conn)
    }

    /// SQLite refuses a second `BEGIN` inside a transaction. Outside, the function ends the transaction that the
    /// `BEGIN` has begun.
    fn may_be_in_transaction(&self, conn: &mut dyn Inspect) -> bool {
        match conn.batch_execute("BEGIN") {
            Err(error) => error.to_string().contains("within a transaction"),
            Ok(()) => {
                let _ = conn.batch_execute("ROLLBACK");
                false
            }
        }
    }

    fn restore(&self, before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String> {
        changed(before, now).map(|(name, value)| format!("PRAGMA {name} = {value}")).collect()
    }

    fn set_limits(&self, lock_timeout: Duration) -> Vec<String> {
        vec![self.lock_limit(lock_timeout)]
    }

    fn restore_limits(&self, original: &ConnectionSnapshot) -> Vec<String> {
        original.get("set.busy_timeout").map(|limit| format!("PRAGMA busy_timeout = {limit}")).into_iter().collect()
    }

    fn bookkeeping_table_query(&self, schema: &str) -> String {
        format!(
            "SELECT 'yes' AS value FROM {}.sqlite_master WHERE type = 'table' AND name = '{BOOKKEEPING_TABLE}'",
            DatabaseKind::Sqlite.quote(schema)
        )
    }
}
