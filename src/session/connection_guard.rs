//! The session's connection as an owned guard.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use super::SessionInner;
use super::statement::Statement;
use crate::connection::SessionConnection;
use crate::error::{Details, Result, SourceLocation};
use crate::pool::{CallDeadline, CheckedOut};
use crate::recorder::CallSite;

/// The connection of a session. [`Session::connection`](crate::Session::connection) moves it out of the session, and
/// the drop of the guard moves it back.
///
/// The guard derefs to the connection, and `&mut *guard` is the connection that Diesel's functions take:
///
/// ```
/// # use diesel_session::{Config, Database};
/// # use diesel::prelude::*;
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// # diesel::table! { users (id) { id -> Integer, } }
/// # let app = DB.init_app("guard", Config::new(":memory:"))?;
/// # app.enter(|| {
/// # DB.session()?.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn,
/// #     "CREATE TABLE users (id INTEGER PRIMARY KEY)"))?;
/// let session = DB.session()?;
/// let conn = &mut *session.connection()?;                 // lives to the end of the block
/// diesel::insert_into(users::table).values(users::id.eq(1)).execute(conn)?;
/// assert_eq!(users::table.select(users::id).load::<i32>(conn)?, [1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// # app.dispose()?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// The guard itself is no Diesel connection, because a Diesel connection is `Send`, and the guard belongs to the thread
/// of its session.
pub struct ConnectionGuard<C: SessionConnection> {
    session: Rc<SessionInner<C>>,
    connection: Option<CheckedOut<C>>,
    /// The watch over the deadline of the scope.
    watchdog: Option<CallDeadline>,
    at: SourceLocation,
    call_site: Option<CallSite>,
}

impl<C: SessionConnection> ConnectionGuard<C> {
    pub(super) fn take(session: &Rc<SessionInner<C>>, at: SourceLocation) -> Result<Self> {
        session.autoflush_before(Statement::RAW, at)?;
        let mut transaction = session.borrow_transaction(at)?;
        if transaction.is_autocommitting() && transaction.app.options().shares_sessions() {
            return Err(Details::InvalidConfig {
                app: transaction.app.id().into(),
                reason: format!(
                    "`Session::connection` at {at} is in an autocommit scope behind a pooler in transaction mode, where a \
                     guard could not return the error of its commit. Use `Session::with`, or leave `autocommit` out"
                ),
            }
            .into());
        }
        if let Err(error) = transaction.prepare(&Statement::RAW, at) {
            drop(transaction);
            return Err(session.with_undo(error));
        }
        let (connection, watchdog) = transaction.take_connection();
        drop(transaction);
        // The code that has the connection may write to handles after it has changed their rows.
        session.expire_rows();
        if let Some(unit) = session.unit.get() {
            unit.state.note_changing();
        }
        session.has_guard.set(true);
        let (session, connection) = (Rc::clone(session), Some(connection));
        Ok(Self { session, connection, watchdog, at, call_site: CallSite::enter(at) })
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
        let mut transaction = self.session.transaction.borrow_mut();
        transaction.return_connection(connection, self.watchdog.take(), self.at);
        if self.session.ended.get() {
            transaction.rollback();
        }
        drop(transaction);
        self.session.expire_rows();
    }
}
