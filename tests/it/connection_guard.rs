//! `with` and the guard of `connection()`, and other uses of the session meanwhile.

use std::cell::RefCell;
use std::time::Duration;

use super::*;

#[test]
fn connection_guard_works_in_every_position() {
    fn in_tail_position(session: &Session<Conn>) -> QueryResult<Vec<String>> {
        users::table.order(users::id).select(users::name).load(&mut *session.connection().expect("a connection"))
    }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            assert_eq!(in_tail_position(&session)?, ["Ada"]);
            if let Ok(count) = users::table.count().get_result::<i64>(&mut *session.connection()?) {
                assert_eq!(count, 1);
            }
            match users::table.find(77).first::<User>(&mut *session.connection()?) {
                Err(diesel::result::Error::NotFound) => {}
                other => panic!("{other:?}"),
            }
            for user in users::table.load::<User>(&mut *session.connection()?)? {
                assert_eq!(user.name, "Ada");
            }
            if let Ok(mut conn) = session.connection() {
                conn.batch_execute("INSERT INTO users (name) VALUES ('Bob')")?;
            }
            let mut conn = session.connection()?;
            diesel::insert_into(users::table).values(users::name.eq("Cid")).execute(&mut *conn)?;
            drop(conn);
            assert!(shop.names().is_empty());
            assert_eq!(names(&session)?, ["Ada", "Bob", "Cid"]);
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob", "Cid"]);
        Ok(())
    });
}

#[test]
fn connection_guard_makes_its_session_busy_and_names_its_location() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let guard = session.connection()?;
            let held = line!() - 1;
            let error = names(&session).expect_err("the connection is checked out");
            assert!(earlier_line(&error) == held && line_of(&error) == line!() - 1, "{error}");
            assert_error!(session.connection(), SessionBusy);
            assert_error!(session.begin(), SessionBusy);
            assert_error!(session.commit(), SessionBusy);
            assert_error!(session.rollback(), SessionBusy);
            assert_error!(session.remove(), SessionBusy);
            assert_error!(session.transaction(|session| add(session, "Ada")), SessionBusy);
            assert_error!(session.savepoint(|session| add(session, "Ada")), SessionBusy);
            assert!(session.in_transaction());
            drop(guard);
            add(&session, "Ada")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn session_inside_with_is_busy_and_names_its_location() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let outer = line!() + 1;
            session.with(|conn| {
                let error = DB.session().and_then(|session| names(&session)).expect_err("it is in use");
                assert!(earlier_line(&error) == outer && line_of(&error) == line!() - 1, "{error}");
                assert!(error.location().expect("a location").file().ends_with("connection_guard.rs"), "{error}");
                assert_error!(session.commit(), SessionBusy);
                assert_error!(session.with(|_| Ok(())), SessionBusy);
                assert!(session.in_transaction());
                diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(conn)
            })?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn context_inside_with_has_its_own_session() {
    test(|shop| {
        shop.context(|| {
            let outer = DB.session()?;
            let seen = outer.with(|conn| {
                diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(conn)?;
                Ok(shop.context(|| names(&DB.session()?)))
            })??;
            assert!(seen.is_empty());
            assert_eq!(names(&outer)?, ["Ada"]);
            Ok(())
        })
    });
}

