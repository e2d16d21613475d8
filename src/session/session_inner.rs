//! The part of a session that all its handles share: the transaction, the hooks, the open scopes and the unit of
//! work.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::panic::{Location, resume_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use diesel::query_builder::QueryFragment;
use diesel::result::QueryResult;

use super::Session;
use super::hooks::{ChangeEvent, FlushHook, Hook, HookEvent, RowHooks};
use super::open_sessions::{OpenSession, OpenSessions};
use super::statement::Statement;
use super::transaction_state::{Access, TransactionState};
use crate::app_core::AppCore;
use crate::connection::{SessionConnection, sql_of};
use crate::error::{Details, Error, Result, SourceLocation, Undo};
use crate::kind::DatabaseKind;
use crate::panic::{catch_panic, drop_each_catching_panics};
use crate::settings::Settings;
use crate::unit_of_work::{Newest, Unit};

/// What all sessions of an application share.
pub(crate) struct SessionFactory<C: SessionConnection> {
    pub(crate) app_core: Arc<AppCore<C>>,
    pub(crate) row_hooks: RowHooks<C>,
    /// The list of open sessions, if the application belongs to a test.
    pub(crate) open_sessions: Option<Arc<OpenSessions>>,
}

/// The part of a session that all its handles share.
pub(crate) struct SessionInner<C: SessionConnection> {
    factory: Arc<SessionFactory<C>>,
    pub(super) transaction: RefCell<TransactionState<C>>,
    /// The last call that has used the transaction, or the call that moved the connection into a guard.
    pub(super) used_at: Cell<Option<SourceLocation>>,
    pub(super) has_guard: Cell<bool>,
    pub(super) ended: Cell<bool>,
    pub(super) open_scopes: RefCell<Vec<OpenScope>>,
    /// The running hook of a flush or a commit, and the number of scopes that were open at its start.
    pub(super) running_hook: Cell<Option<(&'static str, usize)>>,
    pub(super) hooks: RefCell<Vec<Hook>>,
    /// The tracked rows, once the program has used the unit of work.
    pub(super) unit: OnceCell<Unit<C>>,
    pub(super) flush_hooks: RefCell<Vec<(ChangeEvent, FlushHook<C>)>>,
    /// For the session handles that hooks receive.
    pub(super) weak_self: Weak<Self>,
    /// The entry in the list of a test's open sessions.
    registration: RefCell<Option<Arc<OpenSession>>>,
}

/// A running closure of `transaction`, `savepoint` or `retry`.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenScope {
    pub(super) name: &'static str,
    pub(super) at: SourceLocation,
    pub(super) is_savepoint: bool,
}

/// The number of rounds in which `before_commit` hooks may register further hooks.
const HOOK_ROUNDS: usize = 100;

impl<C: SessionConnection> SessionInner<C> {
    pub(crate) fn new(factory: Arc<SessionFactory<C>>, settings: Settings, at: SourceLocation) -> Rc<Self> {
        Rc::new_cyclic(|weak_self| Self {
            registration: RefCell::new(factory.open_sessions.as_ref().map(|sessions| sessions.register(at))),
            transaction: RefCell::new(TransactionState::new(Arc::clone(&factory.app_core), settings)),
            factory,
            used_at: Cell::new(None),
            has_guard: Cell::new(false),
            ended: Cell::new(false),
            open_scopes: RefCell::default(),
            running_hook: Cell::new(None),
            hooks: RefCell::default(),
            unit: OnceCell::new(),
            flush_hooks: RefCell::default(),
            weak_self: Weak::clone(weak_self),
        })
    }

    pub(crate) fn app(&self) -> &Arc<AppCore<C>> {
        &self.factory.app_core
    }

    pub(super) fn row_hooks(&self) -> &RowHooks<C> {
        &self.factory.row_hooks
    }

    /// A new handle; `None` while the session is being dropped.
    pub(super) fn handle(&self) -> Option<Session<C>> {
        self.weak_self.upgrade().map(Session)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app().options().target.kind.known()
    }

