//! A driver call on a helper thread, so that whoever asked for it can leave at a deadline of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::gate::Permit;
use super::lease::{discard, live};
use super::manager::Live;
use super::server::is_helper;
use super::watchdog::GRACE;
use super::{Pool, Stored};
use crate::connection::SessionConnection;

impl<C: SessionConnection> Pool<C> {
    /// Makes `call` with the connection, and closes the connection unless the call says that it is sound. `None` where that has
    /// not ended within `patience`: then the connection is closed, and its permit free, when it has.
    pub(super) fn errand(
        &self,
        mut permit: Permit<Stored<C>>,
        patience: Duration,
        what: &str,
        call: impl FnOnce(&mut Live<C>) -> bool + Send + 'static,
    ) -> Option<Permit<Stored<C>>> {
        if is_helper() {
            let sound = catch_unwind(AssertUnwindSafe(|| call(live(&mut permit))));
            if !matches!(sound, Ok(true)) {
                discard(&mut permit);
            }
            return Some(permit);
        }
        let (server, control) = (Arc::clone(&self.server), Arc::clone(&self.control));
        // Without a buffer: what is sent has been received.
        let (answer, answered) = mpsc::sync_channel(0);
        // From here on it is not the caller who holds it, and who would wait for itself.
        permit.lend();
        self.server.help(move || {
            let running = server.call();
            let sound = catch_unwind(AssertUnwindSafe(|| call(live(&mut permit))));
            if !matches!(sound, Ok(true)) {
                discard(&mut permit);
            }
            drop(running);
            if let Err(mpsc::SendError(mut late)) = answer.send(permit) {
                discard(&mut late);
                drop(late);
                control.suspect.fetch_sub(1, Ordering::AcqRel);
            }
        });
        if let Ok(permit) = answered.recv_timeout(patience) {
            permit.adopt();
            return Some(permit);
        }
        self.control.suspect.fetch_add(1, Ordering::AcqRel);
        // From here on the helper thread is not kept waiting: the program's log may take its time.
        drop(answered);
        crate::wording::log_line!(
            warn,
            "diesel_session::pool",
            "app `{}`: a connection to {} {what} within {patience:?}; it is closed when it answers",
            self.spec.app,
            self.spec.target.shown
        );
        None
    }

    /// Closes the connection and waits for nothing: on a helper thread, where closing may hang.
    pub(super) fn close_soon(self: Arc<Self>, mut permit: Permit<Stored<C>>) {
        let server = Arc::clone(&self.server);
        let may_hang = self.spec.target.kind.can_go_stale();
        permit.lend();
        let close = move || {
            let running = self.server.call();
            discard(&mut permit);
            drop((running, permit));
            self.leave_if_empty();
            let (number, home) = (self.number, self.home.upgrade());
            // Whoever keeps an empty pool lets go of it, if nobody else has it.
            drop(self);
            if let Some(home) = home {
                home.let_go(number);
            }
        };
        if may_hang { server.help(close) } else { close() }
    }

    /// Closes the connection, waiting no longer than for a connect, nor beyond the end of a scope's time.
    pub(super) fn dismiss(&self, permit: Permit<Stored<C>>, until: Option<Instant>) {
        self.dismiss_within(permit, self.patience(until));
    }

    /// How long a checkin waits for a helper thread.
    pub(super) fn patience(&self, until: Option<Instant>) -> Duration {
        let most = self.spec.config.connect_timeout;
        until.map_or(most, |until| most.min(until.saturating_duration_since(Instant::now()) + GRACE))
    }

    /// Closes the connection, waiting no longer than `patience`.
    pub(super) fn dismiss_within(&self, mut permit: Permit<Stored<C>>, patience: Duration) {
        if self.spec.target.kind.can_go_stale() {
            drop(self.errand(permit, patience, "could not be closed", |_| false));
        } else {
            discard(&mut permit);
            drop(permit);
        }
        self.leave_if_empty();
    }
}
