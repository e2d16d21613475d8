//! Many applications on a server with few slots: who gets a connection, who gives one up, and who is told what.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{Database, Error, SessionConnection};

use crate::fixtures::{Conn, Site, Speak, client_ports, unique};
use crate::on_every_server;
use crate::support::{Kind, ROLE, enabled, mariadb, postgres, process, wait};

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// The server as an ordinary role may use it: `max_connections = 20`, of which PostgreSQL reserves three.
const SLOTS: usize = 17;

on_every_server!(
    a_limit_holds_for_all_applications,
    what_is_in_use_is_never_taken,
    a_limit_that_is_used_up_says_by_whom,
    another_database_object_gives_way,
);

#[derive(QueryableByName)]
struct Port {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    port: i32,
}

/// Counts the sessions of this process. MariaDB closes its end of a session before it takes the session off its list, so those are counted
/// that have a socket in this process.
fn sessions_of_ours(site: &Site) -> Box<dyn FnMut() -> usize> {
    match site {
        Site::Postgres(_) => Box::new(|| usize::try_from(postgres().connections_of(ROLE)).unwrap()),
        Site::Mysql(_) => {
            let (mut conn, server) = (mariadb().admin(), site.port());
            let query = format!(
                "SELECT CAST(SUBSTRING_INDEX(host, ':', -1) AS INTEGER) AS port \
                 FROM information_schema.processlist WHERE user = '{ROLE}'"
            );
            Box::new(move || {
                let listed: Vec<Port> = diesel::sql_query(&query).load(&mut conn).unwrap();
                let open = client_ports(server);
                listed.iter().filter(|session| open.contains(&(session.port as u16))).count()
            })
        }
        Site::Sqlite(_) => unreachable!("it has no sessions"),
    }
}

/// Looks at the server as long as it lives; the most sessions it saw.
fn watched<T>(site: &Site, body: impl FnOnce() -> T) -> (T, usize) {
    let (stop, most, looks) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let out = thread::scope(|scope| {
        struct Stop<'s>(&'s AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut sessions = sessions_of_ours(site);
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(sessions(), Ordering::Relaxed);
                looks.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        assert!(wait::until(Duration::from_secs(5), || looks.load(Ordering::Relaxed) > 0));
        body()
    });
    assert!(looks.into_inner() > 3);
    (out, most.into_inner())
}

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// One application after another, and nobody disposes of any.
fn ten_thousand_applications<C: Conn>(site: &Site) {
    const APPLICATIONS: usize = 10_000;
    const WARM_UP: usize = 1_000;
    let db = C::new_db();
    let one = |number: usize| {
        let app = db.init_app(format!("app-{number}"), site.config()).unwrap();
        app.context(|| {
            let session = db.session()?;
            assert_eq!(session.number(ONE)?, 1);
            session.commit()
        })
        .unwrap();
    };
    let ((), most) = watched(site, || {
        (0..WARM_UP).for_each(one);
        let before = (process::threads(), process::fds(), resident_bytes());
        (WARM_UP..APPLICATIONS).for_each(one);
        let after = (process::threads(), process::fds(), resident_bytes());
        assert!(after.0 <= before.0 && after.1 <= before.1 + 2, "threads and handles: {before:?}, {after:?}");
        let each = after.2.saturating_sub(before.2) / (APPLICATIONS - WARM_UP);
        assert!(each < 4096, "{each} bytes an application");
    });
    assert!(most <= SLOTS, "{most} sessions");
    db.dispose_all().unwrap();
    site.assert_connections(0);
}

#[test]
fn ten_thousand_applications_postgres() {
    if enabled(Kind::Postgres) {
        ten_thousand_applications::<PgConnection>(&Site::postgres());
    }
}

#[test]
fn ten_thousand_applications_mysql() {
    if enabled(Kind::Mysql) {
        ten_thousand_applications::<MysqlConnection>(&Site::mysql());
    }
}

