//! SQL that creates and drops whole databases.

use crate::kind::DatabaseKind;

impl DatabaseKind {
    /// The reason why a database or schema cannot have this name, if there is one. Servers truncate long names.
    pub(crate) fn name_problem(self, name: &str) -> Option<String> {
        let (longest, unit, length) = match self {
            Self::Postgres => (63, "bytes", name.len()),
            Self::Mysql => (64, "characters", name.chars().count()),
            Self::Sqlite => (usize::MAX, "bytes", name.len()),
        };
        if name.is_empty() {
            Some("it is empty".into())
        } else if name.contains('\0') {
            Some("it contains a NUL character".into())
        } else if length > longest {
            Some(format!("it has {length} {unit}, and {} takes {longest}", self.name()))
        } else if self == Self::Mysql && (name.contains(['/', '\\']) || name.ends_with(' ')) {
            Some("MySQL and MariaDB take neither `/` nor `\\` in it, nor a blank at its end".into())
        } else if self == Self::Mysql && name.chars().any(|c| c > '\u{ffff}') {
            Some("MySQL and MariaDB take no characters beyond U+FFFF in it".into())
        } else {
            None
        }
    }

    /// `options` is appended to the name; see [`options_of_database`](Self::options_of_database).
    pub(crate) fn create_database(self, name: &str, template: Option<&str>, options: &str) -> String {
        let mut sql = format!("CREATE DATABASE {}", self.quote(name));
        if let Some(template) = template {
            sql.push_str(&format!(" TEMPLATE {}", self.quote(template)));
        }
        sql.push_str(options);
        sql
    }

    /// A query that returns `1` if this session may create databases with names like `name`, as far as the server shows
    /// its privileges.
    pub(crate) fn may_create_database_query(self, name: &str) -> String {
        match self {
            Self::Mysql => format!(
                "SELECT CAST(COUNT(*) > 0 AS CHAR) AS value FROM (SELECT 1 FROM information_schema.user_privileges \
                 WHERE privilege_type = 'CREATE' UNION ALL SELECT 1 FROM information_schema.schema_privileges \
                 WHERE privilege_type = 'CREATE' AND {} LIKE table_schema) AS rights",
                self.literal(name)
            ),
            Self::Postgres | Self::Sqlite => {
                "SELECT CASE WHEN rolcreatedb OR rolsuper THEN '1' ELSE '0' END AS value FROM pg_catalog.pg_roles \
                 WHERE rolname = current_user"
                    .into()
            }
        }
    }

    /// Like [`drop_database`](Self::drop_database), with an error if the database does not exist.
    pub(crate) fn drop_existing_database(self, name: &str) -> String {
        format!("DROP DATABASE {}", self.quote(name))
    }

    /// A query for the name of this database. It has no row if the database does not exist.
    pub(crate) fn database_query(self, name: &str) -> String {
        let name = self.literal(name);
        match self {
            Self::Mysql => {
                format!("SELECT schema_name AS value FROM information_schema.schemata WHERE schema_name = {name}")
            }
            Self::Postgres | Self::Sqlite => {
                format!("SELECT datname::pg_catalog.text AS value FROM pg_catalog.pg_database WHERE datname = {name}")
            }
        }
    }

    /// A query that returns `1` if this session may drop the database, as far as the server shows its privileges.
    pub(crate) fn may_drop_database_query(self, name: &str) -> String {
        match self {
            Self::Mysql => "SELECT '1' AS value".into(),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT CASE WHEN r.rolsuper OR pg_catalog.pg_has_role(current_user, d.datdba, 'USAGE') THEN '1' ELSE '0' END \
                 AS value FROM pg_catalog.pg_database d, pg_catalog.pg_roles r \
                 WHERE r.rolname = current_user AND d.datname = {}",
                self.literal(name)
            ),
        }
    }

    /// The right that an account needs to create databases, as a phrase.
    pub(crate) fn right_to_create_databases(self) -> &'static str {
        match self {
            Self::Mysql => "the right `CREATE` for this name (`GRANT ALL ON shop.* TO ..`)",
            Self::Postgres | Self::Sqlite => "the attribute `CREATEDB` (`ALTER ROLE .. CREATEDB`)",
        }
    }

    /// A query for the ids of the sessions in a database.
    pub(crate) fn sessions_in(self, database: &str) -> String {
        let name = self.literal(database);
        match self {
            Self::Mysql => {
                format!("SELECT CAST(id AS CHAR) AS value FROM information_schema.processlist WHERE db = {name}")
            }
            Self::Postgres | Self::Sqlite => {
                format!("SELECT pid::text AS value FROM pg_catalog.pg_stat_activity WHERE datname = {name}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_problem_refuses_a_name_that_a_server_would_truncate() {
        let long = "ü".repeat(35);
        assert!(DatabaseKind::Postgres.name_problem(&long).is_some_and(|reason| reason.contains("70 bytes")));
        assert_eq!(DatabaseKind::Mysql.name_problem(&long), None);
        assert!(DatabaseKind::Mysql.name_problem(&"x".repeat(65)).is_some());
        for kind in [DatabaseKind::Postgres, DatabaseKind::Mysql] {
            assert!(kind.name_problem("a\0b").is_some());
            assert!(kind.name_problem("").is_some());
            assert_eq!(kind.name_problem("it's \"odd\"; `x`"), None);
        }
    }
}
