//! A scope that only reads holds no connection and no transaction between two statements.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use diesel_session::session::Isolation as Level;

use super::*;
use crate::fixtures::{TestConnection, TestDatabase};
use crate::support::postgres;

for_each_database!(postgres, any_postgres =>
    scope_that_only_reads_is_not_idle_in_transaction,
    now_advances_between_two_reads,
    set_local_applies_to_the_reads_after_it,
    connection_lost_during_a_read_outside_requires_no_rollback,
);

diesel::table! { entries (id) { id -> Integer, author -> Text, message -> Text, } }
diesel::table! { missing_rows (id) { id -> Integer, } }
diesel::table! { ended_sessions (id) { id -> Integer, } }

/// The states of the sessions of the database, as the server shows them.
fn states(shop: &Shop<Conn>) -> Vec<String> {
    let url = shop.url();
    let query = "SELECT state AS value FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND datname = $1 AND pid <> pg_backend_pid()";
    let name = url.rsplit('/').next().expect("a name");
    let query = sql_query(query).bind::<Text, _>(name);
    let rows: Vec<Value> = query.load(&mut postgres().admin()).expect("the server answers");
    rows.into_iter().map(|row| row.value).collect()
}

fn scope_that_only_reads_is_not_idle_in_transaction() {
    test_alone(|shop| {
        shop.run(|| {
            let session = DB.session()?;
            for _ in 0..3 {
                names(&session)?;
                // Here the program renders its answer.
                assert_eq!(states(shop), ["idle"]);
            }
            add(&session, "Ada")?;
            assert_eq!(states(shop), ["idle in transaction"]);
            Ok(())
        })?;
        assert_eq!(states(shop), ["idle"]);
        shop.scope().begin_eagerly().run(|| {
            names(&DB.session()?)?;
            assert_eq!(states(shop), ["idle in transaction"]);
            Ok::<(), Error>(())
        })
    });
}

