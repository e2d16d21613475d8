//! One registered application.

use std::any::Any;
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::time::Instant;

use crate::backend;
use crate::connection::SessionConnection;
use crate::context::{self, Scope};
use crate::error::{Error, Result};
use crate::pool::{AppPool, AppStatus, Holders, Home, guard_exit, were_inherited};
use crate::process::PerProcess;
use crate::schema::MigrationSet;
use crate::session::{Session, Shared};
use crate::settings::Settings;
use crate::spec::{Spec, UnitHooks};

/// A handle to a registered application: cheap to clone, usable from every thread.
///
/// It costs the server nothing until its first statement.
pub struct App<C: SessionConnection>(Arc<Application<C>>);

impl<C: SessionConnection> Clone for App<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<C: SessionConnection> std::fmt::Debug for App<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("id", &self.id()).field("server", &self.spec().target).finish_non_exhaustive()
    }
}

// A panic inside a context rolls back, so nothing of an application is left half-done.
impl<C: SessionConnection> std::panic::UnwindSafe for App<C> {}
impl<C: SessionConnection> std::panic::RefUnwindSafe for App<C> {}

struct Application<C: SessionConnection> {
    spec: Arc<Spec<C>>,
    database: u64,
    migrations: Arc<dyn MigrationSet<C>>,
    shelf: PerProcess<Shelf<C>>,
    removed: AtomicBool,
}

/// One process's pools of an application.
struct Shelf<C: SessionConnection> {
    pools: RwLock<Pools<C>>,
}

/// The pool in use, and those disposed of that have not drained yet.
pub(crate) struct Pools<C: SessionConnection> {
    pub(crate) current: Option<Arc<AppPool<C>>>,
    pub(crate) retired: Vec<Arc<AppPool<C>>>,
}

impl<C: SessionConnection> Shelf<C> {
    fn new() -> Self {
        Self { pools: RwLock::new(Pools { current: None, retired: Vec::new() }) }
    }

    fn write(&self) -> RwLockWriteGuard<'_, Pools<C>> {
        self.pools.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> Home for Application<C> {
    fn held_by_this_thread(&self) -> Holders {
        let Some(shelf) = self.shelf.get() else { return Holders::default() };
        let pools = shelf.pools.read().unwrap_or_else(PoisonError::into_inner);
        Holders(pools.retired.iter().flat_map(|pool| pool.holders().on_this_thread().0).collect())
    }

    fn let_go(&self, number: u64) {
        let Some(shelf) = self.shelf.get() else { return };
        let mut pools = shelf.write();
        // Whoever is about to use it has taken it under the lock, and is counted.
        let left = pools
            .current
            .take_if(|pool| pool.number() == number && Arc::strong_count(pool) == 1 && pool.is_worthless());
        drop(pools);
        drop(left);
    }
}

impl<C: SessionConnection> App<C> {
    pub(crate) fn new(spec: Spec<C>, database: u64, migrations: Arc<dyn MigrationSet<C>>) -> Self {
        guard_exit();
        Self(Arc::new(Application {
            spec: Arc::new(spec),
            database,
            migrations,
            shelf: PerProcess::new(),
            removed: AtomicBool::new(false),
        }))
    }

    /// The application's id.
    pub fn id(&self) -> &str {
        &self.0.spec.app
    }

    /// Runs `body` inside a context of this application. What its session did and did not commit is rolled back in the end,
    /// whether `body` returns or panics. [`scope`](Self::scope) has more to choose.
    #[track_caller]
    pub fn context<R>(&self, body: impl FnOnce() -> R) -> R {
        context::enter(self, Location::caller(), body)
    }

    /// How to enter a context: what is committed at its end, isolation, deadline.
    pub fn scope(&self) -> Scope<C> {
        Scope::new(self.clone())
    }

    /// A session outside of any context. It ends, and rolls back, when its last handle is dropped. A hook that owns a handle of
    /// its own session keeps it alive; call [`Session::remove`] where that may be.
    ///
    /// # Errors
    /// [`Error::Disposed`] after the application was removed.
    #[track_caller]
    pub fn open_session(&self) -> Result<Session<C>> {
        self.not_removed()?;
        Ok(Session(Shared::new(self.clone(), Settings::DEFAULT, Location::caller())))
    }

    /// Makes sure that the database answers, with a connection of the pool.
    ///
    /// # Errors
    /// What can go wrong with getting a connection, [`Error::ConnectionLost`] and [`Error::Query`]; see [`Session`].
    #[track_caller]
    pub fn ping(&self) -> Result<()> {
        let at = Location::caller();
        let mut lease = self.pool()?.acquire(at, false, None)?;
        let answer = lease.conn().ping();
        if answer.is_err() {
            lease.doom();
        }
        drop(lease);
        answer.map_err(|error| match backend::is_connection_lost(&error) {
            true => Error::lost(self.id(), error, false, at),
            false => Error::from_query(error, at),
        })
    }

