//! The errors of this crate, in one enum. Each text tells what happened, where it happened, and what to do.

pub(crate) mod advice;
mod app_end;
mod blocker;
mod connect_error_kind;
mod dispose_report;
mod holder;
mod migration_failure;
mod optional_ext;
mod predicates;
mod row_state;
mod shortage;
#[cfg(test)]
mod tests;
mod undo;
mod unknown_commit;

use std::panic::Location;
use std::time::Duration;

pub use app_end::AppEnd;
pub use blocker::{Blocker, Blockers};
pub use connect_error_kind::ConnectErrorKind;
pub(crate) use connect_error_kind::{CONFIG_ON_CONNECT, DATABASE_ON_CONNECT};
pub use dispose_report::DisposeReport;
pub use holder::{Holder, Holders};
pub use migration_failure::{MigrationFailure, MigrationOutcome};
pub use optional_ext::OptionalExt;
pub use row_state::RowState;
pub use shortage::{PoolOf, Shortage, WaitLimit};
pub use undo::Undo;
pub use unknown_commit::{CommitOutcome, UnknownCommit};
pub(crate) use unknown_commit::{Decision, Resolver, Verdict};

use crate::wording::{phrase, sentence};

/// A location in the source of the program, as `#[track_caller]` reports it.
pub type Place = &'static Location<'static>;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of this crate's operations.
///
/// The text of each variant starts with a stable code ([`Error::code`]). It names the application and the source
/// location if they are known, and tells what to do unless only the database can tell that. `Debug` shows the same
/// text, so `unwrap` and a `main` that returns a `Result` print it. The password in the URL is redacted.
///
#[doc = include_str!("reference.md")]
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The flush before a query failed.
    #[error(
        "DS310 the query at {at} was not sent, because the flush before it failed: {}{}",
        sentence(source),
        undo.alone()
    )]
    Autoflush {
        /// The error of the flush.
        source: Box<Error>,
        /// The source location of the query.
        at: Place,
        /// The action of the program that undoes the transaction, if the text of `source` does not contain it.
        undo: Undo,
    },

    /// All connections of the pool were in use, and none was checked in in time.
    #[error(
        "DS201 app `{app}` got no connection in {waited:.3?} (at {at}): {}, and {} for one. {}{}",
        connections_in_use(*max_size, holders.len(), *connecting_for), others_wait(*waiting),
        held_by(holders),
        limit.advice(!holders.is_empty(), pool.more_or_time(connecting_for.is_some()))
    )]
    AcquireTimeout {
        /// The id of the application.
        app: String,
        /// The time for which the caller waited.
        waited: Duration,
        /// The maximum number of connections of the pool.
        max_size: u32,
        /// The time for which a connect had been running, if the pool had room for one more connection. A pool opens
        /// one connection at a time.
        connecting_for: Option<Duration>,
        /// The number of other callers that were waiting.
        waiting: usize,
        /// The holders of the connections.
        holders: Holders,
        /// The source location of the checkout.
        at: Place,
        /// The limit that ended the wait.
        limit: WaitLimit,
        /// The kind of pool.
        pool: PoolOf,
    },

    /// `begin` was called although the session has already begun.
    #[error(
        "DS104 `begin` was called at {at}, but this session's transaction has begun at {begun_at}. Leave this `begin` \
         out; for a part of the transaction use `savepoint`, and for another transaction end this one first."
    )]
    AlreadyBegun {
        /// The source location at which the open transaction began.
        begun_at: Place,
        /// The source location of the `begin`.
        at: Place,
    },

    /// A hook of a flush called `flush` or `commit`.
    #[error(
        "DS316 a flush of this session is under way, so it can be neither flushed nor committed at {at}. What a \
         `before_flush` hook changes goes with this flush, what an `after_flush` hook changes with the next one."
    )]
    AlreadyFlushing {
        /// The source location of the call.
        at: Place,
    },

    /// The application id is taken.
    #[error(
        "DS102 an application `{app}` is registered already; use `app(..)` to reach it, or `remove_app(..)` first."
    )]
    AlreadyRegistered {
        /// The id of the application.
        app: String,
    },

    /// The answer to `COMMIT` was lost, so the outcome of the commit is unknown. [`resolve`](Error::resolve) asks the
    /// server.
    #[error(transparent)]
    CommitUnknown(Box<UnknownCommit>),

    /// A connect failed.
    #[error("DS202 app `{app}` cannot connect to {server} (at {at}): {}{}", sentence(message), kind.advice(server, message))]
    Connect {
        /// The id of the application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// The kind of failure.
        kind: ConnectErrorKind,
        /// The message of the driver or the server, with the password redacted.
        message: String,
        /// The source location of the checkout.
        at: Place,
    },

    /// The connection was lost during a statement.
    #[error(
        "DS308 app `{app}`: the connection was lost by the statement sent at {at}: {} {}",
        sentence(source),
        match (*in_transaction, undo) {
            (true, Undo::NotNeeded | Undo::Unsaid | Undo::RolledBack) => "Its transaction was not committed. Run all \
                of it again.".to_owned(),
            (true, undo) => format!("Its transaction was not committed. {}", undo.then("", "run all of it again")),
            (false, _) => {
                "It was outside of a transaction, so it may have been carried out. Look at the data before you send it \
                 again.".to_owned()
            }
        }
    )]
    ConnectionLost {
        /// The id of the application.
        app: String,
        /// The source location of the statement.
        at: Place,
        /// Whether the statement was inside a transaction or was to begin one. Such a transaction was not committed. A
        /// statement outside a transaction may have been carried out.
        in_transaction: bool,
        /// The error of the driver.
        source: diesel::result::Error,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// The connection that all sessions of a test share has lost its transaction, so nothing in the test can be rolled
    /// back.
    #[error(
        "DS501 app `{app}`: this test cannot be rolled back: {}{} Its sessions get nothing more. {}",
        sentence(cause),
        match at { Some(at) => format!(" It happened at {at}."), None => String::new() },
        if cause.starts_with(LOST) {
            "Find out what ended the connection, and run the test again."
        } else {
            "Use `TestIsolation::Database` for a test that does this."
        }
    )]
    TestSpoiled {
        /// The id of the application.
        app: String,
        /// The event that ended the transaction.
        cause: String,
        /// The source location at which this was detected.
        at: Option<Place>,
    },

    /// A test's database could not be created.
    #[error("DS502 test `{test}`: {what}: {}", sentence(reason))]
    TestSetup {
        /// The test.
        test: String,
        /// The step that failed.
        what: &'static str,
        /// The reason, and the advice.
        reason: String,
    },

    /// A test or a suite of tests has ended and left something behind.
    #[error("DS503 {who} left something behind. End it before the test ends; the next run removes databases that are \
        left:{}", left.iter().map(|left| format!("\n- {left}")).collect::<String>())]
    TestLeftovers {
        /// The test or the suite.
        who: String,
        /// The sessions, connections, transactions and databases, each with its source location if it is known.
        left: Vec<String>,
    },

    /// A database that this crate has not created was to be dropped, and its name was not given.
    #[error("DS504 {database} was not made by this crate, so it is not dropped unless it is named: {advice}.")]
    NotOurs {
        /// The database.
        database: String,
        /// The way to name the database.
        advice: &'static str,
    },

    /// The server did not answer in time.
    #[error(
        "DS203 app `{app}`: {server} did not answer within {waited:.3?} (at {at}).{} {}",
        match connecting {
            Some(age) => format!(" The connect that this call waited for had been under way for {age:.3?}."),
            None => String::new(),
        },
        limit.advice_on_connect(server)
    )]
    ConnectTimeout {
        /// The id of the application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// The time for which the caller waited.
        waited: Duration,
        /// The time for which the connect had been running, if this is longer than `waited` because an earlier caller
        /// had started it.
        connecting: Option<Duration>,
        /// The source location of the checkout.
        at: Place,
        /// The limit that ended the wait.
        limit: WaitLimit,
    },

    /// The scope's deadline has passed.
    #[error(
        "DS305 the scope's deadline of {limit:?} had passed at {at}, so the statement was not sent or was ended. \
         Nothing more is sent in this scope: let it end, and give it more time with `Scope::deadline` or less to do."
    )]
    DeadlineExceeded {
        /// The deadline of the scope.
        limit: Duration,
        /// The source location of the statement that was to be sent after the deadline.
        at: Place,
    },

    /// The application was disposed of while the caller waited, or was removed.
    #[error("DS204 app `{app}` {}", how.description())]
    Disposed {
        /// The id of the application.
        app: String,
        /// The reason why the application gives no connection.
        how: AppEnd,
    },

    /// This process was forked from a process that had pools in use. Their connections belong to the parent and were
    /// not used.
    #[error(
        "DS209 app `{app}`: this process was forked while its parent had connections. They are the parent's, and \
         nothing was sent on them; the threads that connect do not come along. Call `dispose_all()` in the parent \
         before it forks, or make the new process a program of its own (`exec`)."
    )]
    Forked {
        /// The id of the application.
        app: String,
    },

    /// A hook panicked or returned an error.
    #[error(
        "DS304 hook `{hook}` failed: {} {}",
        sentence(message),
        match (*committed, *hook) {
            (true, _) => "The transaction was committed.",
            (false, "after_rollback") => "The transaction was rolled back.",
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

    /// An outer operation of the session does not allow this operation.
    #[error(
        "DS105 `{operation}` was called at {at} inside the `{outer}` that began at {outer_at}. {}",
        match (*operation, *outer) {
            ("commit", "savepoint") => "Return `Ok` from its closure to keep what it did, and commit what is around \
                it.",
            ("commit", _) => "Return `Ok` from its closure instead; the outermost `transaction` or `retry` commits.",
            ("rollback", "savepoint") => "Return `Err` from its closure, which undoes what it did; roll back what is \
                around it afterwards.",
            ("rollback", _) => "Return `Err` from its closure instead, which rolls back.",
            _ => "Let its closure return first.",
        }
    )]
    InsideTransaction {
        /// The operation that was called.
        operation: &'static str,
        /// The operation around it.
        outer: &'static str,
        /// The source location of the outer operation.
        outer_at: Place,
        /// The source location of the call.
        at: Place,
    },

    /// All connections that `Database::max_connections` allows were in use, and none was closed or checked in in time.
    #[error(
        "DS208 app `{app}` got no connection in {waited:.3?} (at {at}): {} that `Database::max_connections` allows \
         {}{}",
        match max_connections { 1 => "the one connection".to_owned(), many => format!("all {many} connections") },
        if *max_connections == 1 { "is in use. " } else { "are in use. " }.to_owned() + &held_by(holders),
        limit.advice(!holders.is_empty(), "raise `Database::max_connections`")
    )]
    BudgetExhausted {
        /// The id of the application.
        app: String,
        /// The time for which the caller waited.
        waited: Duration,
        /// The limit.
        max_connections: usize,
        /// The holders of the connections.
        holders: Holders,
        /// The source location of the checkout.
        at: Place,
        /// The limit that ended the wait.
        limit: WaitLimit,
    },

    /// A configuration is invalid.
    #[error("DS101 {}{}", if app == NO_APP { String::new() } else { format!("app `{app}`: ") }, sentence(reason))]
    InvalidConfig {
        /// The id of the application.
        app: String,
        /// The mistake, and the expected value.
        reason: String,
    },

    /// The key of a row was changed.
    #[error(
        "DS311 the key of {entity} {from} was changed to {to}, so the flush at {at} cannot tell which row is meant. \
         Nothing was sent. Write the old key back, or `expire` the handle, which forgets what was written to the row. \
         For another key add a new row and delete this one."
    )]
    KeyChanged {
        /// The entity.
        entity: &'static str,
        /// The key in the database.
        from: String,
        /// The key in memory.
        to: String,
        /// The source location of the flush.
        at: Place,
    },

    /// A schema operation, or a statement or a commit of a session on SQLite, waited too long for a lock of another
    /// session. Nothing is known about a session of another process. Code that uses the connection
    /// ([`Session::with`](crate::Session::with)) gets the error of the driver instead, as [`Query`](Self::Query).
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
        /// The id of the application.
        app: String,
        /// `create_all`, `drop_all`, or the operation of a session on SQLite: `a write`, `a read`, `a statement` (of
        /// raw SQL) or `a commit`.
        operation: &'static str,
        /// The time for which the operation waited.
        waited: Duration,
        /// The message of the database.
        message: String,
        /// The sessions that block the lock, as far as they are known.
        blockers: Blockers,
        /// The state after the failure, as a sentence.
        left: String,
        /// The source location of the operation.
        at: Place,
    },

    /// A migration failed.
    #[error("DS402 {0}.")]
    Migration(Box<MigrationFailure>),

    /// The thread is in no application context.
    #[error(
        "DS103 no application context on this thread (at {at}). Enter one with `app.context(|| ..)`; \
         a new thread does not inherit its parent's: take `current_app()` along and enter it there."
    )]
    NoContext {
        /// The source location of the operation that needs a context.
        at: Place,
    },

    /// The database object was created without migrations.
    #[error(
        "DS401 app `{app}`: there are no migrations for {backend}; give them to `Database::new` or \
         `Database::per_backend`."
    )]
    NoMigrations {
        /// The id of the application.
        app: String,
        /// The kind of database.
        backend: &'static str,
    },

    /// The handle belongs to another session.
    #[error(
        "DS110 the handle of {entity} {} given to a session at {at} is another session's. {}",
        key.as_deref().unwrap_or("(no key yet)"),
        match key {
            Some(_) => "`get` the row of that key in this session.",
            None => "The row has not been inserted yet: commit it in its own session, and then `get` it in this one.",
        }
    )]
    NotMine {
        /// The entity.
        entity: &'static str,
        /// The key of the row.
        key: Option<String>,
        /// The source location of the call to which the handle was given.
        at: Place,
    },

    /// The closure of a `retry` does not contain everything that the `retry` would have to repeat.
    #[error(
        "DS109 `retry` at {at} could not repeat what came before its closure: {}",
        match inside {
            Some("retry") => format!("it is inside the `retry` that began at {since}. Leave the inner `retry` out: the \
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
        /// The source location of the open closure's call, of the session's begin, or of the first unflushed change.
        since: Place,
        /// The source location of the `retry`.
        at: Place,
    },

    /// The query found nothing.
    #[error("DS301 {} at {at}. If that is to be expected, add `.optional()`.",
        match row { Some(row) => format!("there is no {row}, asked for"), None => "nothing found by the query".into() })]
    NotFound {
        /// The entity and the key, if the query was for a row by its key.
        row: Option<String>,
        /// The source location of the query.
        at: Place,
    },

    /// A query for at most one row found several rows.
    #[error(
        "DS317 the query at {at} found more than one row, and exactly one was asked for. Make its filter narrower; \
         `first` gives any one of the rows, `load` all of them."
    )]
    TooManyRows {
        /// The source location of the query.
        at: Place,
    },

    /// The rows that one statement inserted could not be matched to the inserted values, so their generated keys are
    /// ambiguous.
    #[error(
        "DS313 new rows of {entity} that were flushed at {at} came back in another order and with other values than \
         were sent, so the key of each cannot be told.{} Mark the entity `#[entity(row_by_row)]`, so that each row has \
         an INSERT of its own.",
        undo.alone()
    )]
    Unpaired {
        /// The entity.
        entity: &'static str,
        /// The source location of the flush.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// The database returned fewer or more rows than were inserted.
    #[error(
        "DS321 {} of {entity} {} sent by the flush at {at}, and the database gave {returned} back. A trigger of the \
         table (such as a BEFORE trigger that returns NULL), or on PostgreSQL a rule or a row-level policy, has kept \
         rows out or added some.{} If this is wanted, insert such rows with `execute(diesel::insert_into(..))`, which \
         says how many rows were inserted.",
        count(*sent, "new row"), if *sent == 1 { "was" } else { "were" },
        undo.alone()
    )]
    NotReturned {
        /// The entity.
        entity: &'static str,
        /// The number of rows in the INSERT.
        sent: usize,
        /// The number of rows that the database returned.
        returned: usize,
        /// The source location of the flush.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// A row is larger than the server allows for a statement.
    #[error(
        "DS323 {} of {entity} has {bytes} bytes, and a statement of the server has at most {limit} \
         (`max_allowed_packet`); flushed at {at}. Nothing of the row was sent, and sending it again does not help.{} \
         Store less in a row, or raise `max_allowed_packet` on the server.",
        match key { Some(key) => format!("the change of row {key}"), None => "a new row".into() },
        undo.alone()
    )]
    RowTooLarge {
        /// The entity.
        entity: &'static str,
        /// The key of the row, unless the row is new.
        key: Option<String>,
        /// The approximate size of the values in bytes.
        bytes: usize,
        /// The limit of the server in bytes.
        limit: usize,
        /// The source location of the flush.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// A statement for one key matched several rows.
    #[error(
        "DS322 {operation} of {entity} {key} at {at} met {rows} rows, so its key is not unique in the table.{} Name \
         all columns of the key by `#[diesel(primary_key(..))]`, and let the table have a unique index on them.",
        match undo {
            Undo::NotNeeded | Undo::RolledBack if *operation == "SELECT" => " Nothing was changed.".to_owned(),
            undo => undo.alone(),
        }
    )]
    NotUnique {
        /// The entity.
        entity: &'static str,
        /// The key of the row.
        key: String,
        /// `SELECT`, `UPDATE` or `DELETE`.
        operation: &'static str,
        /// The number of rows that the statement matched.
        rows: usize,
        /// The source location of the statement.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// New rows refer to rows that will never be inserted.
    #[error(
        "DS312 {} of {entity} {} to rows that are not there: their `add` was rolled back or taken back, or belongs to \
         another session (flushed at {at}).{}",
        count(*rows, "new row"), if *rows == 1 { "refers" } else { "refer" },
        undo.then(" ", "add those rows anew, and then these with the `key()` of the new handles")
    )]
    UnresolvedKeys {
        /// The entity of the new rows.
        entity: &'static str,
        /// The number of these rows.
        rows: usize,
        /// The source location of the flush.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// `drop_all` could not revert every migration, so it has reverted none.
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
        /// The id of the application.
        app: String,
        /// The versions that are applied but are not among the program's migrations.
        unknown: Vec<String>,
        /// The versions that cannot be reverted.
        irreversible: Vec<String>,
    },

    /// A schema operation needs one session on the server, and a pooler provides several.
    #[error(
        "DS406 app `{app}`: {operation} needs one session of the server from its beginning to its end, and a pooler in \
         transaction mode, such as PgBouncer, gives it several. {detail} Call it with a URL that goes to the server \
         itself, or to a pool in session mode."
    )]
    PooledConnection {
        /// The id of the application.
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        /// The step that needs one session, and the state of the database, as sentences.
        detail: String,
    },

    /// Several databases were used in one scope. Some were committed, and the commit of one failed.
    #[error(
        "DS306 {} although {} {}: {} {} by hand or by a compensating change.",
        if source.is_commit_unknown() {
            format!("it is not known whether {failed} was committed,")
        } else {
            format!("{failed} was not committed")
        },
        committed.join(" and "), if committed.len() == 1 { "was" } else { "were" }, sentence(source),
        if source.is_commit_unknown() { "If it was not, repair the difference" } else { "Repair the difference" }
    )]
    PartialCommit {
        /// The databases that were committed, in order.
        committed: Vec<String>,
        /// The database whose commit failed. Later databases were rolled back.
        failed: String,
        /// The error of the commit.
        source: Box<Error>,
    },

    /// The database reported an error.
    #[error("DS302 {} (sent at {at}).{}", phrase(source), match advice::advice_of(source) {
        Some(advice) => format!(" {}", sentence(advice)),
        None => String::new(),
    })]
    Query {
        /// The error of Diesel.
        source: diesel::result::Error,
        /// The source location of the statement.
        at: Place,
    },

    /// The transaction was aborted or ended by the database, or was ended without the session.
    #[error(
        "DS307 the transaction cannot go on: {} (at {at}). This session commits nothing of it. In a closure of \
         `transaction`, `savepoint` or `retry`, or in a hook, return `Err`; elsewhere call `rollback()`. A statement \
         that may fail belongs in a `savepoint`.",
        phrase(cause)
    )]
    RollbackRequired {
        /// The first error, or the event that ended the transaction.
        cause: String,
        /// The source location of the statement, or of the call that gave the connection to the program.
        at: Place,
    },

    /// `drop_all` was called on an application whose configuration protects its schema.
    #[error(
        "DS407 app `{app}`: drop_all at {at} would remove everything that its migrations have made in {database}, and \
         its configuration has `protect_schema(true)`. Nothing was changed. Call it on an application without that, \
         such as a test's."
    )]
    SchemaProtected {
        /// The id of the application.
        app: String,
        /// The server and the database, without credentials.
        database: String,
        /// The source location of the `drop_all`.
        at: Place,
    },

    /// An operation further up the call stack is using the session.
    #[error(
        "DS106 the session is in use: the call at {at} came while the one at {held_at} still has the connection. In a \
         closure of `with` use the connection that it was given; drop a connection of `connection()` first."
    )]
    SessionBusy {
        /// The source location of the operation that is still running.
        held_at: Place,
        /// The source location of the operation that was refused.
        at: Place,
    },

    /// The context of the session has ended.
    #[error(
        "DS107 the session used at {at} belongs to a context of app `{app}` that has ended. Call `Database::session` \
         in a context that is open."
    )]
    SessionEnded {
        /// The id of the application.
        app: String,
        /// The source location at which the session was used.
        at: Place,
    },

    /// Another program or session has changed or deleted a row since it was read. This error also occurs if a trigger
    /// or a policy keeps a statement from the row.
    #[error(
        "DS309 {entity} {key} has been changed or deleted since it was read, so its {operation} at {at} would act on \
         an outdated row. If the row is unchanged, a trigger or a row-level policy of the database has kept this \
         statement from the row.{}",
        undo.then(" ", "`get` it again and decide anew")
    )]
    Stale {
        /// The entity.
        entity: &'static str,
        /// The key of the row.
        key: String,
        /// `update`, `delete` or `read`. `read` means that an attempt of `retry` used a value that it could not read
        /// again at that moment.
        operation: &'static str,
        /// The source location of the flush.
        at: Place,
        /// The action of the program that undoes the transaction.
        undo: Undo,
    },

    /// Not every connection was checked in before the end of a disposal.
    #[error("DS205 not every connection came back in time: {0}.")]
    StillInUse(Box<DisposeReport>),

    /// `create_all` or `drop_all` was called while this thread has an open transaction on the application.
    #[error(
        "DS404 {operation} on app `{app}` was called while this thread has a connection of it: {holders}. End that \
         first: call `commit()`, `rollback()` or `remove()` of its session, or let the closure of its `transaction` \
         return."
    )]
    TransactionOpen {
        /// The id of the application.
        app: String,
        /// `create_all` or `drop_all`.
        operation: &'static str,
        /// The holders of the connections that this thread holds.
        holders: Holders,
    },

    /// No application has this id.
    #[error(
        "DS108 no application `{app}` is registered with {database}, asked at {at} ({}). Call `init_app` of that \
         database object first{}.",
        match known.is_empty() { true => "none is".to_owned(), false => format!("registered: {}", known.join(", ")) },
        if known.is_empty() { "" } else { ", or correct the name" }
    )]
    UnknownApp {
        /// The requested id.
        app: String,
        /// The database object: the type of its connections, and its source location.
        database: String,
        /// The source location of the request.
        at: Place,
        /// The ids of the registered applications.
        known: Vec<String>,
    },

    /// The wait would be a deadlock: threads that are waiting themselves, for this resource or for each other, hold
    /// all of the resource. The simplest case is a pool of one connection that the calling thread holds. If one of the
    /// threads is running, the caller waits.
    ///
    /// The error is [transient](Error::is_transient) if other threads hold a part of the resource: they go on when
    /// this transaction was rolled back, and the transaction may then be run again.
    #[error(
        "DS206 app `{app}`: the call at {at} would wait for ever, as {} {short}{}. {}.",
        if holders.are_all_the_caller() { "this thread itself holds" } else { "threads that wait themselves hold" },
        if holders.is_empty() { String::new() } else { format!(": {holders}") },
        short.advice(holders, *pool)
    )]
    WouldDeadlock {
        /// The id of the application.
        app: String,
        /// The resource for which the caller would wait.
        short: Shortage,
        /// The holders, each with the source location at which its thread waits.
        holders: Holders,
        /// The source location of the checkout.
        at: Place,
        /// The kind of pool.
        pool: PoolOf,
    },

    /// A row was needed while a write guard on it was alive.
    #[error(
        "DS314 {entity} {} is being written by the guard of `write` at {held_at}, so it can be neither read nor \
         flushed at {at}. Let the guard end first; in `handle.write().field = value;` it ends with the statement.",
        key.as_deref().unwrap_or("(no key yet)")
    )]
    WriteInProgress {
        /// The entity.
        entity: &'static str,
        /// The key of the row.
        key: Option<String>,
        /// The source location of the `write`.
        held_at: Place,
        /// The source location at which the value was needed.
        at: Place,
    },

    /// The state of a handle does not allow the operation.
    #[error(
        "DS315 {entity} {} cannot be {operation} at {at}: {}.",
        key.as_deref().unwrap_or("(no key yet)"), state.refusal(operation)
    )]
    WrongState {
        /// The entity.
        entity: &'static str,
        /// The key of the row.
        key: Option<String>,
        /// The state of the handle.
        state: RowState,
        /// The refused operation as a participle, such as `read` or `written`.
        operation: &'static str,
        /// The source location of the operation.
        at: Place,
    },
}

/// The operation of [`Error::LockTimeout`] for a write to a SQLite file.
pub(crate) const A_WRITE: &str = "a write";

/// The operation of [`Error::LockTimeout`] for a read of a SQLite file.
pub(crate) const A_READ: &str = "a read";

/// The cause of [`Error::TestSpoiled`] if the connection of the test was lost.
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

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Diesel's errors become [`Error::NotFound`] or [`Error::Query`], so `?` works for both kinds of result in a closure.
impl From<diesel::result::Error> for Error {
    #[track_caller]
    fn from(source: diesel::result::Error) -> Self {
        Self::from_query(source, Location::caller())
    }
}
