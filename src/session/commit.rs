//! The commit, and how the program learns the outcome of a commit whose answer was lost.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::transaction_state::{A_COMMIT, Access, TransactionState};
use crate::app_core::AppCore;
use crate::config::Reset;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{CommitOutcome, Details, Resolver, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::panic::catch_panic;

/// The first and the longest pause before the server is asked again about a transaction in progress.
const POLL_PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

impl<C: SessionConnection> TransactionState<C> {
    /// Commits the transaction, if there is one, and checks the connection in. The outer `Err` is a panic of the
    /// program's instrumentation: the server may have committed. The session is idle then.
    pub(crate) fn commit(&mut self, at: SourceLocation) -> std::thread::Result<Result<()>> {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.commit_now(at)));
        if outcome.is_err() {
            self.close_at_checkin();
            catch_panic("the rollback after a commit", || self.rollback());
        }
        outcome
    }

    fn commit_now(&mut self, at: SourceLocation) -> Result<()> {
        self.invalidate_after_panic(at);
        self.check_valid()?;
        self.check_not_forked(at).inspect_err(|_| self.rollback())?;
        if !self.has_begun() {
            self.release();
            self.end_reading();
            return Ok(());
        }
        if self.history.savepoints() != 0 || self.depth() != Some(1) {
            self.invalidate("a savepoint in it was not closed".into(), at, true);
            return self.check_valid();
        }
        self.renew_busy_timeout(at)?;
        let resolver = match self.resolver() {
            Ok(resolver) => resolver,
            Err(error) => {
                // The error that the code with the connection did not return is the better cause.
                let is_cause_known = self.history.swallowed.is_some() && !dialect::is_connection_lost(&error);
                self.reconcile(Access::Read, at, Some(&error));
                if is_cause_known {
                    self.check_valid()?;
                }
                let error = self.explain(error, at, None);
                self.rollback();
                return Err(error);
            }
        };
        let (kind, style) = (self.kind(), self.style().clone());
        // The session knows every error of a typed statement.
        let guarded_commit = self.history.had_raw_access.then(|| kind.texts().guarded_commit).flatten();
        let refused = Cell::new(false);
        let lock_wait = self.lock_wait(A_COMMIT);
        let outcome = match self.needs_reset_in_transaction() {
            true => self.reset_and_commit(guarded_commit.is_some(), &refused),
            false => self.send(|conn| style.commit(kind, conn, guarded_commit, &refused)),
        };
        let Err(error) = outcome else {
            self.release();
            return Ok(());
        };
        let is_lost = dialect::is_connection_lost(&error);
        if refused.get() && !is_lost {
            // The check before the commit has failed: the transaction is aborted (PostgreSQL), or is not the one that
            // the session began.
            let ended = kind != DatabaseKind::Postgres;
            if ended {
                self.close_at_checkin();
                self.invalidate_outer("a statement ended the transaction of the test".into(), at);
            }
            self.invalidate_for_swallowed_error(at, ended);
            return self.check_valid();
        }
        let error = if is_lost {
            self.close_at_checkin();
            let (app, verdict) = (self.app.id().into(), Arc::default());
            Details::CommitUnknown { app, at, source: error, resolver, verdict }.into()
        } else {
            self.explain(error, at, lock_wait)
        };
        self.rollback();
        Err(error)
    }

    /// Whether the end of the transaction has to remove what its statements may have left, because the session of the
    /// server belongs to other clients after it.
    pub(super) fn needs_reset_in_transaction(&mut self) -> bool {
        let options = self.app.options();
        let (shares_sessions, reset) = (options.shares_sessions(), options.config.reset);
        shares_sessions
            && match reset {
                Reset::WhenDirty => self.managed().is_some_and(|managed| managed.may_have_leftovers()),
                Reset::Always => true,
                Reset::Never => false,
            }
    }

    /// Commits and resets the session of the server in one message, so that a pooler gives it to no other client in
    /// between. `refused` is set if the transaction is aborted, which is asked for if `is_guarded`.
    fn reset_and_commit(&mut self, is_guarded: bool, refused: &Cell<bool>) -> diesel::QueryResult<()> {
        if is_guarded {
            self.send(|conn| conn.batch_execute("SELECT 1")).inspect_err(|_| refused.set(true))?;
        }
        // Deferred constraints and triggers must still run with the settings of the transaction.
        let sql = format!("SET CONSTRAINTS ALL IMMEDIATE; {}; COMMIT", self.app.options().reset_sql(false));
        self.send(|conn| conn.commit_with(&sql, &|_, _| true))?;
        self.forget_leftovers();
        Ok(())
    }

    /// Like [`reset_and_commit`](Self::reset_and_commit), for a rollback.
    pub(super) fn roll_back_and_reset(&mut self) -> diesel::QueryResult<()> {
        let sql = format!("ROLLBACK; {}", self.app.options().reset_sql(false));
        self.send(|conn| conn.leave_with(&sql))?;
        self.forget_leftovers();
        Ok(())
    }

    fn forget_leftovers(&mut self) {
        if let Some(managed) = self.managed() {
            managed.forget_leftovers();
        }
    }

    /// How the program can learn the outcome of the commit that is about to be sent.
    fn resolver(&mut self) -> diesel::QueryResult<Resolver> {
        let kind = self.kind();
        let silent = match kind.texts().transaction_number {
            _ if self.style().is_nested() => "it was a savepoint of a test that is rolled back",
            Some(question) if self.settings.resolvable => {
                let Some(answer) = self.send(|conn| conn.fixed_text(question))? else {
                    return Ok(Resolver::NothingWritten);
                };
                let (number, process) = answer.split_once(' ').unwrap_or((&answer, ""));
                let identity = self.server_identity(process)?;
                let number = number.parse().ok().zip(identity);
                match number.and_then(|(number, identity)| kind.dialect().transaction_status(number, &identity)) {
                    Some(question) => {
                        let app = Arc::clone(&self.app);
                        return Ok(Resolver::Ask(Arc::new(move |at| ask_for_outcome(&app, &question, at))));
                    }
                    None => "the server has not told its system identifier and its timeline",
                }
            }
            Some(_) => {
                "its scope was not `resolvable()`, so the server was not asked for the number of the transaction"
            }
            None if kind == DatabaseKind::Mysql => "MySQL and MariaDB do not tell what became of a transaction",
            None => "this database does not tell what became of a transaction",
        };
        Ok(Resolver::Silent(silent))
    }

    /// The identity of the server. It stays the same for the lifetime of a server's process, so it is asked for once.
    /// A server may refuse the query, which must not abort the transaction.
    fn server_identity(&mut self, process: &str) -> diesel::QueryResult<Option<String>> {
        let Some(question) = self.kind().texts().server_identity else { return Ok(None) };
        let known = self.managed().and_then(|managed| managed.identity.clone());
        if let Some((_, identity)) = known.filter(|(known, _)| known == process) {
            return Ok(identity);
        }
        let identity = self.send(|conn| {
            conn.begin_level()?;
            match conn.texts(question) {
                Ok(rows) => conn.commit_level().map(|()| rows.into_iter().next().flatten()),
                Err(_) => conn.rollback_level().map(|()| None),
            }
        })?;
        if let Some(managed) = self.managed() {
            managed.identity = Some((process.to_owned(), identity.clone()));
        }
        Ok(identity)
    }
}

