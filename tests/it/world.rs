//! The vocabulary of the tests, and the six worlds in which the same tests run.
//!
//! A world is a connection type and a database: each of the three by itself, and an enum over all three connected to
//! each of them. The files of the suite are modules of every world, and get from it what differs.

// The suite is one set of files and six sets of modules. Not every module uses all of the vocabulary.
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
pub use diesel_session::testing::Fixture;
use diesel_session::testing::{TestApp, TestSetup};
pub use diesel_session::{
    App, Config, Database, Error, Isolation, OptionalExt, Place, Result, Session, SessionConnection,
};

use crate::support;

/// Asserts that a value is of a form, and shows it where it is not.
macro_rules! assert_is {
    ($value:expr, $pattern:pat $(if $guard:expr)?) => {
        match $value {
            $pattern $(if $guard)? => {}
            other => panic!("not {}: {other:?}", stringify!($pattern $(if $guard)?)),
        }
    };
}

/// What a world consists of.
macro_rules! world {
    ($kind:ident, $conn:ty, $databases:expr) => {
        pub use crate::world::*;

        pub const KIND: Kind = Kind::$kind;
        pub type Conn = $conn;
        pub static DB: Database<Conn> = $databases;
        /// One more database object, to be given hooks.
        pub const fn connected() -> Database<Conn> {
            $databases
        }

        /// A second database object of the same connection type.
        pub static OTHER: Database<Conn> = $databases;
        /// A second database object of another connection type, in most worlds.
        pub static AUDIT: Database<SqliteConnection> = Database::without_migrations();

        /// Runs a test with an application of its own, and makes sure that it leaves nothing behind.
        #[track_caller]
        pub fn test(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, |config| config), KIND, body);
        }

        /// The same with options; how many connections there are is the kit's to say.
        #[track_caller]
        pub fn test_with(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, options), KIND, body);
        }

        /// The same with one connection, so that every scope gets the one that the scope before has used.
        #[track_caller]
        pub fn test_alone(body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            test_alone_with(|config| config, body);
        }

        /// The same with options.
        #[track_caller]
        pub fn test_alone_with(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(setup(&DB, KIND, options).map(|setup| setup.max_size(1)), KIND, body);
        }

        /// The same with rows or tables that are there when the test begins.
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

        /// A post by a user who need not exist until the transaction ends, except on MariaDB.
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

/// One program for every database.
#[derive(diesel::MultiConnection)]
#[allow(missing_debug_implementations)]
pub enum AnyConnection {
    Postgres(PgConnection),
    Mysql(MysqlConnection),
    Sqlite(SqliteConnection),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
    Mariadb,
}

impl Kind {
    fn is_switched_off(self) -> bool {
        match self {
            Kind::Sqlite => false,
            Kind::Postgres => !support::enabled(support::Kind::Postgres),
            Kind::Mariadb => !support::enabled(support::Kind::Mysql),
        }
    }

    /// Where the kit makes databases; of SQLite's it is the form of the URL that says "a file".
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

/// An application with a fresh database; users and posts are there and empty.
pub struct Shop<C: SessionConnection> {
    test: TestApp<C>,
    place: Storage,
}

/// Where the data is, for those who look at it from outside: strangers see what is committed and nothing else.
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
    /// One more beside a test's own. It takes one connection, so that tests which hold theirs and wait for this one
    /// cannot fill a server.
    #[track_caller]
    pub fn open(db: &'static Database<C>, kind: Kind) -> Self {
        let setup = setup(db, kind, |config| config).expect("only a test that runs opens another one");
        Self::start(setup.max_size(1), kind)
    }

    fn start(setup: TestSetup<C>, kind: Kind) -> Self {
        let test = setup.start().unwrap_or_else(|error| panic!("{error}"));
        let place = Storage { kind, url: test.url().to_owned() };
        if kind == Kind::Sqlite {
            // The first of the application's connections would do it, and could not beside a stranger who writes.
            assert!(place.connect().write("PRAGMA journal_mode = WAL"));
        }
        Self { test, place }
    }

    pub fn url(&self) -> String {
        self.place.url.clone()
    }

