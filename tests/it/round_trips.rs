//! How often a program waits for the server, counted by a proxy between them.

use diesel::prelude::*;
use diesel_session::pool::Reset;
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
    let number = usize::from(matches!(test_db, TestDatabase::Postgres(_)));
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
        ("a transaction", 1 + ends, round_trips(&mut || drop(read(scope())))),
        ("a read-only transaction", 1 + ends, round_trips(&mut || drop(read(scope().read_only())))),
        ("rolled back", 1 + ends, round_trips(&mut || drop(scope().run(C::read_in_session).unwrap()))),
        ("one that can be asked for", 1 + number + ends, round_trips(&mut || drop(read(scope().resolvable())))),
        (
            "nothing that can be asked for",
            0,
            round_trips(&mut || scope().resolvable().run_and_commit(|| C::db().session()?.commit()).unwrap()),
        ),
        ("SELECT, autocommit, to be asked for", 1, round_trips(&mut || drop(read(scope().autocommit().resolvable())))),
        (
            "rolled back, with nothing to ask for",
            1 + ends,
            round_trips(&mut || drop(scope().resolvable().run(C::read_in_session).unwrap())),
        ),
        ("a transaction, plain Diesel", 1 + ends, round_trips(&mut || drop(plain.transaction(C::read).unwrap()))),
        (
            "two statements in one transaction",
            2 + ends,
            round_trips(&mut || {
                scope().run_and_commit(|| C::read_in_session().and_then(|_| C::read_in_session())).unwrap();
            }),
        ),
        ("a boxed query", 1 + ends, round_trips(&mut || run(boxed))),
        ("a struct's own columns", 1 + ends, round_trips(&mut || run(selected))),
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
        ("a transaction after a reset", 1 + ends, round_trips(&mut || drop(read(scope())))),
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
