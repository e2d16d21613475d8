//! The guard of the application of one test.

use std::fmt;
use std::ops::Deref;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::ledger::LedgerEntry;
use super::provisioner::Provisioner;
use super::test_database::TestDatabase;
use super::test_environment::{Reservation, TestEnvironment};
use super::test_setup::TestSetup;
use crate::app::App;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{Details, DisposeReport, Result};
use crate::wording::phrase;

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
    /// `None` after the end of the test.
    running: Option<(TestDatabase<C>, Reservation<C>)>,
    keep: bool,
    failed: bool,
    ledger_entry: LedgerEntry,
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
        let ledger_entry = LedgerEntry::new(setup.registrar.number(), &setup.name);
        let provisioner = Provisioner::new(&setup, &ledger_entry.id)?;
        let (app, test_database, reservation) = provisioner.start(setup.isolation)?;
        let environment = provisioner.environment;
        ledger_entry.set_app(&app, setup.location);
        let started = Self {
            app,
            environment,
            running: Some((test_database, reservation)),
            keep: setup.keep,
            failed: false,
            ledger_entry,
        };
        setup.registrar.register(started.app.clone())?;
        Ok(started)
    }

    /// The test's application.
    pub fn app(&self) -> &App<C> {
        &self.app
    }

    /// [`App::context`], without the warning of uncommitted changes: a test may leave them on purpose.
    ///
    /// # Errors
    /// Those of `body`.
    #[track_caller]
    pub fn context<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.enter(body)
    }

    /// [`App::enter`], without the warning of uncommitted changes: a test may leave them on purpose.
    #[track_caller]
    pub fn enter<R>(&self, body: impl FnOnce() -> R) -> R {
        self.app.enter_and_discard(Location::caller(), body)
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
    /// [`ErrorKind::TestInvalidated`](crate::ErrorKind::TestInvalidated) if a test with
    /// [`TestIsolation::Rollback`](super::TestIsolation::Rollback) cannot be rolled back;
    /// [`ErrorKind::TestLeftovers`](crate::ErrorKind::TestLeftovers) if another thread still holds a connection, or if
    /// the database cannot be removed. The next run removes the database.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some((test_database, mut reservation)) = self.running.take() else { return Ok(()) };
        let failed = self.failed || std::thread::panicking();
        self.environment.registrar.unregister(&self.app);
        let (id, target) = (&self.ledger_entry.id, &self.environment.target);
        let mut left = match self.app.dispose_report_within(PATIENCE) {
            Ok(report) => leftovers(&report),
            Err(error) => error.dispose_report().map_or_else(|| vec![format!("{error:#}")], leftovers),
        };
        let shown = test_database.shown(target);
        let mut poisoned = None;
        if failed && self.keep {
            let end = match (&shown, &test_database) {
                (Some(url), _) => format!("; its database is kept until a run that keeps nothing: {url}"),
                (None, TestDatabase::Rollback(_)) => {
                    ", and nothing of it can be kept: it is rolled back; `TestIsolation::Database` could be kept".into()
                }
                (None, _) => ", and nothing of it can be kept: `:memory:` is gone with its connections; the URL of a file could be kept"
                    .into(),
            };
            print_message(&format!("test `{id}` failed{end}"));
        }
        let to_remove = match test_database {
            TestDatabase::Rollback(database) => {
                poisoned = database.poisoned();
                if database.roll_back(target.kind) {
                    database.keep_for_next_test(&self.environment, reservation.slots.take());
                    None
                } else {
                    Some(TestDatabase::Rollback(database))
                }
            }
            _ if failed && self.keep => None,
            test_database if left.is_empty() => Some(test_database),
            _ => {
                left.extend(shown.iter().map(|url| format!("its database: {url}")));
                None
            }
        };
        if let Some(Err(error)) = to_remove.map(|database| database.remove(&self.environment, &mut reservation)) {
            left.push(format!("its database {}: {}", shown.unwrap_or_default(), phrase(error)));
        }
        drop(reservation);
        self.ledger_entry.record_leftovers(&left);
        match poisoned {
            Some((cause, at)) => Err(Details::TestInvalidated { app: id.clone(), cause, at }.into()),
            None if left.is_empty() => Ok(()),
            None => Err(Details::TestLeftovers { who: format!("test `{id}`"), left }.into()),
        }
    }
}

/// The connections that remain of a disposed application.
fn leftovers(report: &DisposeReport) -> Vec<String> {
    let mut left: Vec<String> = report.still_out.iter().map(|holder| format!("a connection of {holder}")).collect();
    if report.connecting > 0 {
        left.push(format!("{} connects under way", report.connecting));
    }
    left
}

impl<C: SessionConnection> Deref for TestApp<C> {
    type Target = App<C>;

    fn deref(&self) -> &App<C> {
        &self.app
    }
}

impl<C: SessionConnection> fmt::Debug for TestApp<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestApp").field("id", &self.ledger_entry.id).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Drop for TestApp<C> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            if std::thread::panicking() {
                print_message(&format!("{error:#}"));
            } else {
                panic!("{error:#}");
            }
        }
    }
}

/// Prints a message to the output of the test.
#[allow(clippy::print_stderr, reason = "the output of a test is standard error")]
pub(super) fn print_message(text: &str) {
    eprintln!("diesel-session: {text}");
}
