//! The properties of the configured database, which the databases of the tests copy.

use std::panic::Location;
use std::time::{Duration, Instant};

use super::test_environment::TestEnvironment;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::kind::DatabaseKind;
use crate::wording::log_line;

/// The maximum wait for a connection to the configured database.
const PATIENCE: Duration = Duration::from_secs(10);

/// The properties of the configured database, as a session of the application sees them. All fields are empty if the
/// database does not exist, and for SQLite.
#[derive(Debug, Default)]
pub(super) struct DatabaseProperties {
    /// The facts on which the result of migrations depends: the role, the settings, and the catalog row of the
    /// database. They are part of the key of a template.
    pub(super) facts: String,
    /// The options of a `CREATE DATABASE`: on PostgreSQL the owner, on MySQL and MariaDB the character set and the
    /// collation.
    pub(super) options: String,
    /// Additional options of a `CREATE DATABASE` that copies no template of the test kit: encoding and locale, if they
    /// differ from those of `template1`.
    pub(super) locale: Option<String>,
    /// Statements that give a new database the settings and rights of the configured database.
    pub(super) settings: Vec<String>,
    /// The role of the application's sessions, as SQL, if `connection_init_sql` or `on_connect` has set a role other
    /// than that of the login.
    pub(super) role: Option<String>,
}

impl DatabaseProperties {
    /// Queries the properties with a temporary connection, which uses one of the slots that the test has reserved.
    pub(super) fn of<C: SessionConnection>(environment: &TestEnvironment<C>, config: &Config) -> Result<Self> {
        let target = &environment.target;
        let Some(facts) = target.kind.schema_environment_query() else { return Ok(Self::default()) };
        let config = Config { max_size: 1, ..config.clone() };
        let app = environment.registrar.make("tests".into(), config, None)?;
        let found: Result<Self> = (|| {
            let mut pooled = app.pool()?.acquire(Location::caller(), false, Some(Instant::now() + PATIENCE))?;
            let facts = texts(pooled.conn(), facts)?.concat();
            let options = texts(pooled.conn(), target.kind.options_of_database())?.concat();
            let mut found = Self { facts, options, ..Self::default() };
            if target.kind == DatabaseKind::Postgres {
                let mut texts = |sql: &str| catalog_texts(pooled.conn(), target.kind, sql);
                found.locale =
                    target.kind.locale_of_database().map(&mut texts).transpose()?.and_then(|mut all| all.pop());
                // The URL may contain no database, so the server is asked for the name.
                let database = texts("SELECT pg_catalog.current_database()::pg_catalog.text AS value")?.concat();
                let settings = target.kind.settings_of_database(&database);
                found.settings = settings.map(|sql| texts(&sql)).transpose()?.unwrap_or_default();
                found.role = texts(OTHER_ROLE)?.pop();
            }
            Ok(found)
        })();
        drop(app.dispose());
        match found {
            // The owner connects to another database in these cases, and reports a wrong password. MySQL and MariaDB
            // refuse an account without rights on the database before they report whether the database exists.
            Err(error) if error.connect_error_kind().is_some_and(ConnectErrorKind::may_hide_missing_database) => {
                log_line!(debug, "diesel_session::testing", "the configured database is not copied from: {error:#}");
                Ok(Self::default())
            }
            found => found,
        }
    }
}

pub(super) fn texts<C: SessionConnection>(conn: &mut C, sql: &str) -> Result<Vec<String>> {
    let answer = conn.texts(sql).map_err(|error| Error::from_query(error, Location::caller()))?;
    Ok(answer.into_iter().flatten().collect())
}

/// The answer to a query of the catalog. It changes the `search_path` of the connection.
pub(super) fn catalog_texts<C: SessionConnection>(conn: &mut C, kind: DatabaseKind, sql: &str) -> Result<Vec<String>> {
    if let Some(path) = kind.texts().catalog_search_path {
        conn.batch_execute(path).map_err(|error| Error::from_query(error, Location::caller()))?;
    }
    texts(conn, sql)
}

const OTHER_ROLE: &str = "SELECT pg_catalog.quote_ident(current_user) AS value WHERE current_user OPERATOR(pg_catalog.<>) session_user \
     AND pg_catalog.pg_has_role(session_user, current_user, 'USAGE')";
