//! A scope ends close to its deadline although the server does not answer any more: in a statement, at COMMIT, in the
//! rollback at the end of a context, while a connection is out of its session, and in a hook of the pool.

use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::result::QueryResult;
use diesel_session::{App, Config, Database, ErrorKind, Result, Session};

use crate::fixtures::{COUNT, INSERT, POSTGRES, SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{self, wait};

const DEADLINE: Duration = Duration::from_secs(1);

for_each_database!(every_server =>
    statement_of_a_silent_server_ends_at_the_deadline,
    commit_at_a_silent_server_is_unknown_at_the_deadline,
    context_ends_at_its_deadline_at_a_silent_server,
    autocommit_statement_ends_at_the_deadline,
    connection_out_of_its_session_is_cut_at_the_deadline,
    statement_that_ends_in_time_keeps_its_connection,
);
for_each_database!(only postgres =>
    hook_of_the_pool_does_not_hold_a_scope_beyond_the_deadline,
    frozen_backend_does_not_hold_a_statement_beyond_the_deadline,
    frozen_backend_does_not_hold_a_commit_beyond_the_deadline,
    frozen_backend_does_not_hold_the_end_of_a_context_beyond_the_deadline,
    frozen_backend_does_not_hold_the_first_statement_beyond_the_deadline,
    every_connection_of_a_crowd_is_cut_at_the_deadline,
);

/// How long the scope took, and what came of it.
fn timed<T>(run: impl FnOnce() -> Result<T>) -> (Result<T>, Duration) {
    let started = Instant::now();
    let outcome = run();
    (outcome, started.elapsed())
}

#[track_caller]
fn ends_in_time(took: Duration) {
    let in_time = took >= DEADLINE - Duration::from_millis(5) && took < 2 * DEADLINE;
    assert!(in_time, "a scope ends close to its deadline: {took:?}");
}

#[track_caller]
fn is_late<T: std::fmt::Debug>(outcome: Result<T>) {
    let error = outcome.unwrap_err();
    assert!(
        error.kind() == ErrorKind::DeadlineExceeded && error.to_string().contains(&format!("{DEADLINE:?}")),
        "{error}"
    );
    assert!(error.is_timeout(), "{error}");
}

struct Line<'s, C: TestConnection> {
    test_db: &'s TestDatabase,
    proxy: Proxy,
    app: crate::fixtures::RegisteredApp<C>,
}

impl<'s, C: TestConnection> Line<'s, C> {
    fn new(test_db: &'s TestDatabase) -> Self {
        let proxy = Proxy::to(("127.0.0.1", test_db.port()));
        let app = C::app(Config::new(test_db.url_at(proxy.port())));
        app.create_all().unwrap();
        Self { test_db, proxy, app }
    }

    /// The pool works, the silent connection is closed, and of its transaction there is nothing left.
    #[track_caller]
    fn recovers(&self, rows: i64) {
        let settled = || self.app.status().in_use == 0;
        assert!(wait::until(Duration::from_secs(1), settled), "{}", self.app.status());
        self.proxy.set(Mode::Pass);
        self.proxy.cut_all();
        let count = self.app.context(|| C::db().session()?.number(COUNT)).unwrap();
        assert_eq!(count, rows);
        self.test_db.assert_connections(self.app.status().open);
    }
}

fn statement_of_a_silent_server_ends_at_the_deadline<C: TestConnection>(test_db: &TestDatabase) {
    let line = Line::<C>::new(test_db);
    for read_only in [false, true] {
        let scope = line.app.scope().deadline(DEADLINE);
        let scope = if read_only { scope.read_only() } else { scope };
        let (outcome, took) = timed(|| {
            scope.run(|| {
                let session = C::db().session()?;
                session.number(COUNT)?;
                line.proxy.set(Mode::Silent);
                let outcome = session.number(COUNT);
                assert!(session.commit().unwrap_err().is_rollback_required(), "nothing was sent");
                outcome
            })
        });
        ends_in_time(took);
        is_late(outcome);
        line.recovers(0);
    }
}

