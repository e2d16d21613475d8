//! The session: what a program sends its statements through.

mod hooks;
mod lend;
mod transaction;

use std::any::type_name;
use std::cell::{Cell, RefCell, RefMut};
use std::panic::Location;
use std::rc::Rc;

use diesel::RunQueryDsl;
use diesel::dsl::CountStar;
use diesel::query_builder::AsQuery;
use diesel::query_dsl::methods::{ExecuteDsl, LimitDsl, LoadQuery, SelectDsl};
use diesel::result::QueryResult;

pub use hooks::HookOutcome;
pub use lend::LentConnection;

use crate::app::App;
use crate::connection::SessionConnection;
use crate::context::Settings;
use crate::error::{Error, Place, Result};
use hooks::{Hooks, Mark};
use transaction::{Access, Core};

/// A handle to a session: statements, one transaction at a time, and what happens around it.
///
/// The session of a context comes from [`Database::session`](crate::Database::session) and ends with the context; the one of
/// [`App::open_session`](crate::App::open_session) ends when its last handle is dropped. It begins by itself at the first
/// statement, holds a connection from there to [`commit`](Self::commit) or [`rollback`](Self::rollback), and costs the
/// server nothing in between. What is not committed is rolled back.
///
/// A handle belongs to its thread:
///
/// ```compile_fail,E0277
/// fn needs_send<T: Send>() {}
/// needs_send::<diesel_session::Session<diesel::SqliteConnection>>();
/// ```
///
/// # Errors of every method that sends something
/// [`Error::Query`] with Diesel's error, [`Error::NotFound`], [`Error::RollbackRequired`] after the database has aborted or
/// ended the transaction, [`Error::SessionEnded`], [`Error::SessionBusy`], [`Error::DeadlineExceeded`]; for the first
/// statement also what can go wrong with getting a connection: [`Error::AcquireTimeout`], [`Error::Connect`],
/// [`Error::ConnectTimeout`], [`Error::Disposed`], [`Error::WouldDeadlock`].
pub struct Session<C: SessionConnection>(pub(crate) Rc<Shared<C>>);

impl<C: SessionConnection> Clone for Session<C> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<C: SessionConnection> std::fmt::Debug for Session<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("app", &self.0.app.id())
            .field("ended", &self.0.ended.get())
            .finish_non_exhaustive()
    }
}

