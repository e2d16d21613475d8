//! What the tests of one database object and server share in this process: the budget of connections, the session that owns their
//! databases, the schema to be replayed, and the lanes that are free.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::content::Schema;
use super::files::Files;
use super::lanes::FreeLane;
use super::owner::{Desk, Owner};
use super::setup::keeps;
use super::slots::{Slots, Taken};
use super::surroundings::Surroundings;
use crate::backend::Kind;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Registrar;
use crate::error::{Error, Result};
use crate::url::Target;

/// Shared by the tests of one database object on one server.
pub(super) struct House<C: SessionConnection> {
    pub(super) registrar: &'static dyn Registrar<C>,
    pub(super) target: Target,
    pub(super) slots: Option<Arc<Slots>>,
    owner: Owner<C>,
    pub(super) files: Files,
    schema: OnceLock<Arc<Schema>>,
    pub(super) free: Mutex<Vec<FreeLane<C>>>,
    /// Templates that are known to be there, each with the settings that a copy does not have.
    pub(super) known: Mutex<HashMap<u64, Vec<String>>>,
    /// What was found in the configured database, by how sessions are prepared there.
    surroundings: Mutex<HashMap<String, Arc<Surroundings>>>,
    running: AtomicUsize,
    swept: AtomicBool,
}

/// One test's connections, as many as it has reserved.
pub(super) struct Admission<C: SessionConnection> {
    house: Arc<House<C>>,
    /// None for SQLite.
    pub(super) taken: Option<Taken>,
    is_under_way: bool,
}

impl<C: SessionConnection> House<C> {
    /// The one for this database object and URL.
    pub(super) fn of(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Arc<Self>> {
        let mut houses = houses();
        let key = (registrar.number(), config.url.clone());
        if let Some(house) = houses.get(&key).and_then(|(house, _)| Arc::clone(house).downcast::<Self>().ok()) {
            return Ok(house);
        }
        let house = Arc::new(Self::new(registrar, config)?);
        houses.insert(key, (Arc::clone(&house) as _, Arc::clone(&house) as _));
        Ok(house)
    }

    fn new(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Self> {
        let invalid = |reason| Error::InvalidConfig { app: "tests".into(), reason };
        let target = Target::parse(&config.url, Kind::of_type::<C>()).map_err(invalid)?;
        let slots = match target.kind {
            Kind::Sqlite => None,
            Kind::Postgres | Kind::Mysql => Some(Slots::of(&target.server).map_err(invalid)?),
        };
        let owner = Owner::new(registrar, config, &target)?;
        Ok(Self {
            registrar,
            target,
            slots,
            owner,
            files: Files::default(),
            schema: OnceLock::new(),
            free: Mutex::default(),
            known: Mutex::default(),
            surroundings: Mutex::default(),
            running: AtomicUsize::new(0),
            swept: AtomicBool::new(false),
        })
    }

    /// The migrations of the database object, read once.
    pub(super) fn schema(&self) -> Result<Arc<Schema>> {
        if let Some(schema) = self.schema.get() {
            return Ok(Arc::clone(schema));
        }
        let schema = Arc::new(Schema::new(self.owner.app().script()?, self.target.kind));
        Ok(Arc::clone(self.schema.get_or_init(|| schema)))
    }

    /// What is known of the configured database for sessions that are prepared like that.
    pub(super) fn known_surroundings(&self, settings: &str) -> Option<Arc<Surroundings>> {
        if self.target.kind == Kind::Sqlite {
            return Some(Arc::default());
        }
        self.surroundings.lock().unwrap_or_else(PoisonError::into_inner).get(settings).map(Arc::clone)
    }

    /// The same, found out by a connection that the test has reserved.
    pub(super) fn surroundings(&self, settings: &str, config: &Config) -> Result<Arc<Surroundings>> {
        if let Some(known) = self.known_surroundings(settings) {
            return Ok(known);
        }
        let found = Arc::new(Surroundings::of(self, config)?);
        let mut known = self.surroundings.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(known.entry(settings.to_owned()).or_insert(found)))
    }

    /// Reserves `wanted` connections, and one for the owner's session where that will be needed. Who waits here holds nothing that
    /// others wait for.
    pub(super) fn admit(
        self: &Arc<Self>,
        wanted: usize,
        needs_owner: bool,
        test: &str,
        deadline: Instant,
    ) -> Result<Admission<C>> {
        let Some(slots) = &self.slots else { return Ok(self.admit_with(None)) };
        let all = || wanted + usize::from(needs_owner && !self.owner.is_open());
        if let Some(taken) = slots.try_take(all(), test) {
            return Ok(self.admit_with(Some(taken)));
        }
        let others: Vec<Arc<dyn GiveWay>> = houses().values().map(|(_, house)| Arc::clone(house)).collect();
        others.iter().for_each(|house| house.give_way(slots));
        let taken = slots.take(all(), test, deadline).map_err(|busy| Error::TestSetup {
            test: test.into(),
            what: "waiting for the server's connections",
            reason: busy.with_advice("`TestSetup::patience`"),
        })?;
        Ok(self.admit_with(Some(taken)))
    }

    /// What a lane that was free has reserved already.
    ///
    /// Who waits for slots is not counted among those under way: for them the owner's session is closed.
    pub(super) fn admit_with(self: &Arc<Self>, taken: Option<Taken>) -> Admission<C> {
        self.running.fetch_add(1, Ordering::AcqRel);
        Admission { house: Arc::clone(self), taken, is_under_way: true }
    }

    /// Works with the owner's session, which is waited for no longer than `patience`. When it is opened, what dead owners have left is
    /// removed.
    pub(super) fn work_within<T>(
        &self,
        admission: &mut Admission<C>,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut Desk<C>) -> Result<T>,
    ) -> Result<T> {
        let (Some(slots), Some(taken)) = (&self.slots, &mut admission.taken) else {
            unreachable!("only servers have an owner's session");
        };
        self.owner.work(slots, taken, keep, patience, |desk| {
            if !self.swept.swap(true, Ordering::AcqRel) && !keeps() {
                desk.sweep()?;
            }
            work(desk)
        })
    }

