//! The public handle to a registered application.

use std::any::Any;
use std::panic::Location;
use std::sync::Arc;

use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::context::{self, Scope};
use crate::dialect;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::migrations::MigrationSet;
use crate::pool::{AppPool, AppStatus, PoolOptions};
#[cfg(feature = "testing")]
use crate::session::OpenSessions;
use crate::session::{Session, SessionFactory, SessionInner};
use crate::settings::Settings;

/// A handle to a registered application: cheap to clone, usable from every thread.
///
/// An application costs the server nothing until its first statement.
pub struct App<C: SessionConnection>(Arc<AppInner<C>>);

impl<C: SessionConnection> Clone for App<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C: SessionConnection> std::fmt::Debug for App<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("id", &self.id()).field("server", &self.options().target).finish_non_exhaustive()
    }
}

// A panic inside a context rolls back, so it leaves nothing of an application half-done.
impl<C: SessionConnection> std::panic::UnwindSafe for App<C> {}
impl<C: SessionConnection> std::panic::RefUnwindSafe for App<C> {}

struct AppInner<C: SessionConnection> {
    factory: Arc<SessionFactory<C>>,
    database: u64,
    migrations: Arc<dyn MigrationSet<C>>,
}

impl<C: SessionConnection> App<C> {
    pub(crate) fn new(factory: SessionFactory<C>, database: u64, migrations: Arc<dyn MigrationSet<C>>) -> Self {
        Self(Arc::new(AppInner { factory: Arc::new(factory), database, migrations }))
    }

    /// The application's id.
    pub fn id(&self) -> &str {
        self.core().id()
    }

    /// Runs `body` inside a context of this application. Uncommitted work is rolled back when `body` returns or
    /// panics. [`scope`](Self::scope) has more options.
    #[track_caller]
    pub fn context<R>(&self, body: impl FnOnce() -> R) -> R {
        context::enter(self, Location::caller(), body)
    }

    /// The options of a context: whether it commits at its end, its isolation level, its deadline and more.
    pub fn scope(&self) -> Scope<C> {
        Scope::new(self.clone())
    }

    /// Opens a session outside of any context. The session ends, and rolls back, when its last handle is dropped. A
    /// hook that owns a handle of its own session keeps the session alive; call [`Session::remove`] if a hook may do
    /// so.
    ///
    /// # Errors
    /// [`Error::Disposed`] after the application was removed.
    #[track_caller]
    pub fn open_session(&self) -> Result<Session<C>> {
        self.core().check_not_removed()?;
        Ok(self.new_session(Settings::DEFAULT, Location::caller()))
    }

    /// The kind of database, as the URL or the connection type says.
    pub fn database_kind(&self) -> DatabaseKind {
        self.options().target.kind
    }

    /// The database as logs and errors show it: without password and parameters.
    pub fn url_shown(&self) -> &str {
        &self.options().target.shown
    }

    /// Checks connectivity with a pooled connection.
    ///
    /// # Errors
    /// The errors of a checkout, [`Error::ConnectionLost`] and [`Error::Query`]; see [`Session`].
    #[track_caller]
    pub fn ping(&self) -> Result<()> {
        let at = Location::caller();
        let mut connection = self.pool()?.acquire(at, false, None)?;
        let answer = connection.conn().ping();
        if answer.is_err() {
            connection.close_at_checkin();
        }
        drop(connection);
        answer.map_err(|error| match dialect::is_connection_lost(&error) {
            true => Error::lost(self.id(), error, false, at),
            false => Error::from_query(error, at),
        })
    }

    /// The application's connections at this moment. They include connections that were checked out when the
    /// application was disposed of and have not been checked in.
    pub fn status(&self) -> AppStatus {
        let each: Vec<_> = match self.core().pools() {
            Some(pools) => pools.current.iter().chain(&pools.retired).map(|pool| pool.status()).collect(),
            None => Vec::new(),
        };
        each.into_iter().fold(AppStatus::at_rest(self.options()), AppStatus::and)
    }

    /// The application without its type, for [`of_erased`](Self::of_erased).
    pub(crate) fn erased(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.0) as _
    }

    pub(crate) fn of_erased(erased: &Arc<dyn Any + Send + Sync>) -> Option<Self> {
        Arc::clone(erased).downcast().ok().map(Self)
    }

    pub(crate) fn core(&self) -> &Arc<AppCore<C>> {
        &self.0.factory.app_core
    }

    pub(crate) fn options(&self) -> &PoolOptions<C> {
        self.core().options()
    }

    /// The current pool.
    #[track_caller]
    pub(crate) fn pool(&self) -> Result<Arc<AppPool<C>>> {
        self.core().pool()
    }

    pub(crate) fn new_session(&self, settings: Settings, at: Place) -> Session<C> {
        Session(SessionInner::new(Arc::clone(&self.0.factory), settings, at))
    }

    /// The list of the open sessions, if this is the application of a test.
    #[cfg(feature = "testing")]
    pub(crate) fn open_sessions(&self) -> Option<Arc<OpenSessions>> {
        self.0.factory.open_sessions.clone()
    }

    pub(crate) fn database(&self) -> u64 {
        self.0.database
    }

    pub(crate) fn migration_set(&self) -> &dyn MigrationSet<C> {
        &*self.0.migrations
    }

    /// Whether both are handles of the same application.
    #[cfg(feature = "testing")]
    pub(crate) fn is_same_app(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use diesel::SqliteConnection;

    use crate::{Config, Database};

    #[test]
    fn app_keeps_a_retired_pool_until_it_has_drained() {
        let db = Database::<SqliteConnection>::without_migrations();
        let app = db.init_app("app", Config::new(":memory:")).expect("sound");
        app.ping().expect("it answers");
        // The state in which a disposal in another thread has retired the pool and closed nothing yet.
        let mut pools = app.core().pools().expect("it was used");
        let current = pools.current.take();
        pools.retired.extend(current);
        drop(pools);
        app.ping().expect("it answers");
        let retired = || app.core().pools().expect("it was used").retired.len();
        assert_eq!((retired(), app.status().open), (1, 2));
        assert_eq!(app.dispose_report().expect("nothing is out").closed, 2);
        assert_eq!((retired(), app.status().open), (0, 0));
    }
}
