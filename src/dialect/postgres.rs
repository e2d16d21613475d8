//! PostgreSQL.
//!
//! Functions, operators and types are qualified with their schema, because a schema before `pg_catalog` in the
//! `search_path` may have others with the same names. `IN`, `NULLIF`, `LIKE`, `BETWEEN` and `JOIN .. USING` find their
//! operators through the `search_path`, so this SQL cannot use them.

use std::borrow::Cow;
use std::time::Duration;

use diesel::result::Error as DieselError;

use super::migrations::{BOOKKEEPING_TABLE, changed};
use super::{BeginOptions, ConnectionSnapshot, Dialect, Texts, TransactionCheck, millis};
use crate::behind::Behind;
use crate::config::Config;
use crate::connection::Inspect;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::url::Target;

pub(super) struct Postgres;

/// The texts with translations, which `scripts/translations` generates from the catalogs of the server and of libpq.
const SERVER_FULL: &str = include_str!("translations/server_full.txt");

/// What PgBouncer and then Supavisor say if they have no free connection.
const POOLER_FULL: &str = "no more connections allowed (max_client_conn)
client connections exceeded (max_
query_wait_timeout
max client connections reached
Max client connections reached
max clients reached";

/// What PgBouncer and then Pgpool-II say if they do not reach the server.
const POOLER_WITHOUT_SERVER: &str = "(server_login_retry)
pgbouncer cannot connect to server
pgpool is not accepting any new connections
failed to create a backend connection";

/// What PgBouncer says if a connection is lost because it has none to the server.
const POOLER_LOST: &str = "server conn crashed?
query_wait_timeout
(server_login_retry)
pgbouncer cannot connect to server";

/// The number of connections that are available to ordinary roles.
macro_rules! capacity {
    () => {
        "pg_catalog.current_setting('max_connections')::pg_catalog.int4 \
         OPERATOR(pg_catalog.-) pg_catalog.current_setting('superuser_reserved_connections')::pg_catalog.int4 \
         OPERATOR(pg_catalog.-) coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::pg_catalog.int4"
    };
}

/// The default isolation level, see `READ_COMMITTED`.
macro_rules! isolation {
    () => {
        "CASE WHEN pg_catalog.current_setting('default_transaction_isolation') \
         OPERATOR(pg_catalog.=) ANY (ARRAY['read committed', 'read uncommitted']) THEN 'committed' ELSE 'strict' END"
    };
}

/// The system identifier and the timeline of the server `c`. NULL on a standby.
macro_rules! identity {
    () => {
        "CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.concat(c.system_identifier, ' ', \
         pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8)) END"
    };
}

/// The sessions of clients. The server hides the `backend_type` of other roles' sessions from an ordinary role.
macro_rules! clients {
    () => {
        "FROM pg_catalog.pg_stat_activity WHERE usesysid IS NOT NULL AND datid IS NOT NULL \
         AND coalesce(backend_type, 'client backend') OPERATOR(pg_catalog.=) 'client backend'"
    };
}

static TEXTS: Texts = Texts {
    // The library's SQL contains names as string literals. Role, database and server may have another default.
    required_settings: Some(REQUIRED_SETTINGS),
    // The fifth field is `default` if the server supports `client_connection_check_interval`, with which it detects
    // during a statement that the client is gone, and the role, the database and the URL do not set it.
    server_info_query: Some(concat!(
        "SELECT pg_catalog.concat_ws(' ', ",
        isolation!(),
        ", pg_catalog.pg_backend_pid(), ",
        capacity!(),
        ", extract(epoch FROM pg_catalog.pg_postmaster_start_time()), \
         CASE WHEN (SELECT s.source FROM pg_catalog.pg_settings s WHERE s.name OPERATOR(pg_catalog.=) 'client_connection_check_interval') \
         OPERATOR(pg_catalog.=) 'default' AND pg_catalog.strpos(pg_catalog.version(), 'linux') OPERATOR(pg_catalog.>) 0 \
         THEN 'default' ELSE 'set' END, \
         coalesce((SELECT pg_catalog.max(extract(epoch FROM pg_catalog.clock_timestamp() \
         OPERATOR(pg_catalog.-) a.backend_start))::pg_catalog.text \
         FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) a), '?'), \
         pg_catalog.current_database()) AS value"
    )),
    defaults_query: Some(concat!(
        "SELECT pg_catalog.concat(",
        isolation!(),
        ", ' SET statement_timeout = ', pg_catalog.quote_literal(pg_catalog.current_setting('statement_timeout'))) AS value"
    )),
    ping: None,
    client_port_query: Some("SELECT pg_catalog.inet_client_port()::pg_catalog.text AS value"),
    session_counts_query: Some(concat!(
        "SELECT pg_catalog.concat(CASE WHEN coalesce(application_name, '') OPERATOR(pg_catalog.=) '' THEN 'unnamed' \
         ELSE application_name END, ' ', pg_catalog.count(*)) AS value ",
        clients!(),
        " GROUP BY application_name ORDER BY pg_catalog.count(*) DESC, 1 LIMIT 20"
    )),
    full_server_query: Some(concat!(
        "SELECT CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.>=) (",
        capacity!(),
        ") THEN '1' ELSE '0' END AS value ",
        clients!()
    )),
    catalog_search_path: Some("SET search_path TO pg_catalog, pg_temp"),
    read_only_guard: None,
    // In an aborted transaction the server refuses the first statement and ignores the second. A plain `COMMIT` would
    // roll back and report success.
    guarded_commit: Some("SELECT 1; COMMIT"),
    transaction_number: Some(
        "SELECT pg_catalog.pg_current_xact_id_if_assigned()::pg_catalog.text OPERATOR(pg_catalog.||) ' ' \
         OPERATOR(pg_catalog.||) pg_catalog.pg_backend_pid()::pg_catalog.text AS value",
    ),
    server_identity: Some(concat!("SELECT ", identity!(), " AS value FROM pg_catalog.pg_control_system() c")),
    is_read_only: Some("SELECT pg_catalog.current_setting('transaction_read_only') AS value"),
    begin_nested: "SAVEPOINT diesel_session",
    probe_nested: Some("SELECT 1"),
    // Checks the deferred constraints, as a commit does and the release of a savepoint does not. The inner savepoint
    // restores the constraint modes.
    commit_nested: "SAVEPOINT diesel_session_check; SET CONSTRAINTS ALL IMMEDIATE; \
         ROLLBACK TO SAVEPOINT diesel_session_check; RELEASE SAVEPOINT diesel_session_check; RELEASE SAVEPOINT diesel_session",
    tables: "SELECT tablename::pg_catalog.text AS value FROM pg_catalog.pg_tables \
         WHERE schemaname OPERATOR(pg_catalog.=) pg_catalog.current_schema()",
    inventory: "SELECT pg_catalog.concat(table_name, '.', column_name) AS value FROM information_schema.columns \
         WHERE table_schema::pg_catalog.text OPERATOR(pg_catalog.=) pg_catalog.current_schema()::pg_catalog.text \
         UNION SELECT pg_catalog.concat(tablename, '.', indexname) FROM pg_catalog.pg_indexes \
         WHERE schemaname OPERATOR(pg_catalog.=) pg_catalog.current_schema() ORDER BY 1",
    snapshot_query: "SELECT pg_catalog.concat('pid', pg_catalog.chr(31), pg_catalog.pg_backend_pid()) AS value \
         UNION ALL SELECT pg_catalog.concat('schema', pg_catalog.chr(31), pg_catalog.current_schema()) \
         UNION ALL SELECT pg_catalog.concat('user', pg_catalog.chr(31), CURRENT_USER) \
         UNION ALL SELECT pg_catalog.concat('search_path', pg_catalog.chr(31), pg_catalog.current_setting('search_path')) \
         UNION ALL SELECT pg_catalog.concat('role', pg_catalog.chr(31), pg_catalog.current_setting('role')) \
         UNION ALL SELECT pg_catalog.concat('authorization', pg_catalog.chr(31), SESSION_USER) \
         UNION ALL SELECT pg_catalog.concat('statement_timeout', pg_catalog.chr(31), pg_catalog.current_setting('statement_timeout')) \
         UNION ALL SELECT pg_catalog.concat('lock_timeout', pg_catalog.chr(31), pg_catalog.current_setting('lock_timeout')) \
         UNION ALL SELECT pg_catalog.concat('idle_in_transaction_session_timeout', pg_catalog.chr(31), \
         pg_catalog.current_setting('idle_in_transaction_session_timeout')) \
         UNION ALL SELECT pg_catalog.concat('set.', name, pg_catalog.chr(31), setting) FROM pg_catalog.pg_settings \
         WHERE source OPERATOR(pg_catalog.=) 'session'",
    connect_errors: &[
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
        // Before the texts of an unreachable server: a URL may have several hosts.
        ("session is read-only", ConnectErrorKind::NotPrimary),
        ("server is in hot standby mode", ConnectErrorKind::NotPrimary),
        (include_str!("translations/not_primary.txt"), ConnectErrorKind::NotPrimary),
        ("Connection refused", ConnectErrorKind::Unreachable),
        ("could not translate host name", ConnectErrorKind::Unreachable),
        ("No such file or directory", ConnectErrorKind::Unreachable),
        ("timeout expired", ConnectErrorKind::Unreachable),
        ("server closed the connection unexpectedly", ConnectErrorKind::Unreachable),
        ("No route to host", ConnectErrorKind::Unreachable),
        (POOLER_FULL, ConnectErrorKind::ServerFull),
        (POOLER_WITHOUT_SERVER, ConnectErrorKind::Unreachable),
        ("FATAL: no such database: ", ConnectErrorKind::UnknownDatabase),
        (include_str!("translations/starting.txt"), ConnectErrorKind::Starting),
        (SERVER_FULL, ConnectErrorKind::ServerFull),
        (include_str!("translations/authentication.txt"), ConnectErrorKind::Authentication),
        (include_str!("translations/unknown_database.txt"), ConnectErrorKind::UnknownDatabase),
        (include_str!("translations/unreachable.txt"), ConnectErrorKind::Unreachable),
    ],
    account_full: &["too many connections for %", SERVER_FULL],
    // SQLSTATE 40001 and 40P01. Diesel recognises the first by its code, and has only the text of the second.
    transient: &[
        "could not serialize access",
        "deadlock detected",
        include_str!("translations/deadlock.txt"),
        include_str!("translations/serialization_failure.txt"),
    ],
    lock_timeout: &["lock timeout", include_str!("translations/lock_timeout.txt")],
    deadlock: &[],
    connection_lost: &[
        "server closed the connection",
        "no connection to the server",
        "terminating connection",
        POOLER_LOST,
        include_str!("translations/terminated.txt"),
    ],
    // PostgreSQL never translates the first text.
    outdated: &[
        "cache lookup failed for type",
        "cached plan must not change result type",
        "gecachter Plan darf den Ergebnistyp nicht ändern",
        "el plan almacenado no debe cambiar el tipo de resultado",
        "le plan en cache ne doit pas modifier le type en résultat",
        "il cached plan non deve cambiare il tipo del risultato",
        "キャッシュした実行計画は結果型を変更してはなりません",
        "დაკეშილი გეგმა შედეგის ტიპს არ უნდა ცვლიდეს",
        "캐시된 계획에서 결과 형식을 바꾸지 않아야 함",
        "в кешированном плане не должен изменяться тип результата",
        "cache:ad plan får inte ändra resultattyp",
        "в кешованому плані не повинен змінюватись тип результату",
        "已缓冲的计划不能改变结果类型",
        "type with OID % does not exist",
        "Typ mit OID % existiert nicht",
        "no existe el tipo con OID %",
        "le type d'OID % n'existe pas",
        "il tipo con OID % non esiste",
        "OID %の型は存在しません",
        "ტიპი OID-ით % არ არსებობს",
        "OID % 자료형 없음",
        "тип с OID % не существует",
        "typ med OID % existerar inte",
        "тип з OID % не існує",
        "OID 为 % 的类型不存在",
    ],
    other_type: &[
        "column \"% but expression is of type ",
        "operator does not exist: ",
        include_str!("translations/other_type.txt"),
        include_str!("translations/no_operator.txt"),
    ],
    read_only: &[],
};

const REQUIRED_SETTINGS: &str = "SET standard_conforming_strings = on";

const CLIENT_CHECK: &str = "SET client_connection_check_interval = 10000";

/// Limits the wait for a dead network. The client probes an idle peer after 10 s, and data that is not acknowledged for
/// 20 s ends the connection. The duration of a statement is not limited, because the kernel of the server answers
/// during the statement.
const KEEPALIVES: &[(&str, &str)] = &[
    ("keepalives_idle", "10"),
    ("keepalives_interval", "3"),
    ("keepalives_count", "3"),
    ("tcp_user_timeout", "20000"),
];

/// User and role come first, so that the other statements are permitted. Diesel sets this time zone and this encoding
/// on every connection. `DISCARD ALL` would also remove Diesel's prepared statements.
const RESET: &str = "SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; \
     SELECT pg_catalog.pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP; \
     SET TIME ZONE 'UTC'; SET CLIENT_ENCODING TO 'UTF8'";

/// The limits that a schema operation sets itself. `restore_limits` restores them.
const LIMITS: [&str; 3] = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"];

/// The settings of a single transaction.
const TRANSACTION_SETTINGS: [&str; 3] = ["transaction_isolation", "transaction_read_only", "transaction_deferrable"];

/// The columns of one session. An ordinary role cannot see the states and statements of other roles' sessions.
const SESSION: &str = "pg_catalog.concat_ws(pg_catalog.chr(31), a.pid, \
     coalesce(CASE WHEN a.application_name OPERATOR(pg_catalog.<>) '' THEN a.application_name END, \
     CASE WHEN a.usename IS NOT NULL THEN pg_catalog.concat(a.usename, '@', coalesce(pg_catalog.host(a.client_addr), 'local')) END, \
     a.backend_type, ''), coalesce(a.state, ''), \
     coalesce(extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) a.state_change)::pg_catalog.text, ''), \
     coalesce(pg_catalog.left(a.query, 1000), '')) AS value";

/// The columns of one prepared transaction. No session has it any more.
const PREPARED: &str = "pg_catalog.concat_ws(pg_catalog.chr(31), '', \
     pg_catalog.concat('prepared transaction `', p.gid, '` of ', p.owner), '', \
     extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) p.prepared)::pg_catalog.text, '')";

/// Whether a row of `pg_locks` belongs to this database.
const IN_THIS_DATABASE: &str = "l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database d \
     WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())";

impl Dialect for Postgres {
    fn texts(&self) -> &'static Texts {
        &TEXTS
    }

    /// The caller's deadline limits a connect. libpq's timeout, which is at least 2 s and in whole seconds, frees the
    /// pool's thread.
    fn driver_url(&self, target: &Target, config: &Config, app: &str) -> String {
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

    fn setup(&self, config: &Config, _no_wal: bool, checks_client: bool) -> Vec<String> {
        let mut settings = vec![REQUIRED_SETTINGS.to_owned()];
        if config.behind.is_transaction_pooler() {
            return settings;
        }
        settings.extend(checks_client.then(|| CLIENT_CHECK.to_owned()));
        settings.extend(config.statement_timeout.and_then(|limit| self.limit_session(Some(limit))));
        settings.extend(config.lock_timeout.map(|limit| self.lock_limit(limit)));
        settings.extend(config.idle_in_transaction_timeout.map(|limit| {
            let name = "'idle_in_transaction_session_timeout'";
            format!(
                "SELECT pg_catalog.set_config({name}, '{}', false) \
                 WHERE pg_catalog.current_setting({name}) OPERATOR(pg_catalog.=) '0'",
                setting(limit)
            )
        }));
        vec![settings.join("; ")]
    }

    fn begin(&self, options: BeginOptions) -> Option<Cow<'static, str>> {
        let characteristics = options.characteristics();
        if characteristics.is_empty() && options.remaining.is_none() && options.lock_timeout.is_none() {
            return None;
        }
        let mut sql = [&["BEGIN"], &*characteristics].concat().join(" ");
        if let Some(limit) = options.remaining.and_then(|remaining| self.limit_statements(remaining)) {
            sql = format!("{sql}; {limit}");
        }
        if let Some(limit) = options.lock_timeout {
            sql = format!("{sql}; SET LOCAL lock_timeout = {}", setting(limit));
        }
        Some(sql.into())
    }

    fn limit_session(&self, limit: Option<Duration>) -> Option<String> {
        Some(match limit {
            Some(limit) => format!("SET statement_timeout = {}", setting(limit)),
            None => "RESET statement_timeout".into(),
        })
    }

    fn limit_statements(&self, limit: Duration) -> Option<String> {
        Some(format!("SET LOCAL statement_timeout = {}", setting(limit)))
    }

    fn lock_limit(&self, limit: Duration) -> String {
        format!("SET lock_timeout = {}", setting(limit))
    }

    /// Diesel knows from libpq whether there is a transaction. Only the lexer may have read the text differently than
    /// the server, if a backslash in a plain string is no ordinary character for the server.
    fn transaction_exists(&self, conn: &mut dyn Inspect, check: TransactionCheck) -> bool {
        let mut setting = || conn.texts("SELECT pg_catalog.current_setting('standard_conforming_strings') AS value");
        !check.may_be_replaced || setting().is_ok_and(|rows| rows.first().and_then(Option::as_deref) == Some("on"))
    }

    /// Whether this session may be in a transaction. Inside a transaction, `now()` is the time at which the transaction
    /// began, so two queries return the same time. An aborted transaction refuses the query.
    fn may_be_in_transaction(&self, conn: &mut dyn Inspect) -> bool {
        let mut began = || conn.texts("SELECT pg_catalog.now()::pg_catalog.text AS value");
        match (began(), began()) {
            (Ok(first), Ok(second)) => first == second,
            _ => true,
        }
    }

    /// A failed COMMIT ends the transaction, and Diesel learns this from libpq.
    fn was_refused(&self, _error: &DieselError, depth: Option<u32>) -> bool {
        depth.is_some_and(|depth| depth > 0)
    }

    fn reset(&self, config: &Config, checks_client: bool, application_name: &str) -> String {
        let mut statements = vec![RESET.to_owned()];
        // These statements are the program's: the driver keeps none.
        statements.extend((!config.behind.keeps_prepared()).then(|| "DEALLOCATE ALL".to_owned()));
        statements.extend(self.setup(config, true, checks_client));
        if config.behind != Behind::Nothing {
            let name = DatabaseKind::Postgres.literal(application_name);
            statements.push(format!("SET application_name = {name}"));
        }
        statements.join("; ")
    }

    fn transaction_status(&self, number: u64, identity: &str) -> Option<String> {
        let identity = DatabaseKind::Postgres.literal(identity);
        Some(format!(
            "SELECT CASE WHEN server.identity OPERATOR(pg_catalog.=) {identity} \
             THEN coalesce(pg_catalog.pg_xact_status('{number}'::pg_catalog.xid8), 'forgotten') \
             ELSE 'another server' END AS value FROM (SELECT {} AS identity FROM pg_catalog.pg_control_system() c) server",
            identity!()
        ))
    }

    /// PostgreSQL's advisory locks belong to one database. The key is derived from the name of this crate.
    fn try_lock_schema(&self, _database: &str) -> Option<String> {
        Some("SELECT CASE WHEN pg_catalog.pg_try_advisory_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value".into())
    }

    fn unlock_schema(&self, _database: &str) -> Option<String> {
        Some(
            "SELECT CASE WHEN NOT pg_catalog.pg_advisory_unlock(7236271, 5331310) \
             THEN pg_catalog.pg_backend_pid()::pg_catalog.text END AS value"
                .into(),
        )
    }

    /// Every transaction that has a lock on a table blocks the removal of this table. A session whose transaction began
    /// after this session began to wait had to wait too, and got its lock only when this session gave up: it has rank
    /// 1. Transactions with locks in other schemas have rank 2. The query returns the transactions with the lowest rank.
    fn blockers(&self, waited: Duration) -> Vec<String> {
        vec![format!(
            "WITH found AS ( \
             SELECT l.pid, l.virtualtransaction, pg_catalog.min( \
             CASE WHEN n.nspname OPERATOR(pg_catalog.<>) ALL (pg_catalog.current_schemas(false)) THEN 2 \
             WHEN s.xact_start OPERATOR(pg_catalog.>) (pg_catalog.now() OPERATOR(pg_catalog.-) interval '{} milliseconds') \
             THEN 1 ELSE 0 END) AS rank \
             FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) l.relation \
             JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
             LEFT JOIN pg_catalog.pg_stat_activity s ON s.pid OPERATOR(pg_catalog.=) l.pid \
             WHERE l.locktype OPERATOR(pg_catalog.=) 'relation' AND l.granted \
             AND coalesce(l.pid OPERATOR(pg_catalog.<>) pg_catalog.pg_backend_pid(), true) \
             AND c.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid AND {IN_THIS_DATABASE} \
             GROUP BY l.pid, l.virtualtransaction), \
             named AS ( \
             SELECT {SESSION}, a.xact_start AS since, a.pid, found.rank FROM found \
             JOIN pg_catalog.pg_stat_activity a ON a.pid OPERATOR(pg_catalog.=) found.pid \
             UNION ALL SELECT {PREPARED}, p.prepared, NULL, found.rank FROM found \
             JOIN pg_catalog.pg_locks t ON t.virtualtransaction OPERATOR(pg_catalog.=) found.virtualtransaction \
             JOIN pg_catalog.pg_prepared_xacts p ON p.transaction OPERATOR(pg_catalog.=) t.transactionid \
             WHERE found.pid IS NULL AND t.pid IS NULL) \
             SELECT value FROM (SELECT named.*, pg_catalog.min(rank) OVER () AS least FROM named) AS ranked \
             WHERE rank OPERATOR(pg_catalog.=) least ORDER BY since, pid LIMIT 20",
            setting(waited)
        )]
    }

    fn schema_lock_holders(&self, _database: &str) -> Vec<String> {
        vec![format!(
            "SELECT {SESSION} FROM pg_catalog.pg_stat_activity a \
             JOIN pg_catalog.pg_locks l ON l.pid OPERATOR(pg_catalog.=) a.pid \
             WHERE l.locktype OPERATOR(pg_catalog.=) 'advisory' AND l.granted \
             AND l.classid OPERATOR(pg_catalog.=) 7236271::pg_catalog.oid AND l.objid OPERATOR(pg_catalog.=) 5331310::pg_catalog.oid \
             AND l.objsubid OPERATOR(pg_catalog.=) 2 AND {IN_THIS_DATABASE}"
        )]
    }

    fn restore(&self, before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String> {
        let kind = DatabaseKind::Postgres;
        let mut statements = Vec::new();
        let differs = |name| before.get(name) != now.get(name);
        if differs("authorization") {
            statements.push("RESET SESSION AUTHORIZATION".into());
            if let Some(user) = before.get("authorization") {
                statements.push(format!("SET SESSION AUTHORIZATION {}", kind.quote(user)));
            }
        }
        if differs("authorization") || differs("role") {
            statements.push(match before.get("role") {
                Some("none") | None => "SET ROLE NONE".into(),
                Some(role) => format!("SET ROLE {}", kind.quote(role)),
            });
        }
        let is_excluded = |setting: &str| LIMITS.contains(&setting) || TRANSACTION_SETTINGS.contains(&setting);
        for (setting, value) in changed(before, now).filter(|(setting, _)| !is_excluded(setting)) {
            let (setting, value) = (kind.literal(setting), kind.literal(value));
            statements.push(format!("SELECT pg_catalog.set_config({setting}, {value}, false)"));
        }
        let new = now.0.iter().map(|(name, _)| name).filter(|name| before.get(name).is_none());
        for setting in new.filter_map(|name| name.strip_prefix("set.")).filter(|setting| !is_excluded(setting)) {
            let quoted: Vec<String> = setting.split('.').map(|part| kind.quote(part)).collect();
            statements.push(format!("RESET {}", quoted.join(".")));
        }
        statements
    }

    fn set_limits(&self, lock_timeout: Duration) -> Vec<String> {
        let no_limits = "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0";
        vec![format!("{}; {no_limits}", self.lock_limit(lock_timeout))]
    }

    fn restore_limits(&self, original: &ConnectionSnapshot) -> Vec<String> {
        let set = |limit: &str| Some(format!("SET {limit} = {}", DatabaseKind::Postgres.literal(original.get(limit)?)));
        LIMITS.into_iter().filter_map(set).collect()
    }

    fn bookkeeping_table_query(&self, schema: &str) -> String {
        format!(
            "SELECT 'yes' AS value FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
             ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
             WHERE n.nspname OPERATOR(pg_catalog.=) {} AND c.relname OPERATOR(pg_catalog.=) '{BOOKKEEPING_TABLE}'",
            DatabaseKind::Postgres.literal(schema)
        )
    }
}

/// The value of a setting in milliseconds, at most the largest value that the server accepts.
fn setting(limit: Duration) -> u64 {
    millis(limit).min(i32::MAX as u64)
}
