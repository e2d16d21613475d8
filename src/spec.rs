//! What an application is made of.

use std::sync::Arc;

use diesel::result::{ConnectionResult, QueryResult};

use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{PoolOf, Result};
use crate::orm::Changes;
use crate::pool::{Lane, Limit};
use crate::session::{Roll, Session};
use crate::url::Target;

/// Given when an application is registered, and never changed.
pub(crate) struct Spec<C: SessionConnection> {
    pub(crate) app: Arc<str>,
    pub(crate) config: Config,
    pub(crate) target: Target,
    /// The connections that all applications of its database object have together, where that is limited.
    pub(crate) budget: Option<Arc<Limit>>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) on_connect: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkout: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkin: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_close: Option<fn(&mut C)>,
    pub(crate) hooks: UnitHooks<C>,
    /// The one connection of a test that is rolled back.
    pub(crate) lane: Option<Arc<Lane<C>>>,
    /// Where a test's sessions are listed.
    pub(crate) roll: Option<Arc<Roll>>,
}

impl<C: SessionConnection> Spec<C> {
    /// Whose pool it is, for errors.
    pub(crate) fn pool_of(&self) -> PoolOf {
        match (&self.lane, &self.roll) {
            (Some(_), _) => PoolOf::RolledBackTest,
            (None, Some(_)) => PoolOf::Test,
            (None, None) => PoolOf::Program,
        }
    }
}

pub(crate) type UnitHook<C> = fn(&Session<C>, &Changes) -> Result<()>;

/// What the database object wants to be told of its sessions' rows.
pub(crate) struct UnitHooks<C: SessionConnection> {
    pub(crate) before_flush: Option<UnitHook<C>>,
    pub(crate) after_flush: Option<UnitHook<C>>,
    pub(crate) before_commit: Option<UnitHook<C>>,
    pub(crate) after_commit: Option<UnitHook<C>>,
    pub(crate) after_rollback: Option<UnitHook<C>>,
}

impl<C: SessionConnection> Clone for UnitHooks<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C: SessionConnection> Copy for UnitHooks<C> {}

impl<C: SessionConnection> UnitHooks<C> {
    pub(crate) const NONE: Self =
        Self { before_flush: None, after_flush: None, before_commit: None, after_commit: None, after_rollback: None };
}
