//! PostgreSQL.

use std::time::Duration;

use super::translations::{
    AUTHENTICATION, DEADLOCK, SERIALIZATION_FAILURE, SERVER_FULL, STARTING, UNKNOWN_DATABASE, UNREACHABLE,
};
use super::{BeginOptions, millis};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::settings::{Isolation, Mode};
use crate::url::Target;

/// The usual first keywords of libpq's `keyword=value` form.
pub(super) const KEYWORDS: &[&str] = &["host", "hostaddr", "port", "dbname", "user", "password", "service", "sslmode"];

pub(super) const CONNECT_ERRORS: &[(&str, ConnectErrorKind)] = &[
    ("authentication failed", ConnectErrorKind::Authentication),
    ("no password supplied", ConnectErrorKind::Authentication),
    ("no pg_hba.conf entry", ConnectErrorKind::Authentication),
    ("pg_hba.conf rejects connection", ConnectErrorKind::Authentication),
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

/// Connect errors of servers and client libraries in other languages.
pub(super) const TRANSLATED_CONNECT_ERRORS: &[(&[&str], ConnectErrorKind)] = &[
    (STARTING, ConnectErrorKind::Starting),
    (SERVER_FULL, ConnectErrorKind::ServerFull),
    (AUTHENTICATION, ConnectErrorKind::Authentication),
    (UNKNOWN_DATABASE, ConnectErrorKind::UnknownDatabase),
    (UNREACHABLE, ConnectErrorKind::Unreachable),
];

pub(super) const TRANSLATED_TRANSIENT_ERRORS: &[&[&str]] = &[DEADLOCK, SERIALIZATION_FAILURE];

/// SQLSTATE 40001 and 40P01. Diesel recognises the first by its code, and has only the text of the second.
pub(super) const TRANSIENT_ERRORS: &[&str] = &["could not serialize access", "deadlock detected"];

// Functions, operators and types are qualified with their schema, because a schema before `pg_catalog` in the
// `search_path` may have others with the same names. `IN`, `NULLIF`, `LIKE`, `BETWEEN` and `JOIN .. USING` find their
// operators through the `search_path`, so this SQL cannot use them.
pub(super) const TRANSACTION_NUMBER: &str =
    "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text AS value";

pub(super) fn transaction_status(number: u64) -> String {
    format!("SELECT pg_catalog.pg_xact_status('{number}'::pg_catalog.xid8) AS value")
}

/// The number of connections that are available to ordinary roles.
macro_rules! capacity {
    () => {
        "pg_catalog.current_setting('max_connections')::pg_catalog.int4 \
         OPERATOR(pg_catalog.-) pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4 \
         OPERATOR(pg_catalog.-) coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::pg_catalog.int4"
    };
}

/// The fourth field tells whether the query has switched on `client_connection_check_interval`, with which the server
/// detects during a statement that the client is gone. The query switches it on if the server supports it and the role,
/// the database and the URL do not set it.
pub(super) const SERVER_INFO: &str = concat!(
    "SELECT pg_catalog.concat_ws(' ', pg_catalog.pg_backend_pid(), ",
    capacity!(),
    ", extract(epoch FROM pg_catalog.pg_postmaster_start_time()), \
     CASE WHEN (SELECT s.source FROM pg_catalog.pg_settings s WHERE s.name OPERATOR(pg_catalog.=) 'client_connection_check_interval') \
     OPERATOR(pg_catalog.=) 'default' AND pg_catalog.strpos(pg_catalog.version(), 'linux') OPERATOR(pg_catalog.>) 0 \
     AND pg_catalog.set_config('client_connection_check_interval', '10000', false) IS NOT NULL THEN 'set' ELSE 'unset' END, \
     pg_catalog.current_database()) AS value"
);

pub(super) const CLIENT_PORT: &str = "SELECT pg_catalog.inet_client_port()::pg_catalog.text AS value";

pub(super) const CLIENT_CHECK: &str = "SET client_connection_check_interval = 10000";

/// The sessions of clients. The server hides the `backend_type` of other roles' sessions from an ordinary role.
macro_rules! clients {
    () => {
        "FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL AND datid IS NOT NULL \
         AND coalesce(backend_type, 'client backend') OPERATOR(pg_catalog.=) 'client backend'"
    };
}

pub(super) const SESSION_COUNTS: &str = concat!(
    "SELECT pg_catalog.concat(CASE WHEN coalesce(application_name, '') OPERATOR(pg_catalog.=) '' THEN 'unnamed' \
     ELSE application_name END, ' ', pg_catalog.count(*)) AS value ",
    clients!(),
    " GROUP BY application_name ORDER BY pg_catalog.count(*) DESC, 1 LIMIT 20"
);

pub(super) const FULL_SERVER: &str = concat!(
    "SELECT CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.>=) (",
    capacity!(),
    ") THEN '1' ELSE '0' END AS value ",
    clients!()
);

pub(super) const INVENTORY: &str = "SELECT pg_catalog.concat(table_name, '.', column_name) AS value FROM information_schema.columns \
     WHERE table_schema::pg_catalog.text OPERATOR(pg_catalog.=) pg_catalog.current_schema()::pg_catalog.text \
     UNION SELECT pg_catalog.concat(tablename, '.', indexname) FROM pg_catalog.pg_indexes \
     WHERE schemaname OPERATOR(pg_catalog.=) pg_catalog.current_schema() ORDER BY 1";

pub(super) const TABLES: &str = "SELECT tablename::pg_catalog.text AS value FROM pg_catalog.pg_tables \
     WHERE schemaname OPERATOR(pg_catalog.=) pg_catalog.current_schema()";

// PostgreSQL's advisory locks belong to one database. The key is derived from the name of this crate.
pub(super) const TRY_LOCK_SCHEMA: &str =
    "SELECT CASE WHEN pg_catalog.pg_try_advisory_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value";
pub(super) const UNLOCK_SCHEMA: &str =
    "SELECT pg_catalog.pg_advisory_unlock(7236271, 5331310)::pg_catalog.text AS value";

/// The columns of one session. An ordinary role cannot see the states and statements of other roles' sessions.
const SESSION: &str = "pg_catalog.concat_ws(pg_catalog.chr(31), a.pid, \
     coalesce(CASE WHEN a.application_name OPERATOR(pg_catalog.<>) '' THEN a.application_name END, \
     CASE WHEN a.usename IS NOT NULL THEN pg_catalog.concat(a.usename, '@', coalesce(pg_catalog.host(a.client_addr), 'local')) END, \
     a.backend_type, ''), coalesce(a.state, ''), \
     coalesce(extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change)::pg_catalog.text, ''), \
     coalesce(pg_catalog.left(a.query, 1000), '')) AS value";

/// Whether a row of `pg_locks` belongs to this database.
const IN_THIS_DATABASE: &str = "l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database d \
     WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())";

/// Every session that has a lock on a table blocks the removal of this table. A session whose transaction began after
/// this session began to wait had to wait too, and got its lock only when this session gave up: it has rank 1. Sessions
/// with locks in other schemas have rank 2. The query returns the sessions with the lowest rank.
pub(super) fn blockers(waited: Duration) -> String {
    format!(
        "SELECT {SESSION} FROM pg_catalog.pg_stat_activity a JOIN ( \
         SELECT pid, rank, pg_catalog.min(rank) OVER () AS least FROM ( \
         SELECT l.pid, pg_catalog.min(CASE WHEN n.nspname OPERATOR(pg_catalog.<>) ALL (pg_catalog.current_schemas(false)) THEN 2 \
         WHEN s.xact_start OPERATOR(pg_catalog.>) (pg_catalog.now() OPERATOR(pg_catalog.-) interval '{} milliseconds') \
         THEN 1 ELSE 0 END) AS rank \
         FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) l.relation \
         JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
         JOIN pg_catalog.pg_stat_activity s ON s.pid OPERATOR(pg_catalog.=) l.pid \
         WHERE l.locktype OPERATOR(pg_catalog.=) 'relation' AND l.granted \
         AND l.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid() \
         AND c.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND {IN_THIS_DATABASE} \
         GROUP BY l.pid) AS found) AS ranked ON ranked.pid OPERATOR(pg_catalog.=) a.pid \
         WHERE ranked.rank OPERATOR(pg_catalog.=) ranked.least ORDER BY a.xact_start, a.pid LIMIT 20",
        setting(waited)
    )
}