/// A thousand applications alive together on ten databases, each of which holds its own name.
fn a_thousand_together<C: Conn>(site: fn() -> Site) {
    const APPLICATIONS: usize = 1_000;
    const DATABASES: usize = 10;
    const BUDGET: usize = 8;
    const THREADS: usize = 32;
    let time = Duration::from_secs(20);
    let sites: Vec<Site> = (0..DATABASES).map(|_| site()).collect();
    for (number, site) in sites.iter().enumerate() {
        let schema = C::app(site.config());
        schema.create_all().unwrap();
        let stamp = format!("INSERT INTO entries (author, message) VALUES ('{number}', 'here')");
        schema.scope().commit_on_ok().run(|| C::db().session()?.send(&stamp)).unwrap();
    }
    let db = C::new_db().max_connections(BUDGET);
    let app = |n: usize| db.init_app(format!("app-{n}"), sites[n % DATABASES].config()).unwrap();
    let apps: Vec<_> = (0..APPLICATIONS).map(app).collect();
    let slowest = Mutex::new(Duration::ZERO);
    let served = AtomicUsize::new(0);
    let ((), most) = watched(&sites[0], || {
        let started = Instant::now();
        crate::fixtures::threads::together(THREADS, |thread| {
            let mut chance = thread as u64 + 1;
            while started.elapsed() < time {
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let number = (chance >> 33) as usize % APPLICATIONS;
                let app = &apps[number];
                let asked = Instant::now();
                app.context(|| {
                    let session = db.session()?;
                    session.begin()?;
                    let waited = asked.elapsed();
                    let mut slowest = slowest.lock().unwrap();
                    *slowest = waited.max(*slowest);
                    drop(slowest);
                    let (here, own) = (number % DATABASES, "SELECT count(*) AS number FROM entries WHERE author =");
                    assert_eq!(session.number(&format!("{own} '{here}' AND message = 'here'"))?, 1);
                    assert_eq!(session.number("SELECT count(*) AS number FROM entries")?, 1);
                    session.send(&format!("INSERT INTO entries (author, message) VALUES ('{number}', 'undone')"))?;
                    session.rollback()
                })
                .unwrap();
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
    });
    let slowest = slowest.into_inner().unwrap();
    let served = served.into_inner();
    assert!(most <= BUDGET, "{most} sessions");
    assert!(slowest < Duration::from_secs(1), "{slowest:?} of {served}");
    assert!(db.status().iter().all(|status| status.in_use == 0 && status.waiting == 0));
    db.dispose_all().unwrap();
    sites.iter().for_each(|site| site.assert_connections(0));
}

#[test]
fn a_thousand_together_postgres() {
    if enabled(Kind::Postgres) {
        a_thousand_together::<PgConnection>(Site::postgres);
    }
}

#[test]
fn a_thousand_together_mysql() {
    if enabled(Kind::Mysql) {
        a_thousand_together::<MysqlConnection>(Site::mysql);
    }
}

fn connections_in_use<C: SessionConnection>(db: &Database<C>) -> usize {
    db.status().iter().map(|status| status.open).sum()
}

fn a_limit_holds_for_all_applications<C: Conn>(site: &Site) {
    let db = C::new_db().max_connections(3);
    for number in 0..20 {
        let app = db.init_app(unique("limited"), site.config()).unwrap();
        app.ping().unwrap();
        assert_eq!(connections_in_use(&db), (number + 1).min(3));
    }
    // What migrations run on is one of them.
    let late = db.init_app(unique("limited"), site.config()).unwrap();
    let ((), most) = watched(site, || {
        for _ in 0..5 {
            late.create_all().unwrap();
            late.drop_all().unwrap();
        }
    });
    assert!(most <= 3, "{most} sessions");
    db.dispose_all().unwrap();
    site.assert_connections(0);
    // The limit is not used up by what has been closed, also where nothing is left of the server's pools.
    let app = db.init_app(unique("limited"), site.config().acquire_timeout(Duration::from_secs(2))).unwrap();
    for _ in 0..3 {
        let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
        sessions.iter().for_each(|session| session.begin().unwrap());
        drop(sessions);
        assert_eq!(app.dispose_report().unwrap().closed, 3);
    }
}

fn what_is_in_use_is_never_taken<C: Conn>(site: &Site) {
    let db = C::new_db().max_connections(2);
    let app = |name: &str| db.init_app(unique(name), site.config()).unwrap();
    let (held, idle, late) = (app("held"), app("idle"), app("late"));
    let session = held.open_session().unwrap();
    session.begin().unwrap();
    idle.ping().unwrap();
    late.ping().unwrap();
    assert_eq!((held.status().open, idle.status().open, late.status().open), (1, 0, 1));
    let second = late.open_session().unwrap();
    second.begin().unwrap();
    // Both are in use now. The first to come back goes to who waits.
    thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let started = Instant::now();
            idle.ping().map(|()| started.elapsed())
        });
        thread::sleep(Duration::from_millis(100));
        assert!(!waiter.is_finished());
        session.number(ONE).unwrap();
        session.commit().unwrap();
        assert!(waiter.join().unwrap().unwrap() < Duration::from_millis(500));
    });
    assert_eq!((held.status().open, idle.status().open, late.status().open), (0, 1, 1));
    drop(second);
    db.dispose_all().unwrap();
}

