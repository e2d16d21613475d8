#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod app;
mod backend;
mod config;
mod connection;
mod contain;
mod context;
mod database;
mod dispose;
mod error;
pub mod orm;
mod outcome;
mod percent;
mod pool;
mod process;
mod recorder;
mod redact;
mod registry;
mod schema;
mod session;
mod settings;
mod spec;
pub mod testing;
mod url;
mod wording;

pub use crate::app::App;
pub use crate::config::{Config, Reset};
pub use crate::connection::SessionConnection;
pub use crate::context::{CommitIf, CommitNothing, CommitOnOk, Policy, Scope};
pub use crate::database::{Database, PerBackend};
pub use crate::dispose::DisposeReport;
pub use crate::error::{ConnectErrorKind, Error, Place, PoolOf, Result, ResultExt, Shortage, Undo, WaitLimit};
pub use crate::orm::{Change, ChangeKind, Changes, Entity, Fk, NewEntity, Snapshot, State, Track, Tracked, WriteGuard};
pub use crate::outcome::{CommitOutcome, UnknownCommit};
pub use crate::pool::{AppStatus, Blocker, Blockers, Holder, Holders};
#[doc(hidden)]
pub use crate::recorder::__assert_queries;
pub use crate::recorder::{Recorded, Recorder, Recording};
pub use crate::schema::{MigrationFailure, MigrationOutcome, MigrationStatus};
#[doc(hidden)]
pub use crate::session::{AtMostTwo, Counted, Same};
pub use crate::session::{HookOutcome, LentConnection, Retry, Session};
pub use crate::settings::Isolation;
pub use diesel_session_derive::{Entity, NewEntity, test};

/// The message of a caught panic.
fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}