pub(super) fn schema_lock_holder() -> String {
    format!(
        "SELECT {SESSION} FROM pg_catalog.pg_stat_activity a \
         JOIN pg_catalog.pg_locks l ON l.pid OPERATOR(pg_catalog.=) a.pid \
         WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted \
         AND l.classid OPERATOR(pg_catalog.=) 7236271::pg_catalog.oid AND l.objid OPERATOR(pg_catalog.=) 5331310::pg_catalog.oid \
         AND l.objsubid OPERATOR(pg_catalog.=) 2 AND {IN_THIS_DATABASE}"
    )
}

/// Limits the wait for a dead network. The client probes an idle peer after 10 s, and data that is not acknowledged for
/// 20 s ends the connection. The duration of a statement is not limited, because the kernel of the server answers
/// during the statement.
const KEEPALIVES: &[(&str, &str)] = &[
    ("keepalives_idle", "10"),
    ("keepalives_interval", "3"),
    ("keepalives_count", "3"),
    ("tcp_user_timeout", "20000"),
];

/// The caller's deadline limits a connect. libpq's timeout, which is at least 2 s and in whole seconds, frees the
/// pool's thread.
pub(super) fn driver_url(target: &Target, config: &Config, app: &str) -> String {
    let mut parameters = Vec::new();
    if !target.has_parameter("connect_timeout") {
        let seconds = config.connect_timeout.as_secs_f64().ceil().max(2.0);
        parameters.push(("connect_timeout", format!("{seconds:.0}")));
    }
    let keepalives = KEEPALIVES.iter().filter(|(name, _)| !target.has_parameter(name));
    parameters.extend(keepalives.map(|(name, value)| (*name, (*value).to_owned())));
    match &config.application_name {
        Some(name) => parameters.push(("application_name", name.clone())),
        None => parameters.push(("fallback_application_name", format!("diesel-session/{app}"))),
    }
    target.with_parameters(&parameters)
}

