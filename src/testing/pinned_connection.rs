//! The one connection of a test that is rolled back. It is inside a transaction that is never committed, and all pools
//! of the test's application use it in turn.
//!
//! An event that ends the transaction, or leaves the connection in an unknown state, poisons the pinned connection.
//! From then on it is never checked out again, because a new connection would see an empty database.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use diesel::result::QueryResult;
use parking_lot::{Condvar, Mutex};

use crate::connection::SessionConnection;
use crate::dialect::{BeginOptions, TransactionCheck};
use crate::error::{Details, LOST, SourceLocation};
use crate::kind::DatabaseKind;
use crate::pool::{ConnectionOwner, Managed, ObservedEffects, OuterTransaction, OwnedConnection, StatementListener};

/// The message of a connect whose database is in use by another process.
pub(super) const TAKEN: &str = "another process runs a test in this database";

/// The one connection of a test, and the state of its transaction.
pub(super) struct PinnedConnection<C> {
    kind: DatabaseKind,
    state: Mutex<PinnedState<C>>,
    /// Notified when the connection is given back.
    given_back: Condvar,
    /// A query whose answer is `1` if no other process uses the database of the pinned connection.
    ownership_query: Option<String>,
    /// The reason why the connection is not checked out any more.
    poisoned: OnceLock<Poisoned>,
    /// Before the test, rows violated their foreign keys, or the foreign keys could not be checked.
    had_orphans: AtomicBool,
    /// The connection has state that outlives the transaction, or prepared statements that refer to a schema that is
    /// rolled back.
    is_dirty: Arc<AtomicBool>,
}

enum PinnedState<C> {
    NotOpen,
    /// No pool uses the connection.
    Idle(OwnedConnection<C>),
    /// A pool uses the connection.
    InUse,
}

/// The reason why a pinned connection is poisoned.
#[derive(Debug, Clone)]
pub(super) struct Poisoned {
    pub(super) cause: String,
    pub(super) at: Option<SourceLocation>,
}

impl<C: SessionConnection> PinnedConnection<C> {
    /// Opens nothing. The first pool opens the connection.
    pub(super) fn new(kind: DatabaseKind, ownership_query: Option<String>) -> Self {
        Self {
            kind,
            state: Mutex::new(PinnedState::NotOpen),
            given_back: Condvar::new(),
            ownership_query,
            poisoned: OnceLock::new(),
            had_orphans: AtomicBool::new(false),
            is_dirty: Arc::default(),
        }
    }

    pub(super) fn poisoned(&self) -> Option<&Poisoned> {
        self.poisoned.get()
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(*self.state.lock(), PinnedState::Idle(_))
    }

    /// Rolls the transaction back after the last pool has given the connection back. Returns whether the pinned
    /// connection may serve another test: its connection is then as it was before, or is closed and opened again.
    pub(super) fn end(&self) -> bool {
        let mut state = self.state.lock();
        match &mut *state {
            PinnedState::NotOpen => self.poisoned().is_none(),
            PinnedState::InUse => false,
            PinnedState::Idle(OwnedConnection { conn, is_set_up, .. }) => {
                let begun = std::mem::take(is_set_up);
                let is_undone = begun && matches!(self.kind.end_outer(conn), Ok(true)) && conn.depth() == Some(0);
                let may_serve = is_undone && self.poisoned().is_none();
                if self.is_dirty.swap(false, Ordering::AcqRel) || !may_serve {
                    *state = PinnedState::NotOpen;
                }
                may_serve
            }
        }
    }
}

