//! The data and the texts of the errors. Each text tells what happened, where it happened, and what to do.

use std::sync::Arc;
use std::time::Duration;

use super::advice;
use super::{
    AppEnd, Blockers, ConnectErrorKind, DatabaseProblem, DisposeReport, Error, Holders, MigrationFailure, PoolOf,
    Resolver, RowState, Shortage, SourceLocation, Undo, Verdict, WaitLimit,
};
use crate::wording::{phrase, sentence};

/// A statement with which the connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LostStatement {
    /// It was inside a transaction or was to begin one. The transaction was not committed.
    InTransaction,
    /// It only read, outside of a transaction.
    Read,
    /// It was outside of a transaction and may have been carried out.
    Autocommitted,
}

/// The data of an [`Error`]. [`ErrorKind`](super::ErrorKind) explains the variants.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Details {
    #[error(
        "DS310 the query at {at} was not sent, because the flush before it failed.{}",
        undo.alone()
    )]
    Autoflush {
        /// The error of the flush.
        source: Error,
        at: SourceLocation,
        undo: Undo,
    },

    #[error(
        "DS201 app `{app}` got no connection in {waited:.3?} (at {at}): {}, and {} for one. {}{}",
        connections_in_use(*max_size, holders.len(), *connecting_for), others_wait(*waiting),
        held_by(holders),
        limit.advice(!holders.is_empty(), pool.more_or_time(connecting_for.is_some()))
    )]
    AcquireTimeout {
        app: String,
        waited: Duration,
        max_size: u32,
        /// The time for which a connect had been running, if the pool had room for one more connection. A pool opens
        /// one connection at a time.
        connecting_for: Option<Duration>,
        /// The number of other callers that were waiting.
        waiting: usize,
        holders: Holders,
        at: SourceLocation,
        limit: WaitLimit,
        pool: PoolOf,
    },

    #[error(
        "DS104 `begin` was called at {at}, but this session's transaction has begun at {begun_at}. Remove this \
         `begin`. For a part of the transaction use `savepoint`; for another transaction end this one first."
    )]
    AlreadyBegun { begun_at: SourceLocation, at: SourceLocation },

    #[error(
        "DS316 a flush of this session is under way, so it can be neither flushed nor committed at {at}. What a \
         `before_flush` hook changes is sent by this flush, what an `after_flush` hook changes by the next one."
    )]
    AlreadyFlushing { at: SourceLocation },

    #[error(
        "DS102 an application `{app}` is registered already; use `app(..)` to reach it, or `remove_app(..)` first."
    )]
    AlreadyRegistered { app: String },

    #[error(
        "DS303 app `{app}`: the connection was lost at COMMIT ({at}), so whether it was committed is not known. {}",
        resolver.advice()
    )]
    CommitUnknown {
        app: String,
        at: SourceLocation,
        /// The error of the driver.
        source: diesel::result::Error,
        resolver: Resolver,
        verdict: Arc<Verdict>,
    },

    #[error("DS202 app `{app}` cannot connect to {server} (at {at}): {}{}", sentence(message), kind.advice(server, message))]
    Connect {
        app: String,
        server: String,
        /// The kind of failure.
        kind: ConnectErrorKind,
        /// The message of the driver or the server, with the password redacted.
        message: String,
        at: SourceLocation,
    },

    #[error(
        "DS308 app `{app}`: the connection was lost by the statement sent at {at}. {}",
        match (lost, undo) {
            (LostStatement::InTransaction, Undo::NotNeeded | Undo::Unsaid | Undo::RolledBack) => "Its transaction was \
                not committed. Run all of it again.".to_owned(),
            (LostStatement::InTransaction, undo) => {
                format!("Its transaction was not committed. {}", undo.then("", "run all of it again"))
            }
            (LostStatement::Read, _) => "It only read, outside of a transaction. Send it again.".to_owned(),
            (LostStatement::Autocommitted, _) => {
                "It was outside of a transaction, so it may have been carried out. Look at the data before you send it \
                 again.".to_owned()
            }
        }
    )]
    ConnectionLost {
        app: String,
        at: SourceLocation,
        lost: LostStatement,
        /// The error of the driver.
        source: diesel::result::Error,
        undo: Undo,
    },

    #[error(
        "DS501 app `{app}`: this test cannot be rolled back: {}{} Its sessions get no connection any more. {}",
        sentence(cause),
        match at { Some(at) => format!(" It happened at {at}."), None => String::new() },
        if cause.starts_with(LOST) {
            "Find out what ended the connection, and run the test again."
        } else {
            "Use `TestIsolation::Database` for a test that does this."
        }
    )]
    TestInvalidated {
        app: String,
        /// The event that ended the transaction.
        cause: String,
        at: Option<SourceLocation>,
    },

    #[cfg_attr(not(feature = "testing"), expect(dead_code, reason = "only the test kit makes it"))]
    #[error("DS502 test `{test}`: {what}: {}", sentence(reason))]
    TestSetup {
        test: String,
        /// The step that failed.
        what: &'static str,
        /// The reason, and the advice.
        reason: String,
    },

    #[cfg_attr(not(feature = "testing"), expect(dead_code, reason = "only the test kit makes it"))]
    #[error("DS503 {who} left something behind. End it before the test ends; the next run removes databases that are \
        left:{}", left.iter().map(|left| format!("\n- {left}")).collect::<String>())]
    TestLeftovers {
        /// The test or the suite.
        who: String,
        /// The sessions, connections, transactions and databases, each with its source location if it is known.
        left: Vec<String>,
    },

    #[error("DS408 {database} {}", problem.description(detail))]
    DatabaseAdmin {
        database: String,
        problem: DatabaseProblem,
        /// The sessions that use the database, or the message of the server. It may be empty.
        detail: String,
    },

    #[error("DS504 {database} was not created by this crate, so it is dropped only if the caller names it: {advice}.")]
    UnmanagedDatabase {
        database: String,
        /// The way to name the database.
        advice: &'static str,
    },

    #[error(
        "DS203 app `{app}`: {server} did not answer within {waited:.3?} (at {at}).{} {}",
        match connecting {
            Some(age) => format!(" The connect that this call waited for had been under way for {age:.3?}."),
            None => String::new(),
        },
        limit.advice_on_connect(server, *is_pooled)
    )]
    ConnectTimeout {
        app: String,
        server: String,
        waited: Duration,
        /// The time for which the connect had been running, if this is longer than `waited` because an earlier caller
        /// had started it.
        connecting: Option<Duration>,
        at: SourceLocation,
        limit: WaitLimit,
        /// The configuration declares a pooler.
        is_pooled: bool,
    },

    #[error(
        "DS305 the scope's deadline of {limit:?} had passed at {at}, so the statement was not sent or was ended. \
         Nothing more is sent in this scope: let it end, and give it more time with `Scope::deadline` or less to do."
    )]
    DeadlineExceeded {
        /// The deadline of the scope.
        limit: Duration,
        at: SourceLocation,
    },

    #[error("DS204 app `{app}` {}", how.description())]
    Disposed {
        app: String,
        /// The reason why the application gives no connection.
        how: AppEnd,
    },

    #[error(
        "DS209 app `{app}`: this process was forked while its parent had connections. These belong to the \
         parent, and nothing was sent on them; the threads that connect are not copied. Call `dispose_all()` in the parent \
         before it forks, or make the new process a program of its own (`exec`)."
    )]
    Forked { app: String },

    #[error(
        "DS304 hook `{hook}` failed: {} {}",
        sentence(message),
        match (*committed, *hook) {
            (true, _) => "The transaction was committed.",
            (false, "after_rollback" | "after_rollback_of_changes") => "The transaction was rolled back.",
            (false, "on_checkout") => "No connection was given out.",
            (false, _) => "The transaction was not committed.",
        }
    )]
    HookFailed {
        /// The kind of hook. `on_checkout` is a hook of the database object.
        hook: &'static str,
        /// Whether the transaction was committed before the hook ran.
        committed: bool,
        /// The message of the panic, or the error of the hook.
        message: String,
    },

    #[error(
        "DS105 `{operation}` was called at {at} inside the `{outer}` that began at {outer_at}. {}",
        match (*operation, *outer) {
            ("commit", "savepoint") => "Return `Ok` from its closure to keep what it did, and commit the outer transaction \
                instead.",
            ("commit", _) => "Return `Ok` from its closure instead; the outermost `transaction` or `retry` commits.",
            ("rollback", "savepoint") => "Return `Err` from its closure, which undoes what it did; afterwards roll \
                back the outer transaction.",
            ("rollback", _) => "Return `Err` from its closure instead, which rolls back.",
            _ => "Let its closure return first.",
        }
    )]
    InsideTransaction {
        /// The operation that was called.
        operation: &'static str,
        /// The operation around it.
        outer: &'static str,
        outer_at: SourceLocation,
        at: SourceLocation,
    },

    #[error(
        "DS208 app `{app}` got no connection in {waited:.3?} (at {at}): {} that `Database::max_connections` allows \
         {}{}",
        match max_connections { 1 => "the one connection".to_owned(), many => format!("all {many} connections") },
        if *max_connections == 1 { "is in use. " } else { "are in use. " }.to_owned() + &held_by(holders),
        limit.advice(!holders.is_empty(), "raise `Database::max_connections`")
    )]
    ConnectionLimitReached {
        app: String,
        waited: Duration,
        max_connections: usize,
        holders: Holders,
        at: SourceLocation,
        limit: WaitLimit,
    },

    #[error("DS101 {}{}", if app == NO_APP { String::new() } else { format!("app `{app}`: ") }, sentence(reason))]
    InvalidConfig {
        app: String,
        /// The mistake, and the expected value.
        reason: String,
    },

    #[error(
        "DS311 the key of {entity} {from} was changed to {to}, so the flush at {at} cannot tell which row is meant. \
         Nothing was sent. Write the old key back, or `expire` the handle, which forgets what was written to the row. \
         For another key add a new row and delete this one."
    )]
    KeyChanged { entity: &'static str, from: String, to: String, at: SourceLocation },

    #[error(
        "DS405 app `{app}`: {operation} (at {at}) waited {waited:.3?} for a lock that another session holds: {} \
         {blockers}{left} {}",
        sentence(message),
        match *operation {
            "create_all" | "drop_all" => {
                format!("End that session's transaction, or wait until it has ended, and call {operation} again.")
            }
            _ => "End that session's transaction, or raise `Config::lock_timeout`, and run this transaction again.".to_owned(),
        }
    )]
    LockTimeout {
        app: String,
        /// `create_all`, `drop_all`, or the operation of a session on SQLite: `a write`, `a read`, `a statement` (of
        /// raw SQL) or `a commit`.
        operation: &'static str,
        waited: Duration,
        /// The message of the database.
        message: String,
        /// The sessions that block the lock, as far as they are known.
        blockers: Blockers,
        /// The state after the failure, as a sentence.
        left: String,
        at: SourceLocation,
    },

    #[error("DS402 {0}.")]
    Migration(MigrationFailure),

    #[error(
        "DS103 no application context on this thread (at {at}). Enter one with `app.context(|| ..)`; \
         a new thread does not inherit the context of its parent: give it `current_app()`, and enter a context of that."
    )]
    NoContext { at: SourceLocation },

    #[error(
        "DS401 app `{app}`: there are no migrations for {backend}; give them to `Database::new` or \
         `Database::per_backend`."
    )]
    NoMigrations { app: String, backend: &'static str },

    #[error(
        "DS110 the handle of {entity} {} given to a session at {at} belongs to another session. {}",
        key.as_deref().unwrap_or("(no key yet)"),
        match key {
            Some(_) => "`get` the row of that key in this session.",
            None => "The row has not been inserted yet: commit it in its own session, and then `get` it in this one.",
        }
    )]
    ForeignHandle { entity: &'static str, key: Option<String>, at: SourceLocation },

    #[error(
        "DS109 `retry` at {at} cannot repeat the work before its closure: {}",
        match inside {
            Some("retry") => format!("it is inside the `retry` that began at {since}. Remove the inner `retry`: the \
                outer one repeats all of it."),
            Some(outer) => format!("it is inside the `{outer}` that began at {since}. Call `retry` instead of that, \
                with all of the transaction in its closure."),
            None => format!(
                "this session began, or was given rows to write, at {since}. Call `commit()` or `rollback()` before \
                 `retry`, or put that into its closure."
            ),
        }
    )]
    NotRepeatable {
        /// The open closure: of `transaction`, `savepoint` or another `retry`. `None` if the session has only begun or
        /// has unflushed rows.
        inside: Option<&'static str>,
        since: SourceLocation,
        at: SourceLocation,
    },

    #[error("DS301 {} at {at}. If the program expects this, add `.optional()`.",
        match row { Some(row) => format!("there is no {row}, asked for"), None => "nothing found by the query".into() })]
    NotFound {
        /// The entity and the key, if the query was for a row by its key.
        row: Option<String>,
        at: SourceLocation,
    },

    #[error(
        "DS317 the query at {at} found more than one row, and exactly one was asked for. Make its filter narrower; \
         `first` gives any one of the rows, `load` all of them."
    )]
    TooManyRows { at: SourceLocation },

    #[error(
        "DS313 new rows of {entity} that were flushed at {at} were returned in another order and with other values than \
         were sent, so their generated keys are ambiguous.{} Mark the entity `#[entity(row_by_row)]`, so that each row has \
         an INSERT of its own.",
        undo.alone()
    )]
    UnmatchedRows { entity: &'static str, at: SourceLocation, undo: Undo },

    #[error(
        "DS321 {} of {entity} {} sent by the flush at {at}, and the database returned {returned}. A trigger of the \
         table (such as a BEFORE trigger that returns NULL), or on PostgreSQL a rule or a row-level policy, has kept \
         rows out or added some.{} If this is wanted, insert such rows with `execute(diesel::insert_into(..))`, which \
         says how many rows were inserted.",
        count(*sent, "new row"), if *sent == 1 { "was" } else { "were" },
        undo.alone()
    )]
    NotReturned {
        entity: &'static str,
        /// The number of rows in the INSERT.
        sent: usize,
        /// The number of rows that the database returned.
        returned: usize,
        at: SourceLocation,
        undo: Undo,
    },

    #[error(
        "DS323 {} of {entity} has {bytes} bytes, and a statement of the server has at most {limit} \
         (`max_allowed_packet`); flushed at {at}. Nothing of the row was sent, and sending it again does not help.{} \
         Store less in a row, or raise `max_allowed_packet` on the server.",
        match key { Some(key) => format!("the change of row {key}"), None => "a new row".into() },
        undo.alone()
    )]
    RowTooLarge {
        entity: &'static str,
        key: Option<String>,
        /// The approximate size of the values in bytes.
        bytes: usize,
        /// The limit of the server in bytes.
        limit: usize,
        at: SourceLocation,
        undo: Undo,
    },

    #[error(
        "DS322 {operation} of {entity} {key} at {at} matched {rows} rows, so its key is not unique in the table.{} Name \
         all columns of the key by `#[diesel(primary_key(..))]`, and let the table have a unique index on them.",
        match undo {
            Undo::NotNeeded | Undo::RolledBack if *operation == "SELECT" => " Nothing was changed.".to_owned(),
            undo => undo.alone(),
        }
    )]
    NotUnique {
        entity: &'static str,
        key: String,
        /// `SELECT`, `UPDATE` or `DELETE`.
        operation: &'static str,
        /// The number of rows that the statement matched.
        rows: usize,
        at: SourceLocation,
        undo: Undo,
    },

    #[error(
        "DS312 {} of {entity} {} to rows that do not exist: their `add` was rolled back or undone, or they belong to \
         another session (flushed at {at}).{}",
        count(*rows, "new row"), if *rows == 1 { "refers" } else { "refer" },
        undo.then(" ", "add those rows anew, and then these with the `key()` of the new handles")
    )]
    UnresolvedKeys {
        /// The entity of the new rows.
        entity: &'static str,
        /// The number of these rows.
        rows: usize,
        at: SourceLocation,
        undo: Undo,
    },

    #[error(
        "DS403 app `{app}`: drop_all would stop half-way, so nothing was reverted.{}{} Or drop the database itself.",
        match unknown.is_empty() {
            true => String::new(),
            false => format!(
                " Applied, but not among the migrations of this program: {}. Run drop_all from a program that has \
                 these migrations.",
                phrase(unknown.join(", "))
            ),
        },
        match irreversible.is_empty() {
            true => String::new(),
            false => format!(
                " Without a down.sql, or with one that has no statement: {}. Write it, with `SELECT 1;` if there is \
                 nothing to undo.",
                phrase(irreversible.join(", "))
            ),
        }
    )]
    NotReversible {
        app: String,
        /// The versions that are applied but are not among the program's migrations.
        unknown: Vec<String>,
        irreversible: Vec<String>,
    },

    #[error(
        "DS406 app `{app}`: {operation} needs one session of the server from its beginning to its end, and a pooler in \
         transaction mode, such as PgBouncer, gives it several. {detail} Set `Config::schema_url` to a URL that goes to the \
         server itself, or to a pool in session mode."
    )]
    PoolerInTransactionMode {
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        /// The step that needs one session, and the state of the database, as sentences.
        detail: String,
    },

    #[error(
        "DS306 {} although {} {}. {} by hand or by a compensating change.",
        if source.is_commit_unknown() {
            format!("it is not known whether {failed} was committed,")
        } else {
            format!("{failed} was not committed")
        },
        committed.join(" and "), if committed.len() == 1 { "was" } else { "were" },
        if source.is_commit_unknown() { "If it was not, repair the difference" } else { "Repair the difference" }
    )]
    PartialCommit {
        /// The databases that were committed, in order.
        committed: Vec<String>,
        /// The database whose commit failed. Later databases were rolled back.
        failed: String,
        /// The error of the commit.
        source: Error,
    },

    #[error("DS302 the statement sent at {at} failed.{}", match advice::advice_of(source) {
        Some(advice) => format!(" {}", sentence(advice)),
        None => String::new(),
    })]
    Query {
        /// The error of Diesel.
        source: diesel::result::Error,
        at: SourceLocation,
    },

    #[error(
        "DS307 the transaction cannot go on: {} (at {at}). This session commits nothing of it. In a closure of \
         `transaction`, `savepoint` or `retry`, or in a hook, return `Err`; elsewhere call `rollback()`. A statement \
         that may fail belongs in a `savepoint`.",
        phrase(cause)
    )]
    RollbackRequired {
        /// The first error, or the event that ended the transaction.
        cause: String,
        at: SourceLocation,
    },

    #[error(
        "DS407 app `{app}`: drop_all at {at} would remove everything that its migrations have made in {database}, and \
         its configuration has `protect_schema(true)`. Nothing was changed. Call it on an application without that, \
         such as a test's."
    )]
    SchemaProtected {
        app: String,
        /// The server and the database, without credentials.
        database: String,
        at: SourceLocation,
    },

    #[error(
        "DS106 the session is in use: the call at {at} was made while the one at {held_at} still has the connection. \
         In a closure of `with` use the connection that the closure was given; drop the guard of `connection()` first."
    )]
    SessionBusy { held_at: SourceLocation, at: SourceLocation },

    #[error(
        "DS107 the session used at {at} belongs to a context of app `{app}` that has ended. Call `Database::session` \
         in a context that is open."
    )]
    SessionEnded { app: String, at: SourceLocation },

    #[error(
        "DS309 {entity} {key} has been changed or deleted since it was read, so its {operation} at {at} would act on \
         an outdated row. If the row is unchanged, a trigger or a row-level policy of the database has kept this \
         statement from the row.{}",
        undo.then(" ", "`get` it again and decide anew")
    )]
    Stale {
        entity: &'static str,
        key: String,
        /// `update`, `delete` or `read`. `read` means that an attempt of `retry` used a value that it could not read
        /// again at that moment.
        operation: &'static str,
        at: SourceLocation,
        undo: Undo,
    },

    #[error("DS205 not every connection was checked in in time: {0}.")]
    StillInUse(DisposeReport),

    #[error(
        "DS404 {operation} on app `{app}` was called while this thread has a connection of it: {holders}. End its \
         use first: call `commit()`, `rollback()` or `remove()` of its session, or let the closure of its `transaction` \
         return."
    )]
    TransactionOpen {
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        holders: Holders,
    },

    #[error(
        "DS108 no application `{app}` is registered with {database}, asked at {at} ({}). Call `init_app` of that \
         database object first{}.",
        match known.is_empty() { true => "none is".to_owned(), false => format!("registered: {}", known.join(", ")) },
        if known.is_empty() { "" } else { ", or correct the name" }
    )]
    UnknownApp {
        app: String,
        /// The database object: the type of its connections, and its source location.
        database: String,
        at: SourceLocation,
        /// The ids of the registered applications.
        known: Vec<String>,
    },

    #[error(
        "DS206 app `{app}`: the call at {at} would never end, because {} {short}{}. {}.",
        if holders.are_all_the_caller() { "this thread itself holds" } else { "threads that wait themselves hold" },
        if holders.is_empty() { String::new() } else { format!(": {holders}") },
        short.advice(holders, *pool)
    )]
    WouldDeadlock {
        app: String,
        /// The resource for which the caller would wait.
        short: Shortage,
        /// The holders, each with the source location at which its thread waits.
        holders: Holders,
        at: SourceLocation,
        pool: PoolOf,
    },

    #[error(
        "DS314 {entity} {} is being written by the guard of `write` at {held_at}, so it can be neither read nor \
         flushed at {at}. Let the guard end first; in `handle.write().field = value;` it ends with the statement.",
        key.as_deref().unwrap_or("(no key yet)")
    )]
    WriteInProgress { entity: &'static str, key: Option<String>, held_at: SourceLocation, at: SourceLocation },

    #[error(
        "DS315 {entity} {} cannot be {operation} at {at}: {}.",
        key.as_deref().unwrap_or("(no key yet)"), state.refusal(operation)
    )]
    WrongState {
        entity: &'static str,
        key: Option<String>,
        /// The state of the handle.
        state: RowState,
        /// The refused operation as a participle, such as `read` or `written`.
        operation: &'static str,
        at: SourceLocation,
    },
}

