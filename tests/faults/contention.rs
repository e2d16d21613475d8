//! Pools under contention: callers that wait, give up, probe servers and use other pools meanwhile.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, Config, Error, ErrorKind, Session};

use crate::fixtures::threads::together;
use crate::fixtures::{SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{postgres, wait};

for_each_database!(every_database => pools_with_tiny_timeouts_lose_no_permit);
for_each_database!(only postgres =>
    caller_with_a_short_deadline_closes_at_most_one_connection,
    session_in_a_thread_local_returns_its_connection,
    used_up_connection_limit_does_not_delay_the_probe_of_a_server,
    permit_of_a_closed_connection_returns_beside_a_frozen_server,
    on_connect_may_use_another_database_object,
    pinged_idle_connection_is_evicted_for_a_waiter,
    deadlock_is_refused_beside_a_caller_of_an_unreachable_server,
);

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Opens `count` connections at once and leaves them idle.
fn warm_up<C: TestConnection>(app: &App<C>, count: usize) {
    let sessions: Vec<_> = (0..count).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    drop(sessions);
    assert!(app.status().idle >= count);
}

/// The network refuses connects from now on and has cut the connections. `app` knows that a connection is lost, so it
/// looks at its idle connections before it checks them out.
fn refuse_and_cut(proxy: &Proxy, app: &App<PgConnection>) {
    let session = app.open_session().unwrap();
    session.number(ONE).unwrap();
    proxy.set(Mode::Refuse);
    proxy.cut_all();
    session.number(ONE).unwrap_err();
}

/// A pool that is larger than the limit: connections change hands a thousand times a second, and no caller reaches
/// `acquire_timeout`.
#[test]
fn waiter_for_the_connection_limit_is_not_overtaken_for_ever() {
    let test_db = TestDatabase::sqlite();
    let db = SqliteConnection::new_db().max_connections(2);
    // No caller waits for as long as that.
    let config = test_db.config().max_size(4).acquire_timeout(Duration::from_millis(500));
    let app = db.init_app(unique("app"), config).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    let errors = together(12, |_| {
        let mut errors = Vec::new();
        while Instant::now() < end {
            let outcome = app.scope().read_only().run(|| {
                db.session()?.begin()?;
                // The work of the holder.
                thread::sleep(Duration::from_millis(1));
                Ok::<_, Error>(())
            });
            errors.extend(outcome.err().map(|error| error.to_string().chars().take(150).collect::<String>()));
        }
        errors
    });
    assert_eq!(errors.concat(), Vec::<String>::new());
    app.dispose().unwrap();
}

/// A caller with a short deadline does not close the connections of others.
fn caller_with_a_short_deadline_closes_at_most_one_connection() {
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let app = PgConnection::app(Config::new(test_db.url_at(proxy.port())));
    warm_up(&app, 6);
    // The caller pings the connections that it is offered.
    test_db.lose_a_connection::<PgConnection>(&test_db.url_at(proxy.port()));
    proxy.set(Mode::Silent);
    let _late = app.scope().deadline(Duration::from_millis(50)).run(|| PgConnection::db().session()?.begin());
    proxy.set(Mode::Pass);
    let status = app.status();
    assert!(status.open >= 5, "{status}");
}

/// The caller that probes an unreachable server does not wait for the connection limit meanwhile.
fn used_up_connection_limit_does_not_delay_the_probe_of_a_server() {
    let (test_db, file) = (TestDatabase::postgres(), TestDatabase::postgres());
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let config = || Config::new(test_db.url_at(proxy.port())).acquire_timeout(Duration::from_secs(8));
    let limited = PgConnection::new_db().max_connections(1);
    let elsewhere = limited.init_app(unique("elsewhere"), file.config()).unwrap();
    let first = limited.init_app(unique("first"), config()).unwrap();
    let free = PgConnection::app(config());
    free.ping().unwrap();
    refuse_and_cut(&proxy, &free);
    thread::scope(|scope| {
        let waits = scope.spawn(|| free.ping());
        assert!(wait::until(Duration::from_secs(2), || free.status().waiting == 1));
        elsewhere
            .context(|| {
                limited.session()?.begin()?;
                scope.spawn(|| first.ping());
                assert!(wait::until(Duration::from_secs(2), || first.status().waiting == 1));
                // The server is away for a second, in which the caller without a limit tries again and again.
                thread::sleep(Duration::from_millis(1000));
                proxy.set(Mode::Pass);
                // The limit is used up until after this.
                waits.join().unwrap().unwrap();
                limited.session()?.rollback()?;
                Ok::<_, Error>(())
            })
            .unwrap();
    });
}

thread_local! {
    static KEPT: RefCell<Option<Session<PgConnection>>> = const { RefCell::new(None) };
}

/// A session in a thread's own storage ends with the thread, also if its transaction is invalidated.
fn session_in_a_thread_local_returns_its_connection() {
    let test_db = TestDatabase::postgres();
    let kept = PgConnection::app(test_db.config().max_size(1));
    for invalidated in [false, true] {
        let app = kept.0.clone();
        let ends = thread::spawn(move || {
            let session = app.open_session().unwrap();
            session.number(ONE).unwrap();
            if invalidated {
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    session.with(|_| -> QueryResult<()> { panic!("on purpose") })
                }));
            }
            KEPT.set(Some(session));
        });
        ends.join().unwrap();
        kept.ping().unwrap();
        assert_eq!(kept.status().in_use, 0);
    }
}

