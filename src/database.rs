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
use crate::error::{AppEnd, DisposeReport, Error, Place, Result};
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

    /// The application with this id. If there is none, makes it with `config`, runs `init`, and registers it when `init`
    /// has succeeded. Other threads that ask for the same id wait until then. So a program that learns of its tenants at
    /// run time registers each of them once, with its schema.
    ///
    /// ```
    /// # use diesel::prelude::*;
    /// # use diesel_session::{Config, Database};
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// let app = DB.get_or_init_app("acme", || Config::new(":memory:"), |app| app.ping())?;
    /// assert_eq!(app.id(), "acme");
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of `init`, after which the application is disposed of and not registered; the errors of
    /// [`init_app`](Self::init_app); [`Error::InvalidConfig`] if `init` asks for the same application.
    pub fn get_or_init_app<E: From<Error>>(
        &self,
        id: impl Into<String>,
        config: impl FnOnce() -> Config,
        init: impl FnOnce(&App<C>) -> Result<(), E>,
    ) -> Result<App<C>, E> {
        let id = id.into();
        let _initialisation = match self.registry.get_or_initialise(&id)? {
            Ok(app) => return Ok(app),
            Err(initialisation) => initialisation,
        };
        let app = self.new_app(self.options(id.clone(), config(), None)?, self.row_hooks);
        let unpublished = Unpublished(Some(app));
        let Unpublished(Some(app)) = &unpublished else { unreachable!("it is published at the end") };
        init(app)?;
        Ok(unpublished.publish(&self.registry)?)
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
        app.core().mark_ended(AppEnd::Removed);
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

    /// Disposes of every application and removes it, at the end of a program. From then on `init_app`, `app` and every
    /// handle answer [`Error::Disposed`].
    ///
    /// # Errors
    /// [`Error::StillInUse`] with one report for all applications, if connections were not checked in in time.
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
    fn resolve(&self, current: Current<C>, at: Place) -> Result<App<C>> {
        match current {
            Current::Entered(app) => Ok(app),
            Current::SameId(id) => self.registry.get(&id, at),
        }
    }
}

/// An application that is being initialised. If it is not published, it is disposed of.
struct Unpublished<C: SessionConnection>(Option<App<C>>);

impl<C: SessionConnection> Unpublished<C> {
    fn publish(mut self, registry: &Registry<C>) -> Result<App<C>> {
        match self.0.take() {
            Some(app) => registry.add(app.clone()).inspect_err(|_| self.0 = Some(app)),
            None => unreachable!("it is published once"),
        }
    }
}

impl<C: SessionConnection> Drop for Unpublished<C> {
    fn drop(&mut self) {
        if let Some(app) = self.0.take() {
            app.core().mark_ended(AppEnd::Removed);
            // The report is logged, and the error of the initialisation says more.
            let _ = app.dispose();
        }
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use diesel::SqliteConnection;

    use crate::error::AppEnd;
    use crate::{Config, Database, Error, Result};

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
            Err(Error::NotFound { row: None, at: std::panic::Location::caller() })
        });
        assert!(failed.is_err_and(|error| error.is_not_found()) && db.apps().is_empty());
        let again =
            db.get_or_init_app("tenant", config, |_| db.get_or_init_app("tenant", config, |app| app.ping()).map(drop));
        assert!(matches!(again, Err(Error::InvalidConfig { .. })), "{again:?}");
        db.get_or_init_app("tenant", config, |_| -> Result<()> { Ok(()) }).expect("a free id");
    }

    #[test]
    fn shutdown_refuses_every_use_from_then_on() {
        let db = Database::<SqliteConnection>::without_migrations();
        let app = db.init_app("app", config()).expect("a free id");
        app.ping().expect("sound");
        db.shutdown(Duration::from_secs(1)).expect("nothing is out");
        let is_shut_down = |error| matches!(error, Error::Disposed { how: AppEnd::ShutDown, .. });
        assert!(is_shut_down(app.ping().expect_err("shut down")));
        assert!(is_shut_down(db.app("app").expect_err("shut down")));
        assert!(is_shut_down(db.init_app("other", config()).expect_err("shut down")));
        assert!(db.apps().is_empty());
    }
}
