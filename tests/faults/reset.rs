//! A connection that is checked in with leftovers while its server does not answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::r2d2::ConnectionManager;
use diesel_session::pool::Reset;
use diesel_session::{App, Config};

use crate::fixtures::{COUNT, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::postgres;
use crate::support::proxy::{Mode, Proxy};

for_each_database!(only postgres =>
    reset_without_an_answer_closes_the_connection,
    reset_removes_what_plain_r2d2_passes_on,
);

const PATIENCE: Duration = Duration::from_millis(300);

/// The reset is waited for no longer than a connect, and costs a connection, not a permit.
fn returned_to_silence(app: &App<PgConnection>, freeze: &dyn Fn(), thaw: &dyn Fn()) {
    // A typed statement shows that the reset is what meets the silence: nothing is sent after it.
    let session = app.open_session().unwrap();
    session.send("SELECT pg_advisory_lock(45)").unwrap();
    let mut conn = session.connection().unwrap();
    conn.batch_execute("COMMIT").unwrap();
    drop(conn);
    session.rollback().unwrap();
    assert_eq!(app.status().open, 0, "an invalidated connection is closed without a reset");

    app.scope()
        .autocommit()
        .run(|| {
            let session = PgConnection::db().session()?;
            let mut conn = session.connection()?;
            conn.batch_execute("SELECT pg_advisory_lock(45)")?;
            freeze();
            let started = Instant::now();
            drop(conn);
            let took = started.elapsed();
            assert!(
                took >= PATIENCE && took < PATIENCE + Duration::from_millis(200),
                "a reset ends at `connect_timeout`: {took:?}"
            );
            Ok::<_, diesel_session::Error>(())
        })
        .unwrap();
    let status = app.status();
    thaw();
    assert_eq!((status.open, status.in_use), (0, 0), "{status}");
    // Its place is free, which is the only one.
    assert_eq!(app.open_session().unwrap().number("SELECT 1::bigint AS number").unwrap(), 1);
}

fn reset_without_an_answer_closes_the_connection() {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!("asked for") };
    let config = |url: String| Config::new(url).max_size(1).connect_timeout(PATIENCE);
    let app = PgConnection::app(config(test_db.url()));
    let pids = || postgres().backend_pids(database.name());
    let freeze = || pids().into_iter().for_each(|pid| postgres().sigstop_backend(pid));
    let thaw = || pids().into_iter().for_each(|pid| postgres().sigcont(pid));
    returned_to_silence(&app, &freeze, &thaw);
    app.dispose().unwrap();

    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = PgConnection::app(config(test_db.url_at(proxy.port())));
    returned_to_silence(&app, &|| proxy.set(Mode::Silent), &|| proxy.set(Mode::Pass));
    app.dispose().unwrap();
    test_db.assert_connections(0);
}

/// With the control: Diesel and r2d2 alone hand on what was left.
fn reset_removes_what_plain_r2d2_passes_on() {
    const LEAVE: &str = "SET search_path = nowhere; SELECT pg_advisory_lock(46)";
    const LEFT: &str = "SELECT count(*) + (current_schema() IS NULL)::int AS number FROM pg_locks \
         WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    let test_db = TestDatabase::postgres();
    let pool = r2d2::Pool::builder().max_size(1).build(ConnectionManager::<PgConnection>::new(test_db.url())).unwrap();
    let mut conn = pool.get().unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        conn.batch_execute(LEAVE).unwrap();
        panic!("on purpose")
    }));
    assert!(caught.is_err());
    drop(conn);
    assert_eq!(pool.get().unwrap().number(LEFT).unwrap(), 2, "the control");
    drop(pool);

    PgConnection::app(test_db.config()).create_all().unwrap();
    for (reset, left) in [(Reset::WhenDirty, 0), (Reset::Never, 2)] {
        let app = PgConnection::app(test_db.config().max_size(1).reset(reset));
        app.run(|| {
            PgConnection::db().session()?.with(|conn| {
                let caught = catch_unwind(AssertUnwindSafe(|| {
                    conn.batch_execute(LEAVE).unwrap();
                    panic!("on purpose")
                }));
                assert!(caught.is_err());
                Ok(())
            })
        })
        .unwrap();
        assert_eq!(app.open_session().unwrap().number(LEFT).unwrap(), left, "{reset:?}");
        let schema = app.open_session().unwrap().number(COUNT);
        assert_eq!(schema.is_ok(), reset == Reset::WhenDirty, "{schema:?}");
        assert_eq!(app.dispose_report().unwrap().closed, 1);
    }
}
