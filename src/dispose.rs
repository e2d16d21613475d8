//! Disposal of an application: closes its connections and reports the result.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Details, DisposeReport, Result};
use crate::pool::{AppPool, end_idle_threads};

/// The time for which [`App::dispose`] waits for connections in use.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// The time for which a disposal waits for the end of unused threads, in addition to its patience.
const THREAD_END_WAIT: Duration = Duration::from_millis(100);

/// A disposal that has closed the idle connections.
struct Disposal<C: SessionConnection> {
    disposed: Vec<Arc<AppPool<C>>>,
    /// The number of connections that the pools had closed before.
    closed_before: usize,
    started: Instant,
}

impl<C: SessionConnection> App<C> {
    /// Closes the application's connections and waits up to 5 s for connections in use. Callers that wait for a
    /// connection get [`ErrorKind::Disposed`](crate::ErrorKind::Disposed).
    ///
    /// If the method returns `Ok`, the application has no connection left, except for those that the calling thread
    /// itself holds. The log warns of these, [`dispose_report`](Self::dispose_report) lists them, and each of them is
    /// closed when it is checked in. The application stays
    /// registered and opens a new pool at its next use. The method may be called any number of times and from several
    /// threads.
    ///
    /// Before a `fork`, dispose of all applications ([`Database::dispose_all`](crate::Database::dispose_all)). The
    /// parent and the child then both open new connections when they need them. In a process that was forked without a
    /// disposal, this method closes nothing, because the open connections belong to the parent, and every use of the
    /// application is [`ErrorKind::Forked`](crate::ErrorKind::Forked).
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose(&self) -> Result<()> {
        self.dispose_report().map(drop)
    }

    /// [`dispose`](Self::dispose) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose_within(&self, timeout: Duration) -> Result<()> {
        self.dispose_report_within(timeout).map(drop)
    }

    /// [`dispose`](Self::dispose), with a report of the connections that it closed.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose_report(&self) -> Result<DisposeReport> {
        self.dispose_report_within(TIMEOUT)
    }

    /// [`dispose_report`](Self::dispose_report) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose_report_within(&self, timeout: Duration) -> Result<DisposeReport> {
        let deadline = deadline(timeout);
        self.drain(self.close(deadline), deadline)
    }

    /// Closes the idle connections without waiting.
    fn close(&self, deadline: Instant) -> Disposal<C> {
        let started = Instant::now();
        let disposed = self.core().retire();
        let closed_before = disposed.iter().map(|pool| pool.closings()).sum();
        for pool in &disposed {
            pool.close(deadline);
        }
        Disposal { disposed, closed_before, started }
    }

    /// Waits for the connections in use.
    fn drain(&self, disposal: Disposal<C>, deadline: Instant) -> Result<DisposeReport> {
        let Disposal { disposed, closed_before, started } = disposal;
        let mut report = DisposeReport { apps: vec![self.id().into()], ..DisposeReport::default() };
        let mut overdue = false;
        let mut drained_pools = Vec::new();
        for pool in &disposed {
            let drained = pool.wait_until_drained(deadline);
            // After the drain, only the closing of the pool still takes connections, also in other threads, and it
            // finds none.
            let (out, connecting) = match drained {
                true => (pool.holders().on_this_thread(), 0),
                false => (pool.holders(), pool.counts().1),
            };
            if drained && out.is_empty() {
                pool.drop_memory_database();
                drained_pools.push(Arc::downgrade(pool));
            }
            overdue |= !drained;
            report.still_out.0.extend(out.0);
            report.connecting += connecting;
        }
        report.closed = disposed.iter().map(|pool| pool.closings()).sum::<usize>() - closed_before;
        report.waited = started.elapsed();
        self.core().remove_drained(&drained_pools);
        drop(disposed);
        // If an owner keeps the connection, it stays open, so a fork is not safe in any case.
        if self.options().owner.is_none() {
            end_idle_threads(THREAD_END_WAIT, || drained_pools.iter().any(|pool| pool.strong_count() > 0));
        }
        let level = match report.closed {
            // This includes connections that the calling thread holds.
            _ if overdue || !report.is_complete() => log::Level::Warn,
            0 => log::Level::Debug,
            _ => log::Level::Info,
        };
        let line = crate::wording::phrase(format_args!("disposed of {report}"));
        crate::wording::log_safely(|| log::log!(target: "diesel_session::pool", level, "{line}"));
        if overdue { Err(Details::StillInUse(report).into()) } else { Ok(report) }
    }
}

/// The end of a disposal. A timeout beyond the range of the clock is a day.
fn deadline(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(24 * 3600))
}

/// Disposes of several applications, to the end even where one fails.
pub(crate) fn dispose_each<C: SessionConnection>(apps: Vec<App<C>>, timeout: Duration) -> Result<DisposeReport> {
    let mut whole = DisposeReport::default();
    let mut complete = true;
    let deadline = deadline(timeout);
    // One application's connection that is out delays the closing of no other.
    let disposals: Vec<_> = apps.into_iter().map(|app| (app.close(deadline), app)).collect();
    for (disposal, app) in disposals {
        match app.drain(disposal, deadline) {
            Ok(report) => whole.add(report),
            Err(error) => match error.into_details() {
                Details::StillInUse(report) => {
                    complete = false;
                    whole.add(report);
                }
                other => return Err(other.into()),
            },
        }
    }
    if complete { Ok(whole) } else { Err(Details::StillInUse(whole).into()) }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use std::cell::RefCell;

    use diesel::prelude::*;

    use crate::{Config, Database};

    /// Keeps the log lines of each thread.
    struct Log;

    thread_local! {
        static LINES: RefCell<Vec<(log::Level, String)>> = const { RefCell::new(Vec::new()) };
    }

    impl log::Log for Log {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }

        fn log(&self, record: &log::Record<'_>) {
            // A thread that is ending keeps no log lines.
            let _ = LINES.try_with(|lines| lines.borrow_mut().push((record.level(), record.args().to_string())));
        }

        fn flush(&self) {}
    }

    static DB: Database<SqliteConnection> = Database::without_migrations();

    #[test]
    fn disposal_warns_of_connections_of_the_calling_thread() {
        log::set_logger(&Log).expect("no other unit test logs");
        log::set_max_level(log::LevelFilter::Trace);
        let level = || {
            let lines = LINES.with(RefCell::take);
            let levels = lines.into_iter().filter(|(_, line)| line.starts_with("disposed of"));
            levels.map(|(level, _)| level).collect::<Vec<_>>()
        };
        let app = DB.init_app("disposed", Config::new(":memory:")).expect("a new name");
        app.dispose().expect("nothing is open");
        assert_eq!(level(), [log::Level::Debug]);
        app.context(|| {
            DB.session()?.begin()?;
            assert_eq!(app.dispose_report()?.still_out.len(), 1);
            assert_eq!(level(), [log::Level::Warn]);
            DB.session()?.rollback()
        })
        .expect("the session goes on until it ends");
        app.ping().expect("a fresh pool");
        app.dispose().expect("nothing is in use");
        assert_eq!(level(), [log::Level::Info]);
    }
}
