//! The guard of the application of one test.

use std::collections::HashSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::ledger::{self, LedgerEntry};
use super::provisioner::Provisioner;
use super::registrar::Registrar;
use super::test_database::TestDatabase;
use super::test_environment::{Reservation, TestEnvironment};
use super::test_setup::TestSetup;
use crate::app::App;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{Error, Result};
use crate::wording::{is_unprintable, phrase};

/// How long the end of a test waits until other threads have checked in their connections.
const PATIENCE: Duration = Duration::from_secs(2);

/// The application of one test, with a separate database. The drop of the guard removes the database, after a success,
/// a failure and a panic.
///
/// The guard derefs to the [`App`]. [`#[diesel_session::test]`](macro@crate::test) creates a guard for a test function.
/// Other test harnesses use the guard directly.
///
/// ```
/// use diesel::prelude::*;
/// use diesel_session::Database;
/// use diesel_session::testing::TestApp;
///
/// static DB: Database<SqliteConnection> = Database::without_migrations();
///
/// # let _ = || {
/// let test = TestApp::start_for(&DB)?;             // `TestSetup` has more options
/// test.context(|| {
///     let session = DB.session()?;
///     // the test
///     session.commit()
/// })?;
/// test.finish()                                    // an error if something is left
/// # };
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// [`finish`](Self::finish) returns an error if the test has left something behind. The drop of an unfinished guard
/// panics in this case, unless its thread is already panicking.
#[must_use = "a guard that is dropped ends its test"]
pub struct TestApp<C: SessionConnection> {
    app: App<C>,
    environment: Arc<TestEnvironment<C>>,
    registrar: &'static dyn Registrar<C>,
    test_database: Option<TestDatabase<C>>,
    reservation: Option<Reservation<C>>,
    id: TestAppId,
    keep: bool,
    failed: bool,
    _ledger_entry: LedgerEntry,
}

impl<C: SessionConnection> TestApp<C> {
    /// Starts a test with the default [`TestSetup`].
    ///
    /// # Errors
    /// See [`TestSetup::start`].
    #[track_caller]
    pub fn start_for<M>(database: &'static Database<C, M>) -> Result<Self>
    where
        M: MigrationSource<C::Backend> + Send + Sync + 'static,
    {
        TestSetup::of(database).start()
    }

    pub(super) fn start(setup: TestSetup<C>) -> Result<Self> {
        let id = TestAppId::reserve(setup.registrar.number(), &setup.name);
        let config = Provisioner::checked_config(&setup, &id.text)?;
        let provisioner = Provisioner::new(&setup, &config, &id.text)?;
        let (app, test_database, reservation) = provisioner.start(setup.isolation)?;
        let ledger_entry = ledger::record_start(&id.text, setup.location, &app);
        let environment = Arc::clone(&provisioner.environment);
        let started = Self {
            app,
            environment,
            registrar: setup.registrar,
            test_database: Some(test_database),
            reservation: Some(reservation),
            id,
            keep: setup.keep,
            failed: false,
            _ledger_entry: ledger_entry,
        };
        started.registrar.register(started.app.clone())?;
        Ok(started)
    }

    /// The test's application.
    pub fn app(&self) -> &App<C> {
        &self.app
    }

    /// The URL of the test's database, for programs that the test starts. The URL contains the password. With
    /// [`TestIsolation::Rollback`](super::TestIsolation::Rollback) other programs do not see the changes of the test.
    pub fn url(&self) -> &str {
        &self.app.options().config.url
    }

    /// Marks the test as failed, for [`TestSetup::keep`]. A panic marks the test without this call.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// Ends the test: removes its application, drains its pool and removes its database.
    ///
    /// # Errors
    /// [`Error::TestSpoiled`] if a test with [`TestIsolation::Rollback`](super::TestIsolation::Rollback) cannot be
    /// rolled back; [`Error::TestLeftovers`] if another thread still holds a connection, or if the database cannot be
    /// removed. The next run removes the database.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(test_database) = self.test_database.take() else { return Ok(()) };
        let mut reservation = self.reservation.take();
        let failed = self.failed || std::thread::panicking();
        self.registrar.unregister(&self.app);
        let mut left = Vec::new();
        match self.app.dispose_report_within(PATIENCE) {
            Ok(report) => left.extend(report.still_out.iter().map(|holder| format!("a connection of {holder}"))),
            Err(Error::StillInUse(report)) => {
                left.extend(report.still_out.iter().map(|holder| format!("a connection of {holder}")));
                if report.connecting > 0 {
                    left.push(format!("{} connects under way", report.connecting));
                }
            }
            Err(other) => left.push(other.to_string()),
        }
        let mut poisoned = None;
        if failed && self.keep && test_database.shown(&self.environment.target).is_none() {
            print_message(&format!(
                "test `{}` failed, and nothing of it can be kept: {}",
                self.id.text,
                match test_database {
                    TestDatabase::Rollback(_) => "it is rolled back; `TestIsolation::Database` could be kept",
                    _ => "`:memory:` is gone with its connections; the URL of a file could be kept",
                }
            ));
        }
        match test_database {
            TestDatabase::Rollback(database) => {
                poisoned = database.poisoned();
                if database.roll_back(self.environment.target.kind) {
                    let slots = reservation.as_mut().and_then(|reservation| reservation.slots.take());
                    database.keep_for_next_test(&self.environment, slots);
                } else {
                    self.remove_database(TestDatabase::Rollback(database), reservation.as_mut(), &mut left);
                }
            }
            test_database if failed && self.keep => {
                if let Some(url) = test_database.shown(&self.environment.target) {
                    print_message(&format!(
                        "test `{}` failed; its database is kept until a run that keeps nothing: {url}",
                        self.id.text
                    ));
                }
            }
            test_database if left.is_empty() => self.remove_database(test_database, reservation.as_mut(), &mut left),
            test_database => {
                left.extend(test_database.shown(&self.environment.target).map(|url| format!("its database: {url}")))
            }
        }
        drop(reservation);
        let test = format!("test `{}`", self.id.text);
        ledger::record_leftovers(&test, &left);
        match poisoned {
            Some((cause, at)) => Err(Error::TestSpoiled { app: self.id.text.clone(), cause, at }),
            None if left.is_empty() => Ok(()),
            None => Err(Error::TestLeftovers { who: test, left }),
        }
    }

