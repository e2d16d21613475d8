//! The effects of a connection's statements as seen by Diesel's instrumentation. This includes statements of code that
//! has used the connection directly and has not reported its errors.

use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diesel::connection::{Instrumentation, InstrumentationEvent, get_default_instrumentation};
use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use crate::dialect::{self, Effect, Poison};
use crate::kind::DatabaseKind;
use crate::recorder;

/// Observes the statements of a connection. The instrumentation of the connection and the session that holds it share
/// the observer.
///
/// Only the thread that holds the connection reads and writes the observer. The locks that pass a connection to
/// another thread order the accesses.
#[derive(Debug)]
pub(crate) struct StatementObserver {
    kind: DatabaseKind,
    /// Effects have been observed and not taken.
    has_pending: AtomicBool,
    /// The source of the following statements, as the number of a [`SqlSource`]. If the number is 0, the text of
    /// statements is not read.
    sql_source: AtomicU8,
    /// A statement whose text was read may have left state on the connection.
    leftovers_seen: AtomicBool,
    /// The statement is a query of the library itself, for which an error is an answer.
    suppressed: AtomicBool,
    /// The number of statements that have begun and not ended.
    running: AtomicU8,
    /// A raw statement may have changed how PostgreSQL parses string literals.
    string_setting_changed: AtomicBool,
    /// Whether the observer looks for changes of the schema by raw statements.
    tracks_schema_changes: bool,
    /// A raw statement may have changed the schema.
    schema_changed: AtomicBool,
    effects: Mutex<ObservedEffects>,
}

/// The source of a statement whose text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SqlSource {
    /// The query builder, if parts of the statement are not visible in its types.
    Typed = 1,
    /// Raw SQL.
    Raw = 2,
}

/// The effects that were observed since they were last taken.
#[derive(Debug, Default)]
pub(crate) struct ObservedEffects {
    /// The first error.
    pub(crate) first_error: Option<String>,
    /// Whether the last statement failed.
    pub(crate) last_failed: bool,
    /// Whether an error was a serialization failure or a deadlock.
    pub(crate) serialization_failure: bool,
    /// Whether, after one of the errors, running the whole transaction again may succeed.
    pub(crate) transient: bool,
    /// Whether an error was the loss of the connection.
    pub(crate) lost: bool,
    /// The reason why the connection cannot be used any more, from the last error that has one.
    pub(crate) poison: Option<Poison>,
    /// The keyword of a statement that ends a transaction and was not refused.
    pub(crate) ended_by: Option<String>,
    /// Whether a statement began a transaction of its own.
    pub(crate) began: bool,
    /// A statement after which the server has to be asked whether the transaction still exists.
    pub(crate) may_have_ended: Option<String>,
    /// Whether a statement set a savepoint that is not one of Diesel's.
    pub(crate) set_savepoint: bool,
}

impl ObservedEffects {
    fn is_empty(&self) -> bool {
        self.first_error.is_none()
            && self.ended_by.is_none()
            && self.may_have_ended.is_none()
            && !self.began
            && !self.set_savepoint
    }

    /// Adds the effect of a raw statement. If it has `failed`, it may be a text of several statements of which some
    /// had an effect.
    fn add_statement(&mut self, kind: DatabaseKind, effect: Effect, failed: bool) {
        let Effect { ends, may_end, begins, begins_transaction, sets_savepoint, names_string_setting: _ } = effect;
        // After an error, the session asks the server whether the transaction still exists, unless the text may have
        // begun another one.
        let mut ends = ends.filter(|_| !failed || begins_transaction);
        if kind == DatabaseKind::Sqlite && !failed {
            // SQLite refuses to begin a transaction inside another one. After an error, a savepoint may have begun
            // one.
            let restarts = begins_transaction || sets_savepoint && self.first_error.is_some();
            ends = ends.or(restarts.then(|| if begins_transaction { "BEGIN".into() } else { "SAVEPOINT".into() }));
        }
        self.began |= begins;
        self.set_savepoint |= sets_savepoint;
        self.may_have_ended = self.may_have_ended.take().or(may_end);
        self.ended_by = self.ended_by.take().or(ends);
    }

    /// Adds an error. `last` means that the last statement has failed. Otherwise this may be any error that was passed
    /// on.
    pub(crate) fn add_error(&mut self, kind: DatabaseKind, error: &DieselError, last: bool) {
        if dialect::is_empty_query(error) {
            return;
        }
        self.first_error.get_or_insert_with(|| error.to_string());
        self.transient |= kind.is_transient(error);
        self.poison = kind.poison(error).or(self.poison);
        if last {
            self.last_failed = true;
            self.lost |= dialect::is_connection_lost(error);
            self.serialization_failure |= dialect::is_deadlock(error);
        }
    }
}

