//! Why a database could not be created or dropped.

/// Why a database could not be created or dropped; see [`ErrorKind::DatabaseAdmin`](crate::ErrorKind::DatabaseAdmin).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DatabaseProblem {
    /// The database to create exists.
    Exists,
    /// The database to drop does not exist.
    Missing,
    /// The database to drop, or the one of which a new database is a copy, has sessions.
    InUse,
    /// The account, or this process if the database is a file, must not do it.
    NotPermitted,
}

impl DatabaseProblem {
    /// The problem and the advice, after the name of the database.
    pub(super) fn description(self, detail: &str) -> String {
        match self {
            Self::Exists => "exists already. Drop it first, or call `create_database_if_missing`.".into(),
            Self::Missing => "does not exist, so it cannot be dropped. Check its name in the URL.".into(),
            Self::InUse => format!(
                "is in use, so it can be neither created nor dropped: {detail}. End the sessions, for example with \
                 `Database::remove_app`."
            ),
            Self::NotPermitted => format!("cannot be created or dropped with these rights: {detail}."),
        }
    }
}
