//! What a test asks for.

use std::borrow::Cow;
use std::fmt;
use std::panic::Location;
use std::time::Duration;

use diesel::migration::MigrationSource;

use super::fixture::Fixture;
use super::test_app::TestApp;
use super::test_isolation::TestIsolation;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::database::{Database, Registrar};
use crate::error::{Place, Result};
use crate::kind::DatabaseKind;

/// A switch that keeps the databases of failing tests; see [`TestSetup::keep`].
const KEEP: &str = "DIESEL_SESSION_KEEP";

/// What a test asks for; [`start`](Self::start) makes it.
///
/// | choice | default |
/// |---|---|
/// | [`named`](Self::named) | the place at which [`of`](Self::of) was called |
/// | [`config`](Self::config) | the URL in `DATABASE_URL`; `:memory:` for a `Database<SqliteConnection>` without that |
/// | [`isolation`](Self::isolation) | [`TestIsolation::Database`] |
/// | [`max_size`](Self::max_size) | that of the `Config` where it says another than its default, else 4 connections |
/// | [`fixture`](Self::fixture) | none |
/// | [`patience`](Self::patience) | 120 s |
/// | [`keep`](Self::keep) | off, unless `DIESEL_SESSION_KEEP` is set |
/// | [`warn_repeats`](Self::warn_repeats) | off |
/// | [`template`](Self::template) | none: on PostgreSQL `template1` |
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
    pub(super) location: Place,
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
    /// A test of the programs that use `database`.
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

    /// What the test is called; its application's id begins with it.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Where the server is, and the options of the test's application. The database that the URL names is connected to, and on
    /// PostgreSQL a [`TestIsolation::Schema`] is made in it; nothing in it is touched.
    pub fn config(mut self, config: Config) -> Self {
        self.config = Some(config);
        self
    }

    /// How the test is kept apart from others.
    pub fn isolation(mut self, isolation: TestIsolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Most connections of the test's application, at least 1. So many are reserved before the test begins, of what the server has for all test
    /// processes of this machine. In [`TestIsolation::Rollback`] there is one whatever is said here.
    pub fn max_size(mut self, connections: u32) -> Self {
        self.max_size = Some(connections);
        self
    }

    /// Rows that are there when the test begins. May be called several times; they are made in that order.
    pub fn fixture(mut self, fixture: Fixture<C>) -> Self {
        self.fixtures.push(fixture);
        self
    }

    /// How long the test waits for others: for the server's connections, of which all processes of this machine have a part, and for
    /// databases that they are making. `Duration::ZERO` tries once.
    pub fn patience(mut self, longest: Duration) -> Self {
        self.patience = longest;
        self
    }

    /// Whether a test that fails leaves its database behind, and says where it is. The environment variable `DIESEL_SESSION_KEEP`, set
    /// to anything but `0`, does it for all tests. What was kept goes with the next run that keeps nothing. Of a test that is
    /// rolled back nothing can be kept.
    pub fn keep(mut self, on: bool) -> Self {
        self.keep = on;
        self
    }

    /// Warns on standard error where one statement of the test's own thread is sent more than `times` times, with the place: most often a
    /// query in a loop over the rows of another.
    pub fn warn_repeats(mut self, times: usize) -> Self {
        self.warn_repeats = Some(times);
        self
    }

    /// The PostgreSQL database from which the test's databases are copied before the migrations run, for what only an administrator can
    /// install, such as some extensions. The role needs to own it, or it is marked as a template (`ALTER DATABASE .. IS_TEMPLATE true`),
    /// and nobody may be connected to it. [`TestIsolation::Schema`] copies nothing.
    pub fn template(mut self, database: impl Into<Cow<'static, str>>) -> Self {
        self.template = Some(database.into());
        self
    }

    /// Makes the test's application and database.
    ///
    /// # Errors
    /// [`Error::TestSetup`](crate::Error::TestSetup), with what could not be done and why; [`Error::InvalidConfig`](crate::Error::InvalidConfig);
    /// those of [`App::create_all`](crate::App::create_all); what can go wrong with getting a connection.
    pub fn start(self) -> Result<TestApp<C>> {
        TestApp::start(self)
    }

    /// The configuration, or where it comes from when nothing was said.
    pub(super) fn config_or_default(&self) -> Result<Config> {
        const VARIABLE: &str = "DATABASE_URL";
        match &self.config {
            Some(config) => Ok(config.clone()),
            None if DatabaseKind::of_type::<C>() == Some(DatabaseKind::Sqlite)
                && std::env::var_os(VARIABLE).is_none() =>
            {
                Ok(Config::new(":memory:"))
            }
            None => Config::from_env(VARIABLE),
        }
    }
}

/// Whether the databases of failing tests are kept.
pub(super) fn keep_is_requested() -> bool {
    std::env::var_os(KEEP).is_some_and(|value| value != "0" && !value.is_empty())
}

impl<C: SessionConnection> fmt::Debug for TestSetup<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestSetup")
            .field("name", &self.name)
            .field("isolation", &self.isolation)
            .finish_non_exhaustive()
    }
}
