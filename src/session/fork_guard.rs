//! A session that was in use when its process was forked: the connection is the parent's.

use super::transaction_state::{Phase, TransactionState};
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

impl<C: SessionConnection> TransactionState<C> {
    /// An error where this process was forked from the one that took the connection. The connection is let go of, untouched, and
    /// so is the turn to write; a transaction that had begun has to be rolled back, which sends nothing.
    ///
    /// It is asked once before anything is sent, and once after the program's own code has had the connection.
    pub(super) fn not_inherited(&mut self, at: Place) -> Result<()> {
        if !self.pooled.as_ref().is_some_and(|pooled| pooled.is_inherited()) {
            return Ok(());
        }
        self.pooled = None;
        std::mem::forget(self.turn_to_write.take());
        match self.phase {
            Phase::Begun(_) => {
                self.invalidate("the process was forked, and the transaction is its parent's".into(), at, true)
            }
            Phase::Idle | Phase::Reading(_) => self.release(),
        }
        Err(Error::Forked { app: self.app.id().into() })
    }
}
