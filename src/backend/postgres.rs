//! PostgreSQL.

use std::time::Duration;

use super::{Beginning, millis};
use crate::config::Config;
use crate::error::ConnectErrorKind;
use crate::settings::{Isolation, Mode};
use crate::url::Target;

/// Keywords that libpq's `keyword=value` form usually starts with.
pub(super) const KEYWORDS: &[&str] = &["host", "hostaddr", "port", "dbname", "user", "password", "service", "sslmode"];

pub(super) const CONNECT_ERRORS: &[(&str, ConnectErrorKind)] = &[
    ("authentication failed", ConnectErrorKind::Authentication),
    ("no password supplied", ConnectErrorKind::Authentication),
    ("no pg_hba.conf entry", ConnectErrorKind::Authentication),
    ("permission denied for database", ConnectErrorKind::Authentication),
    ("is not permitted to log in", ConnectErrorKind::Authentication),
    ("too many clients", ConnectErrorKind::ServerFull),
    ("remaining connection slots", ConnectErrorKind::ServerFull),
    ("too many connections for", ConnectErrorKind::ServerFull),
    ("database system is", ConnectErrorKind::Starting),
    ("FATAL: database \"", ConnectErrorKind::UnknownDatabase),
    ("FATAL: role \"", ConnectErrorKind::Authentication),
    ("Connection refused", ConnectErrorKind::Unreachable),
    ("could not translate host name", ConnectErrorKind::Unreachable),
    ("No such file or directory", ConnectErrorKind::Unreachable),
    ("timeout expired", ConnectErrorKind::Unreachable),
    ("server closed the connection unexpectedly", ConnectErrorKind::Unreachable),
    ("No route to host", ConnectErrorKind::Unreachable),
];

/// 40001 and 40P01. Diesel knows the first by its number, and of the second only the text.
pub(super) const TRANSIENT_ERRORS: &[&str] = &["could not serialize access", "deadlock detected"];

pub(super) const TRANSACTION_NUMBER: &str = "SELECT pg_catalog.pg_current_xact_id_if_assigned()::text AS value";

pub(super) fn transaction_status(number: u64) -> String {
    format!("SELECT pg_catalog.pg_xact_status('{number}'::pg_catalog.xid8) AS value")
}

pub(super) const INTRODUCTION: &str = "SELECT pg_catalog.pg_backend_pid() || ' ' || \
     (current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int \
     - coalesce(current_setting('reserved_connections', true), '0')::int) || ' ' || \
     extract(epoch FROM pg_catalog.pg_postmaster_start_time()) || ' ' || current_database() AS value";

// Of other roles' sessions an ordinary role is not told the kind.
pub(super) const CENSUS: &str = "SELECT coalesce(nullif(application_name, ''), 'unnamed') || ' ' || count(*) AS value \
     FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL AND datid IS NOT NULL \
     AND coalesce(backend_type, 'client backend') = 'client backend' \
     GROUP BY application_name ORDER BY count(*) DESC, 1 LIMIT 20";

pub(super) const IS_FULL: &str = "SELECT CASE WHEN count(*) >= current_setting('max_connections')::int \
     - current_setting('superuser_reserved_connections')::int \
     - coalesce(current_setting('reserved_connections', true), '0')::int THEN '1' ELSE '0' END AS value \
     FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL AND datid IS NOT NULL \
     AND coalesce(backend_type, 'client backend') = 'client backend'";

pub(super) const INVENTORY: &str = "SELECT table_name || '.' || column_name AS value FROM information_schema.columns \
     WHERE table_schema = pg_catalog.current_schema() \
     UNION SELECT tablename || '.' || indexname FROM pg_catalog.pg_indexes WHERE schemaname = pg_catalog.current_schema() ORDER BY 1";

pub(super) const TABLES: &str =
    "SELECT tablename::text AS value FROM pg_catalog.pg_tables WHERE schemaname = current_schema()";

// PostgreSQL's advisory locks are per database. The number is this crate's own, made of its name.
pub(super) const TRY_LOCK_SCHEMA: &str =
    "SELECT CASE WHEN pg_catalog.pg_try_advisory_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value";
pub(super) const UNLOCK_SCHEMA: &str = "SELECT pg_catalog.pg_advisory_unlock(7236271, 5331310)::text AS value";

/// One row a session. Of others' sessions an ordinary role sees neither state nor statement.
const SESSION: &str = "concat_ws(chr(31), a.pid, \
     coalesce(nullif(a.application_name, ''), a.usename || '@' || coalesce(host(a.client_addr), 'local'), a.backend_type, ''), \
     coalesce(a.state, ''), coalesce(extract(epoch FROM clock_timestamp() - a.state_change)::text, ''), \
     coalesce(left(a.query, 1000), '')) AS value";

