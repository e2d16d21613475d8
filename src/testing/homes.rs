//! Where a test lives: its database, from its making to its removal.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::address::{with_database, with_schema, without_password};
use super::content::Content;
use super::house::{Admission, House};
use super::isolation::TestIsolation;
use super::lanes::{AT, FreeLane};
use super::lock_file::LockFile;
use super::names::Name;
use super::owner::Desk;
use super::setup::TestSetup;
use super::slots::Slots;
use crate::app::App;
use crate::backend::Kind;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};
use crate::url::Target;
use crate::wording::phrase;

/// How long the last sessions of a database that is to be removed are waited for.
const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// How many connections a test has where it does not say.
const MAX_SIZE: u32 = 4;

/// A test's database.
pub(super) enum Home<C: SessionConnection> {
    Database(String),
    Schema(String),
    File(PathBuf),
    Memory,
    Lane(FreeLane<C>),
}

/// A test's application, its database, and its connections.
pub(super) type Started<C> = (App<C>, Home<C>, Admission<C>);

/// What is known of a test that is about to begin.
pub(super) struct Site<'t, C: SessionConnection> {
    pub(super) house: Arc<House<C>>,
    pub(super) content: Content<'t, C>,
    pub(super) config: Config,
    pub(super) id: &'t str,
    pub(super) deadline: Instant,
}

impl<'t, C: SessionConnection> Site<'t, C> {
    pub(super) fn new(setup: &'t TestSetup<C>, id: &'t str) -> Result<Self> {
        let config = setup.configured().map_err(|error| match error {
            Error::InvalidConfig { reason, .. } => {
                let reason = format!("{reason}. A test can also be given its own, `config = ..`");
                Error::InvalidConfig { app: id.into(), reason }
            }
            other => other,
        })?;
        if let Some(problem) = config.problem() {
            return Err(Error::InvalidConfig { app: id.into(), reason: problem });
        }
        let house = House::of(setup.registrar, &config)?;
        let content = Content::new(house.schema()?, &setup.fixtures, &house.target, &setup.name);
        let said = Some(config.max_size).filter(|said| *said != Config::MAX_SIZE);
        let connections = setup.max_size.or(said).unwrap_or(MAX_SIZE).max(1);
        let config = config.max_size(connections);
        let deadline = Instant::now() + setup.patience;
        Ok(Self { house, content, config, id, deadline })
    }

