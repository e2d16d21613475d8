//! The error of this crate.

mod accessors;
pub(crate) mod advice;
mod app_end;
mod blocker;
mod connect_error_kind;
mod database_problem;
mod details;
mod dispose_report;
mod holder;
mod kind;
mod migration_failure;
mod optional_ext;
mod row_state;
mod shortage;
#[cfg(test)]
mod tests;
mod undo;
mod unknown_commit;

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

pub use app_end::AppEnd;
pub use blocker::{Blocker, Blockers};
pub use connect_error_kind::ConnectErrorKind;
pub(crate) use connect_error_kind::{CONFIG_INIT_SQL, DATABASE_ON_CONNECT};
pub use database_problem::DatabaseProblem;
pub(crate) use details::{A_READ, A_WRITE, Details, LOST, LostStatement, NO_APP, count};
pub use dispose_report::DisposeReport;
pub use holder::{Holder, Holders};
pub use kind::ErrorKind;
pub use migration_failure::{MigrationFailure, MigrationOutcome};
pub use optional_ext::OptionalExt;
pub use row_state::RowState;
pub(crate) use shortage::{PoolOf, Shortage, WaitLimit};
pub(crate) use undo::Undo;
pub use unknown_commit::CommitOutcome;
pub(crate) use unknown_commit::{Decision, Resolver, Verdict};

/// A location in the source of the program, as `#[track_caller]` reports it.
pub(crate) type SourceLocation = &'static Location<'static>;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of this crate's operations.
///
/// [`kind`](Self::kind) tells the errors apart, the predicates answer common questions, and the other methods return
/// the data that the error carries.
///
/// `Display` starts with the stable [`code`](Self::code). Its sentences name the application and the source location
/// if they are known, and tell what to do unless only the database can tell that. They do not repeat the cause, which
/// is the error's [`source`](std::error::Error::source). The alternate form `{:#}` adds the causes. `Debug` shows the
/// kind, the text and the cause. The password in the URL is redacted in all of them.
///
/// Every error of Diesel can be turned into this error, so `?` works for both kinds of result in a closure.
///
/// ```
/// use diesel_session::{Error, ErrorKind};
///
/// fn status(error: &Error) -> u16 {
///     match error.kind() {
///         ErrorKind::NotFound => 404,
///         ErrorKind::Stale => 409,
///         _ if error.is_unique_violation() => 409,
///         _ if error.is_transient() => 503,
///         _ => {
///             eprintln!("{error:#}");
///             500
///         }
///     }
/// }
/// assert_eq!(status(&Error::from(diesel::result::Error::NotFound)), 404);
/// ```
pub struct Error(Box<Details>);

impl Error {
    pub(crate) fn details(&self) -> &Details {
        &self.0
    }

    pub(crate) fn details_mut(&mut self) -> &mut Details {
        &mut self.0
    }

    pub(crate) fn into_details(self) -> Details {
        *self.0
    }

    pub(crate) fn from_query(source: diesel::result::Error, at: SourceLocation) -> Self {
        match source {
            diesel::result::Error::NotFound => Details::NotFound { row: None, at }.into(),
            source => Details::Query { source, at }.into(),
        }
    }

    /// The error of a statement whose connection was lost.
    pub(crate) fn lost(app: &str, source: diesel::result::Error, in_transaction: bool, at: SourceLocation) -> Self {
        let lost = if in_transaction { LostStatement::InTransaction } else { LostStatement::Autocommitted };
        Details::ConnectionLost { app: app.into(), at, lost, source, undo: Undo::default() }.into()
    }
}

/// Questions of the library itself.
impl Error {
    /// Says that a statement that was lost outside of a transaction only read.
    pub(crate) fn note_lost_read(&mut self) {
        if let Details::ConnectionLost { lost: lost @ LostStatement::Autocommitted, .. } = &mut *self.0 {
            *lost = LostStatement::Read;
        }
    }

    /// Whether only a hook has failed, after a commit that succeeded.
    pub(crate) fn is_hook_failure_after_commit(&self) -> bool {
        matches!(self.details(), Details::HookFailed { committed: true, .. })
    }

    /// The place for the outcome of a commit whose answer was lost.
    pub(crate) fn verdict(&self) -> Option<&Arc<Verdict>> {
        match self.details() {
            Details::CommitUnknown { verdict, .. } => Some(verdict),
            _ => None,
        }
    }

    /// The message of a failed connect.
    #[cfg(feature = "testing")]
    pub(crate) fn connect_message(&self) -> Option<&str> {
        match self.details() {
            Details::Connect { message, .. } => Some(message),
            _ => None,
        }
    }
}

impl From<Details> for Error {
    // The compiler then places the code of errors apart from the code that runs each time.
    #[cold]
    fn from(details: Details) -> Self {
        Self(Box::new(details))
    }
}

impl From<diesel::result::Error> for Error {
    #[track_caller]
    fn from(source: diesel::result::Error) -> Self {
        Self::from_query(source, Location::caller())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)?;
        if f.alternate()
            && let Some(source) = std::error::Error::source(self)
        {
            write!(f, " Cause: {}", crate::wording::sentence(format_args!("{source:#}")))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut structure = f.debug_struct("Error");
        structure.field("kind", &self.kind()).field("message", &self.to_string());
        if let Some(source) = std::error::Error::source(self) {
            structure.field("source", &source);
        }
        structure.finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.0)
    }
}
