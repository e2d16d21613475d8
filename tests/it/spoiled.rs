//! A transaction that the database, or somebody behind the session's back, has aborted or ended.

use super::*;

type Send = fn(&Session<Conn>, &'static str) -> Result<()>;

/// The ways in which a raw statement can be sent.
const WAYS: [(&str, Send); 5] = [
    ("a batch in `with`", |session, sql| raw(session, sql)),
    ("`sql_query` in `with`", |session, sql| session.with(|conn| sql_query(sql).execute(conn)).map(drop)),
    ("`sql_query`", |session, sql| session.execute(sql_query(sql)).map(drop)),
    ("a batch on a guard", |session, sql| Ok(session.connection()?.batch_execute(sql)?)),
    ("`sql_query` on a guard", |session, sql| Ok(sql_query(sql).execute(&mut *session.connection()?).map(drop)?)),
];

/// Every use but `rollback` is refused, the commit included; afterwards the session is as new.
#[track_caller]
fn assert_spoiled(shop: &Shop<Conn>, session: &Session<Conn>, cause: &str) -> Result<()> {
    let committed = shop.names();
    let error = names(session).expect_err("the transaction cannot go on");
    assert!(error.is_rollback_required() && error.code() == "DS307", "{error}");
    assert_is!(error, Error::RollbackRequired { cause: told, at }
        if told.contains(cause) && at.file().ends_with("spoiled.rs"));
    assert_is!(add(session, "too late"), Err(Error::RollbackRequired { .. }));
    assert_is!(raw(session, "SELECT 1"), Err(Error::RollbackRequired { .. }));
    assert_is!(session.connection(), Err(Error::RollbackRequired { .. }));
    assert_is!(session.savepoint(|session| add(session, "too late")), Err(Error::RollbackRequired { .. }));
    assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
    assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
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
fn an_error_aborts_the_transaction_on_postgresql_and_leaves_it_alive_elsewhere() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let failed = add(&session, "Ada").expect_err("the name is taken");
            let sent = line!() - 1;
            if KIND == Kind::Postgres {
                assert_is!(session.commit(), Err(Error::RollbackRequired { cause, at })
                    if at.line() == sent && cause.contains("duplicate key") && failed.to_string().contains(&cause));
                return assert_spoiled(shop, &session, "duplicate key");
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
fn a_raw_error_counts_however_it_was_sent_and_swallowed() {
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
                        assert_spoiled(shop, &session, "duplicate key")?;
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

#[test]
fn the_first_error_is_the_one_that_is_told() {
    if KIND != Kind::Postgres {
        // Elsewhere an error like that ends nothing.
        return;
    }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(|conn| {
                let first = conn.batch_execute("SELECT * FROM nowhere").is_err();
                let second = conn.batch_execute(TAKEN).is_err();
                Ok(first && second)
            })?;
            assert_spoiled(shop, &session, "nowhere")
        })
    });
}

#[test]
fn a_swallowed_error_does_not_become_a_commit() {
    test(|shop| {
        let swallow = || {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let _ = add(&session, "Ada");
            Ok::<(), Error>(())
        };
        let outcomes = [
            shop.scope().commit_on_ok().run(swallow),
            shop.context(|| {
                shop.scope().commit_on_ok().run(|| DB.session()?.count(users::table)).map(drop)?;
                let session = DB.session()?;
                session.execute(diesel::delete(users::table))?;
                session.commit()?;
                session.transaction(|_| swallow())
            }),
        ];
        for outcome in outcomes {
            match KIND {
                Kind::Postgres => assert_is!(outcome, Err(Error::RollbackRequired { .. })),
                _ => assert_is!(outcome, Ok(())),
            }
        }
        assert_eq!(shop.names().len(), if KIND == Kind::Postgres { 0 } else { 1 });
        Ok(())
    });
}

#[test]
fn inside_a_savepoint_only_the_savepoint_is_lost() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let refused = session.savepoint(|session| {
                add(session, "Bob")?;
                add(session, "Ada")
            });
            assert_is!(refused, Err(Error::Query { .. }));
            let swallowed = session.savepoint(|session| {
                add(session, "Cid")?;
                let _ = raw(session, TAKEN);
                Ok(())
            });
            match KIND {
                Kind::Postgres => assert_is!(swallowed, Err(Error::RollbackRequired { .. })),
                _ => assert_is!(swallowed, Ok(())),
            }
            let inner = session.savepoint(|session| {
                add(session, "Dan")?;
                let refused = session.savepoint(|session| add(session, "Ada"));
                assert_is!(refused, Err(Error::Query { .. }));
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
fn a_raw_commit_or_rollback_is_found_however_it_was_sent() {
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
                    assert_spoiled(shop, &session, &word.trim_start_matches("/* really */ ")[..6].to_uppercase())?;
                }
            }
            Ok(())
        })
    });
}

