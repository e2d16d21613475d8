//! The creation of a test's database and application.

use std::fs;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection_slots::ConnectionSlots;
use super::database_properties::{DatabaseProperties, catalog_texts};
use super::database_url::with_schema;
use super::lock_file::LockFile;
use super::owner::{OwnerConnection, deadline_after};
use super::sqlite_files;
use super::test_database::{LAST_SESSIONS, TestDatabase};
use super::test_environment::{Reservation, TestEnvironment};
use super::test_isolation::TestIsolation;
use super::test_setup::TestSetup;
use crate::admin::{GeneratedName, with_database};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::dialect::NAME_PLACEHOLDER;
use crate::error::{Details, Error, Result};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::wording::{log_line, phrase};

/// The minimum time for which a test waits for a connection, also after its deadline.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// How long a test's session may be idle in a transaction before the server ends the session. The limit ends the
/// sessions of frozen processes and of lost machines, and leaves enough time for a debugger.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(4 * 3600);

/// The default number of connections of a test.
const MAX_SIZE: u32 = 4;

/// The table that marks an incomplete database on MySQL and MariaDB.
pub(super) const UNFINISHED: &str = "__diesel_session_unfinished";

/// The step that failed, for [`Provisioner::setup_error`].
pub(super) const FINDING_DATABASE: &str = "finding its database";
const MAKING_SCHEMA: &str = "making a schema";
const MAKING_FILE: &str = "making a SQLite file";
const MAKING_TEMPLATE: &str = "making a template";

/// The application, the database and the reserved connections of a started test.
pub(super) type StartedTest<C> = (App<C>, TestDatabase<C>, Reservation<C>);

/// Creates the database and the application of one test.
pub(super) struct Provisioner<'t, C: SessionConnection> {
    pub(super) environment: Arc<TestEnvironment<C>>,
    pub(super) setup: &'t TestSetup<C>,
    pub(super) config: Config,
    pub(super) id: &'t str,
    pub(super) deadline: Instant,
}

impl<'t, C: SessionConnection> Provisioner<'t, C> {
    pub(super) fn new(setup: &'t TestSetup<C>, id: &'t str) -> Result<Self> {
        let mut config = setup.config_or_default().map_err(|error| match error.into_details() {
            Details::InvalidConfig { reason, .. } => {
                let reason = format!("{reason}. A test can also be given its own, `config = ..`");
                Error::from(Details::InvalidConfig { app: id.into(), reason })
            }
            other => other.into(),
        })?;
        if let Some(reason) = config.problem() {
            return Err(Details::InvalidConfig { app: id.into(), reason }.into());
        }
        let environment = TestEnvironment::of(setup.registrar, &config)?;
        let configured = Some(config.max_size).filter(|configured| *configured != Config::MAX_SIZE);
        config.max_size = setup.max_size.or(configured).unwrap_or(MAX_SIZE).max(1);
        config.idle_in_transaction_timeout = Some(IDLE_IN_TRANSACTION);
        let this = Self { environment, setup, config, id, deadline: deadline_after(setup.patience) };
        let copies_database = this.kind() == DatabaseKind::Postgres && setup.isolation != TestIsolation::Schema;
        if setup.template.is_some() && !copies_database {
            let reason = "only PostgreSQL copies a database, and `TestIsolation::Schema` makes none: give no template";
            return Err(this.setup_error("copying its database", reason));
        }
        Ok(this)
    }

