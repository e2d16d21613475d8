#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod app;
mod app_core;
mod config;
mod connection;
mod context;
mod database;
mod dialect;
mod dispose;
mod error;
mod kind;
#[cfg(test)]
mod layers_tests;
mod migrations;
mod panic;
mod percent;
mod pool;
mod process;
mod recorder;
mod redact;
mod registry;
mod session;
mod settings;
mod sqlite_uri;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
pub mod unit_of_work;
mod url;
mod wording;

pub use crate::app::App;
pub use crate::config::{Config, Reset};
pub use crate::connection::SessionConnection;
pub use crate::context::{CommitIf, CommitNothing, CommitOnOk, Policy, Scope};
pub use crate::database::Database;
pub use crate::error::{
    AppEnd, Blocker, Blockers, CommitOutcome, ConnectErrorKind, DisposeReport, Error, Holder, Holders,
    MigrationFailure, MigrationOutcome, OptionalExt, Place, PoolOf, Result, RowState, Shortage, Undo, UnknownCommit,
    WaitLimit,
};
pub use crate::kind::DatabaseKind;
pub use crate::migrations::{MigrationStatus, PerBackend};
pub use crate::pool::AppStatus;
#[doc(hidden)]
pub use crate::recorder::__assert_queries;
pub use crate::recorder::{Recorded, Recorder, Recording};
#[doc(hidden)]
pub use crate::session::{AtMostTwo, Counted, Same};
pub use crate::session::{ConnectionGuard, HookOutcome, Retry, Session};
pub use crate::settings::Isolation;
pub use crate::unit_of_work::{
    Change, ChangeKind, Changes, Entity, Fk, NewEntity, Snapshot, Track, Tracked, WriteGuard,
};
#[cfg(feature = "testing")]
pub use diesel_session_derive::test;
#[cfg(feature = "derive")]
pub use diesel_session_derive::{Entity, NewEntity};
