//! SQL of `create_all` and `drop_all`.
//!
//! On PostgreSQL every function, type and operator is qualified: the program's `search_path` may put another schema before
//! `pg_catalog`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::BETWEEN;
use super::sql_parts::{Part, Parts};
use crate::kind::DatabaseKind;

/// Diesel's own table of the applied migrations.
const TABLE: &str = "__diesel_schema_migrations";

/// Limits that a schema operation has of its own; they are put back separately.
const LIMITS: [&str; 3] = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"];

/// Settings of one transaction.
const OF_THE_TRANSACTION: [&str; 3] = ["transaction_isolation", "transaction_read_only", "transaction_deferrable"];

/// What a migration may change on the connection and the next one must not find changed.
const POSTGRES_STATE: &str = "SELECT pg_catalog.concat('pid', pg_catalog.chr(31), pg_catalog.pg_backend_pid()) AS value \
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

/// Begins a transaction in which each statement sees what was committed before it, whatever the default is. In lower case, so that
/// a search of the log or of the network for `COMMIT` finds commits.
pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL read committed";

/// A query for PostgreSQL's lock of all schema operations, for the transaction in which it is sent.
pub(crate) const TRY_LOCK_IN_TRANSACTION: &str =
    "SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value";

const NO_LIMITS: &str = "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0";

/// MariaDB and MySQL name the limit of a statement differently, and each reads only the comment meant for it.
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

const MYSQL_STATE: &str = "SELECT CONCAT('schema', CHAR(31), IFNULL(DATABASE(), '')) AS value \
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

const SQLITE_STATE: &str = "SELECT 'schema' || char(31) || 'main' AS value \
     UNION ALL SELECT 'set.busy_timeout' || char(31) || timeout FROM pragma_busy_timeout \
     UNION ALL SELECT 'set.foreign_keys' || char(31) || foreign_keys FROM pragma_foreign_keys \
     UNION ALL SELECT 'set.recursive_triggers' || char(31) || recursive_triggers FROM pragma_recursive_triggers \
     UNION ALL SELECT 'set.legacy_alter_table' || char(31) || legacy_alter_table FROM pragma_legacy_alter_table \
     UNION ALL SELECT 'set.ignore_check_constraints' || char(31) || ignore_check_constraints FROM pragma_ignore_check_constraints \
     UNION ALL SELECT 'set.query_only' || char(31) || query_only FROM pragma_query_only \
     UNION ALL SELECT 'set.writable_schema' || char(31) || writable_schema FROM pragma_writable_schema";

/// The state of a connection, as far as migrations matter: its server process, its own schema, its settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct State(BTreeMap<String, String>);

impl State {
    pub(crate) fn read(rows: Vec<Option<String>>) -> Self {
        let pairs = rows.into_iter().flatten();
        Self(
            pairs
                .filter_map(|row| row.split_once(BETWEEN).map(|(name, value)| (name.to_owned(), value.to_owned())))
                .collect(),
        )
    }

    /// The schema (PostgreSQL) or database (MySQL) in which unqualified names are created, if there is one.
    pub(crate) fn schema(&self) -> Option<&str> {
        self.get("schema").filter(|schema| !schema.is_empty())
    }

