//! SQL of `create_all` and `drop_all`.
//!
//! On PostgreSQL every function, type and operator is qualified, because the program's `search_path` may have another
//! schema before `pg_catalog`.

use std::time::Duration;

use super::SEPARATOR;
use super::lexer::{Lexer, Token};
use crate::kind::DatabaseKind;

/// Diesel's table of the applied migrations.
pub(super) const BOOKKEEPING_TABLE: &str = "__diesel_schema_migrations";

/// Begins a transaction in which each statement sees all earlier commits, whatever the default isolation level is.
/// `committed` is in lower case, so that a search of logs or network traffic for `COMMIT` finds commits only.
pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL read committed";

/// A query that takes PostgreSQL's lock of all schema operations until the end of the transaction.
pub(crate) const TRY_LOCK_IN_TRANSACTION: &str =
    "SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock(7236271, 5331310) THEN '1' ELSE '0' END AS value";

/// The state of a connection that matters to migrations: its server process, its current schema, its role and its
/// settings.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionSnapshot(pub(super) Vec<(String, String)>);

impl ConnectionSnapshot {
    pub(crate) fn from_rows(rows: Vec<Option<String>>) -> Self {
        let pair = |row: String| row.split_once(SEPARATOR).map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self(rows.into_iter().flatten().filter_map(pair).collect())
    }

    /// The schema (PostgreSQL) or database (MySQL) in which the server creates unqualified names, if there is one.
    pub(crate) fn schema(&self) -> Option<&str> {
        self.get("schema").filter(|schema| !schema.is_empty())
    }

    /// The id of the server process. Behind a pooler the next transaction may have another process.
    pub(crate) fn process(&self) -> Option<&str> {
        self.get("pid")
    }

    /// Whether this server is a node of a Galera cluster, in which a lock excludes sessions of the same node only.
    pub(crate) fn is_replicated(&self) -> bool {
        self.get("wsrep") == Some("ON")
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
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

    /// SQL that sets the limits of a schema operation for one transaction, on PostgreSQL.
    pub(crate) fn set_local_limits(self, lock_timeout: Duration) -> String {
        self.dialect().set_limits(lock_timeout).join("; ").replace("SET ", "SET LOCAL ")
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

    /// A query for the schemas behind the current one in `search_path` in which every object belongs to an extension.
    pub(crate) fn extension_schemas(self) -> Option<&'static str> {
        (self.known() == Self::Postgres).then_some(EXTENSION_SCHEMAS)
    }

    /// A query for the numbers of objects in the schema and the settings that limit the server's locks, for
    /// [`needs_too_many_locks`].
    pub(crate) fn locks_of_schema(self, schema: &str) -> Option<String> {
        let count =
            |from: &str| format!("(SELECT pg_catalog.count(*) FROM pg_catalog.{from} OPERATOR(pg_catalog.=) n.oid)");
        (self.known() == Self::Postgres).then(|| {
            format!(
                "SELECT pg_catalog.concat_ws(' ', {}, {}, {}, {}, \
                 pg_catalog.current_setting('max_locks_per_transaction'), pg_catalog.current_setting('max_connections'), \
                 pg_catalog.current_setting('max_prepared_transactions')) AS value \
                 FROM pg_catalog.pg_namespace n WHERE n.nspname OPERATOR(pg_catalog.=) {}",
                count("pg_class WHERE relnamespace"),
                count("pg_class WHERE reltoastrelid OPERATOR(pg_catalog.<>) 0::pg_catalog.oid AND relnamespace"),
                count("pg_type WHERE typnamespace"),
                count("pg_constraint WHERE connamespace"),
                self.literal(schema)
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
pub(super) fn changed<'s>(
    before: &'s ConnectionSnapshot,
    now: &'s ConnectionSnapshot,
) -> impl Iterator<Item = (&'s str, &'s str)> {
    before.0.iter().filter_map(|(name, value)| {
        let setting = name.strip_prefix("set.")?;
        (now.get(name) != Some(value.as_str())).then_some((setting, value.as_str()))
    })
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
        assert!(DatabaseKind::Postgres.dialect().restore(&before, &before).is_empty());
        let now = snapshot(&[
            ("role", "owner"),
            ("authorization", "app"),
            ("set.datestyle", "German"),
            ("set.lock_timeout", "5"),
            ("set.search_path", ""),
            ("set.a.b", "1"),
        ]);
        assert_eq!(
            DatabaseKind::Postgres.dialect().restore(&before, &now),
            ["SET ROLE NONE", "SELECT pg_catalog.set_config('datestyle', 'ISO, MDY', false)", "RESET \"search_path\"",]
        );
        let (before, now) =
            (snapshot(&[("schema", "shop"), ("set.sql_mode", "ANSI")]), snapshot(&[("schema", "other")]));
        assert_eq!(
            DatabaseKind::Mysql.dialect().restore(&before, &now),
            ["USE `shop`", "SET SESSION sql_mode = 'ANSI'"]
        );
    }

    #[test]
    fn needs_too_many_locks_compares_with_the_capacity_of_the_server() {
        assert!(!needs_too_many_locks("100 30 200 40 64 100 0"));
        assert!(needs_too_many_locks("4200 1400 2800 1400 64 100 0"));
        assert!(!needs_too_many_locks(""));
    }
}
