//! What an application is made of.

use std::sync::Arc;

use diesel::result::{ConnectionResult, QueryResult};

use crate::config::Config;
use crate::connection::SessionConnection;
use crate::pool::Limit;
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
}
