//! Asks the server for the sessions that block a lock.

use std::time::Duration;

use super::{AppPool, CheckedOut};
use crate::connection::SessionConnection;
use crate::dialect::SEPARATOR;
use crate::error::{Blocker, Blockers, Holder};
use crate::url::Target;
use crate::wording::phrase;

/// The number of characters of a statement that are shown.
const SHOWN_CHARS: usize = 120;

impl<C: SessionConnection> CheckedOut<C> {
    /// Returns the rows of the first query that the server answers. An open transaction is rolled back first.
    pub(crate) fn blockers(&mut self, queries: &[String]) -> Blockers {
        let conn = self.conn();
        while conn.depth().is_some_and(|depth| depth > 0) {
            if conn.rollback_level().is_err() {
                return Blockers::default();
            }
        }
        let Some(rows) = queries.iter().find_map(|sql| conn.texts(sql).ok()) else { return Blockers::default() };
        let own_sessions = self.pool.sessions_of_this_process();
        let target = &self.pool.storage.options.target;
        let each = rows.into_iter().flatten().filter_map(|row| read(&row, target));
        each.filter_map(|blocker| with_holder(blocker, &own_sessions)).collect()
    }
}

impl<C: SessionConnection> AppPool<C> {
    /// The sessions that all applications of this process have on this server, with their holders.
    fn sessions_of_this_process(&self) -> Vec<(u64, Option<Holder>)> {
        let servers = self.storage.server.under_all_names();
        let pools = servers.iter().flat_map(|server| server.limit.pools());
        pools.flat_map(|(_, pool)| pool.sessions()).collect()
    }
}

fn read(row: &str, target: &Target) -> Option<Blocker> {
    let mut parts = row.splitn(5, SEPARATOR);
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

/// `None` for a connection of this process without a holder, because an idle connection blocks nothing.
fn with_holder(mut blocker: Blocker, own_sessions: &[(u64, Option<Holder>)]) -> Option<Blocker> {
    if let Some((_, holder)) = own_sessions.iter().find(|(session, _)| Some(*session) == blocker.session) {
        blocker.holder = Some(holder.clone()?);
    }
    Some(blocker)
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
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
