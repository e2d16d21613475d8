//! What the tests of one database object and server share in this process: the limit of connections, the session that owns their
//! databases, the schema to be replayed, and the pinned connections that are free.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::connection_slots::{ConnectionSlots, HeldSlots};
use super::database_properties::DatabaseProperties;
use super::owner::{AdminConnection, Owner};
use super::rollback_database::RollbackDatabase;
use super::sqlite_files::SqliteFiles;
use super::template_contents::PreparedScript;
use super::test_setup::keep_is_requested;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Registrar;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::url::Target;

/// SessionInner by the tests of one database object on one server.
pub(super) struct TestEnvironment<C: SessionConnection> {
    pub(super) registrar: &'static dyn Registrar<C>,
    pub(super) target: Target,
    pub(super) slots: Option<Arc<ConnectionSlots>>,
    owner: Owner<C>,
    pub(super) files: SqliteFiles,
    schema: OnceLock<Arc<PreparedScript>>,
    pub(super) free_databases: Mutex<Vec<RollbackDatabase<C>>>,
    /// Templates that are known to be there, each with the settings that a copy does not have.
    pub(super) known_templates: Mutex<HashMap<u64, Vec<String>>>,
    /// What was found in the configured database, by how sessions are prepared there.
    properties: Mutex<HashMap<String, Arc<DatabaseProperties>>>,
    running_tests: AtomicUsize,
    orphans_removed: AtomicBool,
}

/// One test's connections, as many as it has reserved.
pub(super) struct Reservation<C: SessionConnection> {
    environment: Arc<TestEnvironment<C>>,
    /// None for SQLite.
    pub(super) taken: Option<HeldSlots>,
    /// How many of them are for the owner's session, which was not open then.
    for_owner: usize,
    is_counted: bool,
}

