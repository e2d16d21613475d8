//! A commit whose answer was lost, and what became of it.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::migration_failure::MigrationOutcome;
use super::{Error, Place, Result};
use crate::wording::sentence;

/// What became of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitOutcome {
    /// It happened.
    Committed,
    /// It did not happen, and never will; running the transaction again does nothing twice. A transaction that had written
    /// nothing is this too, as there was nothing to commit but perhaps a `NOTIFY`.
    RolledBack,
    /// Nobody can say.
    Unknown {
        /// Why.
        reason: String,
    },
}

/// A commit whose answer was lost: the content of [`Error::CommitUnknown`].
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
    /// The application.
    pub app: String,
    /// Where the commit was asked for.
    pub at: Place,
    /// What the driver said.
    pub source: diesel::result::Error,
    pub(crate) resolver: Resolver,
    pub(crate) verdict: Arc<Verdict>,
}

/// The answer of `resolve`, once there is one: the error and the rows of the transaction share it.
#[derive(Debug, Default)]
pub(crate) struct Verdict(AtomicU8);

/// What became of a transaction.
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

    fn note(&self, outcome: &CommitOutcome) {
        let decision = match outcome {
            CommitOutcome::Committed => Decision::Committed,
            CommitOutcome::RolledBack => Decision::RolledBack,
            CommitOutcome::Unknown { .. } => return,
        };
        self.0.store(decision as u8, Ordering::Release);
    }
}

/// How to learn what became of it.
#[derive(Clone)]
pub(crate) enum Resolver {
    /// Somebody answers, to a call from that place.
    Ask(Arc<dyn Fn(Place) -> Result<CommitOutcome> + Send + Sync>),
    /// Nobody has to.
    NothingWritten,
    /// Nobody answers, for that reason.
    Silent(&'static str),
}

impl UnknownCommit {
    /// Asks the server, over another connection of the application, what became of the commit.
    ///
    /// This needs PostgreSQL and a scope that was [`resolvable`](crate::Scope::resolvable); otherwise the answer is
    /// [`CommitOutcome::Unknown`] at once, with the reason. While the server has not noticed yet that its client has gone, the
    /// transaction is still in progress there: then it is asked again, for up to the application's
    /// [`acquire_timeout`](crate::Config::acquire_timeout), after which the answer is `Unknown`. So it is where the server has
    /// forgotten: it remembers some hundred million transactions.
    ///
    /// Whoever answers at the application's URL is asked. Where that has become another server, such as a replica that was promoted
    /// without the last transactions, the answer is about that server's transaction of the same number.
    ///
    /// Handles to rows that the transaction changed are [`RowState::Undecided`](crate::RowState::Undecided) until this has answered
    /// `Committed` or `RolledBack`. Then they report what is true.
    ///
    /// # Errors
    /// What can go wrong with getting a connection; see [`Session`](crate::Session). It can be called again.
    #[track_caller]
    pub fn resolve(&self) -> Result<CommitOutcome> {
        let outcome = match &self.resolver {
            Resolver::Ask(ask) => ask(Location::caller())?,
            Resolver::NothingWritten => CommitOutcome::RolledBack,
            Resolver::Silent(reason) => CommitOutcome::Unknown { reason: (*reason).into() },
        };
        self.verdict.note(&outcome);
        Ok(outcome)
    }
}

impl Error {
    /// What became of the commit that this error is about; see [`UnknownCommit::resolve`]. For [`Error::PartialCommit`] it is
    /// the commit that failed. Of other errors a hook's that failed after the commit says what became of it, and a connection that was
    /// lost inside a transaction, before its commit; the rest are
    /// [`CommitOutcome::Unknown`], as there was no commit that could be asked for.
    ///
    /// ```
    /// use diesel_session::{CommitOutcome, Error};
    ///
    /// /// Whether the order has to be placed again.
    /// fn is_to_be_repeated(error: &Error) -> diesel_session::Result<bool> {
    ///     match error.resolve()? {
    ///         CommitOutcome::Committed => Ok(false),
    ///         CommitOutcome::RolledBack => Ok(true),
    ///         _ => Ok(false),                             // somebody has to look
    ///     }
    /// }
    /// # let error = Error::from(diesel::result::Error::NotFound);
    /// # assert!(!is_to_be_repeated(&error)?);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// What can go wrong with getting a connection. It can be called again.
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
