//! Databases in which tests run and are rolled back. Each database has one connection at a time. A rollback restores
//! the initial contents, so the database is kept for other tests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection_slots::HeldSlots;
use super::generated_name::GeneratedName;
use super::provisioner::{FINDING_DATABASE, Provisioner, StartedTest};
use super::test_database::{LAST_SESSIONS, TestDatabase};
use super::test_environment::{Reservation, TestEnvironment};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;
use crate::pool::{PinnedConnection, TAKEN};
use crate::wording::phrase;

/// How long the end of a test waits for the session of the owner.
const OWNER_PATIENCE: Duration = Duration::from_secs(5);

/// How often a test creates its database before it reports that the database cannot be used.
const MAX_TIMES_MADE: u32 = 3;

/// How many databases with the same slot number are tried if tests of other processes use them.
const MAX_OCCUPIED: u32 = 100;

/// The table that marks an incomplete database. MySQL and MariaDB can neither fill a database in one step nor rename
/// it.
const UNFINISHED: &str = "__diesel_session_unfinished";

/// A database in which tests are rolled back, with its only connection.
pub(super) struct RollbackDatabase<C: SessionConnection> {
    // This field is declared before `slots`, so the connection is closed before its slot is released.
    pinned: Arc<PinnedConnection<C>>,
    contents_hash: u64,
    /// The setup of the connection. It is sent only once, so a test with another setup cannot use the connection.
    connection_setup: String,
    /// The name of the database on the server. `None` for SQLite.
    name: Option<String>,
    url: String,
    slots: Option<HeldSlots>,
}

