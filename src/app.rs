//! The public handle to a registered application.

use std::any::Any;
use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app_core::AppCore;
use crate::app_hooks::AppHooks;
use crate::behind::Behind;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{Details, Error, PoolOf, Result, SourceLocation, WaitLimit};
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

/// The database object of an application, and its migrations.
pub(crate) struct AppIdentity<C: SessionConnection> {
    pub(crate) database: u64,
    pub(crate) migrations: Box<dyn MigrationSet<C>>,
}

pub(crate) struct AppInner<C: SessionConnection> {
    factory: Arc<SessionFactory<C>>,
    identity: Arc<AppIdentity<C>>,
}

/// An application of any connection type.
pub(crate) trait ErasedApp: Any + Send + Sync {
    fn id(&self) -> &str;
    /// The number of its database object.
    fn database(&self) -> u64;
}

impl<C: SessionConnection> ErasedApp for AppInner<C> {
    fn id(&self) -> &str {
        self.factory.app_core.id()
    }

    fn database(&self) -> u64 {
        self.identity.database
    }
}

impl<C: SessionConnection> AppInner<C> {
    pub(crate) fn open_session(&self, settings: Settings, at: SourceLocation) -> Result<Session<C>> {
        self.factory.app_core.check_not_removed()?;
        Ok(Session(SessionInner::new(Arc::clone(&self.factory), settings, at)))
    }
}

impl<C: SessionConnection> App<C> {
    pub(crate) fn new(mut options: PoolOptions<C>, hooks: &AppHooks<C>, identity: Arc<AppIdentity<C>>) -> Self {
        let factory = Arc::new_cyclic(|factory| {
            let row_hooks = hooks.bind(factory, &identity, &mut options);
            let open_sessions = (options.pool_of != PoolOf::Program).then(Arc::default);
            SessionFactory { app_core: AppCore::new(options), row_hooks, open_sessions }
        });
        Self::of_factory(factory, identity)
    }

    pub(crate) fn of_factory(factory: Arc<SessionFactory<C>>, identity: Arc<AppIdentity<C>>) -> Self {
        Self(Arc::new(AppInner { factory, identity }))
    }

    /// Another application with these options and the same id and migrations, without hooks for sessions.
    pub(crate) fn with_options(&self, options: PoolOptions<C>) -> Self {
        let (app_core, row_hooks) = (AppCore::new(options), [const { None }; 5]);
        let factory = SessionFactory { app_core, row_hooks, open_sessions: None };
        Self::of_factory(Arc::new(factory), Arc::clone(&self.0.identity))
    }

    /// The application's id.
    pub fn id(&self) -> &str {
        self.core().id()
    }

    /// Opens a session outside of any context. The session ends, and rolls back, when its last handle is dropped. A
    /// hook that owns a handle of its own session keeps the session alive; call [`Session::remove`] if a hook may do
    /// so.
    ///
    /// # Errors
    /// [`ErrorKind::Disposed`](crate::ErrorKind::Disposed) after the application was removed.
    #[track_caller]
    pub fn open_session(&self) -> Result<Session<C>> {
        self.inner().open_session(Settings::DEFAULT, Location::caller())
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
    /// The errors of a checkout, [`ErrorKind::ConnectionLost`](crate::ErrorKind::ConnectionLost) and
    /// [`ErrorKind::Query`](crate::ErrorKind::Query); see [`Session`].
    #[track_caller]
    pub fn ping(&self) -> Result<()> {
        self.ping_until(None, Location::caller())
    }

    /// [`ping`](Self::ping) with a deadline of its own, for example for the health check of a load balancer.
    ///
    /// `limit` covers everything that the call waits for: the queue of the pool and of
    /// [`Database::max_connections`](crate::Database::max_connections), the connect, the hook `on_checkout`, and the
    /// statement. [`Config::acquire_timeout`](crate::Config::acquire_timeout) and
    /// [`connect_timeout`](crate::Config::connect_timeout) still apply if they are shorter. A connect that is running
    /// at the deadline goes on in the background, and later callers get its connection.
    ///
    /// If a connected server does not answer the hook or the statement until the deadline, the connection is cut and
    /// closed. This works on Linux; on other systems the deadline does not end a statement. The close of a
    /// connection that is cut may take up to 250 ms more.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use diesel::prelude::*;
    /// # use diesel_session::{Config, Database};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # let app = DB.init_app("shop", Config::new(":memory:"))?;
    /// app.ping_within(Duration::from_millis(500))?;
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`ping`](Self::ping). At the deadline:
    /// [`ErrorKind::ConnectTimeout`](crate::ErrorKind::ConnectTimeout) if the server did not answer,
    /// [`ErrorKind::AcquireTimeout`](crate::ErrorKind::AcquireTimeout) or
    /// [`ErrorKind::ConnectionLimitReached`](crate::ErrorKind::ConnectionLimitReached) if no connection was free, and
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) if the hook was running.
    #[track_caller]
    pub fn ping_within(&self, limit: Duration) -> Result<()> {
        // A limit beyond the range of the clock is no limit.
        self.ping_until(Instant::now().checked_add(limit), Location::caller())
    }

    fn ping_until(&self, end: Option<Instant>, at: SourceLocation) -> Result<()> {
        let started = Instant::now();
        let pool = self.core().pool_for(at)?;
        let mut connection = pool.acquire_within(at, false, end, WaitLimit::Call)?;
        if let Some(end) = end {
            connection.checkin_deadline = Some(end);
        }
        let answer = connection.ping(end);
        if !matches!(answer, Some(Ok(()))) {
            connection.close_at_checkin();
        }
        drop(connection);
        let Some(answer) = answer else {
            return Err(Details::ConnectTimeout {
                app: self.id().into(),
                server: self.options().target.shown.clone(),
                waited: started.elapsed(),
                connecting: None,
                at,
                limit: WaitLimit::Call,
                is_pooled: self.options().config.behind != Behind::Nothing,
            }
            .into());
        };
        answer.map_err(|error| match dialect::is_connection_lost(&error) {
            true => Error::lost(self.id(), error, false, at),
            false => Error::from_query(error, at),
        })
    }

    /// The application's connections at this moment. They include connections that were checked out when the
    /// application was disposed of and have not been checked in.
    pub fn status(&self) -> AppStatus {
        let mut status = AppStatus::at_rest(self.options());
        if let Some(pools) = self.core().pools() {
            pools.current.iter().chain(&pools.retired).for_each(|pool| pool.add_to(&mut status));
        }
        status
    }

    pub(crate) fn inner(&self) -> &Arc<AppInner<C>> {
        &self.0
    }

    pub(crate) fn of_erased(erased: Arc<dyn ErasedApp>) -> Option<Self> {
        (erased as Arc<dyn Any + Send + Sync>).downcast().ok().map(Self)
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

    /// The list of the open sessions, if this is the application of a test.
    #[cfg(feature = "testing")]
    pub(crate) fn open_sessions(&self) -> Option<Arc<OpenSessions>> {
        self.0.factory.open_sessions.clone()
    }

    pub(crate) fn migration_set(&self) -> &dyn MigrationSet<C> {
        &*self.0.identity.migrations
    }

    /// Whether both are handles of the same application.
    #[cfg(feature = "testing")]
    pub(crate) fn is_same_app(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0.factory, &other.0.factory)
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