    /// Whether the owner's session is there, which takes a slot.
    pub(super) fn has_owner(&self) -> bool {
        self.owner.is_open()
    }

    pub(super) fn work_on<T>(&self, work: impl FnOnce(&mut Desk<C>) -> Result<T>) -> Option<Result<T>> {
        self.owner.work_on(work)
    }

    pub(super) fn free(&self) -> MutexGuard<'_, Vec<FreeLane<C>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All houses of this process, by database object and URL.
type Houses = HashMap<(u64, String), (Arc<dyn Any + Send + Sync>, Arc<dyn GiveWay>)>;

fn houses() -> MutexGuard<'static, Houses> {
    static HOUSES: OnceLock<Mutex<Houses>> = OnceLock::new();
    HOUSES.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A house, whatever its type of connection.
trait GiveWay: Send + Sync {
    /// Closes what it keeps on the server of these slots without need: lanes that are free, and the owner's session where none of its
    /// tests is under way.
    fn give_way(&self, slots: &Arc<Slots>);
}

impl<C: SessionConnection> GiveWay for House<C> {
    fn give_way(&self, slots: &Arc<Slots>) {
        if !self.slots.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, slots)) {
            return;
        }
        let free = std::mem::take(&mut *self.free());
        drop(free);
        self.owner.close_if(|| self.running.load(Ordering::Acquire) == 0);
    }
}

impl<C: SessionConnection> Admission<C> {
    /// Gives everything back, to wait anew.
    pub(super) fn retreat(&mut self) {
        self.taken = None;
        if std::mem::take(&mut self.is_under_way)
            && self.house.running.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(slots) = self.house.slots.as_ref().filter(|slots| slots.is_wanted())
        {
            self.house.give_way(slots);
        }
    }
}

impl<C: SessionConnection> Drop for Admission<C> {
    fn drop(&mut self) {
        self.retreat();
    }
}
