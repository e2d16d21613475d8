//! The contents of a test's database when the test begins: the schema and the fixtures.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::UNIX_EPOCH;

use super::database_properties::DatabaseProperties;
use super::fixture::{Fixture, FixtureSource};
use super::script::{Script, in_one_transaction, installed_extensions, outside_reference};
use super::test_setup::TestSetup;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::context::{self, Current};
use crate::dialect::{ConnectionSnapshot, fnv1a};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;
use crate::url::Target;

/// The SQL of the migrations of a database object.
pub(super) struct PreparedScript {
    pub(super) script: Script,
    messages: Option<Vec<String>>,
    digest: Option<String>,
}

impl PreparedScript {
    pub(super) fn new(script: Script, kind: DatabaseKind) -> Self {
        let (messages, digest) = (script.messages(kind), script.digest());
        Self { script, messages, digest }
    }
}

/// The schema and the fixtures of a test.
pub(super) struct TemplateContents<'t, C: SessionConnection> {
    pub(super) schema: Arc<PreparedScript>,
    setup: &'t TestSetup<C>,
    config: &'t Config,
    kind: DatabaseKind,
    /// Part of the hash, because one account may have no access to the templates of another one, and databases differ.
    account_and_database: String,
}

impl<'t, C: SessionConnection> TemplateContents<'t, C> {
    pub(super) fn new(
        schema: Arc<PreparedScript>,
        setup: &'t TestSetup<C>,
        config: &'t Config,
        target: &Target,
    ) -> Self {
        let account = target.shown.split('@').next().unwrap_or_default();
        let account_and_database =
            if target.kind == DatabaseKind::Sqlite { String::new() } else { format!("{account}\0{}", target.database) };
        Self { schema, setup, config, kind: target.kind, account_and_database }
    }

    /// The same in every process for contents that create equal databases. If the contents include functions of the
    /// program, the hash depends on the build.
    pub(super) fn hash(&self, properties: &DatabaseProperties) -> u64 {
        let mut parts: Vec<&[u8]> = vec![env!("CARGO_PKG_VERSION").as_bytes(), self.kind.name().as_bytes()];
        parts.extend([self.account_and_database.as_bytes(), &b"\0"[..], properties.facts.as_bytes()]);
        let template = self.setup.template.as_deref().unwrap_or_default();
        parts.extend([&b"\0"[..], template.as_bytes()]);
        for sql in &self.config.on_connect {
            parts.extend([&b"\0"[..], sql.as_bytes()]);
        }
        let functions = self.setup.registrar.functions();
        let functions: Vec<[u8; size_of::<usize>()]> = functions.into_iter().map(usize::to_le_bytes).collect();
        if !functions.is_empty() {
            parts.push(build_id().as_bytes());
            parts.extend(functions.iter().map(|function| &function[..]));
        }
        parts.push(&b"\0"[..]);
        match &self.schema.digest {
            Some(digest) => parts.push(digest.as_bytes()),
            None => parts.push(build_id().as_bytes()),
        }
        for fixture in &self.setup.fixtures {
            parts.extend([&b"\0"[..], fixture.name.as_bytes(), &b"\0"[..]]);
            parts.push(match &fixture.rows {
                FixtureSource::Sql(text) => text.as_bytes(),
                FixtureSource::Function(_) => build_id().as_bytes(),
            });
        }
        fnv1a(parts)
    }

    /// The first migration or fixture that refers to something outside the schema.
    pub(super) fn first_outside_reference(&self) -> Option<String> {
        if let Some((migration, words)) = self.schema.script.first_outside_reference() {
            return Some(format!("migration {migration} has `{words}`"));
        }
        self.setup.fixtures.iter().find_map(|fixture| match &fixture.rows {
            FixtureSource::Sql(text) => {
                outside_reference(text).map(|words| format!("fixture {} has `{words}`", fixture.name))
            }
            FixtureSource::Function(_) => None,
        })
    }