/// Queries.
impl<C: SessionConnection> Session<C> {
    /// Runs a query and returns all its rows.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn load<'q, U>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<Vec<U>> {
        let at = Location::caller();
        self.0.run(access_of(&query), at, |conn| query.internal_load(conn)?.collect())
    }

    /// Runs a query and returns its first row, asking for no more than one.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none; see [`Session`].
    #[track_caller]
    pub fn first<'q, U, Q>(&self, query: Q) -> Result<U>
    where
        Q: LimitDsl<Output: LoadQuery<'q, C, U> + AsQuery>,
    {
        let at = Location::caller();
        let query = query.limit(1);
        self.0.run(access_of(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a query that gives one row, such as a count or an `INSERT .. RETURNING`.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none; see [`Session`].
    #[track_caller]
    pub fn get_result<'q, U>(&self, query: impl LoadQuery<'q, C, U> + AsQuery) -> Result<U> {
        let at = Location::caller();
        self.0.run(access_of(&query), at, |conn| query.get_result(conn))
    }

    /// Runs a statement and returns the number of rows it changed.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn execute<Q: ExecuteDsl<C> + RunQueryDsl<C>>(&self, statement: Q) -> Result<usize> {
        let at = Location::caller();
        let access = if is_typed(type_name::<Q>()) { Access::Write } else { Access::Raw };
        self.0.run(access, at, |conn| RunQueryDsl::execute(statement, conn))
    }

    /// Whether a query has any row.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn exists<'q, Q>(&self, query: Q) -> Result<bool>
    where
        Q: AsQuery,
        diesel::dsl::exists<Q::Query>: diesel::expression::Expression,
        diesel::dsl::select<diesel::dsl::exists<Q::Query>>: LoadQuery<'q, C, bool> + AsQuery,
    {
        let at = Location::caller();
        let query = diesel::select(diesel::dsl::exists(query.as_query()));
        self.0.run(access_of(&query), at, |conn| query.get_result(conn))
    }

    /// How many rows a query has.
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn count<'q, Q>(&self, query: Q) -> Result<i64>
    where
        Q: SelectDsl<CountStar, Output: LoadQuery<'q, C, i64> + AsQuery>,
    {
        let at = Location::caller();
        let query = query.select(diesel::dsl::count_star());
        self.0.run(access_of(&query), at, |conn| query.get_result(conn))
    }

    /// Runs any Diesel code on the session's connection, inside its transaction. This is the way to use code that takes a
    /// connection.
    ///
    /// The closure may use the connection's own `transaction`, which is a savepoint here. It must not end the session's
    /// transaction, replace the connection or its instrumentation (that is [`Error::RollbackRequired`] afterwards), and it must
    /// not use this session: that is [`Error::SessionBusy`].
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn with<T>(&self, run: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T> {
        self.0.run(Access::Raw, Location::caller(), run)
    }

    /// The session's connection as an owned guard, for code that [`with`](Self::with) does not fit. While it lives, the
    /// session itself answers [`Error::SessionBusy`].
    ///
    /// # Errors
    /// See [`Session`].
    #[track_caller]
    pub fn connection(&self) -> Result<LentConnection<C>> {
        LentConnection::take(&self.0, Location::caller())
    }
}

/// The transaction.
impl<C: SessionConnection> Session<C> {
    /// Begins the transaction now instead of at the first statement; in an autocommit scope it begins one at all.
    ///
    /// # Errors
    /// [`Error::AlreadyBegun`]; see [`Session`].
    #[track_caller]
    pub fn begin(&self) -> Result<()> {
        let at = Location::caller();
        let mut core = self.0.enter(at)?;
        match core.begun_at() {
            Some(begun_at) => Err(Error::AlreadyBegun { begun_at, at }),
            None => core.begin(at),
        }
    }

    /// Commits what was done since the session began, and gives the connection back. Without anything to commit it only runs
    /// the hooks.
    ///
    /// # Errors
    /// What the database says, where it refuses: then everything is rolled back. [`Error::RollbackRequired`] where the
    /// transaction was aborted before: then nothing is sent. [`Error::CommitUnknown`] where the connection was lost.
    /// [`Error::HookFailed`]. [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction).
    #[track_caller]
    pub fn commit(&self) -> Result<()> {
        let at = Location::caller();
        self.0.outside_blocks("commit", at)?;
        self.0.commit(at)
    }

    /// Rolls back what was done since the session began, and gives the connection back. The session goes on as new.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`] in a closure of [`transaction`](Self::transaction); [`Error::SessionBusy`];
    /// [`Error::SessionEnded`]; [`Error::HookFailed`].
    #[track_caller]
    pub fn rollback(&self) -> Result<()> {
        let at = Location::caller();
        self.0.outside_blocks("rollback", at)?;
        self.0.rollback(at)
    }

    /// Runs `body` and commits when it returns `Ok`; `Err` and a panic roll back. The outermost one joins what the session
    /// has already begun and ends all of it; inside another one it is a [`savepoint`](Self::savepoint).
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) and [`commit`](Self::commit) turned into `E`.
    #[track_caller]
    pub fn transaction<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        let at = Location::caller();
        if self.0.is_in_block() {
            return self.savepoint_at("transaction", at, body);
        }
        self.0.enter(at)?.begin(at)?;
        let block = Block::open(&self.0, "transaction", at, false);
        let outcome = body(self);
        block.close();
        match outcome {
            Ok(value) => match self.0.commit(at) {
                Ok(()) => Ok(value),
                Err(error) => {
                    self.0.roll_back_for(&error, at);
                    Err(error.into())
                }
            },
            Err(error) => {
                self.0.undo(at);
                Err(error)
            }
        }
    }

    /// Runs `body` in a savepoint: `Err` and a panic undo what it did, and nothing else. This is the portable way to go on
    /// after a statement that may fail.
    ///
    /// ```
    /// # use diesel_session::{Config, Database};
    /// # use diesel::prelude::*;
    /// # static DB: Database<SqliteConnection> = Database::without_migrations();
    /// # diesel::table! { users (id) { id -> Integer, } }
    /// # let app = DB.init_app("savepoint", Config::new(":memory:"))?;
    /// # app.context(|| {
    /// let session = DB.session()?;
    /// # session.with(|conn| diesel::connection::SimpleConnection::batch_execute(conn, "CREATE TABLE users (id INTEGER PRIMARY KEY)"))?;
    /// session.execute(diesel::insert_into(users::table).values(users::id.eq(1)))?;
    /// let twice = session.savepoint(|s| s.execute(diesel::insert_into(users::table).values(users::id.eq(1))));
    /// assert!(twice.is_err());
    /// assert_eq!(session.count(users::table)?, 1);            // the session goes on, on every database
    /// session.commit()
    /// # })?;
    /// # app.dispose()?;
    /// # Ok::<(), diesel_session::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of `body`, and those of [`begin`](Self::begin) turned into `E`. Where `body` returned `Ok` after an error that
    /// aborted the savepoint, [`Error::RollbackRequired`]; the session goes on all the same.
    #[track_caller]
    pub fn savepoint<T, E: From<Error>>(&self, body: impl FnOnce(&Self) -> Result<T, E>) -> Result<T, E> {
        self.savepoint_at("savepoint", Location::caller(), body)
    }

    /// Whether a transaction has begun and not ended.
    pub fn in_transaction(&self) -> bool {
        self.0.has_begun()
    }

    /// Ends the session: rolls back, gives the connection back and drops its hooks. The handle can be used again, as new,
    /// until its context ends. Calling it twice is the same as once.
    ///
    /// # Errors
    /// [`Error::InsideTransaction`], [`Error::SessionBusy`].
    #[track_caller]
    pub fn remove(&self) -> Result<()> {
        let at = Location::caller();
        if self.0.ended.get() {
            return Ok(());
        }
        self.0.outside_blocks("remove", at)?;
        drop(self.0.enter(at)?);
        self.0.clear(at);
        Ok(())
    }

    fn savepoint_at<T, E: From<Error>>(
        &self,
        name: &'static str,
        at: Place,
        body: impl FnOnce(&Self) -> Result<T, E>,
    ) -> Result<T, E> {
        self.0.enter(at)?.open_level(at)?;
        let block = Block::open(&self.0, name, at, true);
        let mark = block.mark;
        let outcome = body(self);
        block.close();
        let kept = match (outcome, self.0.enter(at)) {
            (Ok(value), Ok(mut core)) => core.keep_level(at).map(|()| value).map_err(E::from),
            (Err(error), Ok(mut core)) => {
                core.undo_level(at);
                Err(error)
            }
            (outcome, Err(busy)) => {
                self.0.abandon(at);
                outcome.and(Err(busy.into()))
            }
        };
        if kept.is_err() {
            self.0.forget_hooks(mark);
        }
        kept
    }
}

