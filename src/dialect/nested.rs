//! A session's transaction as a savepoint inside of another transaction, of which Diesel does not know: then all that is said of
//! Diesel's depth elsewhere holds for it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use super::{Beginning, mysql, postgres};
use crate::connection::SessionConnection;
use crate::kind::DatabaseKind;
use crate::settings::Mode;

const BEGIN: &str = "SAVEPOINT diesel_session";
const COMMIT: &str = "RELEASE SAVEPOINT diesel_session";
const ROLLBACK: &str = "ROLLBACK TO SAVEPOINT diesel_session; RELEASE SAVEPOINT diesel_session";

/// What a commit looks at and a savepoint's release does not. Whether a constraint is immediate afterwards is as it was before.
const DEFERRED_CONSTRAINTS: &str = "SAVEPOINT diesel_session_check; SET CONSTRAINTS ALL IMMEDIATE; \
     ROLLBACK TO SAVEPOINT diesel_session_check; RELEASE SAVEPOINT diesel_session_check";

/// A row where a deferred foreign key has no parent.
const ORPHANS: &str =
    "SELECT 'yes' AS value FROM pragma_foreign_key_check, pragma_foreign_keys WHERE foreign_keys = 1 LIMIT 1";

impl DatabaseKind {
    /// Begins the transaction around all others.
    pub(crate) fn begin_outer<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.batch_execute(match self {
            Self::Postgres | Self::Mysql => "BEGIN",
            Self::Sqlite => "BEGIN IMMEDIATE",
        })
    }

    /// Undoes it, with everything inside; false where something of it stays, as in tables of MySQL that know no transactions.
    pub(crate) fn end_outer<C: SessionConnection>(self, conn: &mut C) -> QueryResult<bool> {
        conn.batch_execute("ROLLBACK")?;
        if self != Self::Mysql {
            return Ok(true);
        }
        let warnings = conn.texts("SELECT CAST(@@warning_count AS CHAR) AS value")?;
        Ok(warnings.first().and_then(Option::as_deref) == Some("0"))
    }

    /// Whether nothing refers to rows that are not there, so that a commit can look whether it has left such a thing.
    pub(crate) fn has_no_orphans<C: SessionConnection>(self, conn: &mut C) -> bool {
        self == Self::Sqlite && conn.texts(ORPHANS).is_ok_and(|orphans| orphans.is_empty())
    }

    /// Begins a session's transaction. The isolation level is that of the outer one, in which nobody else is; on MySQL and MariaDB it can
    /// write even where it should only read.
    pub(crate) fn begin_inside<C: SessionConnection>(
        self,
        conn: &mut C,
        how: Beginning,
        search_path: Option<&str>,
    ) -> QueryResult<()> {
        let mut sql = BEGIN.to_owned();
        if self == Self::Mysql {
            sql.push_str("; ");
            sql.push_str(mysql::MARK);
        }
        if how.mode == Mode::ReadOnly && self == Self::Postgres {
            sql.push_str("; SET TRANSACTION READ ONLY");
        }
        if let Some(limit) = how.remaining.and_then(|remaining| self.limit_statements(remaining)) {
            sql.push_str("; ");
            sql.push_str(&limit);
        }
        if let Some(search_path) = search_path {
            sql.push_str("; ");
            sql.push_str(postgres::KEEP_SEARCH_PATH);
            sql.push_str("; ");
            sql.push_str(&postgres::search_path(search_path));
        }
        conn.begin_with(&sql)
    }

    /// What gives the transaction around a test its own schemas again.
    pub(crate) fn search_path_after_inside(self) -> String {
        postgres::RESTORE_SEARCH_PATH.into()
    }

    /// An error where the transaction is aborted, or is not the one in which the session's was begun. For the end of one.
    pub(crate) fn probe_inside<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        match self {
            Self::Postgres => conn.batch_execute("SELECT 1"),
            Self::Mysql => conn.batch_execute(mysql::RELEASE_MARK),
            Self::Sqlite => Ok(()),
        }
    }

    /// Keeps what a session's transaction did, where a commit would. On SQLite `had_orphans` says that it need not be looked for them.
    pub(crate) fn commit_inside<C: SessionConnection>(self, conn: &mut C, had_orphans: bool) -> QueryResult<()> {
        match self {
            Self::Postgres => conn.end_with(&format!("{DEFERRED_CONSTRAINTS}; {COMMIT}")),
            Self::Mysql => conn.end_with(COMMIT),
            Self::Sqlite => {
                // A key that cannot be looked at is an error of whoever uses it.
                if !had_orphans && conn.texts(ORPHANS).is_ok_and(|orphans| !orphans.is_empty()) {
                    let message = Box::new("FOREIGN KEY constraint failed".to_owned());
                    return Err(DieselError::DatabaseError(DatabaseErrorKind::ForeignKeyViolation, message));
                }
                conn.end_with(COMMIT)
            }
        }
    }

    /// Runs code that may begin and end transactions as if it were alone; whether the transaction around it is as it was.
    pub(crate) fn run_inside<C: SessionConnection>(self, conn: &mut C, run: fn(&mut C)) -> bool {
        if self.begin_inside(conn, Beginning::plain(), None).is_err() {
            return false;
        }
        let panic = catch_unwind(AssertUnwindSafe(|| run(conn))).err();
        let kept = panic.is_none() && conn.depth() == Some(1) && self.release_inside(conn).is_ok();
        let sound = kept || self.undo_inside(conn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        sound
    }

    /// Keeps what was done inside, whatever constraints wait for the commit.
    pub(crate) fn release_inside<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.end_with(COMMIT)
    }

    /// Undoes everything inside, whatever levels are still open; whether that is done.
    pub(crate) fn undo_inside<C: SessionConnection>(self, conn: &mut C) -> bool {
        for _ in 0..8 {
            let undone = match conn.depth() {
                Some(0) => return true,
                Some(1) => self.rollback_inside(conn),
                Some(_) => conn.rollback_level(),
                None => return false,
            };
            if undone.is_err() {
                return false;
            }
        }
        conn.depth() == Some(0)
    }

    /// Undoes what a session's transaction did.
    pub(crate) fn rollback_inside<C: SessionConnection>(self, conn: &mut C) -> QueryResult<()> {
        conn.end_with(ROLLBACK)
    }

    /// What gives statements the application's own limit again: inside of a transaction a local one outlives a savepoint.
    pub(crate) fn limit_after_inside(self, config: &crate::config::Config) -> Option<String> {
        match self {
            Self::Postgres => Some(postgres::limit_in_session(config.statement_timeout)),
            Self::Mysql | Self::Sqlite => None,
        }
    }

    /// Whether a raw statement may change the schema, in a way that a rollback undoes and what is prepared on the connection does not see.
    pub(crate) fn may_change_schema(self, sql: &str) -> bool {
        self == Self::Postgres && {
            let sql = sql.to_ascii_lowercase();
            ["create", "alter", "drop", "call", "execute"].iter().any(|word| sql.contains(word))
        }
    }
}
