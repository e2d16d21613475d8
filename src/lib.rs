#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod admin;
mod app;
mod app_core;
mod app_hooks;
mod behind;
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
pub mod migrations;
mod panic;
mod percent;
pub mod pool;
mod pooled_connection;
mod process;
pub mod recorder;
mod redact;
mod registry;
pub mod session;
mod settings;
mod sqlite_uri;
mod sync;
#[cfg(feature = "testing")]
#[clippy::msrv = "1.89"]
pub mod testing;
pub mod unit_of_work;
mod url;
mod wording;

pub use crate::app::App;
pub use crate::config::Config;
pub use crate::connection::SessionConnection;
pub use crate::context::Scope;
pub use crate::database::Database;
pub use crate::error::{Error, ErrorKind, OptionalExt, Result};
pub use crate::kind::DatabaseKind;
pub use crate::pooled_connection::PooledConnection;
#[doc(hidden)]
pub use crate::recorder::__assert_queries;
#[doc(inline)]
pub use crate::session::Session;
#[doc(inline)]
pub use crate::unit_of_work::{Entity, NewEntity, Tracked};
#[cfg(feature = "testing")]
pub use diesel_session_derive::test;
#[cfg(feature = "derive")]
pub use diesel_session_derive::{Entity, NewEntity};