    /// The application's connections at this moment, with those that were out when it was disposed of and have not come back.
    pub fn status(&self) -> AppStatus {
        let each: Vec<_> = match self.pools() {
            Some(pools) => pools.current.iter().chain(&pools.retired).map(|pool| pool.status()).collect(),
            None => Vec::new(),
        };
        each.into_iter().fold(AppStatus::at_rest(self.spec()), AppStatus::and)
    }

    /// Without its type, for [`of_erased`](Self::of_erased).
    pub(crate) fn erased(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.0) as _
    }

    pub(crate) fn of_erased(erased: &Arc<dyn Any + Send + Sync>) -> Option<Self> {
        Arc::clone(erased).downcast().ok().map(Self)
    }

    pub(crate) fn hooks(&self) -> &UnitHooks<C> {
        &self.spec().hooks
    }

    pub(crate) fn spec(&self) -> &Spec<C> {
        &self.0.spec
    }

    pub(crate) fn database(&self) -> u64 {
        self.0.database
    }

    pub(crate) fn migration_set(&self) -> &dyn MigrationSet<C> {
        &*self.0.migrations
    }

    /// Whether both are handles of one application.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// From here on its handles answer `Disposed`.
    pub(crate) fn mark_removed(&self) {
        self.0.removed.store(true, Ordering::Release);
    }

    pub(crate) fn not_removed(&self) -> Result<()> {
        if self.0.removed.load(Ordering::Acquire) { Err(Error::Disposed { app: self.id().into() }) } else { Ok(()) }
    }

    /// The pool in use, made at the first call. A process that was forked while there were pools makes none.
    pub(crate) fn pool(&self) -> Result<Arc<AppPool<C>>> {
        self.pool_at(Instant::now())
    }

    /// The same at a moment that the caller has just read from the clock.
    pub(crate) fn pool_at(&self, now: Instant) -> Result<Arc<AppPool<C>>> {
        if let Some(shelf) = self.0.shelf.get_at(now) {
            let pools = shelf.pools.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(pool) = &pools.current {
                return Ok(Arc::clone(pool));
            }
        }
        if were_inherited() {
            return Err(Error::Forked { app: self.id().into() });
        }
        let shelf = self.0.shelf.get_or_init(Shelf::new);
        let mut pools = shelf.write();
        // Under the lock, so that nobody makes a pool after `remove_app` has taken the last one.
        self.not_removed()?;
        if let Some(pool) = &pools.current {
            return Ok(Arc::clone(pool));
        }
        pools.retired.retain(|pool| !pool.is_empty());
        let home: Weak<Application<C>> = Arc::downgrade(&self.0);
        let pool = AppPool::new(Arc::clone(&self.0.spec), home);
        pools.current = Some(Arc::clone(&pool));
        Ok(pool)
    }

    /// This process's pools, if it has had any.
    fn pools(&self) -> Option<RwLockWriteGuard<'_, Pools<C>>> {
        self.0.shelf.get().map(Shelf::write)
    }

    /// The pools that are to be drained; from here on the next use makes another. What was inherited by a fork is the parent's and
    /// is not among them.
    pub(crate) fn retire(&self) -> Vec<Arc<AppPool<C>>> {
        let Some(mut pools) = self.pools() else { return Vec::new() };
        let current = pools.current.take();
        pools.retired.extend(current);
        pools.retired.clone()
    }

    /// Lets go of pools that have drained.
    pub(crate) fn forget(&self, gone: &[*const AppPool<C>]) {
        if let Some(shelf) = self.0.shelf.get() {
            let mut pools = shelf.write();
            pools.retired.retain(|pool| !gone.contains(&Arc::as_ptr(pool)));
        }
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use diesel::SqliteConnection;

    use crate::{Config, Database};

    #[test]
    fn a_pool_with_something_open_is_not_forgotten() {
        let db = Database::<SqliteConnection>::without_migrations();
        let app = db.init_app("app", Config::new(":memory:")).expect("sound");
        app.ping().expect("it answers");
        // As far as a disposal in another thread has come before it closes anything.
        let mut pools = app.pools().expect("it was used");
        let current = pools.current.take();
        pools.retired.extend(current);
        drop(pools);
        app.ping().expect("it answers");
        let retired = || app.pools().expect("it was used").retired.len();
        assert_eq!((retired(), app.status().open), (1, 2));
        assert_eq!(app.dispose().expect("nothing is out").closed, 2);
        assert_eq!((retired(), app.status().open), (0, 0));
    }
}
