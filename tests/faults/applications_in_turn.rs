//! The story of README: a suite with one application for each test, on a server with few slots.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool, R2D2Connection};
use diesel_session::Error;

use crate::fixtures::threads::{Process, answer_parent, child_of};
use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, client_ports};
use crate::for_each_database;
use crate::support::{mariadb, postgres, process, wait};

const APPLICATIONS: usize = 60;

for_each_database!(every_database => sixty_applications_in_turn_use_one_connection);
for_each_database!(only mariadb => plain_r2d2_without_disposal_fills_mariadb);
for_each_database!(only postgres => plain_r2d2_without_disposal_fills_postgres);

#[derive(QueryableByName)]
struct Port {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    port: i32,
}

/// Sees the connections of this process that are open at both ends. A server still lists one whose client has closed it
/// a moment ago: its own end is being taken down, and the client's is gone from the kernel's table of this process.
enum Eye {
    Postgres(PgConnection),
    Mysql(MysqlConnection),
    Sqlite,
}

impl Eye {
    fn new(test_db: &TestDatabase) -> Self {
        match test_db {
            TestDatabase::Postgres(_) => Self::Postgres(postgres().admin()),
            TestDatabase::Mariadb(_) => Self::Mysql(mariadb().admin()),
            TestDatabase::Sqlite(_) => Self::Sqlite,
        }
    }

    fn open(&mut self, test_db: &TestDatabase) -> usize {
        let of_the_server: Vec<Port> = match (self, test_db) {
            (Self::Postgres(conn), TestDatabase::Postgres(database)) => diesel::sql_query(format!(
                "SELECT client_port AS port FROM pg_stat_activity WHERE datname = '{}' AND client_port > 0",
                database.name()
            ))
            .load(conn)
            .unwrap(),
            (Self::Mysql(conn), TestDatabase::Mariadb(database)) => diesel::sql_query(format!(
                "SELECT CAST(SUBSTRING_INDEX(host, ':', -1) AS INTEGER) AS port \
                 FROM information_schema.processlist WHERE db = '{}'",
                database.name()
            ))
            .load(conn)
            .unwrap(),
            _ => return test_db.connections(),
        };
        // Asked second: whatever closed meanwhile is not counted, and two that are open at once are.
        let of_this_process = client_ports(test_db.port());
        of_the_server.iter().filter(|session| of_this_process.contains(&(session.port as u16))).count()
    }
}

/// Ends the observer, also when the test fails.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn sixty_applications_in_turn_use_one_connection<C: TestConnection>(test_db: &TestDatabase) {
    let stop = AtomicBool::new(false);
    let most = AtomicUsize::new(0);
    let samples = AtomicUsize::new(0);
    // The observer's own threads and handles are there from the start.
    let mut eye = Eye::new(test_db);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut eye = Eye::new(test_db);
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(eye.open(test_db), Ordering::Relaxed);
                samples.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(wait::until(Duration::from_secs(5), || samples.load(Ordering::Relaxed) > 0));
        let mut after_first = (0, 0);
        for number in 0..APPLICATIONS {
            one_application::<C>(test_db, &mut eye);
            test_db.assert_connections(0);
            if number == 0 {
                after_first = at_rest((usize::MAX, usize::MAX));
            }
        }
        let in_the_end = at_rest(after_first);
        let grew = in_the_end.0 > after_first.0 || in_the_end.1 > after_first.1;
        assert!(!grew, "threads and file descriptors: {after_first:?}, {in_the_end:?}");
    });
    assert!(samples.into_inner() > APPLICATIONS, "the observer looked");
    assert!(most.into_inner() <= 1, "never two connections of ours at once");
}

/// Threads and file descriptors, once the thread of the last pool has ended, which is told to, and the thread that
/// watches deadlines, which ends when it has had nothing to watch for a second.
fn at_rest(wanted: (usize, usize)) -> (usize, usize) {
    let mut last = (process::threads(), process::fds());
    let mut same = 0;
    wait::until(Duration::from_secs(4), || {
        let now = (process::threads(), process::fds());
        same = if now == last { same + 1 } else { 0 };
        last = now;
        now == wanted || wanted.0 == usize::MAX && same > 100
    });
    last
}

fn one_application<C: TestConnection>(test_db: &TestDatabase, eye: &mut Eye) {
    let mut at_most_one = |step: &str| {
        let open = eye.open(test_db);
        assert!(open <= 1, "{open} connections after {step}");
    };
    let app = C::app(test_db.config());
    at_most_one("init_app");
    app.context(|| {
        let db = C::db();
        assert_eq!(db.create_all()?.len(), 1);
        at_most_one("create_all");
        let session = db.session()?;
        session.send(INSERT)?;
        at_most_one("insert");
        session.commit()?;
        at_most_one("commit");
        assert_eq!(session.number(COUNT)?, 1);
        at_most_one("select");
        session.remove()?;
        at_most_one("remove");
        assert_eq!(db.drop_all()?.len(), 1);
        at_most_one("drop_all");
        Ok::<_, Error>(())
    })
    .unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
    at_most_one("dispose");
}

/// The same suite with plain r2d2 and no disposal: the application at which it fails, and what it is told.
fn without_disposal<C: R2D2Connection + 'static>(url: &str, size: Option<u32>) -> (usize, String) {
    let mut pools = Vec::new();
    for number in 1..=APPLICATIONS {
        let pool = Pool::builder().connection_timeout(Duration::from_secs(1));
        let pool = if let Some(size) = size { pool.max_size(size) } else { pool };
        match pool.build(ConnectionManager::<C>::new(url)) {
            Ok(pool) => {
                pool.get().expect("it has a connection").batch_execute("SELECT 1").unwrap();
                pools.push(pool);
            }
            Err(error) => return (number, error.to_string()),
        }
    }
    panic!("{APPLICATIONS} applications without a disposal, and none failed");
}

/// Runs the control in a process of its own, as the threads of such a pool live 30 s longer than it.
fn control<C: R2D2Connection + 'static>(
    test: &str,
    test_db: impl FnOnce() -> TestDatabase,
    connections: impl Fn() -> i64,
    fails_at: [usize; 2],
    message: &str,
) {
    if let Some(url) = child_of() {
        answer_parent(|size| format!("{:?}", without_disposal::<C>(&url, size.parse().ok())));
        return;
    }
    let test_db = test_db();
    let mut child = Process::spawn(test, &test_db.url());
    for (size, fails_at) in ["default", "1"].into_iter().zip(fails_at) {
        assert_eq!(wait::until_equal(0, Duration::from_secs(5), &connections), 0);
        child.order(size);
        let answer = child.answer();
        assert!(answer.starts_with(&format!("({fails_at}, ")) && answer.contains(message), "{answer}");
    }
}

fn plain_r2d2_without_disposal_fills_postgres() {
    let message = "remaining connection slots are reserved";
    control::<PgConnection>(
        "applications_in_turn::plain_r2d2_without_disposal_fills_postgres::postgres",
        TestDatabase::postgres,
        || postgres().connections(),
        [2, 18],
        message,
    );
}

fn plain_r2d2_without_disposal_fills_mariadb() {
    let message = "Too many connections";
    control::<MysqlConnection>(
        "applications_in_turn::plain_r2d2_without_disposal_fills_mariadb::mariadb",
        TestDatabase::mariadb,
        || mariadb().connections(),
        [3, 21],
        message,
    );
}
