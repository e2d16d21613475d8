//! The session of a process on a server that creates and removes databases. The session holds a lock on its owner
//! number: while it is open, the databases with that number are in use.

use std::panic::Location;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::connection_slots::{ConnectionSlots, HeldSlots};
use super::database_url::with_database;
use super::generated_name::GeneratedName;
use super::registrar::Registrar;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;
use crate::pool::CheckedOut;
use crate::url::Target;

/// How long the owner waits for a connection to a full server.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How many owner numbers are tried. There are 2^32 numbers, so a collision is improbable.
const MAX_NUMBER_ATTEMPTS: usize = 8;

/// How long a statement of the owner waits for locks of other sessions.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The owner of the databases of a process. Its session is opened at the first use.
pub(super) struct Owner<C: SessionConnection> {
    /// One application per database of the server to which the owner can connect, in the order of the attempts.
    admin_apps: Vec<App<C>>,
    kind: DatabaseKind,
    connection: Mutex<Option<AdminConnection<C>>>,
}

/// The open session of an owner.
pub(super) struct AdminConnection<C: SessionConnection> {
    pooled: CheckedOut<C>,
    kind: DatabaseKind,
    owner_number: u32,
    names_given: u32,
    /// `None` if no slot was free.
    _slot: Option<HeldSlots>,
}

impl<C: SessionConnection> Owner<C> {
    /// An owner that connects to the database in the URL, or to another one if that database does not exist.
    pub(super) fn new(registrar: &'static dyn Registrar<C>, config: &Config, target: &Target) -> Result<Self> {
        Self::with_first_url(registrar, config, target, Some(config.url.clone()))
    }

    /// An owner that never connects to the database in the URL.
    pub(super) fn outside_configured_database(
        registrar: &'static dyn Registrar<C>,
        config: &Config,
        target: &Target,
    ) -> Result<Self> {
        Self::with_first_url(registrar, config, target, None)
    }

    fn with_first_url(
        registrar: &'static dyn Registrar<C>,
        config: &Config,
        target: &Target,
        first_url: Option<String>,
    ) -> Result<Self> {
        let kind = target.kind;
        let others: &[&str] = match kind {
            DatabaseKind::Postgres => &["postgres", "template1"],
            DatabaseKind::Mysql => &[""],
            DatabaseKind::Sqlite => &[],
        };
        let reason = |reason| Error::InvalidConfig { app: "tests".into(), reason };
        let others = others.iter().filter(|database| **database != target.database);
        let others =
            others.map(|database| with_database(target, database).map_err(reason)).collect::<Result<Vec<_>>>()?;
        let admin_app = |url: String| {
            let config = Config::new(url)
                .max_size(1)
                .acquire_timeout(PATIENCE)
                .connect_timeout(config.connect_timeout)
                .idle_timeout(None)
                .max_lifetime(None)
                .leak_threshold(None)
                .lock_timeout(LOCK_TIMEOUT);
            registrar.make_bare("tests".into(), config)
        };
        let admin_apps = first_url.into_iter().chain(others).map(admin_app).collect::<Result<_>>()?;
        Ok(Self { admin_apps, kind, connection: Mutex::new(None) })
    }

