//! Whether the transaction is still what the session believes it to be.

use super::transaction::{Access, Core, Phase};
use crate::backend::{self, Kind};
use crate::connection::SessionConnection;
use crate::error::{Error, Place, Result};
use crate::pool::Notes;

/// Why the transaction cannot go on.
#[derive(Debug)]
pub(super) struct Spoiled {
    cause: String,
    at: Place,
    /// It is gone as a whole, so rolling a savepoint back does not heal it.
    pub(super) ended: bool,
}

/// The cause where no error says it.
const ENDED: &str = "it was ended by the code that had the connection";

impl<C: SessionConnection> Core<C> {
    /// Compares what the session believes with what the connection went through, and with how the statement ended: errors
    /// that come while rows are read are not seen by the instrumentation of every database.
    pub(super) fn settle_now(&mut self, access: Access, at: Place, failure: Option<&diesel::result::Error>) {
        let kind = self.kind();
        let Some(lease) = self.lease.as_mut() else { return };
        let live = lease.live();
        let raw = access == Access::Raw;
        let failure = failure.filter(|error| matches!(error, diesel::result::Error::DatabaseError(..)));
        if !raw && failure.is_none() && !live.witness.has_notes() {
            return;
        }
        // Whoever had the connection may have put another in its place, or have replaced its instrumentation.
        let watched = !raw || live.witness.watches(live.conn.instrumentation());
        let mut notes = if live.witness.has_notes() { live.witness.take() } else { Notes::default() };
        if let Some(error) = failure {
            notes.complete(kind, error, !raw);
            // Nobody saw that statement: the loss may be that of another connection, which the code has too.
            if raw && !notes.lost && backend::is_connection_lost(error) {
                live.witness.look_away(true);
                notes.lost = live.conn.ping().is_err_and(|error| backend::is_connection_lost(&error));
                live.witness.look_away(false);
            }
        }
        let transient = notes.transient;
        let depth = live.conn.depth();
        live.lost |= notes.lost;
        live.doomed |= !watched || notes.lost;
        if let Some(lane) = live.conn.lane().filter(|_| notes.lost) {
            lane.break_off(notes.first_error.as_deref().unwrap_or("its connection was lost"), Some(at));
        }
        if !matches!(self.phase, Phase::Begun(_)) {
            if depth != Some(0) || notes.began || notes.ended_by.is_some() {
                self.break_lane("a statement began or ended a transaction of its own".into(), at);
                self.doom();
            }
            return;
        }
        let expected = self.levels + 1;
        let Notes { first_error, last_failed, serialization_failure, lost, ended_by, may_have_ended, .. } = notes;
        if let Some(word) = ended_by {
            self.spoil(format!("`{word}` was sent to the database inside it"), at, true);
            self.break_lane(format!("`{word}` was sent to the database, which ends a transaction"), at);
            self.doom();
        } else if !watched {
            self.break_lane("the code that had the connection replaced it, or its instrumentation".into(), at);
            self.spoil("the code that had the connection replaced it, or its instrumentation".into(), at, true);
        } else if lost || depth.is_none_or(|depth| depth < expected) {
            let cause = first_error.unwrap_or_else(|| ENDED.into());
            if depth.is_none_or(|depth| depth == 0) {
                self.break_lane(format!("the transaction of the test was ended by the database: {cause}"), at);
            }
            self.spoil(cause, at, true);
        } else if depth.is_some_and(|depth| depth > expected) {
            self.spoil("the code that had the connection left a transaction of its own open".into(), at, true);
        } else if kind == Kind::Postgres {
            if let Some(error) = first_error.filter(|_| last_failed) {
                self.spoil(error, at, false);
            }
        } else if first_error.is_some() || may_have_ended || raw && kind == Kind::Sqlite {
            let Some(lease) = self.lease.as_mut() else { return };
            let live = lease.live();
            live.witness.look_away(true);
            let alive = kind.is_in_transaction(&mut *live.conn, serialization_failure);
            live.witness.look_away(false);
            if !alive {
                live.doomed |= raw;
                let cause = first_error.unwrap_or_else(|| ENDED.into());
                self.break_lane(format!("the transaction of the test was ended by the database: {cause}"), at);
                self.spoil(cause, at, true);
            }
        }
        if transient {
            // Code that had the connection and did not hand the error on may have dealt with it.
            let stands = !raw || failure.is_some() || self.spoiled.is_some();
            self.transient.note(stands.then_some(self.levels));
        }
    }

    pub(crate) fn spoil(&mut self, cause: String, at: Place, ended: bool) {
        match &mut self.spoiled {
            Some(first) => first.ended |= ended,
            None => self.spoiled = Some(Spoiled { cause, at, ended }),
        }
    }

    /// The transaction around all of a test's sessions is gone.
    fn break_lane(&self, cause: String, at: Place) {
        if let Some(lane) = self.lane() {
            lane.break_off(cause, Some(at));
        }
    }

    /// A statement that did not return left its connection doomed.
    pub(super) fn notice_panic(&mut self, at: Place) {
        if self.spoiled.is_none() && self.is_doomed() {
            self.spoil("code that had the connection panicked".into(), self.sent_at.unwrap_or(at), true);
        }
    }

    pub(super) fn check_spoiled(&self) -> Result<()> {
        match &self.spoiled {
            Some(spoiled) => Err(Error::RollbackRequired { cause: spoiled.cause.clone(), at: spoiled.at }),
            None => Ok(()),
        }
    }

    pub(super) fn forget_notes(&mut self) {
        self.live_witness(|witness| {
            if witness.has_notes() {
                witness.take();
            }
        });
    }
}
