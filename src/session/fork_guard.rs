//! A session whose process was forked while it held a connection: the connection belongs to the parent process.

use super::transaction_state::{TransactionPhase, TransactionState};
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};

impl<C: SessionConnection> TransactionState<C> {
    /// Returns an error if the connection was checked out before a fork of the process. The session then gives
    /// up the connection and the write permit without touching them. A transaction that had begun is invalidated; its
    /// rollback sends nothing.
    ///
    /// This is checked before anything is sent, and again after code of the program has had the connection.
    pub(super) fn check_not_forked(&mut self, at: Place) -> Result<()> {
        if !self.connection.as_ref().is_some_and(|connection| connection.is_inherited()) {
            return Ok(());
        }
        self.connection = None;
        std::mem::forget(self.write_permit.take());
        match self.phase {
            TransactionPhase::Begun(_) => {
                self.invalidate("the process was forked, and the transaction is its parent's".into(), at, true)
            }
            TransactionPhase::Idle | TransactionPhase::Reading(_) => self.release(),
        }
        Err(Error::Forked { app: self.app.id().into() })
    }
}
