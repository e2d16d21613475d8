//! Tests that are rolled back: what a session can do in one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use diesel::prelude::*;
use diesel_session::session::Isolation;

use super::*;

for_each_database!(ServerUrl; postgres, mariadb, sqlite, any_mariadb =>
    rolled_back_test_keeps_nothing_of_ten_commits,
    rolled_back_test_supports_every_session_call,
    error_in_a_rolled_back_test_undoes_its_own_transaction_only,
    autocommit_scope_works_in_a_rolled_back_test,
    threads_of_a_rolled_back_test_share_its_connection,
    nested_context_in_a_rolled_back_test_would_deadlock,
    disposal_in_a_rolled_back_test_keeps_its_rows,
    panic_inside_with_undoes_its_own_transaction_only,
    raw_commit_in_a_rolled_back_test_fails_the_test,
    read_only_scopes_of_a_rolled_back_test_do_not_wait,
);
for_each_database!(only postgres =>
    commit_is_refused_after_an_error_that_the_driver_did_not_report,
    deferred_constraint_fails_the_autocommitted_statement_in_a_rolled_back_test,
);

#[track_caller]
fn rollback<C: TestConnection>(url: &str) -> TestApp<C> {
    begin(&(Config::new(url), TestIsolation::Rollback))
}

fn rolled_back_test_keeps_nothing_of_ten_commits<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    for rows in 1..=10 {
        test.context(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            session.commit()?;
            assert_eq!(session.number(COUNT)?, rows);
            Ok::<(), Error>(())
        })
        .unwrap();
    }
    test.finish().unwrap();
    let next = rollback::<C>(url);
    assert_eq!(committed(&next), 0);
    next.finish().unwrap();
}

fn rolled_back_test_supports_every_session_call<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.context(|| {
        let session = C::db().session()?;
        session.begin()?;
        session.send(INSERT)?;
        session.rollback()?;
        assert_eq!(session.number(COUNT)?, 0);
        session.rollback()?;
        session.transaction(|session| {
            session.send(INSERT)?;
            let undone: Result<()> = session.savepoint(|session| {
                session.send(INSERT)?;
                Err(Error::from(diesel::result::Error::NotFound))
            });
            assert!(undone.is_err());
            session.savepoint(|session| session.send(INSERT))
        })?;
        assert_eq!(session.number(COUNT)?, 2);
        // What Diesel's own code does.
        session.with(|conn| {
            let undone: QueryResult<()> = conn.transaction(|conn| {
                conn.batch_execute(INSERT)?;
                Err(diesel::result::Error::RollbackTransaction)
            });
            assert!(undone.is_err());
            conn.transaction(|conn| conn.batch_execute(INSERT))
        })?;
        assert_eq!(session.number(COUNT)?, 3);
        session.commit()
    })
    .unwrap();
    for level in [Isolation::ReadCommitted, Isolation::Serializable] {
        let scope = test.scope().isolation(level).deadline(Duration::from_secs(20));
        scope.run_and_commit(|| C::db().session()?.send(INSERT)).unwrap();
    }
    let read = test.scope().read_only().run(|| {
        let session = C::db().session()?;
        assert_eq!(session.number(COUNT)?, 5);
        Ok::<bool, Error>(session.send(INSERT).is_err())
    });
    // MySQL knows no read-only part of a transaction.
    let refuses = !test.url().starts_with("mysql");
    assert_eq!(read.unwrap(), refuses);
    assert_eq!(committed(&test), 5);
    assert_eq!(test.create_all().unwrap(), Vec::<String>::new());
    test.ping().unwrap();
    test.finish().unwrap();
}

fn error_in_a_rolled_back_test_undoes_its_own_transaction_only<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.context(|| {
        let session = C::db().session()?;
        session.send(INSERT)?;
        session.commit()?;
        session.send(INSERT)?;
        assert!(session.send("INSERT INTO nowhere VALUES (1)").is_err());
        session.rollback()?;
        assert_eq!(session.number(COUNT)?, 1);
        let failed = session.transaction(|session| session.send("SELECT nothing FROM nowhere"));
        assert!(failed.is_err());
        session.send(INSERT)?;
        session.commit()
    })
    .unwrap();
    assert_eq!(committed(&test), 2);
    test.finish().unwrap();
}

