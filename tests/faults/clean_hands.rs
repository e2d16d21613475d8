//! A connection that comes back with something left on it, to a server that does not answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::r2d2::ConnectionManager;
use diesel_session::{App, Config, Reset};

use crate::fixtures::{COUNT, Conn, Site, Speak};
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, enabled, postgres};

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
    assert_eq!(app.status().open, 0, "doomed: closed without a reset");

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
            assert!(took >= PATIENCE && took < PATIENCE + Duration::from_millis(200), "{took:?}");
            Ok::<_, diesel_session::Error>(())
        })
        .unwrap();
    let status = app.status();
    thaw();
    assert_eq!((status.open, status.in_use), (0, 0), "{status}");
    // Its place is free, which is the only one.
    assert_eq!(app.open_session().unwrap().number("SELECT 1::bigint AS number").unwrap(), 1);
}

#[test]
fn a_reset_that_gets_no_answer_costs_the_connection() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let Site::Postgres(database) = &site else { unreachable!("asked for") };
    let config = |url: String| Config::new(url).max_size(1).connect_timeout(PATIENCE);
    let app = PgConnection::app(config(site.url()));
    let pids = || postgres().backend_pids(database.name());
    let freeze = || pids().into_iter().for_each(|pid| postgres().sigstop_backend(pid));
    let thaw = || pids().into_iter().for_each(|pid| postgres().sigcont(pid));
    returned_to_silence(&app, &freeze, &thaw);
    app.dispose().unwrap();

    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let app = PgConnection::app(config(site.url_at(proxy.port())));
    returned_to_silence(&app, &|| proxy.set(Mode::Silent), &|| proxy.set(Mode::Pass));
    app.dispose().unwrap();
    site.assert_connections(0);
}

/// With the control: Diesel and r2d2 alone hand on what was left.
#[test]
fn what_diesel_with_r2d2_hands_on_is_not_handed_on_here() {
    if !enabled(Kind::Postgres) {
        return;
    }
    const LEAVE: &str = "SET search_path = nowhere; SELECT pg_advisory_lock(46)";
    const LEFT: &str = "SELECT count(*) + (current_schema() IS NULL)::int AS number FROM pg_locks \
         WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    let site = Site::postgres();
    let pool = r2d2::Pool::builder().max_size(1).build(ConnectionManager::<PgConnection>::new(site.url())).unwrap();
    let mut conn = pool.get().unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| {
        conn.batch_execute(LEAVE).unwrap();
        panic!("on purpose")
    }));
    assert!(caught.is_err());
    drop(conn);
    assert_eq!(pool.get().unwrap().number(LEFT).unwrap(), 2, "the control");
    drop(pool);

    PgConnection::app(site.config()).create_all().unwrap();
    for (reset, left) in [(Reset::WhenDirty, 0), (Reset::Never, 2)] {
        let app = PgConnection::app(site.config().max_size(1).reset(reset));
        app.scope()
            .commit_on_ok()
            .run(|| {
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
