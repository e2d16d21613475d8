//! The part of a session that all its handles share: the transaction, the hooks, the open scopes and the unit of
//! work.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use diesel::result::QueryResult;

use super::Session;
use super::factory::SessionFactory;
use super::flush::FlushHooks;
use super::hooks::{self, HookMark, Hooks};
use super::open_sessions::Registration;
use super::row_hooks::RowHooks;
use super::statement::Statement;
use super::transaction_state::{Access, TransactionState};
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result, Undo};
use crate::kind::DatabaseKind;
use crate::panic::drop_each_catching_panics;
use crate::settings::Settings;
use crate::unit_of_work::{Newest, SessionReader, Unit};

/// The part of a session that all its handles share.
#[derive(Debug)]
pub(crate) struct SessionInner<C: SessionConnection> {
    factory: Arc<SessionFactory<C>>,
    pub(super) transaction: RefCell<TransactionState<C>>,
    /// The call that is using the transaction, or that moved the connection into a guard.
    pub(super) used_at: Cell<Option<Place>>,
    pub(super) has_guard: Cell<bool>,
    pub(super) ended: Cell<bool>,
    pub(super) open_scopes: RefCell<Vec<(&'static str, Place)>>,
    /// The running hook of a flush or a commit, and the number of scopes that were open at its start.
    pub(super) running_hook: Cell<Option<(&'static str, usize)>>,
    pub(super) hooks: RefCell<Hooks>,
    /// The number of open savepoints.
    pub(super) savepoints: Cell<u32>,
    /// The tracked rows, once the program has used the unit of work.
    pub(super) unit: OnceCell<Unit<C>>,
    pub(super) flush_hooks: RefCell<FlushHooks<C>>,
    /// For the session handles that hooks receive.
    weak_self: Weak<Self>,
    /// The entry in the list of a test's open sessions.
    registration: RefCell<Option<Registration>>,
}

/// The number of rounds in which `before_commit` hooks may register further hooks.
const HOOK_ROUNDS: usize = 100;

impl<C: SessionConnection> SessionInner<C> {
    pub(crate) fn new(factory: Arc<SessionFactory<C>>, settings: Settings, at: Place) -> Rc<Self> {
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
            savepoints: Cell::new(0),
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
        self.app().options().target.kind
    }

    /// For the handles of the session's rows.
    pub(super) fn weak(&self) -> Weak<dyn SessionReader<C>> {
        let weak_self: Weak<Self> = Weak::clone(&self.weak_self);
        weak_self
    }

    /// Adds to the error what the program has to do to undo the transaction.
    pub(super) fn with_undo(&self, mut error: Error) -> Error {
        error.set_undo(&|whole| self.needed_undo(whole));
        error
    }

    /// What the program has to do, at its current point, to undo the transaction or the part of it that can be undone
    /// alone. `whole` says that the transaction has to end.
    fn needed_undo(&self, whole: bool) -> Undo {
        let Ok(transaction) = self.transaction.try_borrow() else { return Undo::NotNeeded };
        let has_ended = transaction.invalidation.as_ref().map(|invalidation| invalidation.ended);
        let whole = match (has_ended, transaction.is_active()) {
            (None, false) => return Undo::RolledBack,
            (None, true) if !whole => return Undo::NotNeeded,
            (has_ended, _) => whole || has_ended == Some(true),
        };
        let (open_scopes, savepoints) = (self.open_scopes.borrow(), self.savepoints.get() as usize);
        let hook = self.running_hook.get();
        let open_before_hook = hook.map_or(0, |(_, open)| open);
        let closure = if whole { open_scopes.first() } else { open_scopes.last() };
        match (hook, closure) {
            (Some((name, _)), _) if whole || open_scopes.len() <= open_before_hook => Undo::Hook { name },
            (_, None) if transaction.settings.commits => Undo::Scope,
            (_, None) => Undo::Rollback,
            // The outermost closure ends the transaction, unless that closure is a savepoint too.
            (_, Some(&(name, at))) if !whole || open_scopes.len() > savepoints => Undo::Closure { name, at },
            (_, Some(&(name, at))) => Undo::ClosureThenRollback { name, at },
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

    /// Begins the transaction at the program's request. Rows that were read outside of it are read again inside.
    pub(super) fn begin(&self, at: Place) -> Result<()> {
        let mut transaction = self.borrow_transaction(at)?;
        let may_have_read_outside = transaction.may_have_read_outside();
        let outcome = transaction.begin(at);
        drop(transaction);
        outcome.map_err(|error| self.with_undo(error))?;
        if may_have_read_outside {
            self.expire_rows();
        }
        Ok(())
    }

    /// Whether the session holds a connection for its transaction. A transaction in use counts as active.
    pub(crate) fn is_active(&self) -> bool {
        self.transaction.try_borrow().map_or(true, |transaction| transaction.is_active())
    }

    /// Runs the `before_commit` hooks, flushes, commits and runs the `after_commit` hooks.
    pub(crate) fn commit(&self, at: Place) -> Result<()> {
        self.commit_with(at, |_| None)
    }

    /// Commits like [`commit`](Self::commit). If a failure has ended the transaction, `keep` may return a mark: the
    /// hooks before the mark stay for another attempt.
    pub(super) fn commit_with(&self, at: Place, keep: impl FnOnce(&Error) -> Option<HookMark>) -> Result<()> {
        self.commit_with_hooks(at, keep).map_err(|error| self.with_undo(error))
    }

    fn commit_with_hooks(&self, at: Place, keep: impl FnOnce(&Error) -> Option<HookMark>) -> Result<()> {
        drop(self.borrow_transaction(at)?);
        if self.unit.get().is_some_and(Unit::is_flushing) {
            return Err(Error::AlreadyFlushing { at });
        }
        let mut has_run_row_hook = false;
        for round in 0.. {
            let hooks = self.hooks.borrow_mut().take_before_commit();
            if hooks.is_empty() && !self.has_unflushed() {
                // The hook may change rows. It does not run again for those.
                match self.changes_for_commit_hooks().filter(|_| !std::mem::replace(&mut has_run_row_hook, true)) {
                    Some(changes) => self.run_before_commit_row_hook(&changes, at)?,
                    None => break,
                }
            }
            if round == HOOK_ROUNDS {
                let (hook, message) = match hooks.is_empty() {
                    true => {
                        ("after_flush", format!("it went on changing rows for {HOOK_ROUNDS} flushes of one commit"))
                    }
                    false => ("before_commit", format!("it went on registering others for {HOOK_ROUNDS} rounds")),
                };
                self.hooks.borrow_mut().put_back(hooks.into_iter());
                return Err(Error::HookFailed { hook, committed: false, message });
            }
            let mut hooks = hooks.into_iter();
            while let Some(hook) = hooks.next() {
                if let Err(error) = self.run_checked_hook("before_commit", at, || hooks::run_before_commit(hook)) {
                    self.hooks.borrow_mut().put_back(hooks);
                    return Err(error);
                }
            }
            self.flush(at)?;
        }
        let changes = self.changes_for_commit_hooks();
        let mut transaction = self.borrow_transaction(at)?;
        let outcome = self.commit_transaction(&mut transaction, at);
        let has_ended = !transaction.is_active();
        drop(transaction);
        let outcome = outcome.unwrap_or_else(|panic| {
            self.unit_undecided(&Arc::default());
            self.take_hooks().discard();
            resume_unwind(panic)
        });
        match outcome {
            Ok(()) => {
                self.unit_committed();
                let row_hook_outcome = changes.map_or(Ok(()), |changes| self.run_after_commit_row_hook(&changes));
                self.take_hooks().run_after_commit().and(row_hook_outcome)
            }
            Err(error) => {
                let is_unknown = error.is_commit_unknown();
                if let Error::CommitUnknown(unknown) = &error {
                    self.unit_undecided(&unknown.verdict);
                } else if has_ended {
                    self.unit_rolled_back();
                }
                if is_unknown || has_ended {
                    let hooks = match keep(&error) {
                        Some(mark) => self.hooks.borrow_mut().split_off(mark),
                        None => self.take_hooks(),
                    };
                    if is_unknown {
                        // Neither the commit nor the rollback is certain.
                        hooks.discard();
                    } else {
                        let _ = hooks.run_after_rollback();
                    }
                }
                Err(error)
            }
        }
    }

    /// Commits without hooks. The outer `Err` is a panic of the program's instrumentation, after which the outcome of
    /// the commit is unknown.
    pub(super) fn commit_transaction(
        &self,
        transaction: &mut TransactionState<C>,
        at: Place,
    ) -> std::thread::Result<Result<()>> {
        catch_unwind(AssertUnwindSafe(|| transaction.commit(at)))
    }

    pub(crate) fn rollback(&self, at: Place) -> Result<()> {
        let mut transaction = self.borrow_transaction(at)?;
        let was_active = transaction.is_active();
        transaction.rollback();
        drop(transaction);
        self.unit_rolled_back();
        let hooks = self.take_hooks();
        if was_active { hooks.run_after_rollback() } else { Ok(()) }
    }

    /// Rolls back and drops all hooks. A failure of a hook does not prevent it.
    pub(super) fn clear(&self, at: Place) {
        let _ = self.rollback(at);
        self.take_hooks().discard();
        self.unit_cleared();
        self.drop_flush_hooks();
    }

    /// Ends the session: every later use is an error. If a guard owns the connection, the drop of the guard rolls
    /// back and checks the connection in.
    pub(crate) fn end(&self) {
        if self.ended.get() {
            return;
        }
        drop(self.registration.take());
        let is_idle = self.is_idle();
        if !is_idle && !self.has_guard.get() {
            self.used_at.set(None);
            // Hooks of the rollback may still use the session.
            let _ = self.rollback(Location::caller());
        }
        // Set before the program's own values are dropped: their `Drop` may panic and may use the session.
        self.ended.set(true);
        self.unit_cleared();
        self.drop_flush_hooks();
        if is_idle {
            return;
        }
        self.take_hooks().discard();
        // A hook of the rollback may have used the session again. If a guard owns the connection, its drop rolls
        // back.
        if let (false, Ok(mut transaction)) = (self.has_guard.get(), self.transaction.try_borrow_mut()) {
            transaction.rollback();
        }
    }

    /// Whether the session has nothing to roll back, no connection to check in and no hook to run or drop.
    fn is_idle(&self) -> bool {
        let transaction = self.transaction.try_borrow();
        !self.has_guard.get()
            && self.hooks.borrow().is_empty()
            && transaction.is_ok_and(|transaction| transaction.is_idle())
    }

    pub(super) fn run<T>(
        &self,
        statement: Statement,
        at: Place,
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
        at: Place,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let mut transaction = self.borrow_transaction(at)?;
        if let Some(unit) = self.unit.get() {
            unit.set_autocommit_reads(transaction.is_autocommitting());
            let outside = transaction.reads_before_transaction(statement.access);
            unit.set_reads_before_transaction(outside);
            if transaction.is_reading() && !outside {
                // This statement begins the transaction: rows that were read before may have changed since.
                unit.expire_all();
            }
            if statement.access != Access::Read {
                unit.note_changing();
            }
        }
        let in_use = InUse::new(&self.used_at, at);
        let outcome = transaction.run(statement, at, send);
        drop((transaction, in_use));
        outcome.map_err(|error| self.with_undo(error))
    }

    pub(super) fn borrow_transaction(&self, at: Place) -> Result<RefMut<'_, TransactionState<C>>> {
        self.check_not_ended(at)?;
        let held_at = self.used_at.get().unwrap_or(at);
        if self.has_guard.get() {
            return Err(Error::SessionBusy { held_at, at });
        }
        self.transaction.try_borrow_mut().map_err(|_| Error::SessionBusy { held_at, at })
    }

    pub(super) fn check_not_ended(&self, at: Place) -> Result<()> {
        if self.ended.get() { Err(Error::SessionEnded { app: self.app().id().into(), at }) } else { Ok(()) }
    }

    pub(super) fn check_outside_scopes(&self, operation: &'static str, at: Place) -> Result<()> {
        match self.open_scopes.borrow().last() {
            Some(&(outer, outer_at)) => Err(Error::InsideTransaction { operation, outer, outer_at, at }),
            None => Ok(()),
        }
    }

    pub(super) fn is_in_scope(&self) -> bool {
        !self.open_scopes.borrow().is_empty()
    }

    /// Rolls back after an error of a commit, unless the commit has succeeded and only a hook has failed.
    pub(super) fn roll_back_after(&self, error: &Error, at: Place) {
        if !matches!(error, Error::HookFailed { committed: true, .. }) {
            self.roll_back_scope(at);
        }
    }

    /// Rolls back the closure of a `transaction` or `retry`.
    pub(super) fn roll_back_scope(&self, at: Place) {
        if self.borrow_transaction_at_end(at).is_ok() {
            let _ = self.rollback(at);
        }
    }

    /// Rolls back an attempt of `retry`, with the hooks since `mark`, and leaves the session idle for the next
    /// attempt.
    pub(super) fn roll_back_attempt(&self, mark: HookMark, at: Place) {
        if let Ok(mut transaction) = self.borrow_transaction_at_end(at) {
            transaction.rollback();
            drop(transaction);
            self.unit_rolled_back();
            let hooks = self.hooks.borrow_mut().split_off(mark);
            let _ = hooks.run_after_rollback();
            // A hook may have used the session.
            if let Ok(mut transaction) = self.borrow_transaction(at) {
                transaction.rollback();
                drop(transaction);
                self.unit_rolled_back();
            }
        }
    }

    /// Runs the remaining `after_rollback` hooks and drops the other hooks.
    pub(super) fn run_after_rollback_hooks(&self) {
        let _ = self.take_hooks().run_after_rollback();
    }

    /// Whether a statement of this transaction failed in a way that may succeed in another transaction.
    pub(super) fn has_transient_failure(&self) -> bool {
        !self.has_guard.get()
            && self.transaction.try_borrow().is_ok_and(|transaction| transaction.transient.is_relevant())
    }

    /// The deadline of the scope.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.transaction.try_borrow().ok()?.deadline_end()
    }

    /// Borrows the transaction at the end of a closure of `transaction`, `savepoint` or `retry`. If that is
    /// impossible because the closure has kept the connection guard, the work of the closure can be neither committed
    /// nor undone alone, so the whole transaction is invalidated.
    pub(super) fn borrow_transaction_at_end(&self, at: Place) -> Result<RefMut<'_, TransactionState<C>>> {
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

    fn drop_flush_hooks(&self) {
        let FlushHooks { before, after } = self.flush_hooks.take();
        drop_each_catching_panics(before);
        drop_each_catching_panics(after);
    }

    fn take_hooks(&self) -> Hooks {
        std::mem::take(&mut *self.hooks.borrow_mut())
    }

    pub(super) fn discard_hooks_since(&self, mark: HookMark) {
        let hooks = self.hooks.borrow_mut().split_off(mark);
        hooks.discard();
    }
}

impl<C: SessionConnection> Drop for SessionInner<C> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Notes the call that uses the session. Its drop deletes the note.
struct InUse<'s>(&'s Cell<Option<Place>>);

impl<'s> InUse<'s> {
    fn new(cell: &'s Cell<Option<Place>>, at: Place) -> Self {
        cell.set(Some(at));
        Self(cell)
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.0.set(None);
    }
}
