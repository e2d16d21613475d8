//! The kind of an error.

/// Defines the kinds of errors, each with its code, and the kind of each variant of [`Details`].
macro_rules! error_kinds {
    ($($(#[$doc:meta])+ $kind:ident = $code:literal,)+) => {
        /// The kind of an [`Error`](crate::Error). Each kind has a stable code, with which the text of the error
        /// starts.
        ///
        #[doc = include_str!("reference.md")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum ErrorKind {
            $($(#[$doc])+ $kind,)+
        }

        impl ErrorKind {
            /// The stable code: `DS` and three digits.
            pub const fn code(self) -> &'static str {
                match self {
                    $(Self::$kind => $code,)+
                }
            }
        }

        impl super::details::Details {
            pub(super) fn kind(&self) -> ErrorKind {
                match self {
                    $(Self::$kind { .. } => ErrorKind::$kind,)+
                }
            }
        }
    };
}

error_kinds! {
    /// A configuration is invalid.
    InvalidConfig = "DS101",
    /// The application id is taken.
    AlreadyRegistered = "DS102",
    /// The thread is in no application context.
    NoContext = "DS103",
    /// `begin` was called although the session has already begun.
    AlreadyBegun = "DS104",
    /// An outer operation of the session does not allow this operation.
    InsideTransaction = "DS105",
    /// An operation further up the call stack is using the session.
    SessionBusy = "DS106",
    /// The context of the session has ended.
    SessionEnded = "DS107",
    /// No application has this id.
    UnknownApp = "DS108",
    /// The closure of a `retry` does not contain everything that the `retry` would have to repeat.
    NotRepeatable = "DS109",
    /// The handle belongs to another session.
    ForeignHandle = "DS110",
    /// All connections of the pool were in use, and none was checked in in time.
    AcquireTimeout = "DS201",
    /// A connect failed.
    Connect = "DS202",
    /// The server did not answer in time.
    ConnectTimeout = "DS203",
    /// The application was disposed of while the caller waited, or was removed.
    Disposed = "DS204",
    /// Not every connection was checked in before the end of a disposal.
    StillInUse = "DS205",
    /// The wait would be a deadlock: threads that are waiting themselves, for this resource or for each other, hold
    /// all of the resource. The simplest case is a pool of one connection that the calling thread holds. If one of the
    /// threads is running, the caller waits.
    ///
    /// The error is [transient](crate::Error::is_transient) if other threads hold a part of the resource: they go on
    /// when this transaction was rolled back, and the transaction may then be run again.
    WouldDeadlock = "DS206",
    /// All connections that `Database::max_connections` allows were in use, and none was closed or checked in in time.
    ConnectionLimitReached = "DS208",
    /// This process was forked from a process that had pools in use. Their connections belong to the parent and were
    /// not used.
    Forked = "DS209",
    /// The query found nothing.
    NotFound = "DS301",
    /// A statement failed: the database reported an error, or Diesel could not build the statement or read its rows.
    Query = "DS302",
    /// The answer to `COMMIT` was lost, so the outcome of the commit is unknown. [`resolve`](crate::Error::resolve)
    /// asks the server.
    CommitUnknown = "DS303",
    /// A hook panicked or returned an error.
    HookFailed = "DS304",
    /// The scope's deadline has passed.
    DeadlineExceeded = "DS305",
    /// Several databases were used in one scope. Some were committed, and the commit of one failed.
    PartialCommit = "DS306",
    /// The transaction was aborted or ended by the database, or was ended without the session.
    RollbackRequired = "DS307",
    /// The connection was lost during a statement.
    ConnectionLost = "DS308",
    /// Another program or session has changed or deleted a row since it was read. This error also occurs if a trigger
    /// or a policy keeps a statement from the row.
    Stale = "DS309",
    /// The flush before a query failed.
    Autoflush = "DS310",
    /// The key of a row was changed.
    KeyChanged = "DS311",
    /// New rows refer to rows that will never be inserted.
    UnresolvedKeys = "DS312",
    /// The rows that one statement inserted could not be matched to the inserted values, so their generated keys are
    /// ambiguous.
    UnmatchedRows = "DS313",
    /// A row was needed while a write guard on it was alive.
    WriteInProgress = "DS314",
    /// The state of a handle does not allow the operation.
    WrongState = "DS315",
    /// A hook of a flush called `flush` or `commit`.
    AlreadyFlushing = "DS316",
    /// A query for at most one row found several rows.
    TooManyRows = "DS317",
    /// The database returned fewer or more rows than were inserted.
    NotReturned = "DS321",
    /// A statement for one key matched several rows.
    NotUnique = "DS322",
    /// A row is larger than the server allows for a statement.
    RowTooLarge = "DS323",
    /// The database object was created without migrations.
    NoMigrations = "DS401",
    /// A migration failed.
    Migration = "DS402",
    /// `drop_all` could not revert every migration, so it has reverted none.
    NotReversible = "DS403",
    /// `create_all` or `drop_all` was called while this thread has an open transaction on the application.
    TransactionOpen = "DS404",
    /// A schema operation, or a statement or a commit of a session on SQLite, waited too long for a lock of another
    /// session. Nothing is known about a session of another process. Code that uses the connection
    /// ([`Session::with`](crate::Session::with)) gets the error of the driver instead, as [`Query`](Self::Query).
    LockTimeout = "DS405",
    /// A schema operation needs one session on the server, and a pooler provides several.
    PoolerInTransactionMode = "DS406",
    /// `drop_all` was called on an application whose configuration protects its schema.
    SchemaProtected = "DS407",
    /// A database could not be created or dropped, by a function of the module [`admin`](crate::admin).
    DatabaseAdmin = "DS408",
    /// The connection that all sessions of a test share has lost its transaction, so nothing in the test can be rolled
    /// back.
    TestInvalidated = "DS501",
    /// A test's database could not be created.
    TestSetup = "DS502",
    /// A test or a suite of tests has ended and left something behind.
    TestLeftovers = "DS503",
    /// A database that this crate has not created was to be dropped, and its name was not given.
    UnmanagedDatabase = "DS504",
}
