//! An open closure of `transaction` or `savepoint`.

use super::hooks::Mark;
use super::session_inner::SessionInner;
use crate::connection::SessionConnection;
use crate::error::Place;

/// Dropped by a panic, it undoes what the closure did.
pub(super) struct TransactionScope<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    pub(super) mark: Mark,
    savepoint: bool,
    open: bool,
}

impl<'s, C: SessionConnection> TransactionScope<'s, C> {
    pub(super) fn open(session: &'s SessionInner<C>, name: &'static str, at: Place, savepoint: bool) -> Self {
        session.blocks.borrow_mut().push((name, at));
        Self { session, mark: session.hooks.borrow().mark(), savepoint, open: true }
    }

    pub(super) fn close(mut self) {
        self.open = false;
        self.session.blocks.borrow_mut().pop();
    }
}

impl<C: SessionConnection> Drop for TransactionScope<'_, C> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let Some((_, at)) = self.session.blocks.borrow_mut().pop() else { return };
        if self.savepoint {
            if let Ok(mut core) = self.session.enter_at_end(at) {
                core.undo_level(at);
            }
            self.session.unit_level_undone();
            self.session.forget_hooks(self.mark);
        } else {
            self.session.undo(at);
        }
    }
}