    fn remove_database(
        &self,
        test_database: TestDatabase<C>,
        reservation: Option<&mut Reservation<C>>,
        left: &mut Vec<String>,
    ) {
        let shown = test_database.shown(&self.environment.target);
        if let Err(error) = test_database.remove(&self.environment, reservation) {
            left.push(format!("its database {}: {}", shown.unwrap_or_default(), phrase(error)));
        }
    }
}

impl<C: SessionConnection> Deref for TestApp<C> {
    type Target = App<C>;

    fn deref(&self) -> &App<C> {
        &self.app
    }
}

impl<C: SessionConnection> fmt::Debug for TestApp<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestApp").field("id", &self.id.text).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for TestApp<C> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            if std::thread::panicking() {
                print_message(&error.to_string());
            } else {
                panic!("{error}");
            }
        }
    }
}

/// The id of a test's application. The id is unique until it is dropped.
struct TestAppId {
    database: u64,
    text: String,
}

fn used_ids() -> std::sync::MutexGuard<'static, HashSet<(u64, String)>> {
    static IDS: OnceLock<Mutex<HashSet<(u64, String)>>> = OnceLock::new();
    IDS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestAppId {
    /// Reserves an id that begins with `name`, without the characters that an application id cannot contain. If the
    /// name is in use, the id ends with a number.
    fn reserve(database: u64, name: &str) -> Self {
        let name: String = name.chars().map(|c| if is_unprintable(c) { '?' } else { c }).collect();
        let end = name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 180).last();
        let name = match &name[..end.unwrap_or_default()] {
            "" => "test",
            name => name,
        };
        let mut ids = used_ids();
        let mut text = name.to_owned();
        for number in 2.. {
            if ids.insert((database, text.clone())) {
                break;
            }
            text = format!("{name}#{number}");
        }
        Self { database, text }
    }
}

impl Drop for TestAppId {
    fn drop(&mut self) {
        used_ids().remove(&(self.database, std::mem::take(&mut self.text)));
    }
}

/// Prints a message to the output of the test.
#[allow(clippy::print_stderr, reason = "the output of a test is standard error")]
pub(super) fn print_message(text: &str) {
    eprintln!("diesel-session: {text}");
}
