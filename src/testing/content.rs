//! What a test's database holds when the test begins: the schema and the fixtures.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use super::fixture::{Fixture, Rows};
use super::script::{Script, in_one_transaction, installed_extensions, outside_reference};
use super::setup::TestSetup;
use super::surroundings::Surroundings;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::context::{self, Current};
use crate::dialect::{ConnectionSnapshot, fnv1a};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::url::Target;

/// The migrations of a database object, read once.
pub(super) struct Schema {
    pub(super) script: Script,
    messages: Option<Vec<String>>,
    digest: Option<String>,
}

impl Schema {
    pub(super) fn new(script: Script, kind: DatabaseKind) -> Self {
        let (messages, digest) = (script.messages(kind), script.digest());
        Self { script, messages, digest }
    }
}

/// Schema and fixtures.
pub(super) struct Content<'t, C: SessionConnection> {
    pub(super) schema: Arc<Schema>,
    setup: &'t TestSetup<C>,
    config: &'t Config,
    kind: DatabaseKind,
    /// What one account has made another may not see, and databases need not be alike.
    place: String,
}

impl<'t, C: SessionConnection> Content<'t, C> {
    pub(super) fn new(schema: Arc<Schema>, setup: &'t TestSetup<C>, config: &'t Config, target: &Target) -> Self {
        let account = target.shown.split('@').next().unwrap_or_default();
        let place =
            if target.kind == DatabaseKind::Sqlite { String::new() } else { format!("{account}\0{}", target.database) };
        Self { schema, setup, config, kind: target.kind, place }
    }

    /// Equal for contents that make equal databases, in every process. What is code of the program's own counts as another after
    /// each build.
    pub(super) fn hash(&self, surroundings: &Surroundings) -> u64 {
        let mut parts: Vec<&[u8]> = vec![env!("CARGO_PKG_VERSION").as_bytes(), self.kind.name().as_bytes()];
        parts.extend([self.place.as_bytes(), &b"\0"[..], surroundings.facts.as_bytes()]);
        let template = self.setup.template.as_deref().unwrap_or_default();
        parts.extend([&b"\0"[..], template.as_bytes()]);
        for sql in &self.config.on_connect {
            parts.extend([&b"\0"[..], sql.as_bytes()]);
        }
        let functions = self.setup.registrar.functions();
        let functions: Vec<[u8; size_of::<usize>()]> = functions.into_iter().map(usize::to_le_bytes).collect();
        if !functions.is_empty() {
            parts.push(this_build().as_bytes());
            parts.extend(functions.iter().map(|function| &function[..]));
        }
        parts.push(&b"\0"[..]);
        match &self.schema.digest {
            Some(digest) => parts.push(digest.as_bytes()),
            None => parts.push(this_build().as_bytes()),
        }
        for fixture in &self.setup.fixtures {
            parts.extend([&b"\0"[..], fixture.name.as_bytes(), &b"\0"[..]]);
            parts.push(match &fixture.rows {
                Rows::Sql(text) => text.as_bytes(),
                Rows::Function(_) => this_build().as_bytes(),
            });
        }
        fnv1a(parts)
    }

    /// The first thing in it that would not stay in a schema of its own.
    pub(super) fn first_outside_reference(&self) -> Option<String> {
        if let Some((migration, words)) = self.schema.script.first_outside_reference() {
            return Some(format!("migration {migration} has `{words}`"));
        }
        self.setup.fixtures.iter().find_map(|fixture| match &fixture.rows {
            Rows::Sql(text) => outside_reference(text).map(|words| format!("fixture {} has `{words}`", fixture.name)),
            Rows::Function(_) => None,
        })
    }

