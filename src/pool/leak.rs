//! Connections that are held for too long: told once, and once more when they come back.
//!
//! Nothing of it is on the way of a loan. As long as a pool has something open, one look at its gate is scheduled for the moment
//! at which a connection can be overdue, and the gate tells at a return whether it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Pool;
use super::gate::Gate;
use super::ledger::Holder;
use super::manager::Control;
use super::server::{Server, begins_to_help};
use super::upkeep::SHORTEST_PAUSE;
use crate::connection::SessionConnection;
use crate::wording::phrase;

impl<C: SessionConnection> Pool<C> {
    /// From here until nothing is open any more, holders are watched. Called after a connection was opened.
    pub(super) fn watch(&self) {
        let Some(threshold) = self.spec.config.leak_threshold else { return };
        if !self.control.watching.swap(true, Ordering::AcqRel) {
            look_after(threshold, threshold, &self.gate, &self.control, &self.server);
        }
    }
}

/// Looks after that pause, and again when there can be more to see. It keeps nothing of the pool alive.
fn look_after<T: Send + 'static>(
    pause: Duration,
    threshold: Duration,
    gate: &Arc<Gate<T>>,
    control: &Arc<Control>,
    server: &Arc<Server>,
) {
    let pool = (Arc::downgrade(gate), Arc::downgrade(control), Arc::downgrade(server));
    server.threads().execute_after(pause.max(SHORTEST_PAUSE), move || {
        begins_to_help();
        let (gate, control, server) = (pool.0.upgrade(), pool.1.upgrade(), pool.2.upgrade());
        let (Some(gate), Some(control), Some(server)) = (gate, control, server) else { return };
        let (overdue, pause) = gate.overdue(Instant::now(), threshold);
        overdue.iter().for_each(Holder::is_overdue);
        // Whoever opens a connection counts it before asking whether there is a watch, so one of us sees the other.
        control.watching.swap(false, Ordering::AcqRel);
        let has_open = control.open.load(Ordering::Acquire) > 0 || control.connecting.load(Ordering::Acquire) > 0;
        if has_open && !control.watching.swap(true, Ordering::AcqRel) {
            look_after(pause, threshold, &gate, &control, &server);
        }
    });
}

impl Holder {
    fn is_overdue(&self) {
        let told = phrase(format_args!(
            "a connection is held for longer than `Config::leak_threshold`, and may have been forgotten: {self}"
        ));
        crate::wording::log_line!(warn, "diesel_session::leak", "{told}");
    }

    /// Told of those only that were overdue.
    pub(super) fn is_back(&self) {
        let told = phrase(format_args!("a connection that was held for too long has come back: {self}"));
        crate::wording::log_line!(info, "diesel_session::leak", "{told}");
    }
}
