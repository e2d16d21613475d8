//! Questions that a program can ask an error.

use std::panic::Location;

use diesel::result::{DatabaseErrorKind, Error as DieselError};

use super::{
    AppEnd, Blockers, ConnectErrorKind, DatabaseProblem, Details, DisposeReport, Error, ErrorKind, Holders,
    MigrationFailure, MigrationOutcome, RowState,
};

/// A reference to the field of these variants.
macro_rules! field {
    ($error:ident, $field:ident of $($variant:ident)|+) => {
        match $error.details() {
            $(Details::$variant { $field, .. })|+ => Some($field),
            _ => None,
        }
    };
}

/// The kind.
impl Error {
    /// The kind of this error.
    pub fn kind(&self) -> ErrorKind {
        self.details().kind()
    }

    /// The stable code at the start of the error's text: `DS` and three digits.
    pub fn code(&self) -> &'static str {
        self.kind().code()
    }

    /// Whether a query found nothing; see [`OptionalExt::optional`](crate::OptionalExt::optional).
    pub fn is_not_found(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }

    /// Whether the database refused a row because another row has the same unique value or key. This includes a
    /// failure in the flush before a query.
    pub fn is_unique_violation(&self) -> bool {
        self.is_violation(DatabaseErrorKind::UniqueViolation)
    }

    /// Whether the database refused a statement because of a foreign key. This includes a failure in the flush before
    /// a query.
    pub fn is_foreign_key_violation(&self) -> bool {
        self.is_violation(DatabaseErrorKind::ForeignKeyViolation)
    }

    /// Whether the database refused a row because a column of it must not be NULL. This includes a failure in the
    /// flush before a query.
    pub fn is_not_null_violation(&self) -> bool {
        self.is_violation(DatabaseErrorKind::NotNullViolation)
    }

    /// Whether the deadline of a checkout, a connect, a lock, a scope or a disposal has passed.
    pub fn is_timeout(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::AcquireTimeout
                | ErrorKind::ConnectionLimitReached
                | ErrorKind::ConnectTimeout
                | ErrorKind::DeadlineExceeded
                | ErrorKind::LockTimeout
                | ErrorKind::StillInUse
        )
    }

    /// Whether the application was disposed of or removed.
    pub fn is_disposed(&self) -> bool {
        self.kind() == ErrorKind::Disposed
    }

    /// Whether the thread was in no application context.
    pub fn is_no_context(&self) -> bool {
        self.kind() == ErrorKind::NoContext
    }

    /// Whether the session needs a [`rollback`](crate::Session::rollback) before it can go on.
    pub fn is_rollback_required(&self) -> bool {
        self.kind() == ErrorKind::RollbackRequired
    }

    /// Whether the outcome of a commit or of a migration is unknown.
    pub fn is_commit_unknown(&self) -> bool {
        match self.details() {
            Details::CommitUnknown { .. } => true,
            Details::Migration(failure) => failure.outcome == MigrationOutcome::Unknown,
            _ => false,
        }
    }

    /// Whether the connection of a statement or of a migration was lost.
    pub fn is_connection_lost(&self) -> bool {
        match self.details() {
            Details::ConnectionLost { .. } => true,
            Details::Migration(failure) => failure.connection_lost,
            Details::Autoflush { source, .. } => source.is_connection_lost(),
            _ => false,
        }
    }

    /// Whether another program or session has changed or deleted a row since it was read.
    pub fn is_stale(&self) -> bool {
        match self.details() {
            Details::Stale { .. } => true,
            Details::Autoflush { source, .. } => source.is_stale(),
            _ => false,
        }
    }

    fn is_violation(&self, kind: DatabaseErrorKind) -> bool {
        matches!(self.database_error(), Some(DieselError::DatabaseError(found, _)) if *found == kind)
    }
}

/// The data of the error. Each method returns `None` if the error does not carry that data.
impl Error {
    /// The id of the application.
    pub fn app(&self) -> Option<&str> {
        match self.details() {
            Details::Migration(failure) => Some(&failure.app),
            Details::StillInUse(report) => report.apps.first().map(String::as_str),
            Details::Autoflush { source, .. } => source.app(),
            Details::InvalidConfig { app, .. } if app == super::NO_APP => None,
            _ => field!(self, app of AcquireTimeout | AlreadyRegistered | CommitUnknown | Connect | ConnectTimeout | ConnectionLimitReached
                | ConnectionLost | Disposed | Forked | InvalidConfig | LockTimeout | NoMigrations | NotReversible
                | PoolerInTransactionMode | SchemaProtected | SessionEnded | TestInvalidated | TransactionOpen | UnknownApp
                | WouldDeadlock)
            .map(String::as_str),
        }
    }

