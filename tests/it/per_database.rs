//! Tests that are compiled once for each database, as their statements are typed: with SQLite, PostgreSQL and MariaDB
//! by their own connection types, and by an enum over all three.
//!
//! The modules below list the files that apply to each database. A test that applies to fewer databases than its file
//! is listed in `for_each_database!`.

// One set of files is six sets of modules. Not every module uses all of the helpers.
#![allow(clippy::duplicate_mod, dead_code, unreachable_pub, unused_imports)]

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub use diesel::connection::SimpleConnection;
pub use diesel::prelude::*;
pub use diesel::result::DatabaseErrorKind;
pub use diesel::sql_query;
pub use diesel::sql_types::{BigInt, Integer, Text};
pub use diesel_session::session::Isolation;
pub use diesel_session::testing::Fixture;
use diesel_session::testing::{TestApp, TestSetup};
pub use diesel_session::{App, Config, Database, Error, ErrorKind, OptionalExt, Result, Session, SessionConnection};

pub use crate::fixtures::AnyConnection;
use crate::support;
pub use crate::support::Kind;

/// Asserts that a value is of a form, and shows it where it is not.
macro_rules! assert_is {
    ($value:expr, $pattern:pat $(if $guard:expr)?) => {
        match $value {
            $pattern $(if $guard)? => {}
            other => panic!("not {}: {other:?}", stringify!($pattern $(if $guard)?)),
        }
    };
}

/// Asserts that a result is an error of this kind, and shows the result if it is not.
macro_rules! assert_error {
    ($result:expr, $kind:ident) => {
        assert_is!(&$result, Err(error) if error.kind() == diesel_session::ErrorKind::$kind)
    };
}

/// The line of the call that failed.
#[track_caller]
pub fn line_of(error: &Error) -> u32 {
    error.location().expect("a location").line()
}

/// The line of the earlier call that prevents the failed one.
#[track_caller]
pub fn earlier_line(error: &Error) -> u32 {
    error.earlier_location().expect("an earlier location").line()
}

/// Defines `for_each_database!` for the modules of one database: it makes `#[test]` functions of the named functions if
/// the database is in the list.
#[rustfmt::skip]
macro_rules! define_for_each_database {
    ($d:tt $database:ident) => {
        macro_rules! for_each_database {
            (@ [$database $d($d rest:ident)*] $d($d name:ident)+) => { $d(
                mod $d name {
                    #[test]
                    fn $database() {
                        super::$d name();
                    }
                }
            )+ };
            (@ [$d other:ident $d($d rest:ident)*] $d($d name:ident)+) => {
                for_each_database!(@ [$d($d rest)*] $d($d name)+);
            };
            (@ [] $d($d name:ident)+) => {};
            ($d($d listed:ident),+ => $d($d name:ident),+ $d(,)?) => {
                for_each_database!(@ [$d($d listed)+] $d($d name)+);
            };
        }
    };
}

