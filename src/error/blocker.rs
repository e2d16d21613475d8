//! The sessions that block a lock.

use std::fmt;
use std::time::Duration;

use super::holder::{Holder, Holders};

/// A session of the database server that was in the way of a lock.
///
/// It is what the server tells the role of this program. PostgreSQL tells exactly who had a lock; of other roles' sessions it
/// tells an ordinary role the number and the name. MariaDB and MySQL tell who is in a transaction to those with the `PROCESS`
/// right; to others they show the account's own sessions in the database, which it need not be one of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Blocker {
    /// The server's number of the session. SQLite has none.
    pub session: Option<u64>,
    /// The application's name (PostgreSQL), or user and host.
    pub name: String,
    /// What it does, such as `idle in transaction`; empty where that is not told.
    pub state: String,
    /// How long it has done so.
    pub state_for: Option<Duration>,
    /// Its last statement, on one line and shortened. MariaDB and MySQL have it of idle sessions only with their performance
    /// schema, and where the role may read that.
    pub last_query: Option<String>,
    /// Who has it, where it is a connection of this process: application, `file:line` and thread.
    pub holder: Option<Holder>,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.session {
            Some(session) => write!(f, "server session {session} ({})", self.name)?,
            None => write!(f, "{}", self.name)?,
        }
        if !self.state.is_empty() {
            write!(f, ", {}", self.state)?;
        }
        if let Some(time) = self.state_for {
            write!(f, " for {time:.1?}")?;
        }
        if let Some(query) = &self.last_query {
            write!(f, ", last statement `{query}`")?;
        }
        match &self.holder {
            Some(holder) => write!(f, ", held here by {holder}"),
            None => Ok(()),
        }
    }
}

/// A list of [`Blocker`]s. It is empty where they had gone before the server was asked, or it does not tell.
#[derive(Debug, Clone, Default)]
pub struct Blockers(Box<[Blocker]>);

impl Blockers {
    /// One of whom nothing more is known.
    pub(crate) fn unknown(name: &str) -> Self {
        let (session, state_for, last_query, holder) = (None, None, None, None);
        Self([Blocker { session, name: name.into(), state: String::new(), state_for, last_query, holder }].into())
    }

    /// Those who are before the caller in a queue of this process.
    pub(crate) fn of_queue(holders: Holders) -> Self {
        let each = holders.0.into_iter().map(|holder| Blocker {
            session: None,
            name: "a writer of this process".into(),
            state: String::new(),
            state_for: None,
            last_query: None,
            holder: Some(holder),
        });
        Self(each.collect())
    }
}

impl FromIterator<Blocker> for Blockers {
    fn from_iter<I: IntoIterator<Item = Blocker>>(each: I) -> Self {
        Self(each.into_iter().collect())
    }
}

impl<'a> IntoIterator for &'a Blockers {
    type Item = &'a Blocker;
    type IntoIter = std::slice::Iter<'a, Blocker>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl std::ops::Deref for Blockers {
    type Target = [Blocker];

    fn deref(&self) -> &[Blocker] {
        &self.0
    }
}

/// A sentence, with a blank after it; nothing where there are none.
impl fmt::Display for Blockers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, blocker) in self.0.iter().enumerate() {
            f.write_str(if n == 0 { "In the way: " } else { "; " })?;
            write!(f, "#{} {blocker}", n + 1)?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_str(". ") }
    }
}
