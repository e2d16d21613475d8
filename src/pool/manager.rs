//! Opens connections for r2d2.
//!
//! A failed connect is a value for r2d2. Otherwise r2d2 would retry by itself, without a limit and with its own
//! pauses. The waiting caller receives the failure, and r2d2 drops the value.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel::connection::CacheSize;
use diesel::result::ConnectionResult;

use super::call_deadline::CallDeadline;
use super::connection_limit::LimitPermit;
use super::managed::Managed;
use super::options::{OwnedConnection, PoolOptions};
use super::schema_version::{SchemaVersion, SeenVersion};
use super::server::Server;
use super::socket::connect_and_find;
use super::statement_observer::{ObserverInstrumentation, SqlSource, StatementObserver};
use super::thread::begin_connect;
use crate::behind::Behind;
use crate::connection::SessionConnection;
use crate::dialect::READ_COMMITTED;
use crate::error::{CONFIG_INIT_SQL, ConnectErrorKind, DATABASE_ON_CONNECT};
use crate::kind::DatabaseKind;
use crate::panic::into_panic_message;
use crate::sync::Mutex;
use crate::url::Target;
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

/// The manager of r2d2.
pub(crate) struct Manager<C: SessionConnection>(pub(super) Arc<Connector<C>>);

/// Opens the connections of one pool.
pub(crate) struct Connector<C: SessionConnection> {
    pub(super) options: Arc<PoolOptions<C>>,
    pub(super) server: Arc<Server>,
    /// The URL for the driver.
    pub(super) url: String,
    /// Keeps a SQLite database in memory alive while the pool has no other connection to it.
    pub(super) anchor: Mutex<Option<C>>,
    /// The permits for the connects that r2d2 has started or will start.
    pub(super) permits: Mutex<VecDeque<Vec<LimitPermit>>>,
    /// The session ids of the open connections.
    pub(super) sessions: Mutex<Vec<u64>>,
    /// The number of connects that are running on the pool's thread.
    pub(super) connects_running: Arc<AtomicUsize>,
    /// The schema version by the name of the database, for servers that do not report their identity.
    pub(super) version: Arc<SchemaVersion>,
}

impl<C: SessionConnection> r2d2::ManageConnection for Manager<C> {
    type Connection = ConnectOutcome<C>;
    type Error = Infallible;

    /// Connects, sets the connection up and runs the program's SQL and `on_connect`. A panic of the driver or of the
    /// program's functions becomes a failure.
    fn connect(&self) -> Result<ConnectOutcome<C>, Infallible> {
        Ok(self.0.catching_panic(|| self.0.connect_with_permits()).map_err(Box::new))
    }

    fn is_valid(&self, _: &mut ConnectOutcome<C>) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, outcome: &mut ConnectOutcome<C>) -> bool {
        !outcome.as_ref().is_ok_and(|managed| managed.kept_by_r2d2)
    }
}

/// The answer of the server to the questions about a new session.
struct SessionInfo {
    /// Whether the default isolation level is READ COMMITTED or weaker.
    reads_committed: bool,
    /// The time since the server has begun the session, if it tells.
    age: Option<Duration>,
}

/// By how much a session may seem to be older than the connection. The server's clock may be adjusted meanwhile.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(100);

impl<C: SessionConnection> Connector<C> {
    fn connect_with_permits(self: &Arc<Self>) -> Result<Box<Managed<C>>, ConnectFailure> {
        let permits = self.permits.lock().pop_front();
        let Some(_connect) = begin_connect(&self.connects_running) else {
            return Err(self.failure("the program is ending"));
        };
        let app = &self.options.app;
        match self.catching_panic(|| self.open()) {
            Ok(mut managed) => {
                self.server.report_reachable(&self.options.target.shown);
                managed.permits = permits.unwrap_or_default();
                log_pool!(debug, "app `{app}` has opened a connection");
                Ok(Box::new(managed))
            }
            Err(failure) => {
                let failure = self.classify_with_server(failure);
                let message = &failure.message;
                log_pool!(debug, "app `{app}` cannot connect: {message}");
                Err(failure)
            }
        }
    }

    /// Turns a panic of the driver or of the program's functions into a failure.
    fn catching_panic<T>(&self, connect: impl FnOnce() -> Result<T, ConnectFailure>) -> Result<T, ConnectFailure> {
        catch_unwind(AssertUnwindSafe(connect))
            .unwrap_or_else(|panic| Err(self.failure(&format!("connecting panicked: {}", into_panic_message(panic)))))
    }