    /// An application on the server, for information that needs no connection.
    pub(super) fn app(&self) -> &App<C> {
        &self.admin_apps[0]
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    /// Closes the session. Its databases have no living owner from then on.
    pub(super) fn close(&self) {
        self.close_if(|| true);
    }

    /// Closes the session if `is_idle` returns true. No other thread can use the session while `is_idle` runs.
    pub(super) fn close_if(&self, is_idle: impl FnOnce() -> bool) {
        let mut open = self.lock();
        if open.is_some() && is_idle() {
            *open = None;
            self.admin_apps.iter().for_each(|admin_app| drop(admin_app.dispose()));
        }
    }

    /// Calls `work` with the session, and opens the session first if it is closed. The session takes a slot from
    /// `held_slots` if they are more than `keep`, and otherwise a free slot, if there is one.
    pub(super) fn with_session<T>(
        &self,
        slots: &Arc<ConnectionSlots>,
        held_slots: &mut HeldSlots,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let mut open = self.lock();
        if open.is_none() {
            let slot =
                if held_slots.len() > keep { Some(held_slots.split_off(1)) } else { slots.try_acquire(1, "tests") };
            *open = Some(self.open(slots, slot, patience)?);
        }
        let admin = open.as_mut().expect("the session is open");
        let outcome = work(admin);
        if admin.pooled.managed().lost {
            *open = None;
        }
        outcome
    }

    /// Calls `work` with the session if it is open.
    pub(super) fn with_open_session<T>(
        &self,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Option<Result<T>> {
        self.lock().as_mut().map(work)
    }

    fn open(&self, slots: &ConnectionSlots, slot: Option<HeldSlots>, patience: Duration) -> Result<AdminConnection<C>> {
        let (at, deadline) = (Location::caller(), deadline_after(patience));
        let mut admin_apps = self.admin_apps.iter();
        let mut first_error = None;
        let pooled = loop {
            let Some(admin_app) = admin_apps.next() else {
                let none = || Error::InvalidConfig { app: "tests".into(), reason: "no database can be reached".into() };
                return Err(first_error.unwrap_or_else(none));
            };
            match admin_app.pool()?.acquire(at, false, Some(deadline)) {
                // An enum of connections does not report that a database does not exist. MySQL and MariaDB refuse an
                // account without rights on the database before they report whether the database exists.
                Err(
                    error @ Error::Connect {
                        kind:
                            ConnectErrorKind::UnknownDatabase | ConnectErrorKind::Authentication | ConnectErrorKind::Other,
                        ..
                    },
                ) => {
                    first_error.get_or_insert(error);
                }
                other => break other?,
            }
        };
        let capacity = pooled.pool().capacity();
        if capacity > 0 {
            slots.set_capacity(capacity);
        }
        let mut admin = AdminConnection { pooled, kind: self.kind, owner_number: 0, names_given: 0, _slot: slot };
        if let Some(sql) = self.kind.catalog_search_path() {
            admin.execute(sql)?;
        }
        for _ in 0..MAX_NUMBER_ATTEMPTS {
            let number = random_number();
            if admin.query_bool(&self.kind.claim_owner(number))? {
                admin.owner_number = number;
                return Ok(admin);
            }
        }
        let reason = format!(
            "the server gave none of {MAX_NUMBER_ATTEMPTS} locks that it was asked for, by `{}`",
            self.kind.claim_owner(0)
        );
        Err(Error::InvalidConfig { app: "tests".into(), reason })
    }

    fn lock(&self) -> MutexGuard<'_, Option<AdminConnection<C>>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> AdminConnection<C> {
    pub(super) fn kind(&self) -> DatabaseKind {
        self.kind
    }

    pub(super) fn owner_number(&self) -> u32 {
        self.owner_number
    }

    pub(super) fn is_lost(&mut self) -> bool {
        self.pooled.managed().lost
    }

    /// A name that no database or schema has.
    pub(super) fn new_name(&mut self) -> GeneratedName {
        self.names_given += 1;
        GeneratedName::Test { owner: self.owner_number, number: self.names_given }
    }

    pub(super) fn execute(&mut self, sql: &str) -> Result<()> {
        let sent = self.pooled.conn().batch_execute(sql);
        self.convert_error(sent)
    }

    pub(super) fn query_texts(&mut self, sql: &str) -> Result<Vec<String>> {
        let answer = self.pooled.conn().texts(sql);
        Ok(self.convert_error(answer)?.into_iter().flatten().collect())
    }

    pub(super) fn query_bool(&mut self, sql: &str) -> Result<bool> {
        Ok(self.query_texts(sql)?.first().is_some_and(|answer| answer == "1"))
    }

    fn convert_error<T>(&mut self, outcome: QueryResult<T>) -> Result<T> {
        outcome.map_err(|error| {
            let managed = self.pooled.managed();
            managed.lost |= dialect::is_connection_lost(&error);
            managed.closes_at_checkin |= managed.lost;
            Error::from_query(error, Location::caller())
        })
    }
}

/// The end of a wait that begins now. The wait is limited to a year, because an `Instant` cannot represent every end.
pub(super) fn deadline_after(patience: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + patience.min(YEAR)
}

/// A number that probably no other owner has. The server decides, when the owner claims the number.
fn random_number() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(std::process::id()) >> 16) as u32
}