    /// The server's process of the connection. Behind a pooler it can be another one in the next transaction.
    pub(crate) fn process(&self) -> Option<&str> {
        self.get("pid")
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The first schema that `search_path` names if that is not the own one: it does not exist, or the role may not use it.
    pub(crate) fn missing_schema(&self) -> Option<String> {
        let user = self.get("user").unwrap_or_default();
        for name in names_in(self.get("search_path")?) {
            match name.as_str() {
                // It counts only if there is such a schema.
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
    let parts = Parts::of(list, DatabaseKind::Postgres).filter_map(|(part, ..)| match part {
        Part::Word(word) => Some(word.to_lowercase()),
        Part::Name(name) => Some(name.replace("\"\"", "\"")),
        _ => None,
    });
    parts.collect()
}

impl DatabaseKind {
    /// Whether `sql` has no statement: nothing but white space, comments and semicolons.
    pub(crate) fn is_blank(self, sql: &str) -> bool {
        Parts::of(sql, self).all(|(part, ..)| part == Part::Sign(';'))
    }

    /// A query for the [`State`] of the connection.
    pub(crate) fn state(self) -> &'static str {
        match self {
            Self::Postgres => POSTGRES_STATE,
            Self::Mysql => MYSQL_STATE,
            Self::Sqlite => SQLITE_STATE,
        }
    }

    /// Statements that make the connection's state `before` again.
    pub(crate) fn restore(self, before: &State, now: &State) -> Vec<String> {
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

    /// Statements that give the connection a schema operation's own limits: locks are waited for up to `limit`, and a statement
    /// takes as long as it takes.
    pub(crate) fn begin_limits(self, limit: Duration) -> Vec<String> {
        match self {
            Self::Postgres => vec![format!("{}; {NO_LIMITS}", self.lock_limit(limit))],
            Self::Mysql => vec![SAVE_LIMITS.into(), self.lock_limit(limit), NO_STATEMENT_LIMIT.into()],
            Self::Sqlite => vec![self.lock_limit(limit)],
        }
    }

    /// Statements that put the limits back which the connection had at `original`.
    pub(crate) fn end_limits(self, original: &State) -> Vec<String> {
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

    /// The same limits for the transaction in which they are sent, on PostgreSQL.
    pub(crate) fn local_limits(self, limit: Duration) -> String {
        format!("{}; {NO_LIMITS}", self.lock_limit(limit)).replace("SET ", "SET LOCAL ")
    }

    /// What begins one of PostgreSQL's transactions with those limits.
    pub(crate) fn begin_limited(self, limit: Duration) -> String {
        format!("{BEGIN}; {}", self.local_limits(limit))
    }

    /// Diesel's own table in the schema `schema`.
    pub(crate) fn bookkeeping(self, schema: Option<&str>) -> String {
        match schema {
            Some(schema) => format!("{}.{}", self.quote(schema), self.quote(TABLE)),
            None => self.quote(TABLE),
        }
    }

    /// A query with one row if that table exists in the schema `schema`.
    pub(crate) fn has_bookkeeping(self, schema: &str) -> String {
        let name = self.literal(schema);
        match self {
            Self::Postgres => format!(
                "SELECT 'yes' AS value FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n \
                 ON n.oid OPERATOR(pg_catalog.=) c.relnamespace \
                 WHERE n.nspname OPERATOR(pg_catalog.=) {name} AND c.relname OPERATOR(pg_catalog.=) '{TABLE}'"
            ),
            Self::Mysql => format!(
                "SELECT 'yes' AS value FROM information_schema.tables \
                 WHERE table_schema = {name} AND table_name = '{TABLE}'"
            ),
            Self::Sqlite => format!(
                "SELECT 'yes' AS value FROM {}.sqlite_master WHERE type = 'table' AND name = '{TABLE}'",
                self.quote(schema)
            ),
        }
    }

    /// A query for the schemas after the own one in `search_path` that hold nothing but extensions.
    pub(crate) fn extension_schemas(self) -> Option<&'static str> {
        (self == Self::Postgres).then_some(EXTENSION_SCHEMAS)
    }

    /// A query for two numbers: how many locks the removal of everything in the schema needs, about, and how many the server has.
    pub(crate) fn locks_of_schema(self, schema: &str) -> Option<String> {
        let own = format!(
            "(SELECT oid FROM pg_catalog.pg_namespace WHERE nspname OPERATOR(pg_catalog.=) {})",
            self.literal(schema)
        );
        (self == Self::Postgres).then(|| {
            let counts = [
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_class WHERE relnamespace OPERATOR(pg_catalog.=) {own}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_class t \
                     ON t.oid OPERATOR(pg_catalog.=) c.reltoastrelid WHERE c.relnamespace OPERATOR(pg_catalog.=) {own}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_type WHERE typnamespace OPERATOR(pg_catalog.=) {own}"),
                format!("SELECT pg_catalog.count(*) FROM pg_catalog.pg_constraint WHERE connamespace OPERATOR(pg_catalog.=) {own}"),
            ];
            let counts = counts.map(|count| format!("({count})")).join(", ");
            format!(
                "SELECT pg_catalog.concat_ws(' ', {counts}, \
                 pg_catalog.current_setting('max_locks_per_transaction'), pg_catalog.current_setting('max_connections'), \
                 pg_catalog.current_setting('max_prepared_transactions')) AS value"
            )
        })
    }

    /// A query for the constraints of the schema that are deferred unless somebody says otherwise.
    pub(crate) fn deferred_constraints(self, schema: &str) -> String {
        format!(
            "SELECT DISTINCT pg_catalog.concat(pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.conname)) AS value \
             FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.connamespace \
             WHERE c.condeferred AND n.nspname OPERATOR(pg_catalog.=) {}",
            self.literal(schema)
        )
    }

    /// A query for the databases of a SQLite connection beside the main one.
    pub(crate) fn other_databases(self) -> Option<&'static str> {
        (self == Self::Sqlite).then_some("SELECT name AS value FROM pragma_database_list WHERE name <> 'main'")
    }

    /// A query for what such a database consists of.
    pub(crate) fn objects_of(self, database: &str) -> String {
        format!(
            "SELECT type || ' ' || name || ' ' || coalesce(sql, '') AS value FROM {}.sqlite_master",
            self.quote(database)
        )
    }
}

/// Of a lookup for the number of locks: whether the schema may need more of them than the server has to give.
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

/// The settings whose value is not what it was, with what it was.
fn changed<'s>(before: &'s State, now: &'s State) -> impl Iterator<Item = (&'s str, &'s str)> {
    before.0.iter().filter_map(|(name, value)| {
        let setting = name.strip_prefix("set.")?;
        (now.get(name) != Some(value.as_str())).then_some((setting, value.as_str()))
    })
}

fn restore_postgres(before: &State, now: &State) -> Vec<String> {
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
    let is_ours = |setting: &str| LIMITS.contains(&setting) || OF_THE_TRANSACTION.contains(&setting);
    for (setting, value) in changed(before, now).filter(|(setting, _)| !is_ours(setting)) {
        let (setting, value) = (kind.literal(setting), kind.literal(value));
        statements.push(format!("SELECT pg_catalog.set_config({setting}, {value}, false)"));
    }
    let new = now.0.keys().filter(|name| !before.0.contains_key(*name));
    for setting in new.filter_map(|name| name.strip_prefix("set.")).filter(|setting| !is_ours(setting)) {
        let quoted: Vec<String> = setting.split('.').map(|part| kind.quote(part)).collect();
        statements.push(format!("RESET {}", quoted.join(".")));
    }
    statements
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(pairs: &[(&str, &str)]) -> State {
        State(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn blank_sql_has_no_statement() {
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
    fn missing_schema_is_the_first_one_that_search_path_names() {
        let of = |path, schema| {
            state(&[("search_path", path), ("schema", schema), ("user", "app")]).missing_schema().unwrap_or_default()
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
    fn restore_names_what_was_changed_only() {
        let before =
            state(&[("role", "none"), ("authorization", "app"), ("set.datestyle", "ISO, MDY"), ("set.a.b", "1")]);
        assert!(DatabaseKind::Postgres.restore(&before, &before).is_empty());
        let now = state(&[
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
        let (before, now) = (state(&[("schema", "shop"), ("set.sql_mode", "ANSI")]), state(&[("schema", "other")]));
        assert_eq!(DatabaseKind::Mysql.restore(&before, &now), ["USE `shop`", "SET SESSION sql_mode = 'ANSI'"]);
    }

    #[test]
    fn locks_are_compared_with_what_the_server_has() {
        assert!(!needs_too_many_locks("100 30 200 40 64 100 0"));
        assert!(needs_too_many_locks("4200 1400 2800 1400 64 100 0"));
        assert!(!needs_too_many_locks(""));
    }
}