    /// Adds to the error what the program has to do to undo the transaction.
    #[cold]
    pub(super) fn with_undo(&self, mut error: Error) -> Error {
        error.set_undo(&|whole| self.needed_undo(whole));
        error
    }

    /// What the program has to do, at its current point, to undo the transaction or the part of it that can be undone
    /// alone. `whole` says that the transaction has to end.
    fn needed_undo(&self, whole: bool) -> Undo {
        let Ok(transaction) = self.transaction.try_borrow() else { return Undo::NotNeeded };
        let has_ended = transaction.invalidation.as_ref().map(|invalidation| invalidation.ended);
        let whole = match (has_ended, transaction.has_begun()) {
            (None, false) => return Undo::RolledBack,
            (None, true) if !whole => return Undo::NotNeeded,
            (has_ended, _) => whole || has_ended == Some(true),
        };
        let open_scopes = self.open_scopes.borrow();
        let hook = self.running_hook.get();
        let open_before_hook = hook.map_or(0, |(_, open)| open);
        let closure = if whole { open_scopes.first() } else { open_scopes.last() };
        match (hook, closure) {
            (Some((name, _)), _) if whole || open_scopes.len() <= open_before_hook => Undo::Hook { name },
            (_, None) if transaction.settings.commits => Undo::Scope,
            (_, None) => Undo::Rollback,
            // The outermost closure ends the transaction, unless that closure is a savepoint too.
            (_, Some(&OpenScope { name, at, is_savepoint })) => match whole && is_savepoint {
                true => Undo::ClosureThenRollback { name, at },
                false => Undo::Closure { name, at },
            },
        }
    }

    /// Completes the error of a savepoint's end. The savepoint has been rolled back.
    pub(super) fn with_undo_after_savepoint(&self, mut error: Error) -> Error {
        error.set_undo(&|whole| match self.needed_undo(whole) {
            Undo::NotNeeded => Undo::SavepointRolledBack,
            undo => undo,
        });
        error
    }

    /// Begins the transaction at the program's request.
    pub(super) fn begin(&self, at: SourceLocation) -> Result<()> {
        let outcome = self.borrow_transaction(at).and_then(|mut transaction| {
            if transaction.has_only_read() {
                // The rows may have changed since, and the program asks for the values inside.
                self.expire_rows();
            }
            transaction.begin(at)
        });
        outcome.map_err(|error| self.with_undo(error))
    }

    /// Whether a transaction has begun. A transaction in use counts as begun.
    pub(crate) fn in_transaction(&self) -> bool {
        self.transaction.try_borrow().map_or(true, |transaction| transaction.has_begun())
    }

    /// The changes that the end of the session would lose, as a log line describes them.
    pub(crate) fn uncommitted(&self) -> Option<String> {
        let written = self.transaction.try_borrow().ok().and_then(|transaction| transaction.uncommitted_write());
        if let Some((begun_at, first_write)) = written {
            let writes = (begun_at != first_write).then(|| format!(" and has written since {first_write}"));
            return Some(format!("their transaction began at {begun_at}{}", writes.unwrap_or_default()));
        }
        let unit = self.unit.get()?;
        let since = unit.unflushed_since()?;
        let is_dirty = catch_panic("a comparison of rows", || unit.is_dirty()).unwrap_or(false);
        is_dirty.then(|| format!("they are not flushed, and the first was made at {since}"))
    }

    pub(super) fn open_savepoint(&self, at: SourceLocation) -> Result<()> {
        let opened = self.borrow_transaction(at).and_then(|mut transaction| transaction.open_savepoint(at));
        opened.map_err(|error| self.with_undo(error))?;
        self.with_unit(|unit| unit.state.level.update(|level| level + 1));
        Ok(())
    }

    /// Runs the `before_commit` hooks, flushes, commits and runs the `after_commit` hooks.
    pub(crate) fn commit(&self, at: SourceLocation) -> Result<()> {
        if self.unit.get().is_none() && self.has_nothing_to_end() {
            self.borrow_transaction(at)?.end_reading();
            return Ok(());
        }
        self.commit_with(at, |_| 0)
    }

