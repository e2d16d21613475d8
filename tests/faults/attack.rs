//! What an attack on the pool has found.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, Config, Error, Session};

use crate::fixtures::threads::together;
use crate::fixtures::{Conn, Site, Speak, unique};
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, enabled, postgres, wait};

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Opens `count` connections at once and leaves them idle.
fn warm_up<C: Conn>(app: &App<C>, count: usize) {
    let sessions: Vec<_> = (0..count).map(|_| app.open_session().unwrap()).collect();
    sessions.iter().for_each(|session| session.begin().unwrap());
    drop(sessions);
    assert!(app.status().idle >= count);
}

/// A pool that is larger than the limit: connections change hands a thousand times a second, and nobody waits for a whole one.
#[test]
fn who_waits_for_the_limit_is_not_overtaken_for_ever() {
    let site = Site::sqlite();
    let db = SqliteConnection::new_db().max_connections(2);
    let config = site.config().max_size(4).acquire_timeout(Duration::from_secs(1));
    let app = db.init_app(unique("app"), config).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    let longest = together(12, |_| {
        let (mut longest, mut errors, mut loans) = (Duration::ZERO, Vec::new(), 0);
        while Instant::now() < end {
            let asked = Instant::now();
            let outcome = app.scope().read_only().run(|| {
                db.session()?.begin()?;
                longest = longest.max(asked.elapsed());
                loans += 1;
                thread::sleep(Duration::from_millis(1));
                Ok::<_, Error>(())
            });
            errors.extend(outcome.err().map(|error| error.to_string().chars().take(150).collect::<String>()));
        }
        (longest, loans, errors)
    });
    assert!(longest.iter().all(|(_, _, errors)| errors.is_empty()));
    assert!(longest.iter().all(|(longest, ..)| *longest < Duration::from_millis(500)));
    app.dispose().unwrap();
}

/// One caller who has no time does not cost the others their connections.
#[test]
fn an_impatient_caller_closes_at_most_one() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let app = PgConnection::app(Config::new(site.url_at(proxy.port())));
    warm_up(&app, 6);
    thread::sleep(Duration::from_millis(600));
    proxy.set(Mode::Silent);
    let _late = app.scope().deadline(Duration::from_millis(50)).run(|| PgConnection::db().session()?.begin());
    proxy.set(Mode::Pass);
    let status = app.status();
    assert!(status.open >= 5, "{status}");
}

/// Who finds out whether a server is back does not wait for something else meanwhile.
#[test]
fn a_limit_that_is_used_up_hides_no_server_that_is_back() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let (site, file) = (Site::postgres(), Site::postgres());
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let config = || Config::new(site.url_at(proxy.port())).acquire_timeout(Duration::from_secs(8));
    let limited = PgConnection::new_db().max_connections(1);
    let elsewhere = limited.init_app(unique("elsewhere"), file.config()).unwrap();
    let first = limited.init_app(unique("first"), config()).unwrap();
    let free = PgConnection::app(config());
    free.ping().unwrap();
    proxy.set(Mode::Refuse);
    proxy.cut_all();
    // A connection that was used just now is not looked at.
    thread::sleep(Duration::from_millis(20));
    thread::scope(|scope| {
        let waits = scope.spawn(|| free.ping().map(|()| Instant::now()));
        assert!(wait::until(Duration::from_secs(2), || free.status().waiting == 1));
        thread::sleep(Duration::from_millis(300));
        elsewhere
            .context(|| {
                limited.session()?.begin()?;
                scope.spawn(|| first.ping());
                thread::sleep(Duration::from_millis(1000));
                proxy.set(Mode::Pass);
                let back = Instant::now();
                let served = waits.join().unwrap();
                let late = served.unwrap() - back;
                assert!(late < Duration::from_secs(1), "{late:?}");
                limited.session()?.rollback()?;
                Ok::<_, Error>(())
            })
            .unwrap();
    });
}

thread_local! {
    static KEPT: RefCell<Option<Session<PgConnection>>> = const { RefCell::new(None) };
    static KEPT_LITE: RefCell<Option<Session<SqliteConnection>>> = const { RefCell::new(None) };
}

