//! What a connection goes through between two borrowers: what the first left is removed, and the program's hooks run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use diesel::QueryResult;

use super::gate::Permit;
use super::lease::{discard, live};
use super::manager::Live;
use super::watchdog::{GRACE, Watched};
use super::witness::{Reading, Watch};
use super::{Pool, Stored};
use crate::backend::{self, Beginning, Kind, Question};
use crate::config::Reset;
use crate::connection::SessionConnection;
use crate::error::{Error, Result};
use crate::spec::Spec;

impl<C: SessionConnection> Pool<C> {
    /// Takes back a connection that may stay: cleans it where that is due, tells the program, and closes it where either fails.
    /// Whoever returns it waits for that, so that a lock of the session is gone when `commit` has returned.
    pub(super) fn tidy(&self, mut permit: Permit<Stored<C>>, until: Option<Instant>) {
        let (config, kind) = (&self.spec.config, self.spec.target.kind);
        let due = match config.reset {
            Reset::WhenLent => live(&mut permit).may_have_leftovers(),
            Reset::Always => true,
            Reset::Never => false,
        };
        if due && !kind.can_reset() {
            self.dismiss(permit, until);
            return;
        }
        let left =
            if due || self.spec.on_checkin.is_some() { self.make_ready(permit, due, until) } else { Some(permit) };
        let closed = left.as_ref().is_none_or(|permit| permit.item.is_none());
        drop(left);
        if closed {
            self.leave_if_empty();
        }
        self.serve_others();
    }

    fn make_ready(
        &self,
        mut permit: Permit<Stored<C>>,
        reset: bool,
        until: Option<Instant>,
    ) -> Option<Permit<Stored<C>>> {
        let spec = Arc::clone(&self.spec);
        let call = move |live: &mut Live<C>| {
            let outcome = if reset { live.reset(&spec) } else { Ok(()) };
            let outcome = outcome.and_then(|()| match spec.on_checkin {
                Some(hook) => live.run_hook(hook, spec.target.kind).map_err(|failure| ("hook `on_checkin`", failure)),
                None => Ok(()),
            });
            match outcome {
                Ok(()) => true,
                Err((what, Failure { message, .. })) => {
                    let (app, message) = (&spec.app, spec.target.redact(&message));
                    crate::wording::log_line!(
                        warn,
                        "diesel_session::pool",
                        "app `{app}`: {what} failed on a connection that came back, so it is closed: {message}"
                    );
                    false
                }
            }
        };
        if self.spec.target.kind.can_go_stale() {
            let patience = self.patience(until);
            // Where all helpers hang, another who waits for one would wait in vain.
            let patience =
                if self.server.is_stuck(self.spec.config.connect_timeout) { Duration::ZERO } else { patience };
            let socket = live(&mut permit).socket.filter(|_| until.is_some());
            let left = self.errand(permit, patience, "could not be cleaned for the next borrower", call);
            if let (None, Some(socket)) = (&left, socket) {
                // The worker thread is free again, and the connection is closed.
                socket.cut();
            }
            return left;
        }
        if !call(live(&mut permit)) {
            discard(&mut permit);
        }
        Some(permit)
    }

    /// The permit, after the program was told that its connection is about to be lent. `None` where that has been lost
    /// while it was idle: then another is tried.
    pub(super) fn greeted(
        &self,
        mut permit: Permit<Stored<C>>,
        hook: fn(&mut C) -> QueryResult<()>,
        until: Option<Instant>,
    ) -> Result<Option<Permit<Stored<C>>>> {
        let live = live(&mut permit);
        let was_idle = !live.unused;
        let end = until.and_then(|until| until.max(Instant::now()).checked_add(GRACE));
        let watched = live.socket.zip(end).map(|(socket, end)| Watched::begin(socket, end));
        let outcome = live.run_hook(hook, self.spec.target.kind);
        let cut = watched.is_some_and(|watched| watched.was_cut());
        let Failure { message, lost } = match outcome {
            Ok(()) if !cut => return Ok(Some(permit)),
            Ok(()) => Failure { message: "it went on beyond the scope's deadline".into(), lost: true },
            Err(failure) => Failure { lost: failure.lost || cut, ..failure },
        };
        self.dismiss(permit, until);
        if lost {
            self.server.presence().doubt();
        }
        if lost && was_idle {
            return Ok(None);
        }
        Err(Error::HookFailed { hook: "on_checkout", committed: false, message: self.spec.target.redact(&message) })
    }
}

