//! The session of a process on a server that creates and removes databases. The session holds a lock on its owner
//! number: while it is open, the databases with that number are in use.

use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::connection_slots::{ConnectionSlots, HeldSlots};
use super::registrar::Registrar;
use crate::admin::{AdminConnection, GeneratedName, admin_config, admin_urls};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result};
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
    connection: Mutex<Option<OwnerConnection<C>>>,
}

/// The open session of an owner.
pub(super) struct OwnerConnection<C: SessionConnection> {
    admin: AdminConnection<C>,
    pub(super) owner_number: u32,
    names_given: u32,
    /// `None` if no slot was free.
    _slot: Option<HeldSlots>,
}

impl<C: SessionConnection> Owner<C> {
    /// An owner that connects to the database in the URL, if `to_configured`, or to another one if that database does
    /// not exist.
    pub(super) fn new(
        registrar: &'static dyn Registrar<C>,
        config: &Config,
        target: &Target,
        to_configured: bool,
    ) -> Result<Self> {
        let configured = to_configured.then(|| config.url.clone());
        let urls = configured.into_iter().chain(admin_urls(target).map_err(invalid)?);
        let admin_app = |url| {
            let config = admin_config(url, config).acquire_timeout(PATIENCE).lock_timeout(LOCK_TIMEOUT);
            registrar.make_bare("tests".into(), config)
        };
        Ok(Self { admin_apps: urls.map(admin_app).collect::<Result<_>>()?, connection: Mutex::new(None) })
    }

    /// An application on the server, for information that needs no connection.
    pub(super) fn app(&self) -> &App<C> {
        &self.admin_apps[0]
    }

    pub(super) fn is_open(&self) -> bool {
        self.connection.lock().is_some()
    }

    /// Closes the session if `is_idle` returns true. No other thread can use the session while `is_idle` runs. The
    /// databases of the owner have no living owner from then on.
    pub(super) fn close_if(&self, is_idle: impl FnOnce() -> bool) {
        let mut open = self.connection.lock();
        if open.is_some() && is_idle() {
            *open = None;
            self.admin_apps.iter().for_each(|admin_app| drop(admin_app.dispose()));
        }
    }

    /// Calls `work` with the session, and opens the session first if it is closed. The session takes a slot from
    /// `held_slots` if they are more than `keep`, and otherwise a free slot, if there is one.
    pub(super) fn with_session<T>(
        &self,
        slots: &ConnectionSlots,
        held_slots: &mut HeldSlots,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut OwnerConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let mut open = self.connection.lock();
        if open.is_none() {
            let slot =
                if held_slots.len() > keep { Some(held_slots.split_off(1)) } else { slots.try_acquire(1, "tests") };
            *open = Some(self.open(slots, slot, patience)?);
        }
        let admin = open.as_mut().expect("the session is open");
        let outcome = work(admin);
        if admin.is_lost() {
            *open = None;
        }
        outcome
    }

    /// Calls `work` with the session if it is open, and otherwise returns an error.
    pub(super) fn with_open_session<T>(&self, work: impl FnOnce(&mut OwnerConnection<C>) -> Result<T>) -> Result<T> {
        match self.connection.lock().as_mut() {
            Some(admin) => work(admin),
            None => Err(invalid("the session that owns the databases is gone, so the next run removes this one")),
        }
    }

    fn open(&self, slots: &ConnectionSlots, slot: Option<HeldSlots>, patience: Duration) -> Result<OwnerConnection<C>> {
        let mut admin = AdminConnection::connect(&self.admin_apps, Location::caller(), Some(deadline_after(patience)))?;
        if admin.capacity() > 0 {
            slots.set_capacity(admin.capacity());
        }
        let kind = admin.kind();
        for _ in 0..MAX_NUMBER_ATTEMPTS {
            let owner_number = random_number();
            if admin.query_bool(&kind.claim_owner(owner_number))? {
                return Ok(OwnerConnection { admin, owner_number, names_given: 0, _slot: slot });
            }
        }
        let claim = kind.claim_owner(0);
        Err(invalid(format!("the server gave none of {MAX_NUMBER_ATTEMPTS} locks that it was asked for, by `{claim}`")))
    }
}

impl<C: SessionConnection> OwnerConnection<C> {
    /// A name that no database or schema has.
    pub(super) fn new_name(&mut self) -> String {
        self.names_given += 1;
        GeneratedName::Test { owner: self.owner_number, number: self.names_given }.to_string()
    }

    pub(super) fn has_database(&mut self, name: &str) -> Result<bool> {
        let databases = self.kind().databases(name);
        Ok(self.query_texts(&databases)?.iter().any(|database| database == name))
    }
}

impl<C: SessionConnection> Deref for OwnerConnection<C> {
    type Target = AdminConnection<C>;

    fn deref(&self) -> &AdminConnection<C> {
        &self.admin
    }
}

impl<C: SessionConnection> DerefMut for OwnerConnection<C> {
    fn deref_mut(&mut self) -> &mut AdminConnection<C> {
        &mut self.admin
    }
}

/// An error that concerns all tests.
pub(super) fn invalid(reason: impl Into<String>) -> Error {
    Error::from(Details::InvalidConfig { app: "tests".into(), reason: reason.into() })
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
