//! Whether the transaction in the database is still the one that the session began, and why it is not.

use super::transaction_state::{Access, TransactionState};
use crate::connection::SessionConnection;
use crate::dialect::{self, Poison, TransactionCheck};
use crate::error::LOST;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::ObservedEffects;
use crate::settings::Mode;

/// Why the transaction cannot go on.
#[derive(Debug)]
pub(super) struct Invalidation {
    cause: String,
    at: Place,
    /// The whole transaction has ended, so the rollback of a savepoint does not make it valid again.
    pub(super) ended: bool,
}

/// The cause, if no error names one.
const ENDED: &str = "it was ended by the code that had the connection";

/// The cause, if the session has not seen the error either.
const SILENT: &str =
    "a statement failed, and neither the code that had the connection nor the driver handed its error on";

impl<C: SessionConnection> TransactionState<C> {
    /// Compares the state of the session with the observed effects of the statement and with its result. The result
    /// is needed because not every driver reports an error to the instrumentation if it occurs while rows are read.
    pub(super) fn reconcile_now(&mut self, access: Access, at: Place, failure: Option<&diesel::result::Error>) {
        let kind = self.kind();
        let Some(connection) = self.connection.as_mut() else { return };
        let managed = connection.managed();
        let raw = access == Access::Raw;
        let failure = failure.filter(|error| matches!(error, diesel::result::Error::DatabaseError(..)));
        if !raw && failure.is_none() && !managed.observer.has_effects() {
            // The statement succeeded, so the swallowed error has not aborted the transaction.
            self.swallowed = None;
            return;
        }
        // The code that had the connection may have replaced the connection or its instrumentation.
        let is_observed = !raw || managed.is_observed();
        let mut effects =
            if managed.observer.has_effects() { managed.observer.take() } else { ObservedEffects::default() };
        if let Some(error) = failure {
            effects.add_error(kind, error, !raw);
            // The observer has not seen the loss, so the error may come from another connection of that code. A ping
            // decides.
            if raw && !effects.lost && dialect::is_connection_lost(error) {
                managed.observer.suppress(true);
                effects.lost = managed.conn_mut().ping().is_err_and(|error| dialect::is_connection_lost(&error));
                managed.observer.suppress(false);
            }
        }
        let may_write = self.settings.mode != Mode::ReadOnly;
        let poison = effects.poison.filter(|poison| *poison != Poison::ReadOnly || may_write);
        if let Some(poison) = poison {
            managed.retire(poison);
        }
        let transient = effects.transient || poison == Some(Poison::ReadOnly) && kind.may_write_elsewhere();
        let depth = managed.conn_mut().depth();
        managed.lost |= effects.lost;
        managed.closes_at_checkin |= !is_observed || effects.lost;
        if let Some(pinned) = managed.pinned().filter(|_| effects.lost) {
            let suffix = effects.first_error.as_deref().map(|error| format!(": {error}"));
            pinned.poison(format!("{LOST}{}", suffix.unwrap_or_default()), Some(at));
        }
        if !self.has_begun() {
            if depth != Some(0) || effects.began || effects.ended_by.is_some() {
                self.poison_pinned("a statement began or ended a transaction of its own".into(), at);
                self.close_at_checkin();
            }
            return;
        }
        let expected = self.savepoints + 1;
        let ObservedEffects {
            first_error,
            last_failed,
            serialization_failure,
            lost,
            ended_by,
            may_have_ended,
            set_savepoint,
            ..
        } = effects;
        self.has_raw_savepoint |= set_savepoint;
        let sent_inside = |word: &str| format!("`{word}` was sent to the database inside it");
        if let Some(word) = ended_by {
            self.invalidate(sent_inside(&word), at, true);
            self.poison_pinned(format!("`{word}` was sent to the database, which ends a transaction"), at);
            self.close_at_checkin();
        } else if !is_observed {
            self.poison_pinned("the code that had the connection replaced it, or its instrumentation".into(), at);
            self.invalidate("the code that had the connection replaced it, or its instrumentation".into(), at, true);
        } else if lost || depth.is_none_or(|depth| depth < expected) {
            let cause = first_error.clone().unwrap_or_else(|| ENDED.into());
            if depth.is_none_or(|depth| depth == 0) {
                self.poison_pinned(format!("the transaction of the test was ended by the database: {cause}"), at);
            }
            self.invalidate(cause, at, true);
        } else if depth.is_some_and(|depth| depth > expected) {
            self.invalidate("the code that had the connection left a transaction of its own open".into(), at, true);
        } else if let Some(error) = first_error.as_ref().filter(|_| kind == DatabaseKind::Postgres && last_failed) {
            match self.swallowed.take() {
                // PostgreSQL has refused every statement since the first error.
                Some((first, first_at)) => self.invalidate(format!("{first}; then: {error}"), first_at, false),
                None => self.invalidate(error.clone(), at, false),
            }
        } else if may_have_ended.is_some()
            || first_error.is_some() && kind != DatabaseKind::Postgres
            || raw && kind == DatabaseKind::Sqlite
        {
            let check = TransactionCheck {
                serialization_failure,
                may_be_replaced: raw,
                marker_is_newest: self.savepoints == 0 && !self.has_raw_savepoint,
            };
            let Some(connection) = self.connection.as_mut() else { return };
            let managed = connection.managed();
            managed.observer.suppress(true);
            let exists = kind.transaction_exists(managed.conn_mut(), check);
            managed.observer.suppress(false);
            if !exists {
                managed.closes_at_checkin |= raw;
                let cause =
                    first_error.clone().or(may_have_ended.as_deref().map(sent_inside)).unwrap_or_else(|| ENDED.into());
                self.poison_pinned(format!("the transaction of the test was ended by the database: {cause}"), at);
                self.invalidate(cause, at, true);
            }
        }
        if raw
            && self.invalidation.is_none()
            && let Some(error) = first_error
        {
            self.swallowed.get_or_insert((error, at));
        }
        if transient {
            // Code that had the connection and did not return the error may have handled it.
            let is_unhandled = !raw || failure.is_some() || self.invalidation.is_some();
            self.transient.note(is_unhandled.then_some(self.savepoints));
        }
    }

