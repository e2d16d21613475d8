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
use crate::recorder::CallSite;

/// The connection of a session. [`Session::connection`](crate::Session::connection) moves it out of the session, and
/// the drop of the guard moves it back.
///
/// It derefs to the connection: `query.load(&mut *conn)`.
pub struct ConnectionGuard<C: SessionConnection> {
    session: Rc<SessionInner<C>>,
    connection: Option<CheckedOut<C>>,
    at: Place,
    call_site: Option<CallSite>,
}

impl<C: SessionConnection> ConnectionGuard<C> {
    pub(super) fn take(session: &Rc<SessionInner<C>>, at: Place) -> Result<Self> {
        session.autoflush_before(Statement::RAW, at)?;
        let mut transaction = session.borrow_transaction(at)?;
        if let Err(error) = transaction.prepare(Access::Raw, at) {
            drop(transaction);
            return Err(session.with_undo(error));
        }
        let connection = transaction.take_connection();
        drop(transaction);
        // The code that has the connection may write to handles after it has changed their rows.
        session.expire_rows();
        if let Some(unit) = session.unit.get() {
            unit.note_changing();
        }
        session.has_guard.set(true);
        session.used_at.set(Some(at));
        Ok(Self { session: Rc::clone(session), connection: Some(connection), at, call_site: CallSite::enter(at) })
    }

    fn connection(&self) -> &CheckedOut<C> {
        self.connection.as_ref().expect("only drop takes it")
    }
}

impl<C: SessionConnection> Deref for ConnectionGuard<C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.connection().conn_ref()
    }
}

impl<C: SessionConnection> DerefMut for ConnectionGuard<C> {
    fn deref_mut(&mut self) -> &mut C {
        self.connection.as_mut().expect("only drop takes it").conn()
    }
}

impl<C: SessionConnection> fmt::Debug for ConnectionGuard<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionGuard").field("at", &self.at).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for ConnectionGuard<C> {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if std::thread::panicking() {
            connection.close_at_checkin();
        }
        // The library sends what follows.
        self.call_site = None;
        self.session.has_guard.set(false);
        self.session.used_at.set(None);
        let mut transaction = self.session.transaction.borrow_mut();
        transaction.return_connection(connection, self.at);
        if self.session.ended.get() {
            transaction.rollback();
        }
        drop(transaction);
        self.session.expire_rows();
    }
}
