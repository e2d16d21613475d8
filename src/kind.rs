//! The kinds of databases.

/// A kind of database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DatabaseKind {
    Postgres,
    Mysql,
    Sqlite,
}
