//! A commit with an unknown outcome, because its answer was lost.

use std::fmt;
use std::panic::Location;
use std::sync::{Arc, OnceLock};

use super::migration_failure::MigrationOutcome;
use super::{Details, Error, LostStatement, Result, SourceLocation};

/// The outcome of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitOutcome {
    /// The transaction was committed.
    Committed,
    /// The transaction was not committed and never will be, so running it again does nothing twice. A transaction that
    /// had written nothing has this outcome too, because it had nothing to commit except perhaps a `NOTIFY`.
    RolledBack,
    /// The outcome cannot be determined.
    Unknown {
        /// The reason.
        reason: String,
    },
}

/// The definite result of `resolve`, once there is one. The error and the rows of the transaction share it.
#[derive(Debug, Default)]
pub(crate) struct Verdict(OnceLock<Decision>);

/// The definite outcome of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Committed,
    RolledBack,
}

impl Verdict {
    pub(crate) fn decision(&self) -> Option<Decision> {
        self.0.get().copied()
    }
}

/// The way to determine the outcome of a commit.
#[derive(Clone)]
pub(crate) enum Resolver {
    /// The function asks the server. Its argument is the source location of the caller.
    Ask(Arc<dyn Fn(SourceLocation) -> Result<CommitOutcome> + Send + Sync>),
    /// The transaction has written nothing, so the outcome is `RolledBack`.
    NothingWritten,
    /// The server cannot be asked, for this reason.
    Silent(&'static str),
}

impl Resolver {
    /// The end of the error's text.
    pub(super) fn advice(&self) -> String {
        match self {
            Self::Ask(_) => "`resolve()` asks the server.".to_owned(),
            Self::NothingWritten => "As nothing had been written, it may be done again.".to_owned(),
            Self::Silent(reason) => {
                format!("`resolve()` cannot tell, as {reason}. Look for the rows before you do it again.")
            }
        }
    }

    fn resolve(&self, verdict: &Verdict, at: SourceLocation) -> Result<CommitOutcome> {
        let (decision, outcome) = match self {
            Self::Silent(reason) => return Ok(CommitOutcome::Unknown { reason: (*reason).into() }),
            Self::NothingWritten => (Decision::RolledBack, CommitOutcome::RolledBack),
            Self::Ask(ask) => match ask(at)? {
                CommitOutcome::Committed => (Decision::Committed, CommitOutcome::Committed),
                CommitOutcome::RolledBack => (Decision::RolledBack, CommitOutcome::RolledBack),
                unknown => return Ok(unknown),
            },
        };
        verdict.0.get_or_init(|| decision);
        Ok(outcome)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.advice())
    }
}

impl Error {
    /// The outcome of the commit that this error concerns. For a commit whose answer was lost
    /// ([`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown)), the method asks the server on another
    /// connection of the application.
    ///
    /// This needs PostgreSQL and a [`resolvable`](crate::Scope::resolvable) scope. Otherwise the result is
    /// [`CommitOutcome::Unknown`] with the reason. Until the server detects that its client is gone, the transaction is
    /// still in progress. Then the method asks again for up to the application's
    /// [`acquire_timeout`](crate::Config::acquire_timeout), after which the result is `Unknown`. The result is also
    /// `Unknown` if the server no longer has the status of the transaction: it keeps the status of some hundred million
    /// transactions.
    ///
    /// The method asks the server at the application's URL. If that is another server by now, or a standby that was
    /// promoted since, the result is `Unknown` too, because this server may lack the last transactions and has its own
    /// transaction with the same id.
    ///
    /// Handles to rows that the transaction changed are
    /// [`RowState::Undecided`](crate::unit_of_work::RowState::Undecided) until the method has returned `Committed` or
    /// `RolledBack`. Then the handles report the resulting state.
    ///
    /// For [`ErrorKind::PartialCommit`](crate::ErrorKind::PartialCommit) it is the outcome of the commit that failed. A
    /// hook that failed after the commit means `Committed`. A connection that was lost inside a transaction, before its
    /// commit, means `RolledBack`. A migration whose connection was lost, but which is done, means `Committed`. For all
    /// other errors the result is [`CommitOutcome::Unknown`], because there was no commit.
    ///
    /// ```
    /// use diesel_session::Error;
    /// use diesel_session::session::CommitOutcome;
    ///
    /// /// Whether the program has to place the order again.
    /// fn is_to_be_repeated(error: &Error) -> diesel_session::Result<bool> {
    ///     match error.resolve()? {
    ///         CommitOutcome::Committed => Ok(false),
    ///         CommitOutcome::RolledBack => Ok(true),
    ///         _ => Ok(false),                             // a person has to check
    ///     }
    /// }
    /// # let error = Error::from(diesel::result::Error::NotFound);
    /// # assert!(!is_to_be_repeated(&error)?);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of a checkout. The method can be called again.
    #[track_caller]
    pub fn resolve(&self) -> Result<CommitOutcome> {
        match self.details() {
            Details::CommitUnknown { resolver, verdict, .. } => resolver.resolve(verdict, Location::caller()),
            Details::PartialCommit { source, .. } => source.resolve(),
            Details::HookFailed { committed: true, .. } => Ok(CommitOutcome::Committed),
            Details::ConnectionLost { lost: LostStatement::InTransaction, .. } => Ok(CommitOutcome::RolledBack),
            Details::Migration(failure) if failure.connection_lost && failure.outcome == MigrationOutcome::Done => {
                Ok(CommitOutcome::Committed)
            }
            other => {
                let code = other.kind().code();
                let reason = format!("this error ({code}) is not that of a commit whose answer was lost");
                Ok(CommitOutcome::Unknown { reason })
            }
        }
    }
}
