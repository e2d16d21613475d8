//! Databases in which tests run that are rolled back. Each has one connection at a time, and is as it was filled, so it is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection_slots::HeldSlots;
use super::database_url::with_database;
use super::generated_name::GeneratedName;
use super::provisioner::{Provisioner, StartedTest};
use super::test_database::{LAST_SESSIONS, TestDatabase};
use super::test_environment::{Reservation, TestEnvironment};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;
use crate::pool::{PinnedConnection, TAKEN};
use crate::wording::phrase;

/// How long the owner's session is waited for, at the end of a test.
const LAST_OPEN: Duration = Duration::from_secs(5);

/// How often a pinned connection is made before it is an error that it cannot be used then.
const MAX_TIMES_MADE: u32 = 3;

/// How many pinned connections of one number are tried.
const MAX_OCCUPIED: u32 = 100;

/// A table that a pinned connection on MySQL or MariaDB has until it is filled: neither has a way to do that in one step, or to rename a database.
const UNFINISHED: &str = "__diesel_session_unfinished";

/// A pinned connection's connection, between two tests or in one.
pub(super) struct RollbackDatabase<C: SessionConnection> {
    // Before the slot: it is free when the connection is closed.
    pinned: Arc<PinnedConnection<C>>,
    content: u64,
    /// How its connection was prepared: it stays so.
    settings: String,
    /// None for SQLite.
    database: Option<String>,
    url: String,
    taken: Option<HeldSlots>,
}