/// The items that differ between the databases. The dollar sign is for `define_for_each_database!`.
macro_rules! per_database {
    ($d:tt $database:ident, $kind:ident, $conn:ty, $databases:expr) => {
        pub use crate::per_database::*;

        define_for_each_database!($d $database);

        pub const KIND: Kind = Kind::$kind;
        pub type Conn = $conn;
        pub static DB: Database<Conn> = $databases;
        /// One more database object, to be given hooks.
        pub const fn connected() -> Database<Conn> {
            $databases
        }

        /// A second database object of the same connection type.
        pub static OTHER: Database<Conn> = $databases;
        /// A second database object, of another connection type unless the tests run with `SqliteConnection`.
        pub static AUDIT: Database<SqliteConnection> = Database::without_migrations();

        /// Runs a test with an application of its own, and asserts that it holds no connection and no transaction at
        /// the end.
        #[track_caller]
        pub fn test(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, |config| config), KIND, body);
        }

        /// The same with options; the test kit sets the number of connections.
        #[track_caller]
        pub fn test_with(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, options), KIND, body);
        }

        /// The same with one connection, so that every scope gets the connection of the scope before.
        #[track_caller]
        pub fn test_alone(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            test_alone_with(|config| config, body);
        }

        /// The same with options.
        #[track_caller]
        pub fn test_alone_with(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, options).map(|setup| setup.max_size(1)), KIND, body);
        }

        /// The same with a fixture.
        #[track_caller]
        pub fn test_on(fixture: Fixture<Conn>, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, |config| config).map(|setup| setup.fixture(fixture)), KIND, body);
        }

        /// A user, in the present transaction.
        #[track_caller]
        pub fn add(session: &Session<Conn>, name: &str) -> Result<usize> {
            session.execute(diesel::insert_into(users::table).values(users::name.eq(name)))
        }

        /// A user of that id.
        #[track_caller]
        pub fn add_as(session: &Session<Conn>, id: i32, name: &str) -> Result<usize> {
            session.execute(diesel::insert_into(users::table).values((users::id.eq(id), users::name.eq(name))))
        }

        /// A post by a user. The user need not exist until the transaction ends, except on MariaDB.
        #[track_caller]
        pub fn post(session: &Session<Conn>, user: i32, title: &str) -> Result<usize> {
            session.execute(diesel::insert_into(posts::table).values((posts::user_id.eq(user), posts::title.eq(title))))
        }

        /// The names that the session sees.
        #[track_caller]
        pub fn names(session: &Session<Conn>) -> Result<Vec<String>> {
            session.load(users::table.order(users::id).select(users::name))
        }

        /// One raw statement, or several.
        #[track_caller]
        pub fn raw(session: &Session<Conn>, sql: &str) -> Result<()> {
            session.with(|conn| conn.batch_execute(sql))
        }
    };
}

mod any_mariadb;
mod any_postgres;
mod any_sqlite;
mod mariadb;
mod postgres;
mod sqlite;

diesel::table! {
    users (id) {
        id -> Integer,
        name -> Text,
        age -> Nullable<Integer>,
    }
}

diesel::table! {
    posts (id) {
        id -> Integer,
        user_id -> Integer,
        title -> Text,
    }
}

diesel::joinable!(posts -> users (user_id));
diesel::allow_tables_to_appear_in_same_query!(posts, users);

#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable, Identifiable, QueryableByName)]
#[diesel(table_name = users)]
pub struct User {
    pub id: i32,
    pub name: String,
    pub age: Option<i32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Queryable, Selectable, Identifiable, Associations)]
#[diesel(table_name = posts, belongs_to(User))]
pub struct Post {
    pub id: i32,
    pub user_id: i32,
    pub title: String,
}

#[derive(Debug, Insertable)]
#[diesel(table_name = users)]
pub struct NewUser<'n> {
    pub name: &'n str,
    pub age: Option<i32>,
}

#[derive(Debug, QueryableByName)]
pub struct Value {
    #[diesel(sql_type = Text)]
    pub value: String,
}

const SQLITE_TABLES: &str = "
    CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, age INTEGER);
    CREATE TABLE posts (
        id INTEGER PRIMARY KEY,
        user_id INTEGER NOT NULL REFERENCES users (id) DEFERRABLE INITIALLY DEFERRED,
        title TEXT NOT NULL
    );";

const POSTGRES_TABLES: &str = "
    CREATE TABLE users (id SERIAL PRIMARY KEY, name TEXT NOT NULL UNIQUE, age INTEGER);
    CREATE TABLE posts (
        id SERIAL PRIMARY KEY,
        user_id INTEGER NOT NULL REFERENCES users (id) DEFERRABLE INITIALLY DEFERRED,
        title TEXT NOT NULL
    );";

