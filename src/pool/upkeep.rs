//! What a pool does by itself while something is open: it closes connections that are too old, and logs those that are held for too long.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::AppPool;
use super::connections::Connections;
use super::storage::Storage;
use crate::connection::SessionConnection;
use crate::error::Holder;
use crate::wording::phrase;

/// How often the idle connections are looked at within `idle_timeout`. A checkin reads no clock: a connection counts as idle from the first
/// look that finds it, so it is closed up to this part of `idle_timeout` later.
const LOOKS: u32 = 4;

/// The pause between two looks if connections stay open without a limit: the pool is let go of once it has none.
const UNLIMITED: Duration = Duration::from_secs(60);

/// The shortest pause between two looks at the connections of a pool, however short the configured times are.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

impl<C: SessionConnection> Connections<C> {
    /// From here on the pool is looked after, as long as something is open. It is called at each checkin.
    pub(super) fn age(&self) {
        let config = &self.options.config;
        if self.ageing.load(Ordering::Relaxed) {
            return;
        }
        self.age_after(self.longest_pause().into_iter().chain(config.max_lifetime).min().unwrap_or(UNLIMITED));
    }

    fn longest_pause(&self) -> Option<Duration> {
        self.options.config.idle_timeout.map(|timeout| timeout / LOOKS)
    }

    fn age_after(&self, pause: Duration) {
        if self.ageing.swap(true, Ordering::AcqRel) {
            return;
        }
        let pool = self.pool.clone();
        self.run_after(pause.max(SHORTEST_PAUSE), move || {
            let Some(pool) = pool.upgrade() else { return };
            pool.look_after_age();
            if pool.storage.open() == 0 {
                let let_go = pool.storage.let_go(pool.number);
                drop(pool);
                let_go();
            }
        });
    }

    /// From here until nothing is open any more, holders are watched. It is called at each checkout.
    pub(super) fn watch(&self) {
        let Some(threshold) = self.options.config.leak_threshold else { return };
        if !self.watching.load(Ordering::Relaxed) && !self.watching.swap(true, Ordering::AcqRel) {
            self.watch_after(threshold);
        }
    }

    fn watch_after(&self, pause: Duration) {
        let pool = self.pool.clone();
        self.run_after(pause.max(SHORTEST_PAUSE), move || {
            if let Some(pool) = pool.upgrade() {
                pool.look_for_leaks();
            }
        });
    }
}

impl<C: SessionConnection> AppPool<C> {
    fn look_after_age(self: &Arc<Self>) {
        let storage = &self.storage;
        storage.ageing.store(false, Ordering::Release);
        if self.is_closed() {
            return;
        }
        let next = self.close_aged();
        if storage.open() > 0 {
            match next {
                Some(next) => {
                    let pause = next.saturating_duration_since(Instant::now());
                    storage.age_after(storage.longest_pause().map_or(pause, |longest| pause.min(longest)));
                }
                None => storage.age(),
            }
        }
    }

    fn look_for_leaks(&self) {
        let storage = &self.storage;
        let Some(threshold) = storage.options.config.leak_threshold else { return };
        let (overdue, pause) = self.overdue(Instant::now(), threshold);
        overdue.iter().for_each(Holder::is_overdue);
        storage.watching.store(false, Ordering::Release);
        if storage.open() > 0 && !storage.watching.swap(true, Ordering::AcqRel) {
            storage.watch_after(pause);
        }
    }
}

impl Holder {
    fn is_overdue(&self) {
        let told = phrase(format_args!(
            "a connection is held for longer than `Config::leak_threshold`, and may have been forgotten: {self}"
        ));
        crate::wording::log_line!(warn, "diesel_session::leak", "{told}");
    }

    /// It is logged of those holders only that were overdue.
    pub(super) fn is_back(&self) {
        let told = phrase(format_args!("a connection that was held for too long has come back: {}", self.listed()));
        crate::wording::log_line!(info, "diesel_session::leak", "{told}");
    }
}
