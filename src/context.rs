//! Contexts: which application and session belong to the code that runs now.
//!
//! One frame a context, on the stack of the thread that entered it. A context ends the same way by return, `?` and panic:
//! its sessions are removed inside the frame, and nothing a hook does can skip that.

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

scoped_tls::scoped_thread_local!(static CURRENT: Frame);

/// A hook of a session that is being removed may open another one; that goes on for so long.
const REMOVAL_ROUNDS: usize = 100;

/// One context.
pub(crate) struct Frame {
    /// What [`App::erased`] made of the application that was entered.
    entered: Arc<dyn Any + Send + Sync>,
    id: Arc<str>,
    /// The number of the database object whose application was entered.
    database: u64,
    settings: Settings,
    sessions: RefCell<Vec<Opened>>,
}

/// A session of the context.
struct Opened {
    /// The number of its database object.
    database: u64,
    session: Rc<dyn Scoped>,
    /// The context has committed something in it.
    committed: bool,
}

/// A session of whatever connection type.
trait Scoped {
    fn commit(&self, at: Place) -> Result<()>;
    /// Whether there is something that a commit would commit.
    fn has_work(&self) -> bool;
    fn end(&self);
    fn name(&self) -> String;
    fn into_any(self: Rc<Self>) -> Rc<dyn Any>;
}

impl<C: SessionConnection> Scoped for SessionInner<C> {
    fn commit(&self, at: Place) -> Result<()> {
        SessionInner::commit(self, at)
    }