fn commit_at_a_silent_server_is_unknown_at_the_deadline<C: TestConnection>(test_db: &TestDatabase) {
    let line = Line::<C>::new(test_db);
    let (outcome, took) = timed(|| {
        line.app.scope().deadline(DEADLINE).run_and_commit(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            line.proxy.set(Mode::Silent);
            Ok(())
        })
    });
    ends_in_time(took);
    let error = outcome.unwrap_err();
    assert!(error.is_commit_unknown(), "{error}");
    // The proxy forwards nothing from a connection that the client has left, so the server never saw it.
    line.recovers(0);
}

fn context_ends_at_its_deadline_at_a_silent_server<C: TestConnection>(test_db: &TestDatabase) {
    let line = Line::<C>::new(test_db);
    let (outcome, took) = timed(|| {
        line.app.scope().deadline(DEADLINE).run(|| {
            C::db().session()?.send(INSERT)?;
            line.proxy.set(Mode::Silent);
            Ok(())
        })
    });
    ends_in_time(took);
    outcome.unwrap();
    line.recovers(0);

    // What comes after the deadline has the same time as an answer that is on its way.
    let (_, took) = timed(|| {
        line.app.scope().deadline(DEADLINE).run(|| {
            C::db().session()?.send(INSERT)?;
            // The closure goes on until the deadline.
            std::thread::sleep(DEADLINE);
            line.proxy.set(Mode::Silent);
            Ok(())
        })
    });
    ends_in_time(took);
    line.recovers(0);
}

fn autocommit_statement_ends_at_the_deadline<C: TestConnection>(test_db: &TestDatabase) {
    let line = Line::<C>::new(test_db);
    let (outcome, took) = timed(|| {
        line.app.scope().autocommit().deadline(DEADLINE).run(|| {
            let session = C::db().session()?;
            session.number(COUNT)?;
            line.proxy.set(Mode::Silent);
            session.number(COUNT)
        })
    });
    ends_in_time(took);
    is_late(outcome);
    line.recovers(0);
}

fn connection_out_of_its_session_is_cut_at_the_deadline<C: TestConnection>(test_db: &TestDatabase) {
    let line = Line::<C>::new(test_db);
    let (_, took) = timed(|| {
        line.app.scope().deadline(DEADLINE).run(|| {
            let session = C::db().session()?;
            let mut conn = session.connection()?;
            conn.batch_execute(INSERT).unwrap();
            line.proxy.set(Mode::Silent);
            conn.batch_execute(INSERT).unwrap_err();
            drop(conn);
            assert!(session.commit().unwrap_err().is_rollback_required());
            Ok(())
        })
    });
    ends_in_time(took);
    line.recovers(0);
}

/// The server itself ends a statement that is only slow, and the connection is kept.
fn statement_that_ends_in_time_keeps_its_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1));
    app.create_all().unwrap();
    let (own_number, sleep) = match test_db {
        TestDatabase::Postgres(_) => ("SELECT pg_backend_pid()::bigint AS number", "SELECT pg_sleep(60)"),
        _ => ("SELECT connection_id() AS number", "SELECT SLEEP(60)"),
    };
    let number = || C::db().session()?.with(|conn| conn.number(own_number));
    let before = app.context(number).unwrap();
    let (outcome, took) = timed(|| {
        app.scope().deadline(DEADLINE).run(|| {
            let session: Session<C> = C::db().session()?;
            assert_eq!(session.with(|conn| conn.number(own_number))?, before);
            session.send(sleep)
        })
    });
    ends_in_time(took);
    if matches!(test_db, TestDatabase::Postgres(_)) {
        is_late(outcome);
        assert_eq!(app.context(number).unwrap(), before, "the same connection");
    }
    app.scope().deadline(DEADLINE).run(|| C::db().session()?.number(COUNT)).unwrap();
}

/// Backends that are frozen until this is dropped: a server with frozen backends makes no database.
struct Frozen(std::cell::RefCell<Vec<i32>>);

impl Frozen {
    fn thaw(&self) {
        let server = support::postgres();
        self.0.borrow_mut().drain(..).for_each(|pid| server.sigcont(pid));
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.thaw();
    }
}

