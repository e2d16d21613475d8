//! Records the statements that a thread sends while a closure runs.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::panic::Location;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::error::SourceLocation;

/// The maximum number of characters that are kept of a statement's text, and of its values.
const MAX_CHARS: usize = 10_000;

/// Records the statements that this thread sends through the connections of this crate while a closure runs: the
/// statements of sessions, of flushes and of code that has a connection, in all contexts and applications that are
/// entered meanwhile. If nothing is being recorded, the cost is negligible.
///
/// This is how to find a query in a loop over the rows of another query:
///
/// ```
/// # use diesel::prelude::*;
/// # use diesel::connection::SimpleConnection;
/// # use diesel_session::{Config, Database};
/// # diesel::table! { users (id) { id -> Integer, } }
/// # diesel::table! { posts (id) { id -> Integer, user_id -> Integer, } }
/// use diesel_session::recorder::Recorder;
///
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// # let app = DB.init_app("recorder", Config::new(":memory:"))?;
/// # app.context(|| {
/// let session = DB.session()?;
/// # session.with(|conn| conn.batch_execute("CREATE TABLE users (id INTEGER PRIMARY KEY);
/// #     CREATE TABLE posts (id INTEGER PRIMARY KEY, user_id INTEGER);
/// #     INSERT INTO users VALUES (1), (2), (3)"))?;
/// let (posts, recording) = Recorder::new().run(|| {
///     let users: Vec<i32> = session.load(users::table.select(users::id))?;
///     users.iter().map(|id| session.count(posts::table.filter(posts::user_id.eq(id)))).sum::<Result<i64, _>>()
/// });
/// assert_eq!(posts?, 0);
/// assert_eq!(recording.total(), 4);
/// let (statement, times) = recording.repeated(2).next().unwrap();
/// assert_eq!(times, 3);
/// assert!(statement.sql().contains("posts") && statement.at().unwrap().file().ends_with(".rs"));
/// # Ok(())
/// # })?;
/// # app.dispose()?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
///
/// In a web application it wraps a request: `Recorder::new().warn_repeats(10).run(|| app.run(handler))`. In
/// tests [`assert_queries!`](crate::assert_queries) checks the number of statements. Recordings may be nested; the
/// outer one includes the statements of the inner one. A recording does not include statements of other threads, or
/// statements that the pool sends while the connection is checked in.
#[derive(Debug, Clone)]
#[must_use = "a recorder does nothing until `run` is called"]
pub struct Recorder {
    limit: usize,
    binds: bool,
    warn_repeats: Option<usize>,
}

/// The statements that were sent while a [`Recorder`] ran.
#[derive(Debug, Default)]
pub struct Recording {
    statements: Vec<Recorded>,
    total: usize,
    /// By text: the number of times that it was sent, and its first statement.
    texts: HashMap<Rc<str>, (usize, Recorded)>,
}

/// A statement that was sent.
#[derive(Debug, Clone)]
pub struct Recorded {
    sql: Rc<str>,
    binds: Option<Rc<str>>,
    at: Option<SourceLocation>,
    duration: Duration,
    failed: bool,
    is_control: bool,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

impl Recorder {
    /// Keeps up to 1,000 statements, without values.
    pub fn new() -> Self {
        Self { limit: 1000, binds: false, warn_repeats: None }
    }

    /// The maximum number of statements that are kept, and of different texts that are counted. Further statements
    /// count only in [`total`](Recording::total).
    pub fn limit(mut self, statements: usize) -> Self {
        self.limit = statements;
        self
    }

    /// Keeps the values too, as Diesel shows them. They may be secrets.
    pub fn with_binds(mut self) -> Self {
        self.binds = true;
        self
    }

    /// Logs a warning, once for each text, if a statement is sent more than `times` times. The warning has the text
    /// and the call that sent it. The target is `diesel_session::recorder`.
    pub fn warn_repeats(mut self, times: usize) -> Self {
        self.warn_repeats = Some(times);
        self
    }

    /// Runs `body` and records. If `body` panics, the panic continues and the recording is lost.
    pub fn run<R>(self, body: impl FnOnce() -> R) -> (R, Recording) {
        RECORDINGS.set(RECORDINGS.get() + 1);
        let state = RecordingState { options: self, recording: Recording::default(), open: None };
        STATES.with_borrow_mut(|states| states.push(state));
        let ending = EndRecording;
        let out = body();
        let recording =
            STATES.with_borrow_mut(|states| states.last_mut().map(|state| std::mem::take(&mut state.recording)));
        drop(ending);
        (out, recording.unwrap_or_default())
    }
}

impl Recording {
    /// The statements in the order in which they were sent, including those that begin and end transactions.
    pub fn statements(&self) -> &[Recorded] {
        &self.statements
    }

