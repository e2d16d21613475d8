//! The creation of a test's database and application.

use std::fs;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::connection_slots::ConnectionSlots;
use super::database_properties::{DatabaseProperties, for_database};
use super::database_url::{with_database, with_schema};
use super::generated_name::GeneratedName;
use super::lock_file::LockFile;
use super::owner::{AdminConnection, deadline_after};
use super::template_contents::TemplateContents;
use super::test_database::{LAST_SESSIONS, TestDatabase};
use super::test_environment::{Reservation, TestEnvironment};
use super::test_isolation::TestIsolation;
use super::test_setup::TestSetup;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::wording::phrase;

/// The minimum time for which a test waits for a connection, also after its deadline.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// How long a test's session may be idle in a transaction before the server ends the session. The limit ends the
/// sessions of frozen processes and of lost machines, and leaves enough time for a debugger.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(4 * 3600);

/// The default number of connections of a test.
const MAX_SIZE: u32 = 4;

/// The step that failed, for [`Provisioner::setup_error`].
pub(super) const FINDING_DATABASE: &str = "finding its database";

/// The application, the database and the reserved connections of a started test.
pub(super) type StartedTest<C> = (App<C>, TestDatabase<C>, Reservation<C>);

/// Creates the database and the application of one test.
pub(super) struct Provisioner<'t, C: SessionConnection> {
    pub(super) environment: Arc<TestEnvironment<C>>,
    pub(super) contents: TemplateContents<'t, C>,
    pub(super) config: Config,
    pub(super) id: &'t str,
    pub(super) deadline: Instant,
    properties: OnceLock<Arc<DatabaseProperties>>,
    template: Option<&'t str>,
}

impl<'t, C: SessionConnection> Provisioner<'t, C> {
    pub(super) fn new(setup: &'t TestSetup<C>, config: &'t Config, id: &'t str) -> Result<Self> {
        let environment = TestEnvironment::of(setup.registrar, config)?;
        let contents = TemplateContents::new(environment.schema()?, setup, config, &environment.target);
        let configured = Some(config.max_size).filter(|configured| *configured != Config::MAX_SIZE);
        let connections = setup.max_size.or(configured).unwrap_or(MAX_SIZE).max(1);
        let mut config = config.clone().max_size(connections);
        config.idle_in_transaction_timeout = Some(IDLE_IN_TRANSACTION);
        let template = setup.template.as_deref();
        if template.is_some()
            && (environment.target.kind != DatabaseKind::Postgres || setup.isolation == TestIsolation::Schema)
        {
            let reason = "only PostgreSQL copies a database, and `TestIsolation::Schema` makes none: give no template";
            return Err(Error::TestSetup { test: id.into(), what: "copying its database", reason: reason.into() });
        }
        let deadline = deadline_after(setup.patience);
        Ok(Self { environment, contents, config, id, deadline, properties: OnceLock::new(), template })
    }

    /// The configuration of a test, if it is valid.
    pub(super) fn checked_config(setup: &TestSetup<C>, id: &str) -> Result<Config> {
        let config = setup.config_or_default().map_err(|error| match error {
            Error::InvalidConfig { reason, .. } => {
                let reason = format!("{reason}. A test can also be given its own, `config = ..`");
                Error::InvalidConfig { app: id.into(), reason }
            }
            other => other,
        })?;
        match config.problem() {
            Some(problem) => Err(Error::InvalidConfig { app: id.into(), reason: problem }),
            None => Ok(config),
        }
    }

