//! The session, through which a program sends its statements, and the types of its methods.
//!
//! [`Session`] is the page to read.

mod commit;
mod connection_guard;
mod flush;
mod invalidation;
mod limits;
mod nested;
mod open_sessions;
mod session_inner;
mod statement;
mod subselect;
mod transaction_history;
mod transaction_state;

// The page of `Session` lists the methods in the order of these modules: queries and the transaction, rows, hooks.
mod handle;

mod retry;
mod unit;

mod hooks;

pub use crate::error::CommitOutcome;
pub use crate::settings::Isolation;
pub use connection_guard::ConnectionGuard;
pub use handle::Session;
pub use hooks::HookOutcome;
pub(crate) use hooks::{ChangeEvent, RowHook, RowHooks};
#[cfg(feature = "testing")]
pub(crate) use open_sessions::OpenSessions;
pub use retry::Retry;
pub(crate) use session_inner::{SessionFactory, SessionInner};
#[doc(hidden)]
pub use subselect::{AtMostTwo, Counted, Same};
