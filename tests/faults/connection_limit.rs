//! Many applications on a server with few slots: which of them gets a connection, which loses an idle one, and what
//! errors say.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{Database, ErrorKind, SessionConnection};

use crate::fixtures::{Provisioner, SessionExt, TestConnection, TestDatabase, client_ports, unique};
use crate::for_each_database;
use crate::support::{ROLE, mariadb, postgres, process, wait};

const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// The server as an ordinary role may use it: `max_connections = 20`, of which PostgreSQL reserves three.
const SLOTS: usize = 17;

for_each_database!(every_server =>
    connection_limit_holds_for_all_applications,
    connection_in_use_is_never_evicted,
    used_up_connection_limit_names_the_holder,
    full_server_evicts_idle_connections_of_another_database_object,
);
for_each_database!(postgres, mariadb => idle_connections_of_ten_thousand_applications_fit_into_the_server);
for_each_database!(Provisioner; postgres, mariadb => a_thousand_applications_share_a_connection_limit);

#[derive(QueryableByName)]
struct Port {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    port: i32,
}

/// Counts the sessions of this process. MariaDB closes its end of a session before it takes the session off its list,
/// so those are counted that have a socket in this process.
fn sessions_of_ours(test_db: &TestDatabase) -> Box<dyn FnMut() -> usize> {
    match test_db {
        TestDatabase::Postgres(_) => Box::new(|| usize::try_from(postgres().connections_of(ROLE)).unwrap()),
        TestDatabase::Mariadb(_) => {
            let (mut conn, server) = (mariadb().admin(), test_db.port());
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
        TestDatabase::Sqlite(_) => unreachable!("it has no sessions"),
    }
}

/// Looks at the server as long as it lives; the most sessions it saw.
fn watched<T>(test_db: &TestDatabase, body: impl FnOnce() -> T) -> (T, usize) {
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
            let mut sessions = sessions_of_ours(test_db);
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

/// One application after another, without a disposal.
fn idle_connections_of_ten_thousand_applications_fit_into_the_server<C: TestConnection>(test_db: &TestDatabase) {
    const APPLICATIONS: usize = 10_000;
    const WARM_UP: usize = 1_000;
    let db = C::new_db();
    let one = |number: usize| {
        let app = db.init_app(format!("app-{number}"), test_db.config()).unwrap();
        app.context(|| {
            let session = db.session()?;
            assert_eq!(session.number(ONE)?, 1);
            session.commit()
        })
        .unwrap();
    };
    let ((), most) = watched(test_db, || {
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
    test_db.assert_connections(0);
}

/// A thousand applications alive together on ten databases, each of which holds its own name.
fn a_thousand_applications_share_a_connection_limit<C: TestConnection>(provisioner: &Provisioner) {
    const APPLICATIONS: usize = 1_000;
    const DATABASES: usize = 10;
    const LIMIT: usize = 8;
    const THREADS: usize = 32;
    /// No caller waits for as long as that.
    const PATIENCE: Duration = Duration::from_secs(1);
    let time = Duration::from_secs(20);
    let test_dbs: Vec<TestDatabase> = (0..DATABASES).map(|_| (provisioner.create)()).collect();
    for (number, test_db) in test_dbs.iter().enumerate() {
        let schema = C::app(test_db.config());
        schema.create_all().unwrap();
        let stamp = format!("INSERT INTO entries (author, message) VALUES ('{number}', 'here')");
        schema.run(|| C::db().session()?.send(&stamp)).unwrap();
    }
    let db = C::new_db().max_connections(LIMIT);
    let app =
        |n: usize| db.init_app(format!("app-{n}"), test_dbs[n % DATABASES].config().acquire_timeout(PATIENCE)).unwrap();
    let apps: Vec<_> = (0..APPLICATIONS).map(app).collect();
    let ((), most) = watched(&test_dbs[0], || {
        let started = Instant::now();
        crate::fixtures::threads::together(THREADS, |thread| {
            let mut chance = thread as u64 + 1;
            while started.elapsed() < time {
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let number = (chance >> 33) as usize % APPLICATIONS;
                let app = &apps[number];
                app.context(|| {
                    let session = db.session()?;
                    session.begin()?;
                    let (here, own) = (number % DATABASES, "SELECT count(*) AS number FROM entries WHERE author =");
                    assert_eq!(session.number(&format!("{own} '{here}' AND message = 'here'"))?, 1);
                    assert_eq!(session.number("SELECT count(*) AS number FROM entries")?, 1);
                    session.send(&format!("INSERT INTO entries (author, message) VALUES ('{number}', 'undone')"))?;
                    session.rollback()
                })
                .unwrap();
            }
        });
    });
    assert!(most <= LIMIT, "{most} sessions");
    assert!(db.status().iter().all(|status| status.in_use == 0 && status.waiting == 0));
    db.dispose_all().unwrap();
    test_dbs.iter().for_each(|test_db| test_db.assert_connections(0));
}

fn connections_in_use<C: SessionConnection>(db: &Database<C>) -> usize {
    db.status().iter().map(|status| status.open).sum()
}

fn connection_limit_holds_for_all_applications<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(3);
    for number in 0..20 {
        let app = db.init_app(unique("limited"), test_db.config()).unwrap();
        app.ping().unwrap();
        assert_eq!(connections_in_use(&db), (number + 1).min(3));
    }
    // What migrations run on is one of them.
    let late = db.init_app(unique("limited"), test_db.config()).unwrap();
    let ((), most) = watched(test_db, || {
        for _ in 0..30 {
            late.create_all().unwrap();
            late.drop_all().unwrap();
        }
    });
    assert!(most <= 3, "{most} sessions");
    db.dispose_all().unwrap();
    test_db.assert_connections(0);
    // The limit is not used up by what has been closed, also where nothing is left of the server's pools.
    let app = db.init_app(unique("limited"), test_db.config().acquire_timeout(Duration::from_secs(2))).unwrap();
    for _ in 0..3 {
        let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
        sessions.iter().for_each(|session| session.begin().unwrap());
        drop(sessions);
        assert_eq!(app.dispose_report().unwrap().closed, 3);
    }
}

fn connection_in_use_is_never_evicted<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(2);
    let app = |name: &str| db.init_app(unique(name), test_db.config()).unwrap();
    let (held, idle, late) = (app("held"), app("idle"), app("late"));
    let session = held.open_session().unwrap();
    session.begin().unwrap();
    idle.ping().unwrap();
    late.ping().unwrap();
    assert_eq!((held.status().open, idle.status().open, late.status().open), (1, 0, 1));
    let second = late.open_session().unwrap();
    second.begin().unwrap();
    // Both are in use now. The first one to be checked in goes to the waiter.
    thread::scope(|scope| {
        let waiter = scope.spawn(|| idle.ping());
        assert!(wait::until(Duration::from_secs(5), || idle.status().waiting == 1));
        session.number(ONE).unwrap();
        session.commit().unwrap();
        waiter.join().unwrap().unwrap();
    });
    assert_eq!((held.status().open, idle.status().open, late.status().open), (0, 1, 1));
    drop(second);
    db.dispose_all().unwrap();
}

fn used_up_connection_limit_names_the_holder<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().max_connections(1);
    let config = || test_db.config().acquire_timeout(Duration::from_millis(400));
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
            // The holder is running, as far as the pool knows.
            let _ = ended.recv();
        });
        let line = told.recv().unwrap();
        let started = Instant::now();
        let error = second.ping().unwrap_err();
        let waited = started.elapsed();
        drop(end);
        assert!(
            error.kind() == ErrorKind::ConnectionLimitReached
                && error.to_string().contains("the one connection that")
                && error.is_timeout(),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("{}:{line}", file!())), "{error}");
        assert!(
            waited > Duration::from_millis(380) && waited < Duration::from_millis(700),
            "a call ends at `acquire_timeout`: {waited:?}"
        );
    });
    second.ping().unwrap();
    db.dispose_all().unwrap();
}

/// Two database objects that know nothing of each other fill the server with what is idle.
fn full_server_evicts_idle_connections_of_another_database_object<C: TestConnection>(test_db: &TestDatabase) {
    let many = C::new_db();
    let other = C::new_db();
    let crowd = many
        .init_app(unique("crowd"), test_db.config().max_size(30).acquire_timeout(Duration::from_millis(700)))
        .unwrap();
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
    assert!(
        full.kind() == ErrorKind::Connect
            && full.connect_error_kind() == Some(diesel_session::pool::ConnectErrorKind::ServerFull),
        "{full}"
    );
    let text = full.to_string();
    assert!(text.contains(&format!("This process has {} connections", held.len())), "{text}");
    held.clear();
    let before = crowd.status().idle;
    assert!(before >= SLOTS, "{before}");
    let config = test_db.config().acquire_timeout(Duration::from_millis(500));
    let late = other.init_app(unique("late"), config).unwrap();
    late.ping().unwrap();
    let after = crowd.status().idle;
    assert!(after < before && after + 4 > before, "{before} before, {after} after");
    many.dispose_all().unwrap();
    other.dispose_all().unwrap();
    test_db.assert_connections(0);
}
