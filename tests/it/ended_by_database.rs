//! What only some of the databases do to a transaction.

use std::sync::Barrier;

use super::*;

for_each_database!(sqlite, any_sqlite => on_conflict_rollback_ends_the_transaction_on_sqlite);
for_each_database!(postgres, mariadb, any_postgres, any_mariadb =>
    deadlock_has_one_victim_and_one_committed_winner,
    lock_timeout_leaves_the_transaction_valid_on_mariadb_only,
);
for_each_database!(postgres, any_postgres => serialization_failure_requires_rollback_and_is_transient);
for_each_database!(mariadb, any_mariadb => transaction_end_in_a_prepared_text_or_executed_comment_requires_rollback);

fn assert_invalidated_by(session: &Session<Conn>, cause: &str) -> Result<()> {
    assert_is!(names(session), Err(error) if error.kind() == ErrorKind::RollbackRequired && error.to_string().contains(cause) && error.location().expect("a location").file().ends_with("ended_by_database.rs"));
    assert_error!(session.commit(), RollbackRequired);
    session.rollback()
}

/// SQLite: `ON CONFLICT ROLLBACK`, in the statement or in the table.
fn on_conflict_rollback_ends_the_transaction_on_sqlite() {
    diesel::table! { codes (code) { code -> Text, } }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            raw(&session, "CREATE TABLE codes (code TEXT PRIMARY KEY ON CONFLICT ROLLBACK)")?;
            session.execute(diesel::insert_into(codes::table).values(codes::code.eq("A")))?;
            session.commit()?;
            let again = || diesel::insert_into(codes::table).values(codes::code.eq("A"));

            add(&session, "Ada")?;
            assert_error!(session.execute(again()), Query);
            assert_invalidated_by(&session, "UNIQUE constraint failed")?;
            add(&session, "Ada")?;
            assert!(session.with(|conn| Ok(again().execute(conn).is_err()))?);
            assert_invalidated_by(&session, "UNIQUE constraint failed")?;
            add(&session, "Ada")?;
            session.commit()?;
            assert_error!(raw(&session, "INSERT OR ROLLBACK INTO users (name) VALUES ('Ada')"), Query);
            assert_invalidated_by(&session, "UNIQUE constraint failed")?;

            add(&session, "Bob")?;
            let refused = session.savepoint(|session| session.execute(again()));
            assert_error!(&refused, Query);
            assert_invalidated_by(&session, "UNIQUE constraint failed")?;
            // Code that has the connection may go on to write, outside of any transaction. That requires a rollback
            // too.
            add(&session, "Bob")?;
            session.with(|conn| Ok(again().execute(conn).is_err()))?;
            assert_error!(add(&session, "Cid"), RollbackRequired);
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

/// MariaDB: data definition commits.
#[test]
fn data_definition_ends_the_transaction_on_mariadb_only() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            for (number, statement) in
                ["CREATE TABLE extra (id INTEGER)", "ALTER TABLE extra ADD note INTEGER", "DROP TABLE extra"]
                    .iter()
                    .enumerate()
            {
                add(&session, &number.to_string())?;
                raw(&session, statement)?;
                if KIND == Kind::Mariadb {
                    assert_eq!(shop.names().len(), number + 1, "{statement}");
                    assert_invalidated_by(&session, statement.split(' ').next().expect("a word"))?;
                } else {
                    assert!(shop.names().is_empty(), "{statement}");
                    assert_eq!(names(&session)?.len(), number + 1);
                }
            }
            raw(&session, "CREATE TEMPORARY TABLE passing (id INTEGER)")?;
            add(&session, "last")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["0", "1", "2", "last"]);
        Ok(())
    });
}

