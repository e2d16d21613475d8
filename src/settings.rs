//! What a scope says about the sessions in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// A transaction isolation level. SQLite has only `Serializable`, which promises the most, and uses it for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::exhaustive_enums, reason = "the SQL standard has four")]
pub enum Isolation {
    /// `READ UNCOMMITTED`; PostgreSQL treats it as `ReadCommitted`.
    ReadUncommitted,
    /// `READ COMMITTED`, PostgreSQL's default.
    ReadCommitted,
    /// `REPEATABLE READ`, the default of MySQL and MariaDB.
    RepeatableRead,
    /// `SERIALIZABLE`.
    Serializable,
}

/// What the sessions of a scope do at their first statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Default,
    ReadOnly,
    Autocommit,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub(crate) end: Instant,
    pub(crate) limit: Duration,
}

/// What a scope says about the sessions in it.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) mode: Mode,
    pub(crate) isolation: Option<Isolation>,
    pub(crate) deadline: Option<Deadline>,
    /// The server is asked for the transaction's number before it is committed.
    pub(crate) resolvable: bool,
    /// The scope commits if its closure returns `Ok`.
    pub(crate) commits: bool,
    /// The schemas in which PostgreSQL looks names up, as SQL.
    pub(crate) search_path: Option<Arc<str>>,
}

impl Settings {
    pub(crate) const DEFAULT: Self = Self {
        mode: Mode::Default,
        isolation: None,
        deadline: None,
        resolvable: false,
        commits: false,
        search_path: None,
    };
}
