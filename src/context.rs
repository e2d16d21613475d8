//! Contexts: which application and session belong to the running code.
//!
//! Each context is one frame on the stack of the thread that entered it. A context ends the same way by return, `?`
//! and panic: its sessions are removed inside the frame, and no hook can prevent that.

use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app::App;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result, Undo};
use crate::kind::DatabaseKind;
use crate::panic::{catch_panic, drop_catching_panic};
use crate::session::{Session, SessionInner};
use crate::settings::{Deadline, Isolation, Mode, Settings};

scoped_tls::scoped_thread_local!(static CURRENT: ContextFrame);

/// The number of rounds in which hooks of removed sessions may open further sessions.
const REMOVAL_ROUNDS: usize = 100;

pub(crate) struct ContextFrame {
    /// The entered application, as [`App::erased`] returned it.
    entered: Arc<dyn Any + Send + Sync>,
    id: Arc<str>,
    /// The number of the database object to which the entered application belongs.
    database: u64,
    settings: Settings,
    sessions: RefCell<Vec<ContextSession>>,
}

/// A session of the context.
struct ContextSession {
    /// The number of the session's database object.
    database: u64,
    session: Rc<dyn ErasedSession>,
    /// The end of the context has committed work of this session.
    committed: bool,
}

/// A session of any connection type.
trait ErasedSession {
    fn commit(&self, at: Place) -> Result<()>;
    /// Whether a commit would commit something.
    fn has_work(&self) -> bool;
    fn end(&self);
    fn name(&self) -> String;
    fn into_any(self: Rc<Self>) -> Rc<dyn Any>;
}

impl<C: SessionConnection> ErasedSession for SessionInner<C> {
    fn commit(&self, at: Place) -> Result<()> {
        SessionInner::commit(self, at)
    }

    fn has_work(&self) -> bool {
        self.is_active() || self.has_unflushed()
    }

    fn end(&self) {
        SessionInner::end(self);
    }

    fn name(&self) -> String {
        format!("app `{}` on {}", self.app().id(), self.app().options().target.shown)
    }

    fn into_any(self: Rc<Self>) -> Rc<dyn Any> {
        self
    }
}

/// The application of the current context, as one database object sees it.
pub(crate) enum Current<C: SessionConnection> {
    Entered(App<C>),
    /// The entered application belongs to another database object. The application with the same id is meant.
    SameId(Arc<str>),
}

pub(crate) fn current<C: SessionConnection>(database: u64, at: Place) -> Result<Current<C>> {
    in_frame(at, |frame| Ok(frame.current(database)))
}

/// The session of this context and database object. The first call opens it.
pub(crate) fn session<C: SessionConnection>(
    database: u64,
    at: Place,
    app_of: impl FnOnce(Current<C>) -> Result<App<C>>,
) -> Result<Session<C>> {
    in_frame(at, |frame| {
        let sessions = frame.sessions.borrow();
        let open = sessions.iter().find(|opened| opened.database == database).map(|opened| Rc::clone(&opened.session));
        drop(sessions);
        if let Some(inner) = open.and_then(|session| session.into_any().downcast::<SessionInner<C>>().ok()) {
            return Ok(Session(inner));
        }
        let app = app_of(frame.current(database))?;
        app.core().check_not_removed()?;
        let opened = app.new_session(frame.settings.clone(), at);
        let session = Rc::clone(&opened.0) as Rc<dyn ErasedSession>;
        frame.sessions.borrow_mut().push(ContextSession { database, session, committed: false });
        Ok(opened)
    })
}

/// Whether this thread is in a scope with a `search_path` that applies to sessions of the application with this id.
pub(crate) fn has_search_path(app: &str) -> bool {
    CURRENT.is_set() && CURRENT.with(|frame| &*frame.id == app && frame.settings.search_path.is_some())
}

fn in_frame<T>(at: Place, f: impl FnOnce(&ContextFrame) -> Result<T>) -> Result<T> {
    if CURRENT.is_set() { CURRENT.with(f) } else { Err(Error::NoContext { at }) }
}

impl ContextFrame {
    fn new<C: SessionConnection>(app: &App<C>, settings: Settings) -> Self {
        Self {
            entered: app.erased(),
            id: Arc::clone(&app.options().app),
            database: app.database(),
            settings,
            sessions: RefCell::default(),
        }
    }

    fn current<C: SessionConnection>(&self, database: u64) -> Current<C> {
        match App::of_erased(&self.entered) {
            Some(app) if self.database == database => Current::Entered(app),
            _ => Current::SameId(Arc::clone(&self.id)),
        }
    }

