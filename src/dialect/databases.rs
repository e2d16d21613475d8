//! SQL that copies and drops whole databases and schemas for tests, and that finds their owners.

use crate::kind::DatabaseKind;

/// The first key of PostgreSQL's advisory locks of owners. The second key is the number of the owner.
const OWNERS: i32 = 7_236_272;

/// A placeholder in statements for the name of a database that is not known yet.
pub(crate) const NAME_PLACEHOLDER: &str = "\u{1}";

/// The first key of PostgreSQL's advisory locks of the pinned connections in which tests run.
const PINNED_CONNECTIONS: i32 = 7_236_273;

impl DatabaseKind {
    /// A query for everything that can change the result of migrations: the role, the settings, and the properties of
    /// the database. It runs in a session of the application on its own database. Equal results mean that migrations
    /// create equal schemas.
    pub(crate) fn schema_environment_query(self) -> Option<&'static str> {
        match self {
            Self::Postgres => Some(
                "SELECT pg_catalog.concat_ws(pg_catalog.chr(31), current_user::pg_catalog.text, \
                 session_user::pg_catalog.text, (SELECT (pg_catalog.to_jsonb(d) OPERATOR(pg_catalog.-) \
                 '{oid,datname,datistemplate,datallowconn,datconnlimit,datlastsysoid,datfrozenxid,datminmxid,datcollversion}' \
                 ::pg_catalog.text[])::pg_catalog.text FROM pg_catalog.pg_database d \
                 WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()), \
                 (SELECT pg_catalog.string_agg(s.name OPERATOR(pg_catalog.||) '=' OPERATOR(pg_catalog.||) s.setting, ';' \
                 ORDER BY s.name) FROM pg_catalog.pg_settings s \
                 WHERE s.source OPERATOR(pg_catalog.=) ANY ('{user,database,database user,client,session}'::pg_catalog.text[]) \
                 AND s.name OPERATOR(pg_catalog.<>) ALL ('{application_name,statement_timeout,lock_timeout,\
                 idle_in_transaction_session_timeout,idle_session_timeout,client_connection_check_interval}'::pg_catalog.text[])), \
                 (SELECT pg_catalog.string_agg(r.setrole::pg_catalog.text OPERATOR(pg_catalog.||) r.setconfig::pg_catalog.text, ';' \
                 ORDER BY r.setrole) FROM pg_catalog.pg_db_role_setting r JOIN pg_catalog.pg_database d \
                 ON d.oid OPERATOR(pg_catalog.=) r.setdatabase WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())) \
                 AS value",
            ),
            Self::Mysql => Some(
                "SELECT CONCAT_WS(CHAR(31), CURRENT_USER(), @@character_set_database, @@collation_database, \
                 @@collation_connection, @@character_set_client, @@sql_mode, @@default_storage_engine, @@lower_case_table_names, \
                 @@foreign_key_checks, @@unique_checks, @@explicit_defaults_for_timestamp) AS value",
            ),
            Self::Sqlite => None,
        }
    }

    /// A query for the `CREATE DATABASE` options that give another database the properties of the current one.
    pub(crate) fn options_of_database(self) -> &'static str {
        match self {
            Self::Postgres => {
                "SELECT pg_catalog.concat(' OWNER ', CASE WHEN current_user OPERATOR(pg_catalog.<>) session_user \
                 AND pg_catalog.pg_has_role(session_user, current_user, 'USAGE') THEN pg_catalog.quote_ident(current_user) \
                 WHEN pg_catalog.pg_has_role(session_user, d.datdba, 'USAGE') \
                 THEN pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(d.datdba)) \
                 ELSE pg_catalog.quote_ident(session_user) END) AS value \
                 FROM pg_catalog.pg_database d WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
            }
            Self::Mysql | Self::Sqlite => {
                "SELECT CONCAT(' CHARACTER SET ', @@character_set_database, ' COLLATE ', @@collation_database) AS value"
            }
        }
    }

    /// A query for further options, if the encoding or the locale differs from that of `template1`. These options need
    /// `template0`.
    pub(crate) fn locale_of_database(self) -> Option<&'static str> {
        (self == Self::Postgres).then_some(
            "SELECT pg_catalog.concat(' ENCODING ', pg_catalog.quote_literal(pg_catalog.pg_encoding_to_char(d.encoding)), \
             ' LC_COLLATE ', pg_catalog.quote_literal(d.datcollate), ' LC_CTYPE ', pg_catalog.quote_literal(d.datctype), \
             CASE d.j ->> 'datlocprovider' WHEN 'c' THEN ' LOCALE_PROVIDER libc' \
             WHEN 'i' THEN pg_catalog.concat(' LOCALE_PROVIDER icu ICU_LOCALE ', pg_catalog.quote_literal(d.locale)) \
             WHEN 'b' THEN pg_catalog.concat(' LOCALE_PROVIDER builtin BUILTIN_LOCALE ', pg_catalog.quote_literal(d.locale)) END, \
             CASE WHEN d.rules IS NOT NULL THEN pg_catalog.concat(' ICU_RULES ', pg_catalog.quote_literal(d.rules)) END) AS value \
             FROM (SELECT *, coalesce(j ->> 'datlocale', j ->> 'daticulocale') AS locale, j ->> 'daticurules' AS rules \
             FROM (SELECT *, pg_catalog.to_jsonb(p) AS j FROM pg_catalog.pg_database p) AS p) AS d, \
             (SELECT *, pg_catalog.to_jsonb(p) AS j FROM pg_catalog.pg_database p) AS t \
             WHERE d.datname = pg_catalog.current_database() AND t.datname = 'template1' AND ROW(d.encoding, d.datcollate, \
             d.datctype, d.j ->> 'datlocprovider', d.locale, d.rules) IS DISTINCT FROM ROW(t.encoding, t.datcollate, t.datctype, \
             t.j ->> 'datlocprovider', coalesce(t.j ->> 'datlocale', t.j ->> 'daticulocale'), t.j ->> 'daticurules')",
        )
    }

    /// A query for the statements that give a copy of `database` the settings and privileges, which `CREATE DATABASE`
    /// does not copy. In the statements [`NAME_PLACEHOLDER`] stands for the name of the copy.
    pub(crate) fn settings_of_database(self, database: &str) -> Option<String> {
        let name = self.literal(database);
        (self == Self::Postgres).then(|| {
            format!(
                "SELECT value FROM (SELECT 1 AS rank, pg_catalog.concat(CASE WHEN s.setrole = 0 THEN 'ALTER DATABASE {NAME_PLACEHOLDER} SET ' \
                 ELSE pg_catalog.concat('ALTER ROLE ', pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(s.setrole)), \
                 ' IN DATABASE {NAME_PLACEHOLDER} SET ') END, s.name, ' TO ', CASE WHEN s.name IN ('search_path', 'temp_tablespaces', \
                 'session_preload_libraries', 'local_preload_libraries') \
                 THEN coalesce(nullif(pg_catalog.replace(s.setting, '\"\"', ''''''), ''), '''''') \
                 ELSE pg_catalog.quote_literal(s.setting) END) AS value \
                 FROM (SELECT r.setrole, pg_catalog.split_part(c, '=', 1) AS name, \
                 pg_catalog.substr(c, pg_catalog.strpos(c, '=') + 1) AS setting \
                 FROM pg_catalog.pg_db_role_setting r JOIN pg_catalog.pg_database d ON d.oid = r.setdatabase, \
                 pg_catalog.unnest(r.setconfig) AS c WHERE d.datname = {name}) AS s \
                 UNION ALL SELECT 2, 'REVOKE ALL ON DATABASE {NAME_PLACEHOLDER} FROM PUBLIC' FROM pg_catalog.pg_database \
                 WHERE datname = {name} AND datacl IS NOT NULL \
                 UNION ALL SELECT 3, pg_catalog.concat('GRANT ', a.privilege_type, ' ON DATABASE {NAME_PLACEHOLDER} TO ', \
                 CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END, \
                 CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' END) FROM pg_catalog.pg_database d, \
                 pg_catalog.aclexplode(d.datacl) AS a WHERE d.datname = {name} AND a.grantee <> d.datdba) AS found ORDER BY rank, value"
            )
        })
    }

    /// A query that returns `1` if this session may create schemas in its database, on PostgreSQL.
    pub(crate) fn may_create_schema_query(self) -> &'static str {
        "SELECT CASE WHEN pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE') THEN '1' ELSE '0' END AS value"
    }

    /// A query for the number of additions to `template1`, in which this session is. The result is `0` if `template1`
    /// equals `template0`.
    pub(crate) fn template_additions_query(self) -> &'static str {
        "SELECT ((SELECT pg_catalog.count(*) FROM pg_catalog.pg_class WHERE oid >= 16384) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_proc WHERE oid >= 16384) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_type WHERE oid >= 16384) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace WHERE oid >= 16384) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_extension WHERE oid >= 16384) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_default_acl) \
         + (SELECT pg_catalog.count(*) FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_init_privs i \
         ON i.objoid = n.oid AND i.classoid = 'pg_catalog.pg_namespace'::pg_catalog.regclass \
         WHERE n.nspacl IS DISTINCT FROM i.initprivs))::pg_catalog.text AS value"
    }

    /// A query for the available extensions that this role may not install.
    pub(crate) fn forbidden_extensions(self) -> &'static str {
        "SELECT DISTINCT v.name::pg_catalog.text AS value FROM pg_catalog.pg_available_extension_versions v, \
         pg_catalog.pg_roles r WHERE r.rolname = current_user AND v.superuser AND NOT r.rolsuper \
         AND NOT coalesce((pg_catalog.to_jsonb(v) ->> 'trusted')::pg_catalog.bool, false)"
    }

    /// A query for statements that drop the tables, views and sequences of a schema.
    pub(crate) fn removals_in_schema(self, schema: &str) -> String {
        format!(
            "SELECT pg_catalog.concat('DROP ', CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN 'MATERIALIZED VIEW' \
             WHEN 'f' THEN 'FOREIGN TABLE' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, ' IF EXISTS ', \
             pg_catalog.quote_ident(n.nspname), '.', pg_catalog.quote_ident(c.relname), ' CASCADE') AS value \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = {} AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') ORDER BY c.oid DESC",
            self.literal(schema)
        )
    }

    pub(crate) fn drop_database(self, name: &str) -> String {
        format!("DROP DATABASE IF EXISTS {}", self.quote(name))
    }

    /// Gives a finished database its final name. No session may be in the database.
    pub(crate) fn rename_database(self, name: &str, new: &str) -> String {
        format!("ALTER DATABASE {} RENAME TO {}", self.quote(name), self.quote(new))
    }

    /// Refuses new sessions in the database, so that it can be copied at any time.
    pub(crate) fn close_database(self, name: &str) -> String {
        format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", self.quote(name))
    }

    /// A query for the databases whose names start with `prefix`, a plain word. The query has no `LIKE` pattern,
    /// because a setting of the server decides the meaning of a backslash in a pattern.
    pub(crate) fn databases(self, prefix: &str) -> String {
        let length = prefix.len();
        match self {
            Self::Mysql => format!(
                "SELECT schema_name AS value FROM information_schema.schemata WHERE LEFT(schema_name, {length}) = '{prefix}' ORDER BY 1"
            ),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT datname::pg_catalog.text AS value FROM pg_catalog.pg_database \
                 WHERE pg_catalog.left(datname::pg_catalog.text, {length}) = '{prefix}' ORDER BY oid"
            ),
        }
    }

    /// A query for the schemas of this database whose names start with `prefix`, a plain word.
    pub(crate) fn schemas(self, prefix: &str) -> String {
        let length = prefix.len();
        format!(
            "SELECT nspname::pg_catalog.text AS value FROM pg_catalog.pg_namespace \
             WHERE pg_catalog.left(nspname::pg_catalog.text, {length}) = '{prefix}' ORDER BY oid"
        )
    }

    /// Ends the session with this id. The session must belong to the same account.
    pub(crate) fn end_session(self, id: &str) -> String {
        match self {
            Self::Mysql => format!("KILL {id}"),
            Self::Postgres | Self::Sqlite => format!("SELECT pg_catalog.pg_terminate_backend({id})"),
        }
    }

    /// Advice for an account that may not create databases.
    pub(crate) fn right_to_create(self) -> &'static str {
        match self {
            Self::Mysql => "give the account ``GRANT ALL ON `diesel\\_session\\_%`.* TO ..``",
            Self::Postgres | Self::Sqlite => "give the role `ALTER ROLE .. CREATEDB`, or use `TestIsolation::Schema`",
        }
    }

    /// A query that claims the number of an owner of databases for this session, and returns `1` if no other session
    /// has it.
    pub(crate) fn claim_owner(self, owner: u32) -> String {
        match self {
            Self::Mysql => format!("SELECT CAST(GET_LOCK('{}', 0) AS CHAR) AS value", owner_lock(owner)),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT CASE WHEN pg_catalog.pg_try_advisory_lock({OWNERS}, {}) THEN '1' ELSE '0' END AS value",
                owner.cast_signed()
            ),
        }
    }

    /// A query that returns `1` if a session of the server has claimed the number of this owner.
    pub(crate) fn owner_is_alive_query(self, owner: u32) -> String {
        match self {
            Self::Mysql => format!("SELECT IF(IS_USED_LOCK('{}') IS NULL, '0', '1') AS value", owner_lock(owner)),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT CASE WHEN count(*) > 0 THEN '1' ELSE '0' END AS value FROM pg_catalog.pg_locks \
                 WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = {OWNERS} AND objid = {owner}"
            ),
        }
    }

    /// A query that claims a pinned connection, and returns `1` if no other session has it. The claim lasts until the
    /// end of the outer transaction, in which the query has to run, and on MySQL and MariaDB until the end of the
    /// session.
    pub(crate) fn claim_pinned_connection(self, database: &str) -> Option<String> {
        match self {
            Self::Mysql => Some(format!("SELECT CAST(GET_LOCK({}, 0) AS CHAR) AS value", self.literal(database))),
            // A reset of the connection would release a lock of the session.
            Self::Postgres => Some(format!(
                "SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock({PINNED_CONNECTIONS}, 0) THEN '1' ELSE '0' END AS value"
            )),
            Self::Sqlite => None,
        }
    }
}

fn owner_lock(owner: u32) -> String {
    format!("diesel-session/owner/{owner:08x}")
}
