//! The resources for which a caller can wait, and the limits of a wait.

use std::fmt;

use super::Holders;
use crate::kind::DatabaseKind;

/// The resource of a deadlock; see [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Shortage {
    /// All connections of the application's pool.
    Pool,
    /// All connections that [`Database::max_connections`](crate::Database::max_connections) allows.
    Limit,
    /// The one connection that all sessions of a test that is rolled back share.
    TestConnection,
    /// The write lock of a SQLite database.
    WriteLock,
}

impl Shortage {
    pub(super) fn advice(self, holders: &Holders, pool: PoolOf) -> String {
        let first = "Commit the outer session first";
        match (self, holders.are_all_the_caller()) {
            (Self::TestConnection, true) => {
                format!("{first}, do both in one, or {}", PoolOf::RolledBackTest.more())
            }
            (Self::TestConnection, false) => "Give the test a database of its own (`TestIsolation::Database`)".into(),
            (Self::WriteLock, true) => format!("{first}, or do both in one"),
            (Self::Pool, true) => format!("{first}, do both in one, or {}", pool.more()),
            (Self::Limit, true) => format!("{first}, or raise `Database::max_connections`"),
            (Self::WriteLock, false) => "Write to the databases in the same order everywhere".into(),
            // Threads that wait for the same pool cannot acquire in an order.
            (Self::Pool, false) if holders.wait_for_same_resource() => {
                format!("Let each thread hold one connection at a time, or {}", pool.more())
            }
            (Self::Pool, false) => format!("Take connections in the same order everywhere, or {}", pool.more()),
            (Self::Limit, false) => {
                "Let each thread hold one connection at a time, or raise `Database::max_connections`".into()
            }
        }
    }
}

/// The kind of pool. It decides how the pool gets more connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum PoolOf {
    /// The pool of an application of the program. [`Config::max_size`](crate::Config::max_size) sets its size.
    Program,
    #[cfg_attr(not(feature = "testing"), allow(dead_code))]
    /// The pool of a test. [`TestSetup::max_size`](crate::testing::TestSetup::max_size) sets its size.
    Test,
    /// The pool of a test that is rolled back. It has one connection.
    RolledBackTest,
}

impl PoolOf {
    /// The way to give the pool more connections, as a phrase.
    pub(super) fn more(self) -> &'static str {
        match self {
            Self::Program => "raise `Config::max_size`",
            Self::Test => "raise the test's `max_size` (`TestSetup::max_size`)",
            Self::RolledBackTest => "give the test a database of its own (`TestIsolation::Database`)",
        }
    }

    /// Like [`more`](Self::more). If a connect was running, the caller's time was too short.
    pub(super) fn more_or_time(self, is_connecting: bool) -> &'static str {
        match self {
            Self::Program | Self::Test if is_connecting => {
                "raise `Config::acquire_timeout`: a pool opens one connection at a time"
            }
            pool => pool.more(),
        }
    }
}

/// The limit that ended a wait for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum WaitLimit {
    /// [`Config::acquire_timeout`](crate::Config::acquire_timeout).
    Acquire,
    /// [`Config::connect_timeout`](crate::Config::connect_timeout).
    Connect,
    /// The deadline of the scope.
    Scope,
    /// The time that was given to the call, as in [`App::ping_within`](crate::App::ping_within).
    Call,
}

impl WaitLimit {
    /// Advice on connections that are in use, as sentences.
    pub(super) fn advice(self, has_holders: bool, more: &str) -> String {
        let end = if has_holders { "end the transactions listed, or " } else { "" };
        let advice = format!("{end}{more}");
        match self {
            Self::Scope => format!(
                "The scope's deadline ended the wait: give it more time with `Scope::deadline`, {}.",
                match has_holders {
                    true => advice,
                    false => format!("or {advice}"),
                }
            ),
            Self::Acquire | Self::Connect | Self::Call => format!("{}{}.", advice[..1].to_uppercase(), &advice[1..]),
        }
    }

    /// Advice on a server that does not answer, as a sentence.
    pub(super) fn advice_on_connect(self, server: &str, is_pooled: bool) -> String {
        let check = match DatabaseKind::of_shown(server) == Some(DatabaseKind::Sqlite) {
            true => "Check that the disk of the file answers",
            false if is_pooled => "Check that the pooler has a free session and that the server is reachable",
            false => "Check that it runs and is reachable",
        };
        match self {
            Self::Scope => format!("{check}, or give the scope more time with `Scope::deadline`."),
            Self::Acquire => format!("{check}, or raise `Config::acquire_timeout`."),
            Self::Connect => format!("{check}, or raise `Config::connect_timeout`."),
            Self::Call => format!("{check}, or give the call more time."),
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
