//! Invalidated transactions: the database, or code that has the connection, has aborted or ended them.

use super::*;

for_each_database!(postgres, any_postgres => rollback_required_names_the_first_error);

type Send = fn(&Session<Conn>, &'static str) -> Result<()>;

/// The ways in which a raw statement can be sent.
const WAYS: [(&str, Send); 5] = [
    ("a batch in `with`", |session, sql| raw(session, sql)),
    ("`sql_query` in `with`", |session, sql| session.with(|conn| sql_query(sql).execute(conn)).map(drop)),
    ("`sql_query`", |session, sql| session.execute(sql_query(sql)).map(drop)),
    ("a batch on a guard", |session, sql| Ok(session.connection()?.batch_execute(sql)?)),
    ("`sql_query` on a guard", |session, sql| Ok(sql_query(sql).execute(&mut *session.connection()?).map(drop)?)),
];

/// Every use but `rollback` is refused, also the commit. After the rollback the session can be used.
#[track_caller]
fn assert_invalidated(shop: &Shop<Conn>, session: &Session<Conn>, cause: &str) -> Result<()> {
    let committed = shop.names();
    let error = names(session).expect_err("the transaction cannot go on");
    assert!(error.is_rollback_required() && error.code() == "DS307", "{error}");
    assert!(
        error.kind() == ErrorKind::RollbackRequired
            && error.to_string().contains(cause)
            && error.location().expect("a location").file().ends_with("invalidation.rs"),
        "{error:?}"
    );
    assert_error!(add(session, "too late"), RollbackRequired);
    assert_error!(raw(session, "SELECT 1"), RollbackRequired);
    assert_error!(session.connection(), RollbackRequired);
    assert_error!(session.savepoint(|session| add(session, "too late")), RollbackRequired);
    assert_error!(session.commit(), RollbackRequired);
    assert_error!(session.commit(), RollbackRequired);
    session.rollback()?;
    assert!(!session.in_transaction());
    shop.assert_at_rest();
    assert_eq!(names(session)?, committed);
    add(session, "afterwards")?;
    session.commit()?;
    assert_eq!(shop.names().len(), committed.len() + 1);
    session.execute(diesel::delete(users::table))?;
    session.commit()
}

/// A statement that fails: on PostgreSQL it aborts the transaction, elsewhere it leaves it as it was.
const TAKEN: &str = "INSERT INTO users (name) VALUES ('Ada')";

#[test]
fn error_requires_rollback_on_postgres_only() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let failed = add(&session, "Ada").expect_err("the name is taken");
            let sent = line!() - 1;
            if KIND == Kind::Postgres {
                assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::RollbackRequired && error.location().expect("a location").line() == sent && error.to_string().contains("duplicate key") && format!("{failed:#}").contains("duplicate key"));
                return assert_invalidated(shop, &session, "duplicate key");
            }
            add(&session, "Bob")?;
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            session.commit()?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            Ok(())
        })
    });
}

#[test]
fn raw_error_requires_rollback_even_if_swallowed() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            for (way, send) in WAYS {
                for swallowed in [false, true] {
                    add(&session, "Ada")?;
                    if swallowed {
                        session.with(|conn| {
                            Ok(conn.batch_execute(TAKEN).is_err() && sql_query(TAKEN).execute(conn).is_err())
                        })?;
                    } else {
                        send(&session, TAKEN).expect_err(way);
                    }
                    if KIND == Kind::Postgres {
                        assert_invalidated(shop, &session, "duplicate key")?;
                    } else {
                        add(&session, "Bob")?;
                        session.commit()?;
                        assert_eq!(shop.names(), ["Ada", "Bob"], "{way}");
                        session.execute(diesel::delete(users::table))?;
                        session.commit()?;
                    }
                }
            }
            Ok(())
        })
    });
}

// Only on PostgreSQL: elsewhere an error like that ends nothing.
fn rollback_required_names_the_first_error() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(|conn| {
                let first = conn.batch_execute("SELECT * FROM nowhere").is_err();
                let second = conn.batch_execute(TAKEN).is_err();
                Ok(first && second)
            })?;
            assert_invalidated(shop, &session, "nowhere")
        })
    });
}

