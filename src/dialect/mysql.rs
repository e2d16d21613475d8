//! MySQL and MariaDB.

use std::time::Duration;

use super::translations::{
    MARIADB_AUTHENTICATION, MARIADB_CHANGED, MARIADB_DEADLOCK, MARIADB_LOCK_TIMEOUT, MARIADB_SERVER_FULL,
    MARIADB_STARTING, MARIADB_UNKNOWN_DATABASE,
};
use super::{BeginOptions, millis};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::settings::{Isolation, Mode};

pub(super) const CONNECT_ERRORS: &[(&str, ConnectErrorKind)] = &[
    ("Access denied", ConnectErrorKind::Authentication),
    ("Unknown database", ConnectErrorKind::UnknownDatabase),
    ("Too many connections", ConnectErrorKind::ServerFull),
    ("is not allowed to connect to this", ConnectErrorKind::Authentication),
    ("max_user_connections", ConnectErrorKind::ServerFull),
    ("Server shutdown in progress", ConnectErrorKind::Starting),
    ("connect to server on", ConnectErrorKind::Unreachable),
    ("connect to local server", ConnectErrorKind::Unreachable),
    ("connect to local MySQL server", ConnectErrorKind::Unreachable),
    ("connect to MySQL server", ConnectErrorKind::Unreachable),
    ("Unknown server host", ConnectErrorKind::Unreachable),
    ("Unknown MySQL server host", ConnectErrorKind::Unreachable),
    ("Lost connection", ConnectErrorKind::Unreachable),
];

/// Connect errors in other languages. On an established connection the server writes English: see [`setup`].
pub(super) const TRANSLATED_CONNECT_ERRORS: &[(&[&str], ConnectErrorKind)] = &[
    (MARIADB_SERVER_FULL, ConnectErrorKind::ServerFull),
    (MARIADB_AUTHENTICATION, ConnectErrorKind::Authentication),
    (MARIADB_UNKNOWN_DATABASE, ConnectErrorKind::UnknownDatabase),
    (MARIADB_STARTING, ConnectErrorKind::Starting),
];

/// Errors 1213, 1205 and 1020. Diesel recognises 1213 by its number, for prepared statements.
pub(super) const TRANSIENT_ERRORS: &[&str] =
    &["Deadlock found", "Lock wait timeout exceeded", "Record has changed since last read"];

/// InnoDB writes its errors in the language of the server, not in that of the session.
pub(super) const TRANSLATED_TRANSIENT_ERRORS: &[&[&str]] = &[MARIADB_DEADLOCK, MARIADB_LOCK_TIMEOUT, MARIADB_CHANGED];

pub(super) const SERVER_INFO: &str = "SELECT CONCAT(CONNECTION_ID(), ' ', @@max_connections, ' ', \
     MD5(CONCAT_WS(' ', @@hostname, @@port, @@datadir)), ' unset ', IFNULL(DATABASE(), '')) AS value";

pub(super) const CLIENT_PORT: &str =
    "SELECT SUBSTRING_INDEX(host, ':', -1) AS value FROM information_schema.processlist WHERE id = CONNECTION_ID()";

/// Without the privilege to see all sessions, the server shows only those of the account itself.
pub(super) const SESSION_COUNTS: &str = "SELECT CONCAT(user, '@', SUBSTRING_INDEX(host, ':', 1), ' ', COUNT(*)) AS value \
     FROM information_schema.processlist GROUP BY user, SUBSTRING_INDEX(host, ':', 1) ORDER BY COUNT(*) DESC, 1 LIMIT 20";

pub(super) const FULL_SERVER: &str = "SELECT IF(variable_value >= @@max_connections, '1', '0') AS value \
     FROM information_schema.global_status WHERE variable_name = 'THREADS_CONNECTED'";

pub(super) const INVENTORY: &str = "SELECT CONCAT(table_name, '.', column_name) AS value FROM information_schema.columns \
     WHERE table_schema = DATABASE() \
     UNION SELECT CONCAT(table_name, '.', index_name) FROM information_schema.statistics \
     WHERE table_schema = DATABASE() AND index_name <> 'PRIMARY' ORDER BY 1";

pub(super) const TABLES: &str = "SELECT table_name AS value FROM information_schema.tables \
     WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' ORDER BY 1";

/// The longest limit that the server accepts.
const LONGEST_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The lock name contains a hash, because lock names are shared by all databases of the server and have at most 64
/// characters.
pub(super) fn try_lock_schema(database: &str) -> String {
    format!("SELECT CAST(GET_LOCK('{}', 0) AS CHAR) AS value", lock_name(database))
}

