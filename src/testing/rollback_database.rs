//! Databases in which tests run and are rolled back. Each database has one connection at a time. A rollback restores
//! the initial contents, so the database is kept for other tests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection_slots::HeldSlots;
use super::database_properties::texts;
use super::pinned_connection::{PinnedConnection, TAKEN};
use super::provisioner::{FINDING_DATABASE, Provisioner, StartedTest, UNFINISHED};
use super::test_database::{LAST_SESSIONS, TestDatabase};
use super::test_environment::{Reservation, TestEnvironment};
use crate::admin::GeneratedName;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Details, Error, ErrorKind, Result};
use crate::kind::DatabaseKind;
use crate::wording::{log_line, phrase};

/// How long the end of a test waits for the session of the owner.
const OWNER_PATIENCE: Duration = Duration::from_secs(5);

/// How often a test creates its database before it reports that the database cannot be used.
const MAX_TIMES_MADE: u32 = 3;

/// The step that failed, for [`Provisioner::setup_error`].
const FINDING_ROLLBACK: &str = "finding a database in which it can be rolled back";

/// How many databases with the same slot number are tried if tests of other processes use them.
const MAX_OCCUPIED: u32 = 100;

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
        let setup = self.connection_setup();
        let free = self.environment.known_properties(&setup).and_then(|properties| {
            let contents_hash = self.hash_of_contents(&properties);
            let mut free = self.environment.free_databases.lock();
            let fits = |database: &RollbackDatabase<C>| {
                database.contents_hash == contents_hash && database.connection_setup == setup
            };
            free.iter().rposition(fits).map(|index| free.swap_remove(index))
        });
        if let Some(mut database) = free {
            let mut reservation = self.environment.reservation_with(database.slots.take(), 1);
            match self.open_app(&database) {
                Ok(app) => return Ok((app, TestDatabase::Rollback(database), reservation)),
                // The connection may be lost, for example after a restart of the server. The test looks for a database
                // again.
                Err(error) => {
                    log_line!(
                        debug,
                        "diesel_session::testing",
                        "a pinned connection was not to be had again: {error:#}"
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
                pinned: Arc::new(PinnedConnection::new(DatabaseKind::Sqlite, None)),
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
        loop {
            let number = number_of(&reservation);
            let generated_name = GeneratedName::Rollback { contents_hash, number: number + 1000 * occupied };
            let name = generated_name.to_string();
            let database = RollbackDatabase {
                pinned: Arc::new(PinnedConnection::new(self.kind(), self.kind().claim_pinned_connection(&name))),
                contents_hash,
                connection_setup: self.connection_setup(),
                name: Some(name.clone()),
                url: self.url_of(&name)?,
                slots: None,
            };
            let error = match self.open_complete(&database, &name) {
                Ok(app) => return Ok((app, TestDatabase::Rollback(database), reservation)),
                Err(error) => error,
            };
            database.pinned.end();
            drop(database);
            if error.connect_message().is_some_and(|message| message.contains(TAKEN)) {
                if occupied > 0 && (occupied >= MAX_OCCUPIED || self.deadline <= Instant::now()) {
                    let reason = format!("{name} and {occupied} more have a test of another process");
                    return Err(self.setup_error(FINDING_ROLLBACK, reason));
                }
                occupied += 1;
                continue;
            }
            let is_refused = error.connect_error_kind().is_some_and(|kind| may_be_missing(kind, self.kind()));
            if !is_refused && error.kind() != ErrorKind::TestSetup {
                return Err(error);
            }
            if !self.environment.owner.is_open() && reservation.slots.as_ref().is_some_and(|slots| slots.len() < 2) {
                // The session of the owner needs a second slot. Both slots are acquired at once: a thread that held one
                // slot while it waited for the other could cause a deadlock.
                drop(reservation);
                reservation = self.environment.reserve(1, true, self.id, self.deadline)?;
                if number_of(&reservation) != number {
                    // The database of the new slot may exist, and the new holder of the old slot may be creating its
                    // database.
                    continue;
                }
            }
            if is_refused && self.with_owner(&mut reservation, |admin| admin.has_database(&name))? {
                // Another process may have created the database meanwhile. After the second failure the database is
                // unusable.
                if times_made > 0 {
                    return Err(self.explain_connect_error(error));
                }
                times_made += 1;
                continue;
            }
            times_made += 1;
            if times_made > MAX_TIMES_MADE {
                let reason = format!("{name} cannot be connected to: {}", phrase(&error));
                return Err(if is_refused { self.setup_error(FINDING_ROLLBACK, reason) } else { error });
            }
            let others = self.environment.known_templates.lock().iter().copied().collect();
            self.make_kept(&mut reservation, generated_name, others)?;
        }
    }

    /// Adds advice to a connect error of an enum of connections, which does not report the reason of a failed connect.
    fn explain_connect_error(&self, error: Error) -> Error {
        match error.into_details() {
            Details::Connect { kind: ConnectErrorKind::Other, message, .. }
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
            other => other.into(),
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

    /// [`open_app`](Self::open_app), if the database is complete. On PostgreSQL a database gets its name when it is
    /// complete. On MySQL and MariaDB an incomplete database contains the table [`UNFINISHED`], or nothing if its
    /// creator has not created that table yet.
    fn open_complete(&self, database: &RollbackDatabase<C>, name: &str) -> Result<App<C>> {
        let app = self.open_app(database)?;
        if self.kind() != DatabaseKind::Mysql {
            return Ok(app);
        }
        let tables = app.pool().and_then(|pool| {
            let mut pooled = pool.acquire(std::panic::Location::caller(), false, None)?;
            let query = "SELECT table_name AS value FROM information_schema.tables WHERE table_schema = DATABASE()";
            texts(pooled.conn(), query)
        });
        let complete = tables.and_then(|tables| {
            let has = |table: &str| tables.iter().any(|other| other == table);
            let migrations = self.environment.schema.steps.len();
            let problem = match (has(UNFINISHED), has("__diesel_schema_migrations")) {
                (true, _) => format!("has the table {UNFINISHED}: it was not filled to the end"),
                (false, false) if migrations > 0 => format!("has none of {migrations} migrations"),
                _ => return Ok(()),
            };
            Err(self.setup_error(FINDING_ROLLBACK, format!("{name} {problem}")))
        });
        complete.inspect_err(|_| drop(app.dispose()))?;
        Ok(app)
    }
}

impl<C: SessionConnection> RollbackDatabase<C> {
    /// The reason why the test cannot be rolled back, if it cannot.
    pub(super) fn poisoned(&self) -> Option<(String, Option<crate::error::SourceLocation>)> {
        self.pinned.poisoned().map(|poisoned| (poisoned.cause.clone(), poisoned.at))
    }

    /// Rolls the test back. Returns whether the next test can use the database. A database in memory ends with its
    /// connection.
    pub(super) fn roll_back(&self, kind: DatabaseKind) -> bool {
        self.pinned.end() && (kind != DatabaseKind::Sqlite || self.pinned.is_connected())
    }

    /// Keeps the database and its slot for the next test. If other threads wait for slots, the method closes the
    /// connection and releases the slot.
    pub(super) fn keep_for_next_test(mut self, environment: &TestEnvironment<C>, slots: Option<HeldSlots>) {
        self.slots = slots;
        if !environment.slots.as_ref().is_some_and(|slots| slots.has_waiters()) {
            environment.free_databases.lock().push(self);
        }
    }

    /// Removes the database, because it contains changes of the test. If the session of the owner is closed, it is
    /// opened with the slot of this database. Sessions that are still connected are ended: the next test must not find
    /// the changes.
    pub(super) fn remove(self, environment: &TestEnvironment<C>, reservation: &mut Reservation<C>) -> Result<()> {
        let Some(name) = self.name.clone() else { return Ok(()) };
        drop(self);
        reservation.pool_size = 0;
        environment.with_owner(reservation, OWNER_PATIENCE, |admin| {
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
