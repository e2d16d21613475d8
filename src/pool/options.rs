//! The options of a pool.

use std::sync::Arc;

use diesel::result::{ConnectionResult, QueryResult};

use super::{PerProcessLimit, PinnedConnection};
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::PoolOf;
use crate::url::Target;

/// The options of a pool. They are set when the application is registered and never change.
pub(crate) struct PoolOptions<C: SessionConnection> {
    pub(crate) app: Arc<str>,
    pub(crate) config: Config,
    pub(crate) target: Target,
    /// The limit on the connections of all applications of the database object, if there is one.
    pub(crate) connection_limit: Option<Arc<PerProcessLimit>>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) on_connect: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkout: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkin: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_close: Option<fn(&mut C)>,
    /// The one connection of a test that is rolled back.
    pub(crate) pinned: Option<Arc<PinnedConnection<C>>>,
    /// Whether this is the pool of a test.
    pub(crate) is_of_test: bool,
}

impl<C: SessionConnection> PoolOptions<C> {
    /// The kind of pool, for the advice in errors.
    pub(crate) fn pool_of(&self) -> PoolOf {
        match (&self.pinned, self.is_of_test) {
            (Some(_), _) => PoolOf::RolledBackTest,
            (None, true) => PoolOf::Test,
            (None, false) => PoolOf::Program,
        }
    }
}