pub(super) fn unlock_schema(database: &str) -> String {
    format!("SELECT CAST(RELEASE_LOCK('{}') AS CHAR) AS value", lock_name(database))
}

fn lock_name(database: &str) -> String {
    let hash = super::fnv1a([database.as_bytes()]);
    format!("diesel-session/schema/{hash:016x}")
}

/// The server does not tell which session has locked a table. It tells which sessions are in a transaction, to an
/// account that may see all processes. Without this privilege the query finds all sessions of the account itself in the
/// database. The last statement of an idle session is available if the server records statements and the account may
/// read the records.
pub(super) fn blockers(waited: Duration) -> Vec<String> {
    let transaction = "LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id";
    // Rank 0: the transaction began before this session began to wait.
    let old = format!("t.trx_started <= NOW() - INTERVAL {} SECOND", waited.as_secs());
    let rank = format!("IF({old}, 0, IF(t.trx_id IS NOT NULL OR p.command <> 'Sleep', 1, 2))");
    let state = "IF(p.command <> 'Sleep', LOWER(p.command), IF(t.trx_id IS NULL, 'idle', 'idle in transaction'))";
    let unknown = "IF(p.command = 'Sleep', 'idle, perhaps in transaction', LOWER(p.command))";
    let others = "p.db = DATABASE() AND IFNULL(p.state, '') <> 'Waiting for table metadata lock'";
    vec![
        sessions(state, LAST_STATEMENT, transaction, others, &rank),
        sessions(state, "p.info", transaction, others, &rank),
        sessions(unknown, "p.info", "", others, "0"),
    ]
}

pub(super) fn schema_lock_holders(database: &str) -> Vec<String> {
    let holds = format!("p.id = IS_USED_LOCK('{}')", lock_name(database));
    let state = "IF(p.command = 'Sleep', 'idle', LOWER(p.command))";
    vec![sessions(state, LAST_STATEMENT, "", &holds, "0"), sessions(state, "p.info", "", &holds, "0")]
}

/// The last statement with a text. A client sends commands without a text after a statement, and MariaDB records no
/// text for a prepared statement.
const LAST_STATEMENT: &str = "IFNULL(p.info, (SELECT s.sql_text FROM performance_schema.events_statements_history s \
     JOIN performance_schema.threads h USING (thread_id) WHERE h.processlist_id = p.id AND IFNULL(s.nesting_event_type, '') <> 'STATEMENT' \
     AND s.event_name NOT IN ('statement/com/Set option', 'statement/com/Close stmt', 'statement/com/Ping') \
     ORDER BY s.event_id DESC LIMIT 1))";

/// A query for the other sessions that satisfy `condition` and have the lowest rank, one row each.
fn sessions(state: &str, statement: &str, joined: &str, condition: &str, rank: &str) -> String {
    format!(
        "SELECT value FROM (SELECT CONCAT_WS(CHAR(31), p.id, CONCAT(p.user, '@', SUBSTRING_INDEX(p.host, ':', 1)), {state}, \
         p.time, IFNULL(LEFT({statement}, 1000), '')) AS value, {rank} AS rank_, MIN({rank}) OVER () AS least, p.id AS id \
         FROM information_schema.processlist p {joined} WHERE p.id <> CONNECTION_ID() AND {condition}) AS found \
         WHERE rank_ = least ORDER BY id LIMIT 20"
    )
}

/// Without `autocommit`, a statement of an autocommit scope is not committed. With another `completion_type`, a commit
/// may begin the next transaction or close the connection.
pub(super) const REQUIRED_SETTINGS: &str = "SET SESSION autocommit = 1, SESSION completion_type = 0";

/// Without the checks, deleted parents may leave their children, and unique keys may have duplicates. With
/// `sql_auto_is_null` or a select limit, a query returns other rows than it asks for.
const SESSION_SETTINGS: &str = ", SESSION foreign_key_checks = 1, SESSION unique_checks = 1, SESSION sql_auto_is_null = 0, \
     SESSION sql_select_limit = 18446744073709551615";

