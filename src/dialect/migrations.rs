//! SQL of `create_all` and `drop_all`.
//!
//! On PostgreSQL every function, type and operator is qualified, because the program's `search_path` may have another
//! schema before `pg_catalog`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::SEPARATOR;
use super::lexer::{Lexer, Token};
use crate::kind::DatabaseKind;

/// Diesel's table of the applied migrations.
const BOOKKEEPING_TABLE: &str = "__diesel_schema_migrations";

/// The limits that a schema operation sets itself. [`restore_limits`](DatabaseKind::restore_limits) restores them.
const LIMITS: [&str; 3] = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"];

/// The settings of a single transaction.
const TRANSACTION_SETTINGS: [&str; 3] = ["transaction_isolation", "transaction_read_only", "transaction_deferrable"];

/// The state of the connection that a migration may change, and that must not be different for the next migration.
const POSTGRES_SNAPSHOT: &str = "SELECT pg_catalog.concat('pid', pg_catalog.chr(31), pg_catalog.pg_backend_pid()) AS value \
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
     WHERE source OPERATOR(pg_catalog.=) 'session'";

/// Begins a transaction in which each statement sees all earlier commits, whatever the default isolation level is.
/// `committed` is in lower case, so that a search of logs or network traffic for `COMMIT` finds commits only.
pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL read committed";

/// A query that takes PostgreSQL's lock of all schema operations until the end of the transaction.
pub(crate) const TRY_LOCK_IN_TRANSACTION: &str =
    "SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value";

const NO_LIMITS: &str = "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0";

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

const MYSQL_SNAPSHOT: &str = "SELECT CONCAT('schema', CHAR(31), IFNULL(DATABASE(), '')) AS value \
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
     /*M!100000 UNION ALL SELECT CONCAT('role', CHAR(31), IFNULL(CURRENT_ROLE(), '')) */";

const SQLITE_SNAPSHOT: &str = "SELECT 'schema' || char(31) || 'main' AS value \
     UNION ALL SELECT 'set.busy_timeout' || char(31) || timeout FROM pragma_busy_timeout \
     UNION ALL SELECT 'set.foreign_keys' || char(31) || foreign_keys FROM pragma_foreign_keys \
     UNION ALL SELECT 'set.recursive_triggers' || char(31) || recursive_triggers FROM pragma_recursive_triggers \
     UNION ALL SELECT 'set.legacy_alter_table' || char(31) || legacy_alter_table FROM pragma_legacy_alter_table \
     UNION ALL SELECT 'set.ignore_check_constraints' || char(31) || ignore_check_constraints FROM pragma_ignore_check_constraints \
     UNION ALL SELECT 'set.query_only' || char(31) || query_only FROM pragma_query_only \
     UNION ALL SELECT 'set.writable_schema' || char(31) || writable_schema FROM pragma_writable_schema";

/// The state of a connection that matters to migrations: its server process, its current schema, its role and its
/// settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ConnectionSnapshot(BTreeMap<String, String>);

impl ConnectionSnapshot {
    pub(crate) fn from_rows(rows: Vec<Option<String>>) -> Self {
        let pairs = rows.into_iter().flatten();
        Self(
            pairs
                .filter_map(|row| row.split_once(SEPARATOR).map(|(name, value)| (name.to_owned(), value.to_owned())))
                .collect(),
        )
    }

    /// The schema (PostgreSQL) or database (MySQL) in which the server creates unqualified names, if there is one.
    pub(crate) fn schema(&self) -> Option<&str> {
        self.get("schema").filter(|schema| !schema.is_empty())
    }

    /// The id of the server process. Behind a pooler the next transaction may have another process.
    pub(crate) fn process(&self) -> Option<&str> {
        self.get("pid")
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The first schema of `search_path`, if it is not the current schema: it does not exist, or the role may not use
    /// it.
    pub(crate) fn missing_schema(&self) -> Option<String> {
        let user = self.get("user").unwrap_or_default();
        for name in names_in(self.get("search_path")?) {
            match name.as_str() {
                // PostgreSQL ignores `$user` if there is no schema with the name of the user.
                "$user" if self.schema() != Some(user) => {}
                "$user" => return None,
                "pg_catalog" | "pg_temp" => {}
                name => return (self.schema() != Some(name)).then(|| name.to_owned()),
            }
        }
        None
    }
}

/// The names in a list such as `tenant, "My schema"`.
fn names_in(list: &str) -> Vec<String> {
    let names = Lexer::new(list, DatabaseKind::Postgres).filter_map(|(token, ..)| match token {
        Token::Word(word) => Some(word.to_lowercase()),
        Token::QuotedName(name) => Some(name.replace("\"\"", "\"")),
        _ => None,
    });
    names.collect()
}

impl DatabaseKind {
    /// Whether `sql` has no statement, only white space, comments and semicolons.
    pub(crate) fn is_blank(self, sql: &str) -> bool {
        Lexer::new(sql, self).all(|(token, ..)| token == Token::Symbol(';'))
    }

