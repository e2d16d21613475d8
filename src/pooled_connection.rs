//! A connection of an application's pool, for code that needs a connection and no session.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Result, SourceLocation};
use crate::pool::CheckedOut;
use crate::sync::{ThreadId, current_thread};

/// A connection that [`App::checkout`] has checked out of the pool of an application. The drop checks it in.
///
/// It derefs to the connection: `query.load(&mut *conn)`. It is `Send`, so it may move to another thread and be
/// dropped there.
pub struct PooledConnection<C: SessionConnection> {
    connection: CheckedOut<C>,
    at: SourceLocation,
    /// The thread that used the connection last.
    user: ThreadId,
    /// The hooks at the checkin receive the application.
    app: App<C>,
}

impl<C: SessionConnection> App<C> {
    /// Checks a connection out of the application's pool, for existing code that needs a connection. In new code, use
    /// a [`Session`](crate::Session).
    ///
    /// The connection counts like every other one: in [`Config::max_size`](crate::Config::max_size), in
    /// [`Database::max_connections`](crate::Database::max_connections), in [`status`](Self::status) and in the lists of
    /// holders, with the source location of this call. [`dispose`](Self::dispose) waits for it, unless the calling
    /// thread itself was the last one to use it, and lists it in [`still_out`](crate::pool::DisposeReport::still_out)
    /// if it is not checked in in time. [`Config::acquire_timeout`](crate::Config::acquire_timeout) limits the wait for
    /// it. At its checkin it is reset like a connection on which raw SQL ran ([`Config::reset`](crate::Config::reset)),
    /// and the hooks of the pool run. On SQLite, MySQL and MariaDB that may close it; `Reset::Never` prevents this.
    ///
    /// ```
    /// use diesel::prelude::*;
    /// use diesel_session::{Config, Database};
    ///
    /// static DB: Database<SqliteConnection> = Database::without_migrations();
    ///
    /// let app = DB.init_app("shop", Config::new(":memory:"))?;
    /// let mut conn = app.checkout()?;
    /// let worker = std::thread::spawn(move || {
    ///     diesel::select(1.into_sql::<diesel::sql_types::Integer>()).get_result::<i32>(&mut *conn)
    /// });
    /// assert_eq!(worker.join().unwrap().unwrap(), 1);
    /// app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// It differs from the connection of a session ([`Session::connection`](crate::Session::connection)):
    ///
    /// * It is another connection than that of the context's session, so it does not see the uncommitted work of the
    ///   session, and the session does not see its work before it is committed.
    /// * No transaction is begun. Each statement commits by itself, unless the code begins a transaction, for example
    ///   with Diesel's `transaction`. A transaction that is open at the drop is rolled back, and a warning is logged.
    /// * The isolation level, the deadline, the `search_path` and the read-only mode of a scope do not apply.
    /// * Errors are Diesel's errors. A lost connection is closed at its checkin. On MySQL and MariaDB a statement whose
    ///   text is empty panics.
    /// * On SQLite its writes do not wait in the queue of this process's writers, but for the lock of the file, for up
    ///   to [`Config::lock_timeout`](crate::Config::lock_timeout).
    /// * It may move to another thread, so a wait for it is never reported as
    ///   [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock). A thread that holds it and waits for another
    ///   connection of a full pool gets [`ErrorKind::AcquireTimeout`](crate::ErrorKind::AcquireTimeout) in the end.
    ///
    /// If its thread panics while it is dropped, the connection is closed. A forked process must not use it.
    ///
    /// In a test that is rolled back it is the one connection of the test, in a savepoint, so sessions wait until it is
    /// dropped. The drop keeps the work for the rest of the test. If a statement has failed on PostgreSQL, the drop
    /// undoes all work since the checkout, because a failed statement aborts the transaction of the test.
    ///
    /// # Errors
    /// The errors of a checkout; see [`Session`](crate::Session).
    #[track_caller]
    pub fn checkout(&self) -> Result<PooledConnection<C>> {
        let at = Location::caller();
        let mut connection = self.pool()?.acquire(at, false, None)?;
        connection.begin_program_use(at)?;
        Ok(PooledConnection { connection, at, user: current_thread().id(), app: self.clone() })
    }
}

impl<C: SessionConnection> PooledConnection<C> {
    /// The application from whose pool the connection was checked out.
    pub fn app(this: &Self) -> &App<C> {
        &this.app
    }
}

impl<C: SessionConnection> Deref for PooledConnection<C> {
    type Target = C;

    fn deref(&self) -> &C {
        self.connection.conn_ref()
    }
}

impl<C: SessionConnection> DerefMut for PooledConnection<C> {
    fn deref_mut(&mut self) -> &mut C {
        let user = current_thread().id();
        if user != self.user {
            self.user = user;
            self.connection.note_movable();
        }
        self.connection.conn()
    }
}

impl<C: SessionConnection> fmt::Debug for PooledConnection<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledConnection").field("app", &self.app.id()).field("at", &self.at).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for PooledConnection<C> {
    fn drop(&mut self) {
        self.connection.end_program_use(self.at);
    }
}