pub(super) fn setup(config: &Config) -> Vec<String> {
    // The library classifies errors by their English texts.
    let mut settings = vec![format!("{REQUIRED_SETTINGS}{SESSION_SETTINGS}, SESSION lc_messages = 'en_US'")];
    settings.extend(config.statement_timeout.map(|time| limit(Some(time))));
    settings.extend(config.lock_timeout.map(lock_limit));
    // MariaDB only: MySQL has no such limit.
    settings.extend(config.idle_in_transaction_timeout.map(|limit| {
        format!(
            "SET /*M!100300 SESSION idle_transaction_timeout = IF(@@idle_transaction_timeout = 0, {}, @@idle_transaction_timeout), */ \
             @diesel_session_limit = NULL",
            limit.min(LONGEST_LIMIT).as_secs()
        )
    }));
    vec![settings.join("; ")]
}

/// `SET TRANSACTION` applies to the next transaction only.
pub(super) fn begin(options: BeginOptions) -> String {
    let mut settings = Vec::new();
    if let Some(isolation) = options.isolation {
        settings.push(match isolation {
            Isolation::ReadUncommitted => "ISOLATION LEVEL READ UNCOMMITTED",
            Isolation::ReadCommitted => "ISOLATION LEVEL READ COMMITTED",
            Isolation::RepeatableRead => "ISOLATION LEVEL REPEATABLE READ",
            Isolation::Serializable => "ISOLATION LEVEL SERIALIZABLE",
        });
    }
    if options.mode == Mode::ReadOnly {
        settings.push("READ ONLY");
    }
    let mut statements = Vec::new();
    if !settings.is_empty() {
        statements.push(format!("SET TRANSACTION {}", settings.join(", ")));
    }
    statements.extend(options.remaining.map(|remaining| limit(Some(remaining))));
    statements.push(format!("BEGIN; {SET_MARKER}"));
    statements.join("; ")
}

/// MariaDB and MySQL have different names for the limit, and each server executes only its own comment. `None` restores
/// the server's default.
pub(super) fn limit(limit: Option<Duration>) -> String {
    let (mariadb, mysql) = match limit.map(|limit| limit.min(LONGEST_LIMIT)) {
        Some(limit) => {
            (format!("{:.3}", millis(limit) as f64 / 1000.0), millis(limit).min(u64::from(u32::MAX)).to_string())
        }
        None => ("DEFAULT".into(), "DEFAULT".into()),
    };
    format!(
        "SET /*M!100100 SESSION max_statement_time = {mariadb}, */ /*!50708 SESSION max_execution_time = {mysql}, */ \
         @diesel_session_limit = NULL"
    )
}

pub(super) fn lock_limit(limit: Duration) -> String {
    let seconds = limit.min(LONGEST_LIMIT).as_secs_f64().ceil().max(1.0);
    format!("SET SESSION lock_wait_timeout = {seconds:.0}, SESSION innodb_lock_wait_timeout = {seconds:.0}")
}

/// The marker savepoint, which the session sets at the beginning of each transaction. Every end of the transaction
/// removes the savepoint: a statement, a procedure, data definition or a deadlock. The next transaction does not have
/// the savepoint.
pub(super) const MARKER: &str = "diesel_session_began";
pub(super) const RELEASE_MARKER: &str = "RELEASE SAVEPOINT diesel_session_began";
/// Also resets the last generated key. Otherwise a new row without a generated key would get the key of another row.
pub(super) const SET_MARKER: &str = "SAVEPOINT diesel_session_began; DO LAST_INSERT_ID(0)";

/// If the savepoint does not exist, the server refuses to release it and ignores the `COMMIT`.
pub(super) const GUARDED_COMMIT: &str = "RELEASE SAVEPOINT diesel_session_began; COMMIT";

/// Releases the marker and sets it again; false if the marker did not exist. The release removes all newer savepoints.
/// The new marker is safe at its later position, because the session never rolls back to it.
pub(super) fn renew_marker<C: SessionConnection>(conn: &mut C) -> bool {
    conn.batch_execute("RELEASE SAVEPOINT diesel_session_began; SAVEPOINT diesel_session_began").is_ok()
}

/// MariaDB has a variable for the answer. MySQL does not, and only a deadlock among its errors ends the transaction.
pub(super) fn is_in_transaction<C: SessionConnection>(conn: &mut C, serialization_failure: bool) -> bool {
    let answer = conn.texts("SELECT CAST(@@in_transaction AS CHAR) AS value");
    let lost = answer.as_ref().is_err_and(super::is_connection_lost);
    match answer.ok().and_then(|rows| rows.into_iter().next().flatten()) {
        Some(answer) => answer == "1",
        None => !lost && !serialization_failure,
    }
}
