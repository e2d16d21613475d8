//! A commit with an unknown outcome, because its answer was lost.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::migration_failure::MigrationOutcome;
use super::{Error, Place, Result};
use crate::wording::sentence;

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

/// The content of [`Error::CommitUnknown`]: a commit whose answer was lost.
#[derive(thiserror::Error)]
#[error(
    "DS303 app `{app}`: the connection was lost at COMMIT ({at}), so whether it was committed is not known: {} {}",
    sentence(source),
    match resolver {
        Resolver::Ask(_) => "`resolve()` asks the server.".to_owned(),
        Resolver::NothingWritten => "As nothing had been written, it may be done again.".to_owned(),
        Resolver::Silent(reason) => {
            format!("`resolve()` cannot tell, as {reason}. Look for the rows before you do it again.")
        }
    }
)]
#[non_exhaustive]
pub struct UnknownCommit {
    /// The id of the application.
    pub app: String,
    /// The source location of the commit.
    pub at: Place,
    /// The error of the driver.
    pub source: diesel::result::Error,
    pub(crate) resolver: Resolver,
    pub(crate) verdict: Arc<Verdict>,
}

/// The definite result of `resolve`, once there is one. The error and the rows of the transaction share it.
#[derive(Debug, Default)]
pub(crate) struct Verdict(AtomicU8);

/// The definite outcome of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Committed = 1,
    RolledBack,
}

impl Verdict {
    pub(crate) fn decision(&self) -> Option<Decision> {
        match self.0.load(Ordering::Acquire) {
            1 => Some(Decision::Committed),
            2 => Some(Decision::RolledBack),
            _ => None,
        }
    }

    fn record(&self, outcome: &CommitOutcome) {
        let decision = match outcome {
            CommitOutcome::Committed => Decision::Committed,
            CommitOutcome::RolledBack => Decision::RolledBack,
            CommitOutcome::Unknown { .. } => return,
        };
        self.0.store(decision as u8, Ordering::Release);
    }
}

/// The way to determine the outcome of a commit.
#[derive(Clone)]
pub(crate) enum Resolver {
    /// The function asks the server. Its argument is the source location of the caller.
    Ask(Arc<dyn Fn(Place) -> Result<CommitOutcome> + Send + Sync>),
    /// The transaction has written nothing, so the outcome is `RolledBack`.
    NothingWritten,
    /// The server cannot be asked, for this reason.
    Silent(&'static str),
}

impl UnknownCommit {
    /// Asks the server for the outcome of the commit, on another connection of the application.
    ///
    /// This needs PostgreSQL and a [`resolvable`](crate::Scope::resolvable) scope. Otherwise the result is
    /// [`CommitOutcome::Unknown`] with the reason. Until the server detects that its client is gone, the transaction is
    /// still in progress. Then the method asks again for up to the application's
    /// [`acquire_timeout`](crate::Config::acquire_timeout), after which the result is `Unknown`. The result is also
    /// `Unknown` if the server no longer has the status of the transaction: it keeps the status of some hundred million
    /// transactions.
    ///
    /// The method asks the server at the application's URL. If that is another server by now, such as a replica that
    /// was promoted without the last transactions, the result concerns that server's transaction with the same id.
    ///
    /// Handles to rows that the transaction changed are [`RowState::Undecided`](crate::RowState::Undecided) until the
    /// method has returned `Committed` or `RolledBack`. Then the handles report the resulting state.
    ///
    /// # Errors
    /// The errors of a checkout; see [`Session`](crate::Session). The method can be called again.
    #[track_caller]
    pub fn resolve(&self) -> Result<CommitOutcome> {
        let outcome = match &self.resolver {
            Resolver::Ask(ask) => ask(Location::caller())?,
            Resolver::NothingWritten => CommitOutcome::RolledBack,
            Resolver::Silent(reason) => CommitOutcome::Unknown { reason: (*reason).into() },
        };
        self.verdict.record(&outcome);
        Ok(outcome)
    }
}

impl Error {
    /// The outcome of the commit that this error concerns; see [`UnknownCommit::resolve`].
    ///
    /// For [`Error::PartialCommit`] it is the outcome of the commit that failed. A hook that failed after the commit
    /// means `Committed`. A connection that was lost inside a transaction, before its commit, means `RolledBack`. A
    /// migration whose connection was lost, but which is done, means `Committed`. For all other errors the result is
    /// [`CommitOutcome::Unknown`], because there was no commit.
    ///
    /// ```
    /// use diesel_session::{CommitOutcome, Error};
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
        match self {
            Self::CommitUnknown(unknown) => unknown.resolve(),
            Self::PartialCommit { source, .. } => source.resolve(),
            Self::HookFailed { committed: true, .. } => Ok(CommitOutcome::Committed),
            Self::ConnectionLost { in_transaction: true, .. } => Ok(CommitOutcome::RolledBack),
            Self::Migration(failure) if failure.connection_lost && failure.outcome == MigrationOutcome::Done => {
                Ok(CommitOutcome::Committed)
            }
            other => {
                let reason = format!("this error ({}) is not that of a commit whose answer was lost", other.code());
                Ok(CommitOutcome::Unknown { reason })
            }
        }
    }
}

impl std::fmt::Debug for UnknownCommit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
