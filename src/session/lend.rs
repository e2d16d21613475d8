//! The session's connection as an owned guard.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::Shared;
use super::statement::Statement;
use super::transaction::Access;
use crate::connection::SessionConnection;
use crate::error::{Place, Result};
use crate::pool::CheckedOut;
use crate::recorder::For;

/// A session's connection, taken out of it by [`Session::connection`](crate::Session::connection) and put back by drop.
///
/// It derefs to the connection: `query.load(&mut *conn)`.
pub struct LentConnection<C: SessionConnection> {
    session: Rc<Shared<C>>,
    lease: Option<CheckedOut<C>>,
    at: Place,
    sent_for: Option<For>,
}

impl<C: SessionConnection> LentConnection<C> {
    pub(super) fn take(session: &Rc<Shared<C>>, at: Place) -> Result<Self> {
        session.autoflush_before(Statement::RAW, at)?;
        let mut core = session.enter(at)?;
        if let Err(error) = core.prepare(Access::Raw, at) {
            drop(core);
            return Err(session.with_undo(error));
        }
        let lease = core.lend();
        drop(core);
        // The code that has the connection may write to handles after it has changed their rows.
        session.expire_rows();
        if let Some(unit) = session.unit.get() {
            unit.note_changing();
        }
        session.lent.set(true);
        session.used_at.set(Some(at));
        Ok(Self { session: Rc::clone(session), lease: Some(lease), at, sent_for: For::call_at(at) })
    }

    fn lease(&self) -> &CheckedOut<C> {
        self.lease.as_ref().expect("only drop takes it")
    }
}

impl<C: SessionConnection> Deref for LentConnection<C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.lease().conn_ref()
    }
}

impl<C: SessionConnection> DerefMut for LentConnection<C> {
    fn deref_mut(&mut self) -> &mut C {
        self.lease.as_mut().expect("only drop takes it").conn()
    }
}

impl<C: SessionConnection> fmt::Debug for LentConnection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LentConnection").field("at", &self.at).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for LentConnection<C> {
    fn drop(&mut self) {
        let Some(mut lease) = self.lease.take() else { return };
        if std::thread::panicking() {
            lease.doom();
        }
        // What comes now is the library's own.
        self.sent_for = None;
        self.session.lent.set(false);
        self.session.used_at.set(None);
        let mut core = self.session.core.borrow_mut();
        core.take_back(lease, self.at);
        if self.session.ended.get() {
            core.rollback();
        }
        drop(core);
        self.session.expire_rows();
    }
}
