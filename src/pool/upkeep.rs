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

/// The pause between two checks if the age of connections has no limit. The check then only drops the pool when it has
/// no connection.
const CHECK_PAUSE_WITHOUT_LIMIT: Duration = Duration::from_secs(60);

/// The shortest pause between two checks of a pool, however short the configured times are.
const MIN_CHECK_PAUSE: Duration = Duration::from_millis(20);

impl<C: SessionConnection> Connections<C> {
    /// Schedules checks of the connections' age for as long as a connection is open. Called at each checkin.
    pub(super) fn schedule_age_check(&self) {
        let config = &self.options.config;
        if self.age_check_scheduled.load(Ordering::Relaxed) {
            return;
        }
        self.schedule_age_check_after(
            self.max_check_pause().into_iter().chain(config.max_lifetime).min().unwrap_or(CHECK_PAUSE_WITHOUT_LIMIT),
        );
    }

    fn max_check_pause(&self) -> Option<Duration> {
        self.options.config.idle_timeout.map(|timeout| timeout / CHECKS_PER_IDLE_TIMEOUT)
    }

    fn schedule_age_check_after(&self, pause: Duration) {
        if self.age_check_scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let pool = self.pool.clone();
        self.run_after(pause.max(MIN_CHECK_PAUSE), move || {
            let Some(pool) = pool.upgrade() else { return };
            pool.check_age();
            if pool.storage.open() == 0 {
                let drop_if_empty = pool.storage.drop_if_empty(pool.number);
                drop(pool);
                drop_if_empty();
            }
        });
    }

    /// Schedules checks for overdue holders for as long as a connection is open. Called at each checkout.
    pub(super) fn schedule_leak_check(&self) {
        let Some(threshold) = self.options.config.leak_threshold else { return };
        if !self.leak_check_scheduled.load(Ordering::Relaxed) && !self.leak_check_scheduled.swap(true, Ordering::AcqRel)
        {
            self.schedule_leak_check_after(threshold);
        }
    }

    fn schedule_leak_check_after(&self, pause: Duration) {
        let pool = self.pool.clone();
        self.run_after(pause.max(MIN_CHECK_PAUSE), move || {
            if let Some(pool) = pool.upgrade() {
                pool.check_leaks();
            }
        });
    }
}

impl<C: SessionConnection> AppPool<C> {
    fn check_age(self: &Arc<Self>) {
        let storage = &self.storage;
        storage.age_check_scheduled.store(false, Ordering::Release);
        if self.is_closed() {
            return;
        }
        let next = self.close_aged();
        if storage.open() > 0 {
            match next {
                Some(next) => {
                    let pause = next.saturating_duration_since(Instant::now());
                    storage.schedule_age_check_after(
                        storage.max_check_pause().map_or(pause, |longest| pause.min(longest)),
                    );
                }
                None => storage.schedule_age_check(),
            }
        }
    }

    fn check_leaks(&self) {
        let storage = &self.storage;
        let Some(threshold) = storage.options.config.leak_threshold else { return };
        let (overdue, pause) = self.overdue(Instant::now(), threshold);
        overdue.iter().for_each(Holder::log_overdue);
        storage.leak_check_scheduled.store(false, Ordering::Release);
        if storage.open() > 0 && !storage.leak_check_scheduled.swap(true, Ordering::AcqRel) {
            storage.schedule_leak_check_after(pause);
        }
    }
}

impl Holder {
    fn log_overdue(&self) {
        let line = phrase(format_args!(
            "a connection is held for longer than `Config::leak_threshold`, and may have been forgotten: {self}"
        ));
        crate::wording::log_line!(warn, "diesel_session::leak", "{line}");
    }

    /// Called only for holders that were logged as overdue.
    pub(super) fn log_return(&self) {
        let line = phrase(format_args!("a connection that was held for too long has come back: {}", self.snapshot()));
        crate::wording::log_line!(info, "diesel_session::leak", "{line}");
    }
}