const MARIADB_TABLES: &str = "
    CREATE TABLE users (id INTEGER AUTO_INCREMENT PRIMARY KEY, name VARCHAR(100) NOT NULL UNIQUE, age INTEGER);
    CREATE TABLE posts (
        id INTEGER AUTO_INCREMENT PRIMARY KEY,
        user_id INTEGER NOT NULL,
        title VARCHAR(100) NOT NULL,
        FOREIGN KEY (user_id) REFERENCES users (id)
    );";

impl Kind {
    /// The server on which the kit makes databases. For SQLite the URL says that they are files.
    fn server(self) -> String {
        match self {
            Kind::Sqlite => "shop.sqlite".into(),
            Kind::Postgres => support::postgres().url(),
            Kind::Mariadb => support::mariadb().url(),
        }
    }

    fn tables(self) -> &'static str {
        match self {
            Kind::Sqlite => SQLITE_TABLES,
            Kind::Postgres => POSTGRES_TABLES,
            Kind::Mariadb => MARIADB_TABLES,
        }
    }
}

/// An application with a fresh database that has empty tables of users and posts.
pub struct Shop<C: SessionConnection> {
    test: TestApp<C>,
    storage: Storage,
}

/// The database of an application, for connections that the crate under test does not know.
struct Storage {
    kind: Kind,
    url: String,
}

impl<C: SessionConnection> Deref for Shop<C> {
    type Target = App<C>;

    fn deref(&self) -> &App<C> {
        &self.test
    }
}

impl<C: SessionConnection> Shop<C> {
    /// A second application beside the application of the test. It has one connection, so that tests which wait for it
    /// while they hold their own connections cannot fill a server.
    #[track_caller]
    pub fn open(db: &'static Database<C>, kind: Kind) -> Self {
        let setup = setup(db, kind, |config| config).expect("only a test that runs opens another one");
        Self::start(setup.max_size(1), kind)
    }

    fn start(setup: TestSetup<C>, kind: Kind) -> Self {
        let test = setup.start().unwrap_or_else(|error| panic!("{error}"));
        let storage = Storage { kind, url: test.url().to_owned() };
        if kind == Kind::Sqlite {
            // The application's first connection would do it, and could not do it while another connection writes.
            assert!(storage.connect().write("PRAGMA journal_mode = WAL"));
        }
        Self { test, storage }
    }

    pub fn url(&self) -> String {
        self.storage.url.clone()
    }

    /// The committed names of users, as another connection sees them.
    pub fn names(&self) -> Vec<String> {
        self.storage.ask("SELECT name AS value FROM users ORDER BY id")
    }

    /// The committed values of the column `value`, as another connection sees them.
    pub fn ask(&self, query: &str) -> Vec<String> {
        self.storage.ask(query)
    }

    /// The committed titles of posts.
    pub fn titles(&self) -> Vec<String> {
        self.storage.ask("SELECT title AS value FROM posts ORDER BY id")
    }

    /// A connection that the crate under test does not know. It does not wait for locks.
    pub fn other_connection(&self) -> OtherConnection {
        let mut other_connection = self.storage.connect();
        match self.storage.kind {
            Kind::Sqlite => {}
            Kind::Postgres => assert!(other_connection.write("SET lock_timeout = 1")),
            Kind::Mariadb => assert!(other_connection.write("SET innodb_lock_wait_timeout = 0")),
        }
        other_connection
    }

    /// Waits until no session of the server is in a transaction, as a connection that was closed may be for a moment.
    pub fn open_transactions(&self) -> i64 {
        support::wait::until_equal(0, Duration::from_secs(2), || self.storage.open_transactions())
    }

    /// Sessions in a transaction at this moment.
    pub fn in_transaction_now(&self) -> bool {
        self.storage.open_transactions() > 0
    }

    /// No connection is held, and no session is in a transaction.
    #[track_caller]
    pub fn assert_at_rest(&self) {
        let status = self.status();
        assert_eq!(status.in_use, 0, "{status}");
        assert_eq!(self.open_transactions(), 0, "{status}");
    }
}