    fn has_work(&self) -> bool {
        self.has_begun() || self.has_unflushed()
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

/// The application this thread is in, as far as the database object of that number is concerned.
pub(crate) enum Current<C: SessionConnection> {
    Entered(App<C>),
    /// Another database object's application was entered; the same id is meant.
    SameId(Arc<str>),
}

pub(crate) fn current<C: SessionConnection>(database: u64, at: Place) -> Result<Current<C>> {
    in_frame(at, |frame| Ok(frame.current(database)))
}

/// The session of this context and database object, opened where there is none yet.
pub(crate) fn session<C: SessionConnection>(
    database: u64,
    at: Place,
    find: impl FnOnce(Current<C>) -> Result<App<C>>,
) -> Result<Session<C>> {
    in_frame(at, |frame| {
        let sessions = frame.sessions.borrow();
        let open = sessions.iter().find(|opened| opened.database == database).map(|opened| Rc::clone(&opened.session));
        drop(sessions);
        if let Some(shared) = open.and_then(|session| session.into_any().downcast::<SessionInner<C>>().ok()) {
            return Ok(Session(shared));
        }
        let app = find(frame.current(database))?;
        app.core().not_removed()?;
        let created = app.new_session(frame.settings.clone(), at);
        let session = Rc::clone(&created.0) as Rc<dyn Scoped>;
        frame.sessions.borrow_mut().push(Opened { database, session, committed: false });
        Ok(created)
    })
}

/// Whether this thread is in a scope with a `search_path` that holds for sessions of the application with that id.
pub(crate) fn has_search_path(app: &str) -> bool {
    CURRENT.is_set() && CURRENT.with(|frame| &*frame.id == app && frame.settings.search_path.is_some())
}

fn in_frame<T>(at: Place, f: impl FnOnce(&Frame) -> Result<T>) -> Result<T> {
    if CURRENT.is_set() { CURRENT.with(f) } else { Err(Error::NoContext { at }) }
}

impl Frame {
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
        let mut hooks = Ok(());
        // A hook may open one more on the way.
        for index in 0.. {
            let session = self.sessions.borrow().get(index).map(|opened| Rc::clone(&opened.session));
            let Some(session) = session else { break };
            let works = session.has_work();
            let committed = match session.commit(at) {
                Ok(()) => works,
                Err(error @ Error::HookFailed { committed: true, .. }) => {
                    hooks = hooks.and(Err(error));
                    true
                }
                Err(mut error) => {
                    // The end of the scope rolls back whatever is open.
                    error.set_undo(&|_| Undo::RolledBack);
                    return Err(self.partly(error, index));
                }
            };
            if let Some(opened) = self.sessions.borrow_mut().get_mut(index) {
                opened.committed = committed;
            }
        }
        hooks
    }

    /// The error of the commit that failed, with what had been committed before it.
    fn partly(&self, error: Error, failed: usize) -> Error {
        let sessions = self.sessions.borrow();
        // Two databases of one application may have the same name.
        let name = |index: usize| format!("{} (number {} of the scope)", sessions[index].session.name(), index + 1);
        let committed: Vec<String> = (0..failed).filter(|&index| sessions[index].committed).map(name).collect();
        if committed.is_empty() {
            return error;
        }
        Error::PartialCommit { committed, failed: name(failed), source: Box::new(error) }
    }

    /// Removes the sessions. A hook may open one more on the way.
    fn remove_sessions(&self) {
        for _ in 0..REMOVAL_ROUNDS {
            let sessions = std::mem::take(&mut *self.sessions.borrow_mut());
            if sessions.is_empty() {
                return;
            }
            for Opened { session, .. } in sessions {
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

/// Runs `body` in a context of its own; what `decide` says of its result is committed.
fn run<C: SessionConnection, R>(
    app: &App<C>,
    settings: Settings,
    at: Place,
    body: impl FnOnce() -> R,
    decide: impl FnOnce(&R) -> bool,
) -> (R, Result<()>) {
    struct Removal<'f>(&'f Frame);

    impl Drop for Removal<'_> {
        fn drop(&mut self) {
            self.0.remove_sessions();
        }
    }

    let frame = Frame::new(app, settings);
    CURRENT.set(&frame, || {
        let removal = Removal(&frame);
        let out = body();
        let committed = if decide(&out) { frame.commit(at) } else { Ok(()) };
        drop(removal);
        (out, committed)
    })
}

pub(crate) fn enter<C: SessionConnection, R>(app: &App<C>, at: Place, body: impl FnOnce() -> R) -> R {
    run(app, Settings::DEFAULT, at, body, |_| false).0
}

/// How a context is entered and how it ends; made by [`App::scope`], used by [`run`](Self::run).
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

/// Whether a scope commits when its closure has returned `Ok`. Implemented by this crate's policies only.
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

    /// Commits when the closure returns `Ok`.
    pub fn commit_on_ok(self) -> Scope<C, CommitOnOk> {
        self.with_policy(CommitOnOk)
    }

    /// Commits when the closure returns `Ok(out)` and `decide(&out)` holds, such as a response with a status below 400. The
    /// closure's argument needs its type written down: `|response: &Response| ..`. It goes with every other choice of the
    /// scope, and comes last where those depend on a condition, because it changes the scope's type.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # struct Response { status: u16 }
    /// # fn handle() -> Result<Response, Error> { Ok(Response { status: 404 }) }
    /// # let app = DB.init_app("web", Config::new(":memory:"))?;
    /// let response = app.scope().commit_if(|response: &Response| response.status < 400).run(|| handle())?;
    /// assert_eq!(response.status, 404);       // answered, and rolled back
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
    /// Transactions that only read. On a SQLite file they run beside a writer, in its write-ahead log; `:memory:` has none, so
    /// there they wait for each other. This holds whatever else is chosen: of
    /// [`autocommit`](Self::autocommit) it leaves nothing.
    pub fn read_only(mut self) -> Self {
        self.settings.mode = Mode::ReadOnly;
        self
    }

    /// No transaction: every statement is committed by itself and holds a connection no longer than it runs.
    /// [`Session::transaction`](crate::Session::transaction), `savepoint` and `begin` begin one all the same.
    pub fn autocommit(mut self) -> Self {
        if self.settings.mode != Mode::ReadOnly {
            self.settings.mode = Mode::Autocommit;
        }
        self
    }

    /// The isolation level of the scope's transactions; the database's default otherwise.
    pub fn isolation(mut self, level: Isolation) -> Self {
        self.settings.isolation = Some(level);
        self
    }

    /// The time that the scope has from the call of [`run`](Self::run). Later statements are refused, waits for a connection or
    /// for a lock of SQLite end, and PostgreSQL and MariaDB end a statement that is still running.
    ///
    /// If the server does not answer 250 ms later (its process is frozen, the network is gone), the connection is cut on Linux. A
    /// statement then fails with [`Error::DeadlineExceeded`], and a `COMMIT` with [`Error::CommitUnknown`]. The rollback at the
    /// end of the context and the hooks of the pool are cut short in the same way. A statement of an
    /// [`autocommit`](Self::autocommit) scope that was cut may have been carried out.
    ///
    /// A `COMMIT` is not refused: it commits what was sent in time, even if the deadline has passed
    /// since, and the server then has 250 ms to answer. If rows are still to be flushed, they are not
    /// sent any more, and the commit is [`Error::DeadlineExceeded`].
    ///
    /// Limits: SQLite finishes the statement that it runs. The program's own code is not interrupted. On other systems than
    /// Linux, and if the connection's socket cannot be told from others (two connects at the same moment through a connection
    /// pooler), only the server ends a statement.
    pub fn deadline(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Makes a commit whose answer is lost one that can be asked for: [`Error::resolve`] then says whether it happened, on
    /// PostgreSQL 13 and newer. It costs one more round trip a transaction, right before `COMMIT`, for the transaction's number;
    /// other databases do not tell, so there it costs and changes nothing.
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

    /// PostgreSQL: the schemas in which the scope's statements look up the names of tables, types and functions, first come first
    /// served. Each transaction of the scope begins with it, in the message that has its `BEGIN`, and the connection goes back without
    /// it. This is how one application serves several tenants that have a schema each:
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
    /// A context serves one tenant. Its session knows rows by their key, so the rows of two tenants that have the same key would be one
    /// row to it: do not change the `search_path` inside a context, but enter another one. Types that columns of several tenants have,
    /// such as enums, belong in a schema that all tenants share, because a connection remembers the numbers of types by their names.
    ///
    /// [`create_all`](crate::App::create_all), [`drop_all`](crate::App::drop_all) and
    /// [`migrations`](crate::App::migrations) have a connection of their own and do not know the
    /// scope's `search_path`, so inside of such a scope they are refused. Migrate the schema of a
    /// tenant with an application of its own, whose connections have the `search_path`. The schema has
    /// to exist:
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
    /// The names are quoted, so they are taken as they are written. A schema that does not exist is passed over, as the server does.
    ///
    /// The first statement of a session is [`Error::InvalidConfig`] if its database is not PostgreSQL, or if the statement would run
    /// outside of a transaction in an [`autocommit`](Self::autocommit) scope.
    pub fn search_path<S: AsRef<str>>(mut self, schemas: impl IntoIterator<Item = S>) -> Self {
        self.settings.search_path = Some(DatabaseKind::search_path(schemas).into());
        self
    }

    /// Enters a context, runs `body` in it, commits where the scope's policy says so, and removes the context's sessions.
    /// `Err` and a panic roll back.
    ///
    /// # Errors
    /// Those of `body`; where it returned `Ok`, those of the commit, turned into `E`: see
    /// [`Session::commit`](crate::Session::commit), and [`Error::PartialCommit`] where several databases were used.
    #[track_caller]
    pub fn run<T, E: From<Error>>(self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        P: Policy<T>,
    {
        let mut settings = self.settings;
        // A limit beyond what the clock can count is none.
        settings.deadline =
            self.limit.and_then(|limit| Some(Deadline { end: Instant::now().checked_add(limit)?, limit }));
        let policy = self.policy;
        let (out, committed) =
            run(&self.app, settings, Location::caller(), body, |out| out.as_ref().is_ok_and(|out| policy.commits(out)));
        let out = out?;
        committed?;
        Ok(out)
    }
}
