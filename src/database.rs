//! The database object: what `db = SQLAlchemy()` is to a Flask program.

use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use diesel::migration::MigrationSource;
use diesel::result::{ConnectionResult, QueryResult};
use diesel_migrations::EmbeddedMigrations;

use crate::app::App;
use crate::app_core::AppCore;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::context::{self, Current};
use crate::dispose::dispose_each;
use crate::error::{DisposeReport, Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::migrations::{MigrationSet, PerBackend, Sources};
use crate::pool::{AppStatus, Limit, PinnedConnection, PoolOptions};
use crate::registry::Registry;
use crate::session::{RowHooks, Session, SessionFactory};
use crate::unit_of_work::Changes;
use crate::url::Target;
use crate::wording::{is_unprintable, name};

/// The database object of a program: its migrations, and the registry of its applications. It is made for a `static`.
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
/// `C` is the connection type. `M` is the type of the migrations; any
/// [`MigrationSource`] will do, and [`EmbeddedMigrations`] need not be named.
///
/// A second database of the same applications is a second `static`, with its own `C`, URL and migrations: in a context of an
/// application each has its own session.
pub struct Database<C: SessionConnection, M = EmbeddedMigrations> {
    registry: Registry<C>,
    /// Until the first application is registered; then the applications share it.
    given: Mutex<Option<Sources<M>>>,
    migrations: OnceLock<Arc<dyn MigrationSet<C>>>,
    number: OnceLock<u64>,
    connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    on_connect: Option<fn(&mut C) -> QueryResult<()>>,
    on_checkout: Option<fn(&mut C) -> QueryResult<()>>,
    on_checkin: Option<fn(&mut C) -> QueryResult<()>>,
    on_close: Option<fn(&mut C)>,
    max_connections: Option<usize>,
    limit: OnceLock<Arc<Limit>>,
    hooks: RowHooks<C>,
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
    /// A database object whose schema is not this program's business: `create_all` and `drop_all` are errors.
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

    /// A database object with migrations for each kind of database, for an enum of connections: one SQL text rarely serves
    /// two.
    ///
    /// ```
    /// use diesel::prelude::*;
    /// use diesel_migrations::{EmbeddedMigrations, embed_migrations};
    /// use diesel_session::{Database, PerBackend};
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

    /// Most connections that all applications of this database object have open at one time, on all servers together; those of
    /// `create_all` and `drop_all` count too. Where it is reached, the idle connection of the application that was used least
    /// recently is closed for whoever needs one; where all are in use, callers wait in order, and get
    /// [`Error::BudgetExhausted`] after their `acquire_timeout`.
    ///
    /// Without it the database server's own limit is respected all the same: when it refuses, an idle connection of this
    /// process goes, whatever the application. A limit is for servers that other programs need too. A process that was forked
    /// counts for itself.
    pub const fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = Some(connections);
        self
    }

    /// Connects with a function of the program's own, such as the one that picks the variant of an enum of connections by the
    /// URL. The URL it gets is the configured one with the library's parameters; for SQLite in memory it starts with `file:`.
    ///
    /// Without it, an enum's own `establish` is used: it tries every variant in turn and tells no reason when all fail.
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
    ///     // Files and `:memory:` never start like this; libpq's `host=..` form would need a word here too.
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
    ///     app.dispose().map(drop)
    /// }
    /// # }
    /// # #[cfg(all(feature = "postgres", feature = "sqlite"))]
    /// # fn main() { program::main().unwrap() }
    /// # #[cfg(not(all(feature = "postgres", feature = "sqlite")))]
    /// # fn main() {}
    /// ```
    ///
    /// The kind of database is taken from the URL: `postgres://`, `mysql://`, `sqlite:`, `file:`, `:memory:`, libpq's
    /// `keyword=value` form, or a path that ends in `.sqlite`, `.sqlite3` or `.db`.
    pub const fn connect_with(mut self, connect: fn(&str) -> ConnectionResult<C>) -> Self {
        self.connect_with = Some(connect);
        self
    }

    /// Runs on every new connection, after the library's own settings and [`Config::on_connect`]; on PostgreSQL also after each
    /// reset of a connection ([`Config::reset`]), so it is something that can be done twice. An instrumentation set here is
    /// replaced by the library's, which passes on to that of [`diesel::connection::set_default_instrumentation`].
    ///
    /// An error or a panic fails the connect. On MySQL and MariaDB a statement whose text is empty panics.
    ///
    /// Behind a pooler in transaction mode that keeps no prepared statements, such as PgBouncer before 1.21, this switches Diesel's cache
    /// of them off:
    ///
    /// ```
    /// # #[cfg(feature = "postgres")]
    /// # mod program {
    /// use diesel::connection::CacheSize;
    /// use diesel::prelude::*;
    /// use diesel_session::Database;
    ///
    /// static DB: Database<PgConnection> = Database::without_migrations().on_connect(|conn| {
    ///     conn.set_prepared_statement_cache_size(CacheSize::Disabled);
    ///     Ok(())
    /// });
    /// # }
    /// ```
    pub const fn on_connect(mut self, prepare: fn(&mut C) -> QueryResult<()>) -> Self {
        self.on_connect = Some(prepare);
        self
    }

    /// Runs each time a connection is checked out, on the holder's thread, before its transaction begins: also for
    /// [`App::ping`](crate::App::ping) and the schema's operations, not for the pool's own looking after idle connections.
    ///
    /// What it sets on the connection is not counted as something the holder left: [`on_checkin`](Self::on_checkin) undoes it,
    /// or the next `on_checkout` sets it anew. It has no time limit of its own, and must not use this database object.
    ///
    /// After an error, a panic or a transaction left open the connection is closed, and the caller gets
    /// [`Error::HookFailed`]; if the connection turns out to be lost, another one is tried.
    ///
    /// ```
    /// use diesel::connection::SimpleConnection;
    /// use diesel::prelude::*;
    /// use diesel_session::Database;
    ///
    /// fn careful(conn: &mut SqliteConnection) -> QueryResult<()> {
    ///     conn.batch_execute("PRAGMA cell_size_check = 1")
    /// }
    ///
    /// fn careless(conn: &mut SqliteConnection) -> QueryResult<()> {
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
    pub const fn on_checkout(mut self, hook: fn(&mut C) -> QueryResult<()>) -> Self {
        self.on_checkout = Some(hook);
        self
    }

    /// Runs when a connection comes back and is to be kept, after its reset: not for one that is closed instead, as on MySQL, MariaDB
    /// and SQLite after raw SQL that may have left something, or with [`Reset::Always`](crate::Reset::Always).
    ///
    /// It runs on the holder's thread. On PostgreSQL, MySQL and MariaDB the connection is cut if the server has not answered after
    /// [`Config::connect_timeout`]. It must not use this database object.
    ///
    /// After an error, a panic or a transaction left open the connection is closed, and the log has a warning: whoever has
    /// returned it is done with it.
    pub const fn on_checkin(mut self, hook: fn(&mut C) -> QueryResult<()>) -> Self {
        self.on_checkin = Some(hook);
        self
    }

    /// Runs before a connection is closed, whatever the reason, on the thread that closes it: the thread of a pool, the one that
    /// held it, the one for which it is evicted, or the one that disposes. It must not wait, as the connection may be lost, and must not use this database
    /// object. Connections on which [`on_connect`](Self::on_connect) failed were never in use and are closed without it.
    ///
    /// A panic is contained; the log has a warning.
    pub const fn on_close(mut self, hook: fn(&mut C)) -> Self {
        self.on_close = Some(hook);
        self
    }

    /// Runs before every flush that has something to send, of every session, with what that is; before the session's own
    /// [`before_flush`](Session::before_flush) hooks. It may change rows, which go with the same flush, such as a column that says who
    /// wrote last. Its `Err` or panic prevents the flush.
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel_session::{ChangeKind, Changes, Database, Entity, Result, Session};
    /// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
    /// # #[derive(Debug, Clone, Queryable, Selectable, Entity)]
    /// # struct User { #[entity(generated)] id: i32, name: String }
    /// fn trim_names(_: &Session<SqliteConnection>, changes: &Changes) -> Result<()> {
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
    pub const fn before_flush(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.before_flush = Some(hook);
        self
    }

    /// Runs after every flush of every session, with what was sent, inside its transaction: to write a journal, for example. Rows that it
    /// adds wait for the next flush; a commit flushes until nothing is left, a hundred times at most.
    pub const fn after_flush(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.after_flush = Some(hook);
        self
    }

    /// Runs before the commit of a transaction in which rows were flushed, with what remains of them, each row once: what a savepoint has
    /// undone is not among them. Its `Err` or panic prevents the commit. Rows that it changes go with
    /// the commit; it is not asked again for those.
    pub const fn before_commit(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.before_commit = Some(hook);
        self
    }

    /// Runs after such a commit, when the connection has gone back. Its `Err` or panic becomes [`Error::HookFailed`] of the commit,
    /// which happened all the same.
    pub const fn after_commit(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.after_commit = Some(hook);
        self
    }

    /// Runs after the rollback of a transaction in which rows were flushed, with what they were; also at the end of a context that did
    /// not commit. Its `Err` or panic is logged.
    pub const fn after_rollback(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.hooks.after_rollback = Some(hook);
        self
    }

    #[track_caller]
    const fn from_sources(sources: Sources<M>) -> Self {
        Self {
            registry: Registry::new(Location::caller()),
            given: Mutex::new(Some(sources)),
            migrations: OnceLock::new(),
            number: OnceLock::new(),
            connect_with: None,
            on_connect: None,
            on_checkout: None,
            on_checkin: None,
            on_close: None,
            max_connections: None,
            limit: OnceLock::new(),
            hooks: RowHooks::NONE,
        }
    }

    /// Tells this database object from others; an address may be used again.
    fn number(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        *self.number.get_or_init(|| NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static> Database<C, M> {
    /// Registers an application. It opens no connection.
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`]; [`Error::InvalidConfig`] for an empty id, options that cannot work, and a URL that is
    /// malformed or is for another kind of database.
    pub fn init_app(&self, id: impl Into<String>, config: Config) -> Result<App<C>> {
        self.registry.add(self.app_of(self.options(id.into(), config, None)?, self.hooks))
    }

    /// An application that is not registered.
    fn app_of(&self, options: PoolOptions<C>, row_hooks: RowHooks<C>) -> App<C> {
        let open_sessions = options.is_of_test.then(Arc::default);
        let factory = SessionFactory { core: AppCore::new(options), row_hooks, open_sessions };
        App::new(factory, self.number(), Arc::clone(self.migrations()))
    }

    fn options(&self, id: String, config: Config, pinned: Option<Arc<PinnedConnection<C>>>) -> Result<PoolOptions<C>> {
        let invalid = |reason| Error::InvalidConfig { app: name(&id), reason };
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
        if config.on_connect.iter().any(|sql| target.kind.is_blank(sql)) {
            return Err(invalid("`Config::on_connect` was given SQL without a statement; leave it out".into()));
        }
        Ok(PoolOptions {
            app: id.into(),
            config,
            target,
            connection_limit: self.connection_limit(),
            connect_with: self.connect_with,
            on_connect: self.on_connect,
            on_checkout: self.on_checkout,
            on_checkin: self.on_checkin,
            on_close: self.on_close,
            pinned,
            is_of_test: false,
        })
    }

    fn connection_limit(&self) -> Option<Arc<Limit>> {
        let connections = self.max_connections?;
        Some(Arc::clone(self.limit.get_or_init(|| Arc::new(Limit::new(connections)))))
    }

    fn migrations(&self) -> &Arc<dyn MigrationSet<C>> {
        self.migrations.get_or_init(|| {
            let given = self.given.lock().unwrap_or_else(PoisonError::into_inner).take();
            Arc::new(given.expect("taken here only, and this runs once"))
        })
    }
}

impl<C: SessionConnection, M> Database<C, M> {
    /// The application of that id.
    ///
    /// # Errors
    /// [`Error::UnknownApp`].
    #[track_caller]
    pub fn app(&self, id: &str) -> Result<App<C>> {
        self.registry.get(id, Location::caller())
    }

    /// The application whose context this thread is in. The handle may go to another thread and be entered there.
    ///
    /// # Errors
    /// [`Error::NoContext`]; [`Error::UnknownApp`] where the context is that of an application which this database object does
    /// not know.
    #[track_caller]
    pub fn current_app(&self) -> Result<App<C>> {
        let at = Location::caller();
        self.find(context::current(self.number(), at)?, at)
    }

    /// The session of the context this thread is in: the same one each time, until the context ends.
    ///
    /// # Errors
    /// [`Error::NoContext`]; [`Error::UnknownApp`]; [`Error::Disposed`] where the application was removed.
    #[track_caller]
    pub fn session(&self) -> Result<Session<C>> {
        let at = Location::caller();
        context::session(self.number(), at, |current| self.find(current, at))
    }

    /// [`App::create_all`] of the current application.
    ///
    /// # Errors
    /// [`Error::NoContext`], and those of [`App::create_all`].
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        let at: Place = Location::caller();
        self.find(context::current(self.number(), at)?, at)?.create_all_at(at)
    }

    /// [`App::drop_all`] of the current application.
    ///
    /// # Errors
    /// [`Error::NoContext`], and those of [`App::drop_all`].
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        let at: Place = Location::caller();
        self.find(context::current(self.number(), at)?, at)?.drop_all_at(at)
    }

    /// Disposes of an application and unregisters it; its handles answer [`Error::Disposed`] from then on, and its id is free.
    ///
    /// # Errors
    /// [`Error::UnknownApp`]; [`Error::StillInUse`], and then it is unregistered all the same.
    #[track_caller]
    pub fn remove_app(&self, id: &str) -> Result<DisposeReport> {
        let app = self.registry.remove(id, Location::caller())?;
        app.core().mark_removed();
        app.dispose()
    }

    /// Disposes of every application; all stay registered.
    ///
    /// # Errors
    /// [`Error::StillInUse`] with one report for all, where connections did not come back in time.
    pub fn dispose_all(&self) -> Result<DisposeReport> {
        dispose_each(self.registry.all())
    }

    /// Every application's pool at this moment, in the order of their ids.
    pub fn status(&self) -> Vec<AppStatus> {
        self.registry.all().iter().map(App::status).collect()
    }

    fn find(&self, current: Current<C>, at: Place) -> Result<App<C>> {
        match current {
            Current::Entered(app) => Ok(app),
            Current::SameId(id) => self.registry.get(&id, at),
        }
    }
}

/// A database object, whatever the type of its migrations: what the test kit needs of it.
pub(crate) trait Registrar<C: SessionConnection>: Sync {
    /// Tells it from others.
    fn number(&self) -> u64;

    /// A test's application, which is not registered.
    fn make(&self, id: String, config: Config, pinned: Option<Arc<PinnedConnection<C>>>) -> Result<App<C>>;

    /// Which functions of the program's own run on a new connection or change what a flush sends: equal numbers in one build of a
    /// program are the same functions.
    fn functions(&self) -> Vec<usize>;

    /// Whether connections are made by a function of the program's own.
    fn has_connect_with(&self) -> bool;

    /// The same without the hooks and limits of the database object.
    fn make_bare(&self, id: String, config: Config) -> Result<App<C>>;

    fn register(&self, app: App<C>) -> Result<App<C>>;

    /// Frees the application's id; its handles answer `Disposed` from then on.
    fn unregister(&self, app: &App<C>);
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static> Registrar<C> for Database<C, M> {
    fn number(&self) -> u64 {
        self.number()
    }

    fn make(&self, id: String, config: Config, pinned: Option<Arc<PinnedConnection<C>>>) -> Result<App<C>> {
        let options = self.options(id, config, pinned)?;
        Ok(self.app_of(PoolOptions { is_of_test: true, ..options }, self.hooks))
    }

    fn functions(&self) -> Vec<usize> {
        // Where a program is loaded differs from run to run.
        let from_here = |function: usize| function.wrapping_sub(functions_begin as fn() as usize);
        let RowHooks { before_flush, after_flush, before_commit, .. } = self.hooks;
        let prepare = [self.on_connect, self.on_checkout].map(|function| function.map(|function| function as usize));
        let connect = [self.connect_with.map(|function| function as usize)];
        let hooks = [before_flush, after_flush, before_commit].map(|hook| hook.map(|hook| hook as usize));
        let all = prepare.into_iter().chain(connect).chain(hooks);
        if all.clone().all(|function| function.is_none()) {
            return Vec::new();
        }
        all.map(|function| function.map_or(0, from_here)).collect()
    }

    fn has_connect_with(&self) -> bool {
        self.connect_with.is_some()
    }

    fn make_bare(&self, id: String, config: Config) -> Result<App<C>> {
        let options = self.options(id, config, None)?;
        let (on_connect, on_checkout, on_checkin, on_close) = (None, None, None, None);
        let bare = PoolOptions { connection_limit: None, on_connect, on_checkout, on_checkin, on_close, ..options };
        Ok(self.app_of(bare, RowHooks::NONE))
    }

    fn register(&self, app: App<C>) -> Result<App<C>> {
        self.registry.add(app)
    }

    fn unregister(&self, app: &App<C>) {
        self.registry.remove_this(app);
        app.core().mark_removed();
    }
}

/// From here the places of functions are counted.
fn functions_begin() {}
