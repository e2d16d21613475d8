//! How often a program waits for the server, counted by a proxy between them.

use std::time::Duration;

use diesel::prelude::*;
use diesel_session::pool::Reset;
use diesel_session::session::Isolation;
use diesel_session::{Config, Error, Scope};

use crate::fixtures::{TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::proxy::Proxy;

for_each_database!(only mariadb => round_trips_on_mariadb_are_the_documented_ones);
for_each_database!(only postgres => round_trips_on_postgres_are_the_documented_ones);

diesel::table! {
    entries (id) { id -> Integer, author -> Text, message -> Text, }
}

type Entry = (i32, String, String);

#[derive(Queryable, Selectable)]
#[diesel(table_name = entries)]
#[allow(dead_code)]
struct Author {
    author: String,
}

fn by_key() -> diesel::dsl::Find<entries::table, i32> {
    entries::table.find(1)
}

type Rename =
    diesel::dsl::Update<diesel::dsl::Find<entries::table, i32>, diesel::dsl::Eq<entries::author, &'static str>>;

fn rename() -> Rename {
    diesel::update(by_key()).set(entries::author.eq("Ada"))
}

/// What a connection type has to tell this file: the statements are typed, so each is written out for it.
trait Reads: TestConnection {
    /// Of a `BEGIN`, a `COMMIT` or another batch: Diesel's MySQL driver allows several statements before each and
    /// forbids them after it.
    const OF_BEGIN: usize;

    /// Of the reset of a connection on which code of the program ran.
    const OF_RESET: usize;

    fn read(&mut self) -> QueryResult<Option<Entry>>;
    fn boxed_in_session() -> Result<Vec<String>, Error>;
    fn selected_in_session() -> Result<Vec<Author>, Error>;
    fn fragment_in_session() -> Result<i32, Error>;
    fn read_in_session() -> Result<Option<Entry>, Error>;
    fn write_in_session() -> Result<(), Error>;
    fn write(&mut self) -> QueryResult<usize>;
}

macro_rules! reads {
    ($connection:ty, $of_begin:literal, $of_reset:literal) => {
        impl Reads for $connection {
            const OF_BEGIN: usize = $of_begin;
            const OF_RESET: usize = $of_reset;

            fn boxed_in_session() -> Result<Vec<String>, Error> {
                let boxed = entries::table.select(entries::author).into_boxed();
                Self::db().session()?.load(boxed.filter(entries::id.eq(1)))
            }

            fn selected_in_session() -> Result<Vec<Author>, Error> {
                Self::db().session()?.load(entries::table.find(1).select(Author::as_select()))
            }

            fn fragment_in_session() -> Result<i32, Error> {
                Self::db().session()?.get_result(diesel::select(diesel::dsl::sql::<diesel::sql_types::Integer>("1")))
            }

            fn read(&mut self) -> QueryResult<Option<Entry>> {
                by_key().get_result(self).optional()
            }

            fn read_in_session() -> Result<Option<Entry>, Error> {
                use diesel_session::OptionalExt;
                Self::db().session()?.get_result(by_key()).optional()
            }

            fn write_in_session() -> Result<(), Error> {
                Self::db().session()?.execute(rename()).map(drop)
            }

            fn write(&mut self) -> QueryResult<usize> {
                rename().execute(self)
            }
        }
    };
}

reads!(PgConnection, 1, 1);
reads!(MysqlConnection, 3, 0);

fn counted<C: Reads>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let url = test_db.url_at(proxy.port());
    let (app, mut plain) = (C::app(Config::new(&url)), C::establish(&url).unwrap());
    app.create_all().unwrap();
    let pool = |ping| {
        let builder = r2d2::Pool::builder().max_size(1).test_on_check_out(ping);
        builder.build(diesel::r2d2::ConnectionManager::<C>::new(&url)).unwrap()
    };
    let (pinging, trusting) = (pool(true), pool(false));

    // Statements are prepared at their first use, which is a round trip of its own.
    let scope = || app.scope();
    let read_committed = || app.scope().isolation(Isolation::ReadCommitted);
    let read = |scope: Scope<C>| scope.run_and_commit(C::read_in_session).unwrap();
    read(scope());
    read(scope().resolvable());
    plain.read().unwrap();
    for pool in [&pinging, &trusting] {
        pool.get().unwrap().read().unwrap();
    }

    let round_trips = |run: &mut dyn FnMut()| {
        let before = proxy.round_trips();
        run();
        proxy.round_trips() - before
    };
    let ends = 2 * C::OF_BEGIN;
    let is_postgres = matches!(test_db, TestDatabase::Postgres(_));
    let number = usize::from(is_postgres);
    // Diesel's MySQL driver waits twice for an UPDATE.
    let of_write = if is_postgres { 1 } else { 2 };
    // MariaDB's default is REPEATABLE READ, so a read begins the transaction.
    let read_ends = if is_postgres { 0 } else { ends };
    let two_reads = |scope: Scope<C>| {
        scope.run_and_commit(|| C::read_in_session().and_then(|_| C::read_in_session())).unwrap();
    };
    let write = |scope: Scope<C>| scope.run_and_commit(C::write_in_session).unwrap();
    let read_and_write = |scope: Scope<C>| {
        scope.run_and_commit(|| C::read_in_session().and_then(|_| C::write_in_session())).unwrap();
    };
    write(scope().resolvable());
    let raw = || C::db().session()?.with(|conn| conn.batch_execute("SELECT 1"));
    let run = |body: fn() -> Result<(), Error>| scope().run_and_commit(body).unwrap();
    let (boxed, selected): (fn() -> _, fn() -> _) =
        (|| C::boxed_in_session().map(drop), || C::selected_in_session().map(drop));
    let fragment = || C::fragment_in_session().map(drop);
    scope().run_and_commit(raw).unwrap();
    let never = C::app(Config::new(&url).reset(Reset::Never));
    never.run(raw).unwrap();
    [boxed, selected, fragment].into_iter().for_each(run);
    // Diesel's MySQL driver prepares a fragment each time.
    let unreset = round_trips(&mut || never.run(fragment).unwrap());
    let seen = [
        ("an empty context", 0, round_trips(&mut || app.enter(|| ()))),
        ("a session at rest", 0, round_trips(&mut || app.enter(|| drop(C::db().session().unwrap())))),
        ("a commit of nothing", 0, round_trips(&mut || app.context(|| C::db().session()?.commit()).unwrap())),
        ("SELECT, autocommit", 1, round_trips(&mut || drop(read(scope().autocommit())))),
        ("SELECT, plain Diesel", 1, round_trips(&mut || drop(plain.read().unwrap()))),
        ("SELECT, r2d2 without its ping", 1, round_trips(&mut || drop(trusting.get().unwrap().read().unwrap()))),
        ("SELECT, r2d2", 2, round_trips(&mut || drop(pinging.get().unwrap().read().unwrap()))),
        ("a default scope with one SELECT", 1 + read_ends, round_trips(&mut || drop(read(scope())))),
        ("a default scope with two SELECTs", 2 + read_ends, round_trips(&mut || two_reads(scope()))),
        ("one SELECT under READ COMMITTED", 1, round_trips(&mut || drop(read(read_committed())))),
        ("two SELECTs under READ COMMITTED", 2, round_trips(&mut || two_reads(read_committed()))),
        ("one SELECT, eagerly", 1 + ends, round_trips(&mut || drop(read(scope().begin_eagerly())))),
        ("two SELECTs, eagerly", 2 + ends, round_trips(&mut || two_reads(scope().begin_eagerly()))),
        (
            "a write, plain Diesel",
            of_write + ends,
            round_trips(&mut || {
                plain.transaction(C::write).unwrap();
            }),
        ),
        ("a write", of_write + ends, round_trips(&mut || write(scope()))),
        ("a write, eagerly", of_write + ends, round_trips(&mut || write(scope().begin_eagerly()))),
        ("a read and a write", 1 + of_write + ends, round_trips(&mut || read_and_write(scope()))),
        (
            "a read and a write, eagerly",
            1 + of_write + ends,
            round_trips(&mut || read_and_write(scope().begin_eagerly())),
        ),
        ("a read-only transaction", 1 + ends, round_trips(&mut || drop(read(scope().read_only())))),
        ("a read, rolled back", 1 + read_ends, round_trips(&mut || drop(scope().run(C::read_in_session).unwrap()))),
        (
            "a write, rolled back",
            of_write + ends,
            round_trips(&mut || scope().discard().run(C::write_in_session).unwrap()),
        ),
        ("a write that can be asked for", of_write + number + ends, round_trips(&mut || write(scope().resolvable()))),
        ("a read that can be asked for", 1 + read_ends, round_trips(&mut || drop(read(scope().resolvable())))),
        (
            "nothing that can be asked for",
            0,
            round_trips(&mut || scope().resolvable().run_and_commit(|| C::db().session()?.commit()).unwrap()),
        ),
        ("SELECT, autocommit, to be asked for", 1, round_trips(&mut || drop(read(scope().autocommit().resolvable())))),
        (
            "rolled back, with nothing to ask for",
            1 + read_ends,
            round_trips(&mut || drop(scope().resolvable().run(C::read_in_session).unwrap())),
        ),
        ("a transaction, plain Diesel", 1 + ends, round_trips(&mut || drop(plain.transaction(C::read).unwrap()))),
        ("a boxed query", 1 + read_ends, round_trips(&mut || run(boxed))),
        ("a struct's own columns", 1 + read_ends, round_trips(&mut || run(selected))),
        ("raw SQL", C::OF_BEGIN + ends + C::OF_RESET, round_trips(&mut || scope().run_and_commit(raw).unwrap())),
        ("a fragment", unreset + C::OF_RESET, round_trips(&mut || run(fragment))),
        (
            "a connection checked out for nothing",
            0,
            round_trips(&mut || scope().autocommit().run(|| C::db().session()?.with(|_| Ok(()))).unwrap()),
        ),
        ("raw SQL, autocommit", C::OF_BEGIN + C::OF_RESET, round_trips(&mut || scope().autocommit().run(raw).unwrap())),
        ("raw SQL, never reset", C::OF_BEGIN + ends, round_trips(&mut || never.run(raw).unwrap())),
        // What Diesel has prepared is still prepared.
        ("a SELECT after a reset", 1 + read_ends, round_trips(&mut || drop(read(scope())))),
    ];
    for (what, wanted, seen) in seen {
        assert_eq!(seen, wanted, "{what}");
    }
    // The limit of the first scope stays on the connection, which has this limit for the following scopes.
    let limited = || read_committed().deadline(Duration::from_secs(20));
    read(limited());
    let seen = [
        ("one SELECT with a deadline", 1, round_trips(&mut || drop(read(limited())))),
        ("two SELECTs with a deadline", 2, round_trips(&mut || two_reads(limited()))),
    ];
    for (what, wanted, seen) in seen {
        assert_eq!(seen, wanted, "{what}");
    }
}

fn round_trips_on_postgres_are_the_documented_ones() {
    counted::<PgConnection>(&TestDatabase::postgres());
}

fn round_trips_on_mariadb_are_the_documented_ones() {
    counted::<MysqlConnection>(&TestDatabase::mariadb());
}
