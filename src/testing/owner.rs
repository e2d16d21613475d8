//! A process's session on a server, which makes and removes databases. As long as it lives, the databases of its number are in use.

use std::panic::Location;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::address::with_database;
use super::names::Name;
use super::registrar::Registrar;
use super::slots::{Slots, Taken};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;
use crate::pool::CheckedOut;
use crate::url::Target;

/// How long it waits for a connection to a server that is full.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How many numbers of owners are tried. Of four thousand million hardly one is taken.
const MOST_NUMBERS: usize = 8;

/// How long it waits for locks of others.
const LOCKS: Duration = Duration::from_secs(5);

/// The session, which is opened when it is needed.
pub(super) struct Owner<C: SessionConnection> {
    /// The same server by its databases, in the order in which they are tried.
    admin_apps: Vec<App<C>>,
    kind: DatabaseKind,
    open: Mutex<Option<AdminConnection<C>>>,
}

/// The open session.
pub(super) struct AdminConnection<C: SessionConnection> {
    pooled: CheckedOut<C>,
    kind: DatabaseKind,
    number: u32,
    made: u32,
    /// None where the limit had no more.
    _slot: Option<Taken>,
}

impl<C: SessionConnection> Owner<C> {
    /// A session in the database of the URL, or in another where that is not there.
    pub(super) fn new(registrar: &'static dyn Registrar<C>, config: &Config, target: &Target) -> Result<Self> {
        Self::through(registrar, config, target, Some(config.url.clone()))
    }

    /// A session that is not in the database of the URL.
    pub(super) fn elsewhere(registrar: &'static dyn Registrar<C>, config: &Config, target: &Target) -> Result<Self> {
        Self::through(registrar, config, target, None)
    }

    fn through(
        registrar: &'static dyn Registrar<C>,
        config: &Config,
        target: &Target,
        first: Option<String>,
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
                .lock_timeout(LOCKS);
            registrar.make_bare("tests".into(), config)
        };
        let admin_apps = first.into_iter().chain(others).map(admin_app).collect::<Result<_>>()?;
        Ok(Self { admin_apps, kind, open: Mutex::new(None) })
    }

    /// An application on the server, for what can be asked without a connection.
    pub(super) fn app(&self) -> &App<C> {
        &self.admin_apps[0]
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    /// Ends the session; its databases are nobody's from then on.
    pub(super) fn close(&self) {
        self.close_if(|| true);
    }

    /// The same where nobody needs it. That is asked while nobody can begin to work with it.
    pub(super) fn close_if(&self, is_idle: impl FnOnce() -> bool) {
        let mut open = self.lock();
        if open.is_some() && is_idle() {
            *open = None;
            self.admin_apps.iter().for_each(|admin_app| drop(admin_app.dispose()));
        }
    }

    /// Works with the session. It is opened first where that is due, with a slot of `taken` where that has one to spare.
    pub(super) fn work<T>(
        &self,
        slots: &Arc<Slots>,
        taken: &mut Taken,
        keep: usize,
        patience: Duration,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        let mut open = self.lock();
        if open.is_none() {
            let slot = if taken.len() > keep { Some(taken.split_off(1)) } else { slots.try_take(1, "tests") };
            *open = Some(self.open(slots, slot, patience)?);
        }
        let admin = open.as_mut().expect("it was just opened");
        let outcome = work(admin);
        if admin.pooled.managed().lost {
            *open = None;
        }
        outcome
    }

    /// Works with the session where it is open.
    pub(super) fn work_on<T>(&self, work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>) -> Option<Result<T>> {
        self.lock().as_mut().map(work)
    }

    fn open(&self, slots: &Slots, slot: Option<Taken>, patience: Duration) -> Result<AdminConnection<C>> {
        let (at, end) = (Location::caller(), end_of(patience));
        let mut admin_apps = self.admin_apps.iter();
        let mut first = None;
        let pooled = loop {
            let Some(admin_app) = admin_apps.next() else {
                let none = || Error::InvalidConfig { app: "tests".into(), reason: "no database can be reached".into() };
                return Err(first.unwrap_or_else(none));
            };
            match admin_app.pool()?.acquire(at, false, Some(end)) {
                // An enum of connections does not tell that a database is not there. MySQL and MariaDB refuse an account
                // that has no right to the database before they say whether there is one.
                Err(
                    error @ Error::Connect {
                        kind:
                            ConnectErrorKind::UnknownDatabase | ConnectErrorKind::Authentication | ConnectErrorKind::Other,
                        ..
                    },
                ) => {
                    first.get_or_insert(error);
                }
                other => break other?,
            }
        };
        let capacity = pooled.pool().capacity();
        if capacity > 0 {
            slots.set_capacity(capacity);
        }
        let mut admin = AdminConnection { pooled, kind: self.kind, number: 0, made: 0, _slot: slot };
        if let Some(sql) = self.kind.catalog_search_path() {
            admin.send(sql)?;
        }
        for _ in 0..MOST_NUMBERS {
            let number = random();
            if admin.is_true(&self.kind.claim_owner(number))? {
                admin.number = number;
                return Ok(admin);
            }
        }
        let reason = format!(
            "the server gave none of {MOST_NUMBERS} locks that it was asked for, by `{}`",
            self.kind.claim_owner(0)
        );
        Err(Error::InvalidConfig { app: "tests".into(), reason })
    }

    fn lock(&self) -> MutexGuard<'_, Option<AdminConnection<C>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> AdminConnection<C> {
    pub(super) fn kind(&self) -> DatabaseKind {
        self.kind
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn is_lost(&mut self) -> bool {
        self.pooled.managed().lost
    }

    /// A name that nothing has yet.
    pub(super) fn new_name(&mut self) -> Name {
        self.made += 1;
        Name::Test { owner: self.number, number: self.made }
    }

    pub(super) fn send(&mut self, sql: &str) -> Result<()> {
        let sent = self.pooled.conn().batch_execute(sql);
        self.explained(sent)
    }

    pub(super) fn texts(&mut self, sql: &str) -> Result<Vec<String>> {
        let answer = self.pooled.conn().texts(sql);
        Ok(self.explained(answer)?.into_iter().flatten().collect())
    }

    pub(super) fn is_true(&mut self, sql: &str) -> Result<bool> {
        Ok(self.texts(sql)?.first().is_some_and(|answer| answer == "1"))
    }

    fn explained<T>(&mut self, outcome: QueryResult<T>) -> Result<T> {
        outcome.map_err(|error| {
            let managed = self.pooled.managed();
            managed.lost |= dialect::is_connection_lost(&error);
            managed.closes_at_checkin |= managed.lost;
            Error::from_query(error, Location::caller())
        })
    }
}

/// When a wait that begins now ends. One without end ends after a year.
pub(super) fn end_of(patience: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + patience.min(YEAR)
}

/// Nobody else's, most likely: the server has the last word.
fn random() -> u32 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(std::process::id()) >> 16) as u32
}
