//! The database object: what `db = SQLAlchemy()` is to a Flask program.

use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diesel::migration::MigrationSource;
use diesel::result::{ConnectionResult, QueryResult};
use diesel_migrations::EmbeddedMigrations;

use crate::app::{App, AppIdentity};
use crate::app_hooks::AppHooks;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::context;
use crate::dispose::{TIMEOUT, dispose_each};
use crate::error::{AppEnd, Details, DisposeReport, Error, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::migrations::{PerBackend, Sources};
use crate::pool::{AppStatus, PerProcessLimit, PoolOptions};
use crate::registry::Registry;
use crate::session::{ChangeEvent, Session};
use crate::unit_of_work::Changes;
use crate::url::Target;
use crate::wording::{is_unprintable, name};

/// The database object of a program: its migrations, and the registry of its applications. It is intended to be
/// stored in a `static`.
///
/// ```
/// use diesel::prelude::*;
/// use diesel_session::{Config, Database};
///
/// static DB: Database<SqliteConnection> = Database::without_migrations();
///
/// let app = DB.init_app("shop", Config::new(":memory:"))?;
/// app.context(|| DB.session()?.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn, "SELECT 1")))?;
/// app.dispose()?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// `C` is the connection type. `M` is the type of the migrations: any [`MigrationSource`]; the default is
/// [`EmbeddedMigrations`].
///
/// A second database of the same applications is a second `static`, with its own `C`, URL and migrations. In a
/// context of an application, each database object has its own session.
pub struct Database<C: SessionConnection, M = EmbeddedMigrations> {
    pub(crate) registry: Registry<C>,
    /// The migrations, until the first application is registered. Then `migrations` holds them.
    sources: Mutex<Option<Sources<M>>>,
    /// Made with the first application.
    identity: OnceLock<Arc<AppIdentity<C>>>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) hooks: AppHooks<C>,
    max_connections: Option<usize>,
    limit: OnceLock<Arc<PerProcessLimit>>,
}

impl<C: SessionConnection, M> std::fmt::Debug for Database<C, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let apps: Vec<String> = self.registry.all().iter().map(|app| app.id().to_owned()).collect();
        f.debug_struct("Database").field("apps", &apps).finish_non_exhaustive()
    }
}

impl<C: SessionConnection, M> std::panic::UnwindSafe for Database<C, M> {}
impl<C: SessionConnection, M> std::panic::RefUnwindSafe for Database<C, M> {}

impl<C: SessionConnection> Database<C> {
    /// A database object for a schema that this program does not manage: `create_all` and `drop_all` return errors.
    #[track_caller]
    pub const fn without_migrations() -> Self {
        Self::from_sources(Sources::None)
    }
}

impl<C: SessionConnection, M> Database<C, M> {
    /// A database object with the program's migrations.
    #[track_caller]
    pub const fn new(migrations: M) -> Self {
        Self::from_sources(Sources::One(migrations))
    }

    /// A database object with migrations for each kind of database, for an enum of connections. The same SQL text
    /// rarely works on two kinds of database.
    ///
    /// ```
    /// use diesel::prelude::*;
    /// use diesel_migrations::{EmbeddedMigrations, embed_migrations};
    /// use diesel_session::Database;
    /// use diesel_session::migrations::PerBackend;
    ///
    /// const SQLITE: EmbeddedMigrations = embed_migrations!("migrations/sqlite");
    /// const POSTGRES: EmbeddedMigrations = embed_migrations!("migrations/postgres");
    ///
    /// static DB: Database<SqliteConnection> =
    ///     Database::per_backend(PerBackend { sqlite: Some(SQLITE), postgres: Some(POSTGRES), mysql: None });
    /// ```
    #[track_caller]
    pub const fn per_backend(migrations: PerBackend<M>) -> Self {
        Self::from_sources(Sources::PerBackend(migrations))
    }