/// The operation of [`Details::LockTimeout`] for a write to a SQLite file.
pub(crate) const A_WRITE: &str = "a write";

/// The operation of [`Details::LockTimeout`] for a read of a SQLite file.
pub(crate) const A_READ: &str = "a read";

/// The cause of [`Details::TestInvalidated`] if the connection of the test was lost.
pub(crate) const LOST: &str = "its connection was lost";

/// Replaces the id of the application in the error of a configuration that belongs to none.
pub(crate) const NO_APP: &str = "-";

/// A number with its noun, in the singular or the plural.
pub(crate) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// The connections of a pool without a free connection.
fn connections_in_use(max_size: u32, in_use: usize, connecting_for: Option<Duration>) -> String {
    match connecting_for {
        None => format!("{} in use", all(max_size, "connection")),
        Some(time) => {
            let (connections, are) = (count(in_use, "connection"), if in_use == 1 { "is" } else { "are" });
            format!("{connections} of at most {max_size} {are} in use, one more has been connecting for {time:.3?}")
        }
    }
}

fn all(number: u32, thing: &str) -> String {
    if number == 1 { format!("its one {thing} is") } else { format!("all its {number} {thing}s are") }
}

fn others_wait(waiting: usize) -> String {
    match waiting {
        0 => "no other caller waits".into(),
        1 => "1 other caller waits".into(),
        many => format!("{many} other callers wait"),
    }
}

/// The holders as a sentence with a space after it, or nothing if the list is empty.
fn held_by(holders: &Holders) -> String {
    if holders.is_empty() { String::new() } else { format!("Held: {holders}. ") }
}
