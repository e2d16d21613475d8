//! What the handles of one session share: the transaction, the hooks, and who is using it.

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Instant;

use diesel::result::QueryResult;

use super::Session;
use super::factory::SessionFactory;
use super::flush::FlushHooks;
use super::hooks::{self, Hooks, Mark};
use super::open_sessions::Listed;
use super::row_hooks::RowHooks;
use super::statement::Statement;
use super::transaction_state::{Access, TransactionState};
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::contain::drop_each;
use crate::error::{Error, Place, Result, Undo};
use crate::kind::DatabaseKind;
use crate::settings::Settings;
use crate::unit_of_work::{Newest, SessionReader, Unit};

/// What the handles of one session share.
#[derive(Debug)]
pub(crate) struct SessionInner<C: SessionConnection> {
    factory: Arc<SessionFactory<C>>,
    pub(super) core: RefCell<TransactionState<C>>,
    /// Who has `core`, or has been guarded the connection.
    pub(super) used_at: Cell<Option<Place>>,
    pub(super) guarded: Cell<bool>,
    pub(super) ended: Cell<bool>,
    pub(super) blocks: RefCell<Vec<(&'static str, Place)>>,
    /// The hook before a flush or a commit that runs, and how many closures were open when it began.
    pub(super) hook: Cell<Option<(&'static str, usize)>>,
    pub(super) hooks: RefCell<Hooks>,
    /// Open savepoints.
    pub(super) levels: Cell<u32>,
    /// What the program keeps rows in, once it does.
    pub(super) unit: OnceCell<Unit<C>>,
    pub(super) flush_hooks: RefCell<FlushHooks<C>>,
    /// For handles that hooks get.
    me: Weak<Self>,
    /// Where a test's sessions are listed.
    listed: RefCell<Option<Listed>>,
}

/// A `before_commit` hook may register another; that goes on for so long.
const HOOK_ROUNDS: usize = 100;

impl<C: SessionConnection> SessionInner<C> {
    pub(crate) fn new(factory: Arc<SessionFactory<C>>, settings: Settings, at: Place) -> Rc<Self> {
        Rc::new_cyclic(|me| Self {
            listed: RefCell::new(factory.open_sessions.as_ref().map(|sessions| sessions.enter(at))),
            core: RefCell::new(TransactionState::new(Arc::clone(&factory.core), settings)),
            factory,
            used_at: Cell::new(None),
            guarded: Cell::new(false),
            ended: Cell::new(false),
            blocks: RefCell::default(),
            hook: Cell::new(None),
            hooks: RefCell::default(),
            levels: Cell::new(0),
            unit: OnceCell::new(),
            flush_hooks: RefCell::default(),
            me: Weak::clone(me),
        })
    }

    pub(crate) fn app(&self) -> &Arc<AppCore<C>> {
        &self.factory.core
    }

    pub(super) fn row_hooks(&self) -> &RowHooks<C> {
        &self.factory.row_hooks
    }

    /// A handle to it; none while it is being dropped.
    pub(super) fn handle(&self) -> Option<Session<C>> {
        self.me.upgrade().map(Session)
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.app().options().target.kind
    }

    /// For the handles of its rows.
    pub(super) fn weak(&self) -> Weak<dyn SessionReader<C>> {
        let me: Weak<Self> = Weak::clone(&self.me);
        me
    }

    /// An error, with what the program has to do now so that the transaction is undone.
    pub(super) fn with_undo(&self, mut error: Error) -> Error {
        error.set_undo(&|whole| self.needed_undo(whole));
        error
    }

    /// What undoes the transaction, or all that can be undone by itself, from where the program is. `whole` is whether the transaction has
    /// to end.
    fn needed_undo(&self, whole: bool) -> Undo {
        let Ok(core) = self.core.try_borrow() else { return Undo::NotNeeded };
        let whole = match (core.invalidated_as_a_whole(), core.is_active()) {
            (None, false) => return Undo::RolledBack,
            (None, true) if !whole => return Undo::NotNeeded,
            (ended, _) => whole || ended == Some(true),
        };
        let (blocks, levels) = (self.blocks.borrow(), self.levels.get() as usize);
        let hook = self.hook.get();
        let begun_in_hook = hook.map_or(0, |(_, blocks)| blocks);
        let closure = if whole { blocks.first() } else { blocks.last() };
        match (hook, closure) {
            (Some((name, _)), _) if whole || blocks.len() <= begun_in_hook => Undo::Hook { name },
            (_, None) if core.settings.commits => Undo::Scope,
            (_, None) => Undo::Rollback,
            // The outermost closure ends the transaction, unless it is a savepoint too.
            (_, Some(&(name, at))) if !whole || blocks.len() > levels => Undo::Closure { name, at },
            (_, Some(&(name, at))) => Undo::ClosureThenRollback { name, at },
        }
    }

    /// The error of the end of a savepoint, which has been rolled back.
    pub(super) fn after_savepoint(&self, mut error: Error) -> Error {
        error.set_undo(&|whole| match self.needed_undo(whole) {
            Undo::NotNeeded => Undo::SavepointRolledBack,
            undo => undo,
        });
        error
    }

    /// Begins the transaction because the program says so: what was read outside of it is read anew inside.
    pub(super) fn begin(&self, at: Place) -> Result<()> {
        let mut core = self.enter(at)?;
        let outside = core.has_read_outside();
        let begun = core.begin(at);
        drop(core);
        begun.map_err(|error| self.with_undo(error))?;
        if outside {
            self.expire_rows();
        }
        Ok(())
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.core.try_borrow().map_or(true, |core| core.is_active())
    }

    /// Commits, hooks included.
    pub(crate) fn commit(&self, at: Place) -> Result<()> {
        self.commit_with(at, |_| None)
    }

    /// Commits, hooks included. Of a failure that ended the transaction `keep` says how many of the hooks stay for another one.
    pub(super) fn commit_with(&self, at: Place, keep: impl FnOnce(&Error) -> Option<Mark>) -> Result<()> {
        self.commit_with_hooks(at, keep).map_err(|error| self.with_undo(error))
    }

    fn commit_with_hooks(&self, at: Place, keep: impl FnOnce(&Error) -> Option<Mark>) -> Result<()> {
        drop(self.enter(at)?);
        if self.unit.get().is_some_and(Unit::is_flushing) {
            return Err(Error::AlreadyFlushing { at });
        }
        let mut told = false;
        for round in 0.. {
            let hooks = self.hooks.borrow_mut().take_before_commit();
            if hooks.is_empty() && !self.has_unflushed() {
                // It may change rows, but is not asked again for those.
                match self.changes_to_tell().filter(|_| !std::mem::replace(&mut told, true)) {
                    Some(changes) => self.tell_before_commit(&changes, at)?,
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
                if let Err(error) = self.watched("before_commit", at, || hooks::run_before_commit(hook)) {
                    self.hooks.borrow_mut().put_back(hooks);
                    return Err(error);
                }
            }
            self.flush(at)?;
        }
        let changes = self.changes_to_tell();
        let mut core = self.enter(at)?;
        let outcome = self.commit_core(&mut core, at);
        let over = !core.is_active();
        drop(core);
        let outcome = outcome.unwrap_or_else(|panic| {
            self.unit_undecided(&Arc::default());
            self.take_hooks().discard();
            resume_unwind(panic)
        });
        match outcome {
            Ok(()) => {
                self.unit_committed();
                let told = changes.map_or(Ok(()), |changes| self.tell_after_commit(&changes));
                self.take_hooks().run_after_commit().and(told)
            }
            Err(error) => {
                let unknown = error.is_commit_unknown();
                if let Error::CommitUnknown(unknown) = &error {
                    self.unit_undecided(&unknown.verdict);
                } else if over {
                    self.unit_rolled_back();
                }
                if unknown || over {
                    let hooks = match keep(&error) {
                        Some(mark) => self.hooks.borrow_mut().since(mark),
                        None => self.take_hooks(),
                    };
                    if unknown {
                        // Neither is known to have happened.
                        hooks.discard();
                    } else {
                        let _ = hooks.run_after_rollback();
                    }
                }
                Err(error)
            }
        }
    }

    /// A panic comes from the program's instrumentation. Nobody knows by then whether the server has committed.
    pub(super) fn commit_core(&self, core: &mut TransactionState<C>, at: Place) -> std::thread::Result<Result<()>> {
        catch_unwind(AssertUnwindSafe(|| core.commit(at)))
    }

    pub(crate) fn rollback(&self, at: Place) -> Result<()> {
        let mut core = self.enter(at)?;
        let active = core.is_active();
        core.rollback();
        drop(core);
        self.unit_rolled_back();
        let hooks = self.take_hooks();
        if active { hooks.run_after_rollback() } else { Ok(()) }
    }

    /// Rolls back and drops all hooks; what the hooks do cannot prevent it.
    pub(super) fn clear(&self, at: Place) {
        let _ = self.rollback(at);
        self.take_hooks().discard();
        self.unit_cleared();
        self.forget_flush_hooks();
    }

    /// The end: afterwards every use is an error. A connection that is still guarded goes back when its guard is dropped.
    pub(crate) fn end(&self) {
        if self.ended.get() {
            return;
        }
        drop(self.listed.take());
        let at_rest = self.is_at_rest();
        if !at_rest && !self.guarded.get() {
            self.used_at.set(None);
            // Hooks of the rollback may still use the session.
            let _ = self.rollback(Location::caller());
        }
        // Before the program's own values are dropped, as their `Drop` may panic, and may use the session.
        self.ended.set(true);
        self.unit_cleared();
        self.forget_flush_hooks();
        if at_rest {
            return;
        }
        self.take_hooks().discard();
        // A hook of the rollback may have used the session once more. What is guarded is rolled back when it is back.
        if let (false, Ok(mut core)) = (self.guarded.get(), self.core.try_borrow_mut()) {
            core.rollback();
        }
    }

    /// There is nothing to roll back, nothing to give back and nobody to tell.
    fn is_at_rest(&self) -> bool {
        let core = self.core.try_borrow();
        !self.guarded.get() && self.hooks.borrow().is_empty() && core.is_ok_and(|core| core.is_at_rest())
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
        let outcome = self.run_now(statement, at, send);
        // A lock is taken for what is read afterwards.
        if statement.outdates || statement.newest == Newest::Locked {
            self.expire_rows();
        }
        outcome
    }

    /// The same without a flush before it, and without a thought of what it may have changed.
    pub(super) fn run_now<T>(
        &self,
        statement: Statement,
        at: Place,
        send: impl FnOnce(&mut C) -> QueryResult<T>,
    ) -> Result<T> {
        let mut core = self.enter(at)?;
        if let Some(unit) = self.unit.get() {
            unit.set_autocommit_reads(core.commits_by_itself());
            let outside = core.reads_before_transaction(statement.access);
            unit.set_reads_before_transaction(outside);
            if core.is_reading() && !outside {
                // This statement begins the transaction: what was read before it may have changed since.
                unit.expire_all();
            }
            if statement.access != Access::Read {
                unit.note_changing();
            }
        }
        let using = Using::new(&self.used_at, at);
        let outcome = core.run(statement, at, send);
        drop((core, using));
        outcome.map_err(|error| self.with_undo(error))
    }

    pub(super) fn enter(&self, at: Place) -> Result<RefMut<'_, TransactionState<C>>> {
        self.not_ended(at)?;
        let held_at = self.used_at.get().unwrap_or(at);
        if self.guarded.get() {
            return Err(Error::SessionBusy { held_at, at });
        }
        self.core.try_borrow_mut().map_err(|_| Error::SessionBusy { held_at, at })
    }

    pub(super) fn not_ended(&self, at: Place) -> Result<()> {
        if self.ended.get() { Err(Error::SessionEnded { app: self.app().id().into(), at }) } else { Ok(()) }
    }

    pub(super) fn outside_blocks(&self, operation: &'static str, at: Place) -> Result<()> {
        match self.blocks.borrow().last() {
            Some(&(outer, outer_at)) => Err(Error::InsideTransaction { operation, outer, outer_at, at }),
            None => Ok(()),
        }
    }

    pub(super) fn is_in_block(&self) -> bool {
        !self.blocks.borrow().is_empty()
    }

    /// After a commit that failed and left the transaction open.
    pub(super) fn roll_back_for(&self, error: &Error, at: Place) {
        if !matches!(error, Error::HookFailed { committed: true, .. }) {
            self.undo(at);
        }
    }

    /// Rolls back what a closure of `transaction` did.
    pub(super) fn undo(&self, at: Place) {
        if self.enter_at_end(at).is_ok() {
            let _ = self.rollback(at);
        }
    }

    /// Rolls back what an attempt of `retry` did, with the hooks since `mark`. The next one finds the session at rest.
    pub(super) fn undo_since(&self, mark: Mark, at: Place) {
        if let Ok(mut core) = self.enter_at_end(at) {
            core.rollback();
            drop(core);
            self.unit_rolled_back();
            let hooks = self.hooks.borrow_mut().since(mark);
            let _ = hooks.run_after_rollback();
            // A hook may have used the session.
            if let Ok(mut core) = self.enter(at) {
                core.rollback();
                drop(core);
                self.unit_rolled_back();
            }
        }
    }

    /// Tells all that are left that the transaction was rolled back.
    pub(super) fn tell_rollback(&self) {
        let _ = self.take_hooks().run_after_rollback();
    }

    /// Whether something failed in the present transaction that may succeed in another.
    pub(super) fn failed_transiently(&self) -> bool {
        !self.guarded.get() && self.core.try_borrow().is_ok_and(|core| core.transient.matters())
    }

    /// The end of the scope's time.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.core.try_borrow().ok()?.limit()
    }

    /// Enters at the end of a closure of `transaction` or `savepoint`. Where that cannot be, because the closure has left the
    /// connection guarded, its work can be neither kept nor undone by itself: the whole transaction has to be rolled back.
    pub(super) fn enter_at_end(&self, at: Place) -> Result<RefMut<'_, TransactionState<C>>> {
        let entered = self.enter(at);
        if entered.is_err()
            && let Ok(mut core) = self.core.try_borrow_mut()
        {
            core.invalidate("its closure ended while the connection was guarded".into(), at, true);
        }
        entered
    }

    fn forget_flush_hooks(&self) {
        let FlushHooks { before, after } = self.flush_hooks.take();
        drop_each(before);
        drop_each(after);
    }

    fn take_hooks(&self) -> Hooks {
        std::mem::take(&mut *self.hooks.borrow_mut())
    }

    pub(super) fn forget_hooks(&self, mark: Mark) {
        let forgotten = self.hooks.borrow_mut().since(mark);
        forgotten.discard();
    }
}

impl<C: SessionConnection> Drop for SessionInner<C> {
    fn drop(&mut self) {
        self.end();
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
