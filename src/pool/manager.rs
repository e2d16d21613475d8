//! What r2d2 stores, and how it makes one.
//!
//! As far as r2d2 can see, connecting takes no time, never fails and never panics: it gets an empty [`Slot`]. So r2d2 never retries
//! behind our back, holds no place in back-off and makes nobody wait. Whoever has the slot, and the permit for it, connects in it.
//! What is empty counts as broken and leaves r2d2 when it is put back.

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diesel::r2d2::R2D2Connection;
use diesel::result::ConnectionResult;

use super::budget::Share;
use super::generation::{Generation, Seen};
use super::lane::{Held, LOST, Parked};
use super::server::Server;
use super::socket::{Search, Socket};
use super::witness::{Reading, Watch, Witness};
use crate::backend::{Kind, Poison};
use crate::connection::SessionConnection;
use crate::error::ConnectErrorKind;
use crate::spec::Spec;
use crate::wording::phrase;

/// What r2d2 takes for a connection.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "it is boxed where it is kept")]
pub(crate) enum Slot<C> {
    Live(Live<C>),
    /// Not connected yet, or closed.
    Empty,
}

/// A failed connect, for whoever waits.
#[derive(Debug, Clone)]
pub(crate) struct ConnectFailure {
    pub(crate) kind: ConnectErrorKind,
    pub(crate) message: String,
}

/// A hook that is told of the end, and how it is run in the transaction around a test.
type OnClose<C> = (Hook<C>, fn(Kind, &mut C, Hook<C>) -> bool);
type Hook<C> = fn(&mut C);

/// An open connection and what the pool knows of it.
pub(crate) struct Live<C> {
    pub(crate) conn: Held<C>,
    pub(crate) witness: Arc<Witness>,
    /// Somebody had it who may have left something on it, whatever the witness has seen.
    pub(crate) marked: bool,
    on_close: Option<OnClose<C>>,
    /// When it was lent last. Reading the clock once more at its return would cost a tenth of the loan.
    pub(super) lent: Instant,
    /// It has been lent since [`stays_idle`](Self::stays_idle) was asked.
    pub(super) was_used: bool,
    expires: Option<Instant>,
    pub(super) schema: Seen,
    /// The server's number of it, where the server has told.
    pub(super) session: Option<u64>,
    /// The server was told to look for its client while it runs a statement.
    pub(super) checks_client: bool,
    /// The socket under it, if that is known.
    pub(crate) socket: Option<Socket>,
    /// Its socket was cut at the end of a scope's time.
    pub(crate) cut: bool,
    /// It has not been lent yet.
    pub(super) unused: bool,
    /// The doubts about its server when it was last proven sound.
    pub(super) doubts: usize,
    /// It is closed when it comes back.
    pub(super) retired: bool,
    /// It is known to be lost.
    pub(crate) lost: bool,
    /// Its state is not known: it is closed instead of pooled.
    pub(crate) doomed: bool,
    // After `conn`: the count falls when the connection is closed, not before.
    _counted: Counted,
    _shares: (Option<Share>, Option<Share>),
}

impl<C> fmt::Debug for Live<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("doomed", &self.doomed).finish_non_exhaustive()
    }
}

impl<C> Live<C> {
    /// Whether there may be something on it that the next borrower must not find.
    #[inline]
    pub(super) fn may_have_leftovers(&self) -> bool {
        self.marked || self.witness.has_seen_leftovers()
    }

    /// Whether it may be lent. However short its lifetime, a new one serves once: another would be no younger.
    pub(super) fn may_be_lent(&self, now: Instant) -> bool {
        self.unused && self.schema.is_current() || self.is_fit(now)
    }

    /// Whether it is neither too old nor from before a change of the schema.
    fn is_fit(&self, now: Instant) -> bool {
        self.schema.is_current() && self.expires.is_none_or(|expires| now < expires)
    }

    /// Closes it when it comes back: what the driver keeps with it is of an older schema, or its server takes no writes any more. The
    /// other connections of this process to the database are no better, if they are as old.
    pub(crate) fn retire(&mut self, poison: Poison) {
        if let Some(lane) = self.conn.lane() {
            // It is the test's one connection. What it remembers must not reach another test.
            lane.schema_changes();
            return;
        }
        self.retired = true;
        // A connection that has never come back is new: another would be no newer.
        let is_of_all = match poison {
            Poison::Outdated => true,
            Poison::ReadOnly | Poison::OtherType => !self.unused,
            Poison::Forgotten => false,
        };
        if is_of_all && self.schema.is_current() {
            self.schema.change(false);
        }
    }

