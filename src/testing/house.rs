//! What the tests of one database object and server share in this process: the budget of connections, the session that owns their
//! databases, the schema to be replayed, and the lanes that are free.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::content::Schema;
use super::files::Files;
use super::lanes::FreeLane;
use super::owner::{Desk, Owner};
use super::setup::keeps;
use super::slots::{Slots, Taken};
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
    /// Templates that are known to be there.
    pub(super) known: Mutex<HashSet<u64>>,
    tests: Mutex<Tests>,
    swept: AtomicBool,
}

/// How many tests there are. Under one lock, so that nobody begins while it is found that all wait.
#[derive(Debug, Default)]
struct Tests {
    running: usize,
    /// Those of them that wait for connections, and have none.
    waiting: usize,
}

/// One test's connections, as many as it has reserved.
pub(super) struct Admission<C: SessionConnection> {
    house: Arc<House<C>>,
    /// None for SQLite.
    pub(super) taken: Option<Taken>,
}

impl<C: SessionConnection> House<C> {
    /// The one for this database object and URL.
    pub(super) fn of(registrar: &'static dyn Registrar<C>, config: &Config) -> Result<Arc<Self>> {
        type Houses = Mutex<HashMap<(u64, String), Arc<dyn Any + Send + Sync>>>;
        static HOUSES: OnceLock<Houses> = OnceLock::new();
        let mut houses = HOUSES.get_or_init(Houses::default).lock().unwrap_or_else(PoisonError::into_inner);
        let key = (registrar.number(), config.url.clone());
        if let Some(house) = houses.get(&key).and_then(|house| Arc::clone(house).downcast::<Self>().ok()) {
            return Ok(house);
        }
        let house = Arc::new(Self::new(registrar, config)?);
        houses.insert(key, Arc::clone(&house) as _);
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
            tests: Mutex::default(),
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

    /// Reserves `wanted` connections, and one for the owner's session where that will be needed. Who waits here holds nothing that
    /// others wait for.
    pub(super) fn admit(
        self: &Arc<Self>,
        wanted: usize,
        needs_owner: bool,
        test: &str,
        deadline: Instant,
    ) -> Result<Admission<C>> {
        self.tests().running += 1;
        let mut admission = Admission { house: Arc::clone(self), taken: None };
        let Some(slots) = &self.slots else { return Ok(admission) };
        let at_once = wanted + usize::from(needs_owner && !self.owner.is_open());
        if let Some(taken) = slots.try_take(at_once, test) {
            admission.taken = Some(taken);
            return Ok(admission);
        }
        let waiting = Waiting::new(self);
        self.free().clear();
        self.close_if_all_wait();
        // The owner's session may be closed meanwhile, so one more is asked for, and given back where it was not.
        let taken = slots.take(wanted + usize::from(needs_owner), test, deadline);
        drop(waiting);
        let mut taken = taken.map_err(|busy| Error::TestSetup {
            test: test.into(),
            what: "waiting for the server's connections",
            reason: busy.to_string(),
        })?;
        if taken.len() > wanted && self.owner.is_open() {
            drop(taken.split_off(1));
        }
        admission.taken = Some(taken);
        Ok(admission)
    }

    /// Ends the owner's session where nobody has a database of its: who waits may want its connection too.
    fn close_if_all_wait(&self) {
        let tests = self.tests();
        if tests.waiting > 0 && tests.running == tests.waiting {
            self.owner.close();
        }
    }

    pub(super) fn somebody_waits(&self) -> bool {
        self.tests().waiting > 0
    }

    fn tests(&self) -> MutexGuard<'_, Tests> {
        self.tests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a lane that was free has reserved already.
    pub(super) fn admit_with(self: &Arc<Self>, taken: Option<Taken>) -> Admission<C> {
        self.tests().running += 1;
        Admission { house: Arc::clone(self), taken }
    }

    /// Works with the owner's session. When it is opened, what dead owners have left is removed.
    pub(super) fn work<T>(
        &self,
        admission: &mut Admission<C>,
        keep: usize,
        work: impl FnOnce(&mut Desk<C>) -> Result<T>,
    ) -> Result<T> {
        let (Some(slots), Some(taken)) = (&self.slots, &mut admission.taken) else {
            unreachable!("only servers have an owner's session");
        };
        self.owner.work(slots, taken, keep, |desk| {
            if !self.swept.swap(true, Ordering::AcqRel) && !keeps() {
                desk.sweep()?;
            }
            work(desk)
        })
    }

    pub(super) fn work_on<T>(&self, work: impl FnOnce(&mut Desk<C>) -> Result<T>) -> Option<Result<T>> {
        self.owner.work_on(work)
    }

    pub(super) fn free(&self) -> MutexGuard<'_, Vec<FreeLane<C>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> Drop for Admission<C> {
    fn drop(&mut self) {
        self.taken = None;
        self.house.tests().running -= 1;
        self.house.close_if_all_wait();
    }
}

/// One test that waits, as long as it does.
struct Waiting<'h, C: SessionConnection>(&'h House<C>);

impl<'h, C: SessionConnection> Waiting<'h, C> {
    fn new(house: &'h House<C>) -> Self {
        house.tests().waiting += 1;
        Self(house)
    }
}

impl<C: SessionConnection> Drop for Waiting<'_, C> {
    fn drop(&mut self) {
        self.0.tests().waiting -= 1;
    }
}
