//! How the transactions on the connections of an application begin and end.

use std::cell::Cell;
use std::sync::Arc;

use diesel::result::QueryResult;

use super::managed::Managed;
use super::statement_observer::ObservedEffects;
use crate::connection::SessionConnection;
use crate::dialect::BeginOptions;
use crate::error::{Result, SourceLocation};
use crate::kind::DatabaseKind;

/// The style of the transactions: top-level, or nested in an outer transaction.
pub(crate) struct TransactionStyle<C: SessionConnection>(pub(crate) Option<Arc<dyn OuterTransaction<C>>>);

/// A transaction that stays open on a connection. The transactions of its sessions are nested in it.
pub(crate) trait OuterTransaction<C: SessionConnection>: Send + Sync {
    /// Begins a nested transaction.
    fn begin(&self, conn: &mut C, options: BeginOptions, search_path: Option<&str>) -> QueryResult<()>;

    /// Returns an error if the nested transaction is aborted or has ended. It has to end after the call.
    fn probe(&self, conn: &mut C) -> QueryResult<()>;

    /// Ends the nested transaction if a commit would succeed.
    fn commit(&self, conn: &mut C) -> QueryResult<()>;

    /// Ends the nested transaction without the checks of a commit.
    fn release(&self, conn: &mut C) -> QueryResult<()>;

    /// Rolls the nested transaction back.
    fn roll_back(&self, conn: &mut C) -> QueryResult<()>;

    /// Rolls back the nested transaction and all open levels inside it. Returns whether this succeeded.
    fn undo(&self, conn: &mut C) -> bool;

    /// SQL that restores the `search_path` that a nested transaction has changed for the rest of the outer transaction.
    fn restore_search_path(&self) -> String;

    /// Ends the nested transaction of code that had the connection. Returns whether the work is kept.
    fn end_program_use(
        &self,
        managed: &mut Managed<C>,
        effects: &ObservedEffects,
        keep: bool,
    ) -> std::result::Result<bool, String>;

    /// Records that the outer transaction has ended or is in an unknown state. The first cause wins.
    fn invalidate(&self, cause: String, at: Option<SourceLocation>);

    /// Returns an error if the outer transaction was invalidated.
    fn check(&self, app: &str) -> Result<()>;
}

impl<C: SessionConnection> Clone for TransactionStyle<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: SessionConnection> TransactionStyle<C> {
    pub(crate) fn outer(&self) -> Option<&dyn OuterTransaction<C>> {
        self.0.as_deref()
    }

    #[inline]
    pub(crate) fn is_nested(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn begin(
        &self,
        kind: DatabaseKind,
        conn: &mut C,
        options: BeginOptions,
        search_path: Option<&str>,
    ) -> QueryResult<()> {
        match &self.0 {
            None => kind.begin(conn, options, search_path),
            Some(outer) => outer.begin(conn, options, search_path),
        }
    }

    /// Commits. `guard` is a statement with a guard before its `COMMIT`; `refused` is set if the database refuses the
    /// guard.
    pub(crate) fn commit(
        &self,
        kind: DatabaseKind,
        conn: &mut C,
        guard: Option<&str>,
        refused: &Cell<bool>,
    ) -> QueryResult<()> {
        match (&self.0, guard) {
            (None, None) => conn.commit_level(),
            (None, Some(sql)) => conn.commit_with(sql, &|error, depth| {
                refused.set(kind.dialect().was_refused(error, depth));
                refused.get()
            }),
            (Some(outer), None) => outer.commit(conn),
            (Some(outer), Some(_)) => {
                outer.probe(conn).inspect_err(|_| refused.set(true))?;
                outer.commit(conn)
            }
        }
    }

    /// Rolls back the innermost level, at this depth.
    pub(crate) fn roll_back_level(&self, conn: &mut C, depth: u32) -> QueryResult<()> {
        match &self.0 {
            Some(outer) if depth == 1 => outer.roll_back(conn),
            _ => conn.rollback_level(),
        }
    }

    /// Records the end of the outer transaction, if there is one.
    pub(crate) fn invalidate_outer(&self, cause: impl Into<String>, at: Option<SourceLocation>) {
        if let Some(outer) = &self.0 {
            outer.invalidate(cause.into(), at);
        }
    }
}
