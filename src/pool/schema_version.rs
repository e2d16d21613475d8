//! The schema version that a connection has seen.
//!
//! A driver keeps plans and type ids for each connection, and the database refuses them after a change of the schema.
//! So each database has a counter that every change by this process raises. All applications of the process that use
//! the database share the counter.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::process::SharedByName;
use crate::url::Target;

/// The number of changes that this process has made to the schema of a database.
#[derive(Debug, Default)]
pub(super) struct SchemaVersion(AtomicUsize);

impl SchemaVersion {
    /// The version of a database by its name in the URL. A database in memory has a version of its own.
    pub(super) fn of(target: &Target) -> Arc<Self> {
        if target.in_memory { Arc::default() } else { Self::named(&format!("{} {}", target.server, target.database)) }
    }

    /// The version of a database by the identity that the server reports. A server has one identity and may have
    /// several addresses.
    pub(super) fn of_instance(instance: &str, database: &str) -> Arc<Self> {
        Self::named(&format!("{instance} {database}"))
    }

    fn named(name: &str) -> Arc<Self> {
        static VERSIONS: SharedByName<SchemaVersion> = SharedByName::new();
        VERSIONS.get_or_create(name, Arc::default)
    }
}

/// The schema version at the time when a connection was opened.
pub(super) struct SeenVersion {
    version: Arc<SchemaVersion>,
    number: usize,
}

impl SeenVersion {
    /// The current version. Later answers of the database are at least as new.
    pub(super) fn now(version: Arc<SchemaVersion>) -> Self {
        let number = version.0.load(Ordering::Acquire);
        Self { version, number }
    }

    #[inline]
    pub(super) fn is_current(&self) -> bool {
        self.number == self.version.0.load(Ordering::Acquire)
    }

    /// Has to be called before or after a change of the schema. It outdates all connections, except for this one if
    /// `has_seen_nothing`.
    pub(super) fn change(&mut self, has_seen_nothing: bool) {
        let number = self.version.0.fetch_add(1, Ordering::AcqRel);
        if has_seen_nothing && self.number == number {
            self.number = number + 1;
        }
    }
}
