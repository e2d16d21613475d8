//! Which schema a connection has seen.
//!
//! A driver keeps plans and numbers of types with each connection, and the database refuses them once the schema is another. So
//! every database has a counter, shared by all applications of the process on it, that is raised by each change.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::process::PerProcess;
use crate::url::Target;

/// How often the schema of one database has been changed by this process.
#[derive(Debug, Default)]
pub(super) struct SchemaVersion(AtomicUsize);

impl SchemaVersion {
    /// That of a database, by the name the URL gives it. Databases in memory are one each.
    pub(super) fn of(target: &Target) -> Arc<Self> {
        if target.in_memory { Arc::default() } else { Self::named(format!("{} {}", target.server, target.database)) }
    }

    /// That of a database, by the name it gives itself: a server has one, and may have several addresses.
    pub(super) fn of_instance(instance: &str, database: &str) -> Arc<Self> {
        Self::named(format!("{instance} {database}"))
    }

    fn named(name: String) -> Arc<Self> {
        static VERSIONS: PerProcess<Mutex<HashMap<String, Weak<SchemaVersion>>>> = PerProcess::new();
        let mut versions = VERSIONS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(version) = versions.get(&name).and_then(Weak::upgrade) {
            return version;
        }
        versions.retain(|_, version| version.strong_count() > 0);
        let version = Arc::default();
        versions.insert(name, Arc::downgrade(&version));
        version
    }
}

/// The schema as it was when a connection was made.
pub(super) struct SeenVersion {
    version: Arc<SchemaVersion>,
    number: usize,
}

impl SeenVersion {
    /// The present one. What is asked of the database after this is at least as new.
    pub(super) fn now(version: Arc<SchemaVersion>) -> Self {
        let number = version.0.load(Ordering::Acquire);
        Self { version, number }
    }

    #[inline]
    pub(super) fn is_current(&self) -> bool {
        self.number == self.version.0.load(Ordering::Acquire)
    }

    /// The schema is, or is about to be, another: for every connection but this one where it has seen nothing yet.
    pub(super) fn change(&mut self, has_seen_nothing: bool) {
        let number = self.version.0.fetch_add(1, Ordering::AcqRel);
        if has_seen_nothing && self.number == number {
            self.number = number + 1;
        }
    }
}

impl fmt::Debug for SeenVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SeenVersion").field(&self.number).finish()
    }
}
