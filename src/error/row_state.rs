//! The state of a row.

/// What is known of a handle's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RowState {
    /// Added, and not inserted yet: there is no row to read.
    Pending,
    /// In the database, and read or written in the present transaction.
    Persistent,
    /// In the database, but what was read may be outdated: after a commit, a rollback, a statement that may have changed the row,
    /// [`expire`](crate::Session::expire), or a read outside of a transaction in an autocommit scope. It can be read as it was known.
    /// The next `get`, `track` or `refresh` reads it again, and so does `write`, before it gives the value.
    Expired,
    /// What is in memory was flushed and rolled back: it cannot be read until `get`, `refresh` or an attempt of
    /// [`retry`](crate::Session::retry) has read it again.
    RolledBack,
    /// Deleted, by this session or, as was seen when it was read again, by somebody else. It can still be read.
    Deleted,
    /// Added, and rolled back or taken out before it was kept: there is no such row.
    Discarded,
    /// No longer the session's: after [`expunge`](crate::Session::expunge) or the session's end. It can still be read, unless the session
    /// ended with the rollback of a change of it that was flushed: then its value is not known.
    Detached,
    /// Changed by a transaction whose commit was not answered ([`Error::CommitUnknown`](crate::Error::CommitUnknown)). It can be read, and
    /// its key can be used. [`resolve`](crate::Error::resolve) of that error decides what it is; if the session goes on, so does a `get`,
    /// `track` or `refresh` that reads the row.
    Undecided,
}
