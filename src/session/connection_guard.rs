//! The session's connection as an owned guard.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::SessionInner;
use super::statement::Statement;
use super::transaction_state::Access;
use crate::connection::SessionConnection;
use crate::error::{Place, Result};
use crate::pool::CheckedOut;
use crate::recorder::For;

/// A session's connection, taken out of it by [`Session::connection`](crate::Session::connection) and put back by drop.
///
/// It derefs to the connection: `query.load(&mut *conn)`.
pub struct ConnectionGuard<C: SessionConnection> {
    session: Rc<SessionInner<C>>,
    pooled: Option<CheckedOut<C>>,
    at: Place,
    sent_for: Option<For>,
}

impl<C: SessionConnection> ConnectionGuard<C> {
    pub(super) fn take(session: &Rc<SessionInner<C>>, at: Place) -> Result<Self> {
        session.autoflush_before(Statement::RAW, at)?;
        let mut core = session.enter(at)?;
        if let Err(error) = core.prepare(Access::Raw, at) {
            drop(core);
            return Err(session.with_undo(error));
        }
        let pooled = core.take_connection();
        drop(core);
        // The code that has the connection may write to handles after it has changed their rows.
        session.expire_rows();
        if let Some(unit) = session.unit.get() {
            unit.note_changing();
        }
        session.guarded.set(true);
        session.used_at.set(Some(at));
        Ok(Self { session: Rc::clone(session), pooled: Some(pooled), at, sent_for: For::call_at(at) })
    }

    fn pooled(&self) -> &CheckedOut<C> {
        self.pooled.as_ref().expect("only drop takes it")
    }
}

impl<C: SessionConnection> Deref for ConnectionGuard<C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.pooled().conn_ref()
    }
}

impl<C: SessionConnection> DerefMut for ConnectionGuard<C> {
    fn deref_mut(&mut self) -> &mut C {
        self.pooled.as_mut().expect("only drop takes it").conn()
    }
}

impl<C: SessionConnection> fmt::Debug for ConnectionGuard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionGuard").field("at", &self.at).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for ConnectionGuard<C> {
    fn drop(&mut self) {
        let Some(mut pooled) = self.pooled.take() else { return };
        if std::thread::panicking() {
            pooled.doom();
        }
        // What comes now is the library's own.
        self.sent_for = None;
        self.session.guarded.set(false);
        self.session.used_at.set(None);
        let mut core = self.session.core.borrow_mut();
        core.put_back_connection(pooled, self.at);
        if self.session.ended.get() {
            core.rollback();
        }
        drop(core);
        self.session.expire_rows();
    }
}
