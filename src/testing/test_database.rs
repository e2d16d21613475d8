//! Where a test lives: its database, from its making to its removal.

use std::fs;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::address::{with_database, with_schema, without_password};
use super::content::Content;
use super::environment::{Admission, TestEnvironment};
use super::isolation::TestIsolation;
use super::lock_file::LockFile;
use super::names::Name;
use super::owner::{AdminConnection, end_of};
use super::pinned_connections::{AT, FreePinnedConnection};
use super::setup::TestSetup;
use super::slots::Slots;
use super::surroundings::{Surroundings, for_database};
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::percent::encode;
use crate::url::Target;
use crate::wording::phrase;

/// How long the last sessions of a database that is to be removed are waited for.
const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// A test that has no patience left still waits so long for a connection.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// How long a test's session may be idle in a transaction before the server ends it: the process may be frozen, or on a machine that is
/// gone. It is longer than anybody looks at a variable in a debugger.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(4 * 3600);

/// How many connections a test has where it does not say.
const MAX_SIZE: u32 = 4;

/// A test's database.
pub(super) enum TestDatabase<C: SessionConnection> {
    Database(String),
    Schema(String),
    File(PathBuf),
    Memory,
    PinnedConnection(FreePinnedConnection<C>),
}

/// A test's application, its database, and its connections.
pub(super) type Started<C> = (App<C>, TestDatabase<C>, Admission<C>);

/// What is known of a test that is about to begin.
pub(super) struct Provisioner<'t, C: SessionConnection> {
    pub(super) environment: Arc<TestEnvironment<C>>,
    pub(super) content: Content<'t, C>,
    pub(super) config: Config,
    pub(super) id: &'t str,
    pub(super) deadline: Instant,
    surroundings: OnceLock<Arc<Surroundings>>,
    template: Option<&'t str>,
}

impl<'t, C: SessionConnection> Provisioner<'t, C> {
    pub(super) fn new(setup: &'t TestSetup<C>, config: &'t Config, id: &'t str) -> Result<Self> {
        let environment = TestEnvironment::of(setup.registrar, config)?;
        let content = Content::new(environment.schema()?, setup, config, &environment.target);
        let said = Some(config.max_size).filter(|said| *said != Config::MAX_SIZE);
        let connections = setup.max_size.or(said).unwrap_or(MAX_SIZE).max(1);
        let mut config = config.clone().max_size(connections);
        config.idle_in_transaction_timeout = Some(IDLE_IN_TRANSACTION);
        let template = setup.template.as_deref();
        if template.is_some()
            && (environment.target.kind != DatabaseKind::Postgres || setup.isolation == TestIsolation::Schema)
        {
            let reason = "only PostgreSQL copies a database, and `TestIsolation::Schema` makes none: give no template";
            return Err(Error::TestSetup { test: id.into(), what: "copying its database", reason: reason.into() });
        }
        let deadline = end_of(setup.patience);
        Ok(Self { environment, content, config, id, deadline, surroundings: OnceLock::new(), template })
    }

