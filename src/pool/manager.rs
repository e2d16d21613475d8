//! Opens connections for r2d2.
//!
//! A failed connect is a value for r2d2. Otherwise r2d2 would retry by itself, without a limit and with its own
//! pauses. The waiting caller receives the failure, and r2d2 drops the value.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diesel::result::ConnectionResult;

use super::call_deadline::CallDeadline;
use super::connection_limit::LimitPermit;
use super::managed::{Managed, ServerSessions};
use super::options::PoolOptions;
use super::pinned_connection::PinnedState;
use super::schema_version::{SchemaVersion, SeenVersion};
use super::server::Server;
use super::socket::{Socket, SocketSearch};
use super::statement_observer::{ObserverInstrumentation, SqlSource, StatementObserver};
use super::thread::begin_connect;
use crate::connection::SessionConnection;
use crate::error::{CONFIG_ON_CONNECT, ConnectErrorKind, DATABASE_ON_CONNECT, LOST};
use crate::kind::DatabaseKind;
use crate::panic::into_panic_message;
use crate::wording::phrase;

/// The value that r2d2 stores: a connection, or the failure of a connect. Both are boxed because they are moved often.
pub(crate) type ConnectOutcome<C> = Result<Box<Managed<C>>, Box<ConnectFailure>>;

/// The failure of a connect.
#[derive(Debug, Clone)]
pub(crate) struct ConnectFailure {
    pub(crate) kind: ConnectErrorKind,
    pub(crate) message: String,
    /// This process has reached the server before, so the server may come back.
    pub(super) was_reached: bool,
}

/// Opens the connections of one pool.
pub(crate) struct Manager<C: SessionConnection> {
    pub(super) options: Arc<PoolOptions<C>>,
    pub(super) server: Arc<Server>,
    /// The URL for the driver.
    pub(super) url: Arc<str>,
    /// Keeps a SQLite database in memory alive while the pool has no other connection to it.
    pub(super) anchor: Arc<Mutex<Option<C>>>,
    /// The permits for the connects that r2d2 has started or will start.
    pub(super) permits: Arc<Mutex<VecDeque<Vec<LimitPermit>>>>,
    pub(super) sessions: Arc<ServerSessions>,
    /// The number of connects that are running on the pool's thread.
    pub(super) connects_running: Arc<AtomicUsize>,
    /// The schema version by the name of the database, for servers that do not report their identity.
    pub(super) version: Arc<SchemaVersion>,
}

/// The server's facts about a new session.
struct SessionInfo {
    session: Option<u64>,
    version: Arc<SchemaVersion>,
    checks_client: bool,
}

impl<C: SessionConnection> fmt::Debug for Manager<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("app", &self.options.app).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> r2d2::ManageConnection for Manager<C> {
    type Connection = ConnectOutcome<C>;
    type Error = Infallible;

    /// Connects, sets the connection up and runs `on_connect`. A panic of the driver or of the program's functions
    /// becomes a failure.
    fn connect(&self) -> Result<ConnectOutcome<C>, Infallible> {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.connect_with_permits()));
        Ok(outcome.unwrap_or_else(|panic| {
            Err(Box::new(self.failure(&format!("connecting panicked: {}", into_panic_message(panic)))))
        }))
    }

    fn is_valid(&self, _: &mut ConnectOutcome<C>) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, outcome: &mut ConnectOutcome<C>) -> bool {
        !outcome.as_ref().is_ok_and(|managed| managed.kept_by_r2d2)
    }
}

