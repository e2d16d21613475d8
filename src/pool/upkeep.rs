//! Scheduled work of a pool that has open connections: it closes old connections, and logs connections that are held
//! for too long.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::AppPool;
use super::connections::Connections;
use super::storage::Storage;
use crate::connection::SessionConnection;
use crate::error::Holder;
use crate::wording::phrase;

/// The number of checks of the idle connections within `idle_timeout`. A checkin does not read the clock. A connection
/// counts as idle from the first check that finds it, so it is closed up to this fraction of `idle_timeout` late.
const CHECKS_PER_IDLE_TIMEOUT: u32 = 4;

/// The pause between two checks if nothing has a limit. A check then only drops the pool when it has no connection.
const CHECK_PAUSE_WITHOUT_LIMIT: Duration = Duration::from_secs(60);

/// The shortest pause between two checks of a pool, however short the configured times are.
const MIN_CHECK_PAUSE: Duration = Duration::from_millis(20);

impl<C: SessionConnection> Connections<C> {
    /// Schedules checks for as long as the pool has a connection. Called before each connect.
    pub(super) fn schedule_checks(&self) {
        self.schedule_check_after(self.max_check_pause());
    }

    fn max_check_pause(&self) -> Duration {
        let config = &self.options.config;
        let idle_timeout = config.idle_timeout.map(|timeout| timeout / CHECKS_PER_IDLE_TIMEOUT);
        let limits = [idle_timeout, config.max_lifetime, config.leak_threshold];
        limits.into_iter().flatten().min().unwrap_or(CHECK_PAUSE_WITHOUT_LIMIT)
    }

    fn schedule_check_after(&self, pause: Duration) {
        if self.check_scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let pool = self.pool.clone();
        self.run_after(pause.max(MIN_CHECK_PAUSE), move || {
            let Some(pool) = pool.upgrade() else { return };
            pool.storage.check_scheduled.store(false, Ordering::Release);
            let next_check = pool.check();
            // A connect that begins from here on schedules a check itself.
            if pool.is_empty() {
                let drop_if_empty = pool.storage.drop_if_empty(pool.number);
                drop(pool);
                drop_if_empty();
            } else {
                pool.storage.schedule_check_after(next_check);
            }
        });
    }
}

impl<C: SessionConnection> AppPool<C> {
    /// Closes old connections and reports overdue holders. Returns the time until the next check.
    fn check(self: &Arc<Self>) -> Duration {
        let next_age = if self.is_closed() { None } else { self.close_aged() };
        let until_age = next_age.map(|next| next.saturating_duration_since(Instant::now()));
        let until_overdue = self.storage.options.config.leak_threshold.map(|threshold| {
            let (overdue, pause) = self.overdue(Instant::now(), threshold);
            for holder in overdue {
                let line = phrase(format_args!(
                    "a connection is held for longer than `Config::leak_threshold`, and may have been forgotten: {holder}"
                ));
                crate::wording::log_line!(warn, "diesel_session::leak", "{line}");
            }
            pause
        });
        until_age.into_iter().chain(until_overdue).fold(self.storage.max_check_pause(), Duration::min)
    }
}

impl Holder {
    /// Called only for holders that were logged as overdue.
    pub(super) fn log_return(&self) {
        let line = phrase(format_args!("a connection that was held for too long has come back: {}", self.snapshot()));
        crate::wording::log_line!(info, "diesel_session::leak", "{line}");
    }
}