    /// Fills an empty database. Each migration is one message, and so is each fixture.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        let script = &self.schema.script;
        match &self.schema.messages {
            Some(messages) => match self.replay(app, messages)? {
                None => {}
                // MySQL does not roll back a failed migration, so there is no second attempt.
                Some((failed, error)) if self.kind == DatabaseKind::Mysql => {
                    let migration = failed.checked_sub(1).and_then(|index| script.name(index));
                    let migration =
                        migration.map_or("the bookkeeping table".into(), |name| format!("migration {name}"));
                    let reason = app.options().target.redact(&error.to_string());
                    let reason = format!("{migration}: {reason}");
                    return Err(Error::TestSetup {
                        test: self.test_name(),
                        what: "replaying the migrations failed",
                        reason,
                    });
                }
                // `create_all` continues after the recorded migrations, or reports the migration that fails.
                Some(_) => drop(app.create_all()?),
            },
            None if script.versions().next().is_none() => {}
            None => drop(app.create_all()?),
        }
        for fixture in &self.setup.fixtures {
            match &fixture.rows {
                FixtureSource::Sql(text) if self.kind.is_blank(text) => {}
                FixtureSource::Sql(text) => self.send_fixture(app, &fixture.name, text)?,
                FixtureSource::Function(_) => self.run_function(app, fixture)?,
            }
        }
        Ok(())
    }

    /// The names of the PostgreSQL extensions that migrations install.
    pub(super) fn extensions(&self) -> HashSet<String> {
        self.schema.script.texts().flat_map(installed_extensions).collect()
    }

    fn test_name(&self) -> String {
        self.setup.name.to_string()
    }

    /// Sends the messages. The result is the index of the message that failed, with its error. The earlier messages
    /// have taken effect.
    fn replay(&self, app: &App<C>, messages: &[String]) -> Result<Option<(usize, diesel::result::Error)>> {
        if messages.is_empty() {
            return Ok(None);
        }
        let mut pooled = app.pool()?.acquire(Location::caller(), false, None)?;
        pooled.managed().marked_dirty = true;
        let mut before = None;
        for (index, message) in messages.iter().enumerate() {
            if let Err(error) = send_migration(pooled.conn(), self.kind, message, &mut before) {
                crate::wording::log_line!(
                    debug,
                    "diesel_session::testing",
                    "test `{}`: message {index} failed: {error}",
                    self.setup.name
                );
                pooled.close_at_checkin();
                return Ok(Some((index, error)));
            }
        }
        Ok(None)
    }

    /// Sends a fixture as one transaction, so that transaction settings of the fixture do not reach the next one.
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
            // PostgreSQL executes a message as one transaction.
            None => send(text)?,
            Some(whole) => match send(&whole)? {
                // The text may contain transaction statements.
                Err(_) if self.kind == DatabaseKind::Sqlite => send(text)?,
                sent => sent,
            },
        };
        sent.map_err(|error| {
            let reason = format!("{name}: {}", app.options().target.redact(&error.to_string()));
            Error::TestSetup { test: self.test_name(), what: "a fixture failed", reason }
        })
    }

    fn run_function(&self, app: &App<C>, fixture: &Fixture<C>) -> Result<()> {
        let FixtureSource::Function(run) = fixture.rows else { return Ok(()) };
        let at = Location::caller();
        let run_in_transaction = || {
            app.scope().commit_on_ok().run(|| {
                let session = context::session(app.database(), at, |current| match current {
                    Current::Entered(app) => Ok(app),
                    Current::SameId(_) => Err(Error::NoContext { at }),
                })?;
                run(&session)
            })
        };
        // The caller has to remove the incomplete database also if the function panics.
        let outcome = match catch_unwind(AssertUnwindSafe(run_in_transaction)) {
            Ok(outcome) => outcome.map_err(|error: Error| error.to_string()),
            Err(panic) => Err(format!("it panicked: {}", crate::panic::panic_message(&*panic))),
        };
        outcome.map_err(|reason| {
            let reason = format!("{}: {reason}", fixture.name);
            Error::TestSetup { test: self.test_name(), what: "a fixture failed", reason }
        })
    }
}

/// Sends the message of a migration and then restores the session's settings, as `create_all` does, so that they do not
/// reach the next migration.
fn send_migration<C: SessionConnection>(
    conn: &mut C,
    kind: DatabaseKind,
    message: &str,
    before: &mut Option<ConnectionSnapshot>,
) -> diesel::QueryResult<()> {
    let text = message.to_lowercase();
    let may_change_settings = ["set", "pragma", "use"].iter().any(|word| text.contains(word));
    if may_change_settings && before.is_none() {
        *before = Some(ConnectionSnapshot::from_rows(conn.texts(kind.snapshot_query())?));
    }
    conn.batch_execute(message)?;
    let Some(before) = before.as_ref().filter(|_| may_change_settings) else { return Ok(()) };
    let now = ConnectionSnapshot::from_rows(conn.texts(kind.snapshot_query())?);
    kind.restore(before, &now).iter().try_for_each(|sql| conn.batch_execute(sql))
}

/// A text that differs between builds of this program.
fn build_id() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let Ok(path) = std::env::current_exe() else { return "unknown".into() };
        let metadata = std::fs::metadata(&path).ok();
        let modified = metadata.as_ref().and_then(|metadata| metadata.modified().ok());
        let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map(|time| time.as_nanos());
        format!("{} {:?} {modified:?}", path.display(), metadata.map(|metadata| metadata.len()))
    })
}