/// Asks the server for the outcome of a transaction.
fn ask_for_outcome<C: SessionConnection>(
    app: &Arc<AppCore<C>>,
    question: &str,
    at: SourceLocation,
) -> Result<CommitOutcome> {
    let timeout = app.options().config.acquire_timeout;
    let end = Instant::now() + timeout;
    let mut pause = POLL_PAUSES.0;
    loop {
        // Each question has a checkout of its own, so that others can use the connection during a pause.
        let mut connection = app.pool()?.acquire(at, false, Some(end))?;
        let answer = connection.conn().texts(question);
        if answer.is_err() {
            connection.close_at_checkin();
        }
        drop(connection);
        let status = match answer {
            Ok(rows) => rows.into_iter().next().flatten(),
            Err(error) if dialect::is_connection_lost(&error) && Instant::now() < end => continue,
            Err(error) => return Ok(unknown(format!("the server did not tell: {error}"))),
        };
        match status.as_deref() {
            Some("committed") => return Ok(CommitOutcome::Committed),
            Some("aborted") => return Ok(CommitOutcome::RolledBack),
            Some("in progress") if Instant::now() + pause >= end => {
                return Ok(unknown(format!("the transaction was still in progress after {timeout:?}; ask again")));
            }
            Some("in progress") => std::thread::sleep(pause),
            Some("forgotten") => return Ok(unknown("the server has forgotten the transaction, which is too old")),
            Some("another server") => {
                return Ok(unknown(
                    "the server is not the one that was to commit: a standby was promoted since, or the URL leads to \
                     another server",
                ));
            }
            other => return Ok(unknown(format!("the server says `{}`", other.unwrap_or_default()))),
        }
        pause = (pause * 2).min(POLL_PAUSES.1);
    }
}

fn unknown(reason: impl Into<String>) -> CommitOutcome {
    CommitOutcome::Unknown { reason: reason.into() }
}