    /// The maximum number of connections that all applications of this database object have open at one time, on all
    /// servers together, including the connections of `create_all` and `drop_all`. If the limit is reached, a caller
    /// that needs a connection evicts the idle connection of the least recently used application. If no connection is
    /// idle, callers wait in order, and get
    /// [`ErrorKind::ConnectionLimitReached`](crate::ErrorKind::ConnectionLimitReached) after their `acquire_timeout`.
    ///
    /// The limit of the database server is respected without this option: if the server refuses a connection, an idle
    /// connection of this process is closed, whatever its application. Set a limit if other programs need the server
    /// too. A forked process counts its own connections only.
    pub const fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = Some(connections);
        self
    }

    /// Connects with a function of the program, for example one that picks the variant of an enum of connections by
    /// the URL. The function receives the configured URL with the parameters that the library adds. For SQLite in
    /// memory the URL starts with `file:`.
    ///
    /// Without it, the enum's own `establish` is used, which tries every variant in turn and gives no reason if all
    /// fail.
    ///
    /// ```
    /// # #[cfg(all(feature = "postgres", feature = "sqlite"))]
    /// # mod program {
    /// use diesel::prelude::*;
    /// use diesel_session::{Config, Database};
    ///
    /// #[derive(diesel::MultiConnection)]
    /// pub enum AnyConnection {
    ///     Postgres(PgConnection),
    ///     Sqlite(SqliteConnection),
    /// }
    ///
    /// fn connect(url: &str) -> ConnectionResult<AnyConnection> {
    ///     // Files and `:memory:` never start with it. libpq's `host=..` form would need a branch of its own.
    ///     if url.starts_with("postgres") {
    ///         PgConnection::establish(url).map(AnyConnection::Postgres)
    ///     } else {
    ///         SqliteConnection::establish(url).map(AnyConnection::Sqlite)
    ///     }
    /// }
    ///
    /// static DB: Database<AnyConnection> = Database::without_migrations().connect_with(connect);
    ///
    /// pub fn main() -> diesel_session::Result<()> {
    ///     let app = DB.init_app("any", Config::new(":memory:"))?;
    ///     app.ping()?;
    ///     app.dispose()
    /// }
    /// # }
    /// # #[cfg(all(feature = "postgres", feature = "sqlite"))]
    /// # fn main() { program::main().unwrap() }
    /// # #[cfg(not(all(feature = "postgres", feature = "sqlite")))]
    /// # fn main() {}
    /// ```
    ///
    /// The kind of database is recognised by the URL: `postgres://`, `mysql://`, `sqlite:`, `file:`, `:memory:`,
    /// libpq's `keyword=value` form, or a path that ends in `.sqlite`, `.sqlite3` or `.db`.
    pub const fn connect_with(mut self, connect: fn(&str) -> ConnectionResult<C>) -> Self {
        self.connect_with = Some(connect);
        self
    }

    /// Runs on every new connection of every application, which is the first argument, after the library's own settings
    /// and [`Config::connection_init_sql`]. On PostgreSQL it also runs after each reset of a connection
    /// ([`Config::reset`]), so it must be idempotent. The library replaces an instrumentation that the function sets;
    /// the library's instrumentation passes events on to that of [`diesel::connection::set_default_instrumentation`].
    ///
    /// An error or a panic fails the connect. On MySQL and MariaDB a statement whose text is empty panics. The function
    /// must not use this database object: its pool is waiting for this very connection. On Linux the connection is cut
    /// if the server has not answered after [`Config::connect_timeout`].
    ///
    /// Behind a pooler in transaction mode ([`Config::behind`]) the function must not set anything for the session on
    /// the server, which the pooler gives to other clients too.
    ///
    /// ```
    /// # #[cfg(feature = "sqlite")]
    /// # mod program {
    /// use diesel::connection::SimpleConnection;
    /// use diesel::prelude::*;
    /// use diesel_session::Database;
    ///
    /// static DB: Database<SqliteConnection> =
    ///     Database::without_migrations().on_connect(|_, conn| conn.batch_execute("PRAGMA cache_size = -8000"));
    /// # }
    /// ```
    pub const fn on_connect(mut self, prepare: fn(&App<C>, &mut C) -> QueryResult<()>) -> Self {
        self.hooks.on_connect = Some(prepare);
        self
    }

    /// Runs at each checkout of a connection, on the holder's thread, before the transaction begins. The first argument
    /// is the application, so one hook serves many tenants. The hook also runs for [`App::ping`](crate::App::ping) and
    /// the operations on the schema, but not when the pool itself checks its idle connections.
    ///
    /// A setting that the hook makes on the connection does not count as something that the holder left:
    /// [`on_checkin`](Self::on_checkin) undoes the setting, or the next `on_checkout` makes it anew. The hook has no
    /// time limit of its own, and it must not use this database object.
    ///
    /// After an error, a panic or an open transaction, the connection is closed and the caller gets
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed). If the connection turns out to be lost, another one is
    /// tried.
    ///
    /// ```
    /// use diesel::connection::SimpleConnection;
    /// use diesel::prelude::*;
    /// use diesel_session::{App, Database};
    ///
    /// fn careful(_: &App<SqliteConnection>, conn: &mut SqliteConnection) -> QueryResult<()> {
    ///     conn.batch_execute("PRAGMA cell_size_check = 1")
    /// }
    ///
    /// fn careless(_: &App<SqliteConnection>, conn: &mut SqliteConnection) -> QueryResult<()> {
    ///     conn.batch_execute("PRAGMA cell_size_check = 0")
    /// }
    ///
    /// static DB: Database<SqliteConnection> =
    ///     Database::without_migrations().on_checkout(careful).on_checkin(careless);
    /// # let app = DB.init_app("hooks", diesel_session::Config::new(":memory:"))?;
    /// # app.ping()?;
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    pub const fn on_checkout(mut self, hook: fn(&App<C>, &mut C) -> QueryResult<()>) -> Self {
        self.hooks.on_checkout = Some(hook);
        self
    }

    /// Runs on checkin, after the reset, if the connection stays in the pool. It does not run if the connection is
    /// closed instead, for example on MySQL, MariaDB and SQLite after raw SQL that may have left something, or with
    /// [`Reset::Always`](crate::pool::Reset::Always).
    ///
    /// The hook runs on the holder's thread. On PostgreSQL, MySQL and MariaDB the connection is cut if the server has
    /// not answered within [`Config::connect_timeout`]. The hook must not use this database object.
    ///
    /// After an error, a panic or an open transaction, the connection is closed and a warning is logged, because the
    /// holder has already checked it in.
    pub const fn on_checkin(mut self, hook: fn(&App<C>, &mut C) -> QueryResult<()>) -> Self {
        self.hooks.on_checkin = Some(hook);
        self
    }

    /// Runs before a connection is closed, for whatever reason, on the thread that closes it: a thread of the pool,
    /// the thread of the holder, the thread that evicts it, or the thread that disposes of the application. The hook
    /// must not wait, because the connection may be lost, and it must not use this database object. It does not run
    /// for a connection on which [`on_connect`](Self::on_connect) failed, because that connection was never in use. If
    /// the program has dropped all handles of the application, the handle that the hook gets still has the id, and
    /// answers [`ErrorKind::Disposed`](crate::ErrorKind::Disposed).
    ///
    /// A panic is contained and logged as a warning.
    pub const fn on_close(mut self, hook: fn(&App<C>, &mut C)) -> Self {
        self.hooks.on_close = Some(hook);
        self
    }

    /// Runs before every flush of every session that has something to send, with the application and the changes, and
    /// before the
    /// session's own [`before_flush`](Session::before_flush) hooks. The hook may change rows, for example a column
    /// that names the last writer; the same flush sends these changes. An `Err` or panic of the hook prevents the
    /// flush.
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel_session::{App, Database, Entity, Result, Session};
    /// # use diesel_session::unit_of_work::{ChangeKind, Changes};
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
    /// # struct User { #[entity(generated)] id: i32, name: String }
    /// fn trim_names(_: &App<SqliteConnection>, _: &Session<SqliteConnection>, changes: &Changes) -> Result<()> {
    ///     for (kind, user) in changes.of::<User>() {
    ///         if kind == ChangeKind::Update {
    ///             user.update(|user| user.name = user.name.trim().into());
    ///         }
    ///     }
    ///     Ok(())
    /// }
    ///
    /// static DB: Database<SqliteConnection> = Database::without_migrations().before_flush(trim_names);
    /// ```
    pub const fn before_flush(mut self, hook: fn(&App<C>, &Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.on_changes[ChangeEvent::BeforeFlush as usize] = Some(hook);
        self
    }

    /// Runs after every flush of every session, inside the transaction, with the changes that were sent, for example
    /// to write a journal. Rows that the hook adds wait for the next flush. A commit flushes until no changes are
    /// left, at most a hundred times.
    pub const fn after_flush(mut self, hook: fn(&App<C>, &Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.on_changes[ChangeEvent::AfterFlush as usize] = Some(hook);
        self
    }

    /// Runs before every commit of a transaction in which rows were flushed, with the changes, each row once.
    /// [`Session::before_commit`] is a hook of one session and one commit. Changes
    /// that a savepoint has undone are not among them. An `Err` or panic of the hook prevents the commit. The commit
    /// includes rows that the hook changes; the hook does not run again for those.
    #[doc(alias = "before_commit")]
    pub const fn before_commit_of_changes(mut self, hook: fn(&App<C>, &Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.on_changes[ChangeEvent::BeforeCommit as usize] = Some(hook);
        self
    }

    /// Runs after every commit of a transaction in which rows were flushed, when the connection has been checked in. An
    /// `Err` or panic of the hook becomes [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of the commit,
    /// although the transaction is committed.
    #[doc(alias = "after_commit")]
    pub const fn after_commit_of_changes(mut self, hook: fn(&App<C>, &Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.on_changes[ChangeEvent::AfterCommit as usize] = Some(hook);
        self
    }

    /// Runs after every rollback of a transaction in which rows were flushed, with the changes; also at the end of a
    /// context that did not commit. An `Err` or panic of the hook is logged. It is also
    /// [`ErrorKind::HookFailed`](crate::ErrorKind::HookFailed) of [`Session::rollback`] and [`Session::remove`],
    /// although the transaction is rolled back.
    #[doc(alias = "after_rollback")]
    pub const fn after_rollback_of_changes(mut self, hook: fn(&App<C>, &Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.on_changes[ChangeEvent::AfterRollback as usize] = Some(hook);
        self
    }

    #[track_caller]
    const fn from_sources(sources: Sources<M>) -> Self {
        Self {
            registry: Registry::new(Location::caller()),
            sources: Mutex::new(Some(sources)),
            identity: OnceLock::new(),
            connect_with: None,
            hooks: AppHooks::NONE,
            max_connections: None,
            limit: OnceLock::new(),
        }
    }
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static> Database<C, M> {
    /// Registers an application. It opens no connection.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyRegistered`](crate::ErrorKind::AlreadyRegistered);
    /// [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) for an empty id, options that cannot work, and a
    /// URL that is malformed or is for another kind of database.
    pub fn init_app(&self, id: impl Into<String>, config: Config) -> Result<App<C>> {
        self.registry.add(self.new_app(self.options(id.into(), config)?))
    }

    /// The application with this id. If there is none, makes it with `config`, runs `init`, and registers it when
    /// `init` has succeeded. The value that `init` returns is dropped. Other threads that ask for the same id wait
    /// until `init` has returned, without a limit of their own. So a program that learns of its tenants at run time
    /// registers each of them once, with its schema.
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel_session::{Config, Database};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// let app = DB.get_or_init_app("acme", || Config::new(":memory:"), |app| app.ping())?;       // or `create_all`
    /// assert_eq!(app.id(), "acme");
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of `init`, after which the application is disposed of and not registered; the errors of
    /// [`init_app`](Self::init_app); [`ErrorKind::InvalidConfig`](crate::ErrorKind::InvalidConfig) if `init` asks for
    /// the same application.
    pub fn get_or_init_app<T, E: From<Error>>(
        &self,
        id: impl Into<String>,
        config: impl FnOnce() -> Config,
        init: impl FnOnce(&App<C>) -> Result<T, E>,
    ) -> Result<App<C>, E> {
        let id = id.into();
        let _initialisation = match self.registry.get_or_initialise(&id)? {
            Ok(app) => return Ok(app),
            Err(initialisation) => initialisation,
        };
        let app = self.new_app(self.options(id.clone(), config())?);
        let unpublished = Unpublished(&app);
        init(&app)?;
        let app = self.registry.add(app.clone())?;
        std::mem::forget(unpublished);
        Ok(app)
    }

    /// Makes an application without registering it.
    pub(crate) fn new_app(&self, options: PoolOptions<C>) -> App<C> {
        App::new(options, &self.hooks, Arc::clone(self.identity()))
    }

    /// Makes an application without the hooks and the limit of the database object, and does not register it.
    pub(crate) fn new_bare_app(&self, id: String, config: Config) -> Result<App<C>> {
        let options = PoolOptions { connection_limit: None, ..self.options(id, config)? };
        Ok(App::new(options, &AppHooks::NONE, Arc::clone(self.identity())))
    }

    pub(crate) fn options(&self, id: String, config: Config) -> Result<PoolOptions<C>> {
        let invalid = |reason| Error::from(Details::InvalidConfig { app: name(&id), reason });
        if id.is_empty() || id.len() > 200 || id.contains(is_unprintable) {
            return Err(invalid("an application id has 1 to 200 bytes and no characters that cannot be seen".into()));
        }
        if let Some(problem) = config.problem() {
            return Err(invalid(problem));
        }
        if self.max_connections == Some(0) {
            return Err(invalid("`Database::max_connections` is 0; it takes 1 or more".into()));
        }
        let kind = DatabaseKind::of_type::<C>();
        let target = Target::parse(&config.url, kind).map_err(invalid)?;
        if config.connection_init_sql.iter().any(|sql| target.kind.is_blank(sql)) {
            return Err(invalid(
                "`Config::connection_init_sql` was given SQL without a statement; leave it out".into(),
            ));
        }
        if let Some(problem) = config.problem_behind_pooler(&target) {
            return Err(invalid(problem));
        }
        Ok(PoolOptions {
            connection_limit: self
                .max_connections
                .map(|most| Arc::clone(self.limit.get_or_init(|| Arc::new(PerProcessLimit::new(most))))),
            connect_with: self.connect_with,
            ..PoolOptions::new(id.into(), config, target)
        })
    }

    /// The number of the database object, and its migrations.
    pub(crate) fn identity(&self) -> &Arc<AppIdentity<C>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        self.identity.get_or_init(|| {
            let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner).take();
            let migrations = Box::new(sources.expect("taken here only, and this runs once"));
            Arc::new(AppIdentity { database: NEXT.fetch_add(1, Ordering::Relaxed), migrations })
        })
    }
}

impl<C: SessionConnection, M> Database<C, M> {
    /// The application with this id.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownApp`](crate::ErrorKind::UnknownApp).
    #[track_caller]
    pub fn app(&self, id: &str) -> Result<App<C>> {
        self.registry.get(id, Location::caller())
    }

    /// The application whose context this thread is in. The handle can be moved to another thread and be entered
    /// there.
    ///
    /// # Errors
    /// [`ErrorKind::NoContext`](crate::ErrorKind::NoContext); [`ErrorKind::UnknownApp`](crate::ErrorKind::UnknownApp)
    /// if this database object does not know the application of the context.
    #[track_caller]
    pub fn current_app(&self) -> Result<App<C>> {
        let at = Location::caller();
        self.app_of_context(at)
    }

    /// The session of the context that this thread is in. Every call returns the same session, until the context
    /// ends.
    ///
    /// # Errors
    /// [`ErrorKind::NoContext`](crate::ErrorKind::NoContext); [`ErrorKind::UnknownApp`](crate::ErrorKind::UnknownApp);
    /// [`ErrorKind::Disposed`](crate::ErrorKind::Disposed) if the application was removed.
    #[track_caller]
    pub fn session(&self) -> Result<Session<C>> {
        let at = Location::caller();
        context::session(self.number(), at, |id| self.registry.get(id, at))
    }

    /// Calls [`App::create_all`] of the current application.
    ///
    /// # Errors
    /// [`ErrorKind::NoContext`](crate::ErrorKind::NoContext), and those of [`App::create_all`].
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        let at = Location::caller();
        self.app_of_context(at)?.create_all_at(at)
    }

    /// Calls [`App::drop_all`] of the current application.
    ///
    /// # Errors
    /// [`ErrorKind::NoContext`](crate::ErrorKind::NoContext), and those of [`App::drop_all`].
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        let at = Location::caller();
        self.app_of_context(at)?.drop_all_at(at)
    }

    /// Disposes of an application and unregisters it. Its handles answer
    /// [`ErrorKind::Disposed`](crate::ErrorKind::Disposed) from then on, and its id is free.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownApp`](crate::ErrorKind::UnknownApp);
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse), although the application is unregistered.
    #[track_caller]
    pub fn remove_app(&self, id: &str) -> Result<DisposeReport> {
        let app = self.registry.remove(id, Location::caller())?;
        app.core().mark_ended(AppEnd::Removed);
        app.dispose_report()
    }

    /// Disposes of every application. All applications stay registered.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with one report for all applications, if connections
    /// were not checked in in time.
    pub fn dispose_all(&self) -> Result<()> {
        self.dispose_all_report().map(drop)
    }

    /// [`dispose_all`](Self::dispose_all) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with one report for all applications, if connections
    /// were not checked in in time.
    pub fn dispose_all_within(&self, timeout: Duration) -> Result<()> {
        self.dispose_all_report_within(timeout).map(drop)
    }

    /// [`dispose_all`](Self::dispose_all), with one report for all applications.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose_all_report(&self) -> Result<DisposeReport> {
        self.dispose_all_report_within(TIMEOUT)
    }

    /// [`dispose_all_report`](Self::dispose_all_report) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with the report, if connections were not checked in in
    /// time.
    pub fn dispose_all_report_within(&self, timeout: Duration) -> Result<DisposeReport> {
        dispose_each(self.registry.all(), timeout)
    }

    /// Disposes of every application and removes it, at the end of a program. From then on `init_app`,
    /// `get_or_init_app`, `app` and every handle return [`ErrorKind::Disposed`](crate::ErrorKind::Disposed). As with
    /// [`App::dispose`], connections that the calling thread itself holds are closed when they are checked in.
    ///
    /// # Errors
    /// [`ErrorKind::StillInUse`](crate::ErrorKind::StillInUse) with one report for all applications, if connections
    /// were not checked in in time.
    pub fn shutdown(&self, timeout: Duration) -> Result<()> {
        let apps = self.registry.shut_down();
        apps.iter().for_each(|app| app.core().mark_ended(AppEnd::ShutDown));
        dispose_each(apps, timeout).map(drop)
    }

    /// The registered applications, in the order of their ids.
    pub fn apps(&self) -> Vec<App<C>> {
        self.registry.all()
    }

    /// The pools of all applications at this moment, in the order of the ids.
    pub fn status(&self) -> Vec<AppStatus> {
        self.registry.all().iter().map(App::status).collect()
    }

    /// The application of the current context in this database object.
    /// The number of the database object; 0, which no context has, before its first application.
    fn number(&self) -> u64 {
        self.identity.get().map_or(0, |identity| identity.database)
    }

    fn app_of_context(&self, at: SourceLocation) -> Result<App<C>> {
        context::app(self.number(), at, |id| self.registry.get(id, at))
    }
}

