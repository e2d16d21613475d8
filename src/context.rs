//! Contexts: which application and session belong to the running code.
//!
//! Each context is one frame on the stack of the thread that entered it. A context ends the same way by return, `?`
//! and panic: its sessions are removed inside the frame, and no hook can prevent that.

use std::any::Any;
use std::cell::RefCell;
use std::panic::Location;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app::{App, AppInner, ErasedApp};
use crate::connection::SessionConnection;
use crate::error::{Details, Error, Result, SourceLocation, Undo};
use crate::kind::DatabaseKind;
use crate::panic::{catch_panic, drop_catching_panic};
use crate::session::{Session, SessionInner};
use crate::settings::{Deadline, Isolation, Mode, Settings};

scoped_tls::scoped_thread_local!(static CURRENT: ContextFrame);

/// The number of rounds in which hooks of removed sessions may open further sessions.
const REMOVAL_ROUNDS: usize = 100;

pub(crate) struct ContextFrame {
    /// The entered application.
    entered: Arc<dyn ErasedApp>,
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
trait ErasedSession: Any {
    /// Returns whether there was anything to commit.
    fn commit(&self, at: SourceLocation) -> Result<bool>;
    /// The changes that the end of the session would lose, as a log line describes them.
    fn uncommitted(&self) -> Option<String>;
    fn end(&self);
    fn name(&self) -> String;
}

impl<C: SessionConnection> ErasedSession for SessionInner<C> {
    fn commit(&self, at: SourceLocation) -> Result<bool> {
        let has_work = self.in_transaction() || self.has_unflushed();
        SessionInner::commit(self, at).map(|()| has_work)
    }

    fn uncommitted(&self) -> Option<String> {
        SessionInner::uncommitted(self)
    }

    fn end(&self) {
        SessionInner::end(self);
    }

    fn name(&self) -> String {
        format!("app `{}` on {}", self.app().id(), self.app().options().target.shown)
    }
}

/// The application of the current context, as this database object sees it. `by_id` finds the database object's own
/// application.
pub(crate) fn app<C: SessionConnection>(
    database: u64,
    at: SourceLocation,
    by_id: impl FnOnce(&str) -> Result<App<C>>,
) -> Result<App<C>> {
    in_frame(at, |frame| frame.app(database, by_id))
}

/// The session of this context and database object. The first call opens it.
pub(crate) fn session<C: SessionConnection>(
    database: u64,
    at: SourceLocation,
    by_id: impl FnOnce(&str) -> Result<App<C>>,
) -> Result<Session<C>> {
    in_frame(at, |frame| {
        let sessions = frame.sessions.borrow();
        let open = sessions.iter().find(|opened| opened.database == database).map(|opened| Rc::clone(&opened.session));
        drop(sessions);
        let open = open.map(|session| session as Rc<dyn Any>);
        if let Some(inner) = open.and_then(|session| session.downcast::<SessionInner<C>>().ok()) {
            return Ok(Session(inner));
        }
        let opened = frame.open_session(database, at, by_id)?;
        let session = Rc::clone(&opened.0) as Rc<dyn ErasedSession>;
        let session = ContextSession { database, session, committed: false };
        let mut sessions = frame.sessions.borrow_mut();
        // Most contexts have one session, and an exact allocation costs less than one by `push`.
        match sessions.is_empty() {
            true => *sessions = vec![session],
            false => sessions.push(session),
        }
        Ok(opened)
    })
}

/// Whether this thread is in a scope with a `search_path` that applies to sessions of the application with this id.
pub(crate) fn has_search_path(app: &str) -> bool {
    CURRENT.is_set() && CURRENT.with(|frame| frame.entered.id() == app && frame.settings.search_path.is_some())
}

fn in_frame<T>(at: SourceLocation, f: impl FnOnce(&ContextFrame) -> Result<T>) -> Result<T> {
    if CURRENT.is_set() { CURRENT.with(f) } else { Err(Details::NoContext { at }.into()) }
}

impl ContextFrame {
    fn new<C: SessionConnection>(app: &App<C>, settings: Settings) -> Self {
        Self { entered: Arc::clone(app.inner()) as Arc<dyn ErasedApp>, settings, sessions: RefCell::default() }
    }

    /// The entered application. If it belongs to another database object, the application with the same id is meant.
    fn app<C: SessionConnection>(&self, database: u64, by_id: impl FnOnce(&str) -> Result<App<C>>) -> Result<App<C>> {
        let entered = Some(&self.entered).filter(|app| app.database() == database).map(Arc::clone);
        entered.and_then(App::of_erased).map_or_else(|| by_id(self.entered.id()), Ok)
    }