/// Hooks. Each runs once, in the order of registration; those registered inside a savepoint that was rolled back, and those
/// left when the session is removed, are dropped.
impl<C: SessionConnection> Session<C> {
    /// Runs `hook` before the next commit; it may use the session, and its `Err` or panic prevents the commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn before_commit<R: HookOutcome>(&self, hook: impl FnOnce() -> R + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().before_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next commit, when the connection has gone back. A panic becomes [`Error::HookFailed`] of the
    /// commit, which happened all the same; later hooks still run.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_commit(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_commit(hook);
        Ok(())
    }

    /// Runs `hook` after the next rollback of the whole transaction, when the connection has gone back; also at the end of a
    /// context that did not commit.
    ///
    /// # Errors
    /// [`Error::SessionEnded`].
    #[track_caller]
    pub fn after_rollback(&self, hook: impl FnOnce() + 'static) -> Result<()> {
        self.0.not_ended(Location::caller())?;
        self.0.hooks.borrow_mut().after_rollback(hook);
        Ok(())
    }
}

/// What the handles of one session share.
#[derive(Debug)]
pub(crate) struct Shared<C: SessionConnection> {
    app: App<C>,
    core: RefCell<Core<C>>,
    /// Who has `core`, or has been lent the connection.
    used_at: Cell<Option<Place>>,
    lent: Cell<bool>,
    ended: Cell<bool>,
    blocks: RefCell<Vec<(&'static str, Place)>>,
    hooks: RefCell<Hooks>,
}

/// A `before_commit` hook may register another; that goes on for so long.
const HOOK_ROUNDS: usize = 100;

impl<C: SessionConnection> Shared<C> {
    pub(crate) fn new(app: App<C>, settings: Settings) -> Self {
        Self {
            core: RefCell::new(Core::new(app.clone(), settings)),
            app,
            used_at: Cell::new(None),
            lent: Cell::new(false),
            ended: Cell::new(false),
            blocks: RefCell::default(),
            hooks: RefCell::default(),
        }
    }

