//! Everything at once: broken checkins, connects that fail, panic and take long, and connections that reach their
//! limits of age.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::pool::ConnectErrorKind;
use diesel_session::{App, Config, Database, Error, ErrorKind, Session};

use crate::fixtures::threads::together;
use crate::fixtures::{AnyConnection, SessionExt, TestConnection, TestDatabase, client_ports, connect_any};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(only mariadb => stressed_pool_on_mariadb_keeps_its_size_and_permits);
for_each_database!(only postgres =>
    stressed_pool_on_postgres_keeps_its_size_and_permits,
    stressed_pool_of_an_enum_keeps_its_size_and_permits,
);

const THREADS: usize = 32;
const ROUNDS: usize = 60;
const SIZE: u32 = 6;
const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS t";

#[diesel::declare_sql_function]
extern "SQL" {
    fn token() -> Integer;
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Owned by a function registered with a SQLite connection, so it goes exactly when the connection is closed.
struct Token;

impl Token {
    fn new() -> Self {
        MOST.fetch_max(LIVE.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Connects that failed or panicked.
static MISBEHAVED: AtomicUsize = AtomicUsize::new(0);

/// What goes wrong with the connect of that number: always the same.
fn misbehave(number: usize) -> ConnectionResult<()> {
    if matches!(number % 30, 7 | 13) {
        MISBEHAVED.fetch_add(1, Ordering::Relaxed);
    }
    match number % 30 {
        7 => Err(ConnectionError::BadConnection("asked to fail".into())),
        13 => resume_unwind(Box::new("asked to panic")),
        19 | 23 => {
            // A slow connect.
            thread::sleep(Duration::from_millis(15));
            Ok(())
        }
        _ => Ok(()),
    }
}

fn counted_sqlite(url: &str) -> ConnectionResult<SqliteConnection> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    misbehave(NUMBER.fetch_add(1, Ordering::Relaxed))?;
    let conn = SqliteConnection::establish(url)?;
    let token = Arc::new(Token::new());
    token_utils::register_nondeterministic_impl(&conn, move || {
        let _kept = &token;
        1
    })
    .map_err(ConnectionError::CouldntSetupConfiguration)?;
    Ok(conn)
}

macro_rules! misbehaving {
    ($name:ident, $connection:ty, $connect:expr) => {
        fn $name(url: &str) -> ConnectionResult<$connection> {
            static NUMBER: AtomicUsize = AtomicUsize::new(0);
            misbehave(NUMBER.fetch_add(1, Ordering::Relaxed))?;
            $connect(url)
        }
    };
}

misbehaving!(postgres, PgConnection, PgConnection::establish);
misbehaving!(mysql, MysqlConnection, MysqlConnection::establish);
misbehaving!(any, AnyConnection, connect_any);

/// One use of the pool. Every sixteenth leaves its connection broken, each in its own way.
fn use_once<C: TestConnection>(db: &Database<C>, app: &App<C>, seed: usize, kill: Option<&str>) -> Result<(), Error> {
    app.scope().read_only().run(|| {
        let session = db.session()?;
        match (seed % 64, kill) {
            (3, _) => {
                session.send("ROLLBACK")?;
                assert!(session.commit().is_err_and(|error| error.is_rollback_required()));
                Ok(())
            }
            (19, _) => {
                session.send("COMMIT")?;
                assert!(session.number(ONE).is_err_and(|error| error.is_rollback_required()));
                Ok(())
            }
            (35, _) => {
                session.begin()?;
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    session.with(|_| -> QueryResult<()> { resume_unwind(Box::new("asked to panic")) })
                }));
                assert!(panicked.is_err());
                Ok(())
            }
            (51, Some(kill)) => {
                session.begin()?;
                assert!(session.send(kill).is_err());
                Ok(())
            }
            _ => {
                assert_eq!(session.number(ONE)?, 1);
                session.commit()
            }
        }
    })
}

/// Whether an error is one that was asked for.
fn expected(error: &Error) -> bool {
    error.kind() == ErrorKind::Connect
        && error.connect_error_kind() == Some(ConnectErrorKind::Other)
        && error.to_string().contains("asked to")
}