    pub(super) fn kind(&self) -> Kind {
        self.house.target.kind
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
            Error::Query { source, .. } => {
                let reason = format!("{}. {}", phrase(source), needs(isolation, self.kind()));
                self.failed("making its database", reason)
            }
            other => other,
        })
    }

    fn start_apart(&self, isolation: TestIsolation) -> Result<Started<C>> {
        match (isolation, self.kind()) {
            (TestIsolation::Rollback, _) => self.start_in_lane(),
            (TestIsolation::Schema, Kind::Postgres) => self.start_in_schema(),
            (TestIsolation::Schema, kind) => {
                let reason = format!("{} has no schemas beside its databases; use another isolation", kind.name());
                Err(self.failed("making a schema", reason))
            }
            (TestIsolation::Database, Kind::Sqlite) if self.house.target.in_memory => self.start_in_memory_of_its_own(),
            (TestIsolation::Database, Kind::Sqlite) => self.start_in_file(),
            (TestIsolation::Database, _) => self.start_in_database(),
        }
    }

    fn start_in_database(&self) -> Result<Started<C>> {
        let kind = self.kind();
        let (mut admission, connections) = self.admit_pool()?;
        let template = match kind {
            Kind::Postgres => Some(self.template(&mut admission)?),
            Kind::Mysql | Kind::Sqlite => None,
        };
        let create = |admission: &mut Admission<C>, template: Option<&str>| {
            self.house.work(admission, connections, |desk| {
                let name = desk.new_name().to_string();
                self.create_database(desk, &name, template)?;
                Ok(name)
            })
        };
        let name = match create(&mut admission, template.as_deref()) {
            Err(error) if template.is_some() && error.to_string().contains("does not exist") => {
                // Somebody has removed it since.
                self.known().clear();
                let template = self.template(&mut admission)?;
                create(&mut admission, Some(&template))?
            }
            made => made?,
        };
        let made = || {
            let url = self.url_of(&name)?;
            let app = self.app(url, connections)?;
            if template.is_none() {
                self.content.fill(&app)?;
            }
            Ok(app)
        };
        match made() {
            Ok(app) => Ok((app, Home::Database(name), admission)),
            Err(error) => {
                let _ = Home::<C>::Database(name).remove(&self.house, Some(&mut admission));
                Err(error)
            }
        }
    }

    fn start_in_schema(&self) -> Result<Started<C>> {
        if let Some(found) = self.content.leaves_its_schema() {
            let reason = format!("{found}, which is outside of it; use `TestIsolation::Database`");
            return Err(self.failed("making a schema", reason));
        }
        let kind = self.kind();
        let (mut admission, connections) = self.admit_pool()?;
        let batch = self.content.batch();
        let (name, replayed) = self.house.work(&mut admission, connections, |desk| {
            let name = desk.new_name().to_string();
            let quoted = kind.quote(&name);
            if let Some(batch) = &batch {
                let whole = format!("BEGIN; CREATE SCHEMA {quoted}; SET LOCAL search_path = {quoted}; {batch} COMMIT");
                match desk.send(&whole) {
                    Ok(()) => return Ok((name, true)),
                    Err(error) => {
                        log::debug!(target: "diesel_session::testing", "test `{}`: the batch failed: {error}", self.id);
                        desk.send("ROLLBACK")?;
                    }
                }
            }
            desk.send(&format!("CREATE SCHEMA {quoted}"))?;
            Ok((name, false))
        })?;
        let made = || {
            let url =
                with_schema(&self.house.target, &name).map_err(|reason| self.failed("making a schema", reason))?;
            let app = self.app(url, connections)?;
            if replayed {
                self.content.run_functions(&app)?
            } else {
                self.content.fill(&app)?
            }
            Ok(app)
        };
        match made() {
            Ok(app) => Ok((app, Home::Schema(name), admission)),
            Err(error) => {
                let _ = Home::<C>::Schema(name).remove(&self.house, Some(&mut admission));
                Err(error)
            }
        }
    }

    fn start_in_memory_of_its_own(&self) -> Result<Started<C>> {
        let admission = self.house.admit(0, false, self.id, self.deadline)?;
        let app = self.app(self.config.url.clone(), self.config.max_size as usize)?;
        self.content.fill(&app)?;
        Ok((app, Home::Memory, admission))
    }

    fn start_in_file(&self) -> Result<Started<C>> {
        let made = |reason| self.failed("making a SQLite file", reason);
        let admission = self.house.admit(0, false, self.id, self.deadline)?;
        let files = &self.house.files;
        let template = files.template(self.content.hash(), self.config.wal).map_err(made)?;
        if !template.exists() {
            let _making = files.making.lock().unwrap_or_else(PoisonError::into_inner);
            if !template.exists() {
                self.make_template_file(&template)?;
            }
        }
        let path = files.new_path().map_err(made)?;
        fs::copy(&template, &path)
            .map_err(|error| made(format!("{} cannot be copied: {error}", template.display())))?;
        let app = self.app(file_url(&path), self.config.max_size as usize)?;
        Ok((app, Home::File(path), admission))
    }

    /// It gets its name when it is whole.
    fn make_template_file(&self, template: &Path) -> Result<()> {
        let made = |reason| self.failed("making a SQLite file", reason);
        let path = self.house.files.new_path().map_err(made)?;
        let filler = self.filler(&file_url(&path))?;
        let filled = self.content.fill(&filler);
        filler.dispose()?;
        filled?;
        // The last connection has put it into the file.
        if log_of(&path).exists() {
            return Err(made(format!("{} is still open somewhere", path.display())));
        }
        fs::rename(&path, template).map_err(|error| made(format!("{} cannot be made: {error}", template.display())))
    }

    /// The name of the template with this content, which is made where there is none.
    fn template(&self, admission: &mut Admission<C>) -> Result<String> {
        let content = self.content.hash();
        let name = Name::Template { content };
        let mut known = self.known();
        if !known.contains(&content) {
            // Under the lock: the other tests of this process wait for it instead of making another.
            let others = known.iter().copied().collect();
            self.make_kept(admission, name, true, others)?;
            known.insert(content);
        }
        Ok(name.to_string())
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
        others.push(self.content.hash());
        let (kind, last) = (self.kind(), name.to_string());
        let spare = admission.taken.as_ref().map_or(0, |taken| taken.len().saturating_sub(1)).max(1);
        // One process of this machine makes it, and the others wait for that.
        let _turn = match &self.house.slots {
            Some(slots) => Some(self.turn_to_make(slots, &last)?),
            None => None,
        };
        let made = self.house.work(admission, spare, |desk| {
            let question = kind.databases(&last);
            if desk.texts(&question)?.contains(&last) {
                return Ok(None);
            }
            let name = desk.new_name().to_string();
            self.create_database(desk, &name, None)?;
            Ok(Some(name))
        })?;
        let Some(first) = made else { return Ok(()) };
        let filled = self.fill_database(&first);
        let outcome = self.house.work(admission, spare, |desk| {
            if filled.is_ok() && desk.is_empty_by(&first, Instant::now() + LAST_SESSIONS)? {
                if closed {
                    desk.send(&kind.close_database(&first))?;
                }
                match desk.send(&kind.rename_database(&first, &last)) {
                    // Another machine was faster.
                    Err(error) if error.to_string().contains("already exists") => {}
                    renamed => return renamed.and_then(|()| desk.prune(&others)),
                }
            }
            desk.send(&kind.drop_database(&first))
        });
        filled.and(outcome)
    }

    pub(super) fn create_database(&self, desk: &mut Desk<C>, name: &str, template: Option<&str>) -> Result<()> {
        let kind = self.kind();
        desk.send(&kind.create_database(name, template)).map_err(|error| {
            let text = error.to_string();
            // `Access denied` is MySQL's.
            match ["permission denied", "Access denied"].iter().any(|refusal| text.contains(refusal)) {
                true => self.failed("making a database", format!("{text}; {}", kind.right_to_create())),
                false => error,
            }
        })
    }

    fn turn_to_make(&self, slots: &Slots, what: &str) -> Result<LockFile> {
        let failed = |reason| self.failed("making a template", reason);
        let file = slots.file(&format!("making-{what}")).map_err(|error| failed(error.to_string()))?;
        match file.lock_until(self.deadline) {
            Ok(true) => Ok(file),
            Ok(false) => Err(failed("another process has been making it for too long".into())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    pub(super) fn fill_database(&self, database: &str) -> Result<()> {
        let filler = self.filler(&self.url_of(database)?)?;
        let filled = self.content.fill(&filler);
        let emptied = filler.dispose();
        filled?;
        emptied.map(drop)
    }

    /// An application that fills a database and is gone.
    pub(super) fn filler(&self, url: &str) -> Result<App<C>> {
        let config = Config { url: url.into(), max_size: 2, ..self.config.clone() };
        self.house.registrar.make(self.id.into(), config, None)
    }

    fn app(&self, url: String, connections: usize) -> Result<App<C>> {
        let max_size = u32::try_from(connections).unwrap_or(u32::MAX);
        self.house.registrar.make(self.id.into(), Config { url, max_size, ..self.config.clone() }, None)
    }

    fn url_of(&self, database: &str) -> Result<String> {
        with_database(&self.house.target, database).map_err(|reason| self.failed(AT, reason))
    }

    /// The connections of the test's pool, as many as can be had.
    fn admit_pool(&self) -> Result<(Admission<C>, usize)> {
        let wanted = self.config.max_size as usize;
        let admission = self.house.admit(wanted, true, self.id, self.deadline)?;
        let taken = admission.taken.as_ref().map_or(wanted, |taken| taken.len());
        Ok((admission, wanted.min(taken.saturating_sub(1).max(1))))
    }

    fn known(&self) -> std::sync::MutexGuard<'_, std::collections::HashSet<u64>> {
        self.house.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: SessionConnection> Home<C> {
    /// Removes it; its application has no connection any more.
    pub(super) fn remove(self, house: &House<C>, admission: Option<&mut Admission<C>>) -> Result<()> {
        let kind = house.target.kind;
        let lost = || Error::InvalidConfig {
            app: "tests".into(),
            reason: "the session that owns the databases is gone".into(),
        };
        match self {
            Self::Database(name) => house
                .work_on(|desk| {
                    desk.is_empty_by(&name, Instant::now() + LAST_SESSIONS)?;
                    desk.send(&kind.drop_database(&name))
                })
                .unwrap_or_else(|| Err(lost())),
            Self::Schema(name) => house
                .work_on(|desk| desk.send(&format!("DROP SCHEMA IF EXISTS {} CASCADE", kind.quote(&name))))
                .unwrap_or_else(|| Err(lost())),
            Self::File(path) => {
                house.files.remove(&path).map_err(|reason| Error::InvalidConfig { app: "tests".into(), reason })
            }
            Self::Lane(lane) => admission.map_or(Ok(()), |admission| lane.remove(house, admission)),
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
            Self::Memory | Self::Lane(_) => None,
        }
    }
}

/// SQLite's write-ahead log.
fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// What an account must be allowed, for one who was refused.
fn needs(isolation: TestIsolation, kind: Kind) -> &'static str {
    match (isolation, kind) {
        (TestIsolation::Schema, _) => "The role needs the right CREATE in the database of the URL",
        (_, Kind::Postgres) => {
            "The role needs the right CREATEDB (`ALTER ROLE .. CREATEDB`); `TestIsolation::Schema` does without"
        }
        (_, Kind::Mysql) => "The account needs ALL rights on `diesel\\_session\\_%`.*",
        (_, Kind::Sqlite) => "It is made in the folder of temporary files",
    }
}

fn file_url(path: &Path) -> String {
    format!("sqlite://{}", path.display())
}