#[test]
fn connection_guard_that_outlives_its_context_returns_its_connection_on_drop() {
    test(|shop| {
        let minute = Duration::from_secs(60);
        let scopes = [shop.scope(), shop.scope().read_only(), shop.scope().deadline(minute), shop.scope().autocommit()];
        for scope in scopes {
            let (mut guard, session) = scope.run(|| {
                let session = DB.session()?;
                Ok::<_, Error>((session.connection()?, session))
            })?;
            assert_eq!(shop.status().in_use, 1);
            assert_error!(session.count(users::table), SessionEnded);
            assert_eq!(users::table.count().get_result::<i64>(&mut *guard)?, 0);
            drop(guard);
            shop.assert_at_rest();
            assert_error!(session.count(users::table), SessionEnded);
        }
        let mut guard = shop.context(|| DB.session()?.connection())?;
        diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(&mut *guard)?;
        drop(guard);
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        // The next ones find their connections as they should be.
        shop.run(|| add(&DB.session()?, "Bob"))?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn connection_guard_alive_at_commit_is_an_error_and_commits_nothing() {
    test(|shop| {
        let kept = RefCell::new(None);
        let refused = shop.run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            kept.replace(Some(session.connection()?));
            Ok::<(), Error>(())
        });
        assert_error!(&refused, SessionBusy);
        drop(kept.take());
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn savepoint_that_ends_under_a_connection_guard_commits_nothing() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let kept = RefCell::new(None);
            for fails in [false, true] {
                add(&session, "Ada")?;
                let ended = session.savepoint(|session| {
                    add(session, "Bob")?;
                    kept.replace(Some(session.connection()?));
                    if fails { Err(Trouble::OutOfStock("tea")) } else { Ok(()) }
                });
                match fails {
                    true => assert_is!(ended, Err(Trouble::OutOfStock("tea"))),
                    false => assert_is!(ended, Err(Trouble::Session(error)) if error.kind() == ErrorKind::SessionBusy),
                }
                drop(kept.take());
                assert_error!(names(&session), RollbackRequired);
                assert_error!(session.commit(), RollbackRequired);
                session.rollback()?;
                shop.assert_at_rest();
            }
            add(&session, "Ada")?;
            panic_of(|| {
                session.savepoint(|session| -> Result<()> {
                    kept.replace(Some(session.connection()?));
                    panic!("on purpose")
                })
            });
            drop(kept.take());
            assert_error!(session.commit(), RollbackRequired);
            session.rollback()?;
            add(&session, "Cid")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Cid"]);
        Ok(())
    });
}

#[test]
fn transaction_that_ends_under_a_connection_guard_commits_nothing() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let kept = RefCell::new(None);
            for fails in [false, true] {
                let ended = session.transaction(|session| {
                    add(session, "Ada")?;
                    kept.replace(Some(session.connection()?));
                    if fails { Err(Trouble::OutOfStock("tea")) } else { Ok(()) }
                });
                match fails {
                    true => assert_is!(ended, Err(Trouble::OutOfStock("tea"))),
                    false => assert_is!(ended, Err(Trouble::Session(error)) if error.kind() == ErrorKind::SessionBusy),
                }
                drop(kept.take());
                assert_error!(session.commit(), RollbackRequired);
                session.rollback()?;
                shop.assert_at_rest();
            }
            Ok::<(), Error>(())
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn connection_guard_keeps_an_open_session_alive() {
    test(|shop| {
        let session = shop.open_session()?;
        add(&session, "Ada")?;
        let mut guard = session.connection()?;
        drop(session);
        assert_eq!(users::table.count().get_result::<i64>(&mut *guard)?, 1);
        drop(guard);
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn panic_inside_with_invalidates_the_transaction_only() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let held = line!() + 2;
            let message = panic_of(|| {
                session.with(|conn| -> QueryResult<()> {
                    diesel::insert_into(users::table).values(users::name.eq("Bob")).execute(conn)?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            let error = names(&session).expect_err("the state of the connection is unknown");
            assert!(error.is_rollback_required(), "{error}");
            assert!(
                error.kind() == ErrorKind::RollbackRequired
                    && error.to_string().contains("panic")
                    && error.location().expect("a location").line() == held,
                "{error:?}"
            );
            assert_error!(session.commit(), RollbackRequired);
            session.rollback()?;
            shop.assert_at_rest();
            assert!(names(&session)?.is_empty());
            add(&session, "Cid")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Cid"]);
        Ok(())
    });
}

#[test]
fn panic_under_a_connection_guard_invalidates_the_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let held = line!() + 2;
            panic_of(|| {
                let _guard = session.connection().expect("a connection");
                panic!("on purpose");
            });
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::RollbackRequired && error.to_string().contains("panic") && error.location().expect("a location").line() == held);
            session.rollback()?;
            add(&session, "Bob")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn panic_inside_with_in_a_savepoint_invalidates_the_whole_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            panic_of(|| session.savepoint(|session| session.with(|_| -> QueryResult<()> { panic!("on purpose") })));
            assert_error!(add(&session, "Bob"), RollbackRequired);
            assert_error!(session.commit(), RollbackRequired);
            Ok::<(), Error>(())
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

/// A function of the program as any: it takes a connection and has an error type of its own.
fn order(conn: &mut Conn, name: &str) -> Result<usize, Trouble> {
    if name.is_empty() {
        return Err(Trouble::OutOfStock("tea"));
    }
    Ok(diesel::insert_into(users::table).values(users::name.eq(name)).execute(conn)?)
}

#[test]
fn with_connection_runs_functions_with_an_error_type_of_their_own() {
    test(|shop| {
        for scope in [shop.scope(), shop.scope().autocommit()] {
            scope.run(|| {
                let session = DB.session()?;
                assert_is!(session.with_connection(|conn| order(conn, "Ada")), Ok(1));
                assert_is!(session.with_connection(|conn| order(conn, "")), Err(Trouble::OutOfStock("tea")));
                // The session goes on, because nothing has happened to its transaction.
                assert_eq!(names(&session)?, ["Ada"]);
                assert_is!(session.with_connection(|conn| order(conn, "Bob")), Ok(1));
                session.commit()?;
                assert_eq!(shop.names(), ["Ada", "Bob"]);
                session.execute(diesel::delete(users::table))?;
                session.commit()
            })?;
            shop.assert_at_rest();
        }
        // The crate's own error and boxed errors are error types too.
        shop.context(|| {
            let session = DB.session()?;
            let own =
                session.with_connection(|conn| -> Result<usize> { Ok(diesel::delete(users::table).execute(conn)?) });
            assert_is!(own, Ok(0));
            let boxed = session.with_connection(|_| -> Result<(), Box<dyn std::error::Error>> { Err("no".into()) });
            assert_eq!(boxed.expect_err("it says no").to_string(), "no");
            session.commit()
        })
    });
}

#[test]
fn errors_of_the_session_reach_with_connection_in_the_error_type_of_the_function() {
    test(|shop| {
        let ended = shop.context(|| {
            let session = DB.session()?;
            let guard = session.connection()?;
            let held = line!() - 1;
            let busy = session.with_connection(|conn| order(conn, "Ada"));
            assert_is!(busy, Err(Trouble::Session(error)) if error.kind() == ErrorKind::SessionBusy && earlier_line(&error) == held);
            drop(guard);
            let outer = line!() + 1;
            let ordered = session.with_connection(|conn| {
                let busy = session.with_connection(|conn| order(conn, "Ada"));
                assert_is!(busy, Err(Trouble::Session(error))
                    if earlier_line(&error) == outer && line_of(&error) == line!() - 2);
                assert_error!(session.commit(), SessionBusy);
                order(conn, "Bob")
            });
            assert_is!(ordered, Ok(1));
            session.commit()?;
            Ok::<_, Error>(session)
        })?;
        assert_is!(ended.with_connection(|conn| order(conn, "Cid")), Err(Trouble::Session(error)) if error.kind() == ErrorKind::SessionEnded);
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn with_connection_that_hides_a_failed_statement_commits_nothing_that_the_database_has_aborted() {
    test(|shop| {
        let fails = |session: &Session<Conn>| {
            add(session, "Ada")?;
            session.with_connection(|conn| {
                let statement = "INSERT INTO nowhere VALUES (1)";
                conn.batch_execute(statement).map_err(|_| Trouble::OutOfStock("tea"))
            })
        };
        shop.context(|| {
            let session = DB.session()?;
            for commits in [true, false] {
                assert_is!(fails(&session), Err(Trouble::OutOfStock("tea")));
                match (KIND, commits) {
                    (Kind::Postgres, true) => assert_error!(session.commit(), RollbackRequired),
                    (Kind::Postgres, false) => assert_error!(names(&session), RollbackRequired),
                    (_, true) => assert_eq!(names(&session)?, ["Ada"]),
                    (_, false) => assert_eq!(names(&session)?, ["Ada"]),
                }
                session.rollback()?;
                shop.assert_at_rest();
            }
            // In a savepoint only the savepoint is lost, whatever its closure makes of the error.
            add(&session, "Bob")?;
            let lost = session.savepoint(|session| fails(session).or(Ok::<(), Trouble>(())));
            match KIND {
                Kind::Postgres => {
                    assert_is!(lost, Err(Trouble::Session(error)) if error.kind() == ErrorKind::RollbackRequired)
                }
                _ => assert_is!(lost, Ok(())),
            }
            session.commit()
        })?;
        let kept: &[&str] = if KIND == Kind::Postgres { &["Bob"] } else { &["Bob", "Ada"] };
        assert_eq!(shop.names(), kept);
        Ok(())
    });
}

#[test]
fn with_connection_that_ends_the_transaction_is_noticed_whatever_it_returns() {
    test(|shop| {
        for fails in [false, true] {
            shop.context(|| {
                let session = DB.session()?;
                let outcome = session.with_connection(|conn| {
                    order(conn, "Ada")?;
                    conn.batch_execute("ROLLBACK")?;
                    if fails { Err(Trouble::OutOfStock("tea")) } else { Ok(()) }
                });
                assert_eq!(outcome.is_err(), fails);
                assert_error!(names(&session), RollbackRequired);
                assert_error!(session.commit(), RollbackRequired);
                session.rollback()?;
                shop.assert_at_rest();
                Ok::<(), Error>(())
            })?;
        }
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_panic_inside_with_connection_spoils_the_transaction_and_nothing_else() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let message = panic_of(|| {
                session.with_connection(|conn| -> Result<(), Trouble> {
                    order(conn, "Bob")?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::RollbackRequired && error.to_string().contains("panic"));
            session.rollback()?;
            shop.assert_at_rest();
            assert_is!(session.with_connection(|conn| order(conn, "Cid")), Ok(1));
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Cid"]);
        Ok(())
    });
}

#[test]
fn a_second_guard_is_refused_and_the_first_one_works_after_that() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let mut first = session.connection()?;
            let held = line!() - 1;
            for _ in 0..2 {
                assert_is!(session.connection(), Err(error) if error.kind() == ErrorKind::SessionBusy && earlier_line(&error) == held);
                let clone = session.clone();
                assert_error!(clone.connection(), SessionBusy);
            }
            assert_is!(order(&mut first, "Ada"), Ok(1));
            // A commit waits for no guard: it is refused, and what the guard has written stays uncommitted.
            assert_error!(session.commit(), SessionBusy);
            assert_is!(order(&mut first, "Bob"), Ok(1));
            assert!(shop.names().is_empty());
            drop(first);
            session.commit()?;
            // A guard of the next transaction knows nothing of the last one.
            let conn = &mut *session.connection()?;
            assert_eq!(users::table.count().get_result::<i64>(conn)?, 2);
            assert_is!(order(conn, "Cid"), Ok(1));
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}
