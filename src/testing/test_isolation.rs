//! The isolation of a test from other tests.

/// How a test is isolated from other tests, and how its database is created.
///
/// | | PostgreSQL | MySQL, MariaDB | SQLite |
/// |---|---|---|---|
/// | [`Database`](Self::Database), the default | a copy of a template, which migrations and fixtures fill once | created and filled for each test | a file that is a copy of a template; `:memory:` is filled for each test |
/// | [`Schema`](Self::Schema) | created and filled for each test | not available | not available |
/// | [`Rollback`](Self::Rollback) | in a database that is filled once | in a database that is filled once | in memory, filled once per process |
///
/// `Database` is the default for every kind of database, because only there every program behaves as in production.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum TestIsolation {
    /// The test has a separate database and a separate pool, so everything works as in production. The database has the
    /// properties of the database in the URL.
    ///
    /// On PostgreSQL the role needs the right `CREATEDB`; on MySQL and MariaDB all rights on databases whose names
    /// start with `diesel_session_` (``GRANT ALL ON `diesel\_session\_%`.* TO ..``).
    #[default]
    Database,
    /// The test has a separate schema in the database in the URL, on PostgreSQL. The role does not need the right to
    /// create databases. The `search_path` of the test's connections contains only that schema. A migration or an SQL
    /// fixture that refers to something outside the schema (`public.`, `search_path`, `CREATE EXTENSION`) is refused.
    Schema,
    /// All sessions of the test's application, in all threads, use one connection. The connection is inside a
    /// transaction that is never committed.
    ///
    /// Begin, commit, rollback, savepoints and scopes of sessions work. The transaction of a session is a savepoint,
    /// and all later sessions see the committed rows. A commit of a session checks the deferred constraints. The
    /// differences are:
    ///
    /// * Only one session at a time can be in a transaction; a typed SELECT does not begin one. Another session waits
    ///   up to `acquire_timeout`. If the first session waits for the second one in turn, as in one thread, the error is
    ///   [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock).
    /// * Isolation levels have no effect. On MySQL and MariaDB a read-only scope can write. `now()` of PostgreSQL does
    ///   not advance.
    /// * `build_transaction` and `immediate_transaction` of Diesel's connections return `AlreadyInTransaction`, as in
    ///   every session.
    /// * A statement that ends the transaction without the session fails the test, and the error names it: `COMMIT` in
    ///   raw SQL, and on MySQL and MariaDB every `CREATE`, `ALTER` or `DROP`. The loss of the connection fails the test
    ///   too.
    /// * On MySQL, MariaDB and SQLite, settings that raw SQL makes on the connection remain for the other sessions of
    ///   the test.
    /// * Values that a sequence has generated are not generated again.
    /// * `NOTIFY` reaches no listener, because only a commit sends it. The effects of a deferred trigger are undone,
    ///   and the trigger fires again at each commit.
    /// * A raw `SET TRANSACTION ISOLATION LEVEL` is refused, and `SET CONSTRAINTS` remains in effect after a commit.
    /// * In an autocommit scope, all statements of one call of `with`, or of one checked-out connection, are one unit.
    /// * On PostgreSQL, a typed SELECT that fails before the session has written anything requires `rollback()`, as
    ///   always. After a typed SELECT that succeeds, `in_transaction()` is false.
    ///
    /// If the connection type is an enum, give the database object
    /// [`Database::connect_with`](crate::Database::connect_with). The test works without it, but if the connection
    /// cannot be made, no error states the reason.
    ///
    /// A test that cannot accept these differences uses [`Database`](Self::Database).
    Rollback,
}
