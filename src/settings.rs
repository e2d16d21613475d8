//! The settings of a scope for its sessions.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// A transaction isolation level. SQLite has only `Serializable`, the strictest one, and uses it for all levels.
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

/// How the sessions of a scope handle transactions.
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

/// The settings of a scope for its sessions.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) mode: Mode,
    pub(crate) isolation: Option<Isolation>,
    pub(crate) deadline: Option<Deadline>,
    /// Whether a commit asks the server for the number of the transaction first.
    pub(crate) resolvable: bool,
    /// Whether the scope may commit if its closure returns `Ok`.
    pub(crate) commits: bool,
    /// Whether the first statement begins the transaction, even if it only reads.
    pub(crate) begins_eagerly: bool,
    /// The schemas in which PostgreSQL looks up names, as SQL.
    pub(crate) search_path: Option<Arc<str>>,
}

impl Settings {
    pub(crate) const DEFAULT: Self = Self {
        mode: Mode::Default,
        isolation: None,
        deadline: None,
        resolvable: false,
        commits: false,
        begins_eagerly: false,
        search_path: None,
    };
}
