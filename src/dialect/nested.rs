//! Nested transactions: a session's transaction as a savepoint inside an outer transaction. Diesel does not count the
//! outer transaction, so Diesel's depth has the same meaning in a nested and in a top-level transaction.

use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use super::{BeginOptions, set_search_path};
use crate::connection::Inspect;
use crate::kind::DatabaseKind;
use crate::settings::Mode;

const RELEASE: &str = "RELEASE SAVEPOINT diesel_session";
const ROLLBACK: &str = "ROLLBACK TO SAVEPOINT diesel_session; RELEASE SAVEPOINT diesel_session";

/// Inside an outer transaction, a local setting outlives the release of a savepoint. So a second setting
/// keeps the previous value.
const SAVE_SEARCH_PATH: &str = "SELECT pg_catalog.set_config('diesel_session.search_path', \
     pg_catalog.concat('=', pg_catalog.current_setting('search_path')), true)";

/// After a rollback there is nothing to restore, because the rollback has restored both settings.
const RESTORE_SEARCH_PATH: &str = "SELECT pg_catalog.set_config('search_path', \
     pg_catalog.substr(pg_catalog.current_setting('diesel_session.search_path', true), 2), true) \
     WHERE pg_catalog.strpos(pg_catalog.current_setting('diesel_session.search_path', true), '=') OPERATOR(pg_catalog.=) 1; \
     SELECT pg_catalog.set_config('diesel_session.search_path', '', true)";

/// A query that returns a row if a foreign key has no parent row.
const ORPHANS: &str =
    "SELECT 'yes' AS value FROM pragma_foreign_key_check, pragma_foreign_keys WHERE foreign_keys = 1 LIMIT 1";

impl DatabaseKind {
    /// Begins the outer transaction.
    pub(crate) fn begin_outer(self, conn: &mut dyn Inspect) -> QueryResult<()> {
        conn.batch_execute(if self == Self::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" })
    }

    /// Rolls back the outer transaction with all nested transactions. The result is false if some changes remain, such
    /// as those of non-transactional tables of MySQL.
    #[cfg(feature = "testing")]
    pub(crate) fn end_outer(self, conn: &mut dyn Inspect) -> QueryResult<bool> {
        conn.batch_execute("ROLLBACK")?;
        if self != Self::Mysql {
            return Ok(true);
        }
        let warnings = conn.texts("SELECT CAST(@@warning_count AS CHAR) AS value")?;
        Ok(warnings.first().and_then(Option::as_deref) == Some("0"))
    }

    /// Whether every foreign key has its parent row, so that a later commit can detect new orphans.
    pub(crate) fn has_no_orphans(self, conn: &mut dyn Inspect) -> bool {
        self == Self::Sqlite && conn.texts(ORPHANS).is_ok_and(|orphans| orphans.is_empty())
    }

    /// Begins a session's transaction. It has the isolation level of the outer transaction, which no other session
    /// shares. On MySQL and MariaDB a read-only transaction can write.
    pub(crate) fn begin_nested(
        self,
        conn: &mut dyn Inspect,
        options: BeginOptions,
        search_path: Option<&str>,
    ) -> QueryResult<()> {
        let mut statements = vec![self.texts().begin_nested.to_owned()];
        if options.mode == Mode::ReadOnly && self == Self::Postgres {
            statements.push("SET TRANSACTION READ ONLY".into());
        }
        statements.extend(options.remaining.and_then(|remaining| self.dialect().limit_statements(remaining)));
        if let Some(path) = search_path {
            statements.extend([SAVE_SEARCH_PATH.into(), set_search_path(path)]);
        }
        conn.begin_with(&statements.join("; "))
    }

    /// SQL that restores the `search_path` of the outer transaction.
    pub(crate) fn search_path_after_nested(self) -> String {
        RESTORE_SEARCH_PATH.into()
    }

    /// Returns an error if the transaction is aborted, or is not the one in which the nested transaction began. The
    /// nested transaction has to end after the call.
    pub(crate) fn probe_nested(self, conn: &mut dyn Inspect) -> QueryResult<()> {
        self.texts().probe_nested.map_or(Ok(()), |sql| conn.batch_execute(sql))
    }

    /// Releases the savepoint if a commit would succeed. On SQLite `had_orphans` skips the check for orphans.
    pub(crate) fn commit_nested(self, conn: &mut dyn Inspect, had_orphans: bool) -> QueryResult<()> {
        // If the check itself fails, the statements that use the foreign key report the error.
        if self == Self::Sqlite && !had_orphans && conn.texts(ORPHANS).is_ok_and(|orphans| !orphans.is_empty()) {
            let message = Box::new("FOREIGN KEY constraint failed".to_owned());
            return Err(DieselError::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, message));
        }
        conn.end_with(self.texts().commit_nested)
    }

    /// Releases the savepoint without a check of deferred constraints.
    pub(crate) fn release_nested(self, conn: &mut dyn Inspect) -> QueryResult<()> {
        conn.end_with(RELEASE)
    }

    /// Rolls back the nested transaction and all open levels inside it. The result is true if this succeeds.
    pub(crate) fn undo_nested(self, conn: &mut dyn Inspect) -> bool {
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
    pub(crate) fn rollback_nested(self, conn: &mut dyn Inspect) -> QueryResult<()> {
        conn.end_with(ROLLBACK)
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