    fn open(self: &Arc<Self>) -> Result<Managed<C>, ConnectFailure> {
        let suspicion = self.server.suspicion();
        let owner = self.options.owner.as_deref();
        let owned = owner.map_or(Ok(None), |owner| owner.take()).map_err(|reason| self.failure(reason))?;
        let began = Instant::now();
        let connection = owned.map_or_else(|| self.establish_and_find(), Ok).map_err(|error| {
            owner.inspect(|owner| owner.give_back(None, true));
            self.failure(&error.to_string())
        })?;
        let mut managed = Managed::new(connection, Arc::clone(self), suspicion);
        let end = Instant::now() + self.options.config.connect_timeout;
        let call_deadline = managed.socket.map(|socket| CallDeadline::begin(socket, end));
        self.set_up(&mut managed, began).map_err(|mut failure| {
            let is_lost = failure.kind == ConnectErrorKind::Other && managed.conn_mut().ping().is_err();
            if call_deadline.is_some_and(|call_deadline| call_deadline.was_cut()) {
                failure.message =
                    "setting the connection up took longer than `Config::connect_timeout`, so it was cut".into();
            }
            if is_lost {
                failure.kind = ConnectErrorKind::Unreachable;
            }
            failure
        })?;
        Ok(managed)
    }

    /// Sets up a new connection for the pool and runs `on_connect`. The connect began at `began`.
    fn set_up(&self, managed: &mut Managed<C>, began: Instant) -> Result<(), ConnectFailure> {
        let options = &self.options;
        let (config, kind) = (&options.config, options.target.kind);
        // Some settings cannot be changed inside an outer transaction.
        let is_set_up = managed.is_set_up;
        // Before anything is set, because the session may be one that a pooler gives to other clients, and before the
        // program's own statements, whose plans the driver may keep.
        let info = self.query_session_info(managed);
        if !is_set_up {
            if let Some(age) = info.as_ref().and_then(|info| info.age) {
                self.refuse_undeclared_pooler(age, began.elapsed())?;
            }
            let no_log = options.target.in_memory || options.target.read_only;
            for sql in kind.dialect().setup(config, no_log, managed.checks_client) {
                match managed.conn_mut().batch_execute(&sql) {
                    Err(error) if !kind.dialect().tolerates_refusal(&sql, &error.to_string()) => {
                        return Err(self.set_up_failed(&sql, &error));
                    }
                    _ => {}
                }
            }
        }
        let conn = managed.conn_mut();
        if !is_set_up {
            self.run_setup_of_program(conn)?;
        }
        self.note_defaults(managed, info.map(|info| info.reads_committed));
        let conn = managed.conn_mut();
        if conn.depth() != Some(0) {
            let is_lost = conn.depth().is_none() || conn.ping().is_err();
            return Err(self.failure(match is_lost {
                true => "the connection was lost while it was set up",
                false => "`Config::connection_init_sql` or `Database::on_connect` left a transaction open",
            }));
        }
        if let Some(owner) = options.owner.as_ref().filter(|_| !is_set_up) {
            owner.complete_setup(conn).map_err(|reason| self.failure(&reason))?;
        }
        let instrumentation = ObserverInstrumentation::new(Arc::clone(&managed.observer));
        managed.conn_mut().set_instrumentation(instrumentation);
        managed.is_set_up = true;
        managed.last_used = Instant::now();
        managed.expires = config.max_lifetime.map(|lifetime| managed.last_used + with_jitter(lifetime));
        self.sessions.lock().extend(managed.session);
        Ok(())
    }

    /// Runs `connection_init_sql` and `on_connect`, and then repeats the settings on which the library relies.
    fn run_setup_of_program(&self, conn: &mut C) -> Result<(), ConnectFailure> {
        let Target { kind, .. } = self.options.target;
        for sql in &self.options.config.connection_init_sql {
            conn.batch_execute(sql)
                .map_err(|error| self.failure(&format!("{CONFIG_INIT_SQL}: {error} (at `{sql}`)")))?;
        }
        if let Some(prepare) = &self.options.on_connect {
            if kind == DatabaseKind::Mysql {
                // The guard refuses an empty statement in `on_connect` too.
                let guard = Arc::new(StatementObserver::new(kind, None));
                guard.read_statements(SqlSource::Raw);
                conn.set_instrumentation(ObserverInstrumentation::new(guard));
            }
            prepare(conn).map_err(|error| self.failure(&format!("{DATABASE_ON_CONNECT}: {error}")))?;
        }
        match self.options.settings_to_repeat() {
            Some(sql) => conn.batch_execute(sql).map_err(|error| self.set_up_failed(sql, &error)),
            None => Ok(()),
        }
    }

    /// Connects, and finds the socket of the connection if possible.
    fn establish_and_find(&self) -> ConnectionResult<OwnedConnection<C>> {
        let PoolOptions { target, app, .. } = &*self.options;
        let Some(sql) = target.kind.texts().client_port_query else {
            return Ok(OwnedConnection { conn: self.establish()?, socket: None, is_set_up: false });
        };
        let own_port = |conn: &mut C| {
            let port = conn.texts(sql).ok()?.into_iter().next()?;
            Some(port.and_then(|port| port.parse().ok()))
        };
        let (conn, socket) = connect_and_find(target, || self.establish(), own_port)?;
        if socket.is_none() {
            log_pool!(debug, "app `{app}`: the socket of a new connection is not known, so a deadline cannot cut it");
        }
        Ok(OwnedConnection { conn, socket, is_set_up: false })
    }