/// The permit of a closed connection returns although every worker thread waits for a frozen server.
fn permit_of_a_closed_connection_returns_beside_a_frozen_server() {
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let db = PgConnection::new_db().max_connections(5);
    let config = Config::new(test_db.url_at(proxy.port())).acquire_timeout(Duration::from_millis(300));
    let frozen = db.init_app(unique("frozen"), config).unwrap();
    let sound = db.init_app(unique("sound"), test_db.config().acquire_timeout(Duration::from_secs(1))).unwrap();
    warm_up(&frozen, 5);
    let schema = PgConnection::app(test_db.config());
    // The callers ping the connections that they are offered.
    test_db.lose_a_connection::<PgConnection>(&test_db.url_at(proxy.port()));
    proxy.set(Mode::Silent);
    together(4, |_| frozen.ping().unwrap_err().to_string());
    schema.create_all().unwrap();
    // It finds the last one too old.
    frozen.ping().unwrap_err();
    let outcome = sound.ping();
    proxy.set(Mode::Pass);
    outcome.unwrap();
}

static INNER: OnceLock<App<PgConnection>> = OnceLock::new();

fn asks_another(_: &App<PgConnection>, _: &mut PgConnection) -> QueryResult<()> {
    INNER.get().unwrap().ping().map_err(|error| diesel::result::Error::QueryBuilderError(error.to_string().into()))
}

/// Another database object may be used while a connection is prepared.
fn on_connect_may_use_another_database_object() {
    let test_db = TestDatabase::postgres();
    let inner = PgConnection::app(test_db.config());
    INNER.set(inner.0.clone()).unwrap();
    let db = PgConnection::new_db().on_connect(asks_another);
    let app = db.init_app(unique("app"), test_db.config()).unwrap();
    let outcomes = together(8, |_| app.ping().err().map(|error| error.to_string()));
    assert_eq!(outcomes, [const { None::<String> }; 8]);
    app.dispose().unwrap();
}

fn refuses(_: &str) -> ConnectionResult<PgConnection> {
    Err(ConnectionError::BadConnection("no reason at all".into()))
}

/// An idle connection that was pinged can be evicted for a waiter afterwards.
fn pinged_idle_connection_is_evicted_for_a_waiter() {
    let test_db = TestDatabase::postgres();
    let db = PgConnection::new_db().max_connections(1);
    let idle = db.init_app(unique("idle"), test_db.config()).unwrap();
    idle.ping().unwrap();
    let pids = match &test_db {
        TestDatabase::Postgres(database) => postgres().backend_pids(database.name()),
        _ => unreachable!(),
    };
    assert_eq!(pids.len(), 1);
    let other = PgConnection::new_db().connect_with(refuses);
    let asks = other.init_app(unique("asks"), test_db.config()).unwrap();
    let wants = db.init_app(unique("wants"), test_db.config().acquire_timeout(Duration::from_secs(3))).unwrap();
    thread::scope(|scope| {
        postgres().sigstop_backend(pids[0]);
        scope.spawn(|| asks.ping());
        assert!(wait::until(Duration::from_secs(1), || idle.status().holders.len() == 1));
        let waiting = scope.spawn(|| wants.ping());
        assert!(wait::until(Duration::from_millis(200), || wants.status().waiting == 1));
        postgres().sigcont(pids[0]);
        let outcome = waiting.join().unwrap();
        outcome.unwrap();
    });
}

mod hooks_that_panic {
    use std::hash::{BuildHasher, RandomState};

    use diesel::prelude::*;
    use diesel_session::{App, SessionConnection};

    pub(super) fn chance(of: u64) -> bool {
        RandomState::new().hash_one(0_u8).is_multiple_of(of)
    }

    pub(super) fn hook<C: SessionConnection>(_: &App<C>, _: &mut C) -> QueryResult<()> {
        assert!(!chance(15), "on purpose");
        if chance(15) { Err(diesel::result::Error::BrokenTransactionManager) } else { Ok(()) }
    }

    pub(super) fn close<C: SessionConnection>(_: &App<C>, _: &mut C) {
        assert!(!chance(3), "on purpose");
    }
}

