//! What a pool does by itself, as long as something is open: it closes what is too old.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Pool;
use super::lease::discard;
use super::manager::Slot;
use super::server::begins_to_help;
use crate::connection::SessionConnection;

/// The shortest pause between two looks at the connections of a pool, however short the configured times are.
pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

impl<C: SessionConnection> Pool<C> {
    /// Closes what has been idle, or has lived, for too long, and comes again when the next is due.
    pub(super) fn age(self: &Arc<Self>) {
        let Some(idle_timeout) = self.spec.config.idle_timeout else { return };
        let ageing = || self.ageing.load(Ordering::Acquire) || self.ageing.swap(true, Ordering::AcqRel);
        if self.control.closed.load(Ordering::Acquire) || ageing() {
            return;
        }
        let pool = Arc::downgrade(self);
        self.server.threads().execute_after(idle_timeout.max(SHORTEST_PAUSE), move || {
            begins_to_help();
            let Some(pool) = pool.upgrade() else { return };
            pool.ageing.store(false, Ordering::Release);
            pool.close_aged(idle_timeout);
            let control = &pool.control;
            if control.connecting.load(Ordering::Acquire) > 0 || control.open.load(Ordering::Acquire) > 0 {
                pool.age();
            }
        });
    }

    /// What was left last is lent first, so all are taken out before any is put back, each under a permit of its own.
    fn close_aged(&self, idle_timeout: Duration) {
        let mut kept = Vec::new();
        let now = Instant::now();
        while let Some(mut permit) = self.gate.try_acquire(self.housekeeper()) {
            permit.refill();
            let Some(stored) = &mut permit.item else { break };
            let stays = match &mut ***stored {
                Slot::Live(live) => live.stays_idle(now, idle_timeout),
                Slot::Empty => false,
            };
            if stays {
                kept.push(permit);
            } else {
                discard(&mut permit);
            }
        }
        // The one left longest ago goes back first.
        while let Some(permit) = kept.pop() {
            drop(permit);
        }
        self.leave_if_empty();
        self.serve_others();
    }
}
