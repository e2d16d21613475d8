//! The kinds of databases that the crate supports.

/// MySQL and MariaDB are one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DatabaseKind {
    Postgres,
    Mysql,
    Sqlite,
}
