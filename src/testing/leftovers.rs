//! What dead owners have left on a server: exactly that, and nothing that somebody is in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::names::{Name, PREFIX};
use super::owner::AdminConnection;
use crate::connection::SessionConnection;
use crate::error::Result;
use crate::kind::DatabaseKind;

/// How long the sessions of a process that was killed are waited for: the server ends them when it finds nobody there.
const LAST_SESSIONS: Duration = Duration::from_secs(2);

/// How many tables are removed in one transaction. Each may have some indexes and sequences, which need locks too.
const AT_A_TIME: usize = 50;

/// How many contents are kept in templates and pinned connections. A build of a program with other migrations makes another.
pub(super) const KEPT: usize = 8;

impl<C: SessionConnection> AdminConnection<C> {
    /// Removes what is left of tests whose owners are dead.
    pub(super) fn sweep(&mut self) -> Result<()> {
        let kind = self.kind();
        // Before its owner is looked for: whoever makes a database has claimed its number before.
        let databases = self.made_for_tests(&kind.databases(PREFIX))?;
        let schemas =
            if kind == DatabaseKind::Postgres { self.made_for_tests(&kind.schemas(PREFIX))? } else { Vec::new() };
        let mut lives = HashMap::from([(self.number(), true)]);
        let deadline = Instant::now() + LAST_SESSIONS;
        for (text, name) in databases {
            if self.is_orphan(name, &mut lives)? && self.is_empty_by(&text, deadline)? {
                self.remove(&text);
            }
        }
        for (text, name) in schemas {
            if self.is_orphan(name, &mut lives)? {
                let removed = self.drop_schema(&text);
                note(&text, removed);
            }
        }
        Ok(())
    }

    /// Removes a schema. One statement needs a lock for each table, and the server has so many: with more tables they go some at a time
    /// before it.
    pub(super) fn drop_schema(&mut self, name: &str) -> Result<()> {
        let drop_it = format!("DROP SCHEMA IF EXISTS {} CASCADE", self.kind().quote(name));
        let Err(error) = self.send(&drop_it) else { return Ok(()) };
        let removals = self.texts(&self.kind().removals_in_schema(name))?;
        if removals.len() < AT_A_TIME {
            return Err(error);
        }
        for some in removals.chunks(AT_A_TIME) {
            self.send(&some.join("; "))?;
        }
        self.send(&drop_it)
    }

    /// Removes the oldest of what is kept, where that is much, and nobody is in it.
    pub(super) fn prune(&mut self, in_use: &[u64]) -> Result<()> {
        let all = self.texts(&self.kind().databases(PREFIX))?;
        let kept = |text: &String| match Name::parse(text) {
            Some(Name::Template { content } | Name::Rollback { content, .. }) => Some((content, text.clone())),
            _ => None,
        };
        let all: Vec<(u64, String)> = all.iter().filter_map(kept).collect();
        let mut contents: Vec<u64> = Vec::new();
        for (content, _) in &all {
            if !contents.contains(content) {
                contents.push(*content);
            }
        }
        contents.retain(|content| !in_use.contains(content));
        let surplus = contents.len().saturating_sub(KEPT - 1);
        for (content, text) in all {
            if contents[..surplus].contains(&content) && self.is_empty_by(&text, Instant::now())? {
                self.remove(&text);
            }
        }
        Ok(())
    }

    /// Removes every template and pinned that nobody is in; the number removed.
    pub(super) fn remove_kept(&mut self) -> Result<usize> {
        let all = self.texts(&self.kind().databases(PREFIX))?;
        let mut removed = 0;
        for text in all.iter().filter(|text| Name::parse(text).is_some_and(Name::is_kept)) {
            if self.is_empty_by(text, Instant::now() + LAST_SESSIONS)? {
                self.send(&self.kind().drop_database(text))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Waits until nobody is in a database; whether that is so. A server that is asked to drop one in which a session is still
    /// ending sleeps for 100 ms before it looks again.
    pub(super) fn is_empty_by(&mut self, database: &str, deadline: Instant) -> Result<bool> {
        let question = self.kind().sessions_in(database);
        loop {
            if self.texts(&question)?.is_empty() {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn made_for_tests(&mut self, question: &str) -> Result<Vec<(String, Name)>> {
        let found = self.texts(question)?;
        Ok(found.into_iter().filter_map(|text| Name::parse(&text).map(|name| (text, name))).collect())
    }

    fn is_orphan(&mut self, name: Name, lives: &mut HashMap<u32, bool>) -> Result<bool> {
        let Name::Test { owner, .. } = name else { return Ok(false) };
        if let Some(lives) = lives.get(&owner) {
            return Ok(!lives);
        }
        let alive = self.is_true(&self.kind().owner_is_alive_query(owner))?;
        lives.insert(owner, alive);
        Ok(!alive)
    }

    /// Another process may be at it too.
    fn remove(&mut self, database: &str) {
        let removed = self.send(&self.kind().drop_database(database));
        note(database, removed);
    }
}

fn note(what: &str, removed: Result<()>) {
    match removed {
        Ok(()) => crate::wording::log_line!(info, "diesel_session::testing", "removed {what}, whose tests are dead"),
        Err(error) => crate::wording::log_line!(
            warn,
            "diesel_session::testing",
            "{what} is left from tests that are dead: {error}"
        ),
    }
}
