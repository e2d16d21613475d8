//! MySQL and MariaDB.

use std::borrow::Cow;
use std::time::Duration;

use diesel::result::Error as DieselError;

use super::migrations::{BOOKKEEPING_TABLE, changed};
use super::{BeginOptions, ConnectionSnapshot, Dialect, Texts, TransactionCheck, is_connection_lost, millis};
use crate::config::Config;
use crate::connection::Inspect;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;

pub(super) struct Mysql;

// InnoDB writes its errors in the language of the server, not in that of the session.
const DEADLOCK: &str = include_str!("translations/mariadb_deadlock.txt");
const LOCK_TIMEOUT: &str = include_str!("translations/mariadb_lock_timeout.txt");

/// The marker savepoint, which the session sets at the beginning of each transaction. Every end of the transaction
/// removes the savepoint: a statement, a procedure, data definition or a deadlock. The next transaction does not have
/// the savepoint.
const MARKER: &str = "diesel_session_began";

/// The default isolation level, see `READ_COMMITTED`. MariaDB and MySQL have different names for the variable, and each
/// server executes only its own comment. The pattern stands for `READ-..`, so that a search of network traffic for the
/// commits finds no connect.
macro_rules! isolation {
    () => {
        "IF(CONCAT('' /*M!100000 , @@SESSION.tx_isolation */ /*!80000 , @@SESSION.transaction_isolation */) \
         LIKE 'READ-%', 'committed', 'strict')"
    };
}

/// A node of a Galera cluster without a quorum answers the driver's ping and refuses this statement.
const PING: &str = "DO 0";

/// Error 1047: a node of a Galera cluster has no quorum, or is not in the cluster yet.
const NOT_IN_CLUSTER: &str = "WSREP has not yet prepared node for application use";