impl StatementObserver {
    pub(crate) fn new(kind: DatabaseKind, tracks_schema_changes: bool) -> Self {
        Self {
            kind,
            has_pending: AtomicBool::new(false),
            sql_source: AtomicU8::new(0),
            leftovers_seen: AtomicBool::new(false),
            suppressed: AtomicBool::new(false),
            running: AtomicU8::new(0),
            string_setting_changed: AtomicBool::new(false),
            tracks_schema_changes,
            schema_changed: AtomicBool::new(false),
            effects: Mutex::default(),
        }
    }

    pub(super) fn kind(&self) -> DatabaseKind {
        self.kind
    }

    /// Whether there are effects to take.
    #[inline]
    pub(crate) fn has_effects(&self) -> bool {
        self.has_pending.load(Ordering::Acquire)
    }

    pub(crate) fn take(&self) -> ObservedEffects {
        self.running.store(0, Ordering::Release);
        self.has_pending.store(false, Ordering::Release);
        std::mem::take(&mut *self.effects())
    }

    /// From now on the text of statements is read, for keywords that end a transaction and for state that outlives it.
    pub(crate) fn read_statements(&self, source: SqlSource) {
        self.running.store(0, Ordering::Release);
        self.sql_source.store(source as u8, Ordering::Release);
    }

    pub(crate) fn stop_reading(&self) {
        self.sql_source.store(0, Ordering::Release);
    }

    /// Whether a statement whose text was read may have left state that outlives its transaction.
    #[inline]
    pub(crate) fn has_seen_leftovers(&self) -> bool {
        self.leftovers_seen.load(Ordering::Acquire)
    }

    /// Whether a raw statement may have changed the schema, if the observer looks for that.
    pub(crate) fn may_have_changed_schema(&self) -> bool {
        self.schema_changed.load(Ordering::Acquire)
    }

    /// Has to be called when the state that statements have left is removed.
    pub(crate) fn forget_leftovers(&self) {
        self.string_setting_changed.store(false, Ordering::Release);
        self.leftovers_seen.store(false, Ordering::Release);
    }

    /// While it is suppressed, neither this observer nor the program's own instrumentation sees any event.
    pub(crate) fn suppress(&self, on: bool) {
        self.suppressed.store(on, Ordering::Release);
    }

    /// Whether `installed` belongs to this observer.
    pub(crate) fn is_installed_as(self: &Arc<Self>, installed: &dyn Instrumentation) -> bool {
        installed
            .downcast_ref::<ObserverInstrumentation>()
            .is_some_and(|installed| Arc::ptr_eq(&installed.observer, self))
    }

    fn effects(&self) -> std::sync::MutexGuard<'_, ObservedEffects> {
        self.effects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Only raw SQL can be empty.
    fn refuses_empty_statements(&self) -> bool {
        self.kind == DatabaseKind::Mysql && self.sql_source.load(Ordering::Acquire) == SqlSource::Raw as u8
    }

    /// If a reset can remove all state, the text of the statement need not be read, and its outcome does not matter.
    fn started(&self) {
        self.running.store(self.running.load(Ordering::Acquire).saturating_add(1), Ordering::Release);
        if self.sql_source.load(Ordering::Acquire) == SqlSource::Raw as u8 && self.kind.can_reset() {
            self.leftovers_seen.store(true, Ordering::Release);
        }
    }

    fn finished(&self, query: &dyn fmt::Display, error: Option<&DieselError>) {
        let sql_source = self.sql_source.load(Ordering::Acquire);
        let raw = sql_source == SqlSource::Raw as u8;
        let text = if sql_source > 0 { statement(query) } else { String::new() };
        // This includes failed statements: if the text has several statements, only the last one may have failed.
        if sql_source > 0 && self.kind.leaves_state(&text, raw) {
            self.leftovers_seen.store(true, Ordering::Release);
        }
        if self.tracks_schema_changes && raw && self.kind.may_change_schema(&text) {
            self.schema_changed.store(true, Ordering::Release);
        }
        // Diesel reports the end of a failed query a second time when its rows are dropped.
        let repeated = self.running.load(Ordering::Acquire) == 0;
        self.running.store(self.running.load(Ordering::Acquire).saturating_sub(1), Ordering::Release);
        if raw && self.kind.forgets_prepared(&text) {
            self.effects().poison = Some(Poison::Forgotten);
            self.has_pending.store(true, Ordering::Release);
        }
        let mut effect = if raw { self.kind.effect(&text) } else { Effect::default() };
        if raw && self.kind == DatabaseKind::Postgres {
            // After such a change, the parsed text may have another meaning.
            let changed = effect.names_string_setting || self.string_setting_changed.load(Ordering::Acquire);
            self.string_setting_changed.store(changed, Ordering::Release);
            if changed && let Some(word) = effect.may_end.take() {
                effect.ends.get_or_insert(word);
            }
        }
        match error {
            None if !raw && !self.has_effects() => {}
            None => {
                let mut effects = self.effects();
                if !repeated {
                    effects.last_failed = false;
                }
                effects.add_statement(self.kind, effect, false);
                if raw && !effects.is_empty() {
                    self.has_pending.store(true, Ordering::Release);
                }
            }
            Some(error @ DieselError::DatabaseError(..)) => {
                let mut effects = self.effects();
                effects.add_statement(self.kind, effect, true);
                effects.add_error(self.kind, error, true);
                self.has_pending.store(true, Ordering::Release);
            }
            // The error is not the database's, so the database has not seen the statement.
            Some(_) => {}
        }
    }
}

