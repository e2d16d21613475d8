//! The core of an application: the options of its pools, and the pools.

use std::panic::Location;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::connection::SessionConnection;
use crate::error::{AppEnd, Details, Holders, PoolOf, Result, SourceLocation};
use crate::pool::{AppPool, PoolOptions, PoolOwner, guard_exit, were_inherited};
use crate::process::PerProcess;

/// The part of an application that its sessions use.
pub(crate) struct AppCore<C: SessionConnection> {
    options: Arc<PoolOptions<C>>,
    /// The pools of this process.
    pools: PerProcess<RwLock<Pools<C>>>,
    /// The reason, once the application has ended for good.
    ended: OnceLock<AppEnd>,
}

/// The current pool, and the pools that were disposed of and have not drained.
pub(crate) struct Pools<C: SessionConnection> {
    pub(crate) current: Option<Arc<AppPool<C>>>,
    pub(crate) retired: Vec<Arc<AppPool<C>>>,
}

impl<C: SessionConnection> PoolOwner for AppCore<C> {
    fn app_end(&self) -> AppEnd {
        self.ended.get().copied().unwrap_or(AppEnd::Disposed)
    }

    fn held_by_this_thread(&self) -> Holders {
        let Some(pools) = self.read_pools() else { return Holders::default() };
        let holders = pools.retired.iter().flat_map(|pool| pool.holders().on_this_thread().0);
        // Another thread may check a movable connection in.
        Holders(holders.filter(|holder| !holder.is_movable).collect())
    }

    fn drop_if_empty(&self, number: u64) {
        let Some(mut pools) = self.pools() else { return };
        // A caller that is about to use the pool has cloned it under the lock, so the count includes the caller.
        let removed =
            pools.current.take_if(|pool| pool.number == number && Arc::strong_count(pool) == 1 && pool.holds_nothing());
        drop(pools);
        drop(removed);
    }

    fn abandon_hanging(&self, number: u64) {
        let Some(mut pools) = self.pools() else { return };
        if pools.retired.iter().filter(|pool| pool.hangs()).count() < MOST_GIVEN_UP {
            let hung = pools.current.take_if(|pool| pool.number == number && pool.hangs());
            pools.retired.extend(hung);
        }
    }
}

/// How many pools of one application may wait for connects that hang. Each has a thread.
const MOST_GIVEN_UP: usize = 4;

impl<C: SessionConnection> AppCore<C> {
    pub(crate) fn new(options: PoolOptions<C>) -> Arc<Self> {
        guard_exit();
        Arc::new(Self { options: Arc::new(options), pools: PerProcess::new(), ended: OnceLock::new() })
    }

    /// The application's id.
    pub(crate) fn id(&self) -> &str {
        &self.options.app
    }

    pub(crate) fn options(&self) -> &PoolOptions<C> {
        &self.options
    }

    /// Makes the handles of the application answer `Disposed` from now on.
    pub(crate) fn mark_ended(&self, how: AppEnd) {
        let how = if self.options.pool_of != PoolOf::Program { AppEnd::TestEnded } else { how };
        self.ended.get_or_init(|| how);
    }

    pub(crate) fn check_not_removed(&self) -> Result<()> {
        match self.app_end() {
            AppEnd::Disposed => Ok(()),
            how => Err(Details::Disposed { app: self.id().into(), how }.into()),
        }
    }

    /// The current pool, made at the first call. A process that was forked while there were pools makes none.
    #[track_caller]
    pub(crate) fn pool(self: &Arc<Self>) -> Result<Arc<AppPool<C>>> {
        self.pool_for(Location::caller())
    }

    /// Like [`pool`](Self::pool), for the statement at `at`.
    pub(crate) fn pool_for(self: &Arc<Self>, at: SourceLocation) -> Result<Arc<AppPool<C>>> {
        if let Some(pool) = self.read_pools().and_then(|pools| pools.current.clone()) {
            return Ok(pool);
        }
        if were_inherited() {
            return Err(Details::Forked { app: self.id().into() }.into());
        }
        let pools = self.pools.get_or_init(|| RwLock::new(Pools { current: None, retired: Vec::new() }));
        let mut pools = pools.write().unwrap_or_else(PoisonError::into_inner);
        // Checked under the lock, so that no pool is made after `remove_app` has taken the last one.
        self.check_not_removed()?;
        if let Some(pool) = &pools.current {
            return Ok(Arc::clone(pool));
        }
        pools.retired.retain(|pool| !pool.is_empty());
        let owner: Weak<Self> = Arc::downgrade(self);
        let pool = AppPool::new(Arc::clone(&self.options), owner, at)?;
        pools.current = Some(Arc::clone(&pool));
        Ok(pool)
    }

    /// The pools of this process, if it has had any.
    pub(crate) fn pools(&self) -> Option<RwLockWriteGuard<'_, Pools<C>>> {
        Some(self.pools.get()?.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn read_pools(&self) -> Option<RwLockReadGuard<'_, Pools<C>>> {
        Some(self.pools.get()?.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Retires the current pool and returns all pools that must be drained. The next use makes a new pool. Pools that
    /// a fork has inherited belong to the parent process and are not among them.
    pub(crate) fn retire(&self) -> Vec<Arc<AppPool<C>>> {
        let Some(mut pools) = self.pools() else { return Vec::new() };
        let current = pools.current.take();
        pools.retired.extend(current);
        pools.retired.clone()
    }

    /// Removes pools that have drained.
    pub(crate) fn remove_drained(&self, drained: &[Weak<AppPool<C>>]) {
        if let Some(mut pools) = self.pools() {
            pools.retired.retain(|pool| !drained.iter().any(|drained| drained.as_ptr() == Arc::as_ptr(pool)));
        }
    }
}
