//! The core of an application: the options of its pool and the pools.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard, Weak};
use std::time::Instant;

use crate::connection::SessionConnection;
use crate::error::{AppEnd, Error, Holders, Result};
use crate::pool::{AppPool, PoolOptions, PoolOwner, guard_exit, were_inherited};
use crate::process::PerProcess;

/// The part of an application that sessions know.
pub(crate) struct AppCore<C: SessionConnection> {
    options: Arc<PoolOptions<C>>,
    shelf: PerProcess<Shelf<C>>,
    removed: AtomicBool,
}

impl<C: SessionConnection> std::fmt::Debug for AppCore<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AppCore").field("app", &self.id()).finish_non_exhaustive()
    }
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

impl<C: SessionConnection> PoolOwner for AppCore<C> {
    fn end(&self) -> AppEnd {
        match (self.removed.load(Ordering::Acquire), self.options.is_of_test) {
            (false, _) => AppEnd::Disposed,
            (true, true) => AppEnd::TestEnded,
            (true, false) => AppEnd::Removed,
        }
    }

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

impl<C: SessionConnection> AppCore<C> {
    pub(crate) fn new(options: PoolOptions<C>) -> Arc<Self> {
        guard_exit();
        Arc::new(Self { options: Arc::new(options), shelf: PerProcess::new(), removed: AtomicBool::new(false) })
    }

    /// The application's id.
    pub(crate) fn id(&self) -> &str {
        &self.options.app
    }

    pub(crate) fn options(&self) -> &PoolOptions<C> {
        &self.options
    }

    /// From here on its handles answer `Disposed`.
    pub(crate) fn mark_removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    pub(crate) fn not_removed(&self) -> Result<()> {
        match self.end() {
            AppEnd::Disposed => Ok(()),
            how => Err(Error::Disposed { app: self.id().into(), how }),
        }
    }

    /// The pool in use, made at the first call. A process that was forked while there were pools makes none.
    pub(crate) fn pool(self: &Arc<Self>) -> Result<Arc<AppPool<C>>> {
        self.pool_at(Instant::now())
    }

    /// The same at a moment that the caller has just read from the clock.
    pub(crate) fn pool_at(self: &Arc<Self>, now: Instant) -> Result<Arc<AppPool<C>>> {
        if let Some(shelf) = self.shelf.get_at(now) {
            let pools = shelf.pools.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(pool) = &pools.current {
                return Ok(Arc::clone(pool));
            }
        }
        if were_inherited() {
            return Err(Error::Forked { app: self.id().into() });
        }
        let shelf = self.shelf.get_or_init(Shelf::new);
        let mut pools = shelf.write();
        // Under the lock, so that nobody makes a pool after `remove_app` has taken the last one.
        self.not_removed()?;
        if let Some(pool) = &pools.current {
            return Ok(Arc::clone(pool));
        }
        pools.retired.retain(|pool| !pool.is_empty());
        let owner: Weak<Self> = Arc::downgrade(self);
        let pool = AppPool::new(Arc::clone(&self.options), owner);
        pools.current = Some(Arc::clone(&pool));
        Ok(pool)
    }

    /// This process's pools, if it has had any.
    pub(crate) fn pools(&self) -> Option<RwLockWriteGuard<'_, Pools<C>>> {
        self.shelf.get().map(Shelf::write)
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
        if let Some(shelf) = self.shelf.get() {
            let mut pools = shelf.write();
            pools.retired.retain(|pool| !gone.contains(&Arc::as_ptr(pool)));
        }
    }
}