impl<C: SessionConnection> ConnectionOwner<C> for PinnedConnection<C> {
    fn take(&self) -> Result<Option<OwnedConnection<C>>, &'static str> {
        let state = std::mem::replace(&mut *self.state.lock(), PinnedState::InUse);
        match state {
            PinnedState::InUse => Err("another pool still has the one connection of this test"),
            PinnedState::NotOpen => Ok(None),
            PinnedState::Idle(mut owned) => {
                if owned.is_set_up && owned.conn.ping().is_err() {
                    self.give_back(Some(owned), false);
                    self.invalidate(LOST.into(), None);
                    return Err("the one connection of this test was lost");
                }
                Ok(Some(owned))
            }
        }
    }

    /// Begins the transaction that is never committed.
    fn complete_setup(&self, conn: &mut C) -> Result<(), String> {
        self.kind.begin_outer(conn).map_err(|error| error.to_string())?;
        if let Some(ownership_query) = &self.ownership_query {
            let answer = conn.texts(ownership_query).map_err(|error| error.to_string())?;
            if answer.first().and_then(Option::as_deref) != Some("1") {
                return Err(TAKEN.into());
            }
        }
        let had_orphans = self.kind == DatabaseKind::Sqlite && !self.kind.has_no_orphans(conn);
        self.had_orphans.store(had_orphans, Ordering::Release);
        Ok(())
    }

    fn give_back(&self, connection: Option<OwnedConnection<C>>, is_clean: bool) {
        self.is_dirty.fetch_or(!is_clean, Ordering::AcqRel);
        *self.state.lock() = connection.map_or(PinnedState::NotOpen, PinnedState::Idle);
        self.given_back.notify_all();
    }

    fn is_in_use(&self) -> bool {
        matches!(*self.state.lock(), PinnedState::InUse)
    }

    fn wait_until_unused(&self, deadline: Instant) {
        let mut state = self.state.lock();
        while matches!(*state, PinnedState::InUse) && !self.given_back.wait_until(&mut state, deadline).timed_out() {}
    }

    fn statement_listener(&self) -> StatementListener {
        let (kind, is_dirty) = (self.kind, Arc::clone(&self.is_dirty));
        Box::new(move |sql| {
            is_dirty.fetch_or(kind.may_change_schema(sql), Ordering::AcqRel);
        })
    }
}

impl<C: SessionConnection> OuterTransaction<C> for PinnedConnection<C> {
    fn begin(&self, conn: &mut C, options: BeginOptions, search_path: Option<&str>) -> QueryResult<()> {
        self.kind.begin_nested(conn, options, search_path)
    }

    fn probe(&self, conn: &mut C) -> QueryResult<()> {
        self.kind.probe_nested(conn)
    }

    fn commit(&self, conn: &mut C) -> QueryResult<()> {
        self.kind.commit_nested(conn, self.had_orphans.load(Ordering::Acquire))
    }

    fn release(&self, conn: &mut C) -> QueryResult<()> {
        self.kind.release_nested(conn)
    }

    fn roll_back(&self, conn: &mut C) -> QueryResult<()> {
        self.kind.rollback_nested(conn)
    }

    fn undo(&self, conn: &mut C) -> bool {
        self.kind.undo_nested(conn)
    }

    fn restore_search_path(&self) -> String {
        self.kind.search_path_after_nested()
    }

    fn end_program_use(&self, managed: &mut Managed<C>, effects: &ObservedEffects, keep: bool) -> Result<bool, String> {
        if let Some(word) = &effects.ended_by {
            return Err(format!("`{word}` was sent to the database, which ends a transaction"));
        }
        let cause = effects.first_error.as_deref().unwrap_or("the code that had the connection ended it");
        let ended = || format!("the transaction of the test was ended by the database: {cause}");
        let had_levels = managed.conn_mut().depth().is_some_and(|depth| depth > 1);
        if managed.roll_back_levels(1).is_err() || managed.conn_mut().depth() != Some(1) {
            return Err(ended());
        }
        let may_have_ended = effects.may_have_ended.is_some()
            || effects.first_error.is_some() && self.kind != DatabaseKind::Postgres
            || self.kind == DatabaseKind::Sqlite;
        let check = TransactionCheck {
            serialization_failure: effects.serialization_failure,
            may_be_replaced: true,
            marker_is_newest: !effects.set_savepoint,
        };
        if may_have_ended && !managed.suppressed(|conn| self.kind.dialect().transaction_exists(conn, check)) {
            return Err(ended());
        }
        let conn = managed.conn_mut();
        let kept = keep && self.commit(conn).is_ok();
        if kept || self.undo(conn) { Ok(kept && !had_levels) } else { Err(ended()) }
    }

    fn invalidate(&self, cause: String, at: Option<SourceLocation>) {
        self.poisoned.get_or_init(|| Poisoned { cause, at });
    }

    fn check(&self, app: &str) -> crate::error::Result<()> {
        match self.poisoned.get() {
            None => Ok(()),
            Some(Poisoned { cause, at }) => {
                Err(Details::TestInvalidated { app: app.into(), cause: cause.clone(), at: *at }.into())
            }
        }
    }
}
