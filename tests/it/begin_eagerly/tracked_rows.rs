//! Rows that a default scope has read before its transaction begins.

use diesel_session::Tracked;
use diesel_session::testing::TestIsolation;
use diesel_session::unit_of_work::RowState;

use super::*;
use crate::unit_model::tables::{NewUser, User, users};

const ROWS: &str = "INSERT INTO users (id, code) VALUES (1, 1), (2, 2)";

/// Runs `body` in an application with rows, and in a test that is rolled back, where rows are known for as long. Both
/// arguments are sessions of default scopes. The second one is the rival.
#[track_caller]
fn sessions(body: impl Fn(&Session<Conn>, &Session<Conn>) -> Result<()>) {
    for isolation in [TestIsolation::Database, TestIsolation::Rollback] {
        let Some(setup) = setup(&DB, KIND, read_committed) else { return };
        let setup = setup.fixture(model_tables()).fixture(Fixture::sql("rows", ROWS)).isolation(isolation);
        let test = setup.start().unwrap_or_else(|error| panic!("{error}"));
        let done = test.context(|| body(&DB.session()?, &test.open_session()?));
        done.unwrap_or_else(|error| panic!("{isolation:?}: {error}"));
        test.finish().unwrap_or_else(|error| panic!("{error}"));
    }
}

/// The rival changes a row and commits.
#[track_caller]
fn change(rival: &Session<Conn>, id: i32, n: i32) -> Result<()> {
    rival.execute(diesel::update(users::table.find(id)).set(users::n.eq(n)))?;
    rival.commit()
}

/// The row with a handle, which the rival has changed since.
#[track_caller]
fn outdated(session: &Session<Conn>, rival: &Session<Conn>) -> Result<Tracked<User>> {
    let user = session.find::<User>(1)?;
    assert_eq!(user.read().n, 0);
    change(rival, 1, 5)?;
    assert_eq!(session.find::<User>(1)?.read().n, 0, "a row that is known is not read again");
    assert!(!session.in_transaction());
    Ok(user)
}

#[test]
fn row_read_before_an_explicit_transaction_is_read_again_in_it() {
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.transaction(|session| {
            assert_eq!((session.find::<User>(1)?.read().n, user.read().n), (5, 5));
            Ok::<(), Error>(())
        })?;
        Ok(())
    });
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.begin()?;
        assert_eq!((user.state(), session.find::<User>(1)?.read().n, user.read().n), (RowState::Expired, 5, 5));
        session.commit()
    });
}

#[test]
fn row_read_before_a_retry_is_read_again_in_each_attempt() {
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.retry(1, |_| {
            user.try_write()?.n += 1;
            Ok::<(), Error>(())
        })?;
        assert_eq!(session.load::<i32>(users::table.order(users::id).select(users::n))?, [6, 0]);
        Ok(())
    });
}

#[test]
fn write_begins_a_transaction_that_keeps_what_was_read_in_it() {
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.add(NewUser { id: 7, code: None, n: 7, m: 0 })?;
        session.flush()?;
        assert!(session.in_transaction());
        assert_eq!((session.find::<User>(1)?.read().n, user.state()), (0, RowState::Persistent));
        // Only the column that was written is sent.
        user.write().m = 3;
        session.commit()?;
        let rows = session.load::<(i32, i32)>(users::table.order(users::id).select((users::n, users::m)))?;
        assert_eq!(rows, [(5, 3), (0, 0), (7, 0)]);
        assert_eq!((session.find::<User>(1)?.read().n, user.read().m), (5, 3), "a commit expires what is known");
        Ok(())
    });
}

#[test]
fn flush_of_a_written_row_keeps_the_other_rows() {
    sessions(|session, rival| {
        let (user, other) = (outdated(session, rival)?, session.find::<User>(2)?);
        other.write().n = 2;
        session.flush()?;
        assert!(session.in_transaction());
        assert_eq!((user.read().n, other.read().n), (0, 2));
        session.commit()
    });
}

#[test]
fn savepoint_begins_a_transaction_that_keeps_what_was_read_before() {
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.savepoint(|session| {
            assert_eq!((session.find::<User>(1)?.read().n, user.state()), (0, RowState::Persistent));
            Ok::<(), Error>(())
        })?;
        assert!(session.in_transaction());
        assert_eq!(user.read().n, 0);
        session.commit()
    });
}

#[test]
fn raw_statement_expires_what_was_read_before_it() {
    sessions(|session, rival| {
        let user = outdated(session, rival)?;
        session.execute(sql_query("UPDATE users SET n = n + 1 WHERE id = 1"))?;
        assert_eq!((session.find::<User>(1)?.read().n, user.read().n), (6, 6));
        session.commit()
    });
}

#[test]
fn begin_and_retry_are_allowed_after_reads() {
    sessions(|session, _| {
        session.find::<User>(1)?;
        session.begin()?;
        session.find::<User>(1)?;
        assert_error!(session.begin(), AlreadyBegun);
        assert_error!(session.retry(1, |_| Ok::<(), Error>(())), NotRepeatable);
        session.rollback()?;
        session.find::<User>(1)?;
        session.retry(1, |_| Ok::<(), Error>(()))
    });
    run_test(setup(&DB, KIND, read_committed), KIND, |shop| {
        shop.scope().begin_eagerly().run(|| {
            let session = DB.session()?;
            session.count(super::super::users::table)?;
            assert_error!(session.begin(), AlreadyBegun);
            assert_error!(session.retry(1, |_| Ok::<(), Error>(())), NotRepeatable);
            Ok(())
        })
    });
}
