//! The socket under a driver's connection, on systems other than Linux: it is never known.

use std::time::Instant;

use crate::url::Target;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Socket {}

#[derive(Debug)]
pub(super) enum ServerClose {}

impl Socket {
    pub(crate) fn cut(self) -> bool {
        match self {}
    }

    pub(super) fn forget(self) {
        match self {}
    }

    pub(super) fn server_close(self) -> Option<ServerClose> {
        match self {}
    }
}

impl ServerClose {
    pub(super) fn wait(&self, _: Instant) {
        match *self {}
    }
}

pub(super) fn connect_and_find<C, E>(
    _: &Target,
    connect: impl FnOnce() -> Result<C, E>,
    _: impl FnOnce(&mut C) -> Option<u16>,
) -> Result<(C, Option<Socket>), E> {
    connect().map(|conn| (conn, None))
}
