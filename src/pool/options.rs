//! The options of a pool.

use std::sync::Arc;

use diesel::result::{ConnectionResult, QueryResult};

use super::{PerProcessLimit, PinnedConnection};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::PoolOf;
use crate::url::Target;

/// Given when an application is registered, and never changed.
pub(crate) struct PoolOptions<C: SessionConnection> {
    pub(crate) app: Arc<str>,
    pub(crate) config: Config,
    pub(crate) target: Target,
    /// The connections that all applications of its database object have together, where that is limited.
    pub(crate) connection_limit: Option<Arc<PerProcessLimit>>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) on_connect: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkout: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkin: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_close: Option<fn(&mut C)>,
    /// The one connection of a test that is rolled back.
    pub(crate) pinned: Option<Arc<PinnedConnection<C>>>,
    /// Whether it is the pool of a test.
    pub(crate) is_of_test: bool,
}

impl<C: SessionConnection> PoolOptions<C> {
    /// Whose pool it is, for errors.
    pub(crate) fn pool_of(&self) -> PoolOf {
        match (&self.pinned, self.is_of_test) {
            (Some(_), _) => PoolOf::RolledBackTest,
            (None, true) => PoolOf::Test,
            (None, false) => PoolOf::Program,
        }
    }
}