    /// The committed names of users, as a stranger sees them.
    pub fn names(&self) -> Vec<String> {
        self.place.ask("SELECT name AS value FROM users ORDER BY id")
    }

    /// The committed values of the column `value`, as a stranger sees them.
    pub fn ask(&self, query: &str) -> Vec<String> {
        self.place.ask(query)
    }

    /// The committed titles of posts.
    pub fn titles(&self) -> Vec<String> {
        self.place.ask("SELECT title AS value FROM posts ORDER BY id")
    }

    /// Somebody else's connection, which waits for nobody's lock.
    pub fn stranger(&self) -> Stranger {
        let mut stranger = self.place.connect();
        match self.place.kind {
            Kind::Sqlite => {}
            Kind::Postgres => assert!(stranger.write("SET lock_timeout = 1")),
            Kind::Mariadb => assert!(stranger.write("SET innodb_lock_wait_timeout = 0")),
        }
        stranger
    }

    /// Waits until no session of the server is in a transaction, as a connection that was closed may be for a moment.
    pub fn open_transactions(&self) -> i64 {
        support::wait::until_equal(0, Duration::from_secs(2), || self.place.open_transactions())
    }

    /// Sessions in a transaction at this moment.
    pub fn in_transaction_now(&self) -> bool {
        self.place.open_transactions() > 0
    }

    /// Nothing is held, nothing is in a transaction.
    #[track_caller]
    pub fn assert_at_rest(&self) {
        let status = self.status();
        assert_eq!(status.in_use, 0, "{status}");
        assert_eq!(self.open_transactions(), 0, "{status}");
    }
}

impl Storage {
    fn connect(&self) -> Stranger {
        let connected = match self.kind {
            Kind::Sqlite => SqliteConnection::establish(&self.url).map(AnyConnection::Sqlite),
            Kind::Postgres => PgConnection::establish(&self.url).map(AnyConnection::Postgres),
            Kind::Mariadb => MysqlConnection::establish(&self.url).map(AnyConnection::Mysql),
        };
        Stranger(connected.expect("the database answers"))
    }

    /// As the server counts them; of a file only whether somebody writes.
    fn open_transactions(&self) -> i64 {
        let name = self.url.rsplit('/').next().unwrap_or_default();
        match self.kind {
            Kind::Sqlite => i64::from(!self.connect().write("BEGIN IMMEDIATE; ROLLBACK")),
            Kind::Postgres => support::postgres().open_transactions(name),
            Kind::Mariadb => support::mariadb().open_transactions(name),
        }
    }

    /// The column `value`, through a connection that nobody else knows of.
    fn ask(&self, query: &str) -> Vec<String> {
        let rows: Vec<Value> = sql_query(query).load(&mut self.connect().0).expect("the query is answered");
        rows.into_iter().map(|row| row.value).collect()
    }
}

/// A connection that the crate under test knows nothing of.
pub struct Stranger(AnyConnection);

impl Stranger {
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

/// What a test asks the kit for; nothing where its server is switched off.
#[track_caller]
pub fn setup<C: SessionConnection>(
    db: &'static Database<C>,
    kind: Kind,
    options: impl FnOnce(Config) -> Config,
) -> Option<TestSetup<C>> {
    static SERIAL: AtomicUsize = AtomicUsize::new(1);
    if kind.is_switched_off() {
        return None;
    }
    // No two database objects have an application of one name, unless a test wants it.
    let name = format!("shop {}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let config = options(Config::new(kind.server()));
    Some(TestSetup::of(db).named(name).config(config).fixture(Fixture::sql("tables", kind.tables())))
}

/// The body of `test` in each world.
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
pub fn assert_place(place: Place, file: &str, line: u32) {
    assert!(place.file().ends_with(file) && place.line() == line, "{place} is not {file}:{line}");
}

/// Diesel's kind of a database error.
pub fn kind_of(error: &Error) -> Option<&DatabaseErrorKind> {
    match error.diesel() {
        Some(diesel::result::Error::DatabaseError(kind, _)) => Some(kind),
        _ => None,
    }
}