/// The setting on which the library's SQL relies: names appear in it as string literals. Role, database and server may
/// have another default.
pub(super) const REQUIRED_SETTINGS: &str = "SET standard_conforming_strings = on";

pub(super) fn setup(config: &Config) -> Vec<String> {
    let mut settings = vec![REQUIRED_SETTINGS.to_owned()];
    settings.extend(config.statement_timeout.map(|limit| limit_in_session(Some(limit))));
    settings.extend(config.lock_timeout.map(lock_limit));
    settings.extend(config.idle_in_transaction_timeout.map(|limit| {
        let name = "'idle_in_transaction_session_timeout'";
        format!(
            "SELECT pg_catalog.set_config({name}, '{}', false) WHERE pg_catalog.current_setting({name}) OPERATOR(pg_catalog.=) '0'",
            setting(limit)
        )
    }));
    vec![settings.join("; ")]
}

/// User and role come first, so that the other statements are permitted. Diesel sets this time zone and this encoding
/// on every connection. `DISCARD ALL` would also remove Diesel's prepared statements.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP; \
     SET TIME ZONE 'UTC'; SET CLIENT_ENCODING TO 'UTF8'";

/// `checks_client`: [`SERVER_INFO`] has switched on the check of the client.
pub(super) fn reset(config: &Config, checks_client: bool) -> String {
    let mut statements = vec![RESET.to_owned()];
    statements.extend(setup(config));
    statements.extend(checks_client.then(|| CLIENT_CHECK.to_owned()));
    statements.join("; ")
}

/// `None` stands for Diesel's own `BEGIN`.
pub(super) fn begin(options: BeginOptions) -> Option<String> {
    if options.isolation.is_none() && options.mode != Mode::ReadOnly && options.remaining.is_none() {
        return None;
    }
    let mut sql = String::from("BEGIN");
    if let Some(isolation) = options.isolation {
        sql.push_str(match isolation {
            Isolation::ReadUncommitted => " ISOLATION LEVEL READ UNCOMMITTED",
            Isolation::ReadCommitted => " ISOLATION LEVEL READ COMMITTED",
            Isolation::RepeatableRead => " ISOLATION LEVEL REPEATABLE READ",
            Isolation::Serializable => " ISOLATION LEVEL SERIALIZABLE",
        });
    }
    if options.mode == Mode::ReadOnly {
        sql.push_str(" READ ONLY");
    }
    if let Some(remaining) = options.remaining {
        sql.push_str("; ");
        sql.push_str(&limit_in_transaction(remaining));
    }
    Some(sql)
}

pub(super) fn search_path(schemas: &str) -> String {
    format!("SET LOCAL search_path = {schemas}")
}

/// Inside the outer transaction of a test, a local setting outlives the release of a savepoint. So a second setting
/// keeps the previous value.
pub(super) const SAVE_SEARCH_PATH: &str = "SELECT pg_catalog.set_config('diesel_session.search_path', \
     pg_catalog.concat('=', pg_catalog.current_setting('search_path')), true)";

/// After a rollback there is nothing to restore, because the rollback has restored both settings.
pub(super) const RESTORE_SEARCH_PATH: &str = "SELECT pg_catalog.set_config('search_path', \
     pg_catalog.substr(pg_catalog.current_setting('diesel_session.search_path', true), 2), true) \
     WHERE pg_catalog.strpos(pg_catalog.current_setting('diesel_session.search_path', true), '=') OPERATOR(pg_catalog.=) 1; \
     SELECT pg_catalog.set_config('diesel_session.search_path', '', true)";

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

/// In an aborted transaction the server refuses the first statement and ignores the second. A plain `COMMIT` would roll
/// back and report success.
pub(super) const GUARDED_COMMIT: &str = "SELECT 1; COMMIT";

/// Whether a backslash in a plain string is an ordinary character.
pub(super) fn has_standard_strings<C: SessionConnection>(conn: &mut C) -> bool {
    let answer = conn.texts("SELECT pg_catalog.current_setting('standard_conforming_strings') AS value");
    answer.is_ok_and(|rows| rows.first().and_then(Option::as_deref) == Some("on"))
}

/// The value of a setting in milliseconds, at most the largest value that the server accepts.
fn setting(limit: Duration) -> u64 {
    millis(limit).min(i32::MAX as u64)
}
