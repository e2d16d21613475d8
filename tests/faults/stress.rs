//! Everything at once: broken returns, connects that fail, panic and take long, and ageing beside them.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, Config, ConnectErrorKind, Database, Error, Session};

use crate::fixtures::threads::together;
use crate::fixtures::{Any, Conn, Site, Speak, client_ports, connect_any};
use crate::support::{Kind, enabled, wait};

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
misbehaving!(any, Any, connect_any);

/// One use of the pool. Every sixteenth leaves its connection broken, each in its own way.
fn use_once<C: Conn>(db: &Database<C>, app: &App<C>, seed: usize, kill: Option<&str>) -> Result<(), Error> {
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
    matches!(error, Error::Connect { kind: ConnectErrorKind::Other, message, .. } if message.contains("asked to"))
}

fn stress<C: Conn>(connect: fn(&str) -> ConnectionResult<C>, config: Config, kill: Option<&str>) {
    let db = Database::<C>::without_migrations().connect_with(connect);
    let config = config.max_size(SIZE).acquire_timeout(Duration::from_secs(10));
    let config = config.idle_timeout(Duration::from_millis(3)).max_lifetime(Duration::from_millis(200));
    let app = db.init_app("stress", config).unwrap();
    // While one connection is in use, a failed connect fails one waiter; otherwise it would fail all of them.
    let held = hold_one(&app);
    let (started, misbehaved) = (Instant::now(), MISBEHAVED.load(Ordering::Relaxed));
    let failures = together(THREADS, |thread| {
        let mut failures = 0;
        for round in 0..ROUNDS {
            let seed = thread * 31 + round * 17;
            match use_once(&db, &app, seed, kill) {
                Ok(()) => {}
                Err(error) if expected(&error) => failures += 1,
                Err(error) => panic!("thread {thread}, round {round}: {error}"),
            }
            // Now and then the pool is left alone for long enough to age.
            if seed % 40 == 0 {
                thread::sleep(Duration::from_millis(7));
            }
        }
        failures
    });
    let failures: usize = failures.iter().sum();
    let misbehaved = MISBEHAVED.load(Ordering::Relaxed) - misbehaved;
    // A caller who has been served otherwise meanwhile is not told.
    assert!(misbehaved > 0 && failures <= misbehaved, "{failures} of {misbehaved} failures were told");
    drop(held);
    assert!(started.elapsed() < Duration::from_secs(60));

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
fn hold_one<C: Conn>(app: &App<C>) -> Session<C> {
    loop {
        let session = app.open_session().unwrap();
        match session.number(ONE) {
            Ok(_) => return session,
            Err(error) => assert!(expected(&error), "{error}"),
        }
    }
}

/// Takes so many connections at once.
fn everything_is_free<C: Conn>(db: &Database<C>, app: &App<C>, count: u32) -> Result<(), Error> {
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
fn watched<C: Conn>(site: &Site, connect: fn(&str) -> ConnectionResult<C>, kill: &str) {
    let stop = AtomicBool::new(false);
    let (most, seen, samples) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // The table is not read at one instant; what stands in two readings was open between them.
                let (first, second) = (client_ports(site.port()), client_ports(site.port()));
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
                stress(connect, site.config(), Some(kill));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
    });
    let (most, seen, samples) = (most.into_inner(), seen.into_inner(), samples.into_inner());
    assert!(samples > 10 && seen > 1, "the watch saw at most {seen} in {samples} looks");
    assert!(most <= SIZE as usize, "{most} connections at once");
    site.assert_connections(0);
}

#[test]
fn sqlite_stress() {
    let site = Site::sqlite();
    stress(counted_sqlite, site.config(), None);
    let most = MOST.load(Ordering::SeqCst);
    assert!(most > 1 && most <= SIZE as usize, "{most} connections at once");
    assert_eq!(LIVE.load(Ordering::SeqCst), 0);
    site.assert_connections(0);
}

#[test]
fn postgres_stress() {
    if enabled(Kind::Postgres) {
        watched(&Site::postgres(), postgres, "SELECT pg_terminate_backend(pg_backend_pid())");
    }
}

#[test]
fn mysql_stress() {
    if enabled(Kind::Mysql) {
        watched(&Site::mysql(), mysql, "KILL CONNECTION_ID()");
    }
}

#[test]
fn any_stress() {
    if enabled(Kind::Postgres) {
        watched(&Site::postgres(), any, "SELECT pg_terminate_backend(pg_backend_pid())");
    }
}