impl Storage {
    fn connect(&self) -> OtherConnection {
        let connected = match self.kind {
            Kind::Sqlite => SqliteConnection::establish(&self.url).map(AnyConnection::Sqlite),
            Kind::Postgres => PgConnection::establish(&self.url).map(AnyConnection::Postgres),
            Kind::Mariadb => MysqlConnection::establish(&self.url).map(AnyConnection::Mysql),
        };
        OtherConnection(connected.expect("the database answers"))
    }

    /// As the server counts them. For a file it is whether another connection writes.
    fn open_transactions(&self) -> i64 {
        let name = self.url.rsplit('/').next().unwrap_or_default();
        match self.kind {
            Kind::Sqlite => i64::from(!self.connect().write("BEGIN IMMEDIATE; ROLLBACK")),
            Kind::Postgres => support::postgres().open_transactions(name),
            Kind::Mariadb => support::mariadb().open_transactions(name),
        }
    }

    /// The column `value`, through another connection.
    fn ask(&self, query: &str) -> Vec<String> {
        let rows: Vec<Value> = sql_query(query).load(&mut self.connect().0).expect("the query is answered");
        rows.into_iter().map(|row| row.value).collect()
    }
}

/// A connection that the crate under test does not know.
pub struct OtherConnection(AnyConnection);

impl OtherConnection {
    /// Whether the database took it.
    pub fn write(&mut self, sql: &str) -> bool {
        self.0.batch_execute(sql).is_ok()
    }

    /// The rows of a query.
    pub fn load<T: diesel::deserialize::QueryableByName<<AnyConnection as Connection>::Backend> + 'static>(
        &mut self,
        query: &str,
    ) -> Vec<T> {
        sql_query(query).load(&mut self.0).expect("the query is answered")
    }
}

/// The setup of a test, or none if its server is switched off.
#[track_caller]
pub fn setup<C: SessionConnection>(
    db: &'static Database<C>,
    kind: Kind,
    options: impl FnOnce(Config) -> Config,
) -> Option<TestSetup<C>> {
    static SERIAL: AtomicUsize = AtomicUsize::new(1);
    if !support::enabled(kind) {
        return None;
    }
    // No two database objects have an application of one name, unless a test wants it.
    let name = format!("shop {}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let config = options(Config::new(kind.server()));
    Some(TestSetup::of(db).named(name).config(config).fixture(Fixture::sql("tables", kind.tables())))
}

/// The body of `test` for each database.
#[track_caller]
pub fn run_test<C: SessionConnection>(
    setup: Option<TestSetup<C>>,
    kind: Kind,
    body: impl FnOnce(&Shop<C>) -> Result<()>,
) {
    let Some(setup) = setup else { return };
    let shop = Shop::start(setup, kind);
    if let Err(error) = body(&shop) {
        panic!("{error}");
    }
    shop.assert_at_rest();
}

/// The message of the panic that `body` ends with.
#[track_caller]
pub fn panic_of<T>(body: impl FnOnce() -> T) -> String {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(_) => panic!("it did not panic"),
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(
            || panic.downcast_ref::<String>().expect("a panic with a message").clone(),
            |text| (*text).to_owned(),
        ),
    }
}

/// An error type of the program's own.
#[derive(Debug)]
pub enum Trouble {
    Session(Error),
    OutOfStock(&'static str),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble::Session(error)
    }
}

impl From<diesel::result::Error> for Trouble {
    fn from(error: diesel::result::Error) -> Self {
        Trouble::Session(error.into())
    }
}

/// Whether a place is that line of that file of the suite.
#[track_caller]
pub fn assert_place(place: &std::panic::Location<'_>, file: &str, line: u32) {
    assert!(place.file().ends_with(file) && place.line() == line, "{place} is not {file}:{line}");
}

/// Diesel's kind of a database error.
pub fn kind_of(error: &Error) -> Option<&DatabaseErrorKind> {
    match error.database_error() {
        Some(diesel::result::Error::DatabaseError(kind, _)) => Some(kind),
        _ => None,
    }
}
