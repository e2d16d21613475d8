//! A session whose transaction is nested in an outer transaction, which all sessions of the application share.

use std::panic::resume_unwind;

use diesel::QueryResult;

use super::statement::Statement;
use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::error::{Result, SourceLocation};
use crate::pool::TransactionStyle;
use crate::settings::Mode;

impl<C: SessionConnection> TransactionState<C> {
    #[inline]
    pub(super) fn style(&self) -> &TransactionStyle<C> {
        &self.app.options().transactions
    }

    /// Whether the statement has a transaction of its own, after which the connection is checked in.
    ///
    /// In an outer transaction it is a savepoint. An autocommitted statement needs one, because otherwise its failure
    /// would abort the outer transaction. A read before the transaction of the session needs one under any default
    /// isolation level, because otherwise the session would keep the only connection and all other sessions would wait
    /// for it.
    ///
    /// Behind a pooler in transaction mode, an autocommitted statement needs one if it has a limit, or if it may leave
    /// something on the session of the server.
    #[inline]
    pub(super) fn needs_statement_savepoint(&self, statement: &Statement) -> bool {
        let autocommits = self.settings.mode == Mode::Autocommit;
        if self.style().is_nested() {
            return autocommits || self.may_read_outside() && statement.only_reads(self.kind()) == Some(true);
        }
        autocommits
            && self.app.options().shares_sessions()
            && (self.has_limit_of_transaction() || !statement.leaves_nothing(|| self.kind()))
    }

    /// Ends the transaction of one statement. If the statement aborted it or has failed, it is rolled back.
    pub(super) fn end_statement_savepoint(&mut self, access: Access, keep: bool, at: SourceLocation) -> Result<()> {
        let style = self.style().clone();
        let Some(outer) = style.outer() else { return self.end_statement_transaction(keep, at) };
        let is_intact = self.invalidation.is_none() && !self.is_doomed() && self.depth() == Some(1);
        let ended = match is_intact {
            true => self.send(|conn| match access {
                Access::Read => outer.release(conn),
                Access::Write | Access::Raw => outer.commit(conn),
            }),
            false => Ok(()),
        };
        let ended = ended.map_err(|error| self.explain(error, at, None));
        if is_intact && ended.is_ok() {
            self.release();
        } else {
            self.rollback();
        }
        if self.settings.mode != Mode::Autocommit && self.reads_committed() {
            self.note_reading();
        }
        ended
    }

    fn end_statement_transaction(&mut self, keep: bool, at: SourceLocation) -> Result<()> {
        let committed = if keep { self.commit(at).unwrap_or_else(|panic| resume_unwind(panic)) } else { Ok(()) };
        if !keep || committed.is_err() {
            self.rollback();
        }
        committed
    }

    pub(super) fn roll_back_level(&mut self, depth: u32) -> QueryResult<()> {
        let style = self.style().clone();
        self.send(|conn| style.roll_back_level(conn, depth))
    }

    /// Makes the connection of an outer transaction usable again after a panic, because the rollback that follows
    /// restores its state.
    pub(super) fn revive_connection(&mut self) {
        if self.style().outer().is_none_or(|outer| outer.check(self.app.id()).is_err()) {
            return;
        }
        let Some(connection) = &mut self.connection else { return };
        let managed = connection.managed();
        if managed.closes_at_checkin && !managed.lost {
            managed.closes_at_checkin = false;
        }
    }
}