#[test]
fn a_transaction_that_was_ended_and_begun_again_is_found() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            for batch in ["COMMIT; BEGIN", "ROLLBACK; BEGIN", "SELECT 1; COMMIT; BEGIN; SELECT 1"] {
                add(&session, "Ada")?;
                raw(&session, batch)?;
                let half: &[&str] = if batch.contains("COMMIT") { &["Ada"] } else { &[] };
                assert_eq!(shop.names(), half);
                assert_spoiled(shop, &session, "")?;
                // In two steps, by code that has the connection.
                add(&session, "Ada")?;
                let mut conn = session.connection()?;
                conn.batch_execute("ROLLBACK")?;
                conn.batch_execute("BEGIN")?;
                diesel::insert_into(users::table).values(users::name.eq("Bob")).execute(&mut *conn)?;
                drop(conn);
                assert_spoiled(shop, &session, "ROLLBACK")?;
            }
            Ok(())
        })
    });
}

#[test]
fn a_raw_end_inside_a_savepoint_spoils_all_of_the_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let ended = session.savepoint(|session| raw(session, "ROLLBACK"));
            assert_is!(ended, Err(Error::RollbackRequired { .. }));
            assert_spoiled(shop, &session, "ROLLBACK")?;
            let ended = session.transaction(|session| {
                add(session, "Ada")?;
                let _ = session.savepoint(|session| {
                    raw(session, "ROLLBACK")?;
                    Err::<(), _>(Trouble::OutOfStock("tea"))
                });
                add(session, "Bob")?;
                Ok::<(), Trouble>(())
            });
            assert_is!(ended, Err(Trouble::Session(Error::RollbackRequired { .. })));
            assert!(!session.in_transaction());
            session.commit()
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_scope_that_commits_does_not_hide_that_the_transaction_was_ended() {
    test(|shop| {
        for word in ["ROLLBACK", "COMMIT"] {
            let outcome = shop.scope().commit_on_ok().run(|| {
                let session = DB.session()?;
                add(&session, "Ada")?;
                raw(&session, word)
            });
            assert_is!(outcome, Err(Error::RollbackRequired { cause, .. }) if cause.contains(word));
        }
        shop.assert_at_rest();
        Ok(())
    });
}

#[test]
fn a_lent_connections_own_transactions_leave_the_session_sound() {
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
            assert_is!(session.with(|conn| existing_code(conn, true)), Err(Error::Query { .. }));
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
fn a_level_that_lent_code_leaves_open_or_takes_away_is_found() {
    use diesel::connection::TransactionManager;
    type Manager = <Conn as Connection>::TransactionManager;
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.with(Manager::begin_transaction)?;
            assert_spoiled(shop, &session, "left a transaction of its own open")?;
            add(&session, "Ada")?;
            session.with(Manager::commit_transaction)?;
            assert_eq!(shop.names(), ["Ada"]);
            assert_spoiled(shop, &session, "")?;
            add(&session, "Ada")?;
            Manager::rollback_transaction(&mut *session.connection()?)?;
            assert_spoiled(shop, &session, "")?;
            add(&session, "Ada")?;
            let ended = session.savepoint(|session| session.with(Manager::rollback_transaction));
            assert_is!(ended, Err(Error::RollbackRequired { .. }));
            session.rollback()
        })
    });
}

#[test]
fn what_a_spoiled_session_leaves_at_the_end_of_its_context_is_nothing() {
    test_alone(|shop| {
        for (way, send) in WAYS {
            shop.context(|| {
                let session = DB.session()?;
                add(&session, "Ada")?;
                send(&session, "ROLLBACK")?;
                // Nobody notices, and nobody asks again.
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
fn lent_code_that_replaces_the_instrumentation_has_done_nobody_knows_what() {
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
            assert_spoiled(shop, &session, "instrumentation")?;
            add(&session, "Ada")?;
            blind(&mut *session.connection()?);
            assert_spoiled(shop, &session, "instrumentation")
        })?;
        // Nor is the connection for the next one, who would be as blind.
        shop.scope().autocommit().run(|| {
            DB.session()?.with(|conn| {
                blind(conn);
                Ok(())
            })
        })?;
        let swallowed = shop.scope().commit_on_ok().run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            raw(&session, "ROLLBACK; BEGIN")
        });
        assert_is!(swallowed, Err(Error::RollbackRequired { .. }));
        Ok(())
    });
}
