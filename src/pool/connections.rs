//! The [`Storage`] of an application's pool: r2d2's pool, and the code that opens and closes its connections.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::call_deadline::{CallDeadline, GRACE};
use super::connection_limit::LimitPermit;
use super::managed::Managed;
use super::manager::{ConnectFailure, Connector, Manager, with_jitter};
use super::options::PoolOptions;
use super::schema_version::SchemaVersion;
use super::server::Server;
use super::socket::ServerClose;
use super::storage::{Remedy, Storage};
use super::thread::PoolThread;
use super::writer_queue::{self, WriterQueue};
use super::{AppPool, PoolOwner};
use crate::config::Reset;
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::kind::DatabaseKind;
use crate::panic::catch_panic;
use crate::process::Process;
use crate::sync::Mutex;

/// The pause before another attempt after a failed connect: it starts with the first value, doubles with each failure,
/// and is at most the second value.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(150));

/// The time to wait until the server has ended the session of a closed connection. A running server needs a few
/// milliseconds.
const SERVER_CLOSE_TIMEOUT: Duration = Duration::from_millis(100);

/// The connections of one application.
pub(crate) struct Connections<C: SessionConnection> {
    pub(super) r2d2: r2d2::Pool<Manager<C>>,
    pub(super) options: Arc<PoolOptions<C>>,
    pub(super) server: Arc<Server>,
    pub(super) owner: Weak<dyn PoolOwner>,
    pub(super) pool: Weak<AppPool<C>>,
    /// The process that created the connections. No other process may use them.
    process: Process,
    pub(super) connector: Arc<Connector<C>>,
    /// The queue of writers, if the database allows one writer at a time.
    pub(super) writers: Option<Arc<WriterQueue>>,
    pub(super) closings: AtomicUsize,
    /// Whether a check of the age of the connections and of the holders is scheduled.
    pub(super) check_scheduled: AtomicBool,
    // Dropped after `r2d2`, which uses the thread.
    thread: PoolThread,
}

impl<C: SessionConnection> Connections<C> {
    /// Opens no connection yet.
    pub(super) fn new(
        options: Arc<PoolOptions<C>>,
        owner: Weak<dyn PoolOwner>,
        pool: &Weak<AppPool<C>>,
        server: Arc<Server>,
        thread: PoolThread,
    ) -> Self {
        let (target, config) = (&options.target, &options.config);
        let url = match target.in_memory {
            true => target.shared_memory().map_or_else(crate::dialect::memory_url, str::to_owned),
            false => target.kind.dialect().driver_url(target, config, &options.app),
        };
        let connector = Arc::new(Connector {
            options: Arc::clone(&options),
            server: Arc::clone(&server),
            url,
            anchor: Mutex::default(),
            permits: Mutex::default(),
            sessions: Mutex::default(),
            connects_running: Arc::clone(&thread.connects_running),
            version: SchemaVersion::of(target),
        });
        let r2d2 = r2d2::Pool::builder()
            .max_size(config.max_size)
            .min_idle(Some(0))
            .test_on_check_out(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .error_handler(Box::new(r2d2::NopErrorHandler))
            .thread_pool(Arc::clone(&thread.scheduler))
            .build_unchecked(Manager(Arc::clone(&connector)));
        let writers = target.kind.has_one_writer().then(|| writer_queue::of(target));
        Self {
            r2d2,
            server,
            owner,
            pool: Weak::clone(pool),
            process: Process::this(),
            connector,
            writers,
            closings: AtomicUsize::new(0),
            check_scheduled: AtomicBool::new(false),
            thread,
            options,
        }
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.options.target.kind.known()
    }

    /// The deadline of a driver call at a checkin.
    pub(super) fn call_deadline(&self, deadline: Option<Instant>) -> Instant {
        let now = Instant::now();
        let end = now + self.options.config.connect_timeout;
        deadline.map_or(end, |deadline| end.min(deadline.max(now) + GRACE))
    }

    /// Whether a deadline can end a driver call. This needs the socket, which may be unknown.
    pub(super) fn can_be_cut(&self, managed: &Managed<C>) -> bool {
        !self.kind().can_go_stale() || managed.socket.is_some()
    }

    /// Runs a driver call that is cut at `end`. Returns `None` if it was cut.
    pub(super) fn call<T>(
        &self,
        managed: &mut Managed<C>,
        end: Instant,
        what: &str,
        call: impl FnOnce(&mut Managed<C>) -> T,
    ) -> Option<T> {
        let call_deadline = managed.socket.map(|socket| CallDeadline::begin(socket, end));
        let answer = call(managed);
        if call_deadline.is_none_or(|call_deadline| !call_deadline.was_cut()) {
            return Some(answer);
        }
        managed.closes_at_checkin = true;
        let (app, server) = (&self.options.app, &self.options.target.shown);
        log_pool!(warn, "app `{app}`: a connection to {server} {what}; it is closed");
        None
    }
}

/// The managed connection of a checkout. Admission never checks out a failed connect.
#[inline]
pub(super) fn managed<C: SessionConnection>(pooled: &mut r2d2::PooledConnection<Manager<C>>) -> &mut Managed<C> {
    match &mut **pooled {
        Ok(managed) => managed,
        Err(_) => unreachable!("a failed connect was checked out"),
    }
}

impl<C: SessionConnection> Storage for Connections<C> {
    type Conn = Box<r2d2::PooledConnection<Manager<C>>>;
    type Failure = Box<ConnectFailure>;
    type Closing = Closing;

