//! Who was in the way of a lock.

use std::fmt;
use std::time::Duration;

use super::holder::{Holder, Holders};
use super::{AppPool, CheckedOut};
use crate::backend::BETWEEN;
use crate::connection::SessionConnection;
use crate::url::Target;
use crate::wording::phrase;

/// Characters of a statement that are shown.
const SHOWN: usize = 120;

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
    /// Those who are before the caller in a queue of this process.
    pub(super) fn of_queue(holders: Holders) -> Self {
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

impl<C: SessionConnection> CheckedOut<C> {
    /// Asks for blockers with the first of the queries that is answered. An open transaction is rolled back before.
    pub(crate) fn blockers(&mut self, queries: &[String]) -> Blockers {
        let conn = self.conn();
        while conn.depth().is_some_and(|depth| depth > 0) {
            if conn.rollback_level().is_err() {
                return Blockers::default();
            }
        }
        let Some(rows) = queries.iter().find_map(|sql| conn.texts(sql).ok()) else { return Blockers::default() };
        let ours = self.pool().sessions_of_this_process();
        let target = &self.pool().storage.spec.target;
        let each = rows.into_iter().flatten().filter_map(|row| read(&row, target));
        Blockers(each.filter_map(|blocker| with_holder(blocker, &ours)).collect())
    }
}

impl<C: SessionConnection> AppPool<C> {
    /// The sessions on this server that this process has by any application, with their holders.
    fn sessions_of_this_process(&self) -> Vec<(u64, Option<Holder>)> {
        let servers = self.storage.server.under_all_names();
        let residents = servers.iter().flat_map(|server| server.limit().residents());
        residents.flat_map(|(_, resident)| resident.sessions()).collect()
    }
}

fn read(row: &str, target: &Target) -> Option<Blocker> {
    let mut parts = row.splitn(5, BETWEEN);
    let mut part = || parts.next();
    let (session, name, state, seconds, query) = (part()?, part()?, part()?, part()?, part()?);
    let query = shortened(&target.redact(query));
    Some(Blocker {
        session: session.parse().ok(),
        name: phrase(name),
        state: phrase(state),
        state_for: seconds.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        last_query: (!query.is_empty()).then_some(query),
        holder: None,
    })
}

/// `None` for a connection of ours that nobody has: it is in nobody's way.
fn with_holder(mut blocker: Blocker, ours: &[(u64, Option<Holder>)]) -> Option<Blocker> {
    if let Some((_, holder)) = ours.iter().find(|(session, _)| Some(*session) == blocker.session) {
        blocker.holder = Some(holder.clone()?);
    }
    Some(blocker)
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocker_row_is_read_with_passwords_redacted() {
        let target = Target::parse("postgres://app:hunter2@h/db", None).expect("valid");
        let row =
            format!("7\u{1f}psql\nx\u{1f}idle\u{1f}1.5\u{1f}ALTER ROLE app\n PASSWORD 'hunter2' {}", "ä".repeat(200));
        let blocker = read(&row, &target).expect("five parts");
        let text = blocker.to_string();
        assert!(
            text.starts_with(
                "server session 7 (psql x), idle for 1.5s, last statement `ALTER ROLE app PASSWORD '***' ä"
            )
        );
        assert!(!text.contains("hunter2") && !text.contains('\n') && text.contains("ä..`"), "{text}");
        assert!(read("7\u{1f}psql", &target).is_none());
        let negative = read("7\u{1f}psql\u{1f}\u{1f}-1\u{1f}", &target).expect("five parts");
        assert_eq!(negative.to_string(), "server session 7 (psql)");
    }
}
