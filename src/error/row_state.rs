//! The state of a row in a session.

/// The state of the row of a handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RowState {
    /// The row was added and is not inserted yet, so its value cannot be read.
    Pending,
    /// The row is in the database, and was read or written in the current transaction.
    Persistent,
    /// The row is in the database, but the value in memory may be outdated: after a commit, a rollback, a statement
    /// that may have changed the row, [`expire`](crate::Session::expire), or a read outside a transaction in an
    /// autocommit scope. The value in memory can still be read. The next `get`, `track` or `refresh` reads the row
    /// again, and so does `write` before it returns the value.
    Expired,
    /// The value in memory was flushed and then rolled back. It cannot be read until `get`, `refresh` or an attempt of
    /// [`retry`](crate::Session::retry) has read the row again.
    RolledBack,
    /// The row was deleted, by this session or by another one; a session detects the latter when it reads the row
    /// again. The value in memory can still be read.
    Deleted,
    /// The row was added, and then rolled back or removed from the session before a commit. It does not exist.
    Discarded,
    /// The row does not belong to a session any more: after [`expunge`](crate::Session::expunge) or the end of the
    /// session. The value in memory can still be read, unless the session ended with the rollback of a flushed change
    /// of the row. Then its value is unknown.
    Detached,
    /// The row was changed by a transaction whose commit was not answered
    /// ([`ErrorKind::CommitUnknown`](crate::ErrorKind::CommitUnknown)). Its value can be read and its key can be used.
    /// [`resolve`](crate::Error::resolve) of this error determines the state. If the session continues, a `get`,
    /// `track` or `refresh` that reads the row determines it too.
    Undecided,
}