    pub(crate) fn app(&self) -> &App<C> {
        &self.app
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.core.try_borrow().map_or(true, |core| core.is_active())
    }

    /// Commits, hooks included.
    pub(crate) fn commit(&self, at: Place) -> Result<()> {
        let rollbacks = self.enter(at)?.rollbacks();
        for round in 0.. {
            let hooks = self.hooks.borrow_mut().take_before_commit();
            if hooks.is_empty() {
                break;
            }
            if round == HOOK_ROUNDS {
                let message = format!("before_commit hooks went on registering others for {HOOK_ROUNDS} rounds");
                return Err(Error::HookFailed { hook: "before_commit", committed: false, message });
            }
            let mut hooks = hooks.into_iter();
            while let Some(hook) = hooks.next() {
                if let Err(error) = hooks::run_before_commit(hook) {
                    self.hooks.borrow_mut().put_back(hooks);
                    return Err(error);
                }
                if self.enter(at)?.rollbacks() != rollbacks {
                    let message = "it rolled back what was to be committed".into();
                    return Err(Error::HookFailed { hook: "before_commit", committed: false, message });
                }
            }
        }
        let mut core = self.enter(at)?;
        let outcome = core.commit(at);
        let over = !core.is_active();
        drop(core);
        match outcome {
            Ok(()) => self.take_hooks().run_after_commit(),
            Err(error) if over => {
                let _ = self.take_hooks().run_after_rollback();
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn rollback(&self, at: Place) -> Result<()> {
        let mut core = self.enter(at)?;
        let active = core.is_active();
        core.rollback();
        drop(core);
        let hooks = self.take_hooks();
        if active { hooks.run_after_rollback() } else { Ok(()) }
    }

    /// Rolls back and drops all hooks; what the hooks do cannot prevent it.
    fn clear(&self, at: Place) {
        let _ = self.rollback(at);
        self.take_hooks().discard();
    }

    /// The end: afterwards every use is an error. A connection that is still lent goes back when its guard is dropped.
    pub(crate) fn end(&self) {
        if self.ended.get() {
            return;
        }
        let at = Location::caller();
        if self.lent.get() {
            self.take_hooks().discard();
        } else {
            self.used_at.set(None);
            self.clear(at);
        }
        self.ended.set(true);
        // A hook of the rollback may have used the session once more. What is lent is rolled back when it comes back.
        if !self.lent.get() {
            if let Ok(mut core) = self.core.try_borrow_mut() {
                core.rollback();
            }
        }
        self.take_hooks().discard();
    }

    fn run<T>(&self, access: Access, at: Place, send: impl FnOnce(&mut C) -> QueryResult<T>) -> Result<T> {
        let mut core = self.enter(at)?;
        let _using = Using::new(&self.used_at, at);
        core.run(access, at, send)
    }

    fn enter(&self, at: Place) -> Result<RefMut<'_, Core<C>>> {
        self.not_ended(at)?;
        let held_at = self.used_at.get().unwrap_or(at);
        if self.lent.get() {
            return Err(Error::SessionBusy { held_at, at });
        }
        self.core.try_borrow_mut().map_err(|_| Error::SessionBusy { held_at, at })
    }

    fn not_ended(&self, at: Place) -> Result<()> {
        if self.ended.get() { Err(Error::SessionEnded { app: self.app.id().into(), at }) } else { Ok(()) }
    }

    fn outside_blocks(&self, operation: &'static str, at: Place) -> Result<()> {
        match self.blocks.borrow().last() {
            Some(&(outer, outer_at)) => Err(Error::InsideTransaction { operation, outer, outer_at, at }),
            None => Ok(()),
        }
    }

    fn is_in_block(&self) -> bool {
        !self.blocks.borrow().is_empty()
    }

    /// After a commit that failed and left the transaction open.
    fn roll_back_for(&self, error: &Error, at: Place) {
        if !matches!(error, Error::HookFailed { committed: true, .. }) {
            self.undo(at);
        }
    }

    /// Rolls back for an error that matters more than what the hooks say.
    fn undo(&self, at: Place) {
        let _ = self.rollback(at);
        self.abandon(at);
    }

    /// What could not be undone at the end of a closure, as the connection is lent, cannot be committed either.
    fn abandon(&self, at: Place) {
        if self.lent.get() {
            if let Ok(mut core) = self.core.try_borrow_mut() {
                core.abandon(at);
            }
        }
    }

    fn take_hooks(&self) -> Hooks {
        std::mem::take(&mut *self.hooks.borrow_mut())
    }

    fn forget_hooks(&self, mark: Mark) {
        let forgotten = self.hooks.borrow_mut().since(mark);
        forgotten.discard();
    }
}

impl<C: SessionConnection> Drop for Shared<C> {
    fn drop(&mut self) {
        self.end();
    }
}

/// An open closure of `transaction` or `savepoint`. Dropped by a panic, it undoes what the closure did.
struct Block<'s, C: SessionConnection> {
    session: &'s Shared<C>,
    mark: Mark,
    savepoint: bool,
    open: bool,
}

impl<'s, C: SessionConnection> Block<'s, C> {
    fn open(session: &'s Shared<C>, name: &'static str, at: Place, savepoint: bool) -> Self {
        session.blocks.borrow_mut().push((name, at));
        Self { session, mark: session.hooks.borrow().mark(), savepoint, open: true }
    }