static TEXTS: Texts = Texts {
    required_settings: Some(REQUIRED_SETTINGS),
    server_info_query: Some(concat!(
        "SELECT CONCAT(",
        isolation!(),
        ", ' ', CONNECTION_ID(), ' ', @@max_connections, ' ', \
         MD5(CONCAT_WS(' ', @@hostname, @@port, @@datadir)), ' set ? ', IFNULL(DATABASE(), '')) AS value"
    )),
    defaults_query: Some(concat!(
        "SELECT CONCAT(",
        isolation!(),
        ", ' SET SESSION ' /*M!100100 , 'max_statement_time = ', @@SESSION.max_statement_time */ \
         /*!50708 , 'max_execution_time = ', @@SESSION.max_execution_time */) AS value"
    )),
    ping: Some(PING),
    client_port_query: Some(
        "SELECT SUBSTRING_INDEX(host, ':', -1) AS value FROM information_schema.processlist WHERE id = CONNECTION_ID()",
    ),
    // Without the privilege to see all sessions, the server shows only those of the account itself.
    session_counts_query: Some(
        "SELECT CONCAT(user, '@', SUBSTRING_INDEX(host, ':', 1), ' ', COUNT(*)) AS value \
         FROM information_schema.processlist GROUP BY user, SUBSTRING_INDEX(host, ':', 1) ORDER BY COUNT(*) DESC, 1 LIMIT 20",
    ),
    full_server_query: Some(
        "SELECT IF(variable_value >= @@max_connections, '1', '0') AS value \
         FROM information_schema.global_status WHERE variable_name = 'THREADS_CONNECTED'",
    ),
    catalog_search_path: None,
    read_only_guard: None,
    // If the marker savepoint does not exist, the server refuses to release it and ignores the `COMMIT`.
    guarded_commit: Some("RELEASE SAVEPOINT diesel_session_began; COMMIT"),
    transaction_number: None,
    server_identity: None,
    is_read_only: Some("SELECT IF(@@GLOBAL.read_only, 'on', 'off') AS value"),
    begin_nested: "SAVEPOINT diesel_session; SAVEPOINT diesel_session_began; DO LAST_INSERT_ID(0)",
    probe_nested: Some("RELEASE SAVEPOINT diesel_session_began"),
    commit_nested: "RELEASE SAVEPOINT diesel_session",
    tables: "SELECT table_name AS value FROM information_schema.tables \
         WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' ORDER BY 1",
    inventory: "SELECT CONCAT(table_name, '.', column_name) AS value FROM information_schema.columns \
         WHERE table_schema = DATABASE() \
         UNION SELECT CONCAT(table_name, '.', index_name) FROM information_schema.statistics \
         WHERE table_schema = DATABASE() AND index_name <> 'PRIMARY' ORDER BY 1",
    snapshot_query: "SELECT CONCAT('pid', CHAR(31), CONNECTION_ID()) AS value \
         UNION ALL SELECT CONCAT('schema', CHAR(31), IFNULL(DATABASE(), '')) \
         UNION ALL SELECT CONCAT('set.foreign_key_checks', CHAR(31), @@foreign_key_checks) \
         UNION ALL SELECT CONCAT('set.unique_checks', CHAR(31), @@unique_checks) \
         UNION ALL SELECT CONCAT('set.autocommit', CHAR(31), @@autocommit) \
         UNION ALL SELECT CONCAT('set.sql_mode', CHAR(31), @@sql_mode) \
         UNION ALL SELECT CONCAT('set.sql_notes', CHAR(31), @@sql_notes) \
         UNION ALL SELECT CONCAT('set.time_zone', CHAR(31), @@time_zone) \
         UNION ALL SELECT CONCAT('set.character_set_client', CHAR(31), @@character_set_client) \
         UNION ALL SELECT CONCAT('set.character_set_results', CHAR(31), IFNULL(@@character_set_results, '')) \
         UNION ALL SELECT CONCAT('set.collation_connection', CHAR(31), @@collation_connection) \
         UNION ALL SELECT CONCAT('set.sql_safe_updates', CHAR(31), @@sql_safe_updates) \
         UNION ALL SELECT CONCAT('set.sql_select_limit', CHAR(31), @@sql_select_limit) \
         UNION ALL SELECT CONCAT('set.sql_auto_is_null', CHAR(31), @@sql_auto_is_null) \
         UNION ALL SELECT CONCAT('set.completion_type', CHAR(31), @@completion_type) \
         UNION ALL SELECT CONCAT('set.group_concat_max_len', CHAR(31), @@group_concat_max_len) \
         UNION ALL SELECT CONCAT('set.default_storage_engine', CHAR(31), @@default_storage_engine) \
         /*M!100000 UNION ALL SELECT CONCAT('set.tx_isolation', CHAR(31), @@tx_isolation) */ \
         /*M!100000 UNION ALL SELECT CONCAT('set.tx_read_only', CHAR(31), @@tx_read_only) */ \
         /*M!100101 UNION ALL SELECT CONCAT('wsrep', CHAR(31), global_value) FROM information_schema.system_variables \
         WHERE variable_name = 'WSREP_ON' */ \
         /*M!100000 UNION ALL SELECT CONCAT('role', CHAR(31), IFNULL(CURRENT_ROLE(), '')) */",
    // Only before a connection is established, the server writes another language than English: see `setup`.
    connect_errors: &[
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
        (NOT_IN_CLUSTER, ConnectErrorKind::Unreachable),
        (include_str!("translations/mariadb_server_full.txt"), ConnectErrorKind::ServerFull),
        (include_str!("translations/mariadb_authentication.txt"), ConnectErrorKind::Authentication),
        (include_str!("translations/mariadb_unknown_database.txt"), ConnectErrorKind::UnknownDatabase),
        (include_str!("translations/mariadb_starting.txt"), ConnectErrorKind::Starting),
    ],
    account_full: &["max_user_con%"],
    // Errors 1213, 1205 and 1020. Diesel recognises 1213 by its number, for prepared statements.
    transient: &[
        "Deadlock found",
        "Lock wait timeout exceeded",
        "Record has changed since last read",
        DEADLOCK,
        LOCK_TIMEOUT,
        include_str!("translations/mariadb_changed.txt"),
    ],
    lock_timeout: &["Lock wait timeout exceeded", LOCK_TIMEOUT],
    deadlock: &["Deadlock found", DEADLOCK],
    // MariaDB's client begins the second text with "Server", MySQL's with "MySQL server".
    connection_lost: &["Lost connection", "erver has gone away", "Connection was killed", NOT_IN_CLUSTER],
    // Error 1615, and the client library's text for a result that has changed.
    outdated: &["Prepared statement needs to be re-prepared", "You must reset the statement"],
    other_type: &[],
    // Errors 1290 and 1836.
    read_only: &["--read-only", "--super-read-only", "--read_only", "Running in read-only mode"],
};

