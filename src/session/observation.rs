//! Statements after which the connection may not be what it was.

use diesel::QueryResult;

use super::statement::{Statement, Traces};
use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::error::Place;
use crate::pool::{CheckedOut, Reading};

impl<C: SessionConnection> TransactionState<C> {
    /// Takes the connection out, for a guard that owns it.
    pub(crate) fn take_connection(&mut self) -> CheckedOut<C> {
        self.look_at(Statement::RAW);
        self.had_raw_access = true;
        self.guarded = self.watch_call();
        self.pooled.take().expect("prepared: there is a pooled")
    }

    /// Puts back what [`take_connection`](Self::take_connection) took.
    pub(crate) fn put_back_connection(&mut self, pooled: CheckedOut<C>, at: Place) {
        self.pooled = Some(pooled);
        let guarded = self.guarded.take();
        self.call_returned(guarded);
        if self.not_inherited(at).is_err() {
            return;
        }
        self.with_observer(|observer| observer.stop_reading());
        self.sent_at = Some(at);
        self.settle(Access::Raw, at, None);
        self.rest();
    }

    /// Sends what may leave something on the connection.
    pub(super) fn send_read<T>(
        &mut self,
        statement: Statement,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> QueryResult<T> {
        self.look_at(statement);
        let outcome = self.send(send);
        let (kind, sent) = (self.kind(), outcome.is_ok());
        self.with_observer(|observer| {
            observer.stop_reading();
            if sent && !observer.has_seen_leftovers() {
                statement.clear(kind);
            }
        });
        outcome
    }

    /// Raw statements are read. A typed one marks the connection where a reset removes whatever it leaves; otherwise its text says
    /// whether the connection has to be closed.
    fn look_at(&mut self, Statement { access, traces, .. }: Statement) {
        let can_reset = self.kind().can_reset();
        let Some(pooled) = &mut self.pooled else { return };
        let managed = pooled.managed();
        match (access, traces) {
            (Access::Raw, _) => managed.observer.read_statements(Reading::Raw),
            (_, Traces::Some) if can_reset => managed.marked = true,
            _ => managed.observer.read_statements(Reading::Typed),
        }
    }
}