    /// How long this test may still wait for other processes.
    fn patience(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE)
    }

    /// The properties of the configured database. If they are not known, the method queries them with a connection of
    /// the test.
    fn properties(&self) -> Result<Arc<DatabaseProperties>> {
        self.environment.properties(&self.connection_setup(), &self.config)
    }

    pub(super) fn contents_hash(&self) -> Result<u64> {
        Ok(self.hash_of_contents(&*self.properties()?))
    }

    /// The statements and options that set up a new connection, as a key.
    pub(super) fn connection_setup(&self) -> String {
        let mut settings = self.kind().dialect().setup(&self.config, true, false);
        settings.extend(self.config.connection_init_sql.iter().cloned());
        settings.extend(self.config.application_name.clone());
        settings.join("\0")
    }

    /// Calls `work` with the session of the owner. See [`TestEnvironment::with_owner`].
    pub(super) fn with_owner<T>(
        &self,
        reservation: &mut Reservation<C>,
        work: impl FnOnce(&mut OwnerConnection<C>) -> Result<T>,
    ) -> Result<T> {
        self.environment.with_owner(reservation, self.patience(), work)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.environment.target.kind
    }

    pub(super) fn setup_error(&self, what: &'static str, reason: impl Into<String>) -> Error {
        Error::from(Details::TestSetup { test: self.id.into(), what, reason: reason.into() })
    }

    pub(super) fn start(&self, isolation: TestIsolation) -> Result<StartedTest<C>> {
        let started = match (isolation, self.kind()) {
            (TestIsolation::Rollback, _) => self.start_rollback(),
            (TestIsolation::Schema, DatabaseKind::Postgres) => self.start_in_schema(),
            (TestIsolation::Schema, kind) => {
                let reason = format!("{} has no schemas beside its databases; use another isolation", kind.name());
                Err(self.setup_error(MAKING_SCHEMA, reason))
            }
            (TestIsolation::Database, DatabaseKind::Sqlite) => self.start_in_file(),
            (TestIsolation::Database, _) => self.start_in_database(),
        };
        started.map_err(|error| match error.into_details() {
            // A statement of the test kit failed. Failures of migrations and fixtures have their own errors.
            Details::Query { source, .. } => self.setup_error("making its database", phrase(with_hint(&source))),
            other => other.into(),
        })
    }

    fn start_in_database(&self) -> Result<StartedTest<C>> {
        let mut reservation = self.reserve_pool()?;
        for _ in 0..2 {
            let template = match self.kind() {
                DatabaseKind::Postgres => Some(self.template(&mut reservation)?),
                DatabaseKind::Mysql | DatabaseKind::Sqlite => None,
            };
            let created = self.with_owner(&mut reservation, |admin| {
                let name = admin.new_name();
                match (self.create_database(admin, &name, template.as_deref()), &template) {
                    (Err(error), Some(template)) if !admin.has_database(template)? => {
                        log_line!(debug, "diesel_session::testing", "template {template} was removed: {error:#}");
                        Ok(None)
                    }
                    (created, _) => created.map(|()| Some(name)),
                }
            })?;
            if let Some(name) = created {
                let url = self.url_of(&name);
                return self.open(TestDatabase::Database(name), url, reservation, template.is_none());
            }
            // Another program has removed the template meanwhile.
            self.environment.known_templates.lock().clear();
        }
        let reason = "another program removes its template as soon as it is made";
        Err(self.setup_error("copying its template", reason))
    }

    fn start_in_schema(&self) -> Result<StartedTest<C>> {
        if let Some(found) = self.first_outside_reference() {
            let reason = format!("{found}, which is outside of it; use `TestIsolation::Database`");
            return Err(self.setup_error(MAKING_SCHEMA, reason));
        }
        let kind = self.kind();
        let mut reservation = self.reserve_pool()?;
        let role = self.properties()?.role.as_ref().map(|role| format!(" AUTHORIZATION {role}")).unwrap_or_default();
        let name = self.with_owner(&mut reservation, |admin| {
            let name = admin.new_name();
            match admin.execute(&format!("CREATE SCHEMA {}{role}", kind.quote(&name))) {
                Err(error) if !admin.query_bool(kind.may_create_schema_query()).unwrap_or(true) => {
                    let advice = "The role needs the right CREATE in the database of the URL";
                    Err(self.setup_error(MAKING_SCHEMA, format!("{}. {advice}", phrase(error))))
                }
                created => created.map(|()| name),
            }
        })?;
        let url = with_schema(&self.environment.target, &name);
        let url = url.map_err(|reason| self.setup_error(MAKING_SCHEMA, reason));
        self.open(TestDatabase::Schema(name), url, reservation, true)
    }

    /// The application of the test on its new database, which is filled if `is_empty`.
    fn open(
        &self,
        test_database: TestDatabase<C>,
        url: Result<String>,
        mut reservation: Reservation<C>,
        is_empty: bool,
    ) -> Result<StartedTest<C>> {
        let opened = url.and_then(|url| {
            let max_size = u32::try_from(reservation.pool_size).unwrap_or(u32::MAX);
            let config = Config { url, max_size, ..self.config.clone() };
            let app = self.environment.registrar.make(self.id.into(), config, None)?;
            if is_empty {
                self.fill(&app)?;
            }
            Ok(app)
        });
        match opened {
            Ok(app) => Ok((app, test_database, reservation)),
            Err(error) => {
                let _ = test_database.remove(&self.environment, &mut reservation);
                Err(error)
            }
        }
    }

    /// Starts a test in a copy of a template file, or in memory.
    fn start_in_file(&self) -> Result<StartedTest<C>> {
        let file_error = |reason| self.setup_error(MAKING_FILE, reason);
        let reservation = self.reserve_pool()?;
        if self.environment.target.in_memory {
            return self.open(TestDatabase::Memory, Ok(self.config.url.clone()), reservation, true);
        }
        let template = sqlite_files::template(self.contents_hash()?, self.config.wal).map_err(file_error)?;
        let path = sqlite_files::new_path().map_err(file_error)?;
        let copy = || sqlite_files::copy(&template, &path).map_err(file_error);
        if !copy()? {
            // Other tests of this process wait for the template instead of creating it too.
            let _creation = self.environment.known_templates.lock();
            if !copy()? {
                self.make_template_file(&template)?;
                if !copy()? {
                    return Err(file_error(format!("{} was removed as soon as it was made", template.display())));
                }
            }
        }
        let url = file_url(&path).map_err(file_error);
        self.open(TestDatabase::File(path), url, reservation, false)
    }

    /// Creates a template file. The file gets its final name when it is complete.
    fn make_template_file(&self, template: &Path) -> Result<()> {
        let file_error = |reason| self.setup_error(MAKING_FILE, reason);
        let path = sqlite_files::new_path().map_err(file_error)?;
        let filled = self.fill_at(&file_url(&path).map_err(file_error)?);
        // The close of the last connection reports no error if it cannot write the log into the file.
        let log_size = fs::metadata(write_ahead_log_of(&path)).map_or(0, |log| log.len());
        let outcome = filled.and_then(|()| match log_size {
            0 => sqlite_files::keep(&path, template).map_err(file_error),
            _ => Err(file_error(format!(
                "{} has {log_size} bytes of write-ahead log that did not go into the file: a program has it open, or the disk is full",
                path.display()
            ))),
        });
        if outcome.is_err() {
            // The file is useless, and the disk may be full.
            let _ = sqlite_files::remove(&path);
        }
        outcome
    }

    /// The name of the template with the contents of this test. The method creates the template if it does not exist.
    fn template(&self, reservation: &mut Reservation<C>) -> Result<String> {
        let contents_hash = self.contents_hash()?;
        let name = GeneratedName::Template { contents_hash };
        // The lock is held meanwhile, so that other tests of this process wait for the template instead of creating it
        // too.
        let mut known = self.environment.known_templates.lock();
        if !known.contains(&contents_hash) {
            self.make_kept(reservation, name, known.iter().copied().collect())?;
            known.insert(contents_hash);
        }
        Ok(name.to_string())
    }

    /// Creates a filled database that is kept under `name`, if there is no complete one. On PostgreSQL the database has a
    /// temporary name until it is complete. MySQL and MariaDB cannot rename a database: there an incomplete database has
    /// the table [`UNFINISHED`], and its creator holds the lock of its name. The databases with the hashes `in_use` are
    /// not removed, because tests of this process use them.
    pub(super) fn make_kept(
        &self,
        reservation: &mut Reservation<C>,
        name: GeneratedName,
        mut in_use: Vec<u64>,
    ) -> Result<()> {
        in_use.push(self.contents_hash()?);
        let (kind, final_name) = (self.kind(), name.to_string());
        let lock_of_name = kind.claim_pinned_connection(&final_name).filter(|_| kind == DatabaseKind::Mysql);
        let marker = format!("{}.{UNFINISHED}", kind.quote(&final_name));
        // One process of this machine creates the database, and the others wait for it.
        let _lock = self.environment.slots.as_ref().map(|slots| self.lock_template(slots, &final_name)).transpose()?;
        let created = self.with_owner(reservation, |admin| {
            let exists = admin.has_database(&final_name)?;
            match &lock_of_name {
                None if exists => return Ok(None),
                None => {
                    let name = admin.new_name();
                    return self.create_database(admin, &name, None).map(|()| Some(name));
                }
                Some(lock) if !admin.query_bool(lock)? => return Ok(None),
                Some(_) if exists => admin.execute(&kind.drop_database(&final_name))?,
                Some(_) => {}
            }
            self.create_database(admin, &final_name, None)?;
            admin.execute(&format!("CREATE TABLE {marker} (nothing INTEGER PRIMARY KEY)"))?;
            Ok(Some(final_name.clone()))
        })?;
        let Some(temporary_name) = created else { return Ok(()) };
        let filled = self.url_of(&temporary_name).and_then(|url| self.fill_at(&url));
        self.with_owner(reservation, |admin| {
            let finished = filled.and_then(|()| match lock_of_name {
                Some(_) => admin.execute(&format!("DROP TABLE {marker}")).map(|()| true),
                None => self.rename(admin, &temporary_name, name),
            });
            let outcome = match finished {
                Ok(true) => admin.prune(&in_use),
                unused => {
                    let dropped = admin.execute(&kind.drop_database(&temporary_name));
                    unused.and(dropped)
                }
            };
            if lock_of_name.is_some() {
                admin.query_texts(&format!(
                    "SELECT CAST(RELEASE_LOCK({}) AS CHAR) AS value",
                    kind.literal(&final_name)
                ))?;
            }
            outcome
        })
    }

    /// Gives a complete database its final name. Returns `false` if a process on another machine has created the database
    /// first.
    fn rename(&self, admin: &mut OwnerConnection<C>, temporary_name: &str, name: GeneratedName) -> Result<bool> {
        let (kind, final_name) = (self.kind(), name.to_string());
        if !admin.wait_until_unused(temporary_name, Instant::now() + LAST_SESSIONS)? {
            let sessions = admin.query_texts(&kind.sessions_in(temporary_name))?.join(", ");
            let reason = format!("sessions did not end in {temporary_name}: {sessions}");
            return Err(self.setup_error(MAKING_TEMPLATE, reason));
        }
        if matches!(name, GeneratedName::Template { .. }) {
            admin.execute(&kind.close_database(temporary_name))?;
        }
        match admin.execute(&kind.rename_database(temporary_name, &final_name)) {
            Err(error) if admin.has_database(&final_name)? => {
                log_line!(debug, "diesel_session::testing", "{final_name} is there already: {error:#}");
                Ok(false)
            }
            renamed => renamed.map(|()| true),
        }
    }

    /// Creates a database with the properties of the configured database: a copy of `template`, which is a template of
    /// the test kit and has settings that a copy lacks, or an unfilled database.
    pub(super) fn create_database(
        &self,
        admin: &mut OwnerConnection<C>,
        name: &str,
        template: Option<&str>,
    ) -> Result<()> {
        let (kind, properties) = (self.kind(), self.properties()?);
        let (source, options, settings) = match template {
            Some(template) => {
                let settings = kind.settings_of_database(template).map(|sql| admin.query_texts(&sql)).transpose()?;
                (Some(template), properties.options.clone(), settings.unwrap_or_default())
            }
            None => {
                let chosen = self.setup.template.as_deref();
                let locale = properties.locale.as_deref().filter(|_| chosen.is_none());
                let options = format!("{}{}", properties.options, locale.unwrap_or_default());
                (chosen.or(locale.map(|_| "template0")), options, properties.settings.clone())
            }
        };
        let sent = admin.execute(&kind.create_database(name, source, &options));
        sent.or_else(|error| self.handle_create_failure(error, admin, name, source, &options))?;
        let quoted = kind.quote(name);
        for sql in settings.iter().map(|sql| sql.replace(NAME_PLACEHOLDER, &quoted)) {
            if let Err(error) = admin.execute(&sql) {
                // The owner of the configured database may have more rights than this role.
                let error = phrase(error);
                log_line!(
                    warn,
                    "diesel_session::testing",
                    "test `{}`: its database goes without `{sql}`: {error}",
                    self.id
                );
            }
        }
        Ok(())
    }

    /// Handles the failure of a `CREATE DATABASE`. If `template1` has sessions and contains nothing that `template0`
    /// lacks, the method copies `template0` instead. Otherwise the error contains the cause.
    fn handle_create_failure(
        &self,
        error: Error,
        admin: &mut OwnerConnection<C>,
        name: &str,
        source: Option<&str>,
        options: &str,
    ) -> Result<()> {
        let (kind, source) = (self.kind(), source.unwrap_or("template1"));
        if admin.is_lost() {
            return Err(error);
        }
        let may_create = admin.query_bool(&kind.may_create_database_query(name)).unwrap_or(true);
        let sessions = match kind {
            DatabaseKind::Postgres => admin.query_texts(&kind.sessions_in(source)).unwrap_or_default().join(", "),
            DatabaseKind::Mysql | DatabaseKind::Sqlite => String::new(),
        };
        let cause = format!("{}; session {sessions} is connected to `{source}`", phrase(&error));
        let reason = if !may_create {
            format!("{}; {}", phrase(error), kind.right_to_create())
        } else if sessions.is_empty() {
            return Err(error);
        } else if source != "template1" {
            format!("{cause}: end it, or wait until it has ended")
        } else {
            match self.additions_of_template1() {
                Ok(0) => return admin.execute(&kind.create_database(name, Some("template0"), options)),
                Ok(additions) => format!(
                    "{cause}, and `template1` has {additions} objects or rights that `template0` has not: end that session, or name \
                     another database with `TestSetup::template`"
                ),
                Err(unknown) => format!("{cause}, and what it has cannot be seen: {}", phrase(unknown)),
            }
        };
        Err(self.setup_error("making a database", reason))
    }

    /// The number of objects and rights that `template1` has and `template0` lacks.
    fn additions_of_template1(&self) -> Result<u64> {
        let config = Config { max_size: 1, ..Config::new(self.url_of("template1")?) };
        let app = self.environment.registrar.make_bare(self.id.into(), config)?;
        let answer = self.catalog_texts(&app, self.kind().template_additions_query());
        drop(app.dispose());
        Ok(answer?.first().and_then(|count| count.parse().ok()).unwrap_or(u64::MAX))
    }

    /// The answer to a query of the catalog.
    pub(super) fn catalog_texts(&self, app: &App<C>, sql: &str) -> Result<Vec<String>> {
        let mut pooled = app.pool()?.acquire(Location::caller(), false, None)?;
        pooled.managed().marked_dirty = true;
        catalog_texts(pooled.conn(), self.kind(), sql)
    }

    fn lock_template(&self, slots: &ConnectionSlots, name: &str) -> Result<LockFile> {
        let template_error = |reason| self.setup_error(MAKING_TEMPLATE, reason);
        let file = slots.file(&format!("making-{name}")).map_err(|error| template_error(error.to_string()))?;
        match file.lock_until(self.deadline) {
            Ok(true) => Ok(file),
            Ok(false) => Err(template_error(
                "another process has been making it for too long. Wait for that, or raise `TestSetup::patience`".into(),
            )),
            Err(error) => Err(template_error(error.to_string())),
        }
    }

    pub(super) fn fill_at(&self, url: &str) -> Result<()> {
        let filling_app = self.filling_app(url)?;
        let filled = self.fill(&filling_app);
        let disposed = filling_app.dispose();
        filled?;
        disposed.map(drop)
    }

    /// An application that fills the database at `url`. The caller disposes of it.
    pub(super) fn filling_app(&self, url: &str) -> Result<App<C>> {
        let config = Config { url: url.into(), max_size: 2, ..self.config.clone() };
        self.environment.registrar.make(self.id.into(), config, None)
    }

    pub(super) fn url_of(&self, database: &str) -> Result<String> {
        with_database(&self.environment.target, database).map_err(|reason| self.setup_error(FINDING_DATABASE, reason))
    }

    /// Reserves the connections of the test's pool.
    fn reserve_pool(&self) -> Result<Reservation<C>> {
        self.environment.reserve(self.config.max_size as usize, true, self.id, self.deadline)
    }
}

/// The path of the write-ahead log of a SQLite file.
fn write_ahead_log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// The error of the server with its details and its hint.
fn with_hint(error: &diesel::result::Error) -> String {
    match error {
        diesel::result::Error::DatabaseError(_, information) => {
            let more = [information.details(), information.hint()];
            more.into_iter().flatten().fold(error.to_string(), |text, more| format!("{}. {more}", phrase(text)))
        }
        other => other.to_string(),
    }
}

/// The URL of a SQLite file. A path with special characters becomes a `file:` URL, in which they are encoded.
fn file_url(path: &Path) -> Result<String, String> {
    let Some(text) = path.to_str() else {
        return Err(format!("{} is not UTF-8, as a database URL has to be", path.display()));
    };
    let encoded = encode(text);
    Ok(if encoded == text { format!("sqlite://{text}") } else { format!("file:{encoded}") })
}
