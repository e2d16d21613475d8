//! The reset of a connection between two holders, and the hooks of the program.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use diesel::QueryResult;

use super::AppPool;
use super::connections::Connections;
use super::managed::Managed;
use super::options::PoolOptions;
use super::statement_observer::{ObserverInstrumentation, SqlSource};
use crate::connection::SessionConnection;
use crate::dialect::{self, BeginOptions, TransactionCheck};
use crate::error::{Error, Result};
use crate::kind::DatabaseKind;

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
        let kind = self.kind();
        if reset && !(kind.can_reset() && self.can_be_cut(managed)) {
            return false;
        }
        let outcome = self.call(managed, self.call_deadline(deadline), "was not reset in time", |managed| {
            if reset {
                managed.reset(options)?;
            }
            match options.on_checkin {
                Some(hook) => managed.run_hook(hook, kind).map_err(|failure| ("hook `on_checkin`", failure)),
                None => Ok(()),
            }
        });
        match outcome {
            Some(Ok(())) => true,
            Some(Err((what, ResetFailure { message, .. }))) => {
                let (app, message) = (&options.app, options.target.redact(&message));
                crate::wording::log_line!(
                    warn,
                    "diesel_session::pool",
                    "app `{app}`: {what} failed on a connection that came back, so it is closed: {message}"
                );
                false
            }
            None => false,
        }
    }
}

impl<C: SessionConnection> AppPool<C> {
    /// Runs the program's `on_checkout`. Returns `false` if the connection was lost while it was idle. Then the caller
    /// tries another connection.
    pub(super) fn on_checkout(
        &self,
        managed: &mut Managed<C>,
        hook: fn(&mut C) -> QueryResult<()>,
        deadline: Option<Instant>,
    ) -> Result<bool> {
        let storage = &self.storage;
        let was_idle = !managed.unused;
        let outcome = match deadline {
            Some(_) => storage.call(managed, storage.call_deadline(deadline), "was not ready in time", |managed| {
                managed.run_hook(hook, storage.kind())
            }),
            None => Some(managed.run_hook(hook, storage.kind())),
        };
        let ResetFailure { message, lost } = match outcome {
            Some(Ok(())) => return Ok(true),
            Some(Err(failure)) => failure,
            None => ResetFailure { message: "it went on beyond the scope's deadline".into(), lost: true },
        };
        if lost {
            storage.server.suspect();
        }
        if lost && was_idle {
            return Ok(false);
        }
        let message = storage.options.target.redact(&message);
        Err(Error::HookFailed { hook: "on_checkout", committed: false, message })
    }
}

/// The reason why a reset or a hook has failed.
struct ResetFailure {
    message: String,
    lost: bool,
}

impl From<diesel::result::Error> for ResetFailure {
    fn from(error: diesel::result::Error) -> Self {
        Self { message: error.to_string(), lost: dialect::is_connection_lost(&error) }
    }
}

impl<C: SessionConnection> Managed<C> {
    /// Restores the state of a new connection, except for Diesel's prepared statements. An error contains the step
    /// that failed.
    fn reset(&mut self, options: &PoolOptions<C>) -> Result<(), (&'static str, ResetFailure)> {
        let batch = options.target.kind.reset(&options.config, self.checks_client);
        self.conn_mut().batch_execute(&batch).map_err(|error| ("the reset", error.into()))?;
        for sql in &options.config.on_connect {
            self.conn_mut()
                .batch_execute(sql)
                .map_err(|error| ("`Config::on_connect`, after the reset,", error.into()))?;
        }
        if let Some(prepare) = options.on_connect {
            let prepared = self.run_hook(prepare, options.target.kind);
            prepared.map_err(|failure| ("`Database::on_connect`, after the reset,", failure))?;
        }
        let is_changed = !options.config.on_connect.is_empty() || options.on_connect.is_some();
        if let Some(sql) = options.target.kind.required_settings().filter(|_| is_changed) {
            self.conn_mut().batch_execute(sql).map_err(|error| ("the reset", error.into()))?;
        }
        self.observer.take();
        self.observer.forget_leftovers();
        self.marked_dirty = false;
        Ok(())
    }

    /// Runs a hook of the program. The effects of its statements are not reported to the session. The hook must not
    /// leave a transaction open, and another instrumentation is replaced. In a test that is rolled back, the hook runs
    /// in a savepoint.
    fn run_hook(&mut self, hook: fn(&mut C) -> QueryResult<()>, kind: DatabaseKind) -> Result<(), ResetFailure> {
        let Some(pinned) = self.pinned().filter(|pinned| pinned.has_begun()).map(Arc::clone) else {
            return self.run_hook_at(0, hook, kind);
        };
        kind.begin_nested(self.conn_mut(), BeginOptions::plain(), None)?;
        let outcome = self.run_hook_at(1, hook, kind);
        let outcome = outcome.and_then(|()| Ok(kind.release_nested(self.conn_mut())?));
        if outcome.is_err() && !kind.undo_nested(self.conn_mut()) {
            pinned.poison("a hook of the pool ended its transaction", None);
        }
        self.observer.take();
        outcome
    }

    fn run_hook_at(
        &mut self,
        depth: u32,
        hook: fn(&mut C) -> QueryResult<()>,
        kind: DatabaseKind,
    ) -> Result<(), ResetFailure> {
        let failure = |message: &str| ResetFailure { message: message.into(), lost: false };
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
            Err(panic) => return Err(failure(&format!("it panicked: {}", crate::panic::panic_message(&*panic)))),
        }
        if !self.is_observed() {
            let instrumentation = ObserverInstrumentation::new(Arc::clone(&self.observer));
            self.conn_mut().set_instrumentation(instrumentation);
        }
        // Diesel does not know of a raw `BEGIN`. Inside a test's transaction, `BEGIN` starts no transaction.
        let began = depth == 0
            && effects.began
            && match kind {
                DatabaseKind::Postgres => effects.ended_by.is_none(),
                DatabaseKind::Mysql | DatabaseKind::Sqlite => {
                    kind.transaction_exists(self.conn_mut(), TransactionCheck::default())
                }
            };
        if began || self.conn_mut().depth() != Some(depth) {
            return Err(failure("it left a transaction open"));
        }
        self.observer.take();
        Ok(())
    }
}