/// Everything at once with tiny timeouts: in the end no permit and no connection is lost.
fn pools_with_tiny_timeouts_lose_no_permit<C: TestConnection>(test_db: &TestDatabase) {
    use hooks_that_panic::{chance, close, hook};
    const MS: Duration = Duration::from_millis(1);
    let db = C::new_db().max_connections(3).on_connect(hook).on_checkout(hook).on_checkin(hook).on_close(close);
    let config = |size| {
        test_db
            .config()
            .max_size(size)
            .acquire_timeout(40 * MS)
            .connect_timeout(25 * MS)
            .idle_timeout(MS)
            .max_lifetime(MS)
            .leak_threshold(MS)
    };
    let apps: Vec<_> = (1..=3).map(|size| db.init_app(unique("app"), config(size)).unwrap()).collect();
    let end = Instant::now() + Duration::from_secs(12);
    let slow = AtomicUsize::new(0);
    let kinds = Mutex::new(std::collections::BTreeMap::<String, usize>::new());
    together(10, |number| {
        while Instant::now() < end {
            let app = &apps[(number + usize::from(chance(3))) % 3];
            let started = Instant::now();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match number {
                9 if chance(20) => app.dispose_within(MS).map(drop),
                8 if chance(50) => {
                    if !matches!(test_db, TestDatabase::Sqlite(_)) {
                        test_db.terminate_all();
                    }
                    Ok(())
                }
                7 if chance(10) => app.create_all().map(drop),
                _ if chance(4) => app.scope().autocommit().deadline(2 * MS).run(|| db.session()?.number(ONE).map(drop)),
                _ => app.context(|| {
                    let session = db.session()?;
                    session.number(ONE)?;
                    if chance(5) {
                        return apps[number % 3].context(|| db.session()?.begin());
                    }
                    if chance(10) {
                        panic!("on purpose");
                    }
                    if chance(3) { session.connection().map(drop) } else { session.commit() }
                }),
            }));
            if started.elapsed() > Duration::from_millis(1500) {
                slow.fetch_add(1, Ordering::Relaxed);
            }
            let kind = match outcome {
                Ok(Ok(())) => "ok".into(),
                Ok(Err(error)) => error.to_string().split(' ').next().unwrap().to_owned(),
                Err(_) => "panic".into(),
            };
            *kinds.lock().unwrap().entry(kind).or_default() += 1;
        }
    });
    for app in &apps {
        // The pool's own looking after idle connections has one for a moment, too.
        wait::until(Duration::from_secs(5), || {
            let status = app.status();
            status.connecting + status.in_use == 0
        });
        let status = app.status();
        assert_eq!((status.in_use, status.waiting, status.connecting), (0, 0, 0), "{status}");
    }
    assert!(db.dispose_all_report().unwrap().is_complete());
    test_db.assert_connections(0);
    for app in &apps {
        let sound = || wait::until(Duration::from_secs(2), || app.ping().is_ok());
        assert!(sound(), "{:?}", app.ping());
    }
    assert!(db.dispose_all_report().unwrap().is_complete());
    assert_eq!(slow.into_inner(), 0, "every call ends near its `acquire_timeout` or deadline");
}

/// A caller that waits for an unreachable server holds no connection. A deadlock of others is refused all the same.
fn deadlock_is_refused_beside_a_caller_of_an_unreachable_server() {
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    let db = PgConnection::new_db().max_connections(2);
    let [first, second, third] =
        ["first", "second", "third"].map(|name| db.init_app(unique(name), test_db.config().max_size(1)).unwrap());
    let far = || Config::new(test_db.url_at(proxy.port())).acquire_timeout(Duration::from_secs(4));
    let (probes, away) = (PgConnection::app(far()), db.init_app(unique("away"), far()).unwrap());
    probes.ping().unwrap();
    refuse_and_cut(&proxy, &probes);
    thread::scope(|scope| {
        scope.spawn(|| probes.ping());
        // Both try again and again, and for each attempt `away` takes a part of the limit.
        scope.spawn(|| away.ping());
        assert!(wait::until(Duration::from_secs(2), || probes.status().waiting == 1 && away.status().waiting == 1));
        // The server is away for so long that both have tried several times.
        thread::sleep(Duration::from_millis(300));
        let outcome = first.context(|| {
            db.session()?.begin()?;
            let (ready, go) = std::sync::mpsc::channel();
            let other = scope.spawn({
                let (db, first, second) = (&db, &first, &second);
                move || {
                    second.context(|| {
                        db.session()?.begin()?;
                        ready.send(()).unwrap();
                        first.ping()
                    })
                }
            });
            go.recv().unwrap();
            assert!(wait::until(Duration::from_secs(1), || first.status().waiting == 1));
            let asked = Instant::now();
            let outcome = third.ping();
            let took = asked.elapsed();
            db.session()?.rollback()?;
            other.join().unwrap()?;
            Ok::<_, Error>((outcome, took))
        });
        proxy.set(Mode::Pass);
        let (outcome, took) = outcome.unwrap();
        assert!(matches!(&outcome, Err(error) if error.kind() == ErrorKind::WouldDeadlock), "{outcome:?}");
        assert!(took < Duration::from_millis(500), "a wait that cannot end is refused at once: {took:?}");
    });
}
