//! The removal of databases and schemas that dead owners have left on a server. A database that has sessions is never
//! removed.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::owner::OwnerConnection;
use crate::admin::{GeneratedName, PREFIX};
use crate::connection::SessionConnection;
use crate::error::Result;
use crate::kind::DatabaseKind;
use crate::wording::log_line;

/// How long the removal waits for the sessions of a killed process. The server ends such a session when it notices that
/// the client is gone.
const SESSIONS_OF_KILLED_PROCESSES: Duration = Duration::from_secs(2);

/// The number of tables that one transaction drops. The indexes and sequences of a table need locks too.
const TABLES_PER_TRANSACTION: usize = 50;

/// The number of template contents that are kept, in templates and in rollback databases. A build with other migrations
/// adds one.
pub(super) const KEPT_CONTENTS: usize = 8;

impl<C: SessionConnection> OwnerConnection<C> {
    /// Removes the databases and schemas of tests whose owners are dead.
    pub(super) fn remove_orphans(&mut self) -> Result<()> {
        let kind = self.kind();
        // The list is read before the owners are checked: an owner claims its number before it creates a database.
        let databases = self.generated_objects(&kind.databases(PREFIX))?;
        let schemas =
            if kind == DatabaseKind::Postgres { self.generated_objects(&kind.schemas(PREFIX))? } else { Vec::new() };
        let mut owners_alive = HashMap::from([(self.owner_number, true)]);
        let deadline = Instant::now() + SESSIONS_OF_KILLED_PROCESSES;
        for (text, name) in databases {
            if self.owner_is_dead(name, &mut owners_alive)? && self.wait_until_unused(&text, deadline)? {
                log_removal(&text, self.execute(&kind.drop_database(&text)));
            }
        }
        for (text, name) in schemas {
            if self.owner_is_dead(name, &mut owners_alive)? {
                log_removal(&text, self.drop_schema(&text));
            }
        }
        Ok(())
    }

    /// Removes a schema. `DROP SCHEMA` needs a lock for each table, and the number of locks is limited. If the
    /// statement fails and the schema has many tables, the method first drops the tables in several transactions.
    pub(super) fn drop_schema(&mut self, name: &str) -> Result<()> {
        let kind = self.kind();
        let statement = format!("DROP SCHEMA IF EXISTS {} CASCADE", kind.quote(name));
        let Err(error) = self.execute(&statement) else { return Ok(()) };
        let removals = self.query_texts(&kind.removals_in_schema(name))?;
        if removals.len() < TABLES_PER_TRANSACTION {
            return Err(error);
        }
        for some in removals.chunks(TABLES_PER_TRANSACTION) {
            self.execute(&some.join("; "))?;
        }
        self.execute(&statement)
    }

    /// Removes templates and rollback databases, the oldest contents first, if there are more contents than are kept.
    /// The contents `in_use` and databases with sessions remain.
    pub(super) fn prune(&mut self, in_use: &[u64]) -> Result<()> {
        let kind = self.kind();
        let databases = self.generated_objects(&kind.databases(PREFIX))?;
        let of_contents = |(text, name): (String, GeneratedName)| Some((name.contents_hash()?, text));
        let databases: Vec<(u64, String)> = databases.into_iter().filter_map(of_contents).collect();
        let mut contents: Vec<u64> = Vec::new();
        for (contents_hash, _) in &databases {
            if !contents.contains(contents_hash) && !in_use.contains(contents_hash) {
                contents.push(*contents_hash);
            }
        }
        contents.truncate(contents.len().saturating_sub(KEPT_CONTENTS - 1));
        for (contents_hash, text) in databases {
            if contents.contains(&contents_hash) && self.wait_until_unused(&text, Instant::now())? {
                log_removal(&text, self.execute(&kind.drop_database(&text)));
            }
        }
        Ok(())
    }

    /// Removes every template and rollback database that has no session. Returns the number of removed databases.
    pub(super) fn remove_kept(&mut self) -> Result<usize> {
        let kind = self.kind();
        let mut removed = 0;
        for (text, name) in self.generated_objects(&kind.databases(PREFIX))? {
            if name.contents_hash().is_some()
                && self.wait_until_unused(&text, Instant::now() + SESSIONS_OF_KILLED_PROCESSES)?
            {
                self.execute(&kind.drop_database(&text))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn generated_objects(&mut self, question: &str) -> Result<Vec<(String, GeneratedName)>> {
        let found = self.query_texts(question)?;
        Ok(found.into_iter().filter_map(|text| GeneratedName::parse(&text).map(|name| (text, name))).collect())
    }

    /// Whether `name` belongs to a test whose owner is dead. `owners_alive` caches the server's answers.
    fn owner_is_dead(&mut self, name: GeneratedName, owners_alive: &mut HashMap<u32, bool>) -> Result<bool> {
        let GeneratedName::Test { owner, .. } = name else { return Ok(false) };
        let is_alive = match owners_alive.get(&owner) {
            Some(is_alive) => *is_alive,
            None => {
                let query = self.kind().owner_is_alive_query(owner);
                self.query_bool(&query)?
            }
        };
        owners_alive.insert(owner, is_alive);
        Ok(!is_alive)
    }
}

/// Logs the removal of a database or schema. A failure is only logged, because another process may remove it at the same
/// time.
fn log_removal(name: &str, removed: Result<()>) {
    match removed {
        Ok(()) => log_line!(info, "diesel_session::testing", "removed {name}, whose tests are dead"),
        Err(error) => log_line!(warn, "diesel_session::testing", "{name} is left from tests that are dead: {error:#}"),
    }
}