fn autocommit_scope_works_in_a_rolled_back_test<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.scope()
        .autocommit()
        .run(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            assert!(session.send("SELECT nothing FROM nowhere").is_err());
            assert_eq!(session.number(COUNT)?, 1);
            let mut conn = session.connection()?;
            conn.batch_execute(INSERT)?;
            drop(conn);
            session.transaction(|session| session.send(INSERT))?;
            assert!(!session.in_transaction());
            session.rollback()
        })
        .unwrap();
    assert_eq!(committed(&test), 3);
    test.finish().unwrap();
}

fn deferred_constraint_fails_the_autocommitted_statement_in_a_rolled_back_test() {
    const INSERT_ONE: &str = "INSERT INTO deferred VALUES (1)";
    let test = rollback::<PgConnection>(&support::postgres().url());
    test.run(|| {
        let session = PgConnection::db().session()?;
        session.send("CREATE TABLE deferred (one INTEGER UNIQUE DEFERRABLE INITIALLY DEFERRED)")?;
        session.send(INSERT_ONE)
    })
    .unwrap();
    test.scope()
        .autocommit()
        .run(|| {
            let session = PgConnection::db().session()?;
            let error = session.send(INSERT_ONE).unwrap_err();
            assert!(error.is_unique_violation(), "{error}");
            assert_eq!(session.number("SELECT count(*) AS number FROM deferred")?, 1);
            Ok::<(), Error>(())
        })
        .unwrap();
    test.finish().unwrap();
}

fn threads_of_a_rolled_back_test_share_its_connection<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    test.run(|| C::db().session()?.send(INSERT)).unwrap();
                }
            });
        }
    });
    assert_eq!(committed(&test), 20);
    assert_eq!(test.status().open, 1);
    test.finish().unwrap();
}

fn nested_context_in_a_rolled_back_test_would_deadlock<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.context(|| {
        let outer = C::db().session()?;
        outer.send(INSERT)?;
        let inner = test.context(|| C::db().session()?.send(INSERT));
        let error = inner.unwrap_err();
        assert_eq!(error.code(), "DS206", "{error}");
        assert!(error.to_string().contains("TestIsolation::Database"), "{error}");
        outer.commit()?;
        test.context(|| {
            C::db().session()?.send(INSERT)?;
            C::db().session()?.commit()
        })
    })
    .unwrap();
    // Another thread waits for as long as it may.
    let (told, heard) = mpsc::channel();
    std::thread::scope(|scope| {
        let holder = test.open_session().unwrap();
        holder.send(INSERT).unwrap();
        scope.spawn(|| {
            let waited = test.run(|| C::db().session()?.send(INSERT));
            told.send(waited.is_ok()).unwrap();
        });
        assert!(heard.recv_timeout(Duration::from_millis(50)).is_err());
        holder.commit().unwrap();
        assert!(heard.recv_timeout(Duration::from_secs(5)).unwrap());
    });
    assert_eq!(committed(&test), 4);
    test.finish().unwrap();
}

fn disposal_in_a_rolled_back_test_keeps_its_rows<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    for rows in 1..=2 {
        test.run(|| C::db().session()?.send(INSERT)).unwrap();
        test.dispose().unwrap();
        assert_eq!(committed(&test), rows);
    }
    test.finish().unwrap();
}

fn panic_inside_with_undoes_its_own_transaction_only<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.run(|| C::db().session()?.send(INSERT)).unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| {
        test.enter(|| {
            let session = C::db().session().unwrap();
            let _ = session.with(|conn| {
                conn.transaction(|conn| -> QueryResult<()> {
                    conn.batch_execute(INSERT)?;
                    panic!("in a handler")
                })
            });
        });
    }));
    assert!(panic.is_err());
    assert_eq!(committed(&test), 1);
    let panic = catch_unwind(AssertUnwindSafe(|| {
        test.enter(|| {
            let session = C::db().session().unwrap();
            let mut conn = session.connection().unwrap();
            conn.batch_execute(INSERT).unwrap();
            panic!("with a guard")
        })
    }));
    assert!(panic.is_err());
    assert_eq!(committed(&test), 1);
    test.finish().unwrap();
}

