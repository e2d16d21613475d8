//! Whether the transaction in the database is still the one that the session began, and why it is not.

use super::transaction_history::TransientFailure;
use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::dialect::{self, Poison, TransactionCheck};
use crate::error::{Details, LOST, Result, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::ObservedEffects;
use crate::settings::Mode;

/// Why the transaction cannot go on.
#[derive(Debug)]
pub(super) struct Invalidation {
    cause: String,
    at: SourceLocation,
    /// The whole transaction has ended, so the rollback of a savepoint does not make it valid again.
    pub(super) ended: bool,
}

/// The cause, if no error names one.
const ENDED: &str = "it was ended by the code that had the connection";

/// The cause, if the session has not seen the error either.
const SILENT: &str =
    "a statement failed, and neither the code that had the connection nor the driver handed its error on";

/// Stands for an error of the program's own type, which code that had the connection has returned, while the session
/// finds out what the code has done to the transaction. The session learns of the errors of the database from the
/// statement observer and from the database.
#[derive(Debug, thiserror::Error)]
#[error("the code that had the connection returned an error of its own type")]
struct OpaqueFailure;

pub(super) fn opaque_failure() -> diesel::result::Error {
    diesel::result::Error::QueryBuilderError(Box::new(OpaqueFailure))
}

fn is_opaque_failure(error: &diesel::result::Error) -> bool {
    matches!(error, diesel::result::Error::QueryBuilderError(source) if source.is::<OpaqueFailure>())
}

impl<C: SessionConnection> TransactionState<C> {
    /// Compares the state of the session with the observed effects of the statement and with its result. The result
    /// is needed because not every driver reports an error to the instrumentation if it occurs while rows are read.
    #[inline]
    pub(super) fn reconcile(&mut self, access: Access, at: SourceLocation, failure: Option<&diesel::result::Error>) {
        let is_error = failure.is_some_and(|error| matches!(error, diesel::result::Error::DatabaseError(..)));
        let Some(managed) = self.managed() else { return };
        if access == Access::Raw || is_error || managed.observer.has_effects() {
            self.reconcile_effects(access, at, failure);
        } else {
            // The statement succeeded, so the swallowed error has not aborted the transaction.
            self.history.swallowed = None;
        }
    }

    fn reconcile_effects(&mut self, access: Access, at: SourceLocation, failure: Option<&diesel::result::Error>) {
        let kind = self.kind();
        let Some(managed) = self.managed() else { return };
        let raw = access == Access::Raw;
        let failed_opaquely = failure.is_some_and(is_opaque_failure);
        let failure = failure.filter(|error| matches!(error, diesel::result::Error::DatabaseError(..)));
        // The code that had the connection may have replaced the connection or its instrumentation.
        let is_observed = !raw || managed.is_observed();
        let mut effects = managed.observer.take();
        if let Some(error) = failure {
            effects.add_error(kind, error, !raw);
            // The observer has not seen the loss, so the error may come from another connection of that code. A ping
            // decides.
            if raw && !effects.lost && dialect::is_connection_lost(error) {
                effects.lost = self.ask(|conn| conn.ping().is_err_and(|error| dialect::is_connection_lost(&error)));
            }
        }
        let may_write = self.settings.mode != Mode::ReadOnly;
        let poison = effects.poison.filter(|poison| *poison != Poison::ReadOnly || may_write);
        let Some(managed) = self.managed() else { return };
        if let Some(poison) = poison {
            managed.retire(poison);
        }
        let refused_write = poison == Some(Poison::ReadOnly) && kind.may_write_elsewhere();
        let transient = effects.transient || refused_write;
        let depth = managed.conn_mut().depth();
        managed.lost |= effects.lost;
        managed.closes_at_checkin |= !is_observed || effects.lost;
        self.refused_write |= refused_write;
        if effects.lost {
            let suffix = effects.first_error.as_deref().map(|error| format!(": {error}"));
            self.invalidate_outer(format!("{LOST}{}", suffix.unwrap_or_default()), at);
        }
        if !self.has_begun() {
            if depth != Some(0) || effects.began || effects.ended_by.is_some() {
                self.invalidate_outer("a statement began or ended a transaction of its own".into(), at);
                self.close_at_checkin();
            }
            return;
        }
        let expected = self.history.savepoints() + 1;
        let ObservedEffects {
            first_error,
            last_failed,
            serialization_failure,
            lost,
            ended_by,
            may_have_ended,
            set_savepoint,
            write_steps,
            ..
        } = effects;
        write_steps.into_iter().for_each(|step| self.history.note_raw(step, at));
        self.history.has_raw_savepoint |= set_savepoint;
        let sent_inside = |word: &str| format!("`{word}` was sent to the database inside it");
        if let Some(word) = ended_by {
            self.invalidate(sent_inside(&word), at, true);
            self.invalidate_outer(format!("`{word}` was sent to the database, which ends a transaction"), at);
            self.close_at_checkin();
        } else if !is_observed {
            self.invalidate_outer("the code that had the connection replaced it, or its instrumentation".into(), at);
            self.invalidate("the code that had the connection replaced it, or its instrumentation".into(), at, true);
        } else if lost || depth.is_none_or(|depth| depth < expected) {
            let cause = first_error.clone().unwrap_or_else(|| ENDED.into());
            if depth.is_none_or(|depth| depth == 0) {
                self.invalidate_outer(format!("the transaction of the test was ended by the database: {cause}"), at);
            }
            self.invalidate(cause, at, true);
        } else if depth.is_some_and(|depth| depth > expected) {
            self.invalidate("the code that had the connection left a transaction of its own open".into(), at, true);
        } else if let Some(error) = first_error.as_ref().filter(|_| kind == DatabaseKind::Postgres && last_failed) {
            match self.history.swallowed.take() {
                // PostgreSQL has refused every statement since the first error.
                Some((first, first_at)) => self.invalidate(format!("{first}; then: {error}"), first_at, false),
                None => self.invalidate(error.clone(), at, false),
            }
        } else if may_have_ended.is_some()
            || (first_error.is_some() || failed_opaquely) && kind != DatabaseKind::Postgres
            || raw && kind == DatabaseKind::Sqlite
        {
            let check = TransactionCheck {
                serialization_failure,
                may_be_replaced: raw,
                marker_is_newest: self.history.savepoints() == 0 && !self.history.has_raw_savepoint,
            };
            if !self.ask(|conn| kind.dialect().transaction_exists(conn, check)) {
                if raw {
                    self.close_at_checkin();
                }
                let cause =
                    first_error.clone().or(may_have_ended.as_deref().map(sent_inside)).unwrap_or_else(|| ENDED.into());
                self.invalidate_outer(format!("the transaction of the test was ended by the database: {cause}"), at);
                self.invalidate(cause, at, true);
            }
        }
        if raw
            && self.invalidation.is_none()
            && let Some(error) = first_error
        {
            self.history.swallowed.get_or_insert((error, at));
        }
        if transient {
            // Code that had the connection and did not return the error may have handled it.
            let is_unhandled = !raw || failure.is_some() || failed_opaquely || self.invalidation.is_some();
            let failure = if is_unhandled { TransientFailure::Unhandled } else { TransientFailure::MaybeHandled };
            self.history.note_transient_failure(failure);
        }
    }

    /// Asks the database, without the observer.
    fn ask(&mut self, question: impl FnOnce(&mut C) -> bool) -> bool {
        self.observer().iter().for_each(|observer| observer.suppress(true));
        let answer = self.send(|conn| Ok(question(conn)));
        self.observer().iter().for_each(|observer| observer.suppress(false));
        answer.is_ok_and(|answer| answer)
    }

    pub(crate) fn invalidate(&mut self, cause: String, at: SourceLocation, ended: bool) {
        match &mut self.invalidation {
            Some(first) => first.ended |= ended,
            None => self.invalidation = Some(Invalidation { cause, at, ended }),
        }
    }

    /// Marks the transaction around all sessions as lost, if there is one.
    pub(super) fn invalidate_outer(&self, cause: String, at: SourceLocation) {
        self.style().invalidate_outer(cause, Some(at));
    }

    /// Invalidates the transaction if a statement panicked: its connection has stayed doomed.
    #[inline]
    pub(super) fn invalidate_after_panic(&mut self, at: SourceLocation) {
        if self.invalidation.is_none() && self.is_doomed() {
            self.invalidate("code that had the connection panicked".into(), self.sent_at.unwrap_or(at), true);
        }
    }

    /// Invalidates a transaction that was found aborted or ended at its commit or at the release of a savepoint. The
    /// code that had the connection has kept the error to itself.
    pub(super) fn invalidate_for_swallowed_error(&mut self, at: SourceLocation, ended: bool) {
        let sent_at = self.sent_at.unwrap_or(at);
        let (cause, at) =
            self.history.swallowed.take().unwrap_or_else(|| (if ended { ENDED } else { SILENT }.into(), sent_at));
        self.invalidate(cause, at, ended);
    }

    #[inline]
    pub(super) fn check_valid(&self) -> Result<()> {
        match &self.invalidation {
            Some(invalidation) => {
                Err(Details::RollbackRequired { cause: invalidation.cause.clone(), at: invalidation.at }.into())
            }
            None => Ok(()),
        }
    }

    #[inline]
    pub(super) fn discard_effects(&mut self) {
        if let Some(observer) = self.observer()
            && observer.has_effects()
        {
            observer.take();
        }
    }
    /// A process that was forked while the session held a connection must not use it: the connection belongs to the
    /// parent process.
    pub(super) fn check_not_forked(&mut self, at: SourceLocation) -> Result<()> {
        if !self.connection.as_ref().is_some_and(|connection| connection.is_inherited()) {
            return Ok(());
        }
        self.connection = None;
        std::mem::forget(self.write_permit.take());
        if self.has_begun() {
            self.invalidate("the process was forked, and the transaction is its parent's".into(), at, true);
        } else {
            self.release();
        }
        Err(Details::Forked { app: self.app.id().into() }.into())
    }
}
