//! The reset of a connection between two holders, and the hooks of the program.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::AppPool;
use super::connections::Connections;
use super::managed::Managed;
use super::options::{ConnectionHook, PoolOptions};
use super::statement_observer::{ObserverInstrumentation, SqlSource};
use crate::connection::SessionConnection;
use crate::dialect::{self, BeginOptions, TransactionCheck};
use crate::error::{Details, Result};
use crate::kind::DatabaseKind;
use crate::panic::into_panic_message;

/// A hook, in the reason why the outer transaction has ended.
const A_HOOK: &str = "a hook of the pool";

impl<C: SessionConnection> Connections<C> {
    /// Removes the state that the last holder left, if `reset` is set, and runs `on_checkin`. Returns `false` if the
    /// connection has to be closed. The holder waits for this, so that the locks of the session are released when
    /// `commit` returns.
    pub(super) fn reset_and_run_on_checkin(
        &self,
        managed: &mut Managed<C>,
        reset: bool,
        deadline: Option<Instant>,
    ) -> bool {
        let options = &self.options;
        if reset && !(self.kind().can_reset() && self.can_be_cut(managed)) {
            return false;
        }
        let outcome = self.call(managed, self.call_deadline(deadline), "was not reset in time", |managed| {
            if reset {
                managed.reset(options)?;
            }
            match &options.on_checkin {
                Some(hook) => managed.run_hook(A_HOOK, hook).map_err(|failure| ("hook `on_checkin`", failure)),
                None => Ok(()),
            }
        });
        if let Some(Err((what, ResetFailure { message, .. }))) = &outcome {
            let (app, message) = (&options.app, options.target.redact(message));
            log_pool!(warn, "app `{app}`: {what} failed on a connection that came back, so it is closed: {message}");
        }
        matches!(outcome, Some(Ok(())))
    }
}

impl<C: SessionConnection> AppPool<C> {
    /// Runs the program's `on_checkout`. Returns `false` if the connection was lost while it was idle. Then the caller
    /// tries another connection.
    pub(super) fn on_checkout(
        &self,
        managed: &mut Managed<C>,
        hook: &ConnectionHook<C>,
        deadline: Option<Instant>,
    ) -> Result<bool> {
        let storage = &self.storage;
        let was_idle = !managed.unused;
        let run_hook = |managed: &mut Managed<C>| managed.run_hook(A_HOOK, hook);
        let outcome = match deadline {
            Some(_) => storage.call(managed, storage.call_deadline(deadline), "was not ready in time", run_hook),
            None => Some(run_hook(managed)),
        };
        let ResetFailure { message, lost, .. } = match outcome {
            Some(Ok(())) => return Ok(true),
            Some(Err(failure)) => failure,
            None => ResetFailure { message: "it went on beyond the deadline".into(), lost: true, panic: None },
        };
        if lost {
            storage.server.suspect();
        }
        if lost && was_idle {
            return Ok(false);
        }
        let message = storage.options.target.redact(&message);
        Err(Details::HookFailed { hook: "on_checkout", committed: false, message }.into())
    }
}

/// The reason why a reset or a hook has failed.
pub(super) struct ResetFailure {
    pub(super) message: String,
    lost: bool,
    /// The hook panicked, with this message.
    pub(super) panic: Option<String>,
}

impl From<diesel::result::Error> for ResetFailure {
    fn from(error: diesel::result::Error) -> Self {
        Self { message: error.to_string(), lost: dialect::is_connection_lost(&error), panic: None }
    }
}

impl<C: SessionConnection> Managed<C> {
    /// Restores the state of a new connection, except for Diesel's prepared statements. An error contains the step
    /// that failed.
    fn reset(&mut self, options: &PoolOptions<C>) -> Result<(), (&'static str, ResetFailure)> {
        const RESET: &str = "the reset";
        const INIT_SQL: &str = "`Config::connection_init_sql`, after the reset,";
        let batch = options.reset_sql(self.checks_client);
        let init_sql = options.config.connection_init_sql.iter().map(|sql| (INIT_SQL, sql));
        for (step, sql) in [(RESET, &batch)].into_iter().chain(init_sql) {
            self.conn_mut().batch_execute(sql).map_err(|error| (step, error.into()))?;
        }
        if let Some(prepare) = &options.on_connect {
            self.run_hook(A_HOOK, prepare).map_err(|failure| ("`Database::on_connect`, after the reset,", failure))?;
        }
        if let Some(sql) = options.settings_to_repeat() {
            self.conn_mut().batch_execute(sql).map_err(|error| (RESET, error.into()))?;
        }
        self.observer.take();
        self.forget_leftovers();
        self.limit = None;
        Ok(())
    }

    /// Runs a hook of the program. The effects of its statements are not reported to the session. The hook must not
    /// leave a transaction open, and another instrumentation is replaced. In an outer transaction the hook runs in a
    /// savepoint.
    pub(super) fn run_hook(&mut self, name: &str, hook: &ConnectionHook<C>) -> Result<(), ResetFailure> {
        let style = self.style().clone();
        let Some(outer) = style.outer() else { return self.run_hook_at(0, hook) };
        outer.begin(self.conn_mut(), BeginOptions::plain(), None)?;
        let outcome = self.run_hook_at(1, hook);
        let outcome = outcome.and_then(|()| Ok(outer.release(self.conn_mut())?));
        if outcome.is_err() && !outer.undo(self.conn_mut()) {
            outer.invalidate(format!("{name} ended its transaction"), None);
        }
        self.observer.take();
        outcome
    }

    fn run_hook_at(&mut self, depth: u32, hook: &ConnectionHook<C>) -> Result<(), ResetFailure> {
        let had_leftovers = self.observer.has_seen_leftovers();
        self.observer.read_statements(SqlSource::Raw);
        let outcome = catch_unwind(AssertUnwindSafe(|| hook(self.conn_mut())));
        self.observer.stop_reading();
        let effects = self.observer.take();
        if !had_leftovers {
            self.observer.forget_leftovers();
        }
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.into()),
            Err(panic) => {
                let panic = into_panic_message(panic);
                return Err(ResetFailure { message: format!("it panicked: {panic}"), lost: false, panic: Some(panic) });
            }
        }
        if !self.is_observed() {
            let instrumentation = ObserverInstrumentation::new(Arc::clone(&self.observer));
            self.conn_mut().set_instrumentation(instrumentation);
        }
        // Diesel does not know of a raw `BEGIN`. Inside an outer transaction, `BEGIN` starts no transaction.
        let began = depth == 0
            && effects.began
            && match self.observer.kind {
                DatabaseKind::Postgres => effects.ended_by.is_none(),
                kind => kind.dialect().transaction_exists(self.conn_mut(), TransactionCheck::default()),
            };
        if began || self.conn_mut().depth() != Some(depth) {
            return Err(ResetFailure { message: "it left a transaction open".into(), lost: false, panic: None });
        }
        self.observer.take();
        Ok(())
    }
}
