//! What can go wrong, in one enum; every text says what happened, where, and what to do.

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

/// A place in the program's source, as `#[track_caller]` sees it.
pub type Place = &'static Location<'static>;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
///
/// The text of each variant starts with a stable code ([`Error::code`]), names the application and the place in the source if it knows
/// them, and says what to do unless only the database can say that. `Debug` shows the same text, so that it is what `unwrap` and a
/// `main` that returns a `Result` print. The password of the URL is redacted.
///
#[doc = include_str!("reference.md")]
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The flush that goes before a query failed.
    #[error(
        "DS310 the query at {at} was not sent, because the flush before it failed: {}{}",
        sentence(source),
        undo.alone()
    )]
    Autoflush {
        /// What went wrong.
        source: Box<Error>,
        /// Where the query was to be sent.
        at: Place,
        /// What the program has to do, if the text of `source` does not say it.
        undo: Undo,
    },

    /// The connection pool has no connection to give and one did not come back in time.
    #[error(
        "DS201 app `{app}` got no connection in {waited:.3?} (at {at}): {}, and {} for one. {}{}",
        connections_in_use(*max_size, holders.len(), *connecting_for), others_wait(*waiting),
        held_by(holders),
        limit.advice(!holders.is_empty(), pool.more_or_time(connecting_for.is_some()))
    )]
    AcquireTimeout {
        /// The application.
        app: String,
        /// How long the caller waited.
        waited: Duration,
        /// The size of the pool.
        max_size: u32,
        /// How long a connect had been under way, if the pool had room for one more connection. A pool opens one connection at a time.
        connecting_for: Option<Duration>,
        /// How many other callers were waiting at that moment.
        waiting: usize,
        /// Who had the connections.
        holders: Holders,
        /// Where one was asked for.
        at: Place,
        /// What ended the wait.
        limit: WaitLimit,
        /// Whose pool it is.
        pool: PoolOf,
    },

    /// `begin` was called although the session had begun already.
    #[error(
        "DS104 `begin` was called at {at}, but this session's transaction has begun at {begun_at}. Leave this `begin` out; for a part of the \
         transaction use `savepoint`, and for another transaction end this one first."
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
         with this flush, what an `after_flush` hook changes with the next one."
    )]
    AlreadyFlushing {
        /// Where it was called.
        at: Place,
    },

    /// The application id is taken.
    #[error(
        "DS102 an application `{app}` is registered already; use `app(..)` to reach it, or `remove_app(..)` first."
    )]
    AlreadyRegistered {
        /// The application.
        app: String,
    },

    /// The answer to `COMMIT` was lost: the server may have committed, or not. [`resolve`](Error::resolve) asks it.
    #[error(transparent)]
    CommitUnknown(Box<UnknownCommit>),

    /// No connection could be made.
    #[error("DS202 app `{app}` cannot connect to {server} (at {at}): {}{}", sentence(message), kind.advice(server, message))]
    Connect {
        /// The application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// What kind of failure it is.
        kind: ConnectErrorKind,
        /// The message of the driver or the server, with the password redacted.
        message: String,
        /// Where a connection was asked for.
        at: Place,
    },

    /// The connection was lost while a statement was under way.
    #[error(
        "DS308 app `{app}`: the connection was lost by the statement sent at {at}: {} {}",
        sentence(source),
        match (*in_transaction, undo) {
            (true, Undo::NotNeeded | Undo::Unsaid | Undo::RolledBack) => "Its transaction was not committed. Run all of it again.".to_owned(),
            (true, undo) => format!("Its transaction was not committed. {}", undo.then("", "run all of it again")),
            (false, _) => {
                "It was outside of a transaction, so it may have been carried out. Look at the data before you send it again.".to_owned()
            }
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
        /// What the program has to do.
        undo: Undo,
    },

    /// The connection that all sessions of a test share has lost its transaction, so nothing of the test can be undone.
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
    #[error("DS503 {who} left something behind. End it before the test ends; the next run removes databases that are left:{}", left.iter().map(|left| format!("\n- {left}")).collect::<String>())]
    TestLeftovers {
        /// The test, or the suite.
        who: String,
        /// Sessions, connections, transactions and databases, each with its place where that is known.
        left: Vec<String>,
    },

    /// A database was to be dropped that this crate has not made, and whose name was not given.
    #[error("DS504 {database} was not made by this crate, so it is not dropped unless it is named: {advice}.")]
    NotOurs {
        /// The database.
        database: String,
        /// How it is named.
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
        /// The application.
        app: String,
        /// The server, without credentials.
        server: String,
        /// How long the caller waited.
        waited: Duration,
        /// How long the connect had been under way, if that is longer: an earlier caller had asked for it.
        connecting: Option<Duration>,
        /// Where a connection was asked for.
        at: Place,
        /// What ended the wait.
        limit: WaitLimit,
    },

    /// The scope's deadline has passed.
    #[error(
        "DS305 the scope's deadline of {limit:?} had passed at {at}, so the statement was not sent or was ended. Nothing more is sent in this \
         scope: let it end, and give it more time with `Scope::deadline` or less to do."
    )]
    DeadlineExceeded {
        /// The deadline given to the scope.
        limit: Duration,
        /// The statement that found it passed.
        at: Place,
    },

    /// The application was disposed of while the caller waited, or it has been removed.
    #[error("DS204 app `{app}` {}", how.description())]
    Disposed {
        /// The application.
        app: String,
        /// Which of these has happened.
        how: AppEnd,
    },

    /// This process was forked from one that had pools in use. Their connections are the parent's and were not touched.
    #[error(
        "DS209 app `{app}`: this process was forked while its parent had connections. They are the parent's, and nothing was sent \
         on them; the threads that connect do not come along. Call `dispose_all()` in the parent before it forks, or make the new \
         process a program of its own (`exec`)."
    )]
    Forked {
        /// The application.
        app: String,
    },

    /// A hook panicked or refused.
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
        /// Which kind of hook; `on_checkout` is one of the database object.
        hook: &'static str,
        /// Whether the transaction had been committed when the hook ran.
        committed: bool,
        /// The panic's message or the hook's error.
        message: String,
    },

    /// An outer operation of the session forbids this one.
    #[error(
        "DS105 `{operation}` was called at {at} inside the `{outer}` that began at {outer_at}. {}",
        match (*operation, *outer) {
            ("commit", "savepoint") => "Return `Ok` from its closure to keep what it did, and commit what is around it.",
            ("commit", _) => "Return `Ok` from its closure instead; the outermost `transaction` or `retry` commits.",
            ("rollback", "savepoint") => "Return `Err` from its closure, which undoes what it did; roll back what is around it afterwards.",
            ("rollback", _) => "Return `Err` from its closure instead, which rolls back.",
            _ => "Let its closure return first.",
        }
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
        "DS208 app `{app}` got no connection in {waited:.3?} (at {at}): {} that `Database::max_connections` allows {}{}",
        if *max_connections == 1 { "the one connection".to_owned() } else { format!("all {max_connections} connections") },
        if *max_connections == 1 { "is in use. " } else { "are in use. " }.to_owned() + &held_by(holders),
        limit.advice(!holders.is_empty(), "raise `Database::max_connections`")
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
        /// What ended the wait.
        limit: WaitLimit,
    },

    /// A configuration that cannot work.
    #[error("DS101 {}{}", if app == NO_APP { String::new() } else { format!("app `{app}`: ") }, sentence(reason))]
    InvalidConfig {
        /// The application.
        app: String,
        /// What is wrong and what is expected.
        reason: String,
    },

    /// The key of a row was written.
    #[error(
        "DS311 the key of {entity} {from} was changed to {to}, so the flush at {at} cannot tell which row is meant. Nothing was sent. \
         Write the old key back, or `expire` the handle, which forgets what was written to the row. For another key add a new row and delete \
         this one."
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

    /// A schema operation, or a statement or commit of a session on SQLite, could not get what another session has locked. Of another
    /// process's session nothing is known. For code that has the connection ([`Session::with`](crate::Session::with)) the error is
    /// the driver's, [`Query`](Self::Query).
    #[error(
        "DS405 app `{app}`: {operation} (at {at}) waited {waited:.3?} for a lock that another session holds: {} {blockers}{left} {}",
        sentence(message),
        match *operation {
            "create_all" | "drop_all" => {
                format!("End that session's transaction, or wait until it has ended, and call {operation} again.")
            }
            _ => "End that session's transaction, or raise `Config::lock_timeout`, and run this transaction again.".to_owned(),
        }
    )]
    LockTimeout {
        /// The application.
        app: String,
        /// `create_all`, `drop_all`, or what a session sent to SQLite: `a write`, `a read`, `a statement` of raw SQL, `a commit`.
        operation: &'static str,
        /// How long it waited.
        waited: Duration,
        /// What the server said.
        message: String,
        /// Who was in the way, as far as that can be told.
        blockers: Blockers,
        /// What state it was left in.
        left: String,
        /// Where the operation was called.
        at: Place,
    },

    /// A migration failed.
    #[error("DS402 {0}.")]
    Migration(Box<MigrationFailure>),

    /// No application context on this thread.
    #[error(
        "DS103 no application context on this thread (at {at}). Enter one with `app.context(|| ..)`; \
         a new thread does not inherit its parent's: take `current_app()` along and enter it there."
    )]
    NoContext {
        /// Where a context was needed.
        at: Place,
    },

    /// The database object was made without migrations.
    #[error(
        "DS401 app `{app}`: there are no migrations for {backend}; give them to `Database::new` or `Database::per_backend`."
    )]
    NoMigrations {
        /// The application.
        app: String,
        /// The kind of database.
        backend: &'static str,
    },

    /// A handle of another session.
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
        /// The row's key.
        key: Option<String>,
        /// Where it was given.
        at: Place,
    },

    /// `retry` was called where not everything it would have to repeat is in its closure.
    #[error(
        "DS109 `retry` at {at} could not repeat what came before its closure: {}",
        match inside {
            Some("retry") => format!("it is inside the `retry` that began at {since}. Leave the inner `retry` out: the outer one repeats all of it."),
            Some(outer) => format!("it is inside the `{outer}` that began at {since}. Call `retry` instead of that, with all of the transaction in its closure."),
            None => format!(
                "this session began, or was given rows to write, at {since}. Call `commit()` or `rollback()` before `retry`, or put that into its closure."
            ),
        }
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
    #[error("DS301 {} at {at}. If that is to be expected, add `.optional()`.",
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
         rows, `load` all of them."
    )]
    TooManyRows {
        /// Where the query was sent.
        at: Place,
    },

    /// Rows that were inserted by one statement came back in another order, and their values do not tell in which.
    #[error(
        "DS313 new rows of {entity} that were flushed at {at} came back in another order and with other values than were sent, so the key of \
         each cannot be told.{} Mark the entity `#[entity(row_by_row)]`, so that each row has an INSERT of its own.",
        undo.alone()
    )]
    Unpaired {
        /// The entity.
        entity: &'static str,
        /// Where they were flushed.
        at: Place,
        /// What the program has to do.
        undo: Undo,
    },

    /// The database inserted fewer or more rows than were sent.
    #[error(
        "DS321 {} of {entity} {} sent by the flush at {at}, and the database gave {returned} back. A trigger of the table (such as \
         a BEFORE trigger that returns NULL), or on PostgreSQL a rule or a row-level policy, has kept rows out or added some.{} If this is wanted, insert such rows with `execute(diesel::insert_into(..))`, which says \
         how many rows were inserted.",
        count(*sent, "new row"), if *sent == 1 { "was" } else { "were" },
        undo.alone()
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
        /// What the program has to do.
        undo: Undo,
    },

    /// A row is larger than a statement of the server may be.
    #[error(
        "DS323 {} of {entity} has {bytes} bytes, and a statement of the server has at most {limit} (`max_allowed_packet`); flushed at {at}. \
         Nothing of the row was sent, and sending it again does not help.{} Store less in a row, or raise `max_allowed_packet` on the server.",
        match key { Some(key) => format!("the change of row {key}"), None => "a new row".into() },
        undo.alone()
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
        /// What the program has to do.
        undo: Undo,
    },

    /// A statement for one key met several rows.
    #[error(
        "DS322 {operation} of {entity} {key} at {at} met {rows} rows, so its key is not unique in the table.{} Name all columns of the key by \
         `#[diesel(primary_key(..))]`, and let the table have a unique index on them.",
        match undo {
            Undo::NotNeeded | Undo::RolledBack if *operation == "SELECT" => " Nothing was changed.".to_owned(),
            undo => undo.alone(),
        }
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
        /// What the program has to do.
        undo: Undo,
    },

    /// New rows refer to rows that will never be inserted.
    #[error(
        "DS312 {} of {entity} {} to rows that are not there: their `add` was rolled back or taken back, or belongs to another session \
         (flushed at {at}).{}",
        count(*rows, "new row"), if *rows == 1 { "refers" } else { "refer" },
        undo.then(" ", "add those rows anew, and then these with the `key()` of the new handles")
    )]
    UnresolvedKeys {
        /// The entity of the new rows.
        entity: &'static str,
        /// How many they are.
        rows: usize,
        /// Where they were flushed.
        at: Place,
        /// What the program has to do.
        undo: Undo,
    },

    /// `drop_all` would not be able to finish.
    #[error(
        "DS403 app `{app}`: drop_all would stop half-way, so nothing was reverted.{}{} Or drop the database itself.",
        match unknown.is_empty() {
            true => String::new(),
            false => format!(
                " Applied, but not among the migrations of this program: {}. Run drop_all from a program that has these migrations.",
                phrase(unknown.join(", "))
            ),
        },
        match irreversible.is_empty() {
            true => String::new(),
            false => format!(
                " Without a down.sql, or with one that has no statement: {}. Write it, with `SELECT 1;` if there is nothing to undo.",
                phrase(irreversible.join(", "))
            ),
        }
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
         session mode."
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
        /// The database whose commit failed; later ones were rolled back.
        failed: String,
        /// Why it failed.
        source: Box<Error>,
    },

    /// The database reported an error.
    #[error("DS302 {} (sent at {at}).{}", phrase(source), match advice::advice_of(source) {
        Some(advice) => format!(" {}", sentence(advice)),
        None => String::new(),
    })]
    Query {
        /// What Diesel said.
        source: diesel::result::Error,
        /// Where the statement was sent.
        at: Place,
    },

    /// The transaction was aborted or ended by the database or behind the session's back.
    #[error(
        "DS307 the transaction cannot go on: {} (at {at}). This session commits nothing of it. In a closure of `transaction`, `savepoint` or \
         `retry`, or in a hook, return `Err`; elsewhere call `rollback()`. A statement that may fail belongs in a `savepoint`.",
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
         has `protect_schema(true)`. Nothing was changed. Call it on an application without that, such as a test's."
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
        "DS106 the session is in use: the call at {at} came while the one at {held_at} still has the connection. In a closure of `with` use the \
         connection that it was given; drop a connection of `connection()` first."
    )]
    SessionBusy {
        /// The operation that is still running.
        held_at: Place,
        /// The operation that was refused.
        at: Place,
    },

    /// The session's context has ended.
    #[error(
        "DS107 the session used at {at} belongs to a context of app `{app}` that has ended. Call `Database::session` in a context that is open."
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
         If the row is unchanged, a trigger or a row-level policy of the database has kept this statement from the row.{}",
        undo.then(" ", "`get` it again and decide anew")
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
        /// What the program has to do.
        undo: Undo,
    },

    /// `dispose` could not get every connection back.
    #[error("DS205 not every connection came back in time: {0}.")]
    StillInUse(Box<DisposeReport>),

    /// `create_all` or `drop_all` while this thread has a transaction open on the application.
    #[error(
        "DS404 {operation} on app `{app}` was called while this thread has a connection of it: {holders}. \
         End that first: call `commit()`, `rollback()` or `remove()` of its session, or let the closure of its `transaction` return."
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
        "DS108 no application `{app}` is registered with {database}, asked at {at} ({}). Call `init_app` of that database object first{}.",
        match known.is_empty() { true => "none is".to_owned(), false => format!("registered: {}", known.join(", ")) },
        if known.is_empty() { "" } else { ", or correct the name" }
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
    ///
    /// It is [transient](Error::is_transient) if other threads hold some of it: when this transaction has been rolled back, theirs
    /// go on, and it may be run again.
    #[error(
        "DS206 app `{app}`: the call at {at} would wait for ever, as {} {short}{}. {}.",
        if holders.are_all_the_caller() { "this thread itself holds" } else { "threads that wait themselves hold" },
        if holders.is_empty() { String::new() } else { format!(": {holders}") },
        short.advice(holders, *pool)
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
        /// Whose pool it is.
        pool: PoolOf,
    },

    /// A row is being written while it is needed as a whole.
    #[error(
        "DS314 {entity} {} is being written by the guard of `write` at {held_at}, so it can be neither read nor flushed at {at}. \
         Let the guard end first; in `handle.write().field = value;` it ends with the statement.",
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
        "DS315 {entity} {} cannot be {operation} at {at}: {}.",
        key.as_deref().unwrap_or("(no key yet)"), state.refusal(operation)
    )]
    WrongState {
        /// The entity.
        entity: &'static str,
        /// The row's key.
        key: Option<String>,
        /// The handle's state.
        state: RowState,
        /// `read`, `written`, ..
        operation: &'static str,
        /// Where that was asked for.
        at: Place,
    },
}

/// What [`Error::LockTimeout`] calls a write to a SQLite file.
pub(crate) const A_WRITE: &str = "a write";

/// The same of a read.
pub(crate) const A_READ: &str = "a read";

/// The connection of a test was lost.
pub(crate) const LOST: &str = "its connection was lost";

/// The application of a configuration that has none yet.
pub(crate) const NO_APP: &str = "-";

/// A number of things.
pub(crate) fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// The connections of a pool that was short of one.
fn connections_in_use(max_size: u32, in_use: usize, connecting_for: Option<Duration>) -> String {
    match connecting_for {
        None => format!("{} in use", all(max_size, "connection")),
        Some(time) => {
            let (held, are) = (count(in_use, "connection"), if in_use == 1 { "is" } else { "are" });
            format!("{held} of at most {max_size} {are} in use, one more has been connecting for {time:.3?}")
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

/// Who has them, as a sentence with a blank after it; nothing if nobody has them any more.
fn held_by(holders: &Holders) -> String {
    if holders.is_empty() { String::new() } else { format!("Held: {holders}. ") }
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
