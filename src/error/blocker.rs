//! The sessions that block a lock.

use std::fmt;
use std::time::Duration;

use super::holder::{Holder, Holders};

/// A session on the database server that blocked a lock, or on PostgreSQL a prepared transaction, which no session has.
///
/// The server reports only what the role of this program may see. PostgreSQL reports exactly the transactions that held
/// a lock. Of another role's session, it reports only the id and the name to an ordinary role. MariaDB and MySQL report
/// all sessions in a transaction to an account with the `PROCESS` privilege. For other accounts, they report the
/// account's own sessions in the database, which need not include the blocking session.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Blocker {
    /// The id of the session on the server. SQLite and a prepared transaction have none.
    pub session: Option<u64>,
    /// The name of the application on PostgreSQL, or the identifier and the owner of a prepared transaction. Otherwise
    /// the user and the host.
    pub name: String,
    /// The state of the session, such as `idle in transaction`. Empty if the server does not report it.
    pub state: String,
    /// The time for which the session has been in this state.
    pub state_for: Option<Duration>,
    /// The last statement of the session, shortened and on one line. MariaDB and MySQL report it for idle sessions
    /// only if their performance schema is enabled and the role may read it.
    pub last_query: Option<String>,
    /// The holder, if the session belongs to a connection of this process.
    pub holder: Option<Holder>,
}

impl Blocker {
    fn named(name: &str, holder: Option<Holder>) -> Self {
        let (session, state_for, last_query) = (None, None, None);
        Self { session, name: name.into(), state: String::new(), state_for, last_query, holder }
    }
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

/// A list of [`Blocker`]s. It is empty if the blockers ended before the server was asked, or if the server does not
/// report them.
#[derive(Debug, Clone, Default)]
pub struct Blockers(Box<[Blocker]>);

impl Blockers {
    /// A list with one blocker of which only the name is known.
    pub(crate) fn unknown(name: &str) -> Self {
        [Blocker::named(name, None)].into_iter().collect()
    }

    /// The holders that are before the caller in a queue of this process.
    pub(crate) fn of_queue(holders: Holders) -> Self {
        holders.0.into_iter().map(|holder| Blocker::named("a writer of this process", Some(holder))).collect()
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

/// A sentence with a space after it, or nothing if the list is empty.
impl fmt::Display for Blockers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        f.write_str("In the way: ")?;
        super::holder::write_list(f, self)?;
        f.write_str(". ")
    }
}