    fn try_get(&self) -> Option<Self::Conn> {
        let mut pooled = Box::new(self.r2d2.try_get()?);
        if let Ok(managed) = &mut **pooled {
            managed.kept_by_r2d2 = false;
        }
        Some(pooled)
    }

    fn put(&self, mut conn: Self::Conn) {
        managed(&mut conn).kept_by_r2d2 = true;
    }

    fn idle(&self) -> usize {
        self.r2d2.state().idle_connections as usize
    }

    fn open(&self) -> usize {
        self.r2d2.state().connections as usize
    }

    fn connect(&self, permits: Vec<LimitPermit>, connected: impl FnOnce() + Send + 'static) {
        self.schedule_checks();
        self.connector.permits.lock().push_back(permits);
        // No connection is idle, so r2d2 starts a connect. The timeout of zero keeps this thread from waiting for it.
        if let Ok(mut outcome) = self.r2d2.get_timeout(Duration::ZERO)
            && let Ok(managed) = &mut *outcome
        {
            // The connect has finished before the call returned.
            managed.kept_by_r2d2 = true;
        }
        // This job is due after r2d2's connect on the same thread, so r2d2 has the outcome before it runs.
        self.thread.scheduler.execute_after(Duration::from_nanos(1), connected);
    }

    fn run_after(&self, pause: Duration, job: impl FnOnce() + Send + 'static) {
        self.thread.scheduler.execute_after(pause, job);
    }

    fn run_closing(&self, job: impl FnOnce() + Send + 'static) {
        if self.kind().can_go_stale() {
            self.thread.scheduler.execute(job);
        } else {
            job();
        }
    }

    fn failure(conn: &Self::Conn) -> Option<Box<ConnectFailure>> {
        conn.as_ref().as_ref().err().cloned()
    }

    fn remedy(&self, failure: &Box<ConnectFailure>, failures: u32) -> Remedy {
        let pause = with_jitter((RETRY_PAUSES.0 * 2_u32.saturating_pow(failures.min(8))).min(RETRY_PAUSES.1));
        match failure.kind {
            ConnectErrorKind::ServerFull => Remedy::Evict(pause),
            // Another process has locked a file, or the server does not accept connections or writes yet.
            ConnectErrorKind::Starting | ConnectErrorKind::NotPrimary => Remedy::Retry(pause),
            ConnectErrorKind::Unreachable if failure.was_reached && self.kind().can_go_stale() => Remedy::Retry(pause),
            _ => Remedy::Fail,
        }
    }