/// Each by TCP and by the server's local socket.
fn frozen(body: impl Fn(&Frozen, &diesel_session::App<PgConnection>, &dyn Fn())) {
    let test_db = TestDatabase::postgres();
    let TestDatabase::Postgres(database) = &test_db else { unreachable!() };
    for url in [test_db.url(), test_db.socket_url()] {
        let app = PgConnection::app(Config::new(url).max_size(4));
        app.create_all().unwrap();
        let server = support::postgres();
        let stopped = Frozen(std::cell::RefCell::default());
        body(&stopped, &app, &|| {
            let pids = server.backend_pids(database.name());
            pids.iter().for_each(|pid| server.sigstop_backend(*pid));
            stopped.0.borrow_mut().extend(pids);
        });
        let settled = || app.status().in_use == 0;
        assert!(wait::until(Duration::from_secs(1), settled), "{}", app.status());
        app.context(|| PgConnection::db().session()?.number(COUNT)).unwrap();
        stopped.thaw();
        let open = app.status().open;
        test_db.assert_connections(open);
        assert_eq!(app.context(|| PgConnection::db().session()?.number(COUNT)).unwrap(), 0);
        app.dispose().unwrap();
    }
}

fn frozen_backend_does_not_hold_a_statement_beyond_the_deadline() {
    frozen(|_, app, freeze| {
        let (outcome, took) = timed(|| {
            app.scope().deadline(DEADLINE).run(|| {
                let session = PgConnection::db().session()?;
                session.send(INSERT)?;
                freeze();
                session.number(COUNT)
            })
        });
        ends_in_time(took);
        is_late(outcome);
    });
}

fn frozen_backend_does_not_hold_a_commit_beyond_the_deadline() {
    frozen(|stopped, app, freeze| {
        let (outcome, took) = timed(|| {
            app.scope().deadline(DEADLINE).run_and_commit(|| {
                let session = PgConnection::db().session()?;
                session.send(INSERT)?;
                freeze();
                Ok(())
            })
        });
        ends_in_time(took);
        assert!(outcome.unwrap_err().is_commit_unknown());
        // It commits once it goes on: the message is in its socket.
        stopped.thaw();
        let stored = || app.context(|| PgConnection::db().session()?.number(COUNT)).unwrap() == 1;
        assert!(wait::until(Duration::from_secs(1), stored), "the backend commits once it goes on");
        app.run(|| PgConnection::db().session()?.send("DELETE FROM entries")).unwrap();
    });
}

fn frozen_backend_does_not_hold_the_end_of_a_context_beyond_the_deadline() {
    frozen(|_, app, freeze| {
        let (outcome, took) = timed(|| {
            app.scope().deadline(DEADLINE).run(|| {
                PgConnection::db().session()?.send(INSERT)?;
                freeze();
                Ok(())
            })
        });
        ends_in_time(took);
        outcome.unwrap();
    });
}

/// A connection that was used just now is not asked for an answer before it is checked out.
fn frozen_backend_does_not_hold_the_first_statement_beyond_the_deadline() {
    frozen(|_, app, freeze| {
        let (outcome, took) = timed(|| {
            app.context(|| PgConnection::db().session()?.number(COUNT))?;
            freeze();
            app.scope().deadline(DEADLINE).run(|| PgConnection::db().session()?.number(COUNT))
        });
        // A connection that is sound may have been opened instead.
        assert!(took < 2 * DEADLINE, "a scope ends close to its deadline: {took:?}");
        if let Err(error) = outcome {
            assert!(error.is_timeout(), "{error}");
        }
    });
}

