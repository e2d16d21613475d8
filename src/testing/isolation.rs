//! How far a test is kept apart from others.

/// How a test is kept apart from others, and how its database comes about.
///
/// | | PostgreSQL | MySQL, MariaDB | SQLite |
/// |---|---|---|---|
/// | [`Database`](Self::Database), the default | copied from a template, which migrations and fixtures have filled once | made and filled for each test | a file copied from a template; `:memory:` filled for each test |
/// | [`Schema`](Self::Schema) | made and filled for each test | no | no |
/// | [`Rollback`](Self::Rollback) | in a database filled once | the same | in memory, filled once a process |
///
/// `Database` is the default everywhere, as it is the one in which every program behaves as it does in production.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum TestIsolation {
    /// A database of its own, with a pool of its own: everything works as in production. It has the properties of the database that the
    /// URL names.
    ///
    /// On PostgreSQL the role needs the right `CREATEDB`; on MySQL and MariaDB all rights on databases whose names start with
    /// `diesel_session_` (``GRANT ALL ON `diesel\_session\_%`.* TO ..``).
    #[default]
    Database,
    /// A schema of its own in the database that the URL names, on PostgreSQL, where the role need not make databases. Its
    /// connections see nothing but that schema. Migrations and SQL fixtures that name something outside of it (`public.`,
    /// `search_path`, `CREATE EXTENSION`) are refused.
    Schema,
    /// One connection, inside a transaction that is never committed, for every session of the test's application in every thread.
    ///
    /// Begin, commit, rollback, savepoints and scopes of sessions work, and what is committed is seen by all sessions that come later;
    /// it is a savepoint. Deferred constraints are looked at where a commit would. What is different:
    ///
    /// * one session at a time is in a transaction, which a typed SELECT does not begin: another waits for it, up to `acquire_timeout`, and where that one waits for it in
    ///   turn, as in one thread, it is [`Error::WouldDeadlock`](crate::Error::WouldDeadlock);
    /// * isolation levels mean nothing, on MySQL and MariaDB a read-only scope can write, and `now()` of PostgreSQL stands still;
    /// * `build_transaction` and `immediate_transaction` of Diesel's connections are `AlreadyInTransaction`, as they are in every
    ///   session;
    /// * what ends the transaction behind the session's back fails the test, by name: `COMMIT` in raw SQL, on MySQL and MariaDB every
    ///   `CREATE`, `ALTER` or `DROP`, and the loss of the connection;
    /// * what raw SQL sets on the connection stays for the test's other sessions on MySQL, MariaDB and SQLite;
    /// * numbers that a sequence has given are not given again.
    /// * `NOTIFY` reaches nobody, as it is sent by a commit; what a deferred trigger did is undone, and it fires again at each commit;
    /// * a raw `SET TRANSACTION ISOLATION LEVEL` is refused, and `SET CONSTRAINTS` outlives a commit;
    /// * in an autocommit scope all that one call of `with`, or one lent connection, sends is one unit;
    /// * a typed SELECT that fails before the session has written anything, on PostgreSQL, asks for `rollback()` as always; one that succeeds leaves
    ///   `in_transaction()` false.
    ///
    /// With an enum of connections give the database object
    /// [`Database::connect_with`](crate::Database::connect_with): without it the test works too, but if its connection cannot be made no error
    /// tells why.
    ///
    /// A test that minds takes [`Database`](Self::Database).
    Rollback,
}