fn stress<C: TestConnection>(connect: fn(&str) -> ConnectionResult<C>, config: Config, kill: Option<&str>) {
    let db = Database::<C>::without_migrations().connect_with(connect);
    let config = config.max_size(SIZE).acquire_timeout(Duration::from_secs(10));
    let config = config.idle_timeout(Duration::from_millis(3)).max_lifetime(Duration::from_millis(200));
    let app = db.init_app("stress", config).unwrap();
    // While one connection is in use, a failed connect fails one waiter; otherwise it would fail all of them.
    let held = hold_one(&app);
    let misbehaved = MISBEHAVED.load(Ordering::Relaxed);
    let failures = together(THREADS, |thread| {
        let mut failures = 0;
        for round in 0..ROUNDS {
            let seed = thread * 31 + round * 17;
            match use_once(&db, &app, seed, kill) {
                Ok(()) => {}
                Err(error) if expected(&error) => failures += 1,
                Err(error) => panic!("thread {thread}, round {round}: {error}"),
            }
            // Now and then the pool is unused for longer than its `idle_timeout`.
            if seed % 40 == 0 {
                thread::sleep(Duration::from_millis(7));
            }
        }
        failures
    });
    let failures: usize = failures.iter().sum();
    let misbehaved = MISBEHAVED.load(Ordering::Relaxed) - misbehaved;
    // A caller that got another connection meanwhile sees no error.
    assert!(misbehaved > 0 && failures <= misbehaved, "{failures} of {misbehaved} failures were told");
    drop(held);

    // At rest every permit is back, and nothing stays open for longer than it may.
    let quiet = || {
        let status = app.status();
        (status.holders.len(), status.waiting, status.connecting, status.open)
    };
    assert_eq!(wait::until_equal((0, 0, 0, 0), Duration::from_secs(5), quiet), (0, 0, 0, 0), "{}", app.status());
    // All of them at once, by one thread: sessions that begin to read, as SQLite has one writer only.
    app.scope().read_only().run(|| everything_is_free(&db, &app, SIZE)).unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
}

/// A session that has a connection.
fn hold_one<C: TestConnection>(app: &App<C>) -> Session<C> {
    loop {
        let session = app.open_session().unwrap();
        match session.number(ONE) {
            Ok(_) => return session,
            Err(error) => assert!(expected(&error), "{error}"),
        }
    }
}

/// Takes so many connections at once.
fn everything_is_free<C: TestConnection>(db: &Database<C>, app: &App<C>, count: u32) -> Result<(), Error> {
    let session = db.session()?;
    while let Err(error) = session.begin() {
        assert!(expected(&error), "{error}");
    }
    match count {
        1 => {
            assert_eq!(app.status().in_use, SIZE as usize);
            Ok(())
        }
        more => app.scope().read_only().run(|| everything_is_free(db, app, more - 1)),
    }
}

/// Looks at the kernel's table all the time: never more than the pool's size are open.
fn watched<C: TestConnection>(test_db: &TestDatabase, connect: fn(&str) -> ConnectionResult<C>, kill: &str) {
    let stop = AtomicBool::new(false);
    let (most, seen, samples) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // The table is not read at one instant; what stands in two readings was open between them.
                let (first, second) = (client_ports(test_db.port()), client_ports(test_db.port()));
                let both = second.iter().filter(|port| first.contains(port)).count();
                most.fetch_max(both, Ordering::Relaxed);
                seen.fetch_max(first.len(), Ordering::Relaxed);
                samples.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(500));
            }
        });
        // The kernel's table is slow to read while it still lists the connections of earlier tests.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while samples.load(Ordering::Relaxed) <= 10 {
                stress(connect, test_db.config(), Some(kill));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
    });
    let (most, seen, samples) = (most.into_inner(), seen.into_inner(), samples.into_inner());
    assert!(samples > 10 && seen > 1, "the watch saw at most {seen} in {samples} looks");
    assert!(most <= SIZE as usize, "{most} connections at once");
    test_db.assert_connections(0);
}

#[test]
fn stressed_pool_on_sqlite_keeps_its_size_and_permits() {
    let test_db = TestDatabase::sqlite();
    stress(counted_sqlite, test_db.config(), None);
    let most = MOST.load(Ordering::SeqCst);
    assert!(most > 1 && most <= SIZE as usize, "{most} connections at once");
    assert_eq!(LIVE.load(Ordering::SeqCst), 0);
    test_db.assert_connections(0);
}

fn stressed_pool_on_postgres_keeps_its_size_and_permits() {
    watched(&TestDatabase::postgres(), postgres, "SELECT pg_terminate_backend(pg_backend_pid())");
}

fn stressed_pool_on_mariadb_keeps_its_size_and_permits() {
    watched(&TestDatabase::mariadb(), mysql, "KILL CONNECTION_ID()");
}

fn stressed_pool_of_an_enum_keeps_its_size_and_permits() {
    watched(&TestDatabase::postgres(), any, "SELECT pg_terminate_backend(pg_backend_pid())");
}