    /// Whether it may stay idle until the next look at it.
    pub(super) fn stays_idle(&mut self, now: Instant, idle_timeout: Duration) -> bool {
        let was_used = std::mem::take(&mut self.was_used);
        self.is_fit(now) && (was_used || now.saturating_duration_since(self.lent) < idle_timeout)
    }
}

impl<C> Drop for Live<C> {
    /// Before the connection itself is dropped.
    fn drop(&mut self) {
        if let Some(socket) = self.socket.filter(|_| self.conn.lane().is_none()) {
            socket.forget();
        }
        if let Some(lane) = self.conn.lane().filter(|_| self.doomed || self.lost) {
            let cause = if self.lost { LOST } else { "its connection was left in an unknown state" };
            lane.break_off(cause, None);
        }
        if let Some(lane) = self.conn.lane() {
            if self.may_have_leftovers() {
                lane.soil();
            }
            if self.witness.may_have_changed_schema() {
                lane.schema_changes();
            }
        }
        let Some((hook, run_inside)) = self.on_close.take() else { return };
        let lane = self.conn.lane().filter(|lane| lane.has_begun()).map(Arc::clone);
        let outcome = catch_unwind(AssertUnwindSafe(|| match &lane {
            None => hook(&mut self.conn),
            Some(_) if run_inside(self.witness.kind(), &mut self.conn, hook) => {}
            Some(lane) => lane.break_off("hook `on_close` ended its transaction", None),
        }));
        if let Err(panic) = outcome {
            let message = crate::panic_message(&*panic);
            crate::wording::log_line!(
                warn,
                "diesel_session::pool",
                "hook `on_close` panicked: {message}; the connection is closed all the same"
            );
        }
    }
}

/// What the parts of one pool tell each other.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// Everything that comes back is closed.
    pub(crate) closed: AtomicBool,
    /// Connects under way.
    pub(crate) connecting: AtomicUsize,
    /// Calls on helper threads that have not ended although their time is over.
    pub(crate) suspect: AtomicUsize,
    /// Open connections.
    pub(crate) open: AtomicUsize,
    /// Connections closed since the pool was made.
    pub(crate) closings: AtomicUsize,
    /// Permits whose holders have no connection, or that are out to get one.
    pub(super) seeking: AtomicUsize,
    /// Somebody looks for connections that are held for too long.
    pub(super) watching: AtomicBool,
}

impl Control {
    /// Whether a connection that comes back must not be kept.
    pub(super) fn must_close<C: R2D2Connection>(&self, live: &mut Live<C>) -> bool {
        self.closed.load(Ordering::Acquire)
            || live.doomed
            || live.retired
            || !live.schema.is_current()
            || live.conn.is_broken()
    }
}

