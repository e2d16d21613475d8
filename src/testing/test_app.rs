//! The guard of one test's application.

use std::collections::HashSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::ledger::{self, LedgerEntry};
use super::provisioner::Provisioner;
use super::test_database::TestDatabase;
use super::test_environment::{Reservation, TestEnvironment};
use super::test_setup::TestSetup;
use crate::app::App;
use crate::connection::SessionConnection;
use crate::database::{Database, Registrar};
use crate::error::{Error, Result};
use crate::wording::{is_unprintable, phrase};

/// How long the end of a test waits for connections that other threads hold.
const PATIENCE: Duration = Duration::from_secs(2);

/// One test's application, on a database of its own, which is gone when this guard is: on success, failure and panic alike.
///
/// It derefs to the [`App`]. [`#[diesel_session::test]`](macro@crate::test) makes one around a function; this is for everything
/// else.
///
/// ```
/// use diesel::prelude::*;
/// use diesel_session::Database;
/// use diesel_session::testing::TestApp;
///
/// static DB: Database<SqliteConnection> = Database::without_migrations();
///
/// # let _ = || {
/// let test = TestApp::start_for(&DB)?;             // `TestSetup` has more to choose
/// test.context(|| {
///     let session = DB.session()?;
///     // what the test does
///     session.commit()
/// })?;
/// test.finish()                                    // an error where something is left
/// # };
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// [`finish`](Self::finish) tells what the test has left behind. A guard that is dropped panics then, unless its thread panics already.
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
    /// An application with the default [`TestSetup`].
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

    /// The URL of the test's database, for programs that the test starts. It contains the password. In
    /// [`TestIsolation::Rollback`](super::TestIsolation::Rollback) other programs find the database there without what the test has done.
    pub fn url(&self) -> &str {
        &self.app.options().config.url
    }

    /// Says that the test has failed, for [`TestSetup::keep`]. A panic is noticed without it.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// Ends the test: its application is removed, its pool is drained, its database is gone.
    ///
    /// # Errors
    /// [`Error::TestSpoiled`] where a test that was to be rolled back could not be; [`Error::TestLeftovers`] where another thread still
    /// holds a connection, or the database could not be removed. What is left is removed by the next run.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(test_database) = self.test_database.take() else { return Ok(()) };
        let mut reservation = self.reservation.take();
        let failed = self.failed || std::thread::panicking();
        self.registrar.unregister(&self.app);
        let mut left = Vec::new();
        match self.app.dispose_within(PATIENCE) {
            Ok(report) => left.extend(report.still_out.iter().map(|holder| format!("a connection of {holder}"))),
            Err(Error::StillInUse(report)) => {
                left.extend(report.still_out.iter().map(|holder| format!("a connection of {holder}")));
                if report.connecting > 0 {
                    left.push(format!("{} connects under way", report.connecting));
                }
            }
            Err(other) => left.push(other.to_string()),
        }
        let mut invalidated = None;
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
            TestDatabase::Rollback(pinned) => {
                invalidated = pinned.poisoned();
                if pinned.roll_back(self.environment.target.kind) {
                    let taken = reservation.as_mut().and_then(|reservation| reservation.taken.take());
                    pinned.keep_for_next_test(&self.environment, taken);
                } else {
                    self.remove_database(TestDatabase::Rollback(pinned), reservation.as_mut(), &mut left);
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
        match invalidated {
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

/// An application id that nobody else has, as long as it lives.
struct TestAppId {
    database: u64,
    text: String,
}

fn used_ids() -> std::sync::MutexGuard<'static, HashSet<(u64, String)>> {
    static IDS: OnceLock<Mutex<HashSet<(u64, String)>>> = OnceLock::new();
    IDS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestAppId {
    /// What an application id takes; a name that is in use gets a number.
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

/// Tells whoever runs the tests, in the test's own output.
#[allow(clippy::print_stderr, reason = "what a test has to say")]
pub(super) fn print_message(text: &str) {
    eprintln!("diesel-session: {text}");
}
