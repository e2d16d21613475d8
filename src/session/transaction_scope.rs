//! An open closure of `transaction`, `savepoint` or `retry`.

use super::hooks::HookMark;
use super::session_inner::SessionInner;
use crate::connection::SessionConnection;
use crate::error::Place;

/// Undoes what the closure did if it is dropped by a panic.
pub(super) struct TransactionScope<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    pub(super) mark: HookMark,
    is_savepoint: bool,
    is_open: bool,
}

impl<'s, C: SessionConnection> TransactionScope<'s, C> {
    pub(super) fn open(session: &'s SessionInner<C>, name: &'static str, at: Place, is_savepoint: bool) -> Self {
        session.open_scopes.borrow_mut().push((name, at));
        Self { session, mark: session.hooks.borrow().mark(), is_savepoint, is_open: true }
    }

    pub(super) fn close(mut self) {
        self.is_open = false;
        self.session.open_scopes.borrow_mut().pop();
    }
}

impl<C: SessionConnection> Drop for TransactionScope<'_, C> {
    fn drop(&mut self) {
        if !self.is_open {
            return;
        }
        let Some((_, at)) = self.session.open_scopes.borrow_mut().pop() else { return };
        if self.is_savepoint {
            if let Ok(mut transaction) = self.session.borrow_transaction_at_end(at) {
                transaction.roll_back_savepoint(at);
            }
            self.session.unit_savepoint_rolled_back();
            self.session.discard_hooks_since(self.mark);
        } else {
            self.session.roll_back_scope(at);
        }
    }
}