    /// Opens a session of the application that [`app`](Self::app) returns, without a handle of the application.
    fn open_session<C: SessionConnection>(
        &self,
        database: u64,
        at: SourceLocation,
        by_id: impl FnOnce(&str) -> Result<App<C>>,
    ) -> Result<Session<C>> {
        let settings = self.settings.clone();
        match (&*self.entered as &dyn Any).downcast_ref::<AppInner<C>>() {
            Some(app) if app.database() == database => app.open_session(settings, at),
            _ => by_id(self.entered.id())?.inner().open_session(settings, at),
        }
    }

    /// Commits the sessions in the order in which they were opened.
    fn commit(&self, at: SourceLocation) -> Result<()> {
        let mut hook_outcome = Ok(());
        // A hook may open a further session.
        for index in 0.. {
            let session = self.sessions.borrow().get(index).map(|opened| Rc::clone(&opened.session));
            let Some(session) = session else { break };
            let committed = match session.commit(at) {
                Ok(had_work) => had_work,
                Err(error) if error.is_hook_failure_after_commit() => {
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
        Error::from(Details::PartialCommit { committed, failed: name(failed), source: error })
    }

    /// Warns of changes that the end of the context, which was entered `at`, is about to lose. Several sessions with
    /// such changes are one warning.
    fn warn_of_uncommitted_changes(&self, at: SourceLocation) {
        if log::max_level() < log::Level::Warn {
            return;
        }
        let sessions: Vec<_> = self.sessions.borrow().iter().map(|opened| Rc::clone(&opened.session)).collect();
        let mut losing = sessions.iter().filter_map(|session| Some((session, session.uncommitted()?)));
        let Some((session, changes)) = losing.next() else { return };
        let others = match losing.count() {
            0 => String::new(),
            others => format!(", and so are those of {others} more of its databases"),
        };
        crate::wording::log_line!(
            warn,
            "diesel_session::session",
            "{}: changes of the context entered at {at} are rolled back, because nothing has committed them{others}: \
             {changes}. Call `commit()`, enter the context with `App::run`, or discard the changes on purpose with \
             `Scope::discard()`.",
            session.name()
        );
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
            self.entered.id()
        );
    }
}

/// What happens to the changes of a context whose closure has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Commit,
    /// The changes are rolled back. Nobody has decided this, so a warning is logged.
    Forget,
    Discard,
}

/// Runs `body` in a new context. `ending` decides what happens to its changes; the result of a commit is the second
/// result. If `discards`, the context logs no warning about changes that it loses.
fn run_in_context<C: SessionConnection, R>(
    app: &App<C>,
    settings: Settings,
    discards: bool,
    at: SourceLocation,
    body: impl FnOnce() -> R,
    ending: impl FnOnce(&R) -> Ending,
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
        let ending = ending(&out);
        let committed = if ending == Ending::Commit { frame.commit(at) } else { Ok(()) };
        if ending != Ending::Discard && !discards && committed.is_ok() {
            frame.warn_of_uncommitted_changes(at);
        }
        drop(removal);
        (out, committed)
    })
}

/// Runs `body` in a new context. `ending` decides how the context ends if `body` returns `Ok`.
fn run_scope<C: SessionConnection, T, E: From<Error>>(
    app: &App<C>,
    settings: Settings,
    discards: bool,
    at: SourceLocation,
    body: impl FnOnce() -> Result<T, E>,
    ending: impl FnOnce(&T) -> Ending,
) -> Result<T, E> {
    let (out, committed) = run_in_context(app, settings, discards, at, body, |out| match out {
        Ok(out) => ending(out),
        // The program gives its work up.
        Err(_) => Ending::Discard,
    });
    let out = out?;
    committed?;
    Ok(out)
}