/// One in [`Control::seeking`], as long as it or a clone of it lives.
#[derive(Clone)]
pub(super) struct Seeking(#[allow(dead_code, reason = "it counts")] Arc<Counter>);

struct Counter(Arc<Control>);

impl Seeking {
    pub(super) fn begin(control: &Arc<Control>) -> Self {
        control.seeking.fetch_add(1, Ordering::SeqCst);
        Self(Arc::new(Counter(Arc::clone(control))))
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.0.seeking.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One in [`Control::connecting`], as long as it lives.
pub(super) struct Connecting(Arc<Control>);

impl Connecting {
    pub(super) fn begin(control: &Arc<Control>) -> Self {
        control.connecting.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(control))
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        self.0.connecting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One open connection in [`Control::open`].
#[derive(Debug)]
struct Counted(Arc<Control>, Arc<str>);

impl Counted {
    fn new(control: &Arc<Control>, app: &Arc<str>) -> Self {
        control.open.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(control), Arc::clone(app))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
        self.0.closings.fetch_add(1, Ordering::AcqRel);
        crate::wording::log_line!(debug, "diesel_session::pool", "app `{}` has closed a connection", self.1);
    }
}

/// What a server tells of a new session.
struct Introduced {
    session: Option<u64>,
    generation: Arc<Generation>,
    checks_client: bool,
}

/// Makes the connections of one pool.
pub(crate) struct Manager<C: SessionConnection> {
    pub(crate) spec: Arc<Spec<C>>,
    pub(crate) control: Arc<Control>,
    pub(crate) server: Arc<Server>,
    /// The URL for the driver.
    url: String,
    /// Keeps a SQLite database in memory alive while the pool has no other connection to it.
    anchor: Arc<Mutex<Option<C>>>,
    /// That of the database's name, for servers that do not tell what they are.
    generation: Arc<Generation>,
}

impl<C: SessionConnection> fmt::Debug for Manager<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Manager").field("app", &self.spec.app).finish_non_exhaustive()
    }
}

impl<C: SessionConnection> Manager<C> {
    pub(crate) fn new(
        spec: Arc<Spec<C>>,
        control: Arc<Control>,
        server: Arc<Server>,
        anchor: Arc<Mutex<Option<C>>>,
    ) -> Self {
        let target = &spec.target;
        let url = if target.in_memory {
            target.shared_memory().map_or_else(crate::backend::memory_url, str::to_owned)
        } else {
            target.kind.driver_url(target, &spec.config, &spec.app)
        };
        let generation = Generation::of(target);
        Self { spec, control, server, url, anchor, generation }
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// A new connection, whatever the driver and the program's own functions do.
    pub(super) fn make(&self, share: Option<Share>) -> Result<Live<C>, ConnectFailure> {
        catch_unwind(AssertUnwindSafe(|| self.open(share))).unwrap_or_else(|panic| {
            let message = format!("connecting panicked: {}", crate::panic_message(&*panic));
            Err(ConnectFailure { kind: ConnectErrorKind::Other, message: self.spec.target.redact(&message) })
        })
    }

    fn open(&self, mut share: Option<Share>) -> Result<Live<C>, ConnectFailure> {
        let spec = &self.spec;
        let doubts = self.server.presence().doubts();
        let place = self.server.room().try_take();
        let lane = spec.lane.as_ref();
        let establish = || self.establish_and_find().map_err(|error| self.failure(&error.to_string()));
        let (conn, socket) = match lane.map(|lane| lane.take()) {
            None => establish()?,
            Some(Parked::Here(conn)) => (conn, lane.and_then(|lane| lane.socket())),
            Some(Parked::Nowhere) => establish().inspect_err(|_| spec.lane.iter().for_each(|lane| lane.not_made()))?,
            Some(Parked::Lent) => return Err(self.failure("another pool still has the one connection of this test")),
        };
        if let Some(lane) = lane {
            lane.has_socket(socket);
        }
        // From here on it is parked wherever this ends.
        let mut conn = Held::new(conn, lane.cloned());
        // It was prepared by an earlier pool of this test, and inside of a transaction some settings cannot be made.
        let is_set_up = lane.is_some_and(|lane| lane.has_begun());
        let no_log = spec.target.in_memory || spec.target.read_only;
        let witness = Arc::new(Witness::new(spec.target.kind, lane.is_some()));
        for sql in spec.target.kind.setup(&spec.config, no_log).into_iter().filter(|_| !is_set_up) {
            conn.batch_execute(&sql)
                .or_else(|error| match spec.target.kind.goes_without(&sql, &error.to_string()) {
                    true => Ok(()),
                    false => Err(error),
                })
                .map_err(|error| self.failure(&format!("setting the connection up failed: {error} (at `{sql}`)")))?;
        }
        if let Some(share) = &mut share {
            share.opened(self.server.slot_maker());
        }
        let Introduced { session, generation, checks_client } = match self.introduce(&mut conn) {
            Some(introduced) => introduced,
            None => {
                if let Some(lane) = lane.filter(|_| is_set_up && conn.ping().is_err()) {
                    lane.break_off(LOST, None);
                    return Err(self.failure("the one connection of this test was lost"));
                }
                Introduced { session: None, generation: Arc::clone(&self.generation), checks_client: false }
            }
        };
        // Before the program's own statements, which may be kept as they are.
        let schema = Seen::now(generation);
        for sql in spec.config.on_connect.iter().filter(|_| !is_set_up) {
            conn.batch_execute(sql)
                .map_err(|error| self.failure(&format!("`Config::on_connect` failed: {error} (at `{sql}`)")))?;
        }
        if let Some(prepare) = spec.on_connect.filter(|_| !is_set_up) {
            if spec.target.kind == Kind::Mysql {
                // An empty statement is refused here too.
                let guard = Arc::new(Witness::new(spec.target.kind, false));
                guard.read_statements(Reading::Raw);
                conn.set_instrumentation(Watch::new(guard));
            }
            prepare(&mut *conn).map_err(|error| self.failure(&format!("`Database::on_connect` failed: {error}")))?;
        }
        let is_changed = !spec.config.on_connect.is_empty() || spec.on_connect.is_some();
        if let Some(sql) = spec.target.kind.required().filter(|_| is_changed && !is_set_up) {
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
        if let Some(lane) = lane {
            lane.begin(spec.target.kind, &mut *conn).map_err(|reason| self.failure(&reason))?;
        }
        conn.set_instrumentation(Watch::new(Arc::clone(&witness)));
        let now = Instant::now();
        Ok(Live {
            conn,
            witness,
            marked: false,
            on_close: spec.on_close.map(|hook| (hook, Kind::run_inside as _)),
            lent: now,
            was_used: false,
            expires: spec.config.max_lifetime.map(|lifetime| now + shortened(lifetime)),
            schema,
            unused: true,
            session,
            checks_client,
            socket,
            cut: false,
            doubts,
            retired: false,
            lost: false,
            doomed: false,
            _counted: Counted::new(&self.control, &spec.app),
            _shares: (place, share),
        })
    }

    /// A connection, and the socket under it if that can be told.
    fn establish_and_find(&self) -> ConnectionResult<(C, Option<Socket>)> {
        let (target, kind) = (&self.spec.target, self.spec.target.kind);
        let Some(question) = kind.client_port() else { return Ok((self.establish()?, None)) };
        let search = Search::begin(target);
        let mut conn = self.establish()?;
        let socket = search.end(target, || {
            let answer = conn.texts(question).ok()?.into_iter().next().flatten()?;
            answer.parse().ok()
        });
        if socket.is_none() {
            let app = &self.spec.app;
            crate::wording::log_line!(
                debug,
                "diesel_session::pool",
                "app `{app}`: the socket of a new connection is not known, so a deadline cannot cut it"
            );
        }
        Ok((conn, socket))
    }

    fn establish(&self) -> ConnectionResult<C> {
        let connect = |url: &str| match self.spec.connect_with {
            Some(connect) => connect(url),
            None => C::establish(url),
        };
        if self.spec.target.in_memory {
            let mut anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
            if anchor.is_none() {
                *anchor = Some(connect(&self.url)?);
            }
        }
        connect(&self.url)
    }

    /// Asks the server for its number of this session, what it is and, once in a while, who else has it: when it is full it is
    /// too late to ask. Whatever stands between us and the server and does not know may stay silent.
    fn introduce(&self, conn: &mut C) -> Option<Introduced> {
        let kind = self.spec.target.kind;
        let answer = conn.texts(kind.introduction()?).ok()?.into_iter().next().flatten()?;
        let mut parts = answer.splitn(5, ' ');
        let (session, capacity, instance) = (parts.next()?, parts.next()?, parts.next()?);
        let (checks_client, database) = (parts.next()? == "set", parts.next()?);
        self.server.allows(capacity.parse().ok()?);
        self.server.is_instance(instance);
        self.take_census(conn);
        let generation = Generation::of_instance(instance, database);
        Some(Introduced { session: session.parse().ok(), generation, checks_client })
    }

    fn take_census(&self, conn: &mut C) {
        let Some(question) = self.spec.target.kind.census() else { return };
        if self.server.census_is_old()
            && let Ok(rows) = conn.texts(question)
        {
            self.server.note_census(rows.into_iter().flatten().collect());
        }
    }

    pub(super) fn failure(&self, message: &str) -> ConnectFailure {
        // The message is classified before it is redacted: a password may be a word of it.
        let kind = self.spec.target.kind.classify(&phrase(message));
        let mut message = self.spec.target.redact(message);
        if self.spec.connect_with.is_none() && message.contains("url for multiconnection") {
            message.push_str(
                "; an enum of connections tells no reason: give `Database::connect_with` a function that does",
            );
        }
        if kind == ConnectErrorKind::Unreachable
            && let Some(cause) = self.spec.target.why_no_file()
        {
            message = format!("{message}: {cause}");
        }
        ConnectFailure { kind, message }
    }
}

/// What r2d2 makes for one pool: empty slots.
pub(crate) struct Slots<C> {
    control: Arc<Control>,
    of: PhantomData<fn(C)>,
}

impl<C> fmt::Debug for Slots<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slots")
    }
}

impl<C> Slots<C> {
    pub(super) fn new(control: &Arc<Control>) -> Self {
        Self { control: Arc::clone(control), of: PhantomData }
    }
}

impl<C: SessionConnection> r2d2::ManageConnection for Slots<C> {
    type Connection = Slot<C>;
    type Error = Infallible;

    fn connect(&self) -> Result<Slot<C>, Infallible> {
        Ok(Slot::Empty)
    }

    fn is_valid(&self, _: &mut Slot<C>) -> Result<(), Infallible> {
        Ok(())
    }

    fn has_broken(&self, slot: &mut Slot<C>) -> bool {
        match slot {
            Slot::Live(live) => self.control.must_close(live),
            Slot::Empty => true,
        }
    }
}

/// A time less up to a tenth, so that what began together does not end together.
pub(super) fn shortened(lifetime: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    let chance = RandomState::new().hash_one(0_u8) % 1000;
    lifetime.mul_f64(1.0 - 0.1 * chance as f64 / 1000.0)
}