impl<C: SessionConnection> Provisioner<'_, C> {
    /// Begins a test in a pinned connection: in one of this process's, or in a new one.
    pub(super) fn start_pinned(&self) -> Result<StartedTest<C>> {
        // As long as nobody knows what the configured database is like, there is no pinned connection for it either.
        let free = self.known_hash().and_then(|content| {
            let mut free = self.environment.free_databases();
            let settings = self.connection_setup();
            let fits = |pinned: &RollbackDatabase<C>| pinned.content == content && pinned.settings == settings;
            free.iter().rposition(fits).map(|at| free.swap_remove(at))
        });
        if let Some(mut pinned) = free {
            let mut reservation = self.environment.reservation_with(pinned.taken.take());
            match self.open_app(&pinned) {
                Ok(app) => return Ok((app, TestDatabase::Rollback(pinned), reservation)),
                // Whatever it was, such as a server that was started anew: it is looked for anew too.
                Err(error) => {
                    crate::wording::log_line!(
                        debug,
                        "diesel_session::testing",
                        "a pinned connection was not to be had again: {error}"
                    );
                    pinned.taken = reservation.slots.take();
                    drop(pinned);
                }
            }
        }
        match self.kind() {
            DatabaseKind::Sqlite => self.start_in_memory(self.hash()?),
            DatabaseKind::Postgres | DatabaseKind::Mysql => self.start_on_server(),
        }
    }

    fn start_in_memory(&self, content: u64) -> Result<StartedTest<C>> {
        let reservation = self.environment.reserve(0, false, self.id, self.deadline)?;
        let filling_app = self.filling_app(":memory:")?;
        let filled = self.fill(&filling_app).and_then(|()| {
            // It lives as long as somebody has it open.
            let url = filling_app.pool()?.url().to_owned();
            let (pinned, settings) = (Arc::new(PinnedConnection::new(None)), self.connection_setup());
            let pinned = RollbackDatabase { pinned, content, settings, database: None, url, taken: None };
            self.open_app(&pinned).map(|app| (app, pinned))
        });
        let disposed = filling_app.dispose();
        let (app, pinned) = filled?;
        disposed?;
        Ok((app, TestDatabase::Rollback(pinned), reservation))
    }

    fn start_on_server(&self) -> Result<StartedTest<C>> {
        let mut reservation = self.environment.reserve(1, false, self.id, self.deadline)?;
        let content = self.hash()?;
        // How many pinned connections of the slot's number somebody else is in, and how often one was made that could not be used.
        let (mut taken, mut times_made) = (0, 0);
        let mut observed;
        loop {
            let number = number_of(&reservation);
            let name = GeneratedName::Rollback { content, number: number + 1000 * taken };
            let database = name.to_string();
            let url = with_database(&self.environment.target, &database)
                .map_err(|reason| self.setup_error(FINDING_DATABASE, reason))?;
            let pinned = Arc::new(PinnedConnection::new(self.kind().claim_pinned_connection(&database)));
            let settings = self.connection_setup();
            let pinned =
                RollbackDatabase { pinned, content, settings, database: Some(database.clone()), url, taken: None };
            let (refused, is_there) = match self.open_app(&pinned) {
                Ok(app) => match self.unfinished_reason(&app) {
                    Ok(None) => return Ok((app, TestDatabase::Rollback(pinned), reservation)),
                    unfinished => {
                        drop(app.dispose());
                        observed = format!("{database} {}", unfinished?.unwrap_or_default());
                        (None, true)
                    }
                },
                Err(Error::Connect { message, .. }) if message.contains(TAKEN) => {
                    pinned.pinned.end(self.kind());
                    taken += 1;
                    observed = format!("{database} and {} more have a test of another process", taken - 1);
                    let is_over = self.deadline <= Instant::now();
                    self.limit_attempts(taken == 1 || taken <= MAX_OCCUPIED && !is_over, &observed)?;
                    continue;
                }
                Err(error @ Error::Connect { kind, .. }) if may_be_missing(kind, self.kind()) => {
                    observed = format!("{database} cannot be connected to: {}", phrase(&error));
                    (Some(error), false)
                }
                Err(other) => return Err(other),
            };
            pinned.pinned.end(self.kind());
            drop(pinned);
            if !self.environment.has_open_owner() && reservation.slots.as_ref().is_some_and(|slots| slots.len() < 2) {
                // One more for the owner's session, taken together: nobody waits with one of them in his hand.
                reservation.release();
                reservation = self.environment.reserve(1, true, self.id, self.deadline)?;
                if number_of(&reservation) != number {
                    // Another slot is another pinned connection, which may be there; whoever has the first slot now may make that one.
                    continue;
                }
            }
            if let Some(refused) = refused
                && self.work(&mut reservation, 1, |admin| {
                    Ok(admin.query_texts(&admin.kind().databases(&database))?.contains(&database))
                })?
            {
                // It is there by now, or it is there and cannot be used.
                if times_made > 0 {
                    return Err(self.explain_connect_error(refused));
                }
                times_made += 1;
                continue;
            }
            times_made += 1;
            self.limit_attempts(times_made <= MAX_TIMES_MADE, &observed)?;
            self.make_rollback_database(&mut reservation, name, is_there)?;
        }
    }

    /// An error that tells what was seen, after too many attempts.
    fn limit_attempts(&self, is_within_limit: bool, observed: &str) -> Result<()> {
        match is_within_limit {
            true => Ok(()),
            false => Err(self.setup_error("finding a database in which it can be rolled back", observed)),
        }
    }

    /// Of an enum of connections the reason is not known.
    fn explain_connect_error(&self, error: Error) -> Error {
        match error {
            Error::Connect { kind: ConnectErrorKind::Other, message, .. }
                if DatabaseKind::of_type::<C>().is_none() && !self.environment.registrar.has_connect_with() =>
            {
                let advice = match message.contains("`Database::connect_with`") {
                    true => "`TestIsolation::Rollback` needs that to find out whether its database is there",
                    false => {
                        "`TestIsolation::Rollback` with an enum of connections needs `Database::connect_with`, which tells the reason"
                    }
                };
                self.setup_error(FINDING_DATABASE, format!("{}. {advice}", phrase(message)))
            }
            other => other,
        }
    }

    /// An application in the pinned connection, which is inside of its transaction then.
    fn open_app(&self, pinned: &RollbackDatabase<C>) -> Result<App<C>> {
        let config = Config {
            url: pinned.url.clone(),
            max_size: 1,
            idle_timeout: None,
            max_lifetime: None,
            ..self.config.clone()
        };
        let app = self.environment.registrar.make(self.id.to_string(), config, Some(Arc::clone(&pinned.pinned)))?;
        if let Err(error) = app.ping() {
            drop(app.dispose());
            return Err(error);
        }
        if let (Some(slots), Ok(pool)) = (&self.environment.slots, app.pool())
            && pool.capacity() > 0
        {
            slots.set_capacity(pool.capacity());
        }
        Ok(app)
    }

    /// What a connection is told when it is new.
    pub(super) fn connection_setup(&self) -> String {
        let mut settings = self.kind().setup(&self.config, true);
        settings.extend(self.config.on_connect.iter().cloned());
        settings.extend(self.config.application_name.clone());
        settings.join("\0")
    }

    /// Why a pinned connection is not one that was filled to the end, if so. PostgreSQL's get their name when they are; elsewhere there is a mark until
    /// then, and between the making of the database and that of the mark there is nothing.
    fn unfinished_reason(&self, app: &App<C>) -> Result<Option<String>> {
        if self.kind() != DatabaseKind::Mysql {
            return Ok(None);
        }
        let mut pooled = app.pool()?.acquire(std::panic::Location::caller(), false, None)?;
        let mut texts = |sql: &str| {
            let answer = pooled.conn().texts(sql);
            answer.map_err(|error| Error::from_query(error, std::panic::Location::caller()))
        };
        let tables =
            texts("SELECT table_name AS value FROM information_schema.tables WHERE table_schema = DATABASE()")?;
        let tables: Vec<String> = tables.into_iter().flatten().collect();
        if tables.iter().any(|table| table == UNFINISHED) {
            return Ok(Some(format!("has the table {UNFINISHED}: whoever fills it has not come to the end")));
        }
        let known = self.content.schema.script.versions().count();
        let has_bookkeeping_table = tables.iter().any(|table| table == "__diesel_schema_migrations");
        if known > 0 && !has_bookkeeping_table {
            return Ok(Some(format!("has none of {known} migrations")));
        }
        Ok(None)
    }

    fn make_rollback_database(
        &self,
        reservation: &mut Reservation<C>,
        name: GeneratedName,
        is_there: bool,
    ) -> Result<()> {
        match self.kind() {
            DatabaseKind::Mysql => self.make_mysql_rollback_database(reservation, &name.to_string(), is_there),
            DatabaseKind::Postgres | DatabaseKind::Sqlite => {
                let others = self.known_templates().keys().copied().collect();
                self.make_kept(reservation, name, false, others)
            }
        }
    }

    /// It has its last name from the beginning; who makes it has claimed it.
    fn make_mysql_rollback_database(
        &self,
        reservation: &mut Reservation<C>,
        database: &str,
        is_there: bool,
    ) -> Result<()> {
        let kind = self.kind();
        let claim = kind.claim_pinned_connection(database).unwrap_or_default();
        let content = self.hash()?;
        let claimed = self.work(reservation, 1, |admin| {
            let claimed = admin.query_bool(&claim)?;
            if claimed {
                if is_there {
                    admin.execute(&kind.drop_database(database))?;
                }
                self.create_database(admin, database, None)?;
                admin.execute(&format!(
                    "CREATE TABLE {}.{UNFINISHED} (nothing INTEGER PRIMARY KEY)",
                    kind.quote(database)
                ))?;
                admin.prune(&[content])?;
            }
            Ok(claimed)
        })?;
        if !claimed {
            return Ok(());
        }
        let filled = self.fill_database(database);
        self.work(reservation, 1, |admin| {
            match &filled {
                Ok(()) => admin.execute(&format!("DROP TABLE {}.{UNFINISHED}", kind.quote(database)))?,
                Err(_) => admin.execute(&kind.drop_database(database))?,
            }
            admin
                .query_texts(&format!("SELECT CAST(RELEASE_LOCK({}) AS CHAR) AS value", kind.literal(database)))
                .map(drop)
        })?;
        filled
    }
}