#[test]
fn swallowed_error_prevents_the_commit() {
    test(|shop| {
        let swallow = || {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let _ = add(&session, "Ada");
            Ok::<(), Error>(())
        };
        let outcomes = [
            shop.run(swallow),
            shop.context(|| {
                shop.run(|| DB.session()?.count(users::table)).map(drop)?;
                let session = DB.session()?;
                session.execute(diesel::delete(users::table))?;
                session.commit()?;
                session.transaction(|_| swallow())
            }),
        ];
        for outcome in outcomes {
            match KIND {
                Kind::Postgres => assert_error!(&outcome, RollbackRequired),
                _ => assert_is!(outcome, Ok(())),
            }
        }
        assert_eq!(shop.names().len(), if KIND == Kind::Postgres { 0 } else { 1 });
        Ok(())
    });
}

#[test]
fn error_in_a_savepoint_invalidates_the_savepoint_only() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let refused = session.savepoint(|session| {
                add(session, "Bob")?;
                add(session, "Ada")
            });
            assert_error!(&refused, Query);
            let swallowed = session.savepoint(|session| {
                add(session, "Cid")?;
                let _ = raw(session, TAKEN);
                Ok::<(), Error>(())
            });
            match KIND {
                Kind::Postgres => assert_error!(&swallowed, RollbackRequired),
                _ => assert_is!(swallowed, Ok(())),
            }
            let inner = session.savepoint(|session| {
                add(session, "Dan")?;
                let refused = session.savepoint(|session| add(session, "Ada"));
                assert_error!(&refused, Query);
                assert!(names(session)?.contains(&"Dan".to_owned()));
                Ok::<(), Error>(())
            });
            assert_is!(inner, Ok(()));
            session.commit()
        })?;
        let wanted: &[&str] = if KIND == Kind::Postgres { &["Ada", "Dan"] } else { &["Ada", "Cid", "Dan"] };
        assert_eq!(shop.names(), wanted);
        Ok(())
    });
}

#[test]
fn raw_commit_or_rollback_requires_rollback() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            for (way, send) in WAYS {
                for word in ["COMMIT", "ROLLBACK", "commit", "/* really */ Rollback -- now"] {
                    add(&session, "Ada")?;
                    send(&session, word)?;
                    let committed = shop.names();
                    let wanted: &[&str] = if word.eq_ignore_ascii_case("commit") { &["Ada"] } else { &[] };
                    assert_eq!(committed, wanted, "{way}");
                    assert_invalidated(shop, &session, &word.trim_start_matches("/* really */ ")[..6].to_uppercase())?;
                }
            }
            Ok(())
        })
    });
}

#[test]
fn transaction_ended_and_begun_again_requires_rollback() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            for batch in ["COMMIT; BEGIN", "ROLLBACK; BEGIN", "SELECT 1; COMMIT; BEGIN; SELECT 1"] {
                add(&session, "Ada")?;
                raw(&session, batch)?;
                let half: &[&str] = if batch.contains("COMMIT") { &["Ada"] } else { &[] };
                assert_eq!(shop.names(), half);
                assert_invalidated(shop, &session, "")?;
                // In two steps, by code that has the connection.
                add(&session, "Ada")?;
                let mut conn = session.connection()?;
                conn.batch_execute("ROLLBACK")?;
                conn.batch_execute("BEGIN")?;
                diesel::insert_into(users::table).values(users::name.eq("Bob")).execute(&mut *conn)?;
                drop(conn);
                assert_invalidated(shop, &session, "ROLLBACK")?;
            }
            Ok(())
        })
    });
}

