//! MySQL and MariaDB.

use std::time::Duration;

use super::translations::{
    MARIADB_AUTHENTICATION, MARIADB_CHANGED, MARIADB_DEADLOCK, MARIADB_LOCK_TIMEOUT, MARIADB_SERVER_FULL,
    MARIADB_STARTING, MARIADB_UNKNOWN_DATABASE,
};
use super::{Beginning, millis};
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

/// The same where the server speaks another language. On a connection that is there it speaks English: see [`setup`].
pub(super) const TRANSLATED_CONNECT_ERRORS: &[(&[&str], ConnectErrorKind)] = &[
    (MARIADB_SERVER_FULL, ConnectErrorKind::ServerFull),
    (MARIADB_AUTHENTICATION, ConnectErrorKind::Authentication),
    (MARIADB_UNKNOWN_DATABASE, ConnectErrorKind::UnknownDatabase),
    (MARIADB_STARTING, ConnectErrorKind::Starting),
];

/// 1213, 1205 and 1020. Diesel knows the first by its number, of prepared statements.
pub(super) const TRANSIENT_ERRORS: &[&str] =
    &["Deadlock found", "Lock wait timeout exceeded", "Record has changed since last read"];

/// InnoDB's come in the language of the server, and not in that of the session.
pub(super) const TRANSLATED_TRANSIENT_ERRORS: &[&[&str]] = &[MARIADB_DEADLOCK, MARIADB_LOCK_TIMEOUT, MARIADB_CHANGED];

pub(super) const INTRODUCTION: &str = "SELECT CONCAT(CONNECTION_ID(), ' ', @@max_connections, ' ', \
     MD5(CONCAT_WS(' ', @@hostname, @@port, @@datadir)), ' unset ', IFNULL(DATABASE(), '')) AS value";

pub(super) const CLIENT_PORT: &str =
    "SELECT SUBSTRING_INDEX(host, ':', -1) AS value FROM information_schema.processlist WHERE id = CONNECTION_ID()";

/// Without the right to see others' sessions these are the role's own.
pub(super) const CENSUS: &str = "SELECT CONCAT(user, '@', SUBSTRING_INDEX(host, ':', 1), ' ', COUNT(*)) AS value \
     FROM information_schema.processlist GROUP BY user, SUBSTRING_INDEX(host, ':', 1) ORDER BY COUNT(*) DESC, 1 LIMIT 20";

pub(super) const IS_FULL: &str = "SELECT IF(variable_value >= @@max_connections, '1', '0') AS value \
     FROM information_schema.global_status WHERE variable_name = 'THREADS_CONNECTED'";

pub(super) const INVENTORY: &str = "SELECT CONCAT(table_name, '.', column_name) AS value FROM information_schema.columns \
     WHERE table_schema = DATABASE() \
     UNION SELECT CONCAT(table_name, '.', index_name) FROM information_schema.statistics \
     WHERE table_schema = DATABASE() AND index_name <> 'PRIMARY' ORDER BY 1";

pub(super) const TABLES: &str = "SELECT table_name AS value FROM information_schema.tables \
     WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' ORDER BY 1";

/// The longest limit the server takes.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

/// The server has one space of names for all databases, and names of at most 64 characters.
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