fn raw_commit_in_a_rolled_back_test_fails_the_test<C: TestConnection>(url: &str) {
    let test = rollback::<C>(url);
    test.run(|| C::db().session()?.send(INSERT)).unwrap();
    let session = test.open_session().unwrap();
    let _ = session.send(&format!("{INSERT}; COMMIT"));
    drop(session);
    let error = test.open_session().unwrap().number(COUNT).unwrap_err();
    assert_eq!(error.code(), "DS501", "{error}");
    assert!(error.to_string().contains("`COMMIT`"), "{error}");
    let error = test.finish().unwrap_err();
    assert!(error.to_string().contains("`COMMIT`"), "{error}");
    let next = rollback::<C>(url);
    assert_eq!(committed(&next), 0, "what was committed is gone all the same");
    next.finish().unwrap();
}

fn read_only_scopes_of_a_rolled_back_test_do_not_wait<C: TestConnection + Counts>(url: &str) {
    let test = rollback::<C>(url);
    test.context(|| {
        assert_eq!(C::entries()?, 0);
        // Others, in this thread and in another, while this context's session is there.
        test.run(|| C::db().session()?.send(INSERT))?;
        assert_eq!(C::entries()?, 1);
        std::thread::scope(|scope| {
            scope.spawn(|| test.run(|| C::db().session()?.send(INSERT)).unwrap());
        });
        assert_eq!(C::entries()?, 2);
        C::db().session()?.send(INSERT)?;
        assert_eq!(C::entries()?, 3, "inside of a transaction it sees its own");
        C::db().session()?.rollback()?;
        assert_eq!(C::entries()?, 2);
        Ok::<(), Error>(())
    })
    .unwrap();
    test.finish().unwrap();
}

diesel::table! {
    entries (id) { id -> Integer, author -> Text, message -> Text, }
}

/// A typed SELECT, written out for each connection type.
trait Counts: TestConnection {
    fn entries() -> Result<i64>;
}

macro_rules! counts {
    ($($connection:ty),*) => { $(
        impl Counts for $connection {
            fn entries() -> Result<i64> {
                Self::db().session()?.count(entries::table)
            }
        }
    )* };
}

counts!(PgConnection, MysqlConnection, SqliteConnection, AnyConnection);

/// PostgreSQL: an unreported error aborts only the savepoint that stands for the session's transaction.
fn commit_is_refused_after_an_error_that_the_driver_did_not_report() {
    use diesel::pg::PgRowByRowLoadingMode;
    #[derive(QueryableByName)]
    struct Number {
        #[diesel(sql_type = diesel::sql_types::BigInt)]
        #[allow(dead_code)]
        number: i64,
    }
    let test = rollback::<PgConnection>(&support::postgres().url());
    let session = test.open_session().unwrap();
    for leaks in [false, true] {
        session.send(INSERT).unwrap();
        session
            .with(|conn| {
                let query = diesel::sql_query("SELECT (10 / (3 - g))::bigint AS number FROM generate_series(1, 5) g");
                let mut rows = query.load_iter::<Number, PgRowByRowLoadingMode>(conn)?;
                if leaks {
                    std::mem::forget(rows);
                } else {
                    let _ = rows.try_for_each(|row| row.map(drop));
                }
                Ok(())
            })
            .unwrap();
        assert!(session.commit().unwrap_err().is_rollback_required(), "{leaks}");
        session.rollback().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), 0, "{leaks}");
        session.rollback().unwrap();
    }
    session.send(INSERT).unwrap();
    session.commit().unwrap();
    assert_eq!(session.number(COUNT).unwrap(), 1);
    session.rollback().unwrap();
    drop(session);
    test.finish().unwrap();
}
