//! The effects of a connection's statements as seen by Diesel's instrumentation. This includes statements of code that
//! has used the connection directly and has not reported its errors.

use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use diesel::connection::{Instrumentation, InstrumentationEvent, get_default_instrumentation};
use diesel::result::{DatabaseErrorKind, Error as DieselError, QueryResult};

use crate::dialect::{self, Effect, Poison, WriteStep};
use crate::error::SourceLocation;
use crate::kind::DatabaseKind;
use crate::recorder;
use crate::sync::Mutex;

/// Observes the statements of a connection. The instrumentation of the connection and the session that holds it share
/// the observer.
///
/// Only the thread that holds the connection reads and writes the observer. The locks that pass a connection to
/// another thread order the accesses.
pub(crate) struct StatementObserver {
    pub(super) kind: DatabaseKind,
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
    listener: Option<StatementListener>,
    /// The source location for the record of statements, while code of the program holds the connection outside of a
    /// session.
    checked_out_at: Mutex<Option<SourceLocation>>,
    effects: Mutex<ObservedEffects>,
}

/// Receives the text of each raw statement.
pub(crate) type StatementListener = Box<dyn Fn(&str) + Send + Sync>;

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
    /// The writes and savepoints of raw statements that succeeded.
    pub(crate) write_steps: Vec<WriteStep>,
}

impl ObservedEffects {
    /// Adds the effect of a raw statement. If it has `failed`, it may be a text of several statements of which some
    /// had an effect.
    fn add_statement(&mut self, kind: DatabaseKind, effect: Effect, failed: bool) {
        let Effect { ends, may_end, begins, begins_transaction, sets_savepoint, names_string_setting: _, write_steps } =
            effect;
        if !failed {
            self.write_steps.extend(write_steps);
        }
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
            self.serialization_failure |= kind.is_deadlock(error);
        }
    }
}

impl StatementObserver {
    pub(crate) fn new(kind: DatabaseKind, listener: Option<StatementListener>) -> Self {
        Self {
            kind,
            has_pending: AtomicBool::new(false),
            sql_source: AtomicU8::new(0),
            leftovers_seen: AtomicBool::new(false),
            suppressed: AtomicBool::new(false),
            running: AtomicU8::new(0),
            string_setting_changed: AtomicBool::new(false),
            listener,
            checked_out_at: Mutex::new(None),
            effects: Mutex::default(),
        }
    }

    /// Whether there are effects to take.
    #[inline]
    pub(crate) fn has_effects(&self) -> bool {
        self.has_pending.load(Ordering::Acquire)
    }

    pub(crate) fn take(&self) -> ObservedEffects {
        self.running.store(0, Ordering::Release);
        self.has_pending.store(false, Ordering::Release);
        std::mem::take(&mut *self.effects.lock())
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

    /// Has to be called when the state that statements have left is removed.
    pub(crate) fn forget_leftovers(&self) {
        self.string_setting_changed.store(false, Ordering::Release);
        self.leftovers_seen.store(false, Ordering::Release);
    }

    /// Statements are recorded with this source location from now on, on every thread.
    pub(super) fn set_checked_out_at(&self, at: Option<SourceLocation>) {
        *self.checked_out_at.lock() = at;
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

    fn kind(&self) -> DatabaseKind {
        self.kind.known()
    }

    fn started(&self, query: &dyn fmt::Display) {
        self.running.store(self.running.load(Ordering::Acquire).saturating_add(1), Ordering::Release);
        // Only raw SQL can be empty.
        if self.sql_source.load(Ordering::Acquire) == SqlSource::Raw as u8 {
            assert!(self.kind() != DatabaseKind::Mysql || !is_empty(query), "{EMPTY_STATEMENT}");
            // If a reset can remove all state, the text need not be read, and the outcome does not matter.
            if self.kind().can_reset() {
                self.leftovers_seen.store(true, Ordering::Release);
            }
        }
    }

    fn finished(&self, query: &dyn fmt::Display, error: Option<&DieselError>) {
        let running = self.running.load(Ordering::Acquire);
        self.running.store(running.saturating_sub(1), Ordering::Release);
        let sql_source = self.sql_source.load(Ordering::Acquire);
        if sql_source > 0 || error.is_some() || self.has_effects() {
            self.note_finished(query, error, sql_source, running);
        }
    }

    /// Records the effect of a statement whose text is read, of a failed one, or of one after these.
    #[cold]
    fn note_finished(&self, query: &dyn fmt::Display, error: Option<&DieselError>, sql_source: u8, running: u8) {
        let raw = sql_source == SqlSource::Raw as u8;
        let text = if sql_source > 0 { statement(query) } else { String::new() };
        // This includes failed statements: if the text has several statements, only the last one may have failed.
        if sql_source > 0 && self.kind().leaves_state(&text, raw) {
            self.leftovers_seen.store(true, Ordering::Release);
        }
        let mut effect = if raw { self.effect_of_raw(&text) } else { Effect::default() };
        let error = match error {
            None if !raw && !self.has_effects() => return,
            None => None,
            Some(error @ DieselError::DatabaseError(..)) => Some(error),
            // The error is not the database's, so the database has not seen the statement.
            Some(_) => return,
        };
        self.has_pending.store(true, Ordering::Release);
        let mut effects = self.effects.lock();
        if raw && self.kind().forgets_prepared(&text) {
            effects.poison = Some(Poison::Forgotten);
        }
        // Diesel reports the end of a failed query a second time when its rows are dropped.
        if running == 0 {
            effect.write_steps.clear();
        }
        effects.last_failed &= running == 0;
        effects.add_statement(self.kind(), effect, error.is_some());
        if let Some(error) = error {
            effects.add_error(self.kind(), error, true);
        }
    }

    fn effect_of_raw(&self, text: &str) -> Effect {
        if let Some(listener) = &self.listener {
            listener(text);
        }
        let mut effect = self.kind().effect(text);
        if self.kind() == DatabaseKind::Postgres {
            // After such a change, the parsed text may have another meaning.
            let changed = effect.names_string_setting || self.string_setting_changed.load(Ordering::Acquire);
            self.string_setting_changed.store(changed, Ordering::Release);
            if changed && let Some(word) = effect.may_end.take() {
                effect.ends.get_or_insert(word);
            }
        }
        effect
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
                self.observer.started(query);
                if recorder::is_on() {
                    recorder::started(query, *self.observer.checked_out_at.lock());
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