fn a_limit_that_is_used_up_says_by_whom<C: Conn>(site: &Site) {
    let db = C::new_db().max_connections(1);
    let config = || site.config().acquire_timeout(Duration::from_millis(400));
    let (first, second) =
        (db.init_app(unique("first"), config()).unwrap(), db.init_app(unique("second"), config()).unwrap());
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let first = &first;
        scope.spawn(move || {
            let session = first.open_session().unwrap();
            let line = line!() + 1;
            session.begin().unwrap();
            tell.send(line).unwrap();
            // The holder is running, as far as anybody knows.
            let _ = ended.recv();
        });
        let line = told.recv().unwrap();
        let started = Instant::now();
        let error = second.ping().unwrap_err();
        let waited = started.elapsed();
        drop(end);
        assert!(matches!(&error, Error::BudgetExhausted { max_connections: 1, .. }) && error.is_timeout(), "{error}");
        assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
        assert!(waited > Duration::from_millis(380) && waited < Duration::from_millis(700), "{waited:?}");
    });
    second.ping().unwrap();
    db.dispose_all().unwrap();
}

/// Two database objects that know nothing of each other fill the server with what is idle.
fn another_database_object_gives_way<C: Conn>(site: &Site) {
    let many = C::new_db();
    let other = C::new_db();
    let crowd =
        many.init_app(unique("crowd"), site.config().max_size(30).acquire_timeout(Duration::from_millis(700))).unwrap();
    let mut held = Vec::new();
    // All that the server gives.
    let full = loop {
        let session = crowd.open_session().unwrap();
        match session.begin() {
            Ok(()) => held.push(session),
            Err(error) => break error,
        }
        assert!(held.len() <= 20);
    };
    assert!(matches!(&full, Error::Connect { kind: diesel_session::ConnectErrorKind::ServerFull, .. }), "{full}");
    let text = full.to_string();
    assert!(text.contains(&format!("This process has {} connections", held.len())), "{text}");
    held.clear();
    let before = crowd.status().idle;
    assert!(before >= SLOTS, "{before}");
    let late = other.init_app(unique("late"), site.config()).unwrap();
    let started = Instant::now();
    late.ping().unwrap();
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    let after = crowd.status().idle;
    assert!(after < before && after + 4 > before, "{before} before, {after} after");
    many.dispose_all().unwrap();
    other.dispose_all().unwrap();
    site.assert_connections(0);
}