    /// A query whose rows are the input of [`ConnectionSnapshot::from_rows`].
    pub(crate) fn snapshot_query(self) -> &'static str {
        match self {
            Self::Postgres => POSTGRES_SNAPSHOT,
            Self::Mysql => MYSQL_SNAPSHOT,
            Self::Sqlite => SQLITE_SNAPSHOT,
        }
    }

    /// Statements that restore the state `before`. `now` is the current state.
    pub(crate) fn restore(self, before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String> {
        match self {
            Self::Postgres => restore_postgres(before, now),
            Self::Mysql => {
                let mut statements = Vec::new();
                if before.get("role") != now.get("role") {
                    statements.push(match before.get("role").filter(|role| !role.is_empty()) {
                        Some(role) => format!("SET ROLE {}", self.quote(role)),
                        None => "SET ROLE NONE".into(),
                    });
                }
                if let Some(schema) = before.schema().filter(|_| before.schema() != now.schema()) {
                    statements.push(format!("USE {}", self.quote(schema)));
                }
                for (name, value) in changed(before, now) {
                    let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
                    let value = if is_number { value.to_owned() } else { self.literal(value) };
                    statements.push(format!("SET SESSION {name} = {value}"));
                }
                statements
            }
            Self::Sqlite => changed(before, now).map(|(name, value)| format!("PRAGMA {name} = {value}")).collect(),
        }
    }

    /// Statements that set the limits of a schema operation for the session: a lock timeout, and no statement timeout.
    pub(crate) fn set_limits(self, lock_timeout: Duration) -> Vec<String> {
        match self {
            Self::Postgres => vec![format!("{}; {NO_LIMITS}", self.lock_limit(lock_timeout))],
            Self::Mysql => vec![SAVE_LIMITS.into(), self.lock_limit(lock_timeout), NO_STATEMENT_LIMIT.into()],
            Self::Sqlite => vec![self.lock_limit(lock_timeout)],
        }
    }

    /// Statements that restore the session's limits of `original`.
    pub(crate) fn restore_limits(self, original: &ConnectionSnapshot) -> Vec<String> {
        match self {
            Self::Postgres => LIMITS
                .iter()
                .filter_map(|limit| Some(format!("SET {limit} = {}", self.literal(original.get(limit)?))))
                .collect(),
            Self::Mysql => vec![RESTORE_LIMITS.into()],
            Self::Sqlite => original
                .get("set.busy_timeout")
                .map(|limit| format!("PRAGMA busy_timeout = {limit}"))
                .into_iter()
                .collect(),
        }
    }

    /// SQL that sets the limits of a schema operation for one transaction, on PostgreSQL.
    pub(crate) fn set_local_limits(self, lock_timeout: Duration) -> String {
        format!("{}; {NO_LIMITS}", self.lock_limit(lock_timeout)).replace("SET ", "SET LOCAL ")
    }

    /// SQL that begins a transaction of PostgreSQL with the limits of a schema operation.
    pub(crate) fn begin_with_limits(self, lock_timeout: Duration) -> String {
        format!("{BEGIN}; {}", self.set_local_limits(lock_timeout))
    }

    /// The qualified name of Diesel's bookkeeping table in `schema`.
    pub(crate) fn bookkeeping_table(self, schema: Option<&str>) -> String {
        match schema {
            Some(schema) => format!("{}.{}", self.quote(schema), self.quote(BOOKKEEPING_TABLE)),
            None => self.quote(BOOKKEEPING_TABLE),
        }
    }

    /// A query that returns one row if the bookkeeping table exists in `schema`.
    pub(crate) fn bookkeeping_table_query(self, schema: &str) -> String {
        let name = self.literal(schema);
        match self {
            Self::Postgres => format!(
                "SELECT 'yes' AS value FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                 ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
                 WHERE n.nspname OPERATOR(pg_catalog.=) {name} AND c.relname OPERATOR(pg_catalog.=) '{BOOKKEEPING_TABLE}'"
            ),
            Self::Mysql => format!(
                "SELECT 'yes' AS value FROM information_schema.tables \
                 WHERE table_schema = {name} AND table_name = '{BOOKKEEPING_TABLE}'"
            ),
            Self::Sqlite => format!(
                "SELECT 'yes' AS value FROM {}.sqlite_master WHERE type = 'table' AND name = '{BOOKKEEPING_TABLE}'",
                self.quote(schema)
            ),
        }
    }

    /// A query for the schemas behind the current one in `search_path` in which every object belongs to an extension.
    pub(crate) fn extension_schemas(self) -> Option<&'static str> {
        (self == Self::Postgres).then_some(EXTENSION_SCHEMAS)
    }