/// The longest limit that the server accepts.
const LONGEST_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The last statement with a text. A client sends commands without a text after a statement, and MariaDB records no
/// text for a prepared statement.
const LAST_STATEMENT: &str = "IFNULL(p.info, (SELECT s.sql_text FROM performance_schema.events_statements_history s \
     JOIN performance_schema.threads h USING (thread_id) WHERE h.processlist_id = p.id AND IFNULL(s.nesting_event_type, '') <> 'STATEMENT' \
     AND s.event_name NOT IN ('statement/com/Set option', 'statement/com/Close stmt', 'statement/com/Ping') \
     ORDER BY s.event_id DESC LIMIT 1))";

/// Without `autocommit`, a statement of an autocommit scope is not committed. With another `completion_type`, a commit
/// may begin the next transaction or close the connection.
const REQUIRED_SETTINGS: &str = "SET SESSION autocommit = 1, SESSION completion_type = 0";

/// Without the checks, deleted parents may leave their children, and unique keys may have duplicates. With
/// `sql_auto_is_null` or a select limit, a query returns other rows than it asks for.
const SESSION_SETTINGS: &str = ", SESSION foreign_key_checks = 1, SESSION unique_checks = 1, SESSION sql_auto_is_null = 0, \
     SESSION sql_select_limit = 18446744073709551615";

/// MariaDB and MySQL have different names for the statement limit, and each server executes only its own comment.
const SAVE_LIMITS: &str = "SET @diesel_session_lock = @@SESSION.lock_wait_timeout, \
     @diesel_session_row_lock = @@SESSION.innodb_lock_wait_timeout, \
     /*M!100100 @diesel_session_statement = @@SESSION.max_statement_time, */ \
     /*!50708 @diesel_session_statement = @@SESSION.max_execution_time, */ @diesel_session_limit = NULL";

const NO_STATEMENT_LIMIT: &str = "SET /*M!100100 SESSION max_statement_time = 0, */ \
     /*!50708 SESSION max_execution_time = 0, */ @diesel_session_limit = NULL";

const RESTORE_LIMITS: &str = "SET SESSION lock_wait_timeout = @diesel_session_lock, \
     SESSION innodb_lock_wait_timeout = @diesel_session_row_lock, \
     /*M!100100 SESSION max_statement_time = @diesel_session_statement, */ \
     /*!50708 SESSION max_execution_time = @diesel_session_statement, */ \
     @diesel_session_lock = NULL, @diesel_session_row_lock = NULL, @diesel_session_statement = NULL";

