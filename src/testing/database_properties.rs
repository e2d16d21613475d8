//! What the configured database is like, for the databases that are made to be like it.

use std::panic::Location;
use std::time::{Duration, Instant};

use super::test_environment::TestEnvironment;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::dialect::NAME_PLACEHOLDER;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;

/// The longest wait for a connection to the configured database.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an application's session finds in the configured database. Nothing if that is not there, and for SQLite.
#[derive(Debug, Default)]
pub(super) struct DatabaseProperties {
    /// All that decides what migrations make: the role, the settings, and the database's properties. Part of a template's key.
    pub(super) facts: String,
    /// The options of a `CREATE DATABASE` that copies a template: the owner; elsewhere character set and collation.
    pub(super) options: String,
    /// Further options of one that copies none: encoding and locale, if they differ from those of `template1`.
    pub(super) locale: Option<String>,
    /// Statements that give a new database the configured one's settings and rights.
    pub(super) settings: Vec<String>,
    /// The role of the application's sessions, as SQL, if `on_connect` made it another than the login's.
    pub(super) role: Option<String>,
}

impl DatabaseProperties {
    /// Looks by a connection of its own, which is closed again: it takes one of the connections that the test has reserved.
    pub(super) fn of<C: SessionConnection>(environment: &TestEnvironment<C>, config: &Config) -> Result<Self> {
        let target = &environment.target;
        let Some(facts) = target.kind.schema_environment_query() else { return Ok(Self::default()) };
        let config = Config { max_size: 1, ..config.clone() };
        let app = environment.registrar.make("tests".into(), config, None)?;
        let found = (|| {
            let mut pooled = app.pool()?.acquire(Location::caller(), false, Some(Instant::now() + PATIENCE))?;
            let facts = texts_of(pooled.conn(), facts)?.concat();
            let options = texts_of(pooled.conn(), target.kind.options_of_database())?.concat();
            if let Some(sql) = target.kind.catalog_search_path() {
                pooled.conn().batch_execute(sql).map_err(|error| Error::from_query(error, Location::caller()))?;
            }
            let mut texts = |sql: &str| texts_of(pooled.conn(), sql);
            let (mut locale, mut settings, mut role) = (None, Vec::new(), None);
            if target.kind == DatabaseKind::Postgres {
                locale = target
                    .kind
                    .locale_of_database()
                    .map(&mut texts)
                    .transpose()?
                    .and_then(|found| found.into_iter().next());
                // The URL may leave the database's name to a default.
                let database = texts("SELECT pg_catalog.current_database()::pg_catalog.text AS value")?.concat();
                settings =
                    target.kind.settings_of_database(&database).map(|sql| texts(&sql)).transpose()?.unwrap_or_default();
                role = texts(OTHER_ROLE)?.into_iter().next();
            }
            Ok(Self { facts, options, locale, settings, role })
        })();
        drop(app.dispose());
        match found {
            // The kit's own session takes another database then. MySQL and MariaDB refuse an account that has no right to the
            // database before they say whether there is one. A wrong password is an error of the kit's own session.
            Err(Error::Connect {
                kind: ConnectErrorKind::UnknownDatabase | ConnectErrorKind::Authentication | ConnectErrorKind::Other,
                message,
                ..
            }) => {
                crate::wording::log_line!(
                    debug,
                    "diesel_session::testing",
                    "the configured database is not copied from: {message}"
                );
                Ok(Self::default())
            }
            found => found,
        }
    }
}

fn texts_of<C: SessionConnection>(conn: &mut C, sql: &str) -> Result<Vec<String>> {
    let answer = conn.texts(sql).map_err(|error| Error::from_query(error, Location::caller()))?;
    Ok(answer.into_iter().flatten().collect())
}

const OTHER_ROLE: &str = "SELECT pg_catalog.quote_ident(current_user) AS value WHERE current_user OPERATOR(pg_catalog.<>) session_user \
     AND pg_catalog.pg_has_role(session_user, current_user, 'USAGE')";

/// Statements for a database of that name, which is quoted.
pub(super) fn for_database(settings: &[String], quoted: &str) -> Vec<String> {
    settings.iter().map(|sql| sql.replace(NAME_PLACEHOLDER, quoted)).collect()
}
