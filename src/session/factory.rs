//! What all sessions of an application share.

use std::sync::Arc;

use super::open_sessions::OpenSessions;
use super::row_hooks::RowHooks;
use crate::app_core::AppCore;
use crate::connection::SessionConnection;

/// Makes the sessions of an application.
pub(crate) struct SessionFactory<C: SessionConnection> {
    pub(crate) app_core: Arc<AppCore<C>>,
    pub(crate) row_hooks: RowHooks<C>,
    /// The list of open sessions, if the application belongs to a test.
    pub(crate) open_sessions: Option<Arc<OpenSessions>>,
}

impl<C: SessionConnection> std::fmt::Debug for SessionFactory<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionFactory").field("app", &self.app_core.id()).finish_non_exhaustive()
    }
}
