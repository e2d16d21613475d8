//! The state that the tests of one database object and server share in this process: the connection slots, the owner of
//! the databases, the SQL of the schema, and the free rollback databases.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::connection_slots::{ConnectionSlots, HeldSlots};
use super::database_properties::DatabaseProperties;
use super::owner::{AdminConnection, Owner};
use super::registrar::Registrar;
use super::rollback_database::RollbackDatabase;
use super::sqlite_files::SqliteFiles;
use super::template_contents::PreparedScript;
use super::test_setup::keep_is_requested;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::url::Target;

/// The shared state of the tests of one database object on one server.
pub(super) struct TestEnvironment<C: SessionConnection> {
    pub(super) registrar: &'static dyn Registrar<C>,
    pub(super) target: Target,
    pub(super) slots: Option<Arc<ConnectionSlots>>,
    owner: Owner<C>,
    pub(super) files: SqliteFiles,
    schema: OnceLock<Arc<PreparedScript>>,
    pub(super) free_databases: Mutex<Vec<RollbackDatabase<C>>>,
    /// The hashes of the templates that exist, each with the settings that a copy of the template lacks.
    pub(super) known_templates: Mutex<HashMap<u64, Vec<String>>>,
    /// The properties of the configured database, for each setup of a connection.
    properties: Mutex<HashMap<String, Arc<DatabaseProperties>>>,
    running_tests: AtomicUsize,
    orphans_removed: AtomicBool,
}

/// The connections that one test has reserved.
pub(super) struct Reservation<C: SessionConnection> {
    environment: Arc<TestEnvironment<C>>,
    /// `None` for SQLite.
    pub(super) slots: Option<HeldSlots>,
    /// The number of slots for the session of the owner, if the session was not open at the reservation.
    for_owner: usize,
    is_counted: bool,
}

impl<C: SessionConnection> TestEnvironment<C> {
    /// The environment of this database object and URL.
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

    /// The SQL of the database object's migrations. It is determined once.
    pub(super) fn schema(&self) -> Result<Arc<PreparedScript>> {
        if let Some(schema) = self.schema.get() {
            return Ok(Arc::clone(schema));
        }
        let schema = Arc::new(PreparedScript::new(self.owner.app().script()?, self.target.kind));
        Ok(Arc::clone(self.schema.get_or_init(|| schema)))
    }

    /// The cached properties of the configured database for connections with this setup.
    pub(super) fn known_properties(&self, settings: &str) -> Option<Arc<DatabaseProperties>> {
        if self.target.kind == DatabaseKind::Sqlite {
            return Some(Arc::default());
        }
        self.properties.lock().unwrap_or_else(PoisonError::into_inner).get(settings).map(Arc::clone)
    }

    /// The properties of the configured database for connections with this setup. If they are not cached, the method
    /// queries them with a connection that the test has reserved.
    pub(super) fn properties(&self, settings: &str, config: &Config) -> Result<Arc<DatabaseProperties>> {
        if let Some(known) = self.known_properties(settings) {
            return Ok(known);
        }
        let found = Arc::new(DatabaseProperties::of(self, config)?);
        let mut known = self.properties.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(known.entry(settings.to_owned()).or_insert(found)))
    }

    /// Reserves `wanted` connections, and one for the session of the owner if `needs_owner` and the session is closed.
    /// A caller that waits here holds no slot that others wait for.
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
        // While a reservation exists, the session of the owner stays open. If the session was closed just before, it
        // uses one of the slots of the pool.
        let reserved = |held_slots, for_owner: usize| {
            let mut reservation = self.reservation_with(Some(held_slots));
            reservation.for_owner = if for_owner == 0 { missing_owner() } else { for_owner };
            reservation
        };
        if let Some(held_slots) = slots.try_acquire(wanted + for_owner, test) {
            return Ok(reserved(held_slots, for_owner));
        }
        let others: Vec<Arc<dyn AnyEnvironment>> =
            environments().values().map(|(_, environment)| Arc::clone(environment)).collect();
        others.iter().for_each(|environment| environment.release_idle(slots));
        let for_owner = missing_owner();
        let held_slots = slots.acquire(wanted + for_owner, test, deadline).map_err(|unavailable| Error::TestSetup {
            test: test.into(),
            what: "waiting for the server's connections",
            reason: unavailable.with_advice("`TestSetup::patience`"),
        })?;
        Ok(reserved(held_slots, for_owner))
    }

    /// A reservation of slots that the caller has already acquired.
    ///
    /// A test that still waits for slots does not count as running, so the session of the owner may be closed for it.
    pub(super) fn reservation_with(self: &Arc<Self>, slots: Option<HeldSlots>) -> Reservation<C> {
        self.running_tests.fetch_add(1, Ordering::AcqRel);
        Reservation { environment: Arc::clone(self), slots, for_owner: 0, is_counted: true }
    }

    /// Calls `work` with the session of the owner. If the session is closed, the method waits for it at most
    /// `patience`. The first call removes the databases of dead owners, unless `DIESEL_SESSION_KEEP` is set.
    pub(super) fn with_owner<T>(
        &self,
        reservation: &mut Reservation<C>,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let (Some(slots), Some(held_slots)) = (&self.slots, &mut reservation.slots) else {
            unreachable!("only servers have an owner's session");
        };
        self.owner.with_session(slots, held_slots, keep, patience, |admin| {
            if !self.orphans_removed.swap(true, Ordering::AcqRel) && !keep_is_requested() {
                admin.remove_orphans()?;
            }
            work(admin)
        })
    }

    /// Whether the session of the owner is open. The session needs a slot.
    pub(super) fn has_open_owner(&self) -> bool {
        self.owner.is_open()
    }

    /// Calls `work` with the session of the owner if the session is open.
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
type Environments = HashMap<(u64, String), (Arc<dyn Any + Send + Sync>, Arc<dyn AnyEnvironment>)>;

fn environments() -> MutexGuard<'static, Environments> {
    static ENVIRONMENTS: OnceLock<Mutex<Environments>> = OnceLock::new();
    ENVIRONMENTS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// An environment with any type of connection.
trait AnyEnvironment: Send + Sync {
    /// Closes the idle connections of the environment to the server of `slots`: those of free rollback databases, and
    /// the session of the owner if no test is running.
    fn release_idle(&self, slots: &Arc<ConnectionSlots>);
}

impl<C: SessionConnection> AnyEnvironment for TestEnvironment<C> {
    fn release_idle(&self, slots: &Arc<ConnectionSlots>) {
        if !self.slots.as_ref().is_some_and(|own| Arc::ptr_eq(own, slots)) {
            return;
        }
        let free = std::mem::take(&mut *self.free_databases());
        drop(free);
        self.owner.close_if(|| self.running_tests.load(Ordering::Acquire) == 0);
    }
}

impl<C: SessionConnection> Reservation<C> {
    /// The pool size of a test that wanted `wanted` connections: at least one.
    pub(super) fn pool_size(&self, wanted: usize) -> usize {
        let Some(slots) = &self.slots else { return wanted };
        wanted.min(slots.len().saturating_sub(self.for_owner).max(1))
    }

    /// Releases all slots.
    pub(super) fn release(&mut self) {
        self.slots = None;
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
