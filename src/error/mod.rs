//! What can go wrong, in one enum; every text says what happened, where, and what to do.

mod kind;
mod optional;
mod questions;
mod shortage;

use std::panic::Location;
use std::time::Duration;

pub use kind::ConnectErrorKind;
pub use optional::ResultExt;
pub use shortage::Shortage;

use crate::dispose::DisposeReport;
use crate::orm::State;
use crate::outcome::UnknownCommit;
use crate::pool::{Blockers, Holders};
use crate::schema::MigrationFailure;
use crate::wording::{phrase, sentence};

/// A place in the program's source, as `#[track_caller]` sees it.
pub type Place = &'static Location<'static>;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
///
/// The text of each variant starts with a stable code ([`Error::code`]), names the application and the place
/// where it knows them, and says what to do where that is not for the database to say. `Debug` shows the same text, so that it is what `unwrap` and a `main` that
/// returns a `Result` print. No text contains a password.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The flush that goes before a query failed.
    #[error(
        "DS310 the flush before the query at {at} failed: {} Flush or commit where it can be dealt with, or query inside `no_autoflush`",
        sentence(source)
    )]
    Autoflush {
        /// What went wrong.
        source: Box<Error>,
        /// Where the query was sent.
        at: Place,
    },

    /// The connection pool has no connection to give and one did not come back in time.
    #[error(
        "DS201 app `{app}` got no connection in {waited:.3?} (at {at}): all {max_size} are in use and {waiting} other callers wait. \
         Held: {holders}. End the transactions listed, or raise `Config::max_size`"
    )]
    AcquireTimeout {
        /// The application.
        app: String,
        /// How long the caller waited.
        waited: Duration,
        /// The size of the pool.
        max_size: u32,
        /// How many other callers were waiting at that moment.
        waiting: usize,
        /// Who had the connections.
        holders: Holders,
        /// Where one was asked for.
        at: Place,
    },

    /// `begin` was called although the session had begun already.
    #[error(
        "DS104 `begin` at {at}, but this session's transaction has begun at {begun_at}; end it first, or use `savepoint` for a part of it"
    )]
    AlreadyBegun {
        /// Where the open transaction began.
        begun_at: Place,
        /// Where `begin` was called.
        at: Place,
    },

    /// `flush` or `commit` was called by a hook of a flush.
    #[error(
        "DS316 a flush of this session is under way, so it can be neither flushed nor committed at {at}. What a `before_flush` hook changes goes \
         with this flush, what an `after_flush` hook changes with the next one"
    )]
    AlreadyFlushing {
        /// Where it was called.
        at: Place,
    },

    /// The application id is taken.
    #[error("DS102 an application `{app}` is registered already; use `app(..)` to reach it, or `remove_app(..)` first")]
    AlreadyRegistered {
        /// The application.
        app: String,
    },

    /// The answer to `COMMIT` was lost: the server may have committed, or not. [`resolve`](Error::resolve) asks it.
    #[error(transparent)]
    CommitUnknown(Box<UnknownCommit>),

    /// No connection could be made.
    #[error("DS202 app `{app}` cannot connect to {server} (at {at}): {} {}", sentence(message), kind.advice(server))]
    Connect {
        /// The application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// What kind of failure it is.
        kind: ConnectErrorKind,
        /// What the driver or the server said, without the password.
        message: String,
        /// Where a connection was asked for.
        at: Place,
    },

    /// The connection was lost while a statement was under way.
    #[error(
        "DS308 app `{app}`: the connection was lost by the statement sent at {at}: {} {}",
        sentence(source),
        if *in_transaction {
            "The transaction it was in was not committed; call `rollback()` and run the whole of it again"
        } else {
            "It was outside of a transaction, so it may have been carried out; look before you send it again"
        }
    )]
    ConnectionLost {
        /// The application.
        app: String,
        /// Where the statement was sent.
        at: Place,
        /// Whether it was inside a transaction, which ended uncommitted with the connection, or was to begin one. A statement
        /// outside of a transaction may have been carried out.
        in_transaction: bool,
        /// What the driver said.
        source: diesel::result::Error,
    },

    /// The connection that all sessions of a test share has lost its transaction, so nothing of the test can be undone.
    #[error(
        "DS501 app `{app}`: this test cannot be rolled back: {}{} Its sessions get nothing more. \
         Use `TestIsolation::Database` for a test that does this",
        sentence(cause),
        match at { Some(at) => format!(" It happened at {at}."), None => String::new() }
    )]
    TestSpoiled {
        /// The application.
        app: String,
        /// What happened to the transaction.
        cause: String,
        /// Where it was seen.
        at: Option<Place>,
    },

    /// A test's database could not be made.
    #[error("DS502 test `{test}`: {what}: {}", sentence(reason))]
    TestSetup {
        /// The test.
        test: String,
        /// What was tried.
        what: &'static str,
        /// Why it could not be done, and what to do.
        reason: String,
    },

    /// A test, or a suite of them, has ended and left something behind.
    #[error("DS503 {who} left behind:{}", left.iter().map(|left| format!("\n- {left}")).collect::<String>())]
    TestLeftovers {
        /// The test, or the suite.
        who: String,
        /// Sessions, connections, transactions and databases, each with its place where that is known.
        left: Vec<String>,
    },

    /// A database was to be dropped that this crate has not made, and whose name was not given.
    #[error("DS504 {database} was not made by this crate, so it is not dropped unless it is named: {advice}")]
    NotOurs {
        /// The database.
        database: String,
        /// How it is named.
        advice: &'static str,
    },

    /// The server did not answer in time.
    #[error(
        "DS203 app `{app}`: {server} did not answer within {waited:.3?} (at {at}). \
         Check that it runs and is reachable, or raise `Config::connect_timeout`"
    )]
    ConnectTimeout {
        /// The application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// How long the caller waited.
        waited: Duration,
        /// Where a connection was asked for.
        at: Place,
    },

    /// The scope's deadline has passed.
    #[error("DS305 the scope's deadline of {limit:?} had passed at {at}; roll back, or give the scope more time")]
    DeadlineExceeded {
        /// The deadline given to the scope.
        limit: Duration,
        /// The statement that found it passed.
        at: Place,
    },

    /// The application was disposed of while the caller waited, or it has been removed.
    #[error(
        "DS204 app `{app}` was disposed of or removed meanwhile. Try again after `dispose`; after `remove_app` register it anew with `init_app`"
    )]
    Disposed {
        /// The application.
        app: String,
    },

    /// This process was forked from one that had pools in use. Their connections are the parent's and were not touched.
    #[error(
        "DS209 app `{app}`: this process was forked while its parent had connections. They are the parent's, and nothing was sent \
         on them; the threads that connect do not come along. Call `dispose_all()` in the parent before it forks, or make the new \
         process a program of its own (`exec`)"
    )]
    Forked {
        /// The application.
        app: String,
    },

    /// A hook panicked or refused.
    #[error("DS304 hook `{hook}` failed: {} {} was committed", sentence(message), if *committed { "The transaction" } else { "Nothing" })]
    HookFailed {
        /// Which kind of hook; `on_checkout` is one of the database object.
        hook: &'static str,
        /// Whether the transaction had been committed when the hook ran.
        committed: bool,
        /// The panic's message or the hook's error.
        message: String,
    },

    /// An outer operation of the session forbids this one.
    #[error(
        "DS105 `{operation}` at {at} inside the `{outer}` that began at {outer_at}: return `Ok` or `Err` from its closure instead"
    )]
    InsideTransaction {
        /// What was called.
        operation: &'static str,
        /// What it was called inside of.
        outer: &'static str,
        /// Where the outer one began.
        outer_at: Place,
        /// Where it was called.
        at: Place,
    },

    /// All connections that `Database::max_connections` allows are in use, and none became free in time.
    #[error(
        "DS208 app `{app}` got no connection in {waited:.3?} (at {at}): all {max_connections} of `Database::max_connections` are in use. \
         Held: {holders}. End the transactions listed, or raise the limit"
    )]
    BudgetExhausted {
        /// The application.
        app: String,
        /// How long the caller waited.
        waited: Duration,
        /// The limit.
        max_connections: usize,
        /// Who had the connections.
        holders: Holders,
        /// Where one was asked for.
        at: Place,
    },

    /// A configuration that cannot work.
    #[error("DS101 app `{app}`: {reason}")]
    InvalidConfig {
        /// The application.
        app: String,
        /// What is wrong and what is expected.
        reason: String,
    },

    /// The key of a row was written.
    #[error(
        "DS311 the key of {entity} {from} was changed to {to}, so the flush at {at} cannot tell which row is meant. Nothing was sent. \
         Write the old key back or `refresh` the handle; for another key add a new row and delete this one"
    )]
    KeyChanged {
        /// The entity.
        entity: &'static str,
        /// The key in the database.
        from: String,
        /// The key in memory.
        to: String,
        /// Where it was flushed.
        at: Place,
    },

    /// A schema operation, or a write to a SQLite file, could not get what another session has locked.
    #[error(
        "DS405 app `{app}`: {operation} waited {waited:.3?} for a lock that another session holds: {} {blockers}{left} \
             End that session's transaction and call it again",
        sentence(message)
    )]
    LockTimeout {
        /// The application.
        app: String,
        /// `create_all`, `drop_all`, or a write.
        operation: &'static str,
        /// How long it waited.
        waited: Duration,
        /// What the server said.
        message: String,
        /// Who was in the way, as far as that can be told.
        blockers: Blockers,
        /// What state it was left in.
        left: String,
    },

    /// A migration failed.
    #[error("DS402 {0}")]
    Migration(Box<MigrationFailure>),

    /// No application context on this thread.
    #[error(
        "DS103 no application context on this thread (at {at}). Enter one with `app.context(|| ..)`; \
         a new thread does not inherit its parent's: take `current_app()` along and enter it there"
    )]
    NoContext {
        /// Where a context was needed.
        at: Place,
    },

    /// The database object was made without migrations.
    #[error(
        "DS401 app `{app}`: there are no migrations for {backend}; give them to `Database::new` or `Database::per_backend`"
    )]
    NoMigrations {
        /// The application.
        app: String,
        /// The kind of database.
        backend: &'static str,
    },

    /// A handle of another session.
    #[error("DS110 the handle of {entity} {} given to a session at {at} is another session's; `get` it in this one", key.as_deref().unwrap_or("(no key yet)"))]
    NotMine {
        /// The entity.
        entity: &'static str,
        /// The row's key.
        key: Option<String>,
        /// Where it was given.
        at: Place,
    },

    /// `retry` was called where not everything it would have to repeat is in its closure.
    #[error(
        "DS109 `retry` at {at} could not repeat what came before its closure: {} at {since}. \
         Put all of the transaction into the closure of `retry`, and call it before the session is used",
        match inside { Some(outer) => format!("it is inside the `{outer}` that began"), None => "this session began, or was given rows to write,".into() }
    )]
    NotRepeatable {
        /// The closure that is open: of `transaction`, `savepoint` or another `retry`. None where the session has only begun, or has rows to flush.
        inside: Option<&'static str>,
        /// Where that closure was called, where the session began, or where the first change was made that is not flushed.
        since: Place,
        /// Where `retry` was called.
        at: Place,
    },

    /// The query found nothing.
    #[error("DS301 {} at {at}; add `.optional()` where that is an answer",
        match row { Some(row) => format!("there is no {row}, asked for"), None => "nothing found by the query".into() })]
    NotFound {
        /// Entity and key, where one row was asked for by its key.
        row: Option<String>,
        /// Where the query was sent.
        at: Place,
    },

    /// A query had several rows where at most one was asked for.
    #[error(
        "DS317 the query at {at} found more than one row, and exactly one was asked for. Make its filter narrower; `first` gives any one of the \
         rows, `load` all of them"
    )]
    TooManyRows {
        /// Where the query was sent.
        at: Place,
    },

    /// Rows that were inserted by one statement came back in another order, and their values do not tell in which.
    #[error(
        "DS313 new rows of {entity} that were flushed at {at} came back in another order and with other values than were sent, so the key of \
         each cannot be told. Call `rollback()`, and mark the entity `#[entity(row_by_row)]`, so that each row has an INSERT of its own"
    )]
    Unpaired {
        /// The entity.
        entity: &'static str,
        /// Where they were flushed.
        at: Place,
    },

    /// The database inserted fewer or more rows than were sent.
    #[error(
        "DS321 {sent} new rows of {entity} were sent by the flush at {at}, and the database gave {returned} back. A trigger, a rule or a \
         row-level policy of the table has kept rows out or added some (a BEFORE trigger that returns NULL does). Call `rollback()`. If this \
         is wanted, insert such rows with `execute(diesel::insert_into(..))`, which says how many rows were inserted"
    )]
    NotReturned {
        /// The entity.
        entity: &'static str,
        /// Rows of the INSERT.
        sent: usize,
        /// Rows that came back.
        returned: usize,
        /// Where they were flushed.
        at: Place,
    },

    /// A row is larger than a statement of the server may be.
    #[error(
        "DS323 {} of {entity} has {bytes} bytes, and a statement of the server has at most {limit} (`max_allowed_packet`); flushed at {at}. \
         Nothing of the row was sent, and sending it again does not help. Call `rollback()`, and store less in a row, or raise \
         `max_allowed_packet` on the server",
        match key { Some(key) => format!("the change of row {key}"), None => "a new row".into() }
    )]
    RowTooLarge {
        /// The entity.
        entity: &'static str,
        /// The key, unless the row is new.
        key: Option<String>,
        /// About how many bytes its values have.
        bytes: usize,
        /// The server's limit.
        limit: usize,
        /// Where it was flushed.
        at: Place,
    },

    /// A statement for one key met several rows.
    #[error(
        "DS322 {operation} of {entity} {key} at {at} met {rows} rows, so its key is not unique in the table. {} Name all columns of the key by \
         `#[diesel(primary_key(..))]`, and let the table have a unique index on them",
        if *operation == "SELECT" { "Nothing was changed." } else { "Call `rollback()`." }
    )]
    NotUnique {
        /// The entity.
        entity: &'static str,
        /// The key.
        key: String,
        /// `SELECT`, `UPDATE` or `DELETE`.
        operation: &'static str,
        /// How many rows it met.
        rows: usize,
        /// Where it was sent.
        at: Place,
    },

    /// New rows refer to rows that will never be inserted.
    #[error(
        "DS312 {rows} new rows of {entity} refer to rows that are not there: their `add` was rolled back or taken back, or belongs to \
         another session (flushed at {at}). Add those anew, and these with their `key()`"
    )]
    UnresolvedKeys {
        /// The entity of the new rows.
        entity: &'static str,
        /// How many they are.
        rows: usize,
        /// Where they were flushed.
        at: Place,
    },

    /// `drop_all` would not be able to finish.
    #[error(
        "DS403 app `{app}`: drop_all would stop half-way, so nothing was reverted. Unknown to this program: [{}]; \
         without a way back (no down.sql, or one without a statement): [{}]. Add what is missing (`SELECT 1;` in a down.sql where there \
         is nothing to undo), or drop the database itself",
        phrase(unknown.join(", ")), phrase(irreversible.join(", "))
    )]
    NotReversible {
        /// The application.
        app: String,
        /// Versions that are applied but not among the program's migrations.
        unknown: Vec<String>,
        /// Versions that cannot be reverted.
        irreversible: Vec<String>,
    },

    /// A schema operation needs one session of the server, and a pooler gives it several.
    #[error(
        "DS406 app `{app}`: {operation} needs one session of the server from its beginning to its end, and a pooler in transaction \
         mode, such as PgBouncer, gives it several. {detail} Call it with a URL that goes to the server itself, or to a pool in \
         session mode"
    )]
    PooledConnection {
        /// The application.
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        /// What needs it, and what was done.
        detail: String,
    },

    /// Of several databases used in one scope, some were committed and one failed.
    #[error(
        "DS306 {failed} was not committed although {} {}: {} Repair the difference by hand or by a compensating change",
        committed.join(" and "), if committed.len() == 1 { "was" } else { "were" }, sentence(source)
    )]
    PartialCommit {
        /// The databases that were committed, in order.
        committed: Vec<String>,
        /// The database whose commit failed; later ones were rolled back.
        failed: String,
        /// Why it failed.
        source: Box<Error>,
    },

    /// The database reported an error.
    #[error("DS302 {} (sent at {at})", phrase(source))]
    Query {
        /// What Diesel said.
        source: diesel::result::Error,
        /// Where the statement was sent.
        at: Place,
    },

    /// The transaction was aborted or ended by the database or behind the session's back.
    #[error(
        "DS307 the transaction cannot go on: {} (at {at}). This session commits nothing of it. Call `rollback()`, or return `Err` from the closure of `transaction`, `retry` or `savepoint` that you are in. Use `savepoint` around statements that may fail",
        phrase(cause)
    )]
    RollbackRequired {
        /// The first error, or what ended the transaction.
        cause: String,
        /// The statement, or the lending of the connection, in which it happened.
        at: Place,
    },

    /// `drop_all` on an application whose configuration protects its schema.
    #[error(
        "DS407 app `{app}`: drop_all at {at} would remove everything that its migrations have made in {database}, and its configuration \
         has `protect_schema(true)`. Nothing was changed. Call it on an application without that, such as a test's"
    )]
    SchemaProtected {
        /// The application.
        app: String,
        /// The server and the database, without credentials.
        database: String,
        /// Where `drop_all` was called.
        at: Place,
    },

    /// The session is in use further up the call stack.
    #[error(
        "DS106 the session is in use: the call at {at} came while the one at {held_at} was still running. Use the connection it was given, or end it first"
    )]
    SessionBusy {
        /// The operation that is still running.
        held_at: Place,
        /// The operation that was refused.
        at: Place,
    },

    /// The session's context has ended.
    #[error(
        "DS107 the session used at {at} belongs to a context of app `{app}` that has ended; ask for `session()` inside the present one"
    )]
    SessionEnded {
        /// The application.
        app: String,
        /// Where the session was used.
        at: Place,
    },

    /// A row was changed or deleted by somebody else since it was read. A trigger or a policy that keeps a statement from a row looks the same.
    #[error(
        "DS309 {entity} {key} has been changed or deleted since it was read, so its {operation} at {at} would act on an outdated row. \
         Call `rollback()`, or return `Err` from the closure of `transaction` or `savepoint`; then `get` it again and decide anew. \
         If nobody has changed it, a trigger or a row-level policy of the database has kept this statement from the row"
    )]
    Stale {
        /// The entity.
        entity: &'static str,
        /// The row's key.
        key: String,
        /// `update`, `delete`, or `read`: an attempt of `retry` used a value that it could not read again at that moment.
        operation: &'static str,
        /// Where it was flushed.
        at: Place,
    },

    /// `dispose` could not get every connection back.
    #[error("DS205 {0}")]
    StillInUse(Box<DisposeReport>),

    /// `create_all` or `drop_all` while this thread has a transaction open on the application.
    #[error(
        "DS404 {operation} on app `{app}` while this thread has a transaction open there: {holders}. \
         Commit it, roll it back or `remove()` the session first"
    )]
    TransactionOpen {
        /// The application.
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        /// The connections this thread holds.
        holders: Holders,
    },

    /// No application of this id.
    #[error(
        "DS108 no application `{app}` is registered with {database}, asked at {at} (registered: [{}]); call `init_app` of that \
         database object first",
        known.join(", ")
    )]
    UnknownApp {
        /// The id asked for.
        app: String,
        /// The database object: its type of connection, and where it is made in the program.
        database: String,
        /// Where it was asked for.
        at: Place,
        /// The ids there are.
        known: Vec<String>,
    },

    /// Waiting could never end: everything it would wait for is held by threads that wait themselves, for this one or for each
    /// other. The simplest case is a pool of one whose connection the calling thread holds. As long as one of the threads runs, a
    /// caller waits.
    #[error(
        "DS206 app `{app}`: the call at {at} would wait for ever, as {} {short}: {holders}. \
         {}",
        if holders.are_all_on_this_thread() { "this thread itself holds" } else { "threads that wait themselves hold" },
        short.advice(holders.are_all_on_this_thread())
    )]
    WouldDeadlock {
        /// The application.
        app: String,
        /// What is short.
        short: Shortage,
        /// Who holds them, each with where its thread waits.
        holders: Holders,
        /// Where one more was asked for.
        at: Place,
    },

    /// A row is being written while it is needed as a whole.
    #[error(
        "DS314 {entity} {} is being written by the guard of `write` at {held_at}, so it can be neither read nor flushed at {at}. \
         Let the guard end first: `handle.write().field = ..` does at its end",
        key.as_deref().unwrap_or("(no key yet)")
    )]
    WriteInProgress {
        /// The entity.
        entity: &'static str,
        /// The row's key.
        key: Option<String>,
        /// Where the guard was made.
        held_at: Place,
        /// Where the value was needed.
        at: Place,
    },

    /// A handle whose state does not allow the operation.
    #[error(
        "DS315 {entity} {} cannot be {operation} at {at}: {}",
        key.as_deref().unwrap_or("(no key yet)"), state.told(operation)
    )]
    WrongState {
        /// The entity.
        entity: &'static str,
        /// The row's key.
        key: Option<String>,
        /// The handle's state.
        state: State,
        /// `read`, `written`, ..
        operation: &'static str,
        /// Where that was asked for.
        at: Place,
    },
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Diesel's errors become [`Error::NotFound`] or [`Error::Query`], so that `?` works on both kinds of result inside one
/// closure.
impl From<diesel::result::Error> for Error {
    #[track_caller]
    fn from(source: diesel::result::Error) -> Self {
        Self::from_query(source, Location::caller())
    }
}