impl<C: SessionConnection> Manager<C> {
    fn connect_with_permits(&self) -> ConnectOutcome<C> {
        let permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(_connect) = begin_connect(&self.connects_running) else {
            return Err(Box::new(self.failure("the program is ending")));
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| self.open()))
            .unwrap_or_else(|panic| Err(self.failure(&format!("connecting panicked: {}", into_panic_message(panic)))));
        let app = &self.options.app;
        match outcome {
            Ok(mut managed) => {
                self.server.report_reachable(&self.options.target.shown);
                managed.permits = permits.unwrap_or_default();
                crate::wording::log_line!(debug, "diesel_session::pool", "app `{app}` has opened a connection");
                Ok(Box::new(managed))
            }
            Err(failure) => {
                let failure = self.classify_with_server(failure);
                crate::wording::log_line!(
                    debug,
                    "diesel_session::pool",
                    "app `{app}` cannot connect: {}",
                    failure.message
                );
                Err(Box::new(failure))
            }
        }
    }

    fn open(&self) -> Result<Managed<C>, ConnectFailure> {
        let options = &self.options;
        let suspicion = self.server.suspicion();
        let pinned = options.pinned.as_ref();
        let establish = || self.establish_and_find().map_err(|error| self.failure(&error.to_string()));
        let (conn, socket) = match pinned.map(|pinned| pinned.check_out()) {
            None => establish()?,
            Some(PinnedState::Idle(conn)) => (conn, pinned.and_then(|pinned| pinned.socket())),
            Some(PinnedState::NotOpen) => {
                establish().inspect_err(|_| options.pinned.iter().for_each(|pinned| pinned.not_opened()))?
            }
            Some(PinnedState::CheckedOut) => {
                return Err(self.failure("another pool still has the one connection of this test"));
            }
        };
        if let Some(pinned) = pinned {
            pinned.set_socket(socket);
        }
        let observer = Arc::new(StatementObserver::new(options.target.kind, pinned.is_some()));
        let schema = SeenVersion::now(Arc::clone(&self.version));
        // From here on, the drop of `managed` checks in the connection of a test.
        let mut managed = Managed::new(conn, pinned.cloned(), Arc::clone(&observer), schema);
        managed.socket = socket;
        let end = Instant::now() + options.config.connect_timeout;
        let call_deadline = socket.filter(|_| pinned.is_none()).map(|socket| CallDeadline::begin(socket, end));
        if let Err(mut failure) = self.set_up(&mut managed, observer, suspicion) {
            // A test's one connection cannot be replaced, so another attempt would not help.
            let is_lost =
                pinned.is_none() && failure.kind == ConnectErrorKind::Other && managed.conn_mut().ping().is_err();
            if call_deadline.is_some_and(|call_deadline| call_deadline.was_cut()) {
                failure.message =
                    "setting the connection up took longer than `Config::connect_timeout`, so it was cut".into();
            }
            if is_lost {
                failure.kind = ConnectErrorKind::Unreachable;
            }
            return Err(failure);
        }
        Ok(managed)
    }

    /// Sets up a new connection for the pool and runs `on_connect`.
    fn set_up(
        &self,
        managed: &mut Managed<C>,
        observer: Arc<StatementObserver>,
        suspicion: usize,
    ) -> Result<(), ConnectFailure> {
        let options = &self.options;
        let pinned = options.pinned.as_ref();
        // An earlier pool has set up a test's connection, and some settings cannot be changed inside a transaction.
        let is_set_up = pinned.is_some_and(|pinned| pinned.has_begun());
        let no_log = options.target.in_memory || options.target.read_only;
        let conn = managed.conn_mut();
        for sql in options.target.kind.setup(&options.config, no_log).into_iter().filter(|_| !is_set_up) {
            conn.batch_execute(&sql)
                .or_else(|error| match options.target.kind.tolerates_refusal(&sql, &error.to_string()) {
                    true => Ok(()),
                    false => Err(error),
                })
                .map_err(|error| self.failure(&format!("setting the connection up failed: {error} (at `{sql}`)")))?;
        }
        let SessionInfo { session, version, checks_client } = match self.query_session_info(conn) {
            Some(info) => info,
            None => {
                if let Some(pinned) = pinned.filter(|_| is_set_up && conn.ping().is_err()) {
                    pinned.poison(LOST, None);
                    return Err(self.failure("the one connection of this test was lost"));
                }
                SessionInfo { session: None, version: Arc::clone(&self.version), checks_client: false }
            }
        };
        // Before the program's own statements, whose plans the driver may keep.
        let schema = SeenVersion::now(version);
        for sql in options.config.on_connect.iter().filter(|_| !is_set_up) {
            conn.batch_execute(sql)
                .map_err(|error| self.failure(&format!("{CONFIG_ON_CONNECT}: {error} (at `{sql}`)")))?;
        }
        if let Some(prepare) = options.on_connect.filter(|_| !is_set_up) {
            if options.target.kind == DatabaseKind::Mysql {
                // The guard refuses an empty statement in `on_connect` too.
                let guard = Arc::new(StatementObserver::new(options.target.kind, false));
                guard.read_statements(SqlSource::Raw);
                conn.set_instrumentation(ObserverInstrumentation::new(guard));
            }
            prepare(conn).map_err(|error| self.failure(&format!("{DATABASE_ON_CONNECT}: {error}")))?;
        }
        let is_changed = !options.config.on_connect.is_empty() || options.on_connect.is_some();
        if let Some(sql) = options.target.kind.required_settings().filter(|_| is_changed && !is_set_up) {
            conn.batch_execute(sql)
                .map_err(|error| self.failure(&format!("setting the connection up failed: {error} (at `{sql}`)")))?;
        }
        if conn.depth() != Some(0) {
            let is_lost = conn.depth().is_none() || conn.ping().is_err();
            return Err(self.failure(match is_lost {
                true => "the connection was lost while it was set up",
                false => "`on_connect` left a transaction open",
            }));
        }
        if let Some(pinned) = pinned {
            pinned.begin(options.target.kind, conn).map_err(|reason| self.failure(&reason))?;
        }
        conn.set_instrumentation(ObserverInstrumentation::new(observer));
        let now = Instant::now();
        managed.on_close = options.on_close.map(|hook| (hook, DatabaseKind::run_nested as _));
        managed.last_used = now;
        managed.expires = options.config.max_lifetime.map(|lifetime| now + with_jitter(lifetime));
        managed.schema = schema;
        managed.checks_client = checks_client;
        managed.suspicion = suspicion;
        if let Some(session) = session {
            self.sessions.opened(session);
            (managed.session, managed.sessions) = (Some(session), Some(Arc::clone(&self.sessions)));
        }
        Ok(())
    }

    /// Connects, and finds the socket of the connection if possible.
    fn establish_and_find(&self) -> ConnectionResult<(C, Option<Socket>)> {
        let (target, kind) = (&self.options.target, self.options.target.kind);
        let Some(sql) = kind.client_port_query() else { return Ok((self.establish()?, None)) };
        let search = SocketSearch::begin(target);
        let mut conn = self.establish()?;
        let socket = search.end(target, || {
            let answer = conn.texts(sql).ok()?.into_iter().next().flatten()?;
            answer.parse().ok()
        });
        if socket.is_none() {
            let app = &self.options.app;
            crate::wording::log_line!(
                debug,
                "diesel_session::pool",
                "app `{app}`: the socket of a new connection is not known, so a deadline cannot cut it"
            );
        }
        Ok((conn, socket))
    }

    fn establish(&self) -> ConnectionResult<C> {
        let connect = |url: &str| match self.options.connect_with {
            Some(connect) => connect(url),
            None => C::establish(url),
        };
        if self.options.target.in_memory {
            let mut anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
            if anchor.is_none() {
                *anchor = Some(connect(&self.url)?);
            }
        }
        connect(&self.url)
    }

    /// Asks the server for the id of this session, the identity and the capacity of the server and, if the session
    /// counts are old, for the session counts. A full server cannot be asked, so this is done in advance. The result
    /// is `None` if a pooler between this process and the server does not answer the query.
    fn query_session_info(&self, conn: &mut C) -> Option<SessionInfo> {
        let kind = self.options.target.kind;
        let answer = conn.texts(kind.server_info_query()?).ok()?.into_iter().next().flatten()?;
        let mut parts = answer.splitn(5, ' ');
        let (session, capacity, instance) = (parts.next()?, parts.next()?, parts.next()?);
        let (checks_client, database) = (parts.next()? == "set", parts.next()?);
        self.server.set_capacity(capacity.parse().ok()?);
        self.server.set_instance(instance);
        if let Some(sql) = kind.session_counts_query().filter(|_| self.server.session_counts_are_old())
            && let Ok(rows) = conn.texts(sql)
        {
            self.server.set_session_counts(rows.into_iter().flatten().collect());
        }
        let version = SchemaVersion::of_instance(instance, database);
        Some(SessionInfo { session: session.parse().ok(), version, checks_client })
    }

    fn failure(&self, message: &str) -> ConnectFailure {
        // The message is classified before it is redacted, because the password may be a word of the message.
        let kind = self.options.target.kind.classify_connect_error(&phrase(message));
        let mut message = self.options.target.redact(message);
        if self.options.connect_with.is_none() && message.contains("url for multiconnection") {
            message.push_str(
                "; an enum of connections tells no reason: give `Database::connect_with` a function that does",
            );
        }
        if kind == ConnectErrorKind::Unreachable
            && let Some(cause) = self.options.target.missing_file_reason()
        {
            message = format!("{message}: {cause}");
        }
        ConnectFailure { kind, message, was_reached: false }
    }

    /// Completes a failure. If the text does not tell the kind of failure, the server is asked on an idle connection
    /// whether it is full.
    fn classify_with_server(&self, mut failure: ConnectFailure) -> ConnectFailure {
        let target = &self.options.target;
        if failure.kind == ConnectErrorKind::Other
            && let Some(sql) = target.kind.full_server_query()
            && self.server.query_idle(sql).is_some_and(|answer| answer.first().is_some_and(|full| full == "1"))
        {
            failure.kind = ConnectErrorKind::ServerFull;
        }
        failure.was_reached = self.server.was_reached();
        match failure.kind {
            ConnectErrorKind::Unreachable | ConnectErrorKind::Starting => {
                if target.kind.can_go_stale() && failure.was_reached {
                    self.server.report_unreachable(&target.shown, &failure.message);
                }
            }
            _ => self.server.report_reachable(&target.shown),
        }
        failure
    }
}

/// The time reduced by up to 10 %, so that connections that were opened together do not expire together.
pub(super) fn with_jitter(time: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let chance = RandomState::new().hash_one(0_u8) % 1000;
    time.mul_f64(1.0 - 0.1 * chance as f64 / 1000.0)
}
