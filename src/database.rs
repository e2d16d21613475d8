//! The database object: what `db = SQLAlchemy()` is to a Flask program.

use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diesel::migration::MigrationSource;
use diesel::result::{ConnectionResult, QueryResult};
use diesel_migrations::EmbeddedMigrations;

use crate::app::App;
use crate::app_core::AppCore;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::context::{self, Current};
use crate::dispose::{TIMEOUT, dispose_each};
use crate::error::{DisposeReport, Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::migrations::{MigrationSet, PerBackend, Sources};
use crate::pool::{AppStatus, PerProcessLimit, PinnedConnection, PoolOptions};
use crate::registry::Registry;
use crate::session::{RowHooks, Session, SessionFactory};
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
    migrations: OnceLock<Arc<dyn MigrationSet<C>>>,
    number: OnceLock<u64>,
    pub(crate) connect_with: Option<fn(&str) -> ConnectionResult<C>>,
    pub(crate) on_connect: Option<fn(&mut C) -> QueryResult<()>>,
    pub(crate) on_checkout: Option<fn(&mut C) -> QueryResult<()>>,
    on_checkin: Option<fn(&mut C) -> QueryResult<()>>,
    on_close: Option<fn(&mut C)>,
    max_connections: Option<usize>,
    limit: OnceLock<Arc<PerProcessLimit>>,
    pub(crate) row_hooks: RowHooks<C>,
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

    /// The maximum number of connections that all applications of this database object have open at one time, on all
    /// servers together, including the connections of `create_all` and `drop_all`. If the limit is reached, a caller
    /// that needs a connection evicts the idle connection of the least recently used application. If no connection is
    /// idle, callers wait in order, and get [`Error::BudgetExhausted`] after their `acquire_timeout`.
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

    /// Runs on every new connection, after the library's own settings and [`Config::on_connect`]. On PostgreSQL it
    /// also runs after each reset of a connection ([`Config::reset`]), so it must be idempotent. The library replaces
    /// an instrumentation that the function sets; the library's instrumentation passes events on to that of
    /// [`diesel::connection::set_default_instrumentation`].
    ///
    /// An error or a panic fails the connect. On MySQL and MariaDB a statement whose text is empty panics. The function
    /// must not use this database object: its pool is waiting for this very connection. On Linux the connection is cut
    /// if the server has not answered after [`Config::connect_timeout`].
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

    /// Runs at each checkout of a connection, on the holder's thread, before the transaction begins. It also runs for
    /// [`App::ping`](crate::App::ping) and the operations on the schema, but not when the pool itself checks its idle
    /// connections.
    ///
    /// A setting that the hook makes on the connection does not count as something that the holder left:
    /// [`on_checkin`](Self::on_checkin) undoes the setting, or the next `on_checkout` makes it anew. The hook has no
    /// time limit of its own, and it must not use this database object.
    ///
    /// After an error, a panic or an open transaction, the connection is closed and the caller gets
    /// [`Error::HookFailed`]. If the connection turns out to be lost, another one is tried.
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

    /// Runs on checkin, after the reset, if the connection stays in the pool. It does not run if the connection is
    /// closed instead, for example on MySQL, MariaDB and SQLite after raw SQL that may have left something, or with
    /// [`Reset::Always`](crate::Reset::Always).
    ///
    /// The hook runs on the holder's thread. On PostgreSQL, MySQL and MariaDB the connection is cut if the server has
    /// not answered within [`Config::connect_timeout`]. The hook must not use this database object.
    ///
    /// After an error, a panic or an open transaction, the connection is closed and a warning is logged, because the
    /// holder has already checked it in.
    pub const fn on_checkin(mut self, hook: fn(&mut C) -> QueryResult<()>) -> Self {
        self.on_checkin = Some(hook);
        self
    }

    /// Runs before a connection is closed, for whatever reason, on the thread that closes it: a thread of the pool,
    /// the thread of the holder, the thread that evicts it, or the thread that disposes of the application. The hook
    /// must not wait, because the connection may be lost, and it must not use this database object. It does not run
    /// for a connection on which [`on_connect`](Self::on_connect) failed, because that connection was never in use.
    ///
    /// A panic is contained and logged as a warning.
    pub const fn on_close(mut self, hook: fn(&mut C)) -> Self {
        self.on_close = Some(hook);
        self
    }

    /// Runs before every flush of every session that has something to send, with the changes, and before the
    /// session's own [`before_flush`](Session::before_flush) hooks. The hook may change rows, for example a column
    /// that names the last writer; the same flush sends these changes. An `Err` or panic of the hook prevents the
    /// flush.
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
        self.row_hooks.before_flush = Some(hook);
        self
    }

    /// Runs after every flush of every session, inside the transaction, with the changes that were sent, for example
    /// to write a journal. Rows that the hook adds wait for the next flush. A commit flushes until no changes are
    /// left, at most a hundred times.
    pub const fn after_flush(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.row_hooks.after_flush = Some(hook);
        self
    }

    /// Runs before the commit of a transaction in which rows were flushed, with the changes, each row once. Changes
    /// that a savepoint has undone are not among them. An `Err` or panic of the hook prevents the commit. The commit
    /// includes rows that the hook changes; the hook does not run again for those.
    pub const fn before_commit(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.row_hooks.before_commit = Some(hook);
        self
    }

    /// Runs after the commit of a transaction in which rows were flushed, when the connection has been checked in. An
    /// `Err` or panic of the hook becomes [`Error::HookFailed`] of the commit, although the transaction is committed.
    pub const fn after_commit(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.row_hooks.after_commit = Some(hook);
        self
    }

    /// Runs after the rollback of a transaction in which rows were flushed, with the changes; also at the end of a
    /// context that did not commit. An `Err` or panic of the hook is logged.
    pub const fn after_rollback(mut self, hook: fn(&Session<C>, &Changes) -> Result<()>) -> Self {
        self.row_hooks.after_rollback = Some(hook);
        self
    }

    #[track_caller]
    const fn from_sources(sources: Sources<M>) -> Self {
        Self {
            registry: Registry::new(Location::caller()),
            sources: Mutex::new(Some(sources)),
            migrations: OnceLock::new(),
            number: OnceLock::new(),
            connect_with: None,
            on_connect: None,
            on_checkout: None,
            on_checkin: None,
            on_close: None,
            max_connections: None,
            limit: OnceLock::new(),
            row_hooks: RowHooks::NONE,
        }
    }

    /// The number of this database object. Its address would not identify it, because an address may be reused.
    pub(crate) fn number(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        *self.number.get_or_init(|| NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl<C: SessionConnection, M: MigrationSource<C::Backend> + Send + Sync + 'static> Database<C, M> {
    /// Registers an application. It opens no connection.
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`]; [`Error::InvalidConfig`] for an empty id, options that cannot work, and a URL
    /// that is malformed or is for another kind of database.
    pub fn init_app(&self, id: impl Into<String>, config: Config) -> Result<App<C>> {
        self.registry.add(self.new_app(self.options(id.into(), config, None)?, self.row_hooks))
    }

    /// Makes an application without registering it.
    pub(crate) fn new_app(&self, options: PoolOptions<C>, row_hooks: RowHooks<C>) -> App<C> {
        let open_sessions = options.is_of_test.then(Arc::default);
        let factory = SessionFactory { app_core: AppCore::new(options), row_hooks, open_sessions };
        App::new(factory, self.number(), Arc::clone(self.migrations()))
    }

    pub(crate) fn options(
        &self,
        id: String,
        config: Config,
        pinned: Option<Arc<PinnedConnection<C>>>,
    ) -> Result<PoolOptions<C>> {
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

    fn connection_limit(&self) -> Option<Arc<PerProcessLimit>> {
        let connections = self.max_connections?;
        Some(Arc::clone(self.limit.get_or_init(|| Arc::new(PerProcessLimit::new(connections)))))
    }

    fn migrations(&self) -> &Arc<dyn MigrationSet<C>> {
        self.migrations.get_or_init(|| {
            let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner).take();
            Arc::new(sources.expect("taken here only, and this runs once"))
        })
    }
}

impl<C: SessionConnection, M> Database<C, M> {
    /// The application with this id.
    ///
    /// # Errors
    /// [`Error::UnknownApp`].
    #[track_caller]
    pub fn app(&self, id: &str) -> Result<App<C>> {
        self.registry.get(id, Location::caller())
    }

    /// The application whose context this thread is in. The handle can be moved to another thread and be entered
    /// there.
    ///
    /// # Errors
    /// [`Error::NoContext`]; [`Error::UnknownApp`] if this database object does not know the application of the
    /// context.
    #[track_caller]
    pub fn current_app(&self) -> Result<App<C>> {
        let at = Location::caller();
        self.resolve(context::current(self.number(), at)?, at)
    }

    /// The session of the context that this thread is in. Every call returns the same session, until the context
    /// ends.
    ///
    /// # Errors
    /// [`Error::NoContext`]; [`Error::UnknownApp`]; [`Error::Disposed`] if the application was removed.
    #[track_caller]
    pub fn session(&self) -> Result<Session<C>> {
        let at = Location::caller();
        context::session(self.number(), at, |current| self.resolve(current, at))
    }

    /// Calls [`App::create_all`] of the current application.
    ///
    /// # Errors
    /// [`Error::NoContext`], and those of [`App::create_all`].
    #[track_caller]
    pub fn create_all(&self) -> Result<Vec<String>> {
        let at: Place = Location::caller();
        self.resolve(context::current(self.number(), at)?, at)?.create_all_at(at)
    }

    /// Calls [`App::drop_all`] of the current application.
    ///
    /// # Errors
    /// [`Error::NoContext`], and those of [`App::drop_all`].
    #[track_caller]
    pub fn drop_all(&self) -> Result<Vec<String>> {
        let at: Place = Location::caller();
        self.resolve(context::current(self.number(), at)?, at)?.drop_all_at(at)
    }

    /// Disposes of an application and unregisters it. Its handles answer [`Error::Disposed`] from then on, and its id
    /// is free.
    ///
    /// # Errors
    /// [`Error::UnknownApp`]; [`Error::StillInUse`], although the application is unregistered.
    #[track_caller]
    pub fn remove_app(&self, id: &str) -> Result<DisposeReport> {
        let app = self.registry.remove(id, Location::caller())?;
        app.core().mark_removed();
        app.dispose_report()
    }

    /// Disposes of every application. All applications stay registered.
    ///
    /// # Errors
    /// [`Error::StillInUse`] with one report for all applications, if connections were not checked in in time.
    pub fn dispose_all(&self) -> Result<()> {
        self.dispose_all_report().map(drop)
    }

    /// [`dispose_all`](Self::dispose_all) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`Error::StillInUse`] with one report for all applications, if connections were not checked in in time.
    pub fn dispose_all_within(&self, timeout: Duration) -> Result<()> {
        self.dispose_all_report_within(timeout).map(drop)
    }

    /// [`dispose_all`](Self::dispose_all), with one report for all applications.
    ///
    /// # Errors
    /// [`Error::StillInUse`] with the report, if connections were not checked in in time.
    pub fn dispose_all_report(&self) -> Result<DisposeReport> {
        self.dispose_all_report_within(TIMEOUT)
    }

    /// [`dispose_all_report`](Self::dispose_all_report) with another timeout than 5 s.
    ///
    /// # Errors
    /// [`Error::StillInUse`] with the report, if connections were not checked in in time.
    pub fn dispose_all_report_within(&self, timeout: Duration) -> Result<DisposeReport> {
        dispose_each(self.registry.all(), timeout)
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
    fn resolve(&self, current: Current<C>, at: Place) -> Result<App<C>> {
        match current {
            Current::Entered(app) => Ok(app),
            Current::SameId(id) => self.registry.get(&id, at),
        }
    }
}
