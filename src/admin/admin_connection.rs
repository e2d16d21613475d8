//! The connection to a server that creates and drops databases. It is connected to another database.

use std::time::{Duration, Instant};

use diesel::result::QueryResult;

use super::database_url::with_database;
use crate::app::App;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{ConnectErrorKind, Details, Error, NO_APP, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::CheckedOut;
use crate::url::Target;

/// The connection to a server that creates and drops databases.
pub(crate) struct AdminConnection<C: SessionConnection> {
    pooled: CheckedOut<C>,
    kind: DatabaseKind,
    /// The call of the program.
    at: SourceLocation,
}

/// The URLs of databases that exist on an ordinary server, except for the database of `target`.
///
/// # Errors
/// The reason, if the URL names its database in a way that another URL cannot replace.
pub(crate) fn admin_urls(target: &Target) -> Result<Vec<String>, String> {
    let databases: &[&str] = match target.kind {
        DatabaseKind::Postgres => &["postgres", "template1"],
        DatabaseKind::Mysql => &[""],
        DatabaseKind::Sqlite => &[],
    };
    let others = databases.iter().filter(|database| **database != target.database);
    others.map(|database| with_database(target, database)).collect()
}

/// The configuration of an application with one connection to the database at `url`, with the timeout of `config`.
pub(crate) fn admin_config(url: String, config: &Config) -> Config {
    Config::new(url)
        .behind(config.behind)
        .max_size(1)
        .connect_timeout(config.connect_timeout)
        .idle_timeout(None)
        .max_lifetime(None)
        .leak_threshold(None)
        .wal(false)
}

impl<C: SessionConnection> AdminConnection<C> {
    /// Connects by the first application whose database exists.
    pub(crate) fn connect(apps: &[App<C>], at: SourceLocation, limit: Option<Instant>) -> Result<Self> {
        let mut first_error = None;
        for app in apps {
            match app.core().pool_for(at)?.acquire(at, false, limit) {
                // An enum of connections does not report that a database does not exist. MySQL and MariaDB refuse an
                // account without rights on the database before they report whether the database exists.
                Err(error) if error.connect_error_kind().is_some_and(ConnectErrorKind::may_hide_missing_database) => {
                    first_error.get_or_insert(error);
                }
                outcome => {
                    let mut admin = Self { pooled: outcome?, kind: app.options().target.kind, at };
                    if let Some(sql) = admin.kind.texts().catalog_search_path {
                        admin.execute(sql)?;
                    }
                    return Ok(admin);
                }
            }
        }
        let none =
            || Error::from(Details::InvalidConfig { app: NO_APP.into(), reason: "no database can be reached".into() });
        Err(first_error.unwrap_or_else(none))
    }

    #[cfg(feature = "testing")]
    pub(crate) fn kind(&self) -> DatabaseKind {
        self.kind
    }

    /// The number of connections that the server allows an ordinary role, or 0 if the server has not reported it.
    #[cfg(feature = "testing")]
    pub(crate) fn capacity(&self) -> usize {
        self.pooled.pool.capacity()
    }

    pub(crate) fn is_lost(&mut self) -> bool {
        self.pooled.managed().lost
    }

    pub(crate) fn execute(&mut self, sql: &str) -> Result<()> {
        let sent = self.pooled.conn().batch_execute(sql);
        self.convert_error(sent)
    }

    pub(crate) fn query_texts(&mut self, sql: &str) -> Result<Vec<String>> {
        let answer = self.pooled.conn().texts(sql);
        Ok(self.convert_error(answer)?.into_iter().flatten().collect())
    }

    pub(crate) fn query_bool(&mut self, sql: &str) -> Result<bool> {
        Ok(self.query_texts(sql)?.first().is_some_and(|answer| answer == "1"))
    }

    /// Waits until a database has no session, and returns `false` if the deadline passes. Without this wait, a `DROP
    /// DATABASE` that finds an ending session sleeps for 100 ms before it checks again.
    pub(crate) fn wait_until_unused(&mut self, database: &str, deadline: Instant) -> Result<bool> {
        let question = self.kind.sessions_in(database);
        loop {
            if self.query_texts(&question)?.is_empty() {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn convert_error<T>(&mut self, outcome: QueryResult<T>) -> Result<T> {
        outcome.map_err(|error| {
            let managed = self.pooled.managed();
            managed.lost |= dialect::is_connection_lost(&error);
            managed.closes_at_checkin |= managed.lost;
            Error::from_query(error, self.at)
        })
    }
}