/// Whoever has any lock on a table is in the way of its removal. Who came after this session had begun to wait had to wait too,
/// and has the lock only since this one gave up. Those are named where nobody else is found, and other schemas' after them.
pub(super) fn blockers(waited: Duration) -> String {
    format!(
        "SELECT {SESSION} FROM pg_catalog.pg_stat_activity a JOIN ( \
         SELECT pid, rank, min(rank) OVER () AS least FROM ( \
         SELECT l.pid, min(CASE WHEN n.nspname <> ALL (current_schemas(false)) THEN 2 \
         WHEN s.xact_start > now() - interval '{} milliseconds' THEN 1 ELSE 0 END) AS rank \
         FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace JOIN pg_catalog.pg_stat_activity s ON s.pid = l.pid \
         WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_catalog.pg_backend_pid() AND c.oid >= 16384 \
         AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()) \
         GROUP BY l.pid) AS found) AS ranked USING (pid) \
         WHERE rank = least ORDER BY a.xact_start, a.pid LIMIT 20",
        setting(waited)
    )
}

pub(super) fn schema_lock_holder() -> String {
    format!(
        "SELECT {SESSION} FROM pg_catalog.pg_stat_activity a JOIN pg_catalog.pg_locks l USING (pid) \
         WHERE l.locktype = 'advisory' AND l.granted AND l.classid = 7236271 AND l.objid = 5331310 AND l.objsubid = 2 \
         AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())"
    )
}
/// So that no wait for a network that is gone lasts for ever: an idle peer is asked after 10 s, and what it has not acknowledged for
/// 20 s ends the connection. A statement may take as long as it likes, as the server's kernel answers meanwhile.
const DEAD_NETWORK: &[(&str, &str)] = &[
    ("keepalives_idle", "10"),
    ("keepalives_interval", "3"),
    ("keepalives_count", "3"),
    ("tcp_user_timeout", "20000"),
];

/// The caller's own deadline rules; libpq's is the backstop that frees the helper thread, in whole seconds from 2.
pub(super) fn driver_url(target: &Target, config: &Config, app: &str) -> String {
    let mut parameters = Vec::new();
    if !target.sets("connect_timeout") {
        let seconds = config.connect_timeout.as_secs_f64().ceil().max(2.0);
        parameters.push(("connect_timeout", format!("{seconds:.0}")));
    }
    let dead_network = DEAD_NETWORK.iter().filter(|(name, _)| !target.sets(name));
    parameters.extend(dead_network.map(|(name, value)| (*name, (*value).to_owned())));
    match &config.application_name {
        Some(name) => parameters.push(("application_name", name.clone())),
        None => parameters.push(("fallback_application_name", format!("diesel-session/{app}"))),
    }
    target.with_parameters(&parameters)
}

pub(super) fn setup(config: &Config) -> Vec<String> {
    let mut settings = Vec::new();
    settings.extend(config.statement_timeout.map(|limit| limit_in_session(Some(limit))));
    settings.extend(config.lock_timeout.map(lock_limit));
    if settings.is_empty() { settings } else { vec![settings.join("; ")] }
}

/// Role and user come first, so that the rest is allowed. Time zone and encoding are what Diesel sets on every connection.
/// `DISCARD ALL` would take Diesel's prepared statements too.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP; \
     SET TIME ZONE 'UTC'; SET CLIENT_ENCODING TO 'UTF8'";

pub(super) fn reset(config: &Config) -> String {
    let mut statements = vec![RESET.to_owned()];
    statements.extend(setup(config));
    statements.join("; ")
}

/// `None` is Diesel's own `BEGIN`.
pub(super) fn begin(how: Beginning) -> Option<String> {
    if how.isolation.is_none() && how.mode != Mode::ReadOnly && how.remaining.is_none() {
        return None;
    }
    let mut sql = String::from("BEGIN");
    if let Some(isolation) = how.isolation {
        sql.push_str(match isolation {
            Isolation::ReadUncommitted => " ISOLATION LEVEL READ UNCOMMITTED",
            Isolation::ReadCommitted => " ISOLATION LEVEL READ COMMITTED",
            Isolation::RepeatableRead => " ISOLATION LEVEL REPEATABLE READ",
            Isolation::Serializable => " ISOLATION LEVEL SERIALIZABLE",
        });
    }
    if how.mode == Mode::ReadOnly {
        sql.push_str(" READ ONLY");
    }
    if let Some(remaining) = how.remaining {
        sql.push_str("; ");
        sql.push_str(&limit_in_transaction(remaining));
    }
    Some(sql)
}

pub(super) fn limit_in_transaction(remaining: Duration) -> String {
    format!("SET LOCAL statement_timeout = {}", setting(remaining))
}

pub(super) fn limit_in_session(limit: Option<Duration>) -> String {
    match limit {
        Some(limit) => format!("SET statement_timeout = {}", setting(limit)),
        None => "RESET statement_timeout".into(),
    }
}

pub(super) fn lock_limit(limit: Duration) -> String {
    format!("SET lock_timeout = {}", setting(limit))
}

/// Milliseconds, as many as the server can count.
fn setting(limit: Duration) -> u64 {
    millis(limit).min(i32::MAX as u64)
}