    /// Commits like [`commit`](Self::commit). If a failure has ended the transaction, the first hooks stay for another
    /// attempt: as many as `keep` says.
    pub(super) fn commit_with(&self, at: SourceLocation, keep: impl FnOnce(&Error) -> usize) -> Result<()> {
        let committed = self.prepare_commit(at).and_then(|()| {
            self.commit_transaction(at, |error| self.take_hooks_since(error.map_or(0, keep)))?;
            self.end_transaction_of_rows(true, self.take_hooks_since(0))
        });
        committed.map_err(|error| self.with_undo(error))
    }

    /// Runs the `before_commit` hooks and flushes, until nothing is left to do.
    fn prepare_commit(&self, at: SourceLocation) -> Result<()> {
        drop(self.borrow_transaction(at)?);
        if self.unit.get().is_some_and(Unit::is_flushing) {
            return Err(Details::AlreadyFlushing { at }.into());
        }
        let mut has_run_row_hook = false;
        for round in 0.. {
            let is_due = |(event, _): &mut Hook| *event == HookEvent::BeforeCommit;
            let hooks: Vec<Hook> = self.hooks.borrow_mut().extract_if(.., is_due).collect();
            if hooks.is_empty() && !self.has_unflushed() {
                // The hook may change rows. It does not run again for those.
                if std::mem::replace(&mut has_run_row_hook, true) || !self.has_change_hook(ChangeEvent::BeforeCommit) {
                    break;
                }
                let changes = self.unit.get().map(Unit::flushed_now).unwrap_or_default();
                self.run_change_hooks(ChangeEvent::BeforeCommit, &changes, at)?;
            }
            if round == HOOK_ROUNDS {
                let (hook, message) = match hooks.is_empty() {
                    true => {
                        ("after_flush", format!("it went on changing rows for {HOOK_ROUNDS} flushes of one commit"))
                    }
                    false => ("before_commit", format!("it went on registering others for {HOOK_ROUNDS} rounds")),
                };
                self.hooks.borrow_mut().splice(..0, hooks);
                return Err(Details::HookFailed { hook, committed: false, message }.into());
            }
            let mut hooks = hooks.into_iter();
            while let Some((_, hook)) = hooks.next() {
                if let Err(error) = self.run_checked_hook("before_commit", at, hook) {
                    self.hooks.borrow_mut().splice(..0, hooks);
                    return Err(error);
                }
            }
            self.flush(at)?;
        }
        Ok(())
    }