    /// Commits the sessions in the order in which they were opened.
    fn commit(&self, at: Place) -> Result<()> {
        let mut hook_outcome = Ok(());
        // A hook may open a further session.
        for index in 0.. {
            let session = self.sessions.borrow().get(index).map(|opened| Rc::clone(&opened.session));
            let Some(session) = session else { break };
            let has_work = session.has_work();
            let committed = match session.commit(at) {
                Ok(()) => has_work,
                Err(error @ Error::HookFailed { committed: true, .. }) => {
                    hook_outcome = hook_outcome.and(Err(error));
                    true
                }
                Err(mut error) => {
                    // The end of the scope rolls back every open transaction.
                    error.set_undo(&|_| Undo::RolledBack);
                    return Err(self.partial_commit_error(error, index));
                }
            };
            if let Some(opened) = self.sessions.borrow_mut().get_mut(index) {
                opened.committed = committed;
            }
        }
        hook_outcome
    }

    /// Adds to the error of a failed commit which sessions had been committed before it.
    fn partial_commit_error(&self, error: Error, failed: usize) -> Error {
        let sessions = self.sessions.borrow();
        // Two databases of one application may have the same name.
        let name = |index: usize| format!("{} (number {} of the scope)", sessions[index].session.name(), index + 1);
        let committed: Vec<String> = (0..failed).filter(|&index| sessions[index].committed).map(name).collect();
        if committed.is_empty() {
            return error;
        }
        Error::PartialCommit { committed, failed: name(failed), source: Box::new(error) }
    }

    /// Removes the sessions. A hook may open further sessions meanwhile.
    fn remove_sessions(&self) {
        for _ in 0..REMOVAL_ROUNDS {
            let sessions = std::mem::take(&mut *self.sessions.borrow_mut());
            if sessions.is_empty() {
                return;
            }
            for ContextSession { session, .. } in sessions {
                catch_panic("the end of a session", || session.end());
                drop_catching_panic(session);
            }
        }
        crate::wording::log_line!(
            warn,
            "diesel_session::session",
            "app `{}`: hooks went on opening sessions at the end of the context",
            self.id
        );
    }
}

/// Runs `body` in a context of its own. The context commits if `decide` returns `true` for the result of `body`.
fn run_in_context<C: SessionConnection, R>(
    app: &App<C>,
    settings: Settings,
    at: Place,
    body: impl FnOnce() -> R,
    decide: impl FnOnce(&R) -> bool,
) -> (R, Result<()>) {
    struct RemoveOnDrop<'f>(&'f ContextFrame);

    impl Drop for RemoveOnDrop<'_> {
        fn drop(&mut self) {
            self.0.remove_sessions();
        }
    }

    let frame = ContextFrame::new(app, settings);
    CURRENT.set(&frame, || {
        let removal = RemoveOnDrop(&frame);
        let out = body();
        let committed = if decide(&out) { frame.commit(at) } else { Ok(()) };
        drop(removal);
        (out, committed)
    })
}

pub(crate) fn enter<C: SessionConnection, R>(app: &App<C>, at: Place, body: impl FnOnce() -> R) -> R {
    run_in_context(app, Settings::DEFAULT, at, body, |_| false).0
}

/// The options of a context: what its sessions do and whether it commits. [`App::scope`] makes a scope, and
/// [`run`](Self::run) enters it.
///
/// ```
/// # use diesel_session::{Config, Database, Error};
/// # use diesel::prelude::*;
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// # let app = DB.init_app("scope", Config::new(":memory:"))?;
/// let answer = app.scope().read_only().run(|| {
///     DB.session()?.get_result::<i32>(diesel::select(diesel::dsl::sql::<diesel::sql_types::Integer>("42")))
/// })?;
/// assert_eq!(answer, 42);
/// # app.dispose()?;
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a scope does nothing until `run` is called"]
pub struct Scope<C: SessionConnection, P = CommitNothing> {
    app: App<C>,
    settings: Settings,
    limit: Option<Duration>,
    policy: P,
}

/// The policy of a scope that commits nothing by itself.
#[derive(Debug)]
#[non_exhaustive]
pub struct CommitNothing;

/// The policy of [`Scope::commit_on_ok`].
#[derive(Debug)]
#[non_exhaustive]
pub struct CommitOnOk;

/// The policy of [`Scope::commit_if`].
pub struct CommitIf<T, F> {
    decide: F,
    of: PhantomData<fn(&T)>,
}

impl<T, F> std::fmt::Debug for CommitIf<T, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CommitIf")
    }
}

/// Decides whether a scope commits after its closure has returned `Ok`. Only the policies of this crate implement it.
pub trait Policy<T>: sealed::Sealed {
    #[doc(hidden)]
    fn commits(&self, out: &T) -> bool;
}