    fn close(mut self) {
        self.open = false;
        self.session.blocks.borrow_mut().pop();
    }
}

impl<C: SessionConnection> Drop for Block<'_, C> {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let Some((_, at)) = self.session.blocks.borrow_mut().pop() else { return };
        if self.savepoint {
            if let Ok(mut core) = self.session.enter(at) {
                core.undo_level(at);
            }
            self.session.abandon(at);
            self.session.forget_hooks(self.mark);
        } else {
            self.session.undo(at);
        }
    }
}

/// Says who uses the session, for as long as that lasts.
struct Using<'s>(&'s Cell<Option<Place>>);

impl<'s> Using<'s> {
    fn new(cell: &'s Cell<Option<Place>>, at: Place) -> Self {
        cell.set(Some(at));
        Self(cell)
    }
}

impl Drop for Using<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}

/// What a query may do, by its type: a typed SELECT only reads, raw SQL may do anything.
fn access_of<Q: AsQuery>(_: &Q) -> Access {
    let query = type_name::<Q::Query>();
    if query.starts_with("diesel::query_builder::select_statement::") {
        Access::Read
    } else if is_typed(query) {
        Access::Write
    } else {
        Access::Raw
    }
}

fn is_typed(query: &str) -> bool {
    query.starts_with("diesel::query_builder::") && !query.starts_with("diesel::query_builder::sql_query::")
}
