//! The kinds of databases that the crate supports.

/// The usual first keywords of libpq's `keyword=value` form.
const LIBPQ_KEYWORDS: [&str; 8] = ["host", "hostaddr", "port", "dbname", "user", "password", "service", "sslmode"];

/// MySQL and MariaDB are one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DatabaseKind {
    /// PostgreSQL.
    Postgres,
    /// MySQL or MariaDB.
    Mysql,
    /// SQLite.
    Sqlite,
}

/// The kind of all connections, if only one kind's feature is enabled.
const ONLY: Option<DatabaseKind> = match (cfg!(feature = "postgres"), cfg!(feature = "mysql"), cfg!(feature = "sqlite"))
{
    (true, false, false) => Some(DatabaseKind::Postgres),
    (false, true, false) => Some(DatabaseKind::Mysql),
    (false, false, true) => Some(DatabaseKind::Sqlite),
    _ => None,
};

impl DatabaseKind {
    const ALL: [Self; 3] = [Self::Postgres, Self::Mysql, Self::Sqlite];

    /// The kinds whose features are enabled.
    pub(crate) fn enabled() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|kind| kind.missing_feature().is_none())
    }

    /// The feature of the crate that this kind needs, if the feature is not enabled.
    pub(crate) fn missing_feature(self) -> Option<&'static str> {
        let (feature, is_enabled) = match self {
            Self::Postgres => ("postgres", cfg!(feature = "postgres")),
            Self::Mysql => ("mysql", cfg!(feature = "mysql")),
            Self::Sqlite => ("sqlite", cfg!(feature = "sqlite")),
        };
        (!is_enabled).then_some(feature)
    }

    /// This kind, which is that of a connection. If only one kind is enabled, the compiler knows the result, and leaves
    /// the code for other kinds out of the program.
    #[inline]
    pub(crate) fn known(self) -> Self {
        ONLY.unwrap_or(self)
    }

    /// The database kind that a URL names by its scheme or its form.
    pub(crate) fn of_url(url: &str) -> Option<Self> {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| url.starts_with(prefix));
        let ends = |suffixes: &[&str]| suffixes.iter().any(|suffix| url.ends_with(suffix));
        let keyword = url.split_once('=').map(|(name, _)| name.trim());
        if starts(&["postgres://", "postgresql://"]) || keyword.is_some_and(|name| LIBPQ_KEYWORDS.contains(&name)) {
            Some(Self::Postgres)
        } else if starts(&["mysql://"]) {
            Some(Self::Mysql)
        } else if starts(&["sqlite:", "file:", ":memory:"])
            || !starts(&["postgres", "mysql"]) && ends(&[".sqlite", ".sqlite3", ".db"])
        {
            Some(Self::Sqlite)
        } else {
            None
        }
    }

    /// The kind of the server in the text of an error, which is [`Target::shown`](crate::url::Target::shown).
    pub(crate) fn of_shown(server: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| server.split(' ').next() == Some(kind.name()))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Postgres => "PostgreSQL",
            Self::Mysql => "MySQL",
            Self::Sqlite => "SQLite",
        }
    }

    pub(crate) fn url_form(self) -> &'static str {
        match self {
            Self::Postgres => "postgres://user:password@host:port/database",
            Self::Mysql => "mysql://user:password@host:port/database",
            Self::Sqlite => "a path, sqlite://path or :memory:",
        }
    }
}