fn hook_of_the_pool_does_not_hold_a_scope_beyond_the_deadline() {
    fn sleep(_: &App<PgConnection>, conn: &mut PgConnection) -> QueryResult<()> {
        conn.batch_execute("SELECT pg_sleep(30)")
    }
    let test_db = TestDatabase::postgres();
    let on_checkout = Database::new(POSTGRES).on_checkout(sleep);
    let app = on_checkout.init_app(unique("app"), test_db.config()).unwrap();
    let (outcome, took) =
        timed(|| app.scope().deadline(DEADLINE).run(|| on_checkout.session()?.number("SELECT 1::bigint AS number")));
    ends_in_time(took);
    outcome.unwrap_err();
    on_checkout.dispose_all().unwrap();

    let on_checkin = Database::new(POSTGRES).on_checkin(sleep);
    let app = on_checkin.init_app(unique("app"), test_db.config().connect_timeout(Duration::from_secs(30))).unwrap();
    let (outcome, took) =
        timed(|| app.scope().deadline(DEADLINE).run(|| on_checkin.session()?.number("SELECT 1::bigint AS number")));
    ends_in_time(took);
    outcome.unwrap();
    assert_eq!(app.status().open, 0);
    on_checkin.dispose_all().unwrap();
}

/// Many connections at a time, each with a socket of its own.
fn every_connection_of_a_crowd_is_cut_at_the_deadline() {
    frozen(|_, app, freeze| {
        let all_begun = std::sync::Barrier::new(5);
        // They are opened at one time, too, and no connection is checked in before all are in use.
        let all_open = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            let open = || {
                let session = app.open_session().unwrap();
                session.begin().unwrap();
                assert!(wait::until(Duration::from_secs(5), || app.status().in_use == 4), "{}", app.status());
                all_open.wait();
            };
            (0..4).for_each(|_| drop(scope.spawn(open)));
        });
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        app.scope().deadline(DEADLINE).run(|| {
                            let session = PgConnection::db().session()?;
                            let begun = session.send(INSERT);
                            all_begun.wait();
                            all_begun.wait();
                            begun?;
                            let started = Instant::now();
                            let outcome = session.number(COUNT);
                            let took = started.elapsed();
                            assert!(took < 2 * DEADLINE, "a statement ends close to the deadline: {took:?}");
                            outcome
                        })
                    })
                })
                .collect();
            all_begun.wait();
            freeze();
            all_begun.wait();
            threads.into_iter().for_each(|thread| is_late(thread.join().unwrap()));
        });
    });
}

/// Another program has the write lock of a SQLite file for longer than the scope has time.
#[test]
fn lock_of_another_program_does_not_hold_a_scope_beyond_the_deadline() {
    for wal in [true, false] {
        let test_db = TestDatabase::sqlite();
        let app = SqliteConnection::app(test_db.config().wal(wal).lock_timeout(Duration::from_secs(10)));
        app.create_all().unwrap();
        let mut other = SqliteConnection::establish(&test_db.url()).unwrap();
        let busy = |_: ()| {
            app.context(|| {
                SqliteConnection::db().session()?.number("SELECT timeout AS number FROM pragma_busy_timeout")
            })
            .unwrap()
        };
        let scope = || app.scope().deadline(DEADLINE);
        let write = || SqliteConnection::db().session()?.send(INSERT);
        other.batch_execute("BEGIN EXCLUSIVE").unwrap();
        for autocommit in [false, true] {
            let scope = if autocommit { scope().autocommit() } else { scope() };
            let (outcome, took) = timed(|| scope.run(write));
            ends_in_time(took);
            is_late(outcome);
        }
        if !wal {
            // Without a write-ahead log a reader waits as well, in a transaction and outside of one.
            let read = || SqliteConnection::db().session()?.number(COUNT);
            let (outcome, took) = timed(|| scope().read_only().run(read));
            ends_in_time(took);
            is_late(outcome);
        }
        other.batch_execute("ROLLBACK").unwrap();
        scope().run(write).unwrap();
        assert_eq!(busy(()), 10_000, "it is what it was");
        if !wal {
            // A reader keeps a writer from its COMMIT.
            let (outcome, took) = timed(|| {
                scope().run_and_commit(|| {
                    write()?;
                    other.batch_execute("BEGIN; SELECT count(*) FROM entries").unwrap();
                    Ok(())
                })
            });
            other.batch_execute("ROLLBACK").unwrap();
            ends_in_time(took);
            is_late(outcome);
            assert_eq!(busy(()), 10_000, "it is what it was");
        }
        app.context(|| SqliteConnection::db().session()?.number(COUNT)).unwrap();
        app.drop_all().unwrap();
        app.dispose().unwrap();
    }
}
