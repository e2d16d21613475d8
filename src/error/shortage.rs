//! What a caller would wait for for ever.

use std::fmt;

/// What a caller would wait for for ever: see [`Error::WouldDeadlock`](crate::Error::WouldDeadlock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Shortage {
    /// Every connection of the application's pool.
    Pool,
    /// Every connection that [`Database::max_connections`](crate::Database::max_connections) allows.
    Limit,
    /// The one connection that all sessions of a test share that is rolled back.
    TestConnection,
    /// The write lock of a SQLite database.
    WriteLock,
}

impl Shortage {
    pub(super) fn advice(self, of_one_thread: bool) -> &'static str {
        match (self, of_one_thread) {
            (Self::TestConnection, true) => {
                "Commit the outer session first, do both in one, or give the test a database of its own (`TestIsolation::Database`)"
            }
            (Self::TestConnection, false) => "Give the test a database of its own (`TestIsolation::Database`)",
            (Self::WriteLock, true) => "Commit the outer session first, or do both in one",
            (Self::Pool, true) => "Commit the outer session first, do both in one, or raise `Config::max_size`",
            (Self::Limit, true) => "Commit the outer session first, or raise `Database::max_connections`",
            (Self::WriteLock, false) => "Write to the databases in the same order everywhere",
            (Self::Pool, false) => "Take connections in the same order everywhere, or raise `Config::max_size`",
            (Self::Limit, false) => "Hold one connection a thread, or raise `Database::max_connections`",
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pool => "every connection of the pool",
            Self::Limit => "every connection that `Database::max_connections` allows",
            Self::TestConnection => "the one connection that all sessions of this test share",
            Self::WriteLock => "the write lock of this SQLite database",
        })
    }
}