    pub(crate) fn invalidate(&mut self, cause: String, at: Place, ended: bool) {
        match &mut self.invalidation {
            Some(first) => first.ended |= ended,
            None => self.invalidation = Some(Invalidation { cause, at, ended }),
        }
    }

    /// Marks the transaction around all sessions of a test as lost.
    pub(super) fn poison_pinned(&self, cause: String, at: Place) {
        if let Some(pinned) = self.pinned() {
            pinned.poison(cause, Some(at));
        }
    }

    /// Invalidates the transaction if a statement panicked: its connection has stayed doomed.
    pub(super) fn invalidate_after_panic(&mut self, at: Place) {
        if self.invalidation.is_none() && self.is_doomed() {
            self.invalidate("code that had the connection panicked".into(), self.sent_at.unwrap_or(at), true);
        }
    }

    /// Invalidates a transaction that was found aborted or ended at its commit or at the release of a savepoint. The
    /// code that had the connection has kept the error to itself.
    pub(super) fn invalidate_for_swallowed_error(&mut self, at: Place, ended: bool) {
        let sent_at = self.sent_at.unwrap_or(at);
        let (cause, at) = self.swallowed.take().unwrap_or_else(|| (if ended { ENDED } else { SILENT }.into(), sent_at));
        self.invalidate(cause, at, ended);
    }

    pub(super) fn check_valid(&self) -> Result<()> {
        match &self.invalidation {
            Some(invalidation) => {
                Err(Error::RollbackRequired { cause: invalidation.cause.clone(), at: invalidation.at })
            }
            None => Ok(()),
        }
    }

    pub(super) fn discard_effects(&mut self) {
        self.with_observer(|observer| {
            if observer.has_effects() {
                observer.take();
            }
        });
    }
}