    /// A query for the numbers of objects in the schema and the settings that limit the server's locks, for
    /// [`needs_too_many_locks`].
    pub(crate) fn locks_of_schema(self, schema: &str) -> Option<String> {
        let schema_oid = format!(
            "(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname OPERATOR(pg_catalog.=) {})",
            self.literal(schema)
        );
        (self == Self::Postgres).then(|| {
            let counts = [
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_class WHERE relnamespace OPERATOR(pg_catalog.=) {schema_oid}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_class t \
                     ON t.oid OPERATOR(pg_catalog.=) c.reltoastrelid WHERE c.relnamespace OPERATOR(pg_catalog.=) {schema_oid}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_type WHERE typnamespace OPERATOR(pg_catalog.=) {schema_oid}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_constraint WHERE connamespace OPERATOR(pg_catalog.=) {schema_oid}"),
            ];
            let counts = counts.map(|count| format!("({count})")).join(", ");
            format!(
                "SELECT pg_catalog.concat_ws(' ', {counts}, \
                 pg_catalog.current_setting('max_locks_per_transaction'), pg_catalog.current_setting('max_connections'), \
                 pg_catalog.current_setting('max_prepared_transactions')) AS value"
            )
        })
    }

    /// A query for the constraints of the schema that are initially deferred.
    pub(crate) fn deferred_constraints(self, schema: &str) -> String {
        format!(
            "SELECT DISTINCT pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.conname)) AS value \
             FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.connamespace \
             WHERE c.condeferred AND n.nspname OPERATOR(pg_catalog.=) {}",
            self.literal(schema)
        )
    }

    /// A query for the temporary and attached databases of a SQLite connection.
    pub(crate) fn other_databases(self) -> Option<&'static str> {
        (self == Self::Sqlite).then_some("SELECT name AS value FROM pragma_database_list WHERE name <> 'main'")
    }

    /// A query for the objects of an attached database, with their SQL.
    pub(crate) fn objects_of(self, database: &str) -> String {
        format!(
            "SELECT type || ' ' || name || ' ' || coalesce(sql, '') AS value FROM {}.sqlite_master",
            self.quote(database)
        )
    }
}

/// Whether the removal of a schema may need more locks than the server has. `answer` is the result of
/// [`locks_of_schema`](DatabaseKind::locks_of_schema).
pub(crate) fn needs_too_many_locks(answer: &str) -> bool {
    let numbers: Vec<u64> = answer.split(' ').filter_map(|number| number.parse().ok()).collect();
    let [relations, toasted, types, constraints, per_transaction, connections, prepared] = numbers[..] else {
        return false;
    };
    let needed = relations + 2 * toasted + types + constraints;
    // Other sessions need locks too.
    needed > per_transaction * (connections + prepared) * 3 / 4
}

const EXTENSION_SCHEMAS: &str = "SELECT n.nspname::pg_catalog.text AS value \
     FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) WITH ORDINALITY AS s (name, place) \
     JOIN pg_catalog.pg_namespace n ON n.nspname OPERATOR(pg_catalog.=) s.name \
     WHERE s.place OPERATOR(pg_catalog.>) 1 \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace OPERATOR(pg_catalog.=) n.oid \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass::pg_catalog.oid \
     AND d.objid OPERATOR(pg_catalog.=) c.oid AND d.deptype OPERATOR(pg_catalog.=) 'e') \
     AND (c.relkind OPERATOR(pg_catalog.=) 'r' OR c.relkind OPERATOR(pg_catalog.=) 'p' OR c.relkind OPERATOR(pg_catalog.=) 'v' \
     OR c.relkind OPERATOR(pg_catalog.=) 'm' OR c.relkind OPERATOR(pg_catalog.=) 'f' OR c.relkind OPERATOR(pg_catalog.=) 'S' \
     OR c.relkind OPERATOR(pg_catalog.=) 'c')) \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_proc p WHERE p.pronamespace OPERATOR(pg_catalog.=) n.oid \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::pg_catalog.oid \
     AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e')) \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_type t WHERE t.typnamespace OPERATOR(pg_catalog.=) n.oid \
     AND (t.typtype OPERATOR(pg_catalog.=) 'e' OR t.typtype OPERATOR(pg_catalog.=) 'd' OR t.typtype OPERATOR(pg_catalog.=) 'r') \
     AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_type'::pg_catalog.regclass::pg_catalog.oid \
     AND d.objid OPERATOR(pg_catalog.=) t.oid AND d.deptype OPERATOR(pg_catalog.=) 'e')) \
     ORDER BY s.place";