    /// How long this test may still wait for other processes.
    pub(super) fn patience(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE)
    }

    /// The properties of the configured database. If they are not known, the method queries them with a connection of
    /// the test.
    pub(super) fn properties(&self) -> Result<&DatabaseProperties> {
        if let Some(known) = self.properties.get() {
            return Ok(known);
        }
        let found = self.environment.properties(&self.connection_setup(), &self.config)?;
        Ok(self.properties.get_or_init(|| found))
    }

    /// The hash of the contents of this test, if the properties of the configured database are known without a query.
    pub(super) fn known_contents_hash(&self) -> Option<u64> {
        let known = self.environment.known_properties(&self.connection_setup())?;
        Some(self.contents.hash(self.properties.get_or_init(|| known)))
    }

    pub(super) fn contents_hash(&self) -> Result<u64> {
        Ok(self.contents.hash(self.properties()?))
    }

    /// Calls `work` with the session of the owner. See [`TestEnvironment::with_owner`].
    pub(super) fn with_owner<T>(
        &self,
        reservation: &mut Reservation<C>,
        keep: usize,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        self.environment.with_owner(reservation, keep, self.patience(), work)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.environment.target.kind
    }

    pub(super) fn setup_error(&self, what: &'static str, reason: impl Into<String>) -> Error {
        Error::TestSetup { test: self.id.into(), what, reason: reason.into() }
    }

    pub(super) fn start(&self, isolation: TestIsolation) -> Result<StartedTest<C>> {
        self.start_isolated(isolation).map_err(|error| match error {
            // A statement of the test kit failed. Failures of migrations and fixtures have their own errors.
            Error::Query { source, .. } => self.setup_error("making its database", phrase(with_hint(&source))),
            other => other,
        })
    }

    fn start_isolated(&self, isolation: TestIsolation) -> Result<StartedTest<C>> {
        match (isolation, self.kind()) {
            (TestIsolation::Rollback, _) => self.start_rollback(),
            (TestIsolation::Schema, DatabaseKind::Postgres) => self.start_in_schema(),
            (TestIsolation::Schema, kind) => {
                let reason = format!("{} has no schemas beside its databases; use another isolation", kind.name());
                Err(self.setup_error("making a schema", reason))
            }
            (TestIsolation::Database, DatabaseKind::Sqlite) if self.environment.target.in_memory => {
                self.start_in_private_memory()
            }
            (TestIsolation::Database, DatabaseKind::Sqlite) => self.start_in_file(),
            (TestIsolation::Database, _) => self.start_in_database(),
        }
    }

    fn start_in_database(&self) -> Result<StartedTest<C>> {
        let kind = self.kind();
        let (mut reservation, connections) = self.reserve_pool()?;
        self.properties()?;
        let mut template = match kind {
            DatabaseKind::Postgres => Some(self.template(&mut reservation)?),
            DatabaseKind::Mysql | DatabaseKind::Sqlite => None,
        };
        let create = |reservation: &mut Reservation<C>, template: Option<&(String, Vec<String>)>| {
            self.with_owner(reservation, connections, |admin| {
                let name = admin.new_name().to_string();
                let created = self.create_database(admin, &name, template);
                if let (Err(error), Some((template, _))) = (&created, template)
                    && !admin.query_texts(&kind.databases(template))?.contains(template)
                {
                    crate::wording::log_line!(
                        debug,
                        "diesel_session::testing",
                        "template {template} was removed: {error}"
                    );
                    return Ok(None);
                }
                created.map(|()| Some(name))
            })
        };
        let mut name = create(&mut reservation, template.as_ref())?;
        if name.is_none() {
            // Another program has removed the template meanwhile.
            self.known_templates().clear();
            template = Some(self.template(&mut reservation)?);
            name = create(&mut reservation, template.as_ref())?;
        }
        let Some(name) = name else {
            let reason = "another program removes its template as soon as it is made";
            return Err(self.setup_error("copying its template", reason));
        };
        let make = || {
            let url = self.url_of(&name)?;
            let app = self.app(url, connections)?;
            if template.is_none() {
                self.fill(&app)?;
            }
            Ok(app)
        };
        match make() {
            Ok(app) => Ok((app, TestDatabase::Database(name), reservation)),
            Err(error) => {
                let _ = TestDatabase::<C>::Database(name).remove(&self.environment, Some(&mut reservation));
                Err(error)
            }
        }
    }

    fn start_in_schema(&self) -> Result<StartedTest<C>> {
        if let Some(found) = self.contents.first_outside_reference() {
            let reason = format!("{found}, which is outside of it; use `TestIsolation::Database`");
            return Err(self.setup_error("making a schema", reason));
        }
        let kind = self.kind();
        let (mut reservation, connections) = self.reserve_pool()?;
        let role = self.properties()?.role.as_deref();
        let role = role.map(|role| format!(" AUTHORIZATION {role}")).unwrap_or_default();
        let name = self.with_owner(&mut reservation, connections, |admin| {
            let name = admin.new_name().to_string();
            let created = admin.execute(&format!("CREATE SCHEMA {}{role}", kind.quote(&name)));
            match created {
                Err(error) if !admin.query_bool(kind.may_create_schema_query()).unwrap_or(true) => {
                    let advice = "The role needs the right CREATE in the database of the URL";
                    Err(self.setup_error("making a schema", format!("{}. {advice}", phrase(error))))
                }
                created => created.map(|()| name),
            }
        })?;
        let make = || {
            let url = with_schema(&self.environment.target, &name)
                .map_err(|reason| self.setup_error("making a schema", reason))?;
            let app = self.app(url, connections)?;
            self.fill(&app)?;
            Ok(app)
        };
        match make() {
            Ok(app) => Ok((app, TestDatabase::Schema(name), reservation)),
            Err(error) => {
                let _ = TestDatabase::<C>::Schema(name).remove(&self.environment, Some(&mut reservation));
                Err(error)
            }
        }
    }

    fn start_in_private_memory(&self) -> Result<StartedTest<C>> {
        let reservation = self.environment.reserve(0, false, self.id, self.deadline)?;
        let app = self.app(self.config.url.clone(), self.config.max_size as usize)?;
        self.fill(&app)?;
        Ok((app, TestDatabase::Memory, reservation))
    }

    fn start_in_file(&self) -> Result<StartedTest<C>> {
        let file_error = |reason| self.setup_error("making a SQLite file", reason);
        let reservation = self.environment.reserve(0, false, self.id, self.deadline)?;
        let files = &self.environment.files;
        let template = files.template(self.contents_hash()?, self.config.wal).map_err(file_error)?;
        let path = files.new_path().map_err(file_error)?;
        let mut is_copied = files.copy(&template, &path).map_err(file_error)?;
        if !is_copied {
            let _creation = files.template_creation.lock().unwrap_or_else(PoisonError::into_inner);
            is_copied = files.copy(&template, &path).map_err(file_error)?;
            if !is_copied {
                self.make_template_file(&template)?;
                is_copied = files.copy(&template, &path).map_err(file_error)?;
            }
        }
        if !is_copied {
            return Err(file_error(format!("{} was removed as soon as it was made", template.display())));
        }
        let app = self.app(file_url(&path).map_err(file_error)?, self.config.max_size as usize)?;
        Ok((app, TestDatabase::File(path), reservation))
    }

    /// Creates a template file. The file gets its final name when it is complete.
    fn make_template_file(&self, template: &Path) -> Result<()> {
        let file_error = |reason| self.setup_error("making a SQLite file", reason);
        let files = &self.environment.files;
        let path = files.new_path().map_err(file_error)?;
        let filling_app = self.filling_app(&file_url(&path).map_err(file_error)?)?;
        let filled = self.fill(&filling_app).and_then(|()| {
            // The close of the last connection would also write the log into the file, but it would not report an
            // error.
            let mut pooled = filling_app.pool()?.acquire(Location::caller(), false, None)?;
            let truncated = pooled.conn().batch_execute("PRAGMA wal_checkpoint(TRUNCATE)");
            truncated.map_err(|error| file_error(format!("{} cannot be written: {}", path.display(), phrase(error))))
        });
        let disposed = filling_app.dispose();
        let outcome = filled.and_then(|()| {
            disposed?;
            match fs::metadata(write_ahead_log_of(&path)) {
                Ok(log) if log.len() > 0 => Err(file_error(format!(
                    "{} has {} bytes of write-ahead log that did not go into the file: a program has it open, or the disk is full",
                    path.display(),
                    log.len()
                ))),
                _ => files.keep(&path, template).map_err(file_error),
            }
        });
        if outcome.is_err() {
            // The file is useless, and the disk may be full.
            let _ = files.remove(&path);
        }
        outcome
    }

    /// The name of the template with the contents of this test, and the settings that a copy of the template lacks. The
    /// method creates the template if it does not exist.
    fn template(&self, reservation: &mut Reservation<C>) -> Result<(String, Vec<String>)> {
        let contents_hash = self.contents_hash()?;
        let name = GeneratedName::Template { contents_hash };
        let mut known = self.known_templates();
        if let Some(settings) = known.get(&contents_hash) {
            return Ok((name.to_string(), settings.clone()));
        }
        // The lock is held meanwhile, so that other tests of this process wait for the template instead of creating it
        // too.
        let others = known.keys().copied().collect();
        self.make_kept(reservation, name, true, others)?;
        let name = name.to_string();
        let settings = self.with_owner(reservation, 1, |admin| match self.kind().settings_of_database(&name) {
            Some(sql) => admin.query_texts(&sql),
            None => Ok(Vec::new()),
        })?;
        known.insert(contents_hash, settings.clone());
        Ok((name, settings))
    }

    /// Creates a filled database that is kept under `name`, if it does not exist. The database has a temporary name
    /// until it is complete. The databases with the hashes `in_use` are not removed, because tests of this process use
    /// them.
    pub(super) fn make_kept(
        &self,
        reservation: &mut Reservation<C>,
        name: GeneratedName,
        close: bool,
        mut in_use: Vec<u64>,
    ) -> Result<()> {
        in_use.push(self.contents_hash()?);
        let (kind, final_name) = (self.kind(), name.to_string());
        let spare = reservation.slots.as_ref().map_or(0, |slots| slots.len().saturating_sub(1)).max(1);
        // One process of this machine creates the database, and the others wait for it.
        let _lock = match &self.environment.slots {
            Some(slots) => Some(self.lock_template(slots, &final_name)?),
            None => None,
        };
        let exists = |admin: &mut AdminConnection<C>| {
            Ok::<_, Error>(admin.query_texts(&kind.databases(&final_name))?.contains(&final_name))
        };
        let created = self.with_owner(reservation, spare, |admin| {
            if exists(admin)? {
                return Ok(None);
            }
            let name = admin.new_name().to_string();
            self.create_database(admin, &name, None)?;
            Ok(Some(name))
        })?;
        let Some(temporary_name) = created else { return Ok(()) };
        let filled = self.fill_database(&temporary_name);
        let outcome = self.with_owner(reservation, spare, |admin| {
            if filled.is_ok() {
                let renamed = if !admin.wait_until_unused(&temporary_name, Instant::now() + LAST_SESSIONS)? {
                    let reason = format!(
                        "sessions did not end in {temporary_name}: {}",
                        admin.query_texts(&kind.sessions_in(&temporary_name))?.join(", ")
                    );
                    Err(self.setup_error("making a template", reason))
                } else {
                    let closed = if close { admin.execute(&kind.close_database(&temporary_name)) } else { Ok(()) };
                    closed.and_then(|()| admin.execute(&kind.rename_database(&temporary_name, &final_name)))
                };
                match renamed {
                    Ok(()) => return admin.prune(&in_use),
                    // A process on another machine has created the database first.
                    Err(error) if exists(admin)? => {
                        crate::wording::log_line!(
                            debug,
                            "diesel_session::testing",
                            "{final_name} is there already: {error}"
                        );
                    }
                    Err(error) => {
                        admin.execute(&kind.drop_database(&temporary_name))?;
                        return Err(error);
                    }
                }
            }
            admin.execute(&kind.drop_database(&temporary_name))
        });
        filled.and(outcome)
    }

    /// Creates a database with the properties of the configured database: a copy of `template`, which is a template of
    /// the test kit with the settings that a copy lacks, or an unfilled database.
    pub(super) fn create_database(
        &self,
        admin: &mut AdminConnection<C>,
        name: &str,
        template: Option<&(String, Vec<String>)>,
    ) -> Result<()> {
        let (kind, properties) = (self.kind(), self.properties()?);
        let (source, options, settings) = match template {
            Some((template, settings)) => (Some(template.as_str()), properties.options.clone(), settings),
            None => {
                let locale = properties.locale.as_deref().filter(|_| self.template.is_none());
                let source = self.template.or(locale.map(|_| "template0"));
                (source, format!("{}{}", properties.options, locale.unwrap_or_default()), &properties.settings)
            }
        };
        let sent = admin.execute(&kind.create_database(name, source, &options));
        sent.or_else(|error| self.handle_create_failure(error, admin, name, source, &options))?;
        let settings = for_database(settings, &kind.quote(name));
        if !settings.is_empty() && admin.execute(&settings.join("; ")).is_err() {
            for sql in settings {
                if let Err(error) = admin.execute(&sql) {
                    // The owner of the configured database may have more rights than this role.
                    crate::wording::log_line!(
                        warn,
                        "diesel_session::testing",
                        "test `{}`: its database goes without `{sql}`: {}",
                        self.id,
                        phrase(error)
                    );
                }
            }
        }
        Ok(())
    }

    /// Handles the failure of a `CREATE DATABASE`. If `template1` has sessions and contains nothing that `template0`
    /// lacks, the method copies `template0` instead. Otherwise the error contains the cause.
    fn handle_create_failure(
        &self,
        error: Error,
        admin: &mut AdminConnection<C>,
        name: &str,
        source: Option<&str>,
        options: &str,
    ) -> Result<()> {
        const MAKING_DATABASE: &str = "making a database";
        let kind = self.kind();
        if admin.is_lost() {
            return Err(error);
        }
        if !admin.query_bool(&kind.may_create_database_query(name)).unwrap_or(true) {
            return Err(self.setup_error(MAKING_DATABASE, format!("{}; {}", phrase(error), kind.right_to_create())));
        }
        if kind != DatabaseKind::Postgres {
            return Err(error);
        }
        let source = source.unwrap_or("template1");
        let sessions = admin.query_texts(&kind.sessions_in(source)).unwrap_or_default();
        if sessions.is_empty() {
            return Err(error);
        }
        let cause = format!("{}; session {} is connected to `{source}`", phrase(&error), sessions.join(", "));
        if source != "template1" {
            return Err(self.setup_error(MAKING_DATABASE, format!("{cause}: end it, or wait until it has ended")));
        }
        match self.additions_of_template1() {
            Ok(0) => admin.execute(&kind.create_database(name, Some("template0"), options)),
            Ok(additions) => Err(self.setup_error(
                MAKING_DATABASE,
                format!(
                    "{cause}, and `template1` has {additions} objects or rights that `template0` has not: end that session, or name \
                     another database with `TestSetup::template`"
                ),
            )),
            Err(unknown) => {
                let reason = format!("{cause}, and what it has cannot be seen: {}", phrase(unknown));
                Err(self.setup_error(MAKING_DATABASE, reason))
            }
        }
    }

    /// The number of objects and rights that `template1` has and `template0` lacks.
    fn additions_of_template1(&self) -> Result<u64> {
        let config = Config { max_size: 1, ..Config::new(self.url_of("template1")?) };
        let app = self.environment.registrar.make_bare(self.id.into(), config)?;
        let answer = app.pool().and_then(|pool| {
            let mut pooled = pool.acquire(Location::caller(), false, None)?;
            let conn = pooled.conn();
            let prepared = self.kind().catalog_search_path().map_or(Ok(()), |sql| conn.batch_execute(sql));
            let answer = prepared.and_then(|()| conn.texts(self.kind().template_additions_query()));
            answer.map_err(|error| Error::from_query(error, Location::caller()))
        });
        drop(app.dispose());
        Ok(answer?.into_iter().flatten().next().and_then(|count| count.parse().ok()).unwrap_or(u64::MAX))
    }

    /// Fills an empty database. If a migration installs an extension that the role must not install, the error names
    /// the extension.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        let filled = self.contents.fill(app);
        let Err(Error::Migration(failure)) = filled else { return filled };
        let mut failure = failure.in_test_database();
        if self.kind() == DatabaseKind::Postgres {
            let wanted = self.contents.extensions();
            let forbidden = (|| {
                let mut pooled = app.pool().ok()?.acquire(Location::caller(), false, None).ok()?;
                pooled.managed().marked_dirty = true;
                self.kind().catalog_search_path().map_or(Ok(()), |sql| pooled.conn().batch_execute(sql)).ok()?;
                pooled.conn().texts(self.kind().forbidden_extensions()).ok()
            })();
            let forbidden = forbidden.unwrap_or_default();
            let forbidden = forbidden
                .iter()
                .flatten()
                .find(|name| wanted.contains(*name) && failure.message.contains(name.as_str()));
            if let Some(extension) = forbidden {
                failure.advice = Some(format!(
                    "This role may not install the extension `{extension}`, and a test's database is made anew: let an administrator \
                     install it in `template1`, or in a database that `TestSetup::template` names"
                ));
            }
        }
        Err(Error::Migration(Box::new(failure)))
    }

    fn lock_template(&self, slots: &ConnectionSlots, name: &str) -> Result<LockFile> {
        let template_error = |reason| self.setup_error("making a template", reason);
        let file = slots.file(&format!("making-{name}")).map_err(|error| template_error(error.to_string()))?;
        match file.lock_until(self.deadline) {
            Ok(true) => Ok(file),
            Ok(false) => Err(template_error(
                "another process has been making it for too long. Wait for that, or raise `TestSetup::patience`".into(),
            )),
            Err(error) => Err(template_error(error.to_string())),
        }
    }

    pub(super) fn fill_database(&self, database: &str) -> Result<()> {
        let filling_app = self.filling_app(&self.url_of(database)?)?;
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

    fn app(&self, url: String, connections: usize) -> Result<App<C>> {
        let max_size = u32::try_from(connections).unwrap_or(u32::MAX);
        self.environment.registrar.make(self.id.into(), Config { url, max_size, ..self.config.clone() }, None)
    }

    pub(super) fn url_of(&self, database: &str) -> Result<String> {
        with_database(&self.environment.target, database).map_err(|reason| self.setup_error(FINDING_DATABASE, reason))
    }

    /// Reserves the connections of the test's pool. Returns the reservation and the size of the pool.
    fn reserve_pool(&self) -> Result<(Reservation<C>, usize)> {
        let wanted = self.config.max_size as usize;
        let reservation = self.environment.reserve(wanted, true, self.id, self.deadline)?;
        let connections = reservation.pool_size(wanted);
        Ok((reservation, connections))
    }

    pub(super) fn known_templates(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<u64, Vec<String>>> {
        self.environment.known_templates.lock().unwrap_or_else(PoisonError::into_inner)
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