impl<C: SessionConnection> App<C> {
    /// Runs `body` in a context of this application and commits if `body` returns `Ok`. An `Err` and a panic roll
    /// back. [`scope`](Self::scope) has more options.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # let app = DB.init_app("run", Config::new(":memory:").max_size(1))?;
    /// # app.run(|| DB.session()?.execute(diesel::sql_query("CREATE TABLE users (id INTEGER PRIMARY KEY)")))?;
    /// app.run(|| {
    ///     DB.session()?.execute(diesel::insert_into(users::table).values(users::id.eq(1)))?;
    ///     Ok(())
    /// })?;
    /// assert_eq!(app.run(|| DB.session()?.count(users::table))?, 1);
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `body`; if `body` returned `Ok`, those of the commit: see [`Session::commit`], and
    /// [`ErrorKind::PartialCommit`](crate::ErrorKind::PartialCommit) if several databases were used.
    #[track_caller]
    pub fn run<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        let settings = Settings { commits: true, ..Settings::DEFAULT };
        run_scope(self, settings, false, Location::caller(), body, |_| Ending::Commit)
    }

    /// Runs `body` in a context of this application and commits nothing by itself: `body` calls
    /// [`Session::commit`]. Uncommitted work is rolled back when `body` returns or panics.
    ///
    /// If `body` returns `Ok` and has left changes that were neither committed nor rolled back, the log has a warning
    /// with the source locations of the context and of the changes. [`Scope::discard`] prevents the warning.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # let app = DB.init_app("context", Config::new(":memory:").max_size(1))?;
    /// # app.run(|| DB.session()?.execute(diesel::sql_query("CREATE TABLE users (id INTEGER PRIMARY KEY)")))?;
    /// app.context(|| {
    ///     let session = DB.session()?;
    ///     session.execute(diesel::insert_into(users::table).values(users::id.eq(1)))?;
    ///     session.commit()?;
    ///     // More statements begin the next transaction.
    ///     Ok(())
    /// })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `body`.
    #[track_caller]
    pub fn context<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        run_scope(self, Settings::DEFAULT, false, Location::caller(), body, |_| Ending::Forget)
    }

    /// Runs a closure with a result of any type in a context of this application. Otherwise like
    /// [`context`](Self::context), but every result counts as a success.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # let app = DB.init_app("enter", Config::new(":memory:"))?;
    /// let id: String = app.enter(|| DB.current_app().map_or_else(|error| error.to_string(), |app| app.id().into()));
    /// assert_eq!(id, "enter");
    /// # Ok::<(), Error>(())
    /// ```
    #[track_caller]
    pub fn enter<R>(&self, body: impl FnOnce() -> R) -> R {
        run_in_context(self, Settings::DEFAULT, false, Location::caller(), body, |_| Ending::Forget).0
    }

    /// The options of a context: its isolation level, its deadline and more.
    pub fn scope(&self) -> Scope<C> {
        Scope { app: self.clone(), settings: Settings::DEFAULT, limit: None, discards: false }
    }

    /// Like [`enter`](Self::enter), without a warning of uncommitted changes.
    #[cfg(feature = "testing")]
    pub(crate) fn enter_and_discard<R>(&self, at: SourceLocation, body: impl FnOnce() -> R) -> R {
        run_in_context(self, Settings::DEFAULT, true, at, body, |_| Ending::Discard).0
    }
}

/// The options of a context. [`App::scope`] makes a scope. The last method of the scope enters the context and decides
/// the commit: [`run`](Self::run), [`run_and_commit`](Self::run_and_commit) or
/// [`run_and_commit_if`](Self::run_and_commit_if).
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
#[must_use = "a scope does nothing until it is run"]
pub struct Scope<C: SessionConnection> {
    app: App<C>,
    settings: Settings,
    limit: Option<Duration>,
    discards: bool,
}

/// Options.
impl<C: SessionConnection> Scope<C> {
    /// The scope's transactions only read. On a SQLite file they run beside a writer, thanks to the write-ahead log.
    /// `:memory:` has no such log, so there a reader and a writer wait for each other. The option overrides
    /// [`autocommit`](Self::autocommit), in any order.
    pub fn read_only(mut self) -> Self {
        self.settings.mode = Mode::ReadOnly;
        self
    }

    /// The scope has no transaction: every statement is committed by itself and holds a connection only while it
    /// runs. [`Session::transaction`](crate::Session::transaction), `savepoint` and `begin` begin a transaction all
    /// the same. Behind a pooler in transaction mode, some statements have a transaction of their own; see
    /// [`Behind`](crate::pool::Behind).
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

