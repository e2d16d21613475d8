//! Statements after which the connection may not be what it was.

use diesel::QueryResult;

use super::statement::{Statement, Traces};
use super::transaction::{Access, Core};
use crate::connection::SessionConnection;
use crate::error::Place;
use crate::pool::{CheckedOut, Reading};

impl<C: SessionConnection> Core<C> {
    /// Takes the connection out, for a guard that owns it.
    pub(crate) fn lend(&mut self) -> CheckedOut<C> {
        self.look_at(Statement::RAW);
        self.had_raw_access = true;
        self.lent = self.watch_call();
        self.lease.take().expect("prepared: there is a lease")
    }

    /// Puts back what [`lend`](Self::lend) took.
    pub(crate) fn take_back(&mut self, lease: CheckedOut<C>, at: Place) {
        self.lease = Some(lease);
        let lent = self.lent.take();
        self.call_returned(lent);
        if self.not_inherited(at).is_err() {
            return;
        }
        self.live_witness(|witness| witness.stop_reading());
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
        self.live_witness(|witness| {
            witness.stop_reading();
            if sent && !witness.has_seen_leftovers() {
                statement.clear(kind);
            }
        });
        outcome
    }

    /// Raw statements are read. A typed one marks the connection where a reset removes whatever it leaves; otherwise its text says
    /// whether the connection has to be closed.
    fn look_at(&mut self, Statement { access, traces, .. }: Statement) {
        let can_reset = self.kind().can_reset();
        let Some(lease) = &mut self.lease else { return };
        let managed = lease.managed();
        match (access, traces) {
            (Access::Raw, _) => managed.witness.read_statements(Reading::Raw),
            (_, Traces::Some) if can_reset => managed.marked = true,
            _ => managed.witness.read_statements(Reading::Typed),
        }
    }
}