    /// The configuration of a test, if it can be used.
    pub(super) fn configured(setup: &TestSetup<C>, id: &str) -> Result<Config> {
        let config = setup.configured().map_err(|error| match error {
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

    /// How long this test may still wait for others.
    pub(super) fn patience(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(LEAST_PATIENCE)
    }

    /// What the configured database is like; a connection of the test's is used to find out.
    pub(super) fn surroundings(&self) -> Result<&Surroundings> {
        if let Some(known) = self.surroundings.get() {
            return Ok(known);
        }
        let found = self.environment.surroundings(&self.settings(), &self.config)?;
        Ok(self.surroundings.get_or_init(|| found))
    }

    /// The key of templates and pinned connections with the content of this test, if it is known without asking.
    pub(super) fn known_hash(&self) -> Option<u64> {
        let known = self.environment.known_surroundings(&self.settings())?;
        Some(self.content.hash(self.surroundings.get_or_init(|| known)))
    }

    pub(super) fn hash(&self) -> Result<u64> {
        Ok(self.content.hash(self.surroundings()?))
    }

    /// Works with the owner's session, as long as the test may wait.
    pub(super) fn work<T>(
        &self,
        admission: &mut Admission<C>,
        keep: usize,
        work: impl FnOnce(&mut AdminConnection<C>) -> Result<T>,
    ) -> Result<T> {
        self.environment.work_within(admission, keep, self.patience(), work)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.environment.target.kind
    }

    pub(super) fn test(&self) -> &str {
        self.id
    }

    pub(super) fn failed(&self, what: &'static str, reason: impl Into<String>) -> Error {
        Error::TestSetup { test: self.id.into(), what, reason: reason.into() }
    }

    pub(super) fn start(&self, isolation: TestIsolation) -> Result<Started<C>> {
        self.start_apart(isolation).map_err(|error| match error {
            // A statement of the kit's own; those of migrations and fixtures are told as theirs.
            Error::Query { source, .. } => self.failed("making its database", phrase(with_hint(&source))),
            other => other,
        })
    }

    fn start_apart(&self, isolation: TestIsolation) -> Result<Started<C>> {
        match (isolation, self.kind()) {
            (TestIsolation::Rollback, _) => self.start_pinned(),
            (TestIsolation::Schema, DatabaseKind::Postgres) => self.start_in_schema(),
            (TestIsolation::Schema, kind) => {
                let reason = format!("{} has no schemas beside its databases; use another isolation", kind.name());
                Err(self.failed("making a schema", reason))
            }
            (TestIsolation::Database, DatabaseKind::Sqlite) if self.environment.target.in_memory => {
                self.start_in_memory_of_its_own()
            }
            (TestIsolation::Database, DatabaseKind::Sqlite) => self.start_in_file(),
            (TestIsolation::Database, _) => self.start_in_database(),
        }
    }

    fn start_in_database(&self) -> Result<Started<C>> {
        let kind = self.kind();
        let (mut admission, connections) = self.admit_pool()?;
        self.surroundings()?;
        let mut template = match kind {
            DatabaseKind::Postgres => Some(self.template(&mut admission)?),
            DatabaseKind::Mysql | DatabaseKind::Sqlite => None,
        };
        let create = |admission: &mut Admission<C>, template: Option<&(String, Vec<String>)>| {
            self.work(admission, connections, |admin| {
                let name = admin.new_name().to_string();
                let made = self.create_database(admin, &name, template);
                if let (Err(error), Some((template, _))) = (&made, template)
                    && !admin.texts(&kind.databases(template))?.contains(template)
                {
                    crate::wording::log_line!(
                        debug,
                        "diesel_session::testing",
                        "template {template} was removed: {error}"
                    );
                    return Ok(None);
                }
                made.map(|()| Some(name))
            })
        };
        let mut name = create(&mut admission, template.as_ref())?;
        if name.is_none() {
            // Somebody has removed the template since.
            self.known().clear();
            template = Some(self.template(&mut admission)?);
            name = create(&mut admission, template.as_ref())?;
        }
        let Some(name) = name else {
            let reason = "another program removes its template as soon as it is made";
            return Err(self.failed("copying its template", reason));
        };
        let made = || {
            let url = self.url_of(&name)?;
            let app = self.app(url, connections)?;
            if template.is_none() {
                self.fill(&app)?;
            }
            Ok(app)
        };
        match made() {
            Ok(app) => Ok((app, TestDatabase::Database(name), admission)),
            Err(error) => {
                let _ = TestDatabase::<C>::Database(name).remove(&self.environment, Some(&mut admission));
                Err(error)
            }
        }
    }

    fn start_in_schema(&self) -> Result<Started<C>> {
        if let Some(found) = self.content.first_outside_reference() {
            let reason = format!("{found}, which is outside of it; use `TestIsolation::Database`");
            return Err(self.failed("making a schema", reason));
        }
        let kind = self.kind();
        let (mut admission, connections) = self.admit_pool()?;
        let role = self.surroundings()?.role.as_deref();
        let role = role.map(|role| format!(" AUTHORIZATION {role}")).unwrap_or_default();
        let name = self.work(&mut admission, connections, |admin| {
            let name = admin.new_name().to_string();
            let made = admin.send(&format!("CREATE SCHEMA {}{role}", kind.quote(&name)));
            match made {
                Err(error) if !admin.is_true(kind.may_create_schema_query()).unwrap_or(true) => {
                    let advice = "The role needs the right CREATE in the database of the URL";
                    Err(self.failed("making a schema", format!("{}. {advice}", phrase(error))))
                }
                made => made.map(|()| name),
            }
        })?;
        let made = || {
            let url = with_schema(&self.environment.target, &name)
                .map_err(|reason| self.failed("making a schema", reason))?;
            let app = self.app(url, connections)?;
            self.fill(&app)?;
            Ok(app)
        };
        match made() {
            Ok(app) => Ok((app, TestDatabase::Schema(name), admission)),
            Err(error) => {
                let _ = TestDatabase::<C>::Schema(name).remove(&self.environment, Some(&mut admission));
                Err(error)
            }
        }
    }

    fn start_in_memory_of_its_own(&self) -> Result<Started<C>> {
        let admission = self.environment.admit(0, false, self.id, self.deadline)?;
        let app = self.app(self.config.url.clone(), self.config.max_size as usize)?;
        self.fill(&app)?;
        Ok((app, TestDatabase::Memory, admission))
    }

    fn start_in_file(&self) -> Result<Started<C>> {
        let made = |reason| self.failed("making a SQLite file", reason);
        let admission = self.environment.admit(0, false, self.id, self.deadline)?;
        let files = &self.environment.files;
        let template = files.template(self.hash()?, self.config.wal).map_err(made)?;
        let path = files.new_path().map_err(made)?;
        let mut is_copied = files.copy(&template, &path).map_err(made)?;
        if !is_copied {
            let _making = files.making.lock().unwrap_or_else(PoisonError::into_inner);
            is_copied = files.copy(&template, &path).map_err(made)?;
            if !is_copied {
                self.make_template_file(&template)?;
                is_copied = files.copy(&template, &path).map_err(made)?;
            }
        }
        if !is_copied {
            return Err(made(format!("{} was removed as soon as it was made", template.display())));
        }
        let app = self.app(file_url(&path).map_err(made)?, self.config.max_size as usize)?;
        Ok((app, TestDatabase::File(path), admission))
    }

    /// It gets its name when it is whole.
    fn make_template_file(&self, template: &Path) -> Result<()> {
        let made = |reason| self.failed("making a SQLite file", reason);
        let files = &self.environment.files;
        let path = files.new_path().map_err(made)?;
        let filler = self.filler(&file_url(&path).map_err(made)?)?;
        let filled = self.fill(&filler).and_then(|()| {
            // The last connection would do it, and would not say why it could not.
            let mut pooled = filler.pool()?.acquire(Location::caller(), false, None)?;
            let emptied = pooled.conn().batch_execute("PRAGMA wal_checkpoint(TRUNCATE)");
            emptied.map_err(|error| made(format!("{} cannot be written: {}", path.display(), phrase(error))))
        });
        let emptied = filler.dispose();
        let outcome = filled.and_then(|()| {
            emptied?;
            match fs::metadata(log_of(&path)) {
                Ok(log) if log.len() > 0 => Err(made(format!(
                    "{} has {} bytes of write-ahead log that did not go into the file: a program has it open, or the disk is full",
                    path.display(),
                    log.len()
                ))),
                _ => files.keep(&path, template).map_err(made),
            }
        });
        if outcome.is_err() {
            // It would take part of a disk that may be full.
            let _ = files.remove(&path);
        }
        outcome
    }

    /// The name of the template with this content, which is made where there is none; and the settings that a copy does not have.
    fn template(&self, admission: &mut Admission<C>) -> Result<(String, Vec<String>)> {
        let content = self.hash()?;
        let name = Name::Template { content };
        let mut known = self.known();
        if let Some(settings) = known.get(&content) {
            return Ok((name.to_string(), settings.clone()));
        }
        // Under the lock: the other tests of this process wait for it instead of making another.
        let others = known.keys().copied().collect();
        self.make_kept(admission, name, true, others)?;
        let name = name.to_string();
        let settings = self.work(admission, 1, |admin| match self.kind().settings_of_database(&name) {
            Some(sql) => admin.texts(&sql),
            None => Ok(Vec::new()),
        })?;
        known.insert(content, settings.clone());
        Ok((name, settings))
    }

    /// Makes a database with the content that is kept under `name`, unless it is there. It is another name's until it is whole.
    /// Those of `others` are kept too, as this process's tests use them.
    pub(super) fn make_kept(
        &self,
        admission: &mut Admission<C>,
        name: Name,
        closed: bool,
        mut others: Vec<u64>,
    ) -> Result<()> {
        others.push(self.hash()?);
        let (kind, last) = (self.kind(), name.to_string());
        let spare = admission.taken.as_ref().map_or(0, |taken| taken.len().saturating_sub(1)).max(1);
        // One process of this machine makes it, and the others wait for that.
        let _turn = match &self.environment.slots {
            Some(slots) => Some(self.turn_to_make(slots, &last)?),
            None => None,
        };
        let is_there =
            |admin: &mut AdminConnection<C>| Ok::<_, Error>(admin.texts(&kind.databases(&last))?.contains(&last));
        let made = self.work(admission, spare, |admin| {
            if is_there(admin)? {
                return Ok(None);
            }
            let name = admin.new_name().to_string();
            self.create_database(admin, &name, None)?;
            Ok(Some(name))
        })?;
        let Some(first) = made else { return Ok(()) };
        let filled = self.fill_database(&first);
        let outcome = self.work(admission, spare, |admin| {
            if filled.is_ok() {
                let renamed = if !admin.is_empty_by(&first, Instant::now() + LAST_SESSIONS)? {
                    let reason =
                        format!("sessions did not end in {first}: {}", list(&admin.texts(&kind.sessions_in(&first))?));
                    Err(self.failed("making a template", reason))
                } else {
                    let closed = if closed { admin.send(&kind.close_database(&first)) } else { Ok(()) };
                    closed.and_then(|()| admin.send(&kind.rename_database(&first, &last)))
                };
                match renamed {
                    Ok(()) => return admin.prune(&others),
                    // Another machine was faster.
                    Err(error) if is_there(admin)? => {
                        crate::wording::log_line!(debug, "diesel_session::testing", "{last} is there already: {error}");
                    }
                    Err(error) => {
                        admin.send(&kind.drop_database(&first))?;
                        return Err(error);
                    }
                }
            }
            admin.send(&kind.drop_database(&first))
        });
        filled.and(outcome)
    }

    /// Makes a database like the configured one: a copy of a template of the kit's with its settings, or one to be filled.
    pub(super) fn create_database(
        &self,
        admin: &mut AdminConnection<C>,
        name: &str,
        template: Option<&(String, Vec<String>)>,
    ) -> Result<()> {
        let (kind, like) = (self.kind(), self.surroundings()?);
        let (source, options, settings) = match template {
            Some((template, settings)) => (Some(template.as_str()), like.options.clone(), settings),
            None => {
                let locale = like.locale.as_deref().filter(|_| self.template.is_none());
                let source = self.template.or(locale.map(|_| "template0"));
                (source, format!("{}{}", like.options, locale.unwrap_or_default()), &like.settings)
            }
        };
        let sent = admin.send(&kind.create_database(name, source, &options));
        sent.or_else(|error| self.create_after(error, admin, name, source, &options))?;
        let settings = for_database(settings, &kind.quote(name));
        if !settings.is_empty() && admin.send(&settings.join("; ")).is_err() {
            for sql in settings {
                if let Err(error) = admin.send(&sql) {
                    // The role that owns the configured database may be allowed more.
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

    /// Finds out why a database could not be made, and makes it if `template1` was in use and has nothing that `template0` has not.
    fn create_after(
        &self,
        error: Error,
        admin: &mut AdminConnection<C>,
        name: &str,
        source: Option<&str>,
        options: &str,
    ) -> Result<()> {
        const AT: &str = "making a database";
        let kind = self.kind();
        if admin.is_lost() {
            return Err(error);
        }
        if !admin.is_true(&kind.may_create_database_query(name)).unwrap_or(true) {
            return Err(self.failed(AT, format!("{}; {}", phrase(error), kind.right_to_create())));
        }
        if kind != DatabaseKind::Postgres {
            return Err(error);
        }
        let source = source.unwrap_or("template1");
        let sessions = admin.texts(&kind.sessions_in(source)).unwrap_or_default();
        if sessions.is_empty() {
            return Err(error);
        }
        let why = format!("{}; session {} is connected to `{source}`", phrase(&error), list(&sessions));
        if source != "template1" {
            return Err(self.failed(AT, format!("{why}: end it, or wait until it has ended")));
        }
        match self.additions_of_template1() {
            Ok(0) => admin.send(&kind.create_database(name, Some("template0"), options)),
            Ok(additions) => Err(self.failed(
                AT,
                format!(
                    "{why}, and `template1` has {additions} objects or rights that `template0` has not: end that session, or name \
                     another database with `TestSetup::template`"
                ),
            )),
            Err(unknown) => Err(self.failed(AT, format!("{why}, and what it has cannot be seen: {}", phrase(unknown)))),
        }
    }

    fn additions_of_template1(&self) -> Result<u64> {
        let config = Config { max_size: 1, ..Config::new(self.url_of("template1")?) };
        let app = self.environment.registrar.make_bare(self.id.into(), config)?;
        let answer = app.pool().and_then(|pool| {
            let mut pooled = pool.acquire(Location::caller(), false, None)?;
            let conn = pooled.conn();
            let at_home = self.kind().catalog_search_path().map_or(Ok(()), |sql| conn.batch_execute(sql));
            let answer = at_home.and_then(|()| conn.texts(self.kind().template_additions_query()));
            answer.map_err(|error| Error::from_query(error, Location::caller()))
        });
        drop(app.dispose());
        Ok(answer?.into_iter().flatten().next().and_then(|count| count.parse().ok()).unwrap_or(u64::MAX))
    }

    /// Fills an empty database; an error tells what the role may not install, if that is the cause.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        let filled = self.content.fill(app);
        let Err(Error::Migration(failure)) = filled else { return filled };
        let mut failure = failure.in_test_database();
        if self.kind() == DatabaseKind::Postgres {
            let wanted = self.content.extensions();
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

    fn turn_to_make(&self, slots: &Slots, what: &str) -> Result<LockFile> {
        let failed = |reason| self.failed("making a template", reason);
        let file = slots.file(&format!("making-{what}")).map_err(|error| failed(error.to_string()))?;
        match file.lock_until(self.deadline) {
            Ok(true) => Ok(file),
            Ok(false) => Err(failed(
                "another process has been making it for too long. Wait for that, or raise `TestSetup::patience`".into(),
            )),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    pub(super) fn fill_database(&self, database: &str) -> Result<()> {
        let filler = self.filler(&self.url_of(database)?)?;
        let filled = self.fill(&filler);
        let emptied = filler.dispose();
        filled?;
        emptied.map(drop)
    }

    /// An application that fills a database and is gone.
    pub(super) fn filler(&self, url: &str) -> Result<App<C>> {
        let config = Config { url: url.into(), max_size: 2, ..self.config.clone() };
        self.environment.registrar.make(self.id.into(), config, None)
    }

    fn app(&self, url: String, connections: usize) -> Result<App<C>> {
        let max_size = u32::try_from(connections).unwrap_or(u32::MAX);
        self.environment.registrar.make(self.id.into(), Config { url, max_size, ..self.config.clone() }, None)
    }

    fn url_of(&self, database: &str) -> Result<String> {
        with_database(&self.environment.target, database).map_err(|reason| self.failed(AT, reason))
    }

    /// The connections of the test's pool, as many as can be had.
    fn admit_pool(&self) -> Result<(Admission<C>, usize)> {
        let wanted = self.config.max_size as usize;
        let admission = self.environment.admit(wanted, true, self.id, self.deadline)?;
        let connections = admission.pool_size(wanted);
        Ok((admission, connections))
    }

    pub(super) fn known(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<u64, Vec<String>>> {
        self.environment.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> TestDatabase<C> {
    /// Removes it; its application has no connection any more.
    pub(super) fn remove(self, environment: &TestEnvironment<C>, admission: Option<&mut Admission<C>>) -> Result<()> {
        let kind = environment.target.kind;
        let lost = || Error::InvalidConfig {
            app: "tests".into(),
            reason: "the session that owns the databases is gone, so the next run removes this one".into(),
        };
        match self {
            Self::Database(name) => environment
                .work_on(|admin| {
                    admin.is_empty_by(&name, Instant::now() + LAST_SESSIONS)?;
                    admin.send(&kind.drop_database(&name))
                })
                .unwrap_or_else(|| Err(lost())),
            Self::Schema(name) => environment.work_on(|admin| admin.drop_schema(&name)).unwrap_or_else(|| Err(lost())),
            Self::File(path) => {
                environment.files.remove(&path).map_err(|reason| Error::InvalidConfig { app: "tests".into(), reason })
            }
            Self::PinnedConnection(pinned) => {
                admission.map_or(Ok(()), |admission| pinned.remove(environment, admission))
            }
            Self::Memory => Ok(()),
        }
    }

    /// Where people find it; `None` where there is nothing to be found.
    pub(super) fn shown(&self, target: &Target) -> Option<String> {
        let shown = |url: String| Target::parse(&url, Some(target.kind)).ok().map(|target| without_password(&target));
        match self {
            Self::Database(name) => with_database(target, name).ok().and_then(shown),
            Self::Schema(name) => with_schema(target, name).ok().and_then(shown),
            Self::File(path) => Some(path.display().to_string()),
            Self::Memory | Self::PinnedConnection(_) => None,
        }
    }
}

/// SQLite's write-ahead log.
fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// What the server says, with its hint.
fn with_hint(error: &diesel::result::Error) -> String {
    match error {
        diesel::result::Error::DatabaseError(_, information) => {
            let more = [information.details(), information.hint()];
            more.into_iter().flatten().fold(error.to_string(), |text, more| format!("{}. {more}", phrase(text)))
        }
        other => other.to_string(),
    }
}

fn list(sessions: &[String]) -> String {
    sessions.join(", ")
}

/// In a `file:` URL the signs that mean something there are written out.
fn file_url(path: &Path) -> Result<String, String> {
    let Some(text) = path.to_str() else {
        return Err(format!("{} is not UTF-8, as a database URL has to be", path.display()));
    };
    let encoded = encode(text);
    Ok(if encoded == text { format!("sqlite://{text}") } else { format!("file:{encoded}") })
}