    /// Commits without hooks. After a failure that has ended the transaction, the hooks run that `take_hooks` returns.
    /// If the outcome is unknown, which includes a panic of the program's instrumentation, they are dropped.
    pub(super) fn commit_transaction(
        &self,
        at: SourceLocation,
        take_hooks: impl FnOnce(Option<&Error>) -> Vec<Hook>,
    ) -> Result<()> {
        let mut transaction = self.borrow_transaction(at)?;
        let outcome = transaction.commit(at);
        let has_ended = !transaction.has_begun();
        drop(transaction);
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                match error.verdict() {
                    Some(verdict) => {
                        self.with_unit(|unit| unit.undecided(verdict));
                        drop_each_catching_panics(take_hooks(Some(&error)));
                    }
                    None if has_ended => drop(self.end_transaction_of_rows(false, take_hooks(Some(&error)))),
                    None => {}
                }
                Err(error)
            }
            Err(panic) => {
                self.with_unit(|unit| unit.undecided(&Arc::default()));
                drop_each_catching_panics(take_hooks(None));
                resume_unwind(panic)
            }
        }
    }

    pub(crate) fn rollback(&self, at: SourceLocation) -> Result<()> {
        self.roll_back(self.borrow_transaction(at)?, 0)
    }

    /// Rolls back at the end of a closure or of a flush. The first hooks stay, as many as `kept_hooks` says. Errors are
    /// dropped: the error that leads to the rollback matters more to the caller.
    pub(super) fn roll_back_at_end(&self, kept_hooks: usize, at: SourceLocation) {
        if let Ok(transaction) = self.borrow_transaction_at_end(at) {
            let _ = self.roll_back(transaction, kept_hooks);
        }
    }

    fn roll_back(&self, mut transaction: RefMut<'_, TransactionState<C>>, kept_hooks: usize) -> Result<()> {
        let was_used = transaction.is_used();
        transaction.rollback();
        drop(transaction);
        let mut hooks = self.take_hooks_since(kept_hooks);
        if !was_used {
            drop_each_catching_panics(hooks.drain(..));
        }
        self.end_transaction_of_rows(false, hooks)
    }

    /// Ends the session: every later use is an error. If a guard owns the connection, the drop of the guard rolls
    /// back and checks the connection in.
    pub(crate) fn end(&self) {
        if self.ended.get() {
            return;
        }
        drop(self.registration.take());
        let is_idle = self.has_nothing_to_end() && self.has_no_rows_to_end();
        if !is_idle && !self.has_guard.get() {
            // Hooks of the rollback may still use the session.
            let _ = self.rollback(Location::caller());
        }
        // Set before the program's own values are dropped: their `Drop` may panic and may use the session.
        self.ended.set(true);
        self.drop_rows_and_flush_hooks();
        if is_idle {
            return;
        }
        self.discard_hooks_since(0);
        // A hook of the rollback may have used the session again. If a guard owns the connection, its drop rolls
        // back.
        if let (false, Ok(mut transaction)) = (self.has_guard.get(), self.transaction.try_borrow_mut()) {
            transaction.rollback();
        }
    }

    /// Whether the session has no transaction, no connection to check in and no hook to run or drop.
    fn has_nothing_to_end(&self) -> bool {
        let transaction = self.transaction.try_borrow();
        !self.has_guard.get()
            && self.hooks.borrow().is_empty()
            && transaction.is_ok_and(|transaction| transaction.is_at_rest())
    }

    /// Whether the rows of the unit of work have no reads and no transaction that end with the session.
    fn has_no_rows_to_end(&self) -> bool {
        self.unit.get().is_none() || self.transaction.try_borrow().is_ok_and(|transaction| !transaction.is_used())
    }

    /// What the session knows about a query. Its SQL is built if only the SQL shows whether the query can be sent
    /// outside of a transaction.
    #[inline]
    pub(super) fn judge<Q: QueryFragment<C::Backend>>(&self, query: &Q) -> Statement {
        let statement = Statement::of_query::<Q>();
        match self.needs_text(&statement) {
            false => statement,
            true => statement.with_text(self.kind(), sql_of::<C::Backend>(query).as_deref()),
        }
    }

    #[inline]
    fn needs_text(&self, statement: &Statement) -> bool {
        let precedes = |state: &TransactionState<C>| {
            state.may_read_outside() && (state.reads_committed() || state.style().is_nested())
        };
        statement.only_reads(self.kind()).is_none() && self.transaction.try_borrow().is_ok_and(|state| precedes(&state))
    }

    pub(super) fn run<T>(
        &self,
        statement: Statement,
        at: SourceLocation,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        self.autoflush_before(statement, at)?;
        if statement.access == Access::Raw {
            // Code that has the connection may write to handles after it has changed their rows.
            self.expire_rows();
        }
        let outcome = self.run_without_flush(statement, at, send);
        // A program that locks rows expects later reads to give the newest values.
        if statement.expires_rows || statement.newest == Newest::Locked {
            self.expire_rows();
        }
        outcome
    }

    /// Runs the statement without a flush before it and without expiring the rows that it may change.
    pub(super) fn run_without_flush<T>(
        &self,
        statement: Statement,
        at: SourceLocation,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let mut transaction = self.borrow_transaction(at)?;
        if let Some(unit) = self.unit.get() {
            unit.state.autocommit_reads.set(transaction.is_autocommitting());
            if statement.access != Access::Read {
                unit.state.note_changing();
            }
        }
        let outcome = transaction.run(statement, at, send);
        drop(transaction);
        outcome.map_err(|error| self.with_undo(error))
    }

    pub(super) fn borrow_transaction(&self, at: SourceLocation) -> Result<RefMut<'_, TransactionState<C>>> {
        self.check_not_ended(at)?;
        let held_at = self.used_at.get().unwrap_or(at);
        if self.has_guard.get() {
            return Err(Details::SessionBusy { held_at, at }.into());
        }
        let transaction = self.transaction.try_borrow_mut();
        let transaction = transaction.map_err(|_| Error::from(Details::SessionBusy { held_at, at }))?;
        self.used_at.set(Some(at));
        Ok(transaction)
    }

    pub(super) fn check_not_ended(&self, at: SourceLocation) -> Result<()> {
        if self.ended.get() { Err(Details::SessionEnded { app: self.app().id().into(), at }.into()) } else { Ok(()) }
    }

    pub(super) fn check_outside_scopes(&self, operation: &'static str, at: SourceLocation) -> Result<()> {
        match self.open_scopes.borrow().last() {
            Some(&OpenScope { name: outer, at: outer_at, .. }) => {
                Err(Details::InsideTransaction { operation, outer, outer_at, at }.into())
            }
            None => Ok(()),
        }
    }

    /// Rolls back after an error of a commit, unless the commit has succeeded and only a hook has failed.
    pub(super) fn roll_back_after(&self, error: &Error, at: SourceLocation) {
        if !error.is_hook_failure_after_commit() {
            self.roll_back_at_end(0, at);
        }
    }

    /// Borrows the transaction at the end of a closure of `transaction`, `savepoint` or `retry`. If that is
    /// impossible because the closure has kept the connection guard, the work of the closure can be neither committed
    /// nor undone alone, so the whole transaction is invalidated.
    pub(super) fn borrow_transaction_at_end(&self, at: SourceLocation) -> Result<RefMut<'_, TransactionState<C>>> {
        let borrowed = self.borrow_transaction(at);
        if borrowed.is_err()
            && let Ok(mut transaction) = self.transaction.try_borrow_mut()
        {
            transaction.invalidate(
                "its closure ended while a `ConnectionGuard` of the session was alive".into(),
                at,
                true,
            );
        }
        borrowed
    }

    pub(super) fn drop_rows_and_flush_hooks(&self) {
        self.with_unit(Unit::clear);
        if !self.flush_hooks.borrow().is_empty() {
            drop_each_catching_panics(self.flush_hooks.take());
        }
    }

    /// Tells the unit of work, if the program has used it.
    pub(super) fn with_unit(&self, tell: impl FnOnce(&Unit<C>)) {
        if let Some(unit) = self.unit.get() {
            tell(unit);
        }
    }

    pub(super) fn expire_rows(&self) {
        self.with_unit(|unit| unit.state.expire());
    }
}