/// Whether the text of a statement is empty. Diesel writes the bind values after the text.
fn is_empty(query: &dyn fmt::Display) -> bool {
    let text = statement(query);
    text.is_empty() || text.trim_start().starts_with("-- binds:")
}

/// The message of a panic that replaces a crash: MariaDB's client library reads the first character even of an empty
/// text, and an instrumentation cannot refuse a statement in any other way.
pub(crate) const EMPTY_STATEMENT: &str =
    "an empty text was sent as a statement, on which MariaDB's client library would crash";

/// Runs code that uses a connection. The panic of an empty statement becomes the error that the server would have
/// sent.
pub(crate) fn refuse_empty_statements<T>(run: impl FnOnce() -> QueryResult<T>) -> QueryResult<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        if !crate::panic::panic_message(&*panic).starts_with(EMPTY_STATEMENT) {
            resume_unwind(panic);
        }
        Err(DieselError::DatabaseError(DatabaseErrorKind::Unknown, Box::new(EMPTY_STATEMENT.to_owned())))
    })
}

/// The text of a statement without its bind values.
fn statement(query: &dyn fmt::Display) -> String {
    /// Diesel writes the statement in one piece first, and then the bind values.
    struct FirstPiece(String);

    impl Write for FirstPiece {
        fn write_str(&mut self, piece: &str) -> fmt::Result {
            if !self.0.is_empty() {
                return Err(fmt::Error);
            }
            self.0.push_str(piece);
            Ok(())
        }
    }

    let mut text = FirstPiece(String::new());
    let _ = write!(text, "{query}");
    text.0
}

/// The instrumentation of a pooled connection. It passes each event on to the program's own instrumentation.
pub(crate) struct ObserverInstrumentation {
    observer: Arc<StatementObserver>,
    next: Option<Box<dyn Instrumentation>>,
}

impl ObserverInstrumentation {
    pub(crate) fn new(observer: Arc<StatementObserver>) -> Self {
        Self { observer, next: get_default_instrumentation() }
    }
}

impl Instrumentation for ObserverInstrumentation {
    fn on_connection_event(&mut self, event: InstrumentationEvent<'_>) {
        if self.observer.suppressed.load(Ordering::Acquire) {
            return;
        }
        match &event {
            InstrumentationEvent::StartQuery { query, .. } => {
                if self.observer.refuses_empty_statements() && is_empty(query) {
                    panic!("{EMPTY_STATEMENT}");
                }
                self.observer.started();
                if recorder::is_on() {
                    recorder::started(query);
                }
            }
            InstrumentationEvent::FinishQuery { query, error, .. } => {
                self.observer.finished(query, *error);
                if recorder::is_on() {
                    recorder::finished(error.is_some());
                }
            }
            InstrumentationEvent::BeginTransaction { .. }
            | InstrumentationEvent::CommitTransaction { .. }
            | InstrumentationEvent::RollbackTransaction { .. }
                if recorder::is_on() =>
            {
                recorder::control_follows();
            }
            _ => {}
        }
        if let Some(next) = &mut self.next {
            next.on_connection_event(event);
        }
    }
}

#[cfg(all(test, feature = "sqlite"))]
mod tests {
    use super::statement;

    #[test]
    fn statement_text_excludes_bind_values() {
        assert_eq!(statement(&"COMMIT; BEGIN"), "COMMIT; BEGIN");
        let query = diesel::sql_query("SELECT $1").bind::<diesel::sql_types::Text, _>("COMMIT");
        assert_eq!(statement(&diesel::debug_query::<diesel::sqlite::Sqlite, _>(&query)), "SELECT $1");
    }
}
