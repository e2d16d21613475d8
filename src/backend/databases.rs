//! Databases and schemas as a whole: made, copied, removed, and who has them.

use super::Kind;

/// PostgreSQL's advisory locks of owners: this number and the owner's.
const OWNERS: i32 = 7_236_272;

/// Those of the lanes that tests run in.
const LANES: i32 = 7_236_273;

/// FNV-1a with 64 bits: every program has to come to the same number.
pub(crate) fn fnv1a<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u64 {
    parts
        .into_iter()
        .flatten()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Kind {
    /// Why a database or schema cannot have that name, if so. Servers cut what is too long, or take part of a name for the whole.
    pub(crate) fn refuses_name(self, name: &str) -> Option<String> {
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

    pub(crate) fn create_database(self, name: &str, template: Option<&str>) -> String {
        let name = self.quote(name);
        match template {
            Some(template) => format!("CREATE DATABASE {name} TEMPLATE {}", self.quote(template)),
            None => format!("CREATE DATABASE {name}"),
        }
    }

    pub(crate) fn drop_database(self, name: &str) -> String {
        format!("DROP DATABASE IF EXISTS {}", self.quote(name))
    }

    /// Gives a finished database its last name; nobody is in it.
    pub(crate) fn rename_database(self, name: &str, new: &str) -> String {
        format!("ALTER DATABASE {} RENAME TO {}", self.quote(name), self.quote(new))
    }

    /// Keeps everybody out, so that it can be copied at any time.
    pub(crate) fn close_database(self, name: &str) -> String {
        format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", self.quote(name))
    }

    /// A query for the databases whose names start with `prefix`, a plain word.
    pub(crate) fn databases(self, prefix: &str) -> String {
        let prefix = prefix.replace('_', "\\_");
        match self {
            Self::Mysql => {
                let prefix = prefix.replace('\\', "\\\\");
                format!(
                    "SELECT schema_name AS value FROM information_schema.schemata WHERE schema_name LIKE '{prefix}%' ORDER BY 1"
                )
            }
            Self::Postgres | Self::Sqlite => format!(
                "SELECT datname::text AS value FROM pg_catalog.pg_database WHERE datname LIKE '{prefix}%' ORDER BY oid"
            ),
        }
    }

    /// A query for the schemas of this database whose names start with `prefix`, a plain word.
    pub(crate) fn schemas(self, prefix: &str) -> String {
        let prefix = prefix.replace('_', "\\_");
        format!(
            "SELECT nspname::text AS value FROM pg_catalog.pg_namespace WHERE nspname LIKE '{prefix}%' ORDER BY oid"
        )
    }

    /// A query for the numbers of the sessions in a database.
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

    /// Ends the session of that number, which is one of the account's own.
    pub(crate) fn end_session(self, number: &str) -> String {
        match self {
            Self::Mysql => format!("KILL {number}"),
            Self::Postgres | Self::Sqlite => format!("SELECT pg_catalog.pg_terminate_backend({number})"),
        }
    }

    /// What an account that may not make databases needs.
    pub(crate) fn right_to_create(self) -> &'static str {
        match self {
            Self::Mysql => "give the account ``GRANT ALL ON `diesel\\_session\\_%`.* TO ..``",
            Self::Postgres | Self::Sqlite => "give the role `ALTER ROLE .. CREATEDB`, or use `TestIsolation::Schema`",
        }
    }

    /// Claims the number of an owner of databases for this session, and answers `1` where nobody has it.
    pub(crate) fn claim_owner(self, owner: u32) -> String {
        match self {
            Self::Mysql => format!("SELECT CAST(GET_LOCK('{}', 0) AS CHAR) AS value", owner_lock(owner)),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT CASE WHEN pg_catalog.pg_try_advisory_lock({OWNERS}, {}) THEN '1' ELSE '0' END AS value",
                owner.cast_signed()
            ),
        }
    }

    /// A query that answers `1` where a session of the server has that owner's number.
    pub(crate) fn owner_lives(self, owner: u32) -> String {
        match self {
            Self::Mysql => format!("SELECT IF(IS_USED_LOCK('{}') IS NULL, '0', '1') AS value", owner_lock(owner)),
            Self::Postgres | Self::Sqlite => format!(
                "SELECT CASE WHEN count(*) > 0 THEN '1' ELSE '0' END AS value FROM pg_catalog.pg_locks \
                 WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = {OWNERS} AND objid = {owner}"
            ),
        }
    }

    /// Claims a lane for as long as the transaction around its test lasts, in which it is sent; on MySQL and MariaDB for the session.
    pub(crate) fn claim_lane(self, database: &str) -> Option<String> {
        match self {
            Self::Mysql => Some(format!("SELECT CAST(GET_LOCK({}, 0) AS CHAR) AS value", self.literal(database))),
            // A lock of the session would be gone with the first cleaning of the connection.
            Self::Postgres => Some(format!(
                "SELECT CASE WHEN pg_catalog.pg_try_advisory_xact_lock({LANES}, 0) THEN '1' ELSE '0' END AS value"
            )),
            Self::Sqlite => None,
        }
    }

    /// A text as SQL.
    pub(crate) fn literal(self, text: &str) -> String {
        match self {
            Self::Postgres | Self::Sqlite => format!("'{}'", text.replace('\'', "''")),
            Self::Mysql => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''")),
        }
    }
}

fn owner_lock(owner: u32) -> String {
    format!("diesel-session/owner/{owner:08x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_a_server_would_cut_is_refused() {
        let long = "ü".repeat(35);
        assert!(Kind::Postgres.refuses_name(&long).is_some_and(|reason| reason.contains("70 bytes")));
        assert_eq!(Kind::Mysql.refuses_name(&long), None);
        assert!(Kind::Mysql.refuses_name(&"x".repeat(65)).is_some());
        for kind in [Kind::Postgres, Kind::Mysql] {
            assert!(kind.refuses_name("a\0b").is_some());
            assert!(kind.refuses_name("").is_some());
            assert_eq!(kind.refuses_name("it's \"odd\"; `x`"), None);
        }
    }
}