/// MariaDB: the victim of a deadlock loses the whole transaction; PostgreSQL aborts it.
// Not on SQLite: one writer at a time: there is nothing to deadlock on.
fn deadlock_has_one_victim_and_one_committed_winner() {
    test(|shop| {
        shop.run(|| {
            add_as(&DB.session()?, 1, "Ada")?;
            add_as(&DB.session()?, 2, "Bob")
        })?;
        let both_have_one = Barrier::new(2);
        let rename = |session: &Session<Conn>, id: i32, name: &str| {
            session.execute(diesel::update(users::table.find(id)).set(users::name.eq(name)))
        };
        let cross = |mine: i32, yours: i32| {
            shop.context(|| {
                let session = DB.session()?;
                add_as(&session, 10 + mine, &format!("lost or not {mine}"))?;
                rename(&session, mine, &format!("{mine} by {mine}"))?;
                both_have_one.wait();
                match rename(&session, yours, &format!("{yours} by {mine}")) {
                    Ok(_) => session.commit().map(|()| true),
                    Err(error) => {
                        assert!(error.is_transient(), "{error}");
                        assert_invalidated_by(&session, if KIND == Kind::Mariadb { "Deadlock" } else { "deadlock" })?;
                        // The whole transaction can be run again, in the same session.
                        rename(&session, yours, &format!("{yours} by {mine} again"))?;
                        session.rollback()?;
                        Ok(false)
                    }
                }
            })
        };
        let (first, second) = std::thread::scope(|threads| {
            let first = threads.spawn(|| cross(1, 2));
            let second = threads.spawn(|| cross(2, 1));
            (first.join().expect("it ends"), second.join().expect("it ends"))
        });
        let (first, second) = (first?, second?);
        assert!(first != second, "one of the two is the victim");
        let winner = if first { 1 } else { 2 };
        let expected = [format!("1 by {winner}"), format!("2 by {winner}"), format!("lost or not {winner}")];
        assert_eq!(shop.names(), expected);
        Ok(())
    });
}

/// A lock that was not to be had ends the statement on MariaDB, and the transaction on PostgreSQL.
// Not on SQLite: its writers wait before they have a transaction.
fn lock_timeout_leaves_the_transaction_valid_on_mariadb_only() {
    test_with(
        |config| config.lock_timeout(std::time::Duration::from_millis(50)),
        |shop| {
            shop.run(|| add_as(&DB.session()?, 1, "Ada"))?;
            let holder = shop.open_session()?;
            let rename = |session: &Session<Conn>, name: &str| {
                session.execute(diesel::update(users::table.find(1)).set(users::name.eq(name)))
            };
            rename(&holder, "held")?;
            shop.context(|| {
                let session = DB.session()?;
                add_as(&session, 2, "Bob")?;
                assert_error!(rename(&session, "mine"), Query);
                if KIND == Kind::Postgres {
                    return assert_invalidated_by(&session, "lock timeout");
                }
                session.commit()
            })?;
            drop(holder);
            assert_eq!(shop.names().len(), if KIND == Kind::Postgres { 1 } else { 2 });
            Ok(())
        },
    );
}

/// PostgreSQL: a serialization failure aborts the transaction and may be tried again.
fn serialization_failure_requires_rollback_and_is_transient() {
    test(|shop| {
        shop.run(|| add_as(&DB.session()?, 1, "Ada"))?;
        let rename = |session: &Session<Conn>, name: &str| {
            session.execute(diesel::update(users::table.find(1)).set(users::name.eq(name)))
        };
        shop.scope().isolation(Isolation::Serializable).run(|| {
            let session = DB.session()?;
            assert_eq!(names(&session)?, ["Ada"]);
            shop.run(|| rename(&DB.session()?, "Eve"))?;
            let failed = rename(&session, "Bob").expect_err("another transaction was first");
            assert!(failed.is_transient(), "{failed}");
            assert_invalidated_by(&session, "could not serialize")?;
            assert_eq!(names(&session)?, ["Eve"]);
            rename(&session, "Bob")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

/// MariaDB: an end that only the server can read.
fn transaction_end_in_a_prepared_text_or_executed_comment_requires_rollback() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let hidden = [
                "EXECUTE IMMEDIATE 'ROLLBACK'",
                "PREPARE p FROM 'ROLLBACK'; EXECUTE p",
                "/*! ROLLBACK */",
                "/*M! ROLLBACK */",
                "SET STATEMENT max_statement_time = 9 FOR ROLLBACK",
                "BEGIN NOT ATOMIC ROLLBACK; END",
            ];
            for statement in hidden {
                add(&session, "Ada")?;
                raw(&session, statement)?;
                assert!(shop.names().is_empty(), "{statement}");
                assert_invalidated_by(&session, "")?;
            }
            // The same forms without an end inside are statements as others are.
            add(&session, "Ada")?;
            raw(&session, "EXECUTE IMMEDIATE 'SELECT 1'; /*! SELECT 2 */")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}