/// An application that is being initialised. If it is not published, it is disposed of.
struct Unpublished<'a, C: SessionConnection>(&'a App<C>);

impl<C: SessionConnection> Drop for Unpublished<'_, C> {
    fn drop(&mut self) {
        self.0.core().mark_ended(AppEnd::Removed);
        // The report is logged, and the error of the initialisation says more.
        let _ = self.0.dispose();
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use diesel::SqliteConnection;

    use crate::error::{AppEnd, ErrorKind};
    use crate::{App, Config, Database, Error, Result};

    fn config() -> Config {
        Config::new(":memory:")
    }

    #[test]
    fn get_or_init_app_initialises_once_and_other_threads_wait() {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let db = Database::<SqliteConnection>::without_migrations();
        let get = || {
            db.get_or_init_app("tenant", config, |app| {
                RUNS.fetch_add(1, Ordering::SeqCst);
                assert!(db.apps().is_empty());
                thread::sleep(Duration::from_millis(20));
                app.ping()
            })
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(get)).collect();
            threads.into_iter().for_each(|thread| {
                thread.join().expect("no panic").expect("sound");
            });
        });
        assert_eq!((RUNS.load(Ordering::SeqCst), db.apps().len()), (1, 1));
        db.dispose_all().expect("nothing is out");
    }

    #[test]
    fn get_or_init_app_that_failed_leaves_nothing_and_may_be_tried_again() {
        let db = Database::<SqliteConnection>::without_migrations();
        let failed = db.get_or_init_app("tenant", config, |app| {
            app.ping()?;
            Err::<(), _>(diesel::result::Error::NotFound.into())
        });
        assert!(failed.is_err_and(|error: Error| error.is_not_found()) && db.apps().is_empty());
        let again =
            db.get_or_init_app("tenant", config, |_| db.get_or_init_app("tenant", config, |app| app.ping()).map(drop));
        assert!(again.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidConfig), "{again:?}");
        db.get_or_init_app("tenant", config, |_| -> Result<()> { Ok(()) }).expect("a free id");
    }

    #[test]
    fn shutdown_refuses_every_use_from_then_on() {
        let db = Database::<SqliteConnection>::without_migrations();
        let app = db.init_app("app", config()).expect("a free id");
        app.ping().expect("sound");
        db.shutdown(Duration::from_secs(1)).expect("nothing is out");
        let is_shut_down = |error: Error| error.app_end() == Some(AppEnd::ShutDown);
        assert!(is_shut_down(app.ping().expect_err("shut down")));
        assert!(is_shut_down(db.app("app").expect_err("shut down")));
        assert!(is_shut_down(db.init_app("other", config()).expect_err("shut down")));
        let init = |_: &App<_>| -> Result<()> { panic!("nothing is initialised after the shutdown") };
        assert!(is_shut_down(db.get_or_init_app("other", config, init).expect_err("shut down")));
        assert!(db.apps().is_empty());
    }
}
