//! The options of a test.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::fixture::Fixture;
use super::registrar::Registrar;
use super::test_app::TestApp;
use super::test_isolation::TestIsolation;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::Database;
use crate::error::{Result, SourceLocation};
use crate::kind::DatabaseKind;

/// The environment variable that keeps the databases of failed tests; see [`TestSetup::keep`].
const KEEP_VARIABLE: &str = "DIESEL_SESSION_KEEP";

/// The options of a test. [`start`](Self::start) creates the test's application and database.
///
/// | option | default |
/// |---|---|
/// | [`named`](Self::named) | the source location at which [`of`](Self::of) is called |
/// | [`config`](Self::config) | the URL in `DATABASE_URL`; `:memory:` for a `Database<SqliteConnection>` without that |
/// | [`isolation`](Self::isolation) | [`TestIsolation::Database`] |
/// | [`max_size`](Self::max_size) | the value in the `Config` if it differs from the default there, otherwise 4 connections |
/// | [`fixture`](Self::fixture) | none |
/// | [`patience`](Self::patience) | 120 s |
/// | [`keep`](Self::keep) | off, unless `DIESEL_SESSION_KEEP` is set |
/// | [`warn_repeats`](Self::warn_repeats) | off |
/// | [`template`](Self::template) | none: PostgreSQL copies `template1` |
///
/// ```
/// use diesel::prelude::*;
/// use diesel_session::Database;
/// use diesel_session::testing::{TestIsolation, TestSetup};
///
/// static DB: Database<SqliteConnection> = Database::without_migrations();
///
/// # let _ = || {
/// let test = TestSetup::of(&DB).isolation(TestIsolation::Rollback).start()?;
/// let answer: i32 = test.context(|| {
///     DB.session()?.get_result(diesel::select(diesel::dsl::sql::<diesel::sql_types::Integer>("42")))
/// })?;
/// assert_eq!(answer, 42);
/// test.finish()
/// # };
/// # Ok::<(), diesel_session::Error>(())
/// ```
#[must_use = "a setup does nothing until `start` is called"]
pub struct TestSetup<C: SessionConnection> {
    pub(super) registrar: &'static dyn Registrar<C>,
    pub(super) name: Cow<'static, str>,
    pub(super) location: SourceLocation,
    pub(super) config: Option<Config>,
    pub(super) isolation: TestIsolation,
    pub(super) max_size: Option<u32>,
    pub(super) fixtures: Vec<Fixture<C>>,
    pub(super) patience: Duration,
    pub(super) keep: bool,
    pub(super) warn_repeats: Option<usize>,
    pub(super) template: Option<Cow<'static, str>>,
}

impl<C: SessionConnection> TestSetup<C> {
    /// The default options of a test for programs that use `database`.
    #[track_caller]
    pub fn of<M>(database: &'static Database<C, M>) -> Self
    where
        M: MigrationSource<C::Backend> + Send + Sync + 'static,
    {
        let location = Location::caller();
        Self {
            registrar: database,
            name: format!("{}:{}", location.file(), location.line()).into(),
            location,
            config: None,
            isolation: TestIsolation::default(),
            max_size: None,
            fixtures: Vec::new(),
            patience: Duration::from_secs(120),
            keep: keep_is_requested(),
            warn_repeats: None,
            template: None,
        }
    }

    /// The name of the test. The id of its application begins with this name.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// The URL of the server, and the options of the test's application. The test kit connects to the database in the
    /// URL but changes nothing in it, except that [`TestIsolation::Schema`] creates a schema there on PostgreSQL.
    pub fn config(mut self, config: Config) -> Self {
        self.config = Some(config);
        self
    }

    /// How the test is isolated from other tests.
    pub fn isolation(mut self, isolation: TestIsolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// The maximum number of connections of the test's application, at least 1. The test reserves this number before it
    /// begins, from the connections that the server has for all test processes of this machine.
    /// [`TestIsolation::Rollback`] always uses one connection.
    pub fn max_size(mut self, connections: u32) -> Self {
        self.max_size = Some(connections);
        self
    }

    /// Rows that exist when the test begins. The method may be called several times; the fixtures run in the order of
    /// the calls.
    pub fn fixture(mut self, fixture: Fixture<C>) -> Self {
        self.fixtures.push(fixture);
        self
    }

    /// How long the test waits for connections of the server, which all test processes of this machine share, and for
    /// templates that other processes are creating. `Duration::ZERO` allows one attempt.
    pub fn patience(mut self, longest: Duration) -> Self {
        self.patience = longest;
        self
    }

    /// Whether a failed test keeps its database and prints its URL. The environment variable `DIESEL_SESSION_KEEP`, set
    /// to any value except `0` and the empty text, has this effect for all tests. The next run without the variable
    /// removes the kept databases. The changes of a test that is rolled back cannot be kept.
    pub fn keep(mut self, on: bool) -> Self {
        self.keep = on;
        self
    }

    /// Warns on standard error about each statement that the thread of the test sends more than `times` times. Such a
    /// statement is usually a query in a loop over the rows of another query.
    pub fn warn_repeats(mut self, times: usize) -> Self {
        self.warn_repeats = Some(times);
        self
    }

    /// The PostgreSQL database that is copied before the migrations run. It can contain objects that only an
    /// administrator can install, such as some extensions. The role has to own the database, or the database has to be
    /// marked as a template (`ALTER DATABASE .. IS_TEMPLATE true`), and it must have no sessions.
    /// [`TestIsolation::Schema`] does not copy a database.
    pub fn template(mut self, database: impl Into<Cow<'static, str>>) -> Self {
        self.template = Some(database.into());
        self
    }

    /// Creates the test's application and database.
    ///
    /// # Errors
    /// [`ErrorKind::TestSetup`](crate::ErrorKind::TestSetup), with the step that failed and the reason;
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig); the errors of
    /// [`App::create_all`](crate::App::create_all); the errors of getting a connection.
    pub fn start(self) -> Result<TestApp<C>> {
        TestApp::start(self)
    }

    /// The given configuration, or the default one.
    pub(super) fn config_or_default(&self) -> Result<Config> {
        const VARIABLE: &str = "DATABASE_URL";
        match &self.config {
            Some(config) => config.clone().for_tests(),
            None if DatabaseKind::of_type::<C>() == Some(DatabaseKind::Sqlite)
                && std::env::var_os(VARIABLE).is_none() =>
            {
                Ok(Config::new(":memory:"))
            }
            None => Config::from_env(VARIABLE),
        }
    }
}

/// Whether the environment variable keeps the databases of failed tests.
pub(super) fn keep_is_requested() -> bool {
    std::env::var_os(KEEP_VARIABLE).is_some_and(|value| value != "0" && !value.is_empty())
}

impl<C: SessionConnection> fmt::Debug for TestSetup<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestSetup")
            .field("name", &self.name)
            .field("isolation", &self.isolation)
            .finish_non_exhaustive()
    }
}