impl<C: SessionConnection> Provisioner<'_, C> {
    /// Starts a test in a free rollback database of this process, or in another one.
    pub(super) fn start_rollback(&self) -> Result<StartedTest<C>> {
        // A rollback database with these contents exists only if the properties of the configured database are known.
        let free = self.known_contents_hash().and_then(|contents_hash| {
            let mut free = self.environment.free_databases();
            let setup = self.connection_setup();
            let fits = |database: &RollbackDatabase<C>| {
                database.contents_hash == contents_hash && database.connection_setup == setup
            };
            free.iter().rposition(fits).map(|index| free.swap_remove(index))
        });
        if let Some(mut database) = free {
            let mut reservation = self.environment.reservation_with(database.slots.take());
            match self.open_app(&database) {
                Ok(app) => return Ok((app, TestDatabase::Rollback(database), reservation)),
                // The connection may be lost, for example after a restart of the server. The test looks for a database
                // again.
                Err(error) => {
                    crate::wording::log_line!(
                        debug,
                        "diesel_session::testing",
                        "a pinned connection was not to be had again: {error}"
                    );
                    database.slots = reservation.slots.take();
                    drop(database);
                }
            }
        }
        match self.kind() {
            DatabaseKind::Sqlite => self.start_rollback_in_memory(self.contents_hash()?),
            DatabaseKind::Postgres | DatabaseKind::Mysql => self.start_rollback_on_server(),
        }
    }

    fn start_rollback_in_memory(&self, contents_hash: u64) -> Result<StartedTest<C>> {
        let reservation = self.environment.reserve(0, false, self.id, self.deadline)?;
        let filling_app = self.filling_app(":memory:")?;
        let filled = self.fill(&filling_app).and_then(|()| {
            // The database exists only while a connection to it is open, so the app is opened before `filling_app` is
            // disposed of.
            let database = RollbackDatabase {
                pinned: Arc::new(PinnedConnection::new(None)),
                contents_hash,
                connection_setup: self.connection_setup(),
                name: None,
                url: filling_app.pool()?.url().to_owned(),
                slots: None,
            };
            self.open_app(&database).map(|app| (app, database))
        });
        let disposed = filling_app.dispose();
        let (app, database) = filled?;
        disposed?;
        Ok((app, TestDatabase::Rollback(database), reservation))
    }

    fn start_rollback_on_server(&self) -> Result<StartedTest<C>> {
        let mut reservation = self.environment.reserve(1, false, self.id, self.deadline)?;
        let contents_hash = self.contents_hash()?;
        // `occupied` counts the databases with the slot's number that tests of other processes use. `times_made` counts
        // the databases that were created and could not be used.
        let (mut occupied, mut times_made) = (0, 0);
        let mut observed;
        loop {
            let number = number_of(&reservation);
            let generated_name = GeneratedName::Rollback { contents_hash, number: number + 1000 * occupied };
            let name = generated_name.to_string();
            let database = RollbackDatabase {
                pinned: Arc::new(PinnedConnection::new(self.kind().claim_pinned_connection(&name))),
                contents_hash,
                connection_setup: self.connection_setup(),
                name: Some(name.clone()),
                url: self.url_of(&name)?,
                slots: None,
            };
            let (refused, exists) = match self.open_app(&database) {
                Ok(app) => match self.unfinished_reason(&app) {
                    Ok(None) => return Ok((app, TestDatabase::Rollback(database), reservation)),
                    unfinished => {
                        drop(app.dispose());
                        observed = format!("{name} {}", unfinished?.unwrap_or_default());
                        (None, true)
                    }
                },
                Err(Error::Connect { message, .. }) if message.contains(TAKEN) => {
                    database.pinned.end(self.kind());
                    occupied += 1;
                    observed = format!("{name} and {} more have a test of another process", occupied - 1);
                    let is_over = self.deadline <= Instant::now();
                    self.limit_attempts(occupied == 1 || occupied <= MAX_OCCUPIED && !is_over, &observed)?;
                    continue;
                }
                Err(error @ Error::Connect { kind, .. }) if may_be_missing(kind, self.kind()) => {
                    observed = format!("{name} cannot be connected to: {}", phrase(&error));
                    (Some(error), false)
                }
                Err(other) => return Err(other),
            };
            database.pinned.end(self.kind());
            drop(database);
            if !self.environment.has_open_owner() && reservation.slots.as_ref().is_some_and(|slots| slots.len() < 2) {
                // The session of the owner needs a second slot. Both slots are acquired at once: a thread that held one
                // slot while it waited for the other could cause a deadlock.
                reservation.release();
                reservation = self.environment.reserve(1, true, self.id, self.deadline)?;
                if number_of(&reservation) != number {
                    // The database of the new slot may exist, and the new holder of the old slot may be creating its
                    // database.
                    continue;
                }
            }
            if let Some(refused) = refused
                && self.with_owner(&mut reservation, 1, |admin| {
                    Ok(admin.query_texts(&admin.kind().databases(&name))?.contains(&name))
                })?
            {
                // Another process may have created the database meanwhile. After the second failure the database is
                // unusable.
                if times_made > 0 {
                    return Err(self.explain_connect_error(refused));
                }
                times_made += 1;
                continue;
            }
            times_made += 1;
            self.limit_attempts(times_made <= MAX_TIMES_MADE, &observed)?;
            self.make_rollback_database(&mut reservation, generated_name, exists)?;
        }
    }

    /// Returns an error that contains `observed` if there were too many attempts.
    fn limit_attempts(&self, is_within_limit: bool, observed: &str) -> Result<()> {
        match is_within_limit {
            true => Ok(()),
            false => Err(self.setup_error("finding a database in which it can be rolled back", observed)),
        }
    }

    /// Adds advice to a connect error of an enum of connections, which does not report the reason of a failed connect.
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

    /// Opens an application on the pinned connection. The connection is inside its transaction afterwards.
    fn open_app(&self, database: &RollbackDatabase<C>) -> Result<App<C>> {
        let config = Config {
            url: database.url.clone(),
            max_size: 1,
            idle_timeout: None,
            max_lifetime: None,
            ..self.config.clone()
        };
        let app = self.environment.registrar.make(self.id.to_string(), config, Some(Arc::clone(&database.pinned)))?;
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

    /// The statements and options that set up a new connection, as a key.
    pub(super) fn connection_setup(&self) -> String {
        let mut settings = self.kind().setup(&self.config, true);
        settings.extend(self.config.on_connect.iter().cloned());
        settings.extend(self.config.application_name.clone());
        settings.join("\0")
    }

    /// The reason why a rollback database is incomplete, if it is. On PostgreSQL a database gets its name when it is
    /// complete. On MySQL and MariaDB an incomplete database contains the table [`UNFINISHED`], or nothing if its
    /// creator has not created that table yet.
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
            return Ok(Some(format!("has the table {UNFINISHED}: it was not filled to the end")));
        }
        let known = self.contents.schema.script.versions().count();
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
        exists: bool,
    ) -> Result<()> {
        match self.kind() {
            DatabaseKind::Mysql => self.make_mysql_rollback_database(reservation, &name.to_string(), exists),
            DatabaseKind::Postgres | DatabaseKind::Sqlite => {
                let others = self.known_templates().keys().copied().collect();
                self.make_kept(reservation, name, false, others)
            }
        }
    }

    /// The database has its final name from the beginning. Its creator holds the lock of the name until the database is
    /// complete.
    fn make_mysql_rollback_database(
        &self,
        reservation: &mut Reservation<C>,
        database: &str,
        exists: bool,
    ) -> Result<()> {
        let kind = self.kind();
        let claim = kind.claim_pinned_connection(database).unwrap_or_default();
        let contents_hash = self.contents_hash()?;
        let claimed = self.with_owner(reservation, 1, |admin| {
            let claimed = admin.query_bool(&claim)?;
            if claimed {
                if exists {
                    admin.execute(&kind.drop_database(database))?;
                }
                self.create_database(admin, database, None)?;
                admin.execute(&format!(
                    "CREATE TABLE {}.{UNFINISHED} (nothing INTEGER PRIMARY KEY)",
                    kind.quote(database)
                ))?;
                admin.prune(&[contents_hash])?;
            }
            Ok(claimed)
        })?;
        if !claimed {
            return Ok(());
        }
        let filled = self.fill_database(database);
        self.with_owner(reservation, 1, |admin| {
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
    /// The reason why the test cannot be rolled back, if it cannot.
    pub(super) fn poisoned(&self) -> Option<(String, Option<crate::error::Place>)> {
        self.pinned.poisoned().map(|poisoned| (poisoned.cause, poisoned.at))
    }

    /// Rolls the test back. Returns whether the next test can use the database. A database in memory ends with its
    /// connection.
    pub(super) fn roll_back(&self, kind: DatabaseKind) -> bool {
        self.pinned.end(kind) && (kind != DatabaseKind::Sqlite || self.pinned.is_connected())
    }

    /// Keeps the database and its slot for the next test. If other threads wait for slots, the method closes the
    /// connection and releases the slot.
    pub(super) fn keep_for_next_test(mut self, environment: &TestEnvironment<C>, slots: Option<HeldSlots>) {
        self.slots = slots;
        if !environment.slots.as_ref().is_some_and(|slots| slots.probe_waiters()) {
            environment.free_databases().push(self);
        }
    }

    /// Removes the database, because it contains changes of the test. If the session of the owner is closed, it is
    /// opened with the slot of this database. Sessions that are still connected are ended: the next test must not find
    /// the changes.
    pub(super) fn remove(self, environment: &TestEnvironment<C>, reservation: &mut Reservation<C>) -> Result<()> {
        let Some(name) = self.name.clone() else { return Ok(()) };
        drop(self);
        environment.with_owner(reservation, 0, OWNER_PATIENCE, |admin| {
            let kind = admin.kind();
            if !admin.wait_until_unused(&name, Instant::now() + LAST_SESSIONS)? {
                for session in admin.query_texts(&kind.sessions_in(&name))? {
                    // The session may have ended by itself.
                    let _ = admin.execute(&kind.end_session(&session));
                }
                admin.wait_until_unused(&name, Instant::now() + LAST_SESSIONS)?;
            }
            admin.execute(&kind.drop_database(&name))
        })
    }
}

/// Whether the connect may have failed because the database does not exist. Not all servers report this reason, an enum
/// of connections never does, and MySQL first reports that the account has no rights on the database.
fn may_be_missing(refusal: ConnectErrorKind, kind: DatabaseKind) -> bool {
    match refusal {
        ConnectErrorKind::UnknownDatabase | ConnectErrorKind::Other => true,
        ConnectErrorKind::Authentication => kind == DatabaseKind::Mysql,
        _ => false,
    }
}

/// The number of a test's rollback database: the number of its first slot, which no other test on this machine has.
fn number_of<C: SessionConnection>(reservation: &Reservation<C>) -> u32 {
    let first = reservation.slots.as_ref().and_then(|slots| slots.numbers().next());
    first.and_then(|first| u32::try_from(first).ok()).unwrap_or_default()
}