    /// The source location of the call that failed.
    pub fn location(&self) -> Option<&'static Location<'static>> {
        match self.details() {
            Details::TestInvalidated { at, .. } => *at,
            Details::PartialCommit { source, .. } => source.location(),
            _ => field!(self, at of AcquireTimeout | AlreadyBegun | AlreadyFlushing | Autoflush | CommitUnknown | Connect | ConnectTimeout
                | ConnectionLimitReached | ConnectionLost | DeadlineExceeded | ForeignHandle | InsideTransaction
                | KeyChanged | LockTimeout | NoContext | NotFound | NotRepeatable | NotReturned | NotUnique | Query
                | RollbackRequired | RowTooLarge | SchemaProtected | SessionBusy | SessionEnded | Stale | TooManyRows
                | UnknownApp | UnmatchedRows | UnresolvedKeys | WouldDeadlock | WriteInProgress | WrongState)
            .copied(),
        }
    }

    /// The source location of the earlier call that prevents the failed one: the begin of the open transaction, the
    /// closure around the call, or the operation that is still using the session or the row.
    pub fn earlier_location(&self) -> Option<&'static Location<'static>> {
        match self.details() {
            Details::AlreadyBegun { begun_at: earlier, .. }
            | Details::InsideTransaction { outer_at: earlier, .. }
            | Details::NotRepeatable { since: earlier, .. }
            | Details::SessionBusy { held_at: earlier, .. }
            | Details::WriteInProgress { held_at: earlier, .. } => Some(*earlier),
            _ => None,
        }
    }

    /// The holders of the connections for which the caller waited or would wait, or which a disposal or a schema
    /// operation found in use.
    pub fn holders(&self) -> Option<&Holders> {
        match self.details() {
            Details::StillInUse(report) => Some(&report.still_out),
            _ => field!(self, holders of AcquireTimeout | ConnectionLimitReached | TransactionOpen | WouldDeadlock),
        }
    }

    /// The sessions that hold the lock for which an operation waited, as far as they are known.
    pub fn blockers(&self) -> Option<&Blockers> {
        field!(self, blockers of LockTimeout)
    }

    /// The error of Diesel, for its [`DatabaseErrorKind`]. For the failure of a flush before a query, or of the commit
    /// of one of several databases, it is the error of that flush or commit.
    pub fn database_error(&self) -> Option<&DieselError> {
        match self.details() {
            Details::Query { source, .. }
            | Details::ConnectionLost { source, .. }
            | Details::CommitUnknown { source, .. } => Some(source),
            Details::Autoflush { source, .. } | Details::PartialCommit { source, .. } => source.database_error(),
            _ => None,
        }
    }

    /// The reason why a connect failed.
    pub fn connect_error_kind(&self) -> Option<ConnectErrorKind> {
        field!(self, kind of Connect).copied()
    }

    /// The reason why a database could not be created or dropped.
    pub fn database_problem(&self) -> Option<DatabaseProblem> {
        field!(self, problem of DatabaseAdmin).copied()
    }

    /// The reason why the application gives no connections.
    pub fn app_end(&self) -> Option<AppEnd> {
        field!(self, how of Disposed).copied()
    }

    /// The report of a disposal that did not end in time.
    pub fn dispose_report(&self) -> Option<&DisposeReport> {
        match self.details() {
            Details::StillInUse(report) => Some(report),
            _ => None,
        }
    }

    /// The failed migration.
    pub fn migration_failure(&self) -> Option<&MigrationFailure> {
        match self.details() {
            Details::Migration(failure) => Some(failure),
            _ => None,
        }
    }

    /// The name of the entity of the row or rows that the error concerns.
    pub fn entity(&self) -> Option<&'static str> {
        match self.details() {
            Details::Autoflush { source, .. } => source.entity(),
            _ => field!(self, entity of ForeignHandle | KeyChanged | NotReturned | NotUnique | RowTooLarge | Stale
                | UnmatchedRows | UnresolvedKeys | WriteInProgress | WrongState)
            .copied(),
        }
    }

    /// The key of the row that the error concerns.
    pub fn key(&self) -> Option<&str> {
        match self.details() {
            Details::Autoflush { source, .. } => source.key(),
            Details::Stale { key, .. } | Details::NotUnique { key, .. } | Details::KeyChanged { from: key, .. } => {
                Some(key)
            }
            _ => field!(self, key of ForeignHandle | RowTooLarge | WriteInProgress | WrongState)?.as_deref(),
        }
    }

    /// The state of the handle, if that state does not allow the operation.
    pub fn row_state(&self) -> Option<RowState> {
        field!(self, state of WrongState).copied()
    }

    /// The hook that failed, such as `before_commit`.
    pub fn hook(&self) -> Option<&'static str> {
        field!(self, hook of HookFailed).copied()
    }

    /// The databases of a scope that were committed before the commit of another database failed.
    pub fn committed_databases(&self) -> Option<&[String]> {
        field!(self, committed of PartialCommit).map(Vec::as_slice)
    }

    /// The versions of the migrations that `drop_all` cannot revert: those without a way back, and those that are not
    /// among the migrations of the program.
    pub fn irreversible_migrations(&self) -> Option<impl Iterator<Item = &str>> {
        match self.details() {
            Details::NotReversible { unknown, irreversible, .. } => {
                Some(irreversible.iter().chain(unknown).map(String::as_str))
            }
            _ => None,
        }
    }
}
