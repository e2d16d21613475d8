//! The state that the tests of one database object and server share in this process: the connection slots, the owner of
//! the databases, the SQL of the schema, and the free rollback databases.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::connection_slots::{ConnectionSlots, HeldSlots};
use super::database_properties::DatabaseProperties;
use super::owner::{Owner, OwnerConnection, invalid};
use super::registrar::Registrar;
use super::rollback_database::RollbackDatabase;
use super::script::Script;
use super::test_setup::keep_is_requested;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result};
use crate::kind::DatabaseKind;
use crate::url::Target;

/// The shared state of the tests of one database object on one server.
pub(super) struct TestEnvironment<C: SessionConnection> {
    pub(super) registrar: &'static dyn Registrar<C>,
    pub(super) target: Target,
    pub(super) slots: Option<ConnectionSlots>,
    pub(super) owner: Owner<C>,
    /// The SQL of the database object's migrations.
    pub(super) schema: Script,
    pub(super) free_databases: Mutex<Vec<RollbackDatabase<C>>>,
    /// The hashes of the templates that exist. The lock is held while a template is created.
    pub(super) known_templates: Mutex<HashSet<u64>>,
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
    /// The number of connections of the test's pool, at least 1. The session of the owner may take the other slots.
    pub(super) pool_size: usize,
}

impl<C: SessionConnection> TestEnvironment<C> {
    /// The environment of this database object and URL.
    pub(super) fn of(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Arc<Self>> {
        let mut environments = ENVIRONMENTS.lock();
        let key = (registrar.number(), config.url.clone());
        let known = environments.get(&key).map(|known| Arc::clone(known) as Arc<dyn Any + Send + Sync>);
        if let Some(environment) = known.and_then(|known| known.downcast::<Self>().ok()) {
            return Ok(environment);
        }
        let environment = Arc::new(Self::new(registrar, config)?);
        environments.insert(key, Arc::clone(&environment) as _);
        Ok(environment)
    }

    fn new(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Self> {
        let target = Target::parse(&config.url, DatabaseKind::of_type::<C>()).map_err(invalid)?;
        let slots = match target.kind {
            DatabaseKind::Sqlite => None,
            DatabaseKind::Postgres | DatabaseKind::Mysql => {
                Some(ConnectionSlots::of_server(&target.server).map_err(invalid)?)
            }
        };
        let owner = Owner::new(registrar, config, &target, true)?;
        let schema = Script::of(owner.app())?;
        Ok(Self {
            registrar,
            target,
            slots,
            owner,
            schema,
            free_databases: Mutex::default(),
            known_templates: Mutex::default(),
            properties: Mutex::default(),
            running_tests: AtomicUsize::new(0),
            orphans_removed: AtomicBool::new(false),
        })
    }

    /// The cached properties of the configured database for connections with this setup.
    pub(super) fn known_properties(&self, settings: &str) -> Option<Arc<DatabaseProperties>> {
        self.properties.lock().get(settings).map(Arc::clone)
    }

    /// The properties of the configured database for connections with this setup. If they are not cached, the method
    /// queries them with a connection that the test has reserved.
    pub(super) fn properties(&self, settings: &str, config: &Config) -> Result<Arc<DatabaseProperties>> {
        if let Some(known) = self.known_properties(settings) {
            return Ok(known);
        }
        let found = Arc::new(DatabaseProperties::of(self, config)?);
        let mut known = self.properties.lock();
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
        let Some(slots) = &self.slots else { return Ok(self.reservation_with(None, wanted)) };
        let for_owner = || usize::from(needs_owner && !self.owner.is_open());
        let held_slots = match slots.try_acquire(wanted + for_owner(), test) {
            Some(held_slots) => held_slots,
            None => {
                let all: Vec<Arc<dyn AnyEnvironment>> = ENVIRONMENTS.lock().values().map(Arc::clone).collect();
                all.iter().for_each(|environment| environment.release_idle(&slots.server));
                let to_wait = "Run fewer tests at once, or wait longer (`TestSetup::patience`)";
                slots.acquire(wanted + for_owner(), test, deadline, to_wait).map_err(|reason| {
                    let what = "waiting for the server's connections";
                    Error::from(Details::TestSetup { test: test.into(), what, reason })
                })?
            }
        };
        // While a reservation exists, the session of the owner stays open. If the session was closed just before, it
        // uses one of the slots of the pool.
        let mut reservation = self.reservation_with(Some(held_slots), 1);
        let available = reservation.slots.as_ref().map_or(0, HeldSlots::len).saturating_sub(for_owner());
        reservation.pool_size = wanted.min(available).max(1);
        Ok(reservation)
    }

    /// A reservation of slots that the caller has already acquired.
    ///
    /// A test that still waits for slots does not count as running, so the session of the owner may be closed for it.
    pub(super) fn reservation_with(self: &Arc<Self>, slots: Option<HeldSlots>, pool_size: usize) -> Reservation<C> {
        self.running_tests.fetch_add(1, Ordering::AcqRel);
        Reservation { environment: Arc::clone(self), slots, pool_size }
    }

    /// Calls `work` with the session of the owner. If the session is closed, the method waits for it at most
    /// `patience`. The first call removes the databases of dead owners, unless `DIESEL_SESSION_KEEP` is set.
    pub(super) fn with_owner<T>(
        &self,
        reservation: &mut Reservation<C>,
        patience: Duration,
        work: impl FnOnce(&mut OwnerConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let (Some(slots), Some(held_slots)) = (&self.slots, &mut reservation.slots) else {
            unreachable!("only servers have an owner's session");
        };
        self.owner.with_session(slots, held_slots, reservation.pool_size, patience, |admin| {
            if !self.orphans_removed.swap(true, Ordering::AcqRel) && !keep_is_requested() {
                admin.remove_orphans()?;
            }
            work(admin)
        })
    }
}

/// All environments of this process, by database object and URL.
type Environments = HashMap<(u64, String), Arc<dyn AnyEnvironment>>;

static ENVIRONMENTS: LazyLock<Mutex<Environments>> = LazyLock::new(Mutex::default);

/// An environment with any type of connection.
trait AnyEnvironment: Any + Send + Sync {
    /// Closes the idle connections of the environment to `server`: those of free rollback databases, and the session of
    /// the owner if no test is running.
    fn release_idle(&self, server: &str);
}

impl<C: SessionConnection> AnyEnvironment for TestEnvironment<C> {
    fn release_idle(&self, server: &str) {
        if self.target.server == server {
            let free = std::mem::take(&mut *self.free_databases.lock());
            drop(free);
            self.owner.close_if(|| self.running_tests.load(Ordering::Acquire) == 0);
        }
    }
}

impl<C: SessionConnection> Drop for Reservation<C> {
    fn drop(&mut self) {
        self.slots = None;
        if self.environment.running_tests.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(slots) = self.environment.slots.as_ref().filter(|slots| slots.has_waiters())
        {
            self.environment.release_idle(&slots.server);
        }
    }
}