impl<C: SessionConnection> RollbackDatabase<C> {
    /// Why nothing of the test can be undone, if so.
    pub(super) fn poisoned(&self) -> Option<(String, Option<crate::error::Place>)> {
        self.pinned.poisoned().map(|poisoned| (poisoned.cause, poisoned.at))
    }

    /// Undoes the test. Whether the pinned connection is as it was. One in memory is gone with its connection.
    pub(super) fn roll_back(&self, kind: DatabaseKind) -> bool {
        self.pinned.end(kind) && (kind != DatabaseKind::Sqlite || self.pinned.is_connected())
    }

    /// Keeps it, with its slot, for the next test; where others wait for that, it is theirs.
    pub(super) fn keep_for_next_test(mut self, environment: &TestEnvironment<C>, taken: Option<HeldSlots>) {
        self.taken = taken;
        if !environment.slots.as_ref().is_some_and(|slots| slots.probe_waiters()) {
            environment.free_databases().push(self);
        }
    }

    /// Removes its database, in which something was left. The owner's session is opened for it where that is due, with this pinned connection's slot. Who
    /// still has the connection loses it: the next test must not find what this one did.
    pub(super) fn remove(self, environment: &TestEnvironment<C>, reservation: &mut Reservation<C>) -> Result<()> {
        let Some(database) = self.database.clone() else { return Ok(()) };
        drop(self);
        environment.with_owner(reservation, 0, LAST_OPEN, |admin| {
            let kind = admin.kind();
            if !admin.wait_until_unused(&database, Instant::now() + LAST_SESSIONS)? {
                for session in admin.query_texts(&kind.sessions_in(&database))? {
                    // It may have ended by itself.
                    let _ = admin.execute(&kind.end_session(&session));
                }
                admin.wait_until_unused(&database, Instant::now() + LAST_SESSIONS)?;
            }
            admin.execute(&kind.drop_database(&database))
        })
    }
}

/// Whether a database that is not there may be why it cannot be connected to. Only some servers tell, no enum of connections does, and
/// MySQL first tells an account that it has no rights there.
fn may_be_missing(refusal: ConnectErrorKind, kind: DatabaseKind) -> bool {
    match refusal {
        ConnectErrorKind::UnknownDatabase | ConnectErrorKind::Other => true,
        ConnectErrorKind::Authentication => kind == DatabaseKind::Mysql,
        _ => false,
    }
}

/// The number of the pinned connection of a test: that of its first slot, which on this machine nobody else has.
fn number_of<C: SessionConnection>(reservation: &Reservation<C>) -> u32 {
    let first = reservation.slots.as_ref().and_then(|slots| slots.numbers().next());
    first.and_then(|first| u32::try_from(first).ok()).unwrap_or_default()
}

/// What could not be done.
pub(super) const FINDING_DATABASE: &str = "finding its database";
