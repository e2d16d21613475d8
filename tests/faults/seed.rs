//! The suite that everything began with: one application a test, on a server with few slots.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool, R2D2Connection};
use diesel_session::Error;

use crate::fixtures::threads::{Process, answer_parent, child_of};
use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, client_ports};
use crate::on_every_database;
use crate::support::{Kind, enabled, mariadb, postgres, process, wait};

const APPLICATIONS: usize = 60;

on_every_database!(sixty_applications);

#[derive(QueryableByName)]
struct Port {
    #[diesel(sql_type = diesel::sql_types::Integer)]
    port: i32,
}

/// Sees the connections of this process that are open at both ends. A server still lists one whose client has closed it a
/// moment ago: its own end is being taken down, and the client's is gone from the kernel's table of this process.
enum Eye {
    Postgres(PgConnection),
    Mysql(MysqlConnection),
    Sqlite,
}

impl Eye {
    fn new(site: &Site) -> Self {
        match site {
            Site::Postgres(_) => Self::Postgres(postgres().admin()),
            Site::Mysql(_) => Self::Mysql(mariadb().admin()),
            Site::Sqlite(_) => Self::Sqlite,
        }
    }

    fn open(&mut self, site: &Site) -> usize {
        let of_the_server: Vec<Port> = match (self, site) {
            (Self::Postgres(conn), Site::Postgres(database)) => diesel::sql_query(format!(
                "SELECT client_port AS port FROM pg_stat_activity WHERE datname = '{}' AND client_port > 0",
                database.name()
            ))
            .load(conn)
            .unwrap(),
            (Self::Mysql(conn), Site::Mysql(database)) => diesel::sql_query(format!(
                "SELECT CAST(SUBSTRING_INDEX(host, ':', -1) AS INTEGER) AS port \
                 FROM information_schema.processlist WHERE db = '{}'",
                database.name()
            ))
            .load(conn)
            .unwrap(),
            _ => return site.connections(),
        };
        // Asked second: whatever closed meanwhile is not counted, and two that are open at once are.
        let of_this_process = client_ports(site.port());
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

fn sixty_applications<C: Conn>(site: &Site) {
    let stop = AtomicBool::new(false);
    let most = AtomicUsize::new(0);
    let samples = AtomicUsize::new(0);
    // The observer's own threads and handles are there from the start.
    let mut eye = Eye::new(site);
    thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut eye = Eye::new(site);
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(eye.open(site), Ordering::Relaxed);
                samples.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(wait::until(Duration::from_secs(5), || samples.load(Ordering::Relaxed) > 0));
        let mut after_first = (0, 0);
        for number in 0..APPLICATIONS {
            one_application::<C>(site, &mut eye);
            site.assert_connections(0);
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

/// Threads and file descriptors, once the thread of the last pool has ended, which is told to, and the thread that watches deadlines,
/// which ends when it has had nothing to watch for a second.
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

fn one_application<C: Conn>(site: &Site, eye: &mut Eye) {
    let mut at_most_one = |step: &str| {
        let open = eye.open(site);
        assert!(open <= 1, "{open} connections after {step}");
    };
    let app = C::app(site.config());
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
    site: impl FnOnce() -> Site,
    connections: impl Fn() -> i64,
    fails_at: [usize; 2],
    message: &str,
) {
    if let Some(url) = child_of() {
        answer_parent(|size| format!("{:?}", without_disposal::<C>(&url, size.parse().ok())));
        return;
    }
    let site = site();
    let mut child = Process::spawn(test, &site.url());
    for (size, fails_at) in ["default", "1"].into_iter().zip(fails_at) {
        assert_eq!(wait::until_equal(0, Duration::from_secs(5), &connections), 0);
        child.order(size);
        let answer = child.answer();
        assert!(answer.starts_with(&format!("({fails_at}, ")) && answer.contains(message), "{answer}");
    }
}

#[test]
fn control_postgres() {
    if enabled(Kind::Postgres) {
        let message = "remaining connection slots are reserved";
        control::<PgConnection>(
            "seed::control_postgres",
            Site::postgres,
            || postgres().connections(),
            [2, 18],
            message,
        );
    }
}

#[test]
fn control_mysql() {
    if enabled(Kind::Mysql) {
        let message = "Too many connections";
        control::<MysqlConnection>("seed::control_mysql", Site::mysql, || mariadb().connections(), [3, 21], message);
    }
}