/// A session in a thread's own storage ends with the thread.
#[test]
fn a_session_in_the_storage_of_a_thread() {
    let file = Site::sqlite();
    let lite = SqliteConnection::app(file.config().max_size(1));
    let app = lite.0.clone();
    let ends = thread::spawn(move || {
        let session = app.open_session().unwrap();
        session.number(ONE).unwrap();
        KEPT_LITE.set(Some(session));
    });
    ends.join().unwrap();
    lite.ping().unwrap();
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let kept = PgConnection::app(site.config().max_size(1));
    for doomed in [false, true] {
        let app = kept.0.clone();
        let ends = thread::spawn(move || {
            let session = app.open_session().unwrap();
            session.number(ONE).unwrap();
            if doomed {
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

/// A share of what is closed comes back although a frozen server has all its helper threads.
#[test]
fn a_frozen_server_keeps_no_share_of_what_is_closed() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let db = PgConnection::new_db().max_connections(5);
    let config = Config::new(site.url_at(proxy.port())).acquire_timeout(Duration::from_millis(300));
    let frozen = db.init_app(unique("frozen"), config).unwrap();
    let sound = db.init_app(unique("sound"), site.config().acquire_timeout(Duration::from_secs(1))).unwrap();
    warm_up(&frozen, 5);
    let schema = PgConnection::app(site.config());
    thread::sleep(Duration::from_millis(600));
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

fn asks_another(_: &mut PgConnection) -> QueryResult<()> {
    INNER.get().unwrap().ping().map_err(|error| diesel::result::Error::QueryBuilderError(error.to_string().into()))
}

/// Another database object may be used while a connection is prepared.
#[test]
fn preparing_a_connection_asks_another_database() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let inner = PgConnection::app(site.config());
    INNER.set(inner.0.clone()).unwrap();
    let db = PgConnection::new_db().on_connect(asks_another);
    let app = db.init_app(unique("app"), site.config()).unwrap();
    let started = Instant::now();
    let outcomes = together(8, |_| app.ping().err().map(|error| error.to_string()));
    assert!(outcomes.iter().all(Option::is_none) && started.elapsed() < Duration::from_secs(2));
    app.dispose().unwrap();
}

fn refuses(_: &str) -> ConnectionResult<PgConnection> {
    Err(ConnectionError::BadConnection("no reason at all".into()))
}

/// An idle connection that was asked something is idle again for those who wait for room.
#[test]
fn what_was_asked_comes_back_to_those_who_wait() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let db = PgConnection::new_db().max_connections(1);
    let idle = db.init_app(unique("idle"), site.config()).unwrap();
    idle.ping().unwrap();
    let pids = match &site {
        Site::Postgres(database) => postgres().backend_pids(database.name()),
        _ => unreachable!(),
    };
    assert_eq!(pids.len(), 1);
    let other = PgConnection::new_db().connect_with(refuses);
    let asks = other.init_app(unique("asks"), site.config()).unwrap();
    let wants = db.init_app(unique("wants"), site.config().acquire_timeout(Duration::from_secs(3))).unwrap();
    thread::scope(|scope| {
        postgres().sigstop_backend(pids[0]);
        scope.spawn(|| asks.ping());
        assert!(wait::until(Duration::from_secs(1), || idle.status().holders.len() == 1));
        let waiting = scope.spawn(|| wants.ping());
        assert!(wait::until(Duration::from_millis(200), || wants.status().waiting == 1));
        thread::sleep(Duration::from_millis(50));
        postgres().sigcont(pids[0]);
        let outcome = waiting.join().unwrap();
        outcome.unwrap();
    });
}

mod hooks_that_panic {
    use std::hash::{BuildHasher, RandomState};

    use diesel::prelude::*;

    pub(super) fn chance(of: u64) -> bool {
        RandomState::new().hash_one(0_u8).is_multiple_of(of)
    }

    pub(super) fn hook<C>(_: &mut C) -> QueryResult<()> {
        assert!(!chance(15), "on purpose");
        if chance(15) { Err(diesel::result::Error::BrokenTransactionManager) } else { Ok(()) }
    }

    pub(super) fn close<C>(_: &mut C) {
        assert!(!chance(3), "on purpose");
    }
}

/// Everything at once, with no time for anything: in the end nothing is lost.
fn no_time_for_anything<C: Conn>(site: &Site) {
    use hooks_that_panic::{chance, close, hook};
    const MS: Duration = Duration::from_millis(1);
    let db = C::new_db().max_connections(3).on_connect(hook).on_checkout(hook).on_checkin(hook).on_close(close);
    let config = |size| {
        site.config()
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
                    if !matches!(site, Site::Sqlite(_)) {
                        site.terminate_all();
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
    site.assert_connections(0);
    for app in &apps {
        let sound = || wait::until(Duration::from_secs(2), || app.ping().is_ok());
        assert!(sound(), "{:?}", app.ping());
    }
    assert!(db.dispose_all_report().unwrap().is_complete());
    assert_eq!(slow.into_inner(), 0);
}

crate::on_every_database!(no_time_for_anything);

/// Who waits for a server that is away has no connection to give back: a circle of others is refused all the same.
#[test]
fn a_circle_beside_one_who_looks_for_a_connection() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    let db = PgConnection::new_db().max_connections(2);
    let [first, second, third] =
        ["first", "second", "third"].map(|name| db.init_app(unique(name), site.config().max_size(1)).unwrap());
    let far = || Config::new(site.url_at(proxy.port())).acquire_timeout(Duration::from_secs(4));
    let (probes, away) = (PgConnection::app(far()), db.init_app(unique("away"), far()).unwrap());
    probes.ping().unwrap();
    proxy.set(Mode::Refuse);
    proxy.cut_all();
    // A connection that was used just now is not looked at.
    thread::sleep(Duration::from_millis(20));
    thread::scope(|scope| {
        scope.spawn(|| probes.ping());
        // Both try again and again, and for each attempt `away` takes a part of the limit.
        scope.spawn(|| away.ping());
        assert!(wait::until(Duration::from_secs(2), || probes.status().waiting == 1 && away.status().waiting == 1));
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
            db.session()?.rollback()?;
            other.join().unwrap()?;
            Ok::<_, Error>((outcome, asked.elapsed()))
        });
        proxy.set(Mode::Pass);
        let (outcome, took) = outcome.unwrap();
        assert!(matches!(outcome, Err(Error::WouldDeadlock { .. })), "{outcome:?}");
        assert!(took < Duration::from_millis(500), "{took:?}");
    });
}