impl<C: SessionConnection> TestEnvironment<C> {
    /// The one for this database object and URL.
    pub(super) fn of(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Arc<Self>> {
        let mut environments = environments();
        let key = (registrar.number(), config.url.clone());
        if let Some(environment) =
            environments.get(&key).and_then(|(environment, _)| Arc::clone(environment).downcast::<Self>().ok())
        {
            return Ok(environment);
        }
        let environment = Arc::new(Self::new(registrar, config)?);
        environments.insert(key, (Arc::clone(&environment) as _, Arc::clone(&environment) as _));
        Ok(environment)
    }

    fn new(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Self> {
        let invalid = |reason| Error::InvalidConfig { app: "tests".into(), reason };
        let target = Target::parse(&config.url, DatabaseKind::of_type::<C>()).map_err(invalid)?;
        let slots = match target.kind {
            DatabaseKind::Sqlite => None,
            DatabaseKind::Postgres | DatabaseKind::Mysql => {
                Some(ConnectionSlots::of_server(&target.server).map_err(invalid)?)
            }
        };
        let owner = Owner::new(registrar, config, &target)?;
        Ok(Self {
            registrar,
            target,
            slots,
            owner,
            files: SqliteFiles::default(),
            schema: OnceLock::new(),
            free_databases: Mutex::default(),
            known_templates: Mutex::default(),
            properties: Mutex::default(),
            running_tests: AtomicUsize::new(0),
            orphans_removed: AtomicBool::new(false),
        })
    }

    /// The migrations of the database object, read once.
    pub(super) fn schema(&self) -> Result<Arc<PreparedScript>> {
        if let Some(schema) = self.schema.get() {
            return Ok(Arc::clone(schema));
        }
        let schema = Arc::new(PreparedScript::new(self.owner.app().script()?, self.target.kind));
        Ok(Arc::clone(self.schema.get_or_init(|| schema)))
    }

    /// What is known of the configured database for sessions that are prepared like that.
    pub(super) fn known_properties(&self, settings: &str) -> Option<Arc<DatabaseProperties>> {
        if self.target.kind == DatabaseKind::Sqlite {
            return Some(Arc::default());
        }
        self.properties.lock().unwrap_or_else(PoisonError::into_inner).get(settings).map(Arc::clone)
    }

    /// The same, found out by a connection that the test has reserved.
    pub(super) fn properties(&self, settings: &str, config: &Config) -> Result<Arc<DatabaseProperties>> {
        if let Some(known) = self.known_properties(settings) {
            return Ok(known);
        }
        let found = Arc::new(DatabaseProperties::of(self, config)?);
        let mut known = self.properties.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(known.entry(settings.to_owned()).or_insert(found)))
    }

    /// Reserves `wanted` connections, and one for the owner's session where that will be needed. Who waits here holds nothing that
    /// others wait for.
    pub(super) fn reserve(
        self: &Arc<Self>,
        wanted: usize,
        needs_owner: bool,
        test: &str,
        deadline: Instant,
    ) -> Result<Reservation<C>> {
        let Some(slots) = &self.slots else { return Ok(self.reservation_with(None)) };
        let missing_owner = || usize::from(needs_owner && !self.owner.is_open());
        let for_owner = missing_owner();
        // From the reservation on the owner's session stays open. If it was closed just before, a connection of the pool is its.
        let admitted = |taken, for_owner: usize| {
            let mut reservation = self.reservation_with(Some(taken));
            reservation.for_owner = if for_owner == 0 { missing_owner() } else { for_owner };
            reservation
        };
        if let Some(taken) = slots.try_acquire(wanted + for_owner, test) {
            return Ok(admitted(taken, for_owner));
        }
        let others: Vec<Arc<dyn ReleaseIdle>> =
            environments().values().map(|(_, environment)| Arc::clone(environment)).collect();
        others.iter().for_each(|environment| environment.release_idle(slots));
        let for_owner = missing_owner();
        let taken = slots.acquire(wanted + for_owner, test, deadline).map_err(|busy| Error::TestSetup {
            test: test.into(),
            what: "waiting for the server's connections",
            reason: busy.with_advice("`TestSetup::patience`"),
        })?;
        Ok(admitted(taken, for_owner))
    }

    /// What a pinned connection that was free has reserved already.
    ///
    /// Who waits for slots is not counted among those under way: for them the owner's session is closed.
    pub(super) fn reservation_with(self: &Arc<Self>, taken: Option<HeldSlots>) -> Reservation<C> {
        self.running_tests.fetch_add(1, Ordering::AcqRel);
        Reservation { environment: Arc::clone(self), taken, for_owner: 0, is_counted: true }
    }

    /// Works with the owner's session, which is waited for no longer than `patience`. When it is opened, what dead owners have left is
    /// removed.
    pub(super) fn with_owner<T>(
        &self,
        reservation: &mut Reservation<C>,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let (Some(slots), Some(taken)) = (&self.slots, &mut reservation.taken) else {
            unreachable!("only servers have an owner's session");
        };
        self.owner.with_session(slots, taken, keep, patience, |admin| {
            if !self.orphans_removed.swap(true, Ordering::AcqRel) && !keep_is_requested() {
                admin.remove_orphans()?;
            }
            work(admin)
        })
    }

    /// Whether the owner's session is there, which takes a slot.
    pub(super) fn has_open_owner(&self) -> bool {
        self.owner.is_open()
    }

    pub(super) fn with_open_owner<T>(
        &self,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Option<Result<T>> {
        self.owner.with_open_session(work)
    }

    pub(super) fn free_databases(&self) -> MutexGuard<'_, Vec<RollbackDatabase<C>>> {
        self.free_databases.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All environments of this process, by database object and URL.
type Environments = HashMap<(u64, String), (Arc<dyn Any + Send + Sync>, Arc<dyn ReleaseIdle>)>;

fn environments() -> MutexGuard<'static, Environments> {
    static ENVIRONMENTS: OnceLock<Mutex<Environments>> = OnceLock::new();
    ENVIRONMENTS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A environment, whatever its type of connection.
trait ReleaseIdle: Send + Sync {
    /// Closes what it keeps on the server of these slots without need: pinned connections that are free, and the owner's session where none of its
    /// tests is under way.
    fn release_idle(&self, slots: &Arc<ConnectionSlots>);
}

impl<C: SessionConnection> ReleaseIdle for TestEnvironment<C> {
    fn release_idle(&self, slots: &Arc<ConnectionSlots>) {
        if !self.slots.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, slots)) {
            return;
        }
        let free = std::mem::take(&mut *self.free_databases());
        drop(free);
        self.owner.close_if(|| self.running_tests.load(Ordering::Acquire) == 0);
    }
}

impl<C: SessionConnection> Reservation<C> {
    /// How many connections a test that wanted `wanted` of them may have in its pool: at least one.
    pub(super) fn pool_size(&self, wanted: usize) -> usize {
        let Some(taken) = &self.taken else { return wanted };
        wanted.min(taken.len().saturating_sub(self.for_owner).max(1))
    }

    /// Gives everything back, to wait anew.
    pub(super) fn release(&mut self) {
        self.taken = None;
        if std::mem::take(&mut self.is_counted)
            && self.environment.running_tests.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(slots) = self.environment.slots.as_ref().filter(|slots| slots.probe_waiters())
        {
            self.environment.release_idle(slots);
        }
    }
}

impl<C: SessionConnection> Drop for Reservation<C> {
    fn drop(&mut self) {
        self.release();
    }
}