/// The settings whose values have changed, with their previous values.
fn changed<'s>(
    before: &'s ConnectionSnapshot,
    now: &'s ConnectionSnapshot,
) -> impl Iterator<Item = (&'s str, &'s str)> {
    before.0.iter().filter_map(|(name, value)| {
        let setting = name.strip_prefix("set.")?;
        (now.get(name) != Some(value.as_str())).then_some((setting, value.as_str()))
    })
}

fn restore_postgres(before: &ConnectionSnapshot, now: &ConnectionSnapshot) -> Vec<String> {
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
    let new = now.0.keys().filter(|name| !before.0.contains_key(*name));
    for setting in new.filter_map(|name| name.strip_prefix("set.")).filter(|setting| !is_excluded(setting)) {
        let quoted: Vec<String> = setting.split('.').map(|part| kind.quote(part)).collect();
        statements.push(format!("RESET {}", quoted.join(".")));
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(pairs: &[(&str, &str)]) -> ConnectionSnapshot {
        ConnectionSnapshot(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn is_blank_accepts_comments_and_semicolons_only() {
        for kind in [DatabaseKind::Postgres, DatabaseKind::Mysql, DatabaseKind::Sqlite] {
            for sql in ["", " \n\t", ";", " ; ;\n", "-- nothing", "/* nothing */ ;", "\u{feff}-- bom\n"] {
                assert!(kind.is_blank(sql), "{kind:?}: {sql:?}");
            }
            for sql in ["SELECT 1", "-- a\nSELECT 1", "/* a */ 'x'"] {
                assert!(!kind.is_blank(sql), "{kind:?}: {sql:?}");
            }
        }
        assert!(DatabaseKind::Mysql.is_blank("# nothing"));
        assert!(!DatabaseKind::Mysql.is_blank("/*!40101 SET NAMES utf8 */"));
        for sql in ["/*!*/", "/*! */;", "/*!40101 ;*/", "/*!999999 DROP TABLE a */", "/*M! -- a\n */"] {
            assert!(DatabaseKind::Mysql.is_blank(sql), "{sql}");
        }
        assert!(DatabaseKind::Postgres.is_blank("/* /* nested */ */"));
    }

    #[test]
    fn missing_schema_is_the_first_unusable_schema_of_search_path() {
        let of = |path, schema| {
            snapshot(&[("search_path", path), ("schema", schema), ("user", "app")]).missing_schema().unwrap_or_default()
        };
        assert_eq!(of("\"$user\", public", "public"), "");
        assert_eq!(of("\"$user\", public", "app"), "");
        assert_eq!(of("tenant, public", "tenant"), "");
        assert_eq!(of("tenant, public", "public"), "tenant");
        assert_eq!(of("\"$user\", \"My \"\"one\"\"\", public", "public"), "My \"one\"");
        assert_eq!(of("pg_catalog, public", "public"), "");
        assert_eq!(of("", ""), "");
    }

    #[test]
    fn restore_resets_changed_settings_only() {
        let before =
            snapshot(&[("role", "none"), ("authorization", "app"), ("set.datestyle", "ISO, MDY"), ("set.a.b", "1")]);
        assert!(DatabaseKind::Postgres.restore(&before, &before).is_empty());
        let now = snapshot(&[
            ("role", "owner"),
            ("authorization", "app"),
            ("set.datestyle", "German"),
            ("set.lock_timeout", "5"),
            ("set.search_path", ""),
            ("set.a.b", "1"),
        ]);
        assert_eq!(
            DatabaseKind::Postgres.restore(&before, &now),
            ["SET ROLE NONE", "SELECT pg_catalog.set_config('datestyle', 'ISO, MDY', false)", "RESET \"search_path\"",]
        );
        let (before, now) =
            (snapshot(&[("schema", "shop"), ("set.sql_mode", "ANSI")]), snapshot(&[("schema", "other")]));
        assert_eq!(DatabaseKind::Mysql.restore(&before, &now), ["USE `shop`", "SET SESSION sql_mode = 'ANSI'"]);
    }

    #[test]
    fn needs_too_many_locks_compares_with_the_capacity_of_the_server() {
        assert!(!needs_too_many_locks("100 30 200 40 64 100 0"));
        assert!(needs_too_many_locks("4200 1400 2800 1400 64 100 0"));
        assert!(!needs_too_many_locks(""));
    }
}
