//! What all sessions of an application have in common.

use std::sync::Arc;

use super::open_sessions::OpenSessions;
use super::row_hooks::RowHooks;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;

/// What a session of an application is made from.
pub(crate) struct SessionFactory<C: SessionConnection> {
    pub(crate) core: Arc<AppCore<C>>,
    pub(crate) row_hooks: RowHooks<C>,
    /// The list of open sessions, if the application is that of a test.
    pub(crate) open_sessions: Option<Arc<OpenSessions>>,
}

impl<C: SessionConnection> std::fmt::Debug for SessionFactory<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionFactory").field("app", &self.core.id()).finish_non_exhaustive()
    }
}