/// Why a connection is not in order.
struct Failure {
    message: String,
    lost: bool,
}

impl From<diesel::result::Error> for Failure {
    fn from(error: diesel::result::Error) -> Self {
        Self { message: error.to_string(), lost: backend::is_connection_lost(&error) }
    }
}

impl<C: SessionConnection> Live<C> {
    /// Makes it what it was when it was new, except for Diesel's prepared statements. A failure comes with what failed.
    fn reset(&mut self, spec: &Spec<C>) -> Result<(), (&'static str, Failure)> {
        let batch = spec.target.kind.reset(&spec.config, self.checks_client);
        self.conn.batch_execute(&batch).map_err(|error| ("the reset", error.into()))?;
        for sql in &spec.config.on_connect {
            self.conn.batch_execute(sql).map_err(|error| ("`Config::on_connect`, after the reset,", error.into()))?;
        }
        if let Some(prepare) = spec.on_connect {
            let prepared = self.run_hook(prepare, spec.target.kind);
            prepared.map_err(|failure| ("`Database::on_connect`, after the reset,", failure))?;
        }
        let is_changed = !spec.config.on_connect.is_empty() || spec.on_connect.is_some();
        if let Some(sql) = spec.target.kind.required().filter(|_| is_changed) {
            self.conn.batch_execute(sql).map_err(|error| ("the reset", error.into()))?;
        }
        self.witness.take();
        self.witness.forget_leftovers();
        self.marked = false;
        Ok(())
    }

    /// Runs a hook of the program; what it sends is nobody else's business. It leaves neither a transaction nor another
    /// instrumentation. Where a test is to be rolled back its transactions are savepoints.
    fn run_hook(&mut self, hook: fn(&mut C) -> QueryResult<()>, kind: Kind) -> Result<(), Failure> {
        let Some(lane) = self.conn.lane().filter(|lane| lane.has_begun()).map(Arc::clone) else {
            return self.run_hook_at(0, hook, kind);
        };
        kind.begin_inside(&mut *self.conn, Beginning::plain(), None)?;
        let outcome = self.run_hook_at(1, hook, kind);
        let outcome = outcome.and_then(|()| Ok(kind.release_inside(&mut *self.conn)?));
        if outcome.is_err() && !kind.undo_inside(&mut *self.conn) {
            lane.break_off("a hook of the pool ended its transaction", None);
        }
        self.witness.take();
        outcome
    }

    fn run_hook_at(&mut self, depth: u32, hook: fn(&mut C) -> QueryResult<()>, kind: Kind) -> Result<(), Failure> {
        let failure = |message: &str| Failure { message: message.into(), lost: false };
        let seen_before = self.witness.has_seen_leftovers();
        self.witness.read_statements(Reading::Raw);
        let outcome = catch_unwind(AssertUnwindSafe(|| hook(&mut self.conn)));
        self.witness.stop_reading();
        let notes = self.witness.take();
        if !seen_before {
            self.witness.forget_leftovers();
        }
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.into()),
            Err(panic) => return Err(failure(&format!("it panicked: {}", crate::panic_message(&*panic)))),
        }
        if !self.witness.watches(self.conn.instrumentation()) {
            self.conn.set_instrumentation(Watch::new(Arc::clone(&self.witness)));
        }
        // Of a raw `BEGIN` Diesel knows nothing. Inside of a test's transaction it begins none.
        let began = depth == 0
            && notes.began
            && match kind {
                Kind::Postgres => notes.ended_by.is_none(),
                Kind::Mysql | Kind::Sqlite => kind.still_exists(&mut *self.conn, Question::default()),
            };
        if began || self.conn.depth() != Some(depth) {
            return Err(failure("it left a transaction open"));
        }
        self.witness.take();
        Ok(())
    }
}