    /// Fills an empty database, in as few messages as can be: a migration is one, and so is a fixture.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        let script = &self.schema.script;
        match &self.schema.messages {
            Some(messages) => match self.replay(app, messages)? {
                None => {}
                // What MySQL has done of a migration that fails stays done, so the first try is the only one.
                Some((failed, error)) if self.kind == DatabaseKind::Mysql => {
                    let migration = failed.checked_sub(1).and_then(|index| script.name(index));
                    let migration =
                        migration.map_or("the bookkeeping table".into(), |name| format!("migration {name}"));
                    let reason = app.options().target.redact(&error.to_string());
                    let reason = format!("{migration}: {reason}");
                    return Err(Error::TestSetup {
                        test: self.test(),
                        what: "replaying the migrations failed",
                        reason,
                    });
                }
                // Whatever it did not like: this goes on behind what is done, or says which migration it is and why.
                Some(_) => drop(app.create_all()?),
            },
            None if script.versions().next().is_none() => {}
            None => drop(app.create_all()?),
        }
        for fixture in &self.setup.fixtures {
            match &fixture.rows {
                Rows::Sql(text) if self.kind.is_blank(text) => {}
                Rows::Sql(text) => self.send_fixture(app, &fixture.name, text)?,
                Rows::Function(_) => self.run_function(app, fixture)?,
            }
        }
        Ok(())
    }

    /// The names of the PostgreSQL extensions that migrations install.
    pub(super) fn extensions(&self) -> HashSet<String> {
        self.schema.script.texts().flat_map(installed_extensions).collect()
    }

    fn test(&self) -> String {
        self.setup.name.to_string()
    }

    /// The number of the message that failed, and why. Those before it are done.
    fn replay(&self, app: &App<C>, messages: &[String]) -> Result<Option<(usize, diesel::result::Error)>> {
        if messages.is_empty() {
            return Ok(None);
        }
        let mut pooled = app.pool()?.acquire(Location::caller(), false, None)?;
        pooled.managed().marked_dirty = true;
        let mut before = None;
        for (number, message) in messages.iter().enumerate() {
            if let Err(error) = send_alone(pooled.conn(), self.kind, message, &mut before) {
                crate::wording::log_line!(
                    debug,
                    "diesel_session::testing",
                    "test `{}`: message {number} failed: {error}",
                    self.setup.name
                );
                pooled.close_at_checkin();
                return Ok(Some((number, error)));
            }
        }
        Ok(None)
    }

    /// As one transaction, so that nothing that it sets for its transaction reaches the next fixture.
    fn send_fixture(&self, app: &App<C>, name: &str, text: &str) -> Result<()> {
        let send = |sql: &str| -> Result<diesel::QueryResult<()>> {
            let mut pooled = app.pool()?.acquire(Location::caller(), false, None)?;
            pooled.managed().marked_dirty = true;
            let sent = pooled.conn().batch_execute(sql);
            if sent.is_err() {
                pooled.close_at_checkin();
            }
            Ok(sent)
        };
        let sent = match in_one_transaction(text, self.kind).filter(|_| self.kind != DatabaseKind::Postgres) {
            // PostgreSQL takes a message as one transaction.
            None => send(text)?,
            Some(whole) => match send(&whole)? {
                // It may have transactions of its own.
                Err(_) if self.kind == DatabaseKind::Sqlite => send(text)?,
                sent => sent,
            },
        };
        sent.map_err(|error| {
            let reason = format!("{name}: {}", app.options().target.redact(&error.to_string()));
            Error::TestSetup { test: self.test(), what: "a fixture failed", reason }
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
            Err(panic) => Err(format!("it panicked: {}", crate::panic::panic_message(&*panic))),
        };
        outcome.map_err(|reason| {
            let reason = format!("{}: {reason}", fixture.name);
            Error::TestSetup { test: self.test(), what: "a fixture failed", reason }
        })
    }
}

/// Sends the message of a migration. As in `create_all`, what it sets for the session does not reach the next one.
fn send_alone<C: SessionConnection>(
    conn: &mut C,
    kind: DatabaseKind,
    message: &str,
    before: &mut Option<ConnectionSnapshot>,
) -> diesel::QueryResult<()> {
    let text = message.to_lowercase();
    let may_set = ["set", "pragma", "use"].iter().any(|word| text.contains(word));
    if may_set && before.is_none() {
        *before = Some(ConnectionSnapshot::from_rows(conn.texts(kind.snapshot_query())?));
    }
    conn.batch_execute(message)?;
    let Some(before) = before.as_ref().filter(|_| may_set) else { return Ok(()) };
    let now = ConnectionSnapshot::from_rows(conn.texts(kind.snapshot_query())?);
    kind.restore(before, &now).iter().try_for_each(|sql| conn.batch_execute(sql))
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
