//! The guard of one test's application.

use std::collections::HashSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::environment::{Admission, TestEnvironment};
use super::ledger::{self, TrackedRow};
use super::registrar::Registrar;
use super::setup::TestSetup;
use super::test_database::{Provisioner, TestDatabase};
use crate::app::App;
use crate::connection::SessionConnection;
use crate::database::Database;
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
    database_of_test: Option<TestDatabase<C>>,
    admission: Option<Admission<C>>,
    id: Id,
    keep: bool,
    failed: bool,
    _entry: TrackedRow,
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
        let id = Id::take(setup.registrar.number(), &setup.name);
        let config = Provisioner::configured(&setup, &id.text)?;
        let provisioner = Provisioner::new(&setup, &config, &id.text)?;
        let (app, database_of_test, admission) = provisioner.start(setup.isolation)?;
        let entry = ledger::enter(&id.text, setup.place, &app);
        let environment = Arc::clone(&provisioner.environment);
        let started = Self {
            app,
            environment,
            registrar: setup.registrar,
            database_of_test: Some(database_of_test),
            admission: Some(admission),
            id,
            keep: setup.keep,
            failed: false,
            _entry: entry,
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
        let Some(database_of_test) = self.database_of_test.take() else { return Ok(()) };
        let mut admission = self.admission.take();
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
        let mut invalidated = None;
        if failed && self.keep && database_of_test.shown(&self.environment.target).is_none() {
            say(&format!(
                "test `{}` failed, and nothing of it can be kept: {}",
                self.id.text,
                match database_of_test {
                    TestDatabase::PinnedConnection(_) => "it is rolled back; `TestIsolation::Database` could be kept",
                    _ => "`:memory:` is gone with its connections; the URL of a file could be kept",
                }
            ));
        }
        match database_of_test {
            TestDatabase::PinnedConnection(pinned) => {
                invalidated = pinned.poisoned();
                if pinned.end(self.environment.target.kind) {
                    let taken = admission.as_mut().and_then(|admission| admission.taken.take());
                    pinned.keep(&self.environment, taken);
                } else {
                    self.removed(TestDatabase::PinnedConnection(pinned), admission.as_mut(), &mut left);
                }
            }
            database_of_test if failed && self.keep => {
                if let Some(url) = database_of_test.shown(&self.environment.target) {
                    say(&format!(
                        "test `{}` failed; its database is kept until a run that keeps nothing: {url}",
                        self.id.text
                    ));
                }
            }
            database_of_test if left.is_empty() => self.removed(database_of_test, admission.as_mut(), &mut left),
            database_of_test => {
                left.extend(database_of_test.shown(&self.environment.target).map(|url| format!("its database: {url}")))
            }
        }
        drop(admission);
        let who = format!("test `{}`", self.id.text);
        ledger::note(&who, &left);
        match invalidated {
            Some((cause, at)) => Err(Error::TestSpoiled { app: self.id.text.clone(), cause, at }),
            None if left.is_empty() => Ok(()),
            None => Err(Error::TestLeftovers { who, left }),
        }
    }

    fn removed(&self, database_of_test: TestDatabase<C>, admission: Option<&mut Admission<C>>, left: &mut Vec<String>) {
        let shown = database_of_test.shown(&self.environment.target);
        if let Err(error) = database_of_test.remove(&self.environment, admission) {
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
                say(&error.to_string());
            } else {
                panic!("{error}");
            }
        }
    }
}

/// An application id that nobody else has, as long as it lives.
struct Id {
    database: u64,
    text: String,
}

fn ids() -> std::sync::MutexGuard<'static, HashSet<(u64, String)>> {
    static IDS: OnceLock<Mutex<HashSet<(u64, String)>>> = OnceLock::new();
    IDS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Id {
    /// What an application id takes; a name that is in use gets a number.
    fn take(database: u64, name: &str) -> Self {
        let name: String = name.chars().map(|c| if is_unprintable(c) { '?' } else { c }).collect();
        let end = name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= 180).last();
        let name = match &name[..end.unwrap_or_default()] {
            "" => "test",
            name => name,
        };
        let mut ids = ids();
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

impl Drop for Id {
    fn drop(&mut self) {
        ids().remove(&(self.database, std::mem::take(&mut self.text)));
    }
}

/// Tells whoever runs the tests, in the test's own output.
#[allow(clippy::print_stderr, reason = "what a test has to say")]
pub(super) fn say(text: &str) {
    eprintln!("diesel-session: {text}");
}