    /// The first statement of the scope begins the transaction. Without this option, a default scope sends its reads
    /// outside of a transaction until the first statement that does more:
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # let app = DB.init_app("eagerly", Config::new(":memory:").max_size(1))?;
    /// # app.run(|| DB.session()?.execute(diesel::sql_query("CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT)")))?;
    /// app.run(|| {
    ///     let session = DB.session()?;
    ///     let users = session.count(users::table)?;
    ///     assert!(!session.in_transaction());              // the read was one round trip
    ///     session.execute(diesel::insert_into(users::table).values((users::id.eq(1), users::name.eq("Ada"))))?;
    ///     assert!(session.in_transaction());               // `BEGIN` was sent before the INSERT
    ///     Ok(users)
    /// })?;
    /// app.scope().begin_eagerly().run_and_commit(|| {
    ///     let session = DB.session()?;
    ///     session.count(users::table)?;
    ///     assert!(session.in_transaction());
    ///     Ok::<_, Error>(())
    /// })?;
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// **What is sent outside.** Typed SELECTs that take no lock and call no function and no SQL fragment of the
    /// program; on SQLite, where a function cannot write, all typed SELECTs. The session reads the SQL of a boxed query
    /// and of an `as_select()`; an enum of connections cannot build that SQL without its connection, so there such a
    /// query begins the transaction. Everything else begins it: writes, raw SQL, [`with`](crate::Session::with),
    /// [`connection`](crate::Session::connection), `begin`, `transaction`, `savepoint`, `retry`, and a flush that has
    /// something to send.
    ///
    /// **When.** On SQLite always. On PostgreSQL, MySQL and MariaDB if the transaction would run under READ COMMITTED,
    /// where each statement sees what is committed at that moment: by [`isolation`](Self::isolation), or by the default
    /// of the server, the database, the role or [`Database::on_connect`](crate::Database::on_connect), for which each
    /// new connection is asked. MySQL and MariaDB have a stricter default. A change by
    /// [`Database::on_checkout`](crate::Database::on_checkout) is not noticed. A scope with a
    /// [`search_path`](Self::search_path) always begins eagerly, and so does a scope with a time limit behind a pooler
    /// in transaction mode.
    ///
    /// **Differences.** A program can see the following differences between the two:
    ///
    /// | | default | `begin_eagerly` |
    /// |---|---|---|
    /// | connection between two reads | none: each read checks one out | the transaction keeps it |
    /// | `now()` of PostgreSQL | advances between two reads | is the time of the `BEGIN` |
    /// | a SELECT that fails on PostgreSQL | the scope goes on | the transaction is aborted |
    /// | `SET LOCAL` before a read | needs `begin` or a write before it | applies to all later reads |
    /// | `begin` after a read | begins the transaction; rows are read again inside | is [`AlreadyBegun`](crate::ErrorKind::AlreadyBegun) |
    /// | `transaction` after a read | rows are read again inside | joins the transaction |
    /// | `retry` after a read | begins the transaction; rows are read again inside | is [`NotRepeatable`](crate::ErrorKind::NotRepeatable) |
    /// | a connection that was lost while it was idle | the first read fails, and is transient | the `BEGIN` is sent on another one |
    /// | a SELECT of a view whose function writes | the writes are committed at once | the transaction contains the writes |
    /// | isolation on SQLite | other programs may write between a read and the first write | they wait from the first statement on |
    pub fn begin_eagerly(mut self) -> Self {
        self.settings.begins_eagerly = true;
        self
    }

    /// The time limit of the scope, counted from the call that runs it. After it, statements are refused,
    /// and waits for a connection or for a lock of SQLite end. PostgreSQL and MariaDB end a statement that is still
    /// running.
    ///
    /// If the server does not answer within further 250 ms (its process is frozen, the network is down), the connection
    /// is cut on Linux. A statement then fails with
    /// [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded), and a `COMMIT` with
    /// [`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown). The rollback at the end of the context and the
    /// hooks of the pool are cut short in the same way. If a statement of an [`autocommit`](Self::autocommit) scope was
    /// cut, the server may have carried it out.
    ///
    /// A `COMMIT` is not refused: it commits the statements that were sent in time, even if the deadline has passed
    /// since, and the server then has 250 ms to answer. Changes that were not flushed before the deadline are not sent,
    /// and the commit is [`ErrorKind::DeadlineExceeded`](crate::ErrorKind::DeadlineExceeded).
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
    /// # use diesel_session::{App, Error};
    /// # use diesel_session::session::CommitOutcome;
    /// # use diesel::prelude::*;
    /// # fn place_order() -> Result<(), Error> { Ok(()) }
    /// # fn order(app: &App<SqliteConnection>) -> Result<(), Error> {
    /// match app.scope().resolvable().run_and_commit(place_order) {
    ///     Err(error) if error.is_commit_unknown() => match error.resolve()? {
    ///         CommitOutcome::Committed => Ok(()),
    ///         CommitOutcome::RolledBack => app.run(place_order),
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
    /// app.scope().search_path([tenant, "public"]).run_and_commit(handle)
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
    ///     let config = config.connection_init_sql(format!("SET search_path = \"{quoted}\", public"));
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
    /// The first statement of a session is [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if the
    /// database is not PostgreSQL, or if the statement would run outside of a transaction in an
    /// [`autocommit`](Self::autocommit) scope.
    pub fn search_path<S: AsRef<str>>(mut self, schemas: impl IntoIterator<Item = S>) -> Self {
        self.settings.search_path = Some(DatabaseKind::search_path(schemas).into());
        self
    }