#[test]
fn raw_end_in_a_savepoint_invalidates_the_whole_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let ended = session.savepoint(|session| raw(session, "ROLLBACK"));
            assert_error!(&ended, RollbackRequired);
            assert_invalidated(shop, &session, "ROLLBACK")?;
            let ended = session.transaction(|session| {
                add(session, "Ada")?;
                let _ = session.savepoint(|session| {
                    raw(session, "ROLLBACK")?;
                    Err::<(), _>(Trouble::OutOfStock("tea"))
                });
                add(session, "Bob")?;
                Ok::<(), Trouble>(())
            });
            assert_is!(ended, Err(Trouble::Session(error)) if error.kind() == ErrorKind::RollbackRequired);
            assert!(!session.in_transaction());
            session.commit()
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn run_and_commit_reports_that_the_transaction_was_ended() {
    test(|shop| {
        for word in ["ROLLBACK", "COMMIT"] {
            let outcome = shop.run(|| {
                let session = DB.session()?;
                add(&session, "Ada")?;
                raw(&session, word)
            });
            assert_is!(&outcome, Err(error) if error.kind() == ErrorKind::RollbackRequired && error.to_string().contains(word));
        }
        shop.assert_at_rest();
        Ok(())
    });
}

#[test]
fn transactions_of_code_inside_with_keep_the_session_valid() {
    fn existing_code(conn: &mut Conn, fails: bool) -> QueryResult<()> {
        conn.transaction(|conn| {
            diesel::insert_into(users::table)
                .values(users::name.eq(if fails { "lost" } else { "Bob" }))
                .execute(conn)?;
            let refused =
                conn.transaction(|conn| diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(conn));
            assert!(refused.is_err());
            if fails { Err(diesel::result::Error::RollbackTransaction) } else { Ok(()) }
        })
    }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(|conn| existing_code(conn, false))?;
            assert_error!(session.with(|conn| existing_code(conn, true)), Query);
            existing_code(&mut *session.connection()?, true).expect_err("it is rolled back");
            session.savepoint(|session| session.with(|conn| existing_code(conn, true))).expect_err("it is rolled back");
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn transaction_level_left_open_or_ended_inside_with_requires_rollback() {
    use diesel::connection::TransactionManager;
    type Manager = <Conn as Connection>::TransactionManager;
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(Manager::begin_transaction)?;
            assert_invalidated(shop, &session, "left a transaction of its own open")?;
            add(&session, "Ada")?;
            session.with(Manager::commit_transaction)?;
            assert_eq!(shop.names(), ["Ada"]);
            assert_invalidated(shop, &session, "")?;
            add(&session, "Ada")?;
            Manager::rollback_transaction(&mut *session.connection()?)?;
            assert_invalidated(shop, &session, "")?;
            add(&session, "Ada")?;
            let ended = session.savepoint(|session| session.with(Manager::rollback_transaction));
            assert_error!(&ended, RollbackRequired);
            session.rollback()
        })
    });
}

#[test]
fn invalidated_session_leaves_nothing_at_the_end_of_its_context() {
    test_alone(|shop| {
        for (way, send) in WAYS {
            shop.context(|| {
                let session = DB.session()?;
                add(&session, "Ada")?;
                send(&session, "ROLLBACK")?;
                // The instrumentation of the session does not see it.
                Ok::<(), Error>(())
            })?;
            shop.assert_at_rest();
            let seen = shop.context(|| names(&DB.session()?))?;
            assert!(seen.is_empty(), "{way}");
        }
        Ok(())
    });
}

#[test]
fn replaced_instrumentation_inside_with_requires_rollback() {
    fn blind(conn: &mut Conn) {
        conn.set_instrumentation(|_: diesel::connection::InstrumentationEvent<'_>| ());
    }
    test_alone(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(|conn| {
                blind(conn);
                Ok(conn.batch_execute("ROLLBACK; BEGIN").is_err())
            })?;
            assert_invalidated(shop, &session, "instrumentation")?;
            add(&session, "Ada")?;
            blind(&mut *session.connection()?);
            assert_invalidated(shop, &session, "instrumentation")
        })?;
        // The connection is not pooled again, as its next session would not see statements either.
        shop.scope().autocommit().run(|| {
            DB.session()?.with(|conn| {
                blind(conn);
                Ok(())
            })
        })?;
        let swallowed = shop.run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            raw(&session, "ROLLBACK; BEGIN")
        });
        assert_error!(&swallowed, RollbackRequired);
        Ok(())
    });
}
