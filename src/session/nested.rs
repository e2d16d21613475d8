//! A session on the pinned connection of a test: its transaction is a savepoint in the transaction of the test, which
//! is rolled back in the end.

use diesel::QueryResult;

use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::pool::PinnedConnection;
use crate::settings::Mode;

impl<C: SessionConnection> TransactionState<C> {
    /// The one connection of the test, if the application has a pinned connection.
    #[inline]
    pub(super) fn pinned(&self) -> Option<&PinnedConnection<C>> {
        self.app.options().pinned.as_deref()
    }

    /// Whether the statement runs in a savepoint of its own, after which the connection is checked in. An
    /// autocommitted statement needs one, because otherwise its failure would abort the transaction of the test. A
    /// typed SELECT before the transaction of the session needs one, because otherwise the session would keep the
    /// only connection and all other sessions would wait for it.
    pub(super) fn needs_statement_savepoint(&self, access: Access) -> bool {
        self.pinned().is_some()
            && (self.settings.mode == Mode::Autocommit || access == Access::Read && self.may_read_outside())
    }

    /// Releases the savepoint of one statement. If the statement aborted its transaction, the savepoint is rolled
    /// back.
    pub(super) fn end_statement_savepoint(&mut self, access: Access) {
        let kind = self.kind();
        if self.invalidation.is_some() && self.settings.mode != Mode::Autocommit {
            // The session stays invalidated until its rollback, as on an ordinary connection, where the statement would
            // have begun the transaction.
            return;
        }
        let is_intact = self.invalidation.is_none() && !self.is_doomed() && self.depth() == Some(1);
        let had_orphans = self.pinned().is_some_and(PinnedConnection::had_orphans);
        let is_released = is_intact
            && self
                .send(|conn| match access {
                    Access::Read => kind.release_nested(conn),
                    Access::Write | Access::Raw => kind.commit_nested(conn, had_orphans),
                })
                .is_ok();
        if is_released {
            self.restore();
            self.release();
        } else {
            self.rollback();
        }
    }

    pub(super) fn roll_back_level(&mut self, depth: u32) -> QueryResult<()> {
        let kind = self.kind();
        match depth == 1 && self.pinned().is_some() {
            true => self.send(|conn| kind.rollback_nested(conn)),
            false => self.send(C::rollback_level),
        }
    }

    /// Makes the pinned connection usable again after a panic, because the rollback that follows restores its state.
    pub(super) fn revive_pinned(&mut self) {
        if self.pinned().is_none_or(|pinned| pinned.poisoned().is_some()) {
            return;
        }
        let Some(connection) = &mut self.connection else { return };
        let managed = connection.managed();
        if managed.closes_at_checkin && !managed.lost {
            managed.closes_at_checkin = false;
        }
    }
}
