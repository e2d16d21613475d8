//! A session in a test that is rolled back: its transaction is a savepoint on a connection that all sessions share.

use diesel::QueryResult;

use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::pool::PinnedConnection;
use crate::settings::Mode;

impl<C: SessionConnection> TransactionState<C> {
    /// Where the application is that of a test that is rolled back: its one connection.
    #[inline]
    pub(super) fn pinned(&self) -> Option<&PinnedConnection<C>> {
        self.app.options().pinned.as_deref()
    }

    /// Whether a statement has a savepoint of its own, after which the connection is given back. One that is committed by itself has:
    /// otherwise what fails would abort the test. A typed SELECT of a session that has not begun has too: elsewhere it would keep a connection
    /// that nobody else needs, and here all others would wait for that.
    pub(super) fn is_wrapped(&self, access: Access) -> bool {
        self.pinned().is_some()
            && (self.settings.mode == Mode::Autocommit || access == Access::Read && self.reads_outside())
    }

    /// Keeps what one statement has done, unless it failed in a way that aborts a transaction.
    pub(super) fn unwrap_statement(&mut self, access: Access) {
        let kind = self.kind();
        if self.invalidated.is_some() && self.settings.mode != Mode::Autocommit {
            // As it is where reading begins a transaction: it has to be rolled back.
            return;
        }
        let sound = self.invalidated.is_none() && !self.is_doomed() && self.depth() == Some(1);
        let had_orphans = self.pinned().is_some_and(PinnedConnection::had_orphans);
        let kept = sound
            && self
                .send(|conn| match access {
                    Access::Read => kind.release_nested(conn),
                    Access::Write | Access::Raw => kind.commit_nested(conn, had_orphans),
                })
                .is_ok();
        if kept {
            self.restore();
            self.release();
        } else {
            self.rollback();
        }
    }

    pub(super) fn roll_level_back(&mut self, depth: u32) -> QueryResult<()> {
        let kind = self.kind();
        match depth == 1 && self.pinned().is_some() {
            true => self.send(|conn| kind.rollback_nested(conn)),
            false => self.send(C::rollback_level),
        }
    }

    /// Code that panicked has most likely left the one connection of a test where a rollback puts all in order.
    pub(super) fn recover(&mut self) {
        if self.pinned().is_none_or(|pinned| pinned.poisoned().is_some()) {
            return;
        }
        let Some(pooled) = &mut self.pooled else { return };
        let managed = pooled.managed();
        if managed.doomed && !managed.lost {
            managed.doomed = false;
        }
    }
}
