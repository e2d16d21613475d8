//! Nested transactions: a session's transaction as a savepoint inside an outer transaction. Diesel does not count the
//! outer transaction, so Diesel's depth has the same meaning in a nested and in a top-level transaction.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use super::{BeginOptions, mysql, postgres};
use crate::connection::SessionConnection;
use crate::kind::DatabaseKind;
use crate::settings::Mode;

const BEGIN: &str = "SAVEPOINT diesel_session";
const COMMIT: &str = "RELEASE SAVEPOINT diesel_session";
const ROLLBACK: &str = "ROLLBACK TO SAVEPOINT diesel_session; RELEASE SAVEPOINT diesel_session";

/// Checks the deferred constraints, as a commit does and the release of a savepoint does not. The inner savepoint
/// restores the constraint modes.
const DEFERRED_CONSTRAINTS: &str = "SAVEPOINT diesel_session_check; SET CONSTRAINTS ALL IMMEDIATE; \
     ROLLBACK TO SAVEPOINT diesel_session_check; RELEASE SAVEPOINT diesel_session_check";

/// A query that returns a row if a foreign key has no parent row.
const ORPHANS: &str =
    "SELECT 'yes' AS value FROM pragma_foreign_key_check, pragma_foreign_keys WHERE foreign_keys = 1 LIMIT 1";

impl DatabaseKind {
    /// Begins the outer transaction.
    pub(crate) fn begin_outer<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.batch_execute(match self {
            Self::Postgres | Self::Mysql => "BEGIN",
            Self::Sqlite => "BEGIN IMMEDIATE",
        })
    }

    /// Rolls back the outer transaction with all nested transactions. The result is false if some changes remain, such as those of
    /// non-transactional tables of MySQL.
    #[cfg(feature = "testing")]
    pub(crate) fn end_outer<C: SessionConnection>(self, conn: &mut C) -> QueryResult<bool> {
        conn.batch_execute("ROLLBACK")?;
        if self != Self::Mysql {
            return Ok(true);
        }
        let warnings = conn.texts("SELECT CAST(@@warning_count AS CHAR) AS value")?;
        Ok(warnings.first().and_then(Option::as_deref) == Some("0"))
    }

    /// Whether every foreign key has its parent row, so that a later commit can detect new orphans.
    pub(crate) fn has_no_orphans<C: SessionConnection>(self, conn: &mut C) -> bool {
        self == Self::Sqlite && conn.texts(ORPHANS).is_ok_and(|orphans| orphans.is_empty())
    }

    /// Begins a session's transaction. It has the isolation level of the outer transaction, which no other session
    /// shares. On MySQL and MariaDB a read-only transaction can write.
    pub(crate) fn begin_nested<C: SessionConnection>(
        self,
        conn: &mut C,
        options: BeginOptions,
        search_path: Option<&str>,
    ) -> QueryResult<()> {
        let mut sql = BEGIN.to_owned();
        if self == Self::Mysql {
            sql.push_str("; ");
            sql.push_str(mysql::SET_MARKER);
        }
        if options.mode == Mode::ReadOnly && self == Self::Postgres {
            sql.push_str("; SET TRANSACTION READ ONLY");
        }
        if let Some(limit) = options.remaining.and_then(|remaining| self.limit_statements(remaining)) {
            sql.push_str("; ");
            sql.push_str(&limit);
        }
        if let Some(search_path) = search_path {
            sql.push_str("; ");
            sql.push_str(postgres::SAVE_SEARCH_PATH);
            sql.push_str("; ");
            sql.push_str(&postgres::search_path(search_path));
        }
        conn.begin_with(&sql)
    }

    /// SQL that restores the `search_path` of the outer transaction.
    pub(crate) fn search_path_after_nested(self) -> String {
        postgres::RESTORE_SEARCH_PATH.into()
    }

    /// Returns an error if the transaction is aborted, or is not the one in which the nested transaction began. The
    /// nested transaction has to end after the call.
    pub(crate) fn probe_nested<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        match self {
            Self::Postgres => conn.batch_execute("SELECT 1"),
            Self::Mysql => conn.batch_execute(mysql::RELEASE_MARKER),
            Self::Sqlite => Ok(()),
        }
    }

    /// Releases the savepoint if a commit would succeed. On SQLite `had_orphans` skips the check for orphans.
    pub(crate) fn commit_nested<C: SessionConnection>(self, conn: &mut C, had_orphans: bool) -> QueryResult<()> {
        match self {
            Self::Postgres => conn.end_with(&format!("{DEFERRED_CONSTRAINTS}; {COMMIT}")),
            Self::Mysql => conn.end_with(COMMIT),
            Self::Sqlite => {
                // If the check itself fails, the statements that use the foreign key report the error.
                if !had_orphans && conn.texts(ORPHANS).is_ok_and(|orphans| !orphans.is_empty()) {
                    let message = Box::new("FOREIGN KEY constraint failed".to_owned());
                    return Err(DieselError::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, message));
                }
                conn.end_with(COMMIT)
            }
        }
    }

    /// Runs code that may begin and end transactions in a nested transaction. The result is true if the outer
    /// transaction is intact.
    pub(crate) fn run_nested<C: SessionConnection>(self, conn: &mut C, run: fn(&mut C)) -> bool {
        if self.begin_nested(conn, BeginOptions::plain(), None).is_err() {
            return false;
        }
        let panic = catch_unwind(AssertUnwindSafe(|| run(conn))).err();
        let kept = panic.is_none() && conn.depth() == Some(1) && self.release_nested(conn).is_ok();
        let intact = kept || self.undo_nested(conn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        intact
    }

    /// Releases the savepoint without a check of deferred constraints.
    pub(crate) fn release_nested<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.end_with(COMMIT)
    }

    /// Rolls back the nested transaction and all open levels inside it. The result is true if this succeeds.
    pub(crate) fn undo_nested<C: SessionConnection>(self, conn: &mut C) -> bool {
        for _ in 0..8 {
            let undone = match conn.depth() {
                Some(0) => return true,
                Some(1) => self.rollback_nested(conn),
                Some(_) => conn.rollback_level(),
                None => return false,
            };
            if undone.is_err() {
                return false;
            }
        }
        conn.depth() == Some(0)
    }

    /// Rolls back the nested transaction.
    pub(crate) fn rollback_nested<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.end_with(ROLLBACK)
    }

    /// SQL that restores the application's statement limit. Inside the outer transaction, a local limit outlives the
    /// savepoint.
    pub(crate) fn limit_after_nested(self, config: &crate::config::Config) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_session(config.statement_timeout)),
            Self::Mysql | Self::Sqlite => None,
        }
    }

    /// Whether a raw statement may change the schema in a way that a rollback undoes. The prepared statements of the
    /// connection would then be outdated.
    pub(crate) fn may_change_schema(self, sql: &str) -> bool {
        self == Self::Postgres && {
            let sql = sql.to_ascii_lowercase();
            ["create", "alter", "drop", "call", "execute"].iter().any(|word| sql.contains(word))
        }
    }
}
