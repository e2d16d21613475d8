//! The commit, and how the program learns the outcome of a commit whose answer was lost.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::transaction_state::{Access, TransactionState};
use crate::app_core::AppCore;
use crate::connection::SessionConnection;
use crate::dialect;
use crate::error::{CommitOutcome, Resolver, UnknownCommit};
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::PinnedConnection;

/// The first and the longest pause before the server is asked again about a transaction in progress.
const POLL_PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

impl<C: SessionConnection> TransactionState<C> {
    /// Commits the transaction, if there is one, and checks the connection in. A panic of the program's
    /// instrumentation is resumed once the session is idle; the server may have committed by then.
    pub(crate) fn commit(&mut self, at: Place) -> Result<()> {
        catch_unwind(AssertUnwindSafe(|| self.commit_now(at))).unwrap_or_else(|panic| {
            self.close_at_checkin();
            self.rollback();
            resume_unwind(panic)
        })
    }

    fn commit_now(&mut self, at: Place) -> Result<()> {
        self.invalidate_after_panic(at);
        self.check_valid()?;
        if let Err(error) = self.check_not_forked(at) {
            self.rollback();
            return Err(error);
        }
        if !self.has_begun() {
            self.release();
            return Ok(());
        }
        if self.savepoints != 0 || self.depth() != Some(1) {
            self.invalidate("a savepoint in it was not closed".into(), at, true);
            self.check_valid()?;
        }
        self.renew_busy_timeout(at)?;
        let resolver = match self.resolver() {
            Ok(resolver) => resolver,
            Err(error) => {
                // The error that the code with the connection did not return is the better cause.
                let is_cause_known = self.swallowed.is_some() && !dialect::is_connection_lost(&error);
                self.reconcile(Access::Read, at, Some(&error));
                if is_cause_known {
                    self.check_valid()?;
                }
                let error = self.explain(error, at);
                self.rollback();
                return Err(error);
            }
        };
        let (kind, had_orphans) = (self.kind(), self.pinned().map(PinnedConnection::had_orphans));
        // The session knows every error of a typed statement.
        let guarded_commit = self.had_raw_access.then(|| kind.guarded_commit()).flatten();
        let refused = Cell::new(false);
        let sent = self.waiting_since();
        let outcome = self.send(|conn| match (had_orphans, guarded_commit) {
            (Some(had_orphans), None) => kind.commit_nested(conn, had_orphans),
            (Some(had_orphans), Some(_)) => {
                kind.probe_nested(conn).inspect_err(|_| refused.set(true))?;
                kind.commit_nested(conn, had_orphans)
            }
            (None, None) => conn.commit_level(),
            (None, Some(sql)) => conn.commit_with(sql, |error, depth| {
                refused.set(kind.was_refused(error, depth));
                refused.get()
            }),
        });
        match outcome {
            Ok(()) => {
                self.restore();
                self.release();
                Ok(())
            }
            Err(error) if refused.get() && !dialect::is_connection_lost(&error) => self.reject_commit(at),
            Err(error) => {
                let waited = sent.and_then(|sent| self.waited_for_lock(&error, sent));
                let error = if dialect::is_connection_lost(&error) {
                    self.close_at_checkin();
                    let app = self.app.id().into();
                    let verdict = Arc::default();
                    Error::CommitUnknown(Box::new(UnknownCommit { app, at, source: error, resolver, verdict }))
                } else {
                    self.explain(error, at)
                };
                self.rollback();
                Err(match waited {
                    Some(waited) => self.explain_wait(error, "a commit", waited),
                    None => error,
                })
            }
        }
    }

    /// Handles a failed check before the commit: the transaction is aborted (PostgreSQL) or is not the one that the
    /// session began.
    fn reject_commit(&mut self, at: Place) -> Result<()> {
        let ended = self.kind() != DatabaseKind::Postgres;
        if ended {
            self.close_at_checkin();
            self.poison_pinned("a statement ended the transaction of the test".into(), at);
        }
        self.invalidate_for_swallowed_error(at, ended);
        self.check_valid()
    }

    /// How the program can learn the outcome of the commit that is about to be sent.
    fn resolver(&mut self) -> diesel::QueryResult<Resolver> {
        let kind = self.kind();
        if self.pinned().is_some() {
            return Ok(Resolver::Silent("it was a savepoint of a test that is rolled back"));
        }
        let Some(question) = kind.transaction_number() else {
            return Ok(Resolver::Silent(match kind {
                DatabaseKind::Mysql => "MySQL and MariaDB do not tell what became of a transaction",
                DatabaseKind::Sqlite | DatabaseKind::Postgres => {
                    "this database does not tell what became of a transaction"
                }
            }));
        };
        if !self.settings.resolvable {
            return Ok(Resolver::Silent(
                "its scope was not `resolvable()`, so the server was not asked for the number of the transaction",
            ));
        }
        let number = self.send(|conn| conn.fixed_text(question))?;
        let Some(number) = number else { return Ok(Resolver::NothingWritten) };
        Ok(match number.parse() {
            Ok(number) => {
                let app = self.app.clone();
                Resolver::Ask(Arc::new(move |at| ask_for_outcome(&app, number, at)))
            }
            Err(_) => Resolver::Silent("the server's number of the transaction could not be read"),
        })
    }
}

/// Asks the server for the outcome of its transaction with this number.
fn ask_for_outcome<C: SessionConnection>(app: &Arc<AppCore<C>>, number: u64, at: Place) -> Result<CommitOutcome> {
    let Some(question) = app.options().target.kind.transaction_status(number) else {
        return Ok(unknown("this database does not tell what became of a transaction"));
    };
    let timeout = app.options().config.acquire_timeout;
    let end = Instant::now() + timeout;
    let mut pause = POLL_PAUSES.0;
    loop {
        // Each question has a checkout of its own, so that others can use the connection during a pause.
        let mut connection = app.pool()?.acquire(at, false, Some(end))?;
        let answer = connection.conn().texts(&question);
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
            Some(other) => return Ok(unknown(format!("the server says `{other}`"))),
            None => return Ok(unknown("the server has forgotten the transaction, which is too old")),
        }
        pause = (pause * 2).min(POLL_PAUSES.1);
    }
}

fn unknown(reason: impl Into<String>) -> CommitOutcome {
    CommitOutcome::Unknown { reason: reason.into() }
}
