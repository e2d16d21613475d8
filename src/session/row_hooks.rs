//! The hooks of a database object that concern tracked rows.

use super::Session;
use crate::connection::SessionConnection;
use crate::error::Result;
use crate::unit_of_work::Changes;

pub(crate) type RowHook<C> = fn(&Session<C>, &Changes) -> Result<()>;

/// The functions of a database object that run for the tracked rows of its sessions.
pub(crate) struct RowHooks<C: SessionConnection> {
    pub(crate) before_flush: Option<RowHook<C>>,
    pub(crate) after_flush: Option<RowHook<C>>,
    pub(crate) before_commit: Option<RowHook<C>>,
    pub(crate) after_commit: Option<RowHook<C>>,
    pub(crate) after_rollback: Option<RowHook<C>>,
}

impl<C: SessionConnection> Clone for RowHooks<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C: SessionConnection> Copy for RowHooks<C> {}

impl<C: SessionConnection> RowHooks<C> {
    pub(crate) const NONE: Self =
        Self { before_flush: None, after_flush: None, before_commit: None, after_commit: None, after_rollback: None };
}
