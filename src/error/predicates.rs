//! The code of an error, and questions that a program can ask about it.

use super::{Error, Place, Undo};
use crate::error::MigrationOutcome;

impl Error {
    /// The stable code at the start of the error's text: `DS` and three digits.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidConfig { .. } => "DS101",
            Self::AlreadyRegistered { .. } => "DS102",
            Self::NoContext { .. } => "DS103",
            Self::AlreadyBegun { .. } => "DS104",
            Self::InsideTransaction { .. } => "DS105",
            Self::SessionBusy { .. } => "DS106",
            Self::SessionEnded { .. } => "DS107",
            Self::UnknownApp { .. } => "DS108",
            Self::NotRepeatable { .. } => "DS109",
            Self::AcquireTimeout { .. } => "DS201",
            Self::Connect { .. } => "DS202",
            Self::ConnectTimeout { .. } => "DS203",
            Self::Disposed { .. } => "DS204",
            Self::StillInUse(..) => "DS205",
            Self::WouldDeadlock { .. } => "DS206",
            Self::BudgetExhausted { .. } => "DS208",
            Self::Forked { .. } => "DS209",
            Self::NotFound { .. } => "DS301",
            Self::Query { .. } => "DS302",
            Self::CommitUnknown { .. } => "DS303",
            Self::HookFailed { .. } => "DS304",
            Self::DeadlineExceeded { .. } => "DS305",
            Self::PartialCommit { .. } => "DS306",
            Self::RollbackRequired { .. } => "DS307",
            Self::ConnectionLost { .. } => "DS308",
            Self::NotMine { .. } => "DS110",
            Self::Stale { .. } => "DS309",
            Self::Autoflush { .. } => "DS310",
            Self::KeyChanged { .. } => "DS311",
            Self::UnresolvedKeys { .. } => "DS312",
            Self::Unpaired { .. } => "DS313",
            Self::NotReturned { .. } => "DS321",
            Self::NotUnique { .. } => "DS322",
            Self::RowTooLarge { .. } => "DS323",
            Self::WriteInProgress { .. } => "DS314",
            Self::WrongState { .. } => "DS315",
            Self::AlreadyFlushing { .. } => "DS316",
            Self::TooManyRows { .. } => "DS317",
            Self::NoMigrations { .. } => "DS401",
            Self::Migration(..) => "DS402",
            Self::NotReversible { .. } => "DS403",
            Self::TransactionOpen { .. } => "DS404",
            Self::LockTimeout { .. } => "DS405",
            Self::PooledConnection { .. } => "DS406",
            Self::SchemaProtected { .. } => "DS407",
            Self::TestSpoiled { .. } => "DS501",
            Self::TestSetup { .. } => "DS502",
            Self::TestLeftovers { .. } => "DS503",
            Self::NotOurs { .. } => "DS504",
        }
    }

    /// Whether a query found nothing; see [`OptionalExt::optional`](crate::OptionalExt::optional).
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Query { source: diesel::result::Error::NotFound, .. })
    }

    /// Whether the database refused a row because another row has the same unique value or key. This includes a
    /// failure in the flush before a query.
    pub fn is_unique_violation(&self) -> bool {
        use diesel::result::{DatabaseErrorKind, Error};
        matches!(self.diesel(), Some(Error::DatabaseError(DatabaseErrorKind::UniqueViolation, _)))
    }

    /// Whether the deadline of a checkout, a connect, a lock, a scope or a disposal has passed.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self,
            Self::AcquireTimeout { .. }
                | Self::BudgetExhausted { .. }
                | Self::ConnectTimeout { .. }
                | Self::DeadlineExceeded { .. }
                | Self::LockTimeout { .. }
                | Self::StillInUse(..)
        )
    }

    /// Whether the application was disposed of or removed.
    pub fn is_disposed(&self) -> bool {
        matches!(self, Self::Disposed { .. })
    }

    /// Whether the thread was in no application context.
    pub fn is_no_context(&self) -> bool {
        matches!(self, Self::NoContext { .. })
    }

    /// Whether the session needs a [`rollback`](crate::Session::rollback) before it can go on.
    pub fn is_rollback_required(&self) -> bool {
        matches!(self, Self::RollbackRequired { .. })
    }

    /// Whether the outcome of a commit or of a migration is unknown.
    pub fn is_commit_unknown(&self) -> bool {
        match self {
            Self::CommitUnknown { .. } => true,
            Self::Migration(failure) => failure.outcome == MigrationOutcome::Unknown,
            _ => false,
        }
    }

    /// Whether the connection of a statement or of a migration was lost.
    pub fn is_connection_lost(&self) -> bool {
        match self {
            Self::ConnectionLost { .. } => true,
            Self::Migration(failure) => failure.connection_lost,
            Self::Autoflush { source, .. } => source.is_connection_lost(),
            _ => false,
        }
    }

    /// Whether another program or session has changed or deleted a row since it was read.
    pub fn is_stale(&self) -> bool {
        match self {
            Self::Stale { .. } => true,
            Self::Autoflush { source, .. } => source.is_stale(),
            _ => false,
        }
    }

    /// The error of Diesel in this error, if there is one, for its
    /// [`DatabaseErrorKind`](diesel::result::DatabaseErrorKind).
    pub fn diesel(&self) -> Option<&diesel::result::Error> {
        match self {
            Self::Query { source, .. } | Self::ConnectionLost { source, .. } => Some(source),
            Self::CommitUnknown(unknown) => Some(&unknown.source),
            Self::Autoflush { source, .. } => source.diesel(),
            _ => None,
        }
    }

    #[track_caller]
    pub(crate) fn from_query(source: diesel::result::Error, at: Place) -> Self {
        match source {
            diesel::result::Error::NotFound => Self::NotFound { row: None, at },
            source => Self::Query { source, at },
        }
    }

    /// The error of a statement whose connection was lost.
    pub(crate) fn lost(app: &str, source: diesel::result::Error, in_transaction: bool, at: Place) -> Self {
        Self::ConnectionLost { app: app.into(), at, in_transaction, source, undo: Undo::default() }
    }
}