impl Dialect for Mysql {
    fn texts(&self) -> &'static Texts {
        &TEXTS
    }

    fn setup(&self, config: &Config, _no_wal: bool, _checks_client: bool) -> Vec<String> {
        // The library classifies errors by their English texts.
        let mut settings = vec![format!("{REQUIRED_SETTINGS}{SESSION_SETTINGS}, SESSION lc_messages = 'en_US'")];
        settings.extend(config.statement_timeout.and_then(|limit| self.limit_session(Some(limit))));
        settings.extend(config.lock_timeout.map(|limit| self.lock_limit(limit)));
        // MariaDB only: MySQL has no such limit.
        settings.extend(config.idle_in_transaction_timeout.map(|limit| {
            format!(
                "SET /*M!100300 SESSION idle_transaction_timeout = IF(@@idle_transaction_timeout = 0, {}, \
                 @@idle_transaction_timeout), */ @diesel_session_limit = NULL",
                limit.min(LONGEST_LIMIT).as_secs()
            )
        }));
        settings.push(PING.to_owned());
        vec![settings.join("; ")]
    }

    /// `SET TRANSACTION` applies to the next transaction only. The marker also resets the last generated key. Otherwise
    /// a new row without a generated key would get the key of another row.
    fn begin(&self, options: BeginOptions) -> Option<Cow<'static, str>> {
        const BEGIN: &str = "BEGIN; SAVEPOINT diesel_session_began; DO LAST_INSERT_ID(0)";
        let characteristics = options.characteristics();
        let settings = (!characteristics.is_empty()).then(|| format!("SET TRANSACTION {}", characteristics.join(", ")));
        let limit = options.remaining.and_then(|remaining| self.limit_session(Some(remaining)));
        if settings.is_none() && limit.is_none() {
            return Some(BEGIN.into());
        }
        Some(settings.into_iter().chain(limit).chain([BEGIN.to_owned()]).collect::<Vec<_>>().join("; ").into())
    }

    /// MariaDB and MySQL have different names for the limit, and each server executes only its own comment. `None`
    /// restores the server's default.
    fn limit_session(&self, limit: Option<Duration>) -> Option<String> {
        let (mariadb, mysql) = match limit.map(|limit| limit.min(LONGEST_LIMIT)) {
            Some(limit) => {
                (format!("{:.3}", millis(limit) as f64 / 1000.0), millis(limit).min(u64::from(u32::MAX)).to_string())
            }
            None => ("DEFAULT".into(), "DEFAULT".into()),
        };
        Some(format!(
            "SET /*M!100100 SESSION max_statement_time = {mariadb}, */ /*!50708 SESSION max_execution_time = {mysql}, */ \
             @diesel_session_limit = NULL"
        ))
    }

    fn lock_limit(&self, limit: Duration) -> String {
        let seconds = limit.min(LONGEST_LIMIT).as_secs_f64().ceil().max(1.0);
        format!("SET SESSION lock_wait_timeout = {seconds:.0}, SESSION innodb_lock_wait_timeout = {seconds:.0}")
    }

    /// If possible, the function releases the marker and sets it again, which fails if the marker does not exist. The
    /// release removes all newer savepoints. The new marker is safe at its later position, because the session never
    /// rolls back to it.
    fn transaction_exists(&self, conn: &mut dyn Inspect, check: TransactionCheck) -> bool {
        if check.may_be_replaced && check.marker_is_newest {
            return conn
                .batch_execute("RELEASE SAVEPOINT diesel_session_began; SAVEPOINT diesel_session_began")
                .is_ok();
        }
        is_in_transaction(conn, check.serialization_failure)
    }

    fn may_be_in_transaction(&self, conn: &mut dyn Inspect) -> bool {
        is_in_transaction(conn, false)
    }

    /// The error contains the name of the savepoint in every language.
    fn was_refused(&self, error: &DieselError, _depth: Option<u32>) -> bool {
        matches!(error, DieselError::DatabaseError(_, information) if information.message().contains(MARKER))
    }

    fn try_lock_schema(&self, database: &str) -> Option<String> {
        Some(format!("SELECT CAST(GET_LOCK('{}', 0) AS CHAR) AS value", lock_name(database)))
    }

    fn unlock_schema(&self, database: &str) -> Option<String> {
        let released = format!("IFNULL(RELEASE_LOCK('{}'), 0)", lock_name(database));
        Some(format!("SELECT IF({released}, NULL, CAST(CONNECTION_ID() AS CHAR)) AS value"))
    }

    /// The server does not tell which session has locked a table. It tells which sessions are in a transaction, to an
    /// account that may see all processes. Without this privilege the query finds all sessions of the account itself in
    /// the database. The last statement of an idle session is available if the server records statements and the
    /// account may read the records.
    fn blockers(&self, waited: Duration) -> Vec<String> {
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

    fn schema_lock_holders(&self, database: &str) -> Vec<String> {
        let holds = format!("p.id = IS_USED_LOCK('{}')", lock_name(database));
        let state = "IF(p.command = 'Sleep', 'idle', LOWER(p.command))";
        vec![sessions(state, LAST_STATEMENT, "", &holds, "0"), sessions(state, "p.info", "", &holds, "0")]
    }

    fn restore(&self, before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String> {
        let kind = DatabaseKind::Mysql;
        let mut statements = Vec::new();
        if before.get("role") != now.get("role") {
            statements.push(match before.get("role").filter(|role| !role.is_empty()) {
                Some(role) => format!("SET ROLE {}", kind.quote(role)),
                None => "SET ROLE NONE".into(),
            });
        }
        if let Some(schema) = before.schema().filter(|_| before.schema() != now.schema()) {
            statements.push(format!("USE {}", kind.quote(schema)));
        }
        for (name, value) in changed(before, now) {
            let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            let value = if is_number { value.to_owned() } else { kind.literal(value) };
            statements.push(format!("SET SESSION {name} = {value}"));
        }
        statements
    }

    fn set_limits(&self, lock_timeout: Duration) -> Vec<String> {
        vec![SAVE_LIMITS.into(), self.lock_limit(lock_timeout), NO_STATEMENT_LIMIT.into()]
    }

    fn restore_limits(&self, _original: &ConnectionSnapshot) -> Vec<String> {
        vec![RESTORE_LIMITS.into()]
    }

    fn bookkeeping_table_query(&self, schema: &str) -> String {
        format!(
            "SELECT 'yes' AS value FROM information_schema.tables \
             WHERE table_schema = {} AND table_name = '{BOOKKEEPING_TABLE}'",
            DatabaseKind::Mysql.literal(schema)
        )
    }
}

/// The lock name contains a hash, because lock names are shared by all databases of the server and have at most 64
/// characters.
fn lock_name(database: &str) -> String {
    let hash = super::fnv1a([database.as_bytes()]);
    format!("diesel-session/schema/{hash:016x}")
}

/// A query for the other sessions that satisfy `condition` and have the lowest rank, one row each.
fn sessions(state: &str, statement: &str, joined: &str, condition: &str, rank: &str) -> String {
    format!(
        "SELECT value FROM (SELECT CONCAT_WS(CHAR(31), p.id, CONCAT(p.user, '@', SUBSTRING_INDEX(p.host, ':', 1)), {state}, \
         p.time, IFNULL(LEFT({statement}, 1000), '')) AS value, {rank} AS rank_, MIN({rank}) OVER () AS least, p.id AS id \
         FROM information_schema.processlist p {joined} WHERE p.id <> CONNECTION_ID() AND {condition}) AS found \
         WHERE rank_ = least ORDER BY id LIMIT 20"
    )
}

/// MariaDB has a variable for the answer. MySQL does not, and only a deadlock among its errors ends the transaction.
fn is_in_transaction(conn: &mut dyn Inspect, serialization_failure: bool) -> bool {
    let answer = conn.texts("SELECT CAST(@@in_transaction AS CHAR) AS value");
    let lost = answer.as_ref().is_err_and(is_connection_lost);
    match answer.ok().and_then(|rows| rows.into_iter().next().flatten()) {
        Some(answer) => answer == "1",
        None => !lost && !serialization_failure,
    }
}
