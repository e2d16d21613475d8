//! The vocabulary of the tests, and the six worlds in which the same tests run.
//!
//! A world is a connection type and a database: each of the three by itself, and an enum over all three connected to
//! each of them. The files of the suite are modules of every world, and get from it what differs.

// The suite is one set of files and six sets of modules. Not every module uses all of the vocabulary.
#![allow(clippy::duplicate_mod, dead_code, unreachable_pub, unused_imports)]

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

pub use diesel::connection::SimpleConnection;
pub use diesel::prelude::*;
pub use diesel::result::DatabaseErrorKind;
pub use diesel::sql_query;
pub use diesel::sql_types::{BigInt, Integer, Text};
pub use diesel_session::{
    App, Config, Database, Error, Isolation, Place, Result, ResultExt, Session, SessionConnection,
};

use crate::support::{self, TempSqlite};

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
            run_test(&DB, KIND, Config::new, body);
        }

        /// The same with options.
        #[track_caller]
        pub fn test_with(options: impl FnOnce(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
            run_test(&DB, KIND, |url| options(Config::new(url)), body);
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
    PRAGMA journal_mode = WAL;
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
}

/// An application with a fresh database; users and posts are there and empty.
pub struct Shop<C: SessionConnection> {
    app: App<C>,
    db: &'static Database<C>,
    place: Storage,
}

/// Where the data is, for those who look at it from outside.
enum Storage {
    Sqlite(TempSqlite),
    Postgres(support::Database),
    Mariadb(support::Database),
}

impl<C: SessionConnection> Deref for Shop<C> {
    type Target = App<C>;

    fn deref(&self) -> &App<C> {
        &self.app
    }
}

impl<C: SessionConnection> Shop<C> {
    pub fn open(db: &'static Database<C>, kind: Kind, config: impl FnOnce(String) -> Config) -> Self {
        static SERIAL: AtomicUsize = AtomicUsize::new(1);
        let place = match kind {
            Kind::Sqlite => Storage::Sqlite(TempSqlite::new()),
            Kind::Postgres => Storage::Postgres(support::postgres().create_database()),
            Kind::Mariadb => Storage::Mariadb(support::mariadb().create_database()),
        };
        place.prepare();
        let id = format!("shop {}", SERIAL.fetch_add(1, Ordering::Relaxed));
        let app = db.init_app(id, config(place.url())).expect("the application is registered");
        Self { app, db, place }
    }

    pub fn url(&self) -> String {
        self.place.url()
    }

    /// The committed names of users, as a stranger sees them.
    pub fn names(&self) -> Vec<String> {
        self.place.ask("SELECT name AS value FROM users ORDER BY id")
    }

    /// The committed titles of posts.
    pub fn titles(&self) -> Vec<String> {
        self.place.ask("SELECT title AS value FROM posts ORDER BY id")
    }

    /// Somebody else's connection, which waits for nobody's lock.
    pub fn stranger(&self) -> Stranger {
        let mut stranger = self.place.connect();
        match self.place {
            Storage::Sqlite(_) => {}
            Storage::Postgres(_) => assert!(stranger.write("SET lock_timeout = 1")),
            Storage::Mariadb(_) => assert!(stranger.write("SET innodb_lock_wait_timeout = 0")),
        }
        stranger
    }

    /// Waits until no session of the server is in a transaction, as a connection that was closed may be for a moment.
    pub fn open_transactions(&self) -> i64 {
        support::wait::until_equal(0, Duration::from_secs(2), || match &self.place {
            Storage::Sqlite(_) => i64::from(!self.place.connect().write("BEGIN IMMEDIATE; ROLLBACK")),
            Storage::Postgres(database) => support::postgres().open_transactions(database.name()),
            Storage::Mariadb(database) => support::mariadb().open_transactions(database.name()),
        })
    }

    /// Sessions in a transaction at this moment.
    pub fn in_transaction_now(&self) -> bool {
        match &self.place {
            Storage::Sqlite(_) => !self.place.connect().write("BEGIN IMMEDIATE; ROLLBACK"),
            Storage::Postgres(database) => support::postgres().open_transactions(database.name()) > 0,
            Storage::Mariadb(database) => support::mariadb().open_transactions(database.name()) > 0,
        }
    }

    /// Nothing is held, nothing is in a transaction.
    #[track_caller]
    pub fn assert_at_rest(&self) {
        let status = self.status();
        assert_eq!(status.in_use, 0, "{status}");
        assert_eq!(self.open_transactions(), 0, "{status}");
    }
}

impl<C: SessionConnection> Drop for Shop<C> {
    fn drop(&mut self) {
        // A test may have removed it.
        if let Ok(report) = self.db.remove_app(self.app.id()) {
            assert!(report.is_complete() || std::thread::panicking(), "{report}");
        }
    }
}

impl Storage {
    fn url(&self) -> String {
        match self {
            Storage::Sqlite(file) => file.url(),
            Storage::Postgres(database) | Storage::Mariadb(database) => database.url(),
        }
    }

    fn connect(&self) -> Stranger {
        let url = self.url();
        let connected = match self {
            Storage::Sqlite(_) => SqliteConnection::establish(&url).map(AnyConnection::Sqlite),
            Storage::Postgres(_) => PgConnection::establish(&url).map(AnyConnection::Postgres),
            Storage::Mariadb(_) => MysqlConnection::establish(&url).map(AnyConnection::Mysql),
        };
        Stranger(connected.expect("the database answers"))
    }

    fn prepare(&self) {
        let tables = match self {
            Storage::Sqlite(_) => SQLITE_TABLES,
            Storage::Postgres(_) => POSTGRES_TABLES,
            Storage::Mariadb(_) => MARIADB_TABLES,
        };
        self.connect().0.batch_execute(tables).expect("the tables can be made");
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
}

/// The body of `test` in each world.
#[track_caller]
pub fn run_test<C: SessionConnection>(
    db: &'static Database<C>,
    kind: Kind,
    config: impl FnOnce(String) -> Config,
    body: impl FnOnce(&Shop<C>) -> Result<()>,
) {
    if kind.is_switched_off() {
        return;
    }
    let _turn = Turn::wait();
    let shop = Shop::open(db, kind, config);
    if let Err(error) = body(&shop) {
        panic!("{error}");
    }
    shop.assert_at_rest();
}

/// One of the few tests that run at one time: the servers have 20 places each.
struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Turn {
    fn wait() -> Turn {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        while *running >= 3 {
            running = ENDED.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        *running += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
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