/// One connection serves several scopes that have read and still run.
#[test]
fn scopes_that_have_read_share_a_connection() {
    run_test(setup(&DB, KIND, read_committed).map(|setup| setup.max_size(1)), KIND, |shop| {
        let all_have_read = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    shop.context(|| {
                        let session = DB.session()?;
                        names(&session)?;
                        all_have_read.wait();
                        names(&session).map(drop)
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(shop.status().open, 1);
        Ok(())
    });
}

/// How many scopes read while the tables are dropped.
const READERS: usize = 8;

#[test]
fn drop_all_does_not_wait_for_scopes_that_only_read() {
    if !support::enabled(KIND) {
        return;
    }
    let test_db = match KIND {
        Kind::Sqlite => TestDatabase::sqlite(),
        Kind::Postgres => TestDatabase::postgres(),
        Kind::Mariadb => TestDatabase::mariadb(),
    };
    let app = <Conn as TestConnection>::app(read_committed(test_db.config()));
    app.create_all().unwrap();
    let all_have_read = Barrier::new(READERS + 1);
    let ended = AtomicUsize::new(0);
    thread::scope(|scope| {
        let releases: Vec<mpsc::Sender<()>> = (0..READERS)
            .map(|_| {
                let (release, released) = mpsc::channel();
                let (app, all_have_read, ended) = (&app.0, &all_have_read, &ended);
                scope.spawn(move || {
                    let read = app.context(|| <Conn as TestConnection>::db().session()?.count(entries::table));
                    // The first read of a connection type asks the server more.
                    read.unwrap();
                    let scope_of_reads = app.context(|| {
                        let rows = <Conn as TestConnection>::db().session()?.count(entries::table)?;
                        all_have_read.wait();
                        // A `drop_all` that waits for this scope waits for a second. An event ends the wait.
                        let _ = released.recv_timeout(Duration::from_secs(1));
                        ended.fetch_add(1, Ordering::SeqCst);
                        Ok(rows)
                    });
                    assert_eq!(scope_of_reads.unwrap(), 0);
                });
                release
            })
            .collect();
        all_have_read.wait();
        let dropped = app.drop_all();
        let ended = ended.load(Ordering::SeqCst);
        drop(releases);
        assert!(!dropped.unwrap().is_empty());
        assert_eq!(ended, 0, "of {READERS} scopes had ended before `drop_all`");
    });
}

fn now_advances_between_two_reads() {
    test(|shop| {
        let now =
            |session: &Session<Conn>| session.get_result::<chrono::NaiveDateTime>(diesel::select(diesel::dsl::now));
        shop.context(|| {
            let session = DB.session()?;
            let first = now(&session)?;
            assert!(now(&session)? > first);
            // In the transaction it stands still.
            add(&session, "Ada")?;
            assert_eq!(now(&session)?, now(&session)?);
            Ok(())
        })?;
        shop.scope().begin_eagerly().run(|| {
            let session = DB.session()?;
            assert_eq!(now(&session)?, now(&session)?);
            Ok(())
        })
    });
}

#[test]
fn failed_select_outside_leaves_the_scope_usable() {
    run_test(setup(&DB, KIND, read_committed), KIND, |shop| {
        let fail = |session: &Session<Conn>| session.count(missing_rows::table);
        shop.run(|| {
            let session = DB.session()?;
            assert_error!(fail(&session), Query);
            assert_eq!(names(&session)?, [""; 0]);
            assert_error!(fail(&session), Query);
            add(&session, "Ada")
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        if KIND == Kind::Postgres {
            shop.scope().begin_eagerly().run(|| {
                let session = DB.session()?;
                assert_error!(fail(&session), Query);
                assert_error!(names(&session), RollbackRequired);
                Ok::<(), Error>(())
            })?;
        }
        Ok(())
    });
}

/// The hooks that have run, after a read and `end`.
#[track_caller]
fn hooks_after(scope: diesel_session::Scope<Conn>, end: fn(&Session<Conn>) -> Result<()>) -> Vec<&'static str> {
    let ran: Rc<RefCell<Vec<&'static str>>> = Rc::default();
    let hook = |name| {
        let ran = Rc::clone(&ran);
        move || ran.borrow_mut().push(name)
    };
    let done = scope.run(|| {
        let session = DB.session()?;
        names(&session)?;
        session.before_commit(hook("before_commit"))?;
        session.after_commit(hook("after_commit"))?;
        session.after_rollback(hook("after_rollback"))?;
        end(&session)?;
        Ok::<_, Error>(ran.take())
    });
    // The end of the scope is the end of the reads too.
    let mut ran_in_scope = done.unwrap();
    ran_in_scope.extend(ran.take());
    ran_in_scope
}

#[test]
fn hooks_of_a_session_that_only_reads_run() {
    run_test(setup(&DB, KIND, read_committed), KIND, |shop| {
        for scope in [|shop: &Shop<Conn>| shop.scope(), |shop: &Shop<Conn>| shop.scope().begin_eagerly()] {
            assert_eq!(hooks_after(scope(shop), |session| session.commit()), ["before_commit", "after_commit"]);
            assert_eq!(hooks_after(scope(shop), |session| session.rollback()), ["after_rollback"]);
            assert_eq!(hooks_after(scope(shop), |_| Ok(())), ["after_rollback"]);
        }
        Ok(())
    });
}

fn set_local_applies_to_the_reads_after_it() {
    test(|shop| {
        elsewhere(shop, "CREATE SCHEMA tenant");
        elsewhere(shop, "CREATE TABLE tenant.users AS SELECT 1 AS id, 'Eve' AS name, 7 AS age");
        shop.context(|| {
            let session = DB.session()?;
            assert_eq!(names(&session)?, [""; 0]);
            raw(&session, "SET LOCAL search_path = tenant")?;
            assert!(is_begun(shop, &session));
            assert_eq!(names(&session)?, ["Eve"]);
            session.commit()?;
            assert_eq!(names(&session)?, [""; 0]);
            assert!(!is_begun(shop, &session));
            Ok(())
        })?;
        shop.scope().isolation(Level::ReadCommitted).run(|| {
            let session = DB.session()?;
            session.begin()?;
            raw(&session, "SET LOCAL search_path = tenant")?;
            assert_eq!(names(&session)?, ["Eve"]);
            Ok(())
        })
    });
}

fn connection_lost_during_a_read_outside_requires_no_rollback() {
    test(|shop| {
        elsewhere(shop, "CREATE VIEW ended_sessions AS SELECT pg_terminate_backend(pg_backend_pid())::int AS id");
        shop.run(|| {
            let session = DB.session()?;
            assert_eq!(names(&session)?, [""; 0]);
            let line = line!() + 1;
            let error = session.load::<i32>(ended_sessions::table.select(ended_sessions::id)).unwrap_err();
            assert_eq!((error.kind(), line_of(&error)), (ErrorKind::ConnectionLost, line), "{error}");
            assert!(error.is_transient() && !error.is_rollback_required(), "{error}");
            assert!(error.to_string().contains("It only read") && !error.to_string().contains("rollback()"), "{error}");
            // The same session goes on with another connection.
            assert_eq!(names(&session)?, [""; 0]);
            add(&session, "Ada")
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}