/// A running closure of `transaction`, `savepoint` or `retry`. Its drop undoes the changes of the closure, also after a panic.
pub(super) struct TransactionScope<'s, C: SessionConnection> {
    session: &'s SessionInner<C>,
    /// The number of hooks that were registered before the closure.
    mark: usize,
}

impl<'s, C: SessionConnection> TransactionScope<'s, C> {
    pub(super) fn open(
        session: &'s SessionInner<C>,
        name: &'static str,
        at: SourceLocation,
        is_savepoint: bool,
    ) -> Self {
        session.open_scopes.borrow_mut().push(OpenScope { name, at, is_savepoint });
        Self { session, mark: session.hooks.borrow().len() }
    }

    /// The closure has ended, and its work stays.
    pub(super) fn close(self) {
        self.session.open_scopes.borrow_mut().pop();
        std::mem::forget(self);
    }
}

impl<C: SessionConnection> Drop for TransactionScope<'_, C> {
    fn drop(&mut self) {
        let Some(OpenScope { at, is_savepoint, .. }) = self.session.open_scopes.borrow_mut().pop() else { return };
        if !is_savepoint {
            return self.session.roll_back_at_end(0, at);
        }
        if let Ok(mut transaction) = self.session.borrow_transaction_at_end(at) {
            transaction.roll_back_savepoint(at);
        }
        self.session.with_unit(Unit::roll_back_savepoint);
        self.session.discard_hooks_since(self.mark);
    }
}

impl<C: SessionConnection> Drop for SessionInner<C> {
    fn drop(&mut self) {
        self.end();
    }
}
