//! A process that is forked while it has connections: what the new process may do, and what becomes of its parent's.
//!
//! Three processes: the test, with the servers and a proxy; the parent, which is this program once more; and its child,
//! a fork of it, which tells by a pipe and its exit code.

use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use diesel_session::{App, Config, Database, Error, ErrorKind, Session};
use fork::Fork;
use scheduled_thread_pool::ScheduledThreadPool;

use crate::fixtures::threads::{Process, answer_parent, child_of};
use crate::fixtures::{COUNT, INSERT, Provisioner, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::proxy::Proxy;
use crate::support::{TempSqlite, process};

for_each_database!(Provisioner; postgres, mariadb, sqlite => fork_keeps_the_sessions_of_the_parent);
for_each_database!(only postgres => plain_r2d2_ends_the_sessions_of_its_parent);

/// Forks; `false` in the child.
type Forks<'f> = &'f dyn Fn() -> bool;

/// What a session is in the middle of when the process is forked; in the child it goes on from there.
type Way<C> = fn(&Session<C>, Forks<'_>);

fn ways<C: TestConnection>() -> [(&'static str, Way<C>); 7] {
    [
        ("a statement", |session, fork| {
            if !fork() {
                is_refused(session.send(INSERT));
                assert!(session.number(COUNT).unwrap_err().is_rollback_required());
                assert!(session.commit().unwrap_err().is_rollback_required());
                session.rollback().unwrap();
                is_refused(session.number(COUNT));
            }
        }),
        ("commit", |session, fork| {
            if !fork() {
                is_refused(session.commit());
                is_refused(session.begin());
            }
        }),
        ("rollback", |session, fork| {
            if !fork() {
                session.rollback().unwrap();
                session.remove().unwrap();
            }
        }),
        ("nothing", |_, fork| _ = fork()),
        ("a savepoint", |session, fork| {
            let parent = Cell::new(true);
            let outcome = session.savepoint(|_| {
                parent.set(fork());
                Ok::<_, Error>(())
            });
            if parent.get() { outcome.unwrap() } else { is_refused(outcome) }
        }),
        ("a connection that is checked out", |session, fork| {
            let conn = session.connection().unwrap();
            let parent = fork();
            drop(conn);
            if !parent {
                assert!(session.number(COUNT).unwrap_err().is_rollback_required());
            }
        }),
        ("code with the connection", |session, fork| {
            let parent = Cell::new(true);
            let outcome = session.with(|_| {
                parent.set(fork());
                Ok(())
            });
            if parent.get() { outcome.unwrap() } else { is_refused(outcome) }
        }),
    ]
}

#[track_caller]
fn is_refused<T>(outcome: Result<T, Error>) {
    let Err(error) = outcome else { panic!("it was let do it") };
    assert!(
        error.kind() == ErrorKind::Forked && error.app().expect("an application") == "shop" && error.code() == "DS209",
        "{error}"
    );
    assert!(error.to_string().contains("`dispose_all()`"), "{error}");
}

/// Runs `body`, which forks, in both processes from there on. The parent waits for its child and panics where that has;
/// the child goes on with `at_the_end` and ends.
fn forking(body: impl FnOnce(Forks<'_>), at_the_end: impl FnOnce()) {
    let child = Cell::new(None);
    let fork = || {
        let (mut heard, told) = UnixStream::pair().unwrap();
        match fork::fork().unwrap() {
            Fork::Child => {
                child.set(Some(told));
                false
            }
            Fork::Parent(pid) => {
                drop(told);
                heard.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
                let mut text = String::new();
                let outcome = heard.read_to_string(&mut text);
                if outcome.is_err() {
                    process::signal("KILL", &[pid as u32]);
                }
                fork::waitpid(pid).unwrap();
                assert!(outcome.is_ok() && text == DONE, "the child: {outcome:?}: {text}");
                true
            }
        }
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| body(&fork)));
    match (child.take(), outcome) {
        (Some(told), outcome) => end(told, outcome.and_then(|()| catch_unwind(AssertUnwindSafe(at_the_end)))),
        (None, Err(panic)) => resume_unwind(panic),
        (None, Ok(())) => {}
    }
}

const DONE: &str = "done";

/// The child's end.
fn end(mut told: UnixStream, outcome: std::thread::Result<()>) -> ! {
    let text = match &outcome {
        Ok(()) => DONE,
        Err(panic) => panic.downcast_ref::<String>().map(String::as_str).unwrap_or("it panicked"),
    };
    told.write_all(text.as_bytes()).unwrap();
    drop(told);
    std::process::exit(i32::from(outcome.is_err()))
}

/// What the parent has: all connections that its database object may have, one in a transaction, two idle.
struct Scene<C: TestConnection> {
    db: Database<C>,
    app: App<C>,
    session: Session<C>,
    ids: Vec<i64>,
    id: Option<&'static str>,
}

impl<C: TestConnection> Scene<C> {
    fn new(url: &str) -> Self {
        let db = C::new_db().max_connections(3);
        let app = db.init_app("shop", Config::new(url).idle_timeout(None)).unwrap();
        app.create_all().unwrap();
        let session = app.open_session().unwrap();
        let id = match url.split_once(':') {
            Some(("postgres", _)) => Some("SELECT pg_backend_pid()::bigint AS number"),
            Some(("mysql", _)) => Some("SELECT CONNECTION_ID() AS number"),
            _ => None,
        };
        Self { db, app, session, ids: Vec::new(), id }
    }

    fn begin(&mut self) {
        self.session.send(INSERT).unwrap();
        self.ids = self.numbers();
    }

    /// The server's numbers of all its sessions, that in the transaction first.
    fn numbers(&self) -> Vec<i64> {
        let Some(id) = self.id else { return Vec::new() };
        let others: Vec<_> = (0..2).map(|_| self.app.open_session().unwrap()).collect();
        let mut numbers: Vec<i64> = others.iter().map(|session| session.number(id).unwrap()).collect();
        numbers.sort_unstable();
        numbers.insert(0, self.session.number(id).unwrap());
        numbers
    }

    /// The connections are what they were, and what was begun before the fork is committed.
    fn end(&self, rows: i64) {
        assert_eq!(self.numbers(), self.ids);
        self.session.commit().unwrap();
        assert_eq!(self.session.number(COUNT).unwrap(), rows);
        self.session.rollback().unwrap();
    }
}

/// Answers `begin`, `walk`, `fork` and `end` for each of the ways, then `dispose`.
fn parent<C: TestConnection>(url: &str) {
    let mut scene = Some(Scene::<C>::new(url));
    let mut rows = 0;
    answer_parent(|order| {
        match order.split_once(' ').unwrap_or((order, "")) {
            ("begin", _) => scene.as_mut().unwrap().begin(),
            ("end", _) => {
                rows += 1;
                scene.as_ref().unwrap().end(rows);
            }
            (verb @ ("walk" | "fork"), way) => {
                let (_, way) = ways::<C>().into_iter().find(|(name, _)| *name == way).unwrap();
                let session = scene.as_ref().unwrap().session.clone();
                if verb == "walk" {
                    way(&session, &|| true);
                    return DONE.to_owned();
                }
                forking(
                    move |fork| way(&session, fork),
                    || {
                        let scene = scene.take().unwrap();
                        is_refused(scene.app.ping());
                        is_refused(scene.app.open_session().unwrap().number(COUNT));
                        is_refused(scene.app.create_all());
                        assert_eq!(scene.app.status().open, 0, "it has none of its own");
                        drop(scene);
                    },
                );
            }
            ("dispose", _) => {
                let Scene { db, session, .. } = scene.as_ref().unwrap();
                let anew = || {
                    assert_eq!(db.dispose_all_report().unwrap().closed, 0, "nothing of its own");
                    session.rollback().unwrap();
                    is_refused(session.number(COUNT));
                    assert!(db.remove_app("shop").unwrap().is_complete());
                    is_refused(db.init_app("shop", Config::new(url)).unwrap().ping());
                };
                forking(|fork| _ = fork(), anew);
            }
            other => panic!("{other:?}"),
        }
        DONE.to_owned()
    });
    let Some(Scene { db, app, session, .. }) = scene else { return };
    drop(session);
    assert!(db.dispose_all_report().unwrap().closed > 0);
    let anew = || {
        let session = app.open_session().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), rows);
        session.rollback().unwrap();
        db.init_app("another", Config::new(url)).unwrap().ping().unwrap();
        assert!(db.dispose_all_report().unwrap().closed > 0);
    };
    forking(|fork| _ = fork(), anew);
    // The parent goes on too.
    anew();
}

fn fork_keeps_the_sessions_of_the_parent<C: TestConnection>(provisioner: &Provisioner) {
    if let Some(url) = child_of() {
        return parent::<C>(&url);
    }
    let test_db = (provisioner.create)();
    let proxy = match &test_db {
        TestDatabase::Sqlite(_) => None,
        server => Some(Proxy::to(("127.0.0.1", server.port()))),
    };
    let url = proxy.as_ref().map_or_else(|| test_db.url(), |proxy| test_db.url_at(proxy.port()));
    let sent = || proxy.as_ref().map_or((0, 0), |proxy| (proxy.accepted(), proxy.sent()));
    let during = |step: &mut dyn FnMut()| {
        let before = sent();
        step();
        (sent().0 - before.0, sent().1 - before.1)
    };
    let test = format!("fork::fork_keeps_the_sessions_of_the_parent::{}", provisioner.name);
    let mut parent = Process::spawn(&test, &url);
    let mut tell = |order: &str| {
        parent.order(order);
        assert_eq!(parent.answer(), DONE, "{order}");
    };
    for (name, _) in ways::<C>() {
        tell("begin");
        // What the parent itself sends on the way.
        let own = during(&mut || tell(&format!("walk {name}")));
        assert_eq!(during(&mut || tell(&format!("fork {name}"))), own, "{name}");
        tell("end");
    }
    tell("begin");
    assert_eq!(during(&mut || tell("dispose")), (0, 0));
    tell("end");
    drop(parent);
    test_db.assert_connections(0);
}

/// The control, plain r2d2: the child's copy of the pool ends the sessions of its parent.
fn plain_r2d2_ends_the_sessions_of_its_parent() {
    if let Some(url) = child_of() {
        // One thread, so that it has let go of the pool when it has come to a job of ours.
        let threads = Arc::new(ScheduledThreadPool::builder().num_threads(1).build());
        let pool = Pool::builder().max_size(2).thread_pool(Arc::clone(&threads));
        let mut pool = Some(pool.build(ConnectionManager::<PgConnection>::new(url)).unwrap());
        let (tell, told) = mpsc::channel();
        threads.execute(move || tell.send(()).unwrap());
        told.recv().unwrap();
        answer_parent(|_| {
            forking(|fork| _ = fork(), || drop(pool.take()));
            DONE.to_owned()
        });
        return;
    }
    let test_db = TestDatabase::postgres();
    let mut parent = Process::spawn("fork::plain_r2d2_ends_the_sessions_of_its_parent::postgres", &test_db.url());
    test_db.assert_connections(2);
    parent.order("fork");
    assert_eq!(parent.answer(), DONE);
    test_db.assert_connections(0);
}

/// Plain Diesel: a child opens the file anew, the parent closes it, and what the child wrote since is gone without an
/// error.
#[test]
fn plain_diesel_loses_rows_of_a_forked_sqlite_file() {
    const INTO: &str = "INSERT INTO t VALUES (1)";
    let Some(url) = child_of() else {
        let file = TempSqlite::new();
        let mut parent = Process::spawn("fork::plain_diesel_loses_rows_of_a_forked_sqlite_file", &file.url());
        parent.order("fork");
        assert_eq!(parent.answer(), DONE);
        let rows =
            SqliteConnection::establish(&file.url()).unwrap().number("SELECT count(*) AS number FROM t").unwrap();
        assert_eq!(rows, 1, "of eleven");
        return;
    };
    answer_parent(|_| {
        let mut inherited = Some(SqliteConnection::establish(&url).unwrap());
        let conn = inherited.as_mut().unwrap();
        conn.batch_execute("PRAGMA journal_mode = WAL; CREATE TABLE t (a INTEGER)").unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut byte = [0];
        match fork::fork().unwrap() {
            Fork::Child => {
                let mut fresh = SqliteConnection::establish(&url).unwrap();
                fresh.batch_execute(INTO).unwrap();
                theirs.write_all(&byte).unwrap();
                theirs.read_exact(&mut byte).unwrap();
                for _ in 0..10 {
                    fresh.batch_execute(INTO).unwrap();
                }
                std::process::exit(0)
            }
            Fork::Parent(child) => {
                ours.read_exact(&mut byte).unwrap();
                drop(inherited.take());
                ours.write_all(&byte).unwrap();
                fork::waitpid(child).unwrap();
            }
        }
        DONE.to_owned()
    });
}