    fn establish(&self) -> ConnectionResult<C> {
        let connect = |url: &str| match self.options.connect_with {
            Some(connect) => connect(url),
            None => C::establish(url),
        };
        let connect = |url: &str| {
            let mut conn = connect(url)?;
            if !self.options.config.behind.keeps_prepared() {
                conn.set_prepared_statement_cache_size(CacheSize::Disabled);
            }
            Ok(conn)
        };
        if self.options.target.in_memory {
            let mut anchor = self.anchor.lock();
            if anchor.is_none() {
                *anchor = Some(connect(&self.url)?);
            }
        }
        connect(&self.url)
    }

    /// Asks the server for the id of this session, the identity and the capacity of the server and, if the session
    /// counts are old, for the session counts. A full server cannot be asked, so this is done in advance. The capacity
    /// and the counts of a server behind a pooler do not tell whether the pooler is full. `None` if the server does not
    /// answer the query.
    fn query_session_info(&self, managed: &mut Managed<C>) -> Option<SessionInfo> {
        let PoolOptions { target, config, .. } = &*self.options;
        let (texts, conn) = (target.kind.texts(), managed.conn_mut());
        let shares_session = config.behind.is_transaction_pooler();
        let answer = conn.texts(texts.server_info_query?).ok()?.into_iter().next().flatten()?;
        let mut parts = answer.splitn(7, ' ');
        let (isolation, session, capacity, instance) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let (checks_client, age, database) = (parts.next()? == "default", parts.next()?, parts.next()?);
        self.server.set_instance(instance);
        if config.behind == Behind::Nothing {
            self.server.capacity.store(capacity.parse().ok()?, Ordering::Relaxed);
            if let Some(sql) = texts.session_counts_query.filter(|_| self.server.session_counts_are_old())
                && let Ok(rows) = conn.texts(sql)
            {
                self.server.set_session_counts(rows.into_iter().flatten().collect());
            }
        }
        managed.schema = SeenVersion::now(SchemaVersion::of_instance(instance, database));
        managed.database = Some(database.to_owned());
        managed.session = session.parse().ok().filter(|_| !shares_session);
        managed.checks_client = checks_client && !shares_session;
        let age = age.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Some(SessionInfo { reads_committed: isolation == READ_COMMITTED, age })
    }

    /// Refuses a connection whose session on the server is older than the connect, unless the configuration declares a
    /// pooler. State that this program leaves on such a session would reach other programs.
    fn refuse_undeclared_pooler(&self, age: Duration, since_connect: Duration) -> Result<(), ConnectFailure> {
        if self.options.config.behind != Behind::Nothing || age <= since_connect + CLOCK_TOLERANCE {
            return Ok(());
        }
        let mut failure = self.failure(&format!(
            "a connection pooler is between this program and the server, because the server's session is older \
             ({age:.1?}) than the connection ({since_connect:.1?})"
        ));
        failure.kind = ConnectErrorKind::UndeclaredPooler;
        Err(failure)
    }

    /// Finds out the default isolation level of a new connection and its limit of statements. `reads_committed` is the
    /// level before the setup of the program, which may have changed both.
    fn note_defaults(&self, managed: &mut Managed<C>, mut reads_committed: Option<bool>) {
        let Some(sql) = self.options.target.kind.texts().defaults_query else { return };
        if self.options.has_own_setup() || reads_committed.is_none() {
            let answer = managed.conn_mut().texts(sql).ok().and_then(|rows| rows.into_iter().next().flatten());
            let (isolation, restore_limit) = answer.as_deref().and_then(|answer| answer.split_once(' ')).unzip();
            reads_committed = Some(isolation == Some(READ_COMMITTED));
            managed.own_limit = restore_limit.map(str::to_owned);
        }
        if reads_committed != Some(true) {
            self.options.note_strict_isolation();
        }
    }

    fn set_up_failed(&self, sql: &str, error: &diesel::result::Error) -> ConnectFailure {
        self.failure(&format!("setting the connection up failed: {error} (at `{sql}`)"))
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
            && let Some(sql) = target.kind.texts().full_server_query
            && self.server.query_idle(sql).is_some_and(|answer| answer.first().is_some_and(|full| full == "1"))
        {
            failure.kind = ConnectErrorKind::ServerFull;
        }
        failure.was_reached = self.server.reached.load(Ordering::Acquire);
        match failure.kind {
            ConnectErrorKind::Unreachable | ConnectErrorKind::Starting | ConnectErrorKind::NotPrimary => {
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