/// Who has locked a table is not told, only who is in a transaction, and that to those who may see all processes. Without that
/// right these are the role's own sessions in the database, whatever they do. What an idle one did last is known where the server
/// keeps it and the role may read it.
pub(super) fn blockers(waited: Duration) -> Vec<String> {
    let transaction = "LEFT JOIN information_schema.innodb_trx t ON t.trx_mysql_thread_id = p.id";
    // The first of them are told to have had their locks before this session began to wait.
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

/// After a statement a client sends more, of which there is no text. MariaDB keeps none of a prepared statement either.
const LAST_STATEMENT: &str = "IFNULL(p.info, (SELECT s.sql_text FROM performance_schema.events_statements_history s \
     JOIN performance_schema.threads h USING (thread_id) WHERE h.processlist_id = p.id AND IFNULL(s.nesting_event_type, '') <> 'STATEMENT' \
     AND s.event_name NOT IN ('statement/com/Set option', 'statement/com/Close stmt', 'statement/com/Ping') \
     ORDER BY s.event_id DESC LIMIT 1))";

/// Of the other sessions of that condition those of the lowest rank, one row each.
fn sessions(state: &str, statement: &str, joined: &str, condition: &str, rank: &str) -> String {
    format!(
        "SELECT value FROM (SELECT CONCAT_WS(CHAR(31), p.id, CONCAT(p.user, '@', SUBSTRING_INDEX(p.host, ':', 1)), {state}, \
         p.time, IFNULL(LEFT({statement}, 1000), '')) AS value, {rank} AS rank_, MIN({rank}) OVER () AS least, p.id AS id \
         FROM information_schema.processlist p {joined} WHERE p.id <> CONNECTION_ID() AND {condition}) AS found \
         WHERE rank_ = least ORDER BY id LIMIT 20"
    )
}

/// Without these a statement of an autocommit scope is not committed, and a commit may begin the next transaction or close the connection.
pub(super) const REQUIRED: &str = "SET SESSION autocommit = 1, SESSION completion_type = 0";

/// Without the first two a deleted parent leaves its children, and a unique key may be there twice; with the third and without the fourth
/// a query returns other rows than those that it asks for.
const OF_A_SESSION: &str = ", SESSION foreign_key_checks = 1, SESSION unique_checks = 1, SESSION sql_auto_is_null = 0, \
     SESSION sql_select_limit = 18446744073709551615";

pub(super) fn setup(config: &Config) -> Vec<String> {
    // Errors are told apart by their texts, and a session chooses their language.
    let mut settings = vec![format!("{REQUIRED}{OF_A_SESSION}, SESSION lc_messages = 'en_US'")];
    settings.extend(config.statement_timeout.map(|time| limit(Some(time))));
    settings.extend(config.lock_timeout.map(lock_limit));
    // MySQL has no such limit.
    settings.extend(config.idle_in_transaction_timeout.map(|limit| {
        format!(
            "SET /*M!100300 SESSION idle_transaction_timeout = IF(@@idle_transaction_timeout = 0, {}, @@idle_transaction_timeout), */ \
             @diesel_session_limit = NULL",
            limit.min(LONGEST).as_secs()
        )
    }));
    vec![settings.join("; ")]
}

/// The isolation level and access mode are those of the next transaction only.
pub(super) fn begin(how: Beginning) -> String {
    let mut settings = Vec::new();
    if let Some(isolation) = how.isolation {
        settings.push(match isolation {
            Isolation::ReadUncommitted => "ISOLATION LEVEL READ UNCOMMITTED",
            Isolation::ReadCommitted => "ISOLATION LEVEL READ COMMITTED",
            Isolation::RepeatableRead => "ISOLATION LEVEL REPEATABLE READ",
            Isolation::Serializable => "ISOLATION LEVEL SERIALIZABLE",
        });
    }
    if how.mode == Mode::ReadOnly {
        settings.push("READ ONLY");
    }
    let mut statements = Vec::new();
    if !settings.is_empty() {
        statements.push(format!("SET TRANSACTION {}", settings.join(", ")));
    }
    statements.extend(how.remaining.map(|remaining| limit(Some(remaining))));
    statements.push(format!("BEGIN; {MARK}"));
    statements.join("; ")
}

/// MariaDB and MySQL name the limit differently, and each reads only the comment meant for it. `None` goes back to the
/// server's default.
pub(super) fn limit(limit: Option<Duration>) -> String {
    let (mariadb, mysql) = match limit.map(|limit| limit.min(LONGEST)) {
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
    let seconds = limit.min(LONGEST).as_secs_f64().ceil().max(1.0);
    format!("SET SESSION lock_wait_timeout = {seconds:.0}, SESSION innodb_lock_wait_timeout = {seconds:.0}")
}

/// A savepoint at the beginning of each transaction. Whatever ends the transaction takes it away, whether words do it, a procedure, data
/// definition or a deadlock; and the next transaction has none.
pub(super) const MARKER: &str = "diesel_session_began";
pub(super) const RELEASE_MARK: &str = "RELEASE SAVEPOINT diesel_session_began";
/// Also forgets the last counted key. Otherwise a new row without a counted key would get the key of another row.
pub(super) const MARK: &str = "SAVEPOINT diesel_session_began; DO LAST_INSERT_ID(0)";

/// Where the savepoint is gone the server refuses to release it, and does not look at the `COMMIT`.
pub(super) const GUARDED_COMMIT: &str = "RELEASE SAVEPOINT diesel_session_began; COMMIT";

/// Releasing the savepoint takes away all that are younger. Setting it again puts nothing at risk: nothing is ever rolled back to it.
pub(super) fn has_marker<C: SessionConnection>(conn: &mut C) -> bool {
    conn.batch_execute("RELEASE SAVEPOINT diesel_session_began; SAVEPOINT diesel_session_began").is_ok()
}

/// MariaDB tells; MySQL has no such variable, and of its errors only a deadlock ends the transaction.
pub(super) fn is_in_transaction<C: SessionConnection>(conn: &mut C, serialization_failure: bool) -> bool {
    let answer = conn.texts("SELECT CAST(@@in_transaction AS CHAR) AS value");
    let lost = answer.as_ref().is_err_and(super::is_connection_lost);
    match answer.ok().and_then(|rows| rows.into_iter().next().flatten()) {
        Some(answer) => answer == "1",
        None => !lost && !serialization_failure,
    }
}
