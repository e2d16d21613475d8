//! The limit of a database object.

use std::sync::Arc;

use super::budget::Budget;
use crate::process::PerProcess;

/// The limit of a database object, which holds for each process by itself.
#[derive(Debug)]
pub(crate) struct Limit {
    connections: usize,
    budget: PerProcess<Arc<Budget>>,
}

impl Limit {
    pub(crate) fn new(connections: usize) -> Self {
        Self { connections, budget: PerProcess::new() }
    }

    pub(super) fn budget(&self) -> Arc<Budget> {
        Arc::clone(self.budget.get_or_init(|| Arc::new(Budget::new(Some(self.connections), super::waits()))))
    }
}
