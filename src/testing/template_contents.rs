//! The contents of a test's database when the test begins: the schema and the fixtures.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;

use super::database_properties::DatabaseProperties;
use super::fixture::FixtureSource;
use super::provisioner::Provisioner;
use super::script::{hash_of_fields, outside_reference};
use crate::app::{App, ErasedApp};
use crate::connection::SessionConnection;
use crate::context;
use crate::error::{Details, Error, Result};
use crate::kind::DatabaseKind;
use crate::session::Session;

impl<C: SessionConnection> Provisioner<'_, C> {
    /// The same in every process for contents that create equal databases. If the contents include functions of the
    /// program, the hash depends on the build.
    ///
    /// The account is part of the hash, because one account may have no access to the templates of another one.
    pub(super) fn hash_of_contents(&self, properties: &DatabaseProperties) -> u64 {
        let target = &self.environment.target;
        let (account, database) = match target.kind {
            DatabaseKind::Sqlite => ("", ""),
            DatabaseKind::Postgres | DatabaseKind::Mysql => {
                (target.shown.split('@').next().unwrap_or_default(), &*target.database)
            }
        };
        let schema = self.environment.schema.digest;
        let functions = self.setup.registrar.functions();
        let mut depends_on_build = schema.is_none() || !functions.is_empty();
        let numbers = format!("{:?} {functions:?}", schema.unwrap_or_default());
        let template = self.setup.template.as_deref().unwrap_or_default();
        let mut fields = vec![
            env!("CARGO_PKG_VERSION"),
            target.kind.name(),
            account,
            database,
            &properties.facts,
            template,
            &numbers,
        ];
        fields.extend(self.config.connection_init_sql.iter().map(String::as_str));
        for fixture in &self.setup.fixtures {
            fields.extend(["", &fixture.name]);
            match &fixture.rows {
                FixtureSource::Sql(text) => fields.push(text),
                FixtureSource::Function(_) => depends_on_build = true,
            }
        }
        if depends_on_build {
            fields.push(build_id());
        }
        hash_of_fields(fields)
    }

    /// The first migration or fixture that refers to something outside the schema.
    pub(super) fn first_outside_reference(&self) -> Option<String> {
        if let Some((migration, words)) = self.environment.schema.first_outside_reference() {
            return Some(format!("migration {migration} has `{words}`"));
        }
        self.setup.fixtures.iter().find_map(|fixture| match &fixture.rows {
            FixtureSource::Sql(text) => {
                outside_reference(text).map(|words| format!("fixture {} has `{words}`", fixture.name))
            }
            FixtureSource::Function(_) => None,
        })
    }

    /// Fills an empty database.
    pub(super) fn fill(&self, app: &App<C>) -> Result<()> {
        if self.environment.schema.has_source {
            app.create_all_unlocked(Location::caller()).map_err(|error| self.with_advice(app, error))?;
        }
        for fixture in &self.setup.fixtures {
            let inserted = match &fixture.rows {
                FixtureSource::Sql(text) if self.kind().is_blank(text) => Ok(()),
                FixtureSource::Sql(text) => {
                    let sent = self.send_fixture(app, text)?;
                    sent.map_err(|error| app.options().target.redact(&error.to_string()))
                }
                FixtureSource::Function(run) => run_function(app, *run),
            };
            inserted.map_err(|reason| self.setup_error("a fixture failed", format!("{}: {reason}", fixture.name)))?;
        }
        Ok(())
    }

    /// Sends a fixture as one transaction, so that transaction settings of the fixture do not reach the next one.
    fn send_fixture(&self, app: &App<C>, text: &str) -> Result<diesel::QueryResult<()>> {
        let send = |texts: &[&str]| -> Result<diesel::QueryResult<()>> {
            let mut pooled = app.pool()?.acquire(Location::caller(), false, None)?;
            pooled.managed().marked_dirty = true;
            let sent = texts.iter().try_for_each(|sql| pooled.conn().batch_execute(sql));
            if sent.is_err() {
                pooled.close_at_checkin();
            }
            Ok(sent)
        };
        match self.kind() {
            // PostgreSQL executes a message as one transaction.
            DatabaseKind::Postgres => send(&[text]),
            DatabaseKind::Mysql => send(&["BEGIN", text, "COMMIT"]),
            DatabaseKind::Sqlite => match send(&["BEGIN IMMEDIATE", text, "COMMIT"])? {
                // The text may contain transaction statements.
                Err(_) => send(&[text]),
                sent => Ok(sent),
            },
        }
    }

    /// If a migration installs an extension that the role must not install, the error names the extension.
    fn with_advice(&self, app: &App<C>, error: Error) -> Error {
        let mut failure = match error.into_details() {
            Details::Migration(failure) => failure.in_test_database(),
            other => return other.into(),
        };
        if self.kind() == DatabaseKind::Postgres {
            let forbidden = self.catalog_texts(app, self.kind().forbidden_extensions()).unwrap_or_default();
            let words: HashSet<&str> =
                failure.message.split(|c: char| !c.is_alphanumeric() && !"_-".contains(c)).collect();
            let forbidden = forbidden.iter().find(|name| words.contains(name.as_str()));
            failure.advice = forbidden.map(|extension| {
                format!(
                    "This role may not install the extension `{extension}`, and a test's database is made anew: let an administrator \
                     install it in `template1`, or in a database that `TestSetup::template` names"
                )
            });
        }
        Details::Migration(failure).into()
    }
}

/// Runs a fixture that is a function. The caller has to remove the incomplete database also if the function panics.
fn run_function<C: SessionConnection>(app: &App<C>, run: fn(&Session<C>) -> Result<()>) -> Result<(), String> {
    let at = Location::caller();
    let run_in_transaction = || {
        app.run(|| {
            let session = context::session(app.inner().database(), at, |_| Err(Details::NoContext { at }.into()))?;
            run(&session)
        })
    };
    match catch_unwind(AssertUnwindSafe(run_in_transaction)) {
        Ok(outcome) => outcome.map_err(|error: Error| format!("{error:#}")),
        Err(panic) => Err(format!("it panicked: {}", crate::panic::panic_message(&*panic))),
    }
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