    /// The scope discards its uncommitted changes on purpose, so the log has no warning about them.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # let app = DB.init_app("discard", Config::new(":memory:").max_size(1))?;
    /// # app.run(|| DB.session()?.execute(diesel::sql_query("CREATE TABLE users (id INTEGER PRIMARY KEY)")))?;
    /// let deleted = app.scope().discard().run(|| DB.session()?.execute(diesel::delete(users::table)))?;
    /// println!("a deletion would delete {deleted} users");
    /// # app.dispose()?;
    /// # Ok::<(), Error>(())
    /// ```
    pub fn discard(mut self) -> Self {
        self.discards = true;
        self
    }
}

/// Entering the context.
impl<C: SessionConnection> Scope<C> {
    /// Enters a context, runs `body` in it and removes the context's sessions. Unlike [`App::run`] it commits nothing:
    /// uncommitted work is rolled back, and [`run_and_commit`](Self::run_and_commit) commits it. A closure that ends in
    /// `Ok(())` has to name its error type: `Ok::<(), diesel_session::Error>(())`. As in [`App::context`], the log
    /// warns of uncommitted changes if `body` returns `Ok`.
    ///
    /// ```
    /// # use diesel_session::{App, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # fn report(app: &App<SqliteConnection>) -> Result<(), Box<dyn std::error::Error>> {
    /// let users = app.scope().read_only().run(|| DB.session()?.count(users::table))?;
    /// # let _ = users;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `body`.
    #[track_caller]
    pub fn run<T, E: From<Error>>(self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.enter(Location::caller(), body, |_| Ending::Forget)
    }

    /// Enters a context, runs `body` in it, commits if `body` returns `Ok`, and removes the context's sessions. `Err`
    /// and a panic roll back. [`App::run`] does the same without options.
    ///
    /// ```
    /// # use diesel_session::{App, Database, Error};
    /// # use diesel_session::session::Isolation;
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # fn clear(app: &App<SqliteConnection>) -> Result<(), Box<dyn std::error::Error>> {
    /// app.scope()
    ///     .isolation(Isolation::Serializable)
    ///     .run_and_commit(|| DB.session()?.execute(diesel::delete(users::table)))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of `body`; if `body` returned `Ok`, those of the commit, turned into `E`: see [`Session::commit`], and
    /// [`ErrorKind::PartialCommit`](crate::ErrorKind::PartialCommit) if several databases were used.
    #[track_caller]
    pub fn run_and_commit<T, E: From<Error>>(mut self, body: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.settings.commits = true;
        self.enter(Location::caller(), body, |_| Ending::Commit)
    }

    /// Like [`run_and_commit`](Self::run_and_commit), but commits only if `body` returns `Ok(out)` and
    /// `decide(&out)` is `true`, for example for a response with a status below 400. If `decide` is `false`, the work
    /// is rolled back and `Ok(out)` is returned. A panic of `decide` rolls back. Write down the type of its argument,
    /// because the compiler reads `decide` before `body`.
    ///
    /// ```
    /// # use diesel_session::{Config, Database, Error};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # struct Response { status: u16 }
    /// # fn handle() -> Result<Response, Error> { Ok(Response { status: 404 }) }
    /// # let app = DB.init_app("web", Config::new(":memory:"))?;
    /// let response = app.scope().run_and_commit_if(|response: &Response| response.status < 400, || handle())?;
    /// assert_eq!(response.status, 404);       // the response is returned, and the work is rolled back
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`run_and_commit`](Self::run_and_commit).
    #[track_caller]
    pub fn run_and_commit_if<T, E: From<Error>>(
        mut self,
        decide: impl FnOnce(&T) -> bool,
        body: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        self.settings.commits = true;
        self.enter(Location::caller(), body, |out| if decide(out) { Ending::Commit } else { Ending::Discard })
    }

    /// Runs `body` in a context. `ending` decides how the context ends if `body` returns `Ok`.
    fn enter<T, E: From<Error>>(
        self,
        at: SourceLocation,
        body: impl FnOnce() -> Result<T, E>,
        ending: impl FnOnce(&T) -> Ending,
    ) -> Result<T, E> {
        let Self { app, mut settings, limit, discards } = self;
        // A limit beyond the range of the clock is no limit.
        settings.deadline = limit.and_then(|limit| Some(Deadline { end: Instant::now().checked_add(limit)?, limit }));
        run_scope(&app, settings, discards, at, body, ending)
    }
}
