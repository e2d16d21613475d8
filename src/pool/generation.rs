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
pub(super) struct Generation(AtomicUsize);

impl Generation {
    /// That of a database, by the name the URL gives it. Databases in memory are one each.
    pub(super) fn of(target: &Target) -> Arc<Self> {
        if target.in_memory { Arc::default() } else { Self::named(format!("{} {}", target.server, target.database)) }
    }

    /// That of a database, by the name it gives itself: a server has one, and may have several addresses.
    pub(super) fn of_instance(instance: &str, database: &str) -> Arc<Self> {
        Self::named(format!("{instance} {database}"))
    }

    fn named(name: String) -> Arc<Self> {
        static GENERATIONS: PerProcess<Mutex<HashMap<String, Weak<Generation>>>> = PerProcess::new();
        let mut generations = GENERATIONS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(generation) = generations.get(&name).and_then(Weak::upgrade) {
            return generation;
        }
        generations.retain(|_, generation| generation.strong_count() > 0);
        let generation = Arc::default();
        generations.insert(name, Arc::downgrade(&generation));
        generation
    }
}

/// The schema as it was when a connection was made.
pub(super) struct Seen {
    generation: Arc<Generation>,
    number: usize,
}

impl Seen {
    /// The present one. What is asked of the database after this is at least as new.
    pub(super) fn now(generation: Arc<Generation>) -> Self {
        let number = generation.0.load(Ordering::Acquire);
        Self { generation, number }
    }

    #[inline]
    pub(super) fn is_current(&self) -> bool {
        self.number == self.generation.0.load(Ordering::Acquire)
    }

    /// The schema is, or is about to be, another: for every connection but this one where it has seen nothing yet.
    pub(super) fn change(&mut self, has_seen_nothing: bool) {
        let number = self.generation.0.fetch_add(1, Ordering::AcqRel);
        if has_seen_nothing && self.number == number {
            self.number = number + 1;
        }
    }
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Seen").field(&self.number).finish()
    }
}
