//! What a test's database holds when the test begins: the schema and the fixtures.

use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use super::fixture::{Fixture, Rows};
use crate::app::App;
use crate::backend::{Kind, fnv1a};
use crate::connection::SessionConnection;
use crate::context::{self, Current};
use crate::error::{Error, Result};
use crate::schema::{Script, leaves_schema};
use crate::url::Target;

/// The migrations of a database object, read once.
pub(super) struct Schema {
    pub(super) script: Script,
    pub(super) batch: Option<String>,
    digest: Option<String>,
}

impl Schema {
    pub(super) fn new(script: Script, kind: Kind) -> Self {
        let (batch, digest) = (script.batch(kind), script.digest());
        Self { script, batch, digest }
    }
}

/// Schema and fixtures.
pub(super) struct Content<'t, C: SessionConnection> {
    pub(super) schema: Arc<Schema>,
    fixtures: &'t [Fixture<C>],
    kind: Kind,
    /// What one account has made another may not see.
    account: String,
    test: &'t str,
}

impl<'t, C: SessionConnection> Content<'t, C> {
    pub(super) fn new(schema: Arc<Schema>, fixtures: &'t [Fixture<C>], target: &Target, test: &'t str) -> Self {
        let account = target.shown.split('@').next().unwrap_or_default().to_owned();
        Self { schema, fixtures, kind: target.kind, account, test }
    }

    /// Equal for contents that make equal databases, in every process. What is code of the program's own counts as another after
    /// each build.
    pub(super) fn hash(&self) -> u64 {
        let mut parts: Vec<&[u8]> = vec![env!("CARGO_PKG_VERSION").as_bytes(), self.kind.name().as_bytes()];
        if self.kind != Kind::Sqlite {
            parts.push(self.account.as_bytes());
        }
        match &self.schema.digest {
            Some(digest) => parts.push(digest.as_bytes()),
            None => parts.push(this_build().as_bytes()),
        }
        for fixture in self.fixtures {
            parts.extend([&b"\0"[..], fixture.name.as_bytes(), &b"\0"[..]]);
            parts.push(match &fixture.rows {
                Rows::Sql(text) => text.as_bytes(),
                Rows::Function(_) => this_build().as_bytes(),
            });
        }
        fnv1a(parts)
    }

    /// The first thing in it that would not stay in a schema of its own.
    pub(super) fn leaves_its_schema(&self) -> Option<String> {
        if let Some((migration, words)) = self.schema.script.leaves_its_schema() {
            return Some(format!("migration {migration} has `{words}`"));
        }
        self.fixtures.iter().find_map(|fixture| match &fixture.rows {
            Rows::Sql(text) => leaves_schema(text).map(|words| format!("fixture {} has `{words}`", fixture.name)),
            Rows::Function(_) => None,
        })
    }

    /// All of it that is text, where that is all of the schema.
    pub(super) fn batch(&self) -> Option<String> {
        let mut batch = self.schema.batch.clone()?;
        let texts = self.fixtures.iter().filter_map(|fixture| fixture.text());
        let texts: Vec<&str> = texts.filter(|text| !self.kind.is_blank(text)).collect();
        if !texts.is_empty() {
            let begin = if self.kind == Kind::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" };
            batch.push_str(&format!("\n{begin};\n{}\n;\nCOMMIT;", texts.join("\n;\n")));
        }
        Some(batch)
    }

    /// Whether fixtures come in the order of text first.
    fn is_text_first(&self) -> bool {
        let is_text = |fixture: &&Fixture<C>| matches!(fixture.rows, Rows::Sql(_));
        self.fixtures.iter().skip_while(is_text).all(|fixture| !is_text(&fixture))
    }

    /// Fills an empty database, in as few messages as can be.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        let replayed = match self.batch().filter(|_| self.kind != Kind::Mysql && self.is_text_first()) {
            Some(batch) => self.replay(app, &batch)?,
            None => false,
        };
        if replayed {
            return self.run_functions(app);
        }
        match &self.schema.batch {
            // What MySQL has done of a batch that fails stays done, so the first try is the only one.
            Some(batch) if self.kind == Kind::Mysql && !batch.is_empty() => {
                self.send(app, batch, "replaying the migrations failed")?
            }
            _ if self.schema.script.versions().next().is_none() => {}
            _ => drop(app.create_all()?),
        }
        for fixture in self.fixtures {
            match &fixture.rows {
                Rows::Sql(text) => self.send_fixture(app, &fixture.name, text)?,
                Rows::Function(_) => self.run_function(app, fixture)?,
            }
        }
        Ok(())
    }

    pub(super) fn run_functions(&self, app: &App<C>) -> Result<()> {
        self.fixtures.iter().try_for_each(|fixture| self.run_function(app, fixture))
    }

    /// False where the database refuses something that has to be looked for one by one; then nothing was done.
    fn replay(&self, app: &App<C>, batch: &str) -> Result<bool> {
        if batch.is_empty() {
            return Ok(true);
        }
        let mut lease = app.pool()?.acquire(Location::caller(), false, None)?;
        let sent = lease.conn().batch_execute(batch);
        if let Err(error) = &sent {
            log::debug!(target: "diesel_session::testing", "test `{}`: the batch failed: {error}", self.test);
            lease.doom();
        } else {
            lease.live().marked = true;
        }
        Ok(sent.is_ok())
    }

    fn send(&self, app: &App<C>, text: &str, what: &'static str) -> Result<()> {
        let mut lease = app.pool()?.acquire(Location::caller(), false, None)?;
        lease.live().marked = true;
        let sent = lease.conn().batch_execute(text);
        sent.map_err(|error| {
            lease.doom();
            let reason = app.spec().target.scrub(&error.to_string());
            Error::TestSetup { test: self.test.into(), what, reason }
        })
    }

    /// A fixture without a statement adds nothing.
    fn send_fixture(&self, app: &App<C>, name: &str, text: &str) -> Result<()> {
        if self.kind.is_blank(text) {
            return Ok(());
        }
        self.send(app, text, "a fixture failed").map_err(|error| match error {
            Error::TestSetup { test, what, reason } => {
                Error::TestSetup { test, what, reason: format!("{name}: {reason}") }
            }
            other => other,
        })
    }

    fn run_function(&self, app: &App<C>, fixture: &Fixture<C>) -> Result<()> {
        let Rows::Function(run) = fixture.rows else { return Ok(()) };
        let at = Location::caller();
        let run_it = || {
            app.scope().commit_on_ok().run(|| {
                let session = context::session(app.database(), at, |current| match current {
                    Current::Entered(app) => Ok(app),
                    Current::SameId(_) => Err(Error::NoContext { at }),
                })?;
                run(&session)
            })
        };
        // What is half made has to be removed, whatever the program's own code does.
        let outcome = match catch_unwind(AssertUnwindSafe(run_it)) {
            Ok(outcome) => outcome.map_err(|error: Error| error.to_string()),
            Err(panic) => Err(format!("it panicked: {}", crate::panic_message(&*panic))),
        };
        outcome.map_err(|reason| {
            let reason = format!("{}: {reason}", fixture.name);
            Error::TestSetup { test: self.test.into(), what: "a fixture failed", reason }
        })
    }
}

/// Tells builds of this program apart.
fn this_build() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let Ok(path) = std::env::current_exe() else { return "unknown".into() };
        let metadata = std::fs::metadata(&path).ok();
        let modified = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
        let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map(|time| time.as_nanos());
        format!("{} {:?} {modified:?}", path.display(), metadata.map(|metadata| metadata.len()))
    })
}
