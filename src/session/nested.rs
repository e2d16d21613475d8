//! A session whose transaction is nested in an outer transaction, which all sessions of the application share.

use diesel::QueryResult;

use super::statement::Statement;
use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::pool::TransactionStyle;
use crate::settings::Mode;

impl<C: SessionConnection> TransactionState<C> {
    #[inline]
    pub(super) fn style(&self) -> &TransactionStyle<C> {
        &self.app.options().transactions
    }

    /// Whether the statement runs in a savepoint of its own, after which the connection is checked in. An
    /// autocommitted statement needs one, because otherwise its failure would abort the outer transaction. A read before
    /// the transaction of the session needs one under any default isolation level, because otherwise the session would
    /// keep the only connection and all other sessions would wait for it.
    pub(super) fn needs_statement_savepoint(&self, statement: &Statement) -> bool {
        let may_precede = || self.may_read_outside() && statement.only_reads(self.kind()) == Some(true);
        self.style().is_nested() && (self.settings.mode == Mode::Autocommit || may_precede())
    }

    /// Releases the savepoint of one statement. If the statement aborted its transaction, the savepoint is rolled
    /// back.
    pub(super) fn end_statement_savepoint(&mut self, access: Access) {
        let style = self.style().clone();
        let Some(outer) = style.outer() else { return };
        let is_intact = self.invalidation.is_none() && !self.is_doomed() && self.depth() == Some(1);
        let is_released = is_intact
            && self
                .send(|conn| match access {
                    Access::Read => outer.release(conn),
                    Access::Write | Access::Raw => outer.commit(conn),
                })
                .is_ok();
        if is_released {
            self.release();
        } else {
            self.rollback();
        }
        if self.settings.mode != Mode::Autocommit && self.reads_committed() {
            self.note_reading();
        }
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