    fn evict_another(&self, pool: u64) {
        if let Some(other) = self.server.least_recently_used(pool) {
            other.evict();
        }
    }

    fn evict_above_threshold(&self, pool: u64) {
        if self.server.limit.taken() >= self.kind().eviction_threshold(self.server.capacity.load(Ordering::Relaxed))
            && let Some((_, other)) = self.server.limit.least_recently_used(pool)
        {
            self.run_closing(move || {
                other.evict();
            });
        }
    }

    fn drop_if_empty(&self, pool: u64) -> impl FnOnce() + 'static {
        let owner = self.owner.upgrade();
        move || {
            if let Some(owner) = owner {
                owner.drop_if_empty(pool);
            }
        }
    }

    fn sessions(&self) -> Vec<u64> {
        self.connector.sessions.lock().clone()
    }

    fn session(conn: &Self::Conn) -> Option<u64> {
        conn.as_ref().as_ref().ok()?.session
    }

    fn is_inherited(&self) -> bool {
        !self.process.is_this()
    }

    /// An owner keeps the connection open, so eviction would not free a session on the server.
    fn is_evictable(&self) -> bool {
        self.options.owner.is_none()
    }

    fn query(&self, conn: &mut Self::Conn, sql: &str, timeout: Duration) -> Option<Vec<String>> {
        let managed = managed(conn);
        if !self.can_be_cut(managed) {
            return None;
        }
        let end = Instant::now() + timeout;
        let answer = self.call(managed, end, "did not answer in time", |managed| managed.conn_mut().texts(sql));
        managed.observer.take();
        Some(answer?.ok()?.into_iter().flatten().collect())
    }

    fn may_stay(&self, conn: &mut Self::Conn, now: Instant) -> (bool, Option<Instant>) {
        managed(conn).may_stay(now, self.options.config.idle_timeout)
    }

    fn reset(&self, conn: &mut Self::Conn, deadline: Option<Instant>) -> bool {
        let managed = managed(conn);
        (managed.was_used, managed.unused) = (true, false);
        if managed.lost {
            self.server.suspect();
        }
        if managed.closes_at_checkin
            || managed.retired
            || !managed.schema.is_current()
            || managed.conn_mut().is_broken()
        {
            return false;
        }
        if self.options.shares_sessions() {
            // The session of the server that the holder has used may belong to another client already.
            managed.forget_leftovers();
        }
        let due = match self.options.config.reset {
            Reset::WhenDirty => managed.may_have_leftovers(),
            Reset::Always => !self.options.shares_sessions(),
            Reset::Never => false,
        };
        let is_ready = || self.reset_and_run_on_checkin(managed, due, deadline);
        !due && self.options.on_checkin.is_none() || catch_panic("the reset of a connection", is_ready).unwrap_or(false)
    }

    fn close(&self, mut conn: Self::Conn, deadline: Option<Instant>, waits_for_server: bool) -> Closing {
        let managed = managed(&mut conn);
        let permits = std::mem::take(&mut managed.permits);
        let socket = managed.closing_socket();
        let end = self.call_deadline(deadline);
        let waits_for_server = waits_for_server || permits.iter().any(LimitPermit::is_contended);
        let server_close = socket.filter(|_| waits_for_server).and_then(|socket| socket.server_close());
        let call_deadline = socket.map(|socket| CallDeadline::begin(socket, end));
        catch_panic("the end of a connection", || drop(conn));
        drop(call_deadline);
        self.closings.fetch_add(1, Ordering::AcqRel);
        log_pool!(debug, "app `{}` has closed a connection", self.options.app);
        Closing { server_close, end: end.min(Instant::now() + SERVER_CLOSE_TIMEOUT), _permits: permits }
    }
}

/// A closed connection whose session may still exist on the server, with the permits that are released after the wait
/// for the end of the session.
pub(crate) struct Closing {
    server_close: Option<ServerClose>,
    end: Instant,
    _permits: Vec<LimitPermit>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(server_close) = &self.server_close {
            server_close.wait(self.end);
        }
    }
}