mod sealed {
    #[allow(unreachable_pub)]
    pub trait Sealed {}
    impl Sealed for super::CommitNothing {}
    impl Sealed for super::CommitOnOk {}
    impl<T, F> Sealed for super::CommitIf<T, F> {}
}

impl<T> Policy<T> for CommitNothing {
    fn commits(&self, _: &T) -> bool {
        false
    }
}

impl<T> Policy<T> for CommitOnOk {
    fn commits(&self, _: &T) -> bool {
        true
    }
}

impl<T, F: Fn(&T) -> bool> Policy<T> for CommitIf<T, F> {
    fn commits(&self, out: &T) -> bool {
        (self.decide)(out)
    }
}

impl<C: SessionConnection> Scope<C> {
    pub(crate) fn new(app: App<C>) -> Self {
        Self { app, settings: Settings::DEFAULT, limit: None, policy: CommitNothing }
    }

    /// Commits if the closure returns `Ok`.
    pub fn commit_on_ok(self) -> Scope<C, CommitOnOk> {
        self.with_policy(CommitOnOk)
    }

    /// Commits if the closure returns `Ok(out)` and `decide(&out)` is `true`, for example for a response with a
    /// status below 400. The type of the argument of `decide` must be written down: `|response: &Response| ..`. The
    /// method can be combined with every other option. Call it last if other options depend on a condition, because
    /// it changes the type of the scope.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # struct Response { status: u16 }
    /// # fn handle() -> Result<Response, Error> { Ok(Response { status: 404 }) }
    /// # let app = DB.init_app("web", Config::new(":memory:"))?;
    /// let response = app.scope().commit_if(|response: &Response| response.status < 400).run(|| handle())?;
    /// assert_eq!(response.status, 404);       // the response is returned, and the work is rolled back
    /// # Ok::<(), Error>(())
    /// ```
    pub fn commit_if<T, F: Fn(&T) -> bool>(self, decide: F) -> Scope<C, CommitIf<T, F>> {
        self.with_policy(CommitIf { decide, of: PhantomData })
    }

    fn with_policy<P>(self, policy: P) -> Scope<C, P> {
        let Self { app, mut settings, limit, .. } = self;
        settings.commits = true;
        Scope { app, settings, limit, policy }
    }
}

impl<C: SessionConnection, P> Scope<C, P> {
    /// The scope's transactions only read. On a SQLite file they run beside a writer, thanks to the write-ahead log.
    /// `:memory:` has no such log, so there a reader and a writer wait for each other. The option overrides
    /// [`autocommit`](Self::autocommit), in any order.
    pub fn read_only(mut self) -> Self {
        self.settings.mode = Mode::ReadOnly;
        self
    }

    /// The scope has no transaction: every statement is committed by itself and holds a connection only while it
    /// runs. [`Session::transaction`](crate::Session::transaction), `savepoint` and `begin` begin a transaction all
    /// the same.
    pub fn autocommit(mut self) -> Self {
        if self.settings.mode != Mode::ReadOnly {
            self.settings.mode = Mode::Autocommit;
        }
        self
    }

    /// The isolation level of the scope's transactions. Without it they have the database's default.
    pub fn isolation(mut self, level: Isolation) -> Self {
        self.settings.isolation = Some(level);
        self
    }

