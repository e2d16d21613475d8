//! Statements that may change the connection for longer than their transaction: raw SQL, code of the program, and
//! functions that the program has defined.

use diesel::QueryResult;

use super::statement::{Leftovers, Statement};
use super::transaction_state::{Access, PREPARED, TransactionState};
use crate::connection::SessionConnection;
use crate::error::Place;
use crate::pool::{CheckedOut, SqlSource};

impl<C: SessionConnection> TransactionState<C> {
    /// Moves the connection out of the session, into a `ConnectionGuard`.
    pub(crate) fn take_connection(&mut self) -> CheckedOut<C> {
        self.observe(Statement::RAW);
        self.had_raw_access = true;
        self.guard_watchdog = self.start_watchdog();
        self.connection.take().expect(PREPARED)
    }

    /// Moves the connection back that [`take_connection`](Self::take_connection) has moved out.
    pub(crate) fn return_connection(&mut self, connection: CheckedOut<C>, at: Place) {
        self.connection = Some(connection);
        let guard_watchdog = self.guard_watchdog.take();
        self.stop_watchdog(guard_watchdog);
        if self.check_not_forked(at).is_err() {
            return;
        }
        self.with_observer(|observer| observer.stop_reading());
        self.sent_at = Some(at);
        self.reconcile(Access::Raw, at, None);
        self.release_if_idle();
    }

    /// Sends a statement that may leave something on the connection.
    pub(super) fn send_observed<T>(
        &mut self,
        statement: Statement,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> QueryResult<T> {
        self.observe(statement);
        let outcome = self.send(send);
        let (kind, sent) = (self.kind(), outcome.is_ok());
        self.with_observer(|observer| {
            observer.stop_reading();
            if sent && !observer.has_seen_leftovers() {
                statement.remember_clean(kind);
            }
        });
        outcome
    }

    /// Has the observer read the texts of the following statements. If a typed statement may leave something and a
    /// reset can remove it, the connection is only marked for the reset.
    fn observe(&mut self, Statement { access, leftovers, .. }: Statement) {
        let can_reset = self.kind().can_reset();
        let Some(connection) = &mut self.connection else { return };
        let managed = connection.managed();
        match (access, leftovers) {
            (Access::Raw, _) => managed.observer.read_statements(SqlSource::Raw),
            (_, Leftovers::Possible) if can_reset => managed.marked_dirty = true,
            _ => managed.observer.read_statements(SqlSource::Typed),
        }
    }
}
