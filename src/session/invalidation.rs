//! Whether the transaction is still what the session believes it to be.

use super::transaction_state::{Access, Phase, TransactionState};
use crate::connection::SessionConnection;
use crate::dialect::{self, Poison, TransactionCheck};
use crate::error::LOST;
use crate::error::{Error, Place, Result};
use crate::kind::DatabaseKind;
use crate::pool::ObservedEffects;
use crate::settings::Mode;

/// Why the transaction cannot go on.
#[derive(Debug)]
pub(super) struct Invalidated {
    cause: String,
    at: Place,
    /// It is gone as a whole, so rolling a savepoint back does not heal it.
    pub(super) ended: bool,
}

/// The cause where no error says it.
const ENDED: &str = "it was ended by the code that had the connection";

/// The cause where the error was not handed on to anybody.
const SILENT: &str =
    "a statement failed, and neither the code that had the connection nor the driver handed its error on";

impl<C: SessionConnection> TransactionState<C> {
    /// Compares what the session believes with what the connection went through, and with how the statement ended: errors
    /// that come while rows are read are not seen by the instrumentation of every database.
    pub(super) fn settle_now(&mut self, access: Access, at: Place, failure: Option<&diesel::result::Error>) {
        let kind = self.kind();
        let Some(pooled) = self.pooled.as_mut() else { return };
        let managed = pooled.managed();
        let raw = access == Access::Raw;
        let failure = failure.filter(|error| matches!(error, diesel::result::Error::DatabaseError(..)));
        if !raw && failure.is_none() && !managed.observer.has_effects() {
            // An aborted transaction would have refused it.
            self.swallowed = None;
            return;
        }
        // Whoever had the connection may have put another in its place, or have replaced its instrumentation.
        let watched = !raw || managed.is_observed();
        let mut notes =
            if managed.observer.has_effects() { managed.observer.take() } else { ObservedEffects::default() };
        if let Some(error) = failure {
            notes.complete(kind, error, !raw);
            // Nobody saw that statement: the loss may be that of another connection, which the code has too.
            if raw && !notes.lost && dialect::is_connection_lost(error) {
                managed.observer.suppress(true);
                notes.lost = managed.conn_mut().ping().is_err_and(|error| dialect::is_connection_lost(&error));
                managed.observer.suppress(false);
            }
        }
        let writes = self.settings.mode != Mode::ReadOnly;
        let poison = notes.poison.filter(|poison| *poison != Poison::ReadOnly || writes);
        if let Some(poison) = poison {
            managed.retire(poison);
        }
        let transient = notes.transient || poison == Some(Poison::ReadOnly) && kind.may_write_elsewhere();
        let depth = managed.conn_mut().depth();
        managed.lost |= notes.lost;
        managed.doomed |= !watched || notes.lost;
        if let Some(pinned) = managed.pinned().filter(|_| notes.lost) {
            let said = notes.first_error.as_deref().map(|error| format!(": {error}"));
            pinned.poison(format!("{LOST}{}", said.unwrap_or_default()), Some(at));
        }
        if !matches!(self.phase, Phase::Begun(_)) {
            if depth != Some(0) || notes.began || notes.ended_by.is_some() {
                self.poison_pinned("a statement began or ended a transaction of its own".into(), at);
                self.doom();
            }
            return;
        }
        let expected = self.levels + 1;
        let ObservedEffects {
            first_error,
            last_failed,
            serialization_failure,
            lost,
            ended_by,
            may_have_ended,
            set_savepoint,
            ..
        } = notes;
        self.has_raw_savepoint |= set_savepoint;
        let sent = |word: &str| format!("`{word}` was sent to the database inside it");
        if let Some(word) = ended_by {
            self.invalidate(sent(&word), at, true);
            self.poison_pinned(format!("`{word}` was sent to the database, which ends a transaction"), at);
            self.doom();
        } else if !watched {
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
                // The database refuses everything after it.
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
                marker_is_newest: self.levels == 0 && !self.has_raw_savepoint,
            };
            let Some(pooled) = self.pooled.as_mut() else { return };
            let managed = pooled.managed();
            managed.observer.suppress(true);
            let exists = kind.transaction_exists(managed.conn_mut(), check);
            managed.observer.suppress(false);
            if !exists {
                managed.doomed |= raw;
                let cause = first_error.clone().or(may_have_ended.as_deref().map(sent)).unwrap_or_else(|| ENDED.into());
                self.poison_pinned(format!("the transaction of the test was ended by the database: {cause}"), at);
                self.invalidate(cause, at, true);
            }
        }
        if raw
            && self.invalidated.is_none()
            && let Some(error) = first_error
        {
            self.swallowed.get_or_insert((error, at));
        }
        if transient {
            // Code that had the connection and did not hand the error on may have dealt with it.
            let stands = !raw || failure.is_some() || self.invalidated.is_some();
            self.transient.note(stands.then_some(self.levels));
        }
    }

    pub(crate) fn invalidate(&mut self, cause: String, at: Place, ended: bool) {
        match &mut self.invalidated {
            Some(first) => first.ended |= ended,
            None => self.invalidated = Some(Invalidated { cause, at, ended }),
        }
    }

    /// The transaction around all of a test's sessions is gone.
    pub(super) fn poison_pinned(&self, cause: String, at: Place) {
        if let Some(pinned) = self.pinned() {
            pinned.poison(cause, Some(at));
        }
    }

    /// A statement that did not return left its connection doomed.
    pub(super) fn notice_panic(&mut self, at: Place) {
        if self.invalidated.is_none() && self.is_doomed() {
            self.invalidate("code that had the connection panicked".into(), self.sent_at.unwrap_or(at), true);
        }
    }

    /// The transaction was found to be aborted, or gone, when it was to be kept: code that had the connection kept an error to itself.
    pub(super) fn invalidate_silently(&mut self, at: Place, ended: bool) {
        let sent_at = self.sent_at.unwrap_or(at);
        let (cause, at) = self.swallowed.take().unwrap_or_else(|| (if ended { ENDED } else { SILENT }.into(), sent_at));
        self.invalidate(cause, at, ended);
    }

    pub(super) fn check_invalidated(&self) -> Result<()> {
        match &self.invalidated {
            Some(invalidated) => Err(Error::RollbackRequired { cause: invalidated.cause.clone(), at: invalidated.at }),
            None => Ok(()),
        }
    }

    /// Whether the transaction has to be rolled back, and as a whole.
    pub(super) fn invalidated_as_a_whole(&self) -> Option<bool> {
        self.invalidated.as_ref().map(|invalidated| invalidated.ended)
    }

    pub(super) fn forget_effects(&mut self) {
        self.with_observer(|observer| {
            if observer.has_effects() {
                observer.take();
            }
        });
    }
}