    /// The number of statements that the program has sent, kept or not, without those that begin and end
    /// transactions.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The texts that were sent more than `times` times. Each item has the first statement with the text, and the
    /// number of times.
    pub fn repeated(&self, times: usize) -> impl Iterator<Item = (&Recorded, usize)> {
        let mut found: Vec<_> = self.texts.values().filter(|(count, _)| *count > times).collect();
        found.sort_unstable_by_key(|(count, first)| (std::cmp::Reverse(*count), Rc::clone(&first.sql)));
        found.into_iter().map(|(count, first)| (first, *count))
    }
}

impl Recorded {
    /// The text, up to 10,000 characters of it.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// The values, up to 10,000 characters of them, if the recorder keeps values.
    pub fn binds(&self) -> Option<&str> {
        self.binds.as_deref()
    }

    /// The call that sent the statement: a method of a session, the flush, or the call that gave the connection to
    /// the program. `None` for statements that the library sends by itself.
    pub fn at(&self) -> Option<&'static Location<'static>> {
        self.at
    }

    /// How long the statement took, including its rows; zero if the rows were not read to the end.
    pub fn duration(&self) -> Duration {
        self.duration
    }

    /// Whether the database refused the statement.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Whether the statement begins or ends a transaction or savepoint, or is a setting of the library. The program
    /// has not sent it.
    pub fn is_control(&self) -> bool {
        self.is_control
    }
}

impl fmt::Display for Recording {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sent = self.statements.iter().filter(|statement| !statement.is_control);
        let mut shown = 0;
        for statement in sent {
            shown += 1;
            writeln!(f, "{shown:>4}. {statement}")?;
        }
        match self.total - shown {
            0 => Ok(()),
            more => writeln!(f, "      and {more} more"),
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", crate::wording::phrase(&self.sql))?;
        if let Some(binds) = &self.binds {
            write!(f, " {}", crate::wording::phrase(binds))?;
        }
        if let Some(at) = self.at {
            write!(f, " (at {at}")?;
            if !self.duration.is_zero() {
                write!(f, ", {:.1?}", self.duration)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

/// Runs the closure, asserts that it sends this number of statements on this thread, and returns its result.
/// Statements that begin or end transactions do not count. If the number differs, the macro panics with the list of
/// the statements and their calls.
///
/// ```
/// # use diesel::prelude::*;
/// # use diesel_session::{Config, Database, assert_queries};
/// # static DB: Database<SqliteConnection> = Database::without_migrations();
/// # let app = DB.init_app("asserted", Config::new(":memory:"))?;
/// let query = diesel::select(1.into_sql::<diesel::sql_types::Integer>());
/// let one = assert_queries!(1, || app.context(|| DB.session()?.get_result::<i32>(query)))?;
/// assert_eq!(one, 1);
/// # app.dispose()?;
/// # Ok::<(), diesel_session::Error>(())
/// ```
#[macro_export]
macro_rules! assert_queries {
    ($wanted:expr, $body:expr $(,)?) => {
        $crate::__assert_queries($wanted, $body)
    };
}

#[doc(hidden)]
#[track_caller]
pub fn __assert_queries<R>(wanted: usize, body: impl FnOnce() -> R) -> R {
    let (out, recording) = Recorder::new().run(body);
    assert!(
        recording.total == wanted,
        "{wanted} statements were expected and {} were sent:\n{recording}",
        recording.total
    );
    out
}

/// A recording in progress.
struct RecordingState {
    options: Recorder,
    recording: Recording,
    /// The statement that has not ended: its start, and its index if it is kept.
    open: Option<(Instant, Option<usize>)>,
}

thread_local! {
    /// The number of recordings of this thread. It is read for every statement.
    static RECORDINGS: Cell<usize> = const { Cell::new(0) };
    static STATES: RefCell<Vec<RecordingState>> = const { RefCell::new(Vec::new()) };
    /// The call for which statements are sent.
    static CALL_SITE: Cell<Option<SourceLocation>> = const { Cell::new(None) };
    /// Whether the next statement begins or ends a transaction.
    static NEXT_IS_CONTROL: Cell<bool> = const { Cell::new(false) };
}

/// Ends the innermost recording when it is dropped.
struct EndRecording;

impl Drop for EndRecording {
    fn drop(&mut self) {
        RECORDINGS.set(RECORDINGS.get() - 1);
        STATES.with_borrow_mut(Vec::pop);
    }
}

/// Whether this thread records. A thread that is ending does not.
#[inline]
pub(crate) fn is_on() -> bool {
    RECORDINGS.try_with(|on| on.get() > 0).unwrap_or(false)
}

/// Statements are recorded with a call while this value lives. It holds the call of the outer scope.
#[derive(Debug)]
pub(crate) struct CallSite(Option<SourceLocation>);

impl CallSite {
    #[inline]
    pub(crate) fn enter(at: SourceLocation) -> Option<Self> {
        is_on().then(|| Self(CALL_SITE.replace(Some(at))))
    }
}

impl Drop for CallSite {
    fn drop(&mut self) {
        let _ = CALL_SITE.try_with(|call_site| call_site.set(self.0));
    }
}

/// Diesel is about to begin or end a transaction.
pub(crate) fn control_follows() {
    NEXT_IS_CONTROL.set(true);
}

/// `checked_out_at` is the source location of the checkout, if no session holds the connection.
pub(crate) fn started(query: &dyn fmt::Display, checked_out_at: Option<SourceLocation>) {
    let at = checked_out_at.or_else(|| CALL_SITE.get());
    let is_control = NEXT_IS_CONTROL.replace(false) || at.is_none();
    let wants_binds = STATES.with_borrow(|states| states.iter().any(|state| state.options.binds));
    let (sql, binds) = text_and_binds(query, wants_binds);
    let recorded = Recorded { sql: sql.into(), binds, at, duration: Duration::ZERO, failed: false, is_control };
    let add = |states: &mut Vec<RecordingState>| states.iter_mut().filter_map(|state| state.add(&recorded)).collect();
    let repeated: Vec<usize> = STATES.with_borrow_mut(add);
    // Nothing is borrowed here: the program's logger may run any code.
    for times in repeated {
        let call = at.map(|at| format!(" at {at}")).unwrap_or_default();
        crate::wording::log_line!(
            warn,
            "diesel_session::recorder",
            "the same statement was sent more than {times} times{call}: {}; most often that is a query in a loop",
            crate::wording::phrase(&recorded.sql)
        );
    }
}

pub(crate) fn finished(failed: bool) {
    STATES.with_borrow_mut(|states| {
        for RecordingState { recording, open, .. } in states {
            let Some((began, index)) = open.take() else { continue };
            if let Some(statement) = index.and_then(|index| recording.statements.get_mut(index)) {
                (statement.duration, statement.failed) = (began.elapsed(), failed);
            }
        }
    });
}

impl RecordingState {
    /// Adds a statement. If this exceeds the number of repeats to warn of, returns that number.
    fn add(&mut self, recorded: &Recorded) -> Option<usize> {
        let Self { options, recording, open } = self;
        let mut recorded = recorded.clone();
        recorded.binds = recorded.binds.filter(|_| options.binds);
        let kept = recording.statements.len() < options.limit;
        *open = Some((Instant::now(), kept.then_some(recording.statements.len())));
        if kept {
            recording.statements.push(recorded.clone());
        }
        if recorded.is_control {
            return None;
        }
        recording.total += 1;
        let known = recording.texts.len();
        let count = match recording.texts.get_mut(&recorded.sql) {
            Some((count, _)) => {
                *count += 1;
                *count
            }
            None if known < options.limit => {
                recording.texts.insert(Rc::clone(&recorded.sql), (1, recorded));
                1
            }
            None => return None,
        };
        options.warn_repeats.filter(|times| count == times + 1)
    }
}

/// The text of the statement, and its values if they are wanted. Diesel writes the text first, in one piece, and then
/// the values.
fn text_and_binds(query: &dyn fmt::Display, wants_binds: bool) -> (String, Option<Rc<str>>) {
    struct Pieces {
        sql: String,
        binds: Option<String>,
        began: bool,
    }

    impl Write for Pieces {
        fn write_str(&mut self, piece: &str) -> fmt::Result {
            if !std::mem::replace(&mut self.began, true) {
                self.sql.extend(piece.chars().take(MAX_CHARS));
                return Ok(());
            }
            match &mut self.binds {
                Some(binds) if binds.len() < MAX_CHARS => binds.extend(piece.chars().take(MAX_CHARS - binds.len())),
                // Further text is not needed.
                _ => return Err(fmt::Error),
            }
            Ok(())
        }
    }

    let mut pieces = Pieces { sql: String::new(), binds: wants_binds.then(String::new), began: false };
    let _ = write!(pieces, "{query}");
    let binds = pieces.binds.map(|binds| Rc::from(binds.trim_start_matches(" -- binds: ")));
    (pieces.sql, binds)
}