    /// The time limit of the scope, counted from the call of [`run`](Self::run). After it, statements are refused,
    /// and waits for a connection or for a lock of SQLite end. PostgreSQL and MariaDB end a statement that is still
    /// running.
    ///
    /// If the server does not answer within further 250 ms (its process is frozen, the network is down), the
    /// connection is cut on Linux. A statement then fails with [`Error::DeadlineExceeded`], and a `COMMIT` with
    /// [`Error::CommitUnknown`]. The rollback at the end of the context and the hooks of the pool are cut short in
    /// the same way. If a statement of an [`autocommit`](Self::autocommit) scope was cut, the server may have carried
    /// it out.
    ///
    /// A `COMMIT` is not refused: it commits the statements that were sent in time, even if the deadline has passed since, and the
    /// server then has 250 ms to answer. Changes that were not flushed before the deadline are not sent, and the
    /// commit is [`Error::DeadlineExceeded`].
    ///
    /// Limits: SQLite finishes the statement that it runs. The program's own code is not interrupted. On other
    /// systems than Linux, only the server ends a statement; so it is on Linux if the connection's socket cannot be
    /// told from others (two connects at the same moment through a connection pooler).
    pub fn deadline(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Makes the outcome of a commit known even if its answer is lost: [`Error::resolve`] then asks the server
    /// whether the transaction was committed, on PostgreSQL 13 and newer. It costs one more round trip for each
    /// transaction, right before `COMMIT`, for the number of the transaction. Other databases cannot tell the
    /// outcome, so there it has no cost and no effect.
    ///
    /// ```
    /// # use diesel_session::{App, CommitOutcome, Error};
    /// # use diesel::prelude::*;
    /// # fn place_order() -> Result<(), Error> { Ok(()) }
    /// # fn order(app: &App<SqliteConnection>) -> Result<(), Error> {
    /// match app.scope().resolvable().commit_on_ok().run(place_order) {
    ///     Err(error) if error.is_commit_unknown() => match error.resolve()? {
    ///         CommitOutcome::Committed => Ok(()),
    ///         CommitOutcome::RolledBack => app.scope().commit_on_ok().run(place_order),
    ///         _ => Err(error),
    ///     },
    ///     outcome => outcome,
    /// }
    /// # }
    /// ```
    pub fn resolvable(mut self) -> Self {
        self.settings.resolvable = true;
        self
    }

    /// PostgreSQL: the schemas in which the scope's statements look up tables, types and functions, in this order.
    /// Each transaction of the scope sets the `search_path` in the same message as its `BEGIN`, and the connection is
    /// checked in without it. This is how one application serves several tenants with a schema each:
    ///
    /// ```
    /// # use diesel_session::{App, Error};
    /// # fn handle() -> Result<(), Error> { Ok(()) }
    /// # #[cfg(feature = "postgres")]
    /// # fn serve(app: &App<diesel::PgConnection>, tenant: &str) -> Result<(), Error> {
    /// app.scope().search_path([tenant, "public"]).commit_on_ok().run(handle)
    /// # }
    /// ```
    ///
    /// A context serves one tenant. Its session knows rows by their key, so rows of two tenants with the same key
    /// would be the same row to the session: do not change the `search_path` inside a context, but enter another one.
    /// Types of columns that several tenants have, such as enums, belong in a schema that all tenants share, because
    /// a connection remembers the numbers of types by their names.
    ///
    /// [`create_all`](crate::App::create_all), [`drop_all`](crate::App::drop_all) and
    /// [`migrations`](crate::App::migrations) use a connection of their own, which does not have the scope's
    /// `search_path`, so they are refused inside such a scope. Migrate the schema of a tenant with an application of
    /// its own, whose connections have the `search_path`. The schema must exist:
    ///
    /// ```
    /// # #[cfg(feature = "postgres")]
    /// # mod program {
    /// # use diesel::prelude::*;
    /// # use diesel_session::{Config, Database, Result};
    /// # static DB: Database<PgConnection> = Database::without_migrations();
    /// pub fn migrate(config: Config, tenant: &str) -> Result<Vec<String>> {
    ///     let quoted = tenant.replace('"', "\"\"");
    ///     let config = config.on_connect(format!("SET search_path = \"{quoted}\", public"));
    ///     let app = DB.init_app(format!("migrate {tenant}"), config)?;
    ///     let versions = app.create_all();
    ///     DB.remove_app(app.id())?;
    ///     versions
    /// }
    /// # }
    /// ```
    ///
    /// The names are quoted, so they are taken literally. As on the server, a schema that does not exist is skipped.
    ///
    /// The first statement of a session is [`Error::InvalidConfig`] if the database is not PostgreSQL, or if the
    /// statement would run outside of a transaction in an [`autocommit`](Self::autocommit) scope.
    pub fn search_path<S: AsRef<str>>(mut self, schemas: impl IntoIterator<Item = S>) -> Self {
        self.settings.search_path = Some(DatabaseKind::search_path(schemas).into());
        self
    }

    /// Enters a context, runs `body` in it, commits if the scope's policy says so, and removes the context's
    /// sessions. `Err` and a panic roll back.
    ///
    /// # Errors
    /// Those of `body`; if `body` returned `Ok`, those of the commit, turned into `E`: see
    /// [`Session::commit`](crate::Session::commit), and [`Error::PartialCommit`] if several databases were used.
    #[track_caller]
    pub fn run<T, E: From<Error>>(self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        P: Policy<T>,
    {
        let mut settings = self.settings;
        // A limit beyond the range of the clock is no limit.
        settings.deadline =
            self.limit.and_then(|limit| Some(Deadline { end: Instant::now().checked_add(limit)?, limit }));
        let policy = self.policy;
        let (out, committed) = run_in_context(&self.app, settings, Location::caller(), body, |out| {
            out.as_ref().is_ok_and(|out| policy.commits(out))
        });
        let out = out?;
        committed?;
        Ok(out)
    }
}
