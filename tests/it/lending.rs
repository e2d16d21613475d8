//! The connection in other hands: `with`, the guard of `connection()`, and who else wants the session meanwhile.

use std::cell::RefCell;
use std::time::Duration;

use super::*;

#[test]
fn a_guard_works_in_every_position() {
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
fn while_the_guard_lives_the_session_is_busy_and_says_where() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let guard = session.connection()?;
            let lent = line!() - 1;
            let error = names(&session).expect_err("it is lent");
            assert_is!(error, Error::SessionBusy { held_at, at } if held_at.line() == lent && at.line() == line!() - 1);
            assert_is!(session.connection(), Err(Error::SessionBusy { .. }));
            assert_is!(session.begin(), Err(Error::SessionBusy { .. }));
            assert_is!(session.commit(), Err(Error::SessionBusy { .. }));
            assert_is!(session.rollback(), Err(Error::SessionBusy { .. }));
            assert_is!(session.remove(), Err(Error::SessionBusy { .. }));
            assert_is!(session.transaction(|session| add(session, "Ada")), Err(Error::SessionBusy { .. }));
            assert_is!(session.savepoint(|session| add(session, "Ada")), Err(Error::SessionBusy { .. }));
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
fn the_session_inside_with_is_busy_and_says_where() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let outer = line!() + 1;
            session.with(|conn| {
                let error = DB.session().and_then(|session| names(&session)).expect_err("it is in use");
                assert_is!(error, Error::SessionBusy { held_at, at }
                    if held_at.line() == outer && at.line() == line!() - 2 && at.file().ends_with("lending.rs"));
                assert_is!(session.commit(), Err(Error::SessionBusy { .. }));
                assert_is!(session.with(|_| Ok(())), Err(Error::SessionBusy { .. }));
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
fn a_context_inside_with_has_a_session_of_its_own() {
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
fn a_guard_that_outlives_its_context_gives_everything_back_when_it_is_dropped() {
    test(|shop| {
        let minute = Duration::from_secs(60);
        let scopes = [shop.scope(), shop.scope().read_only(), shop.scope().deadline(minute), shop.scope().autocommit()];
        for scope in scopes {
            let (mut guard, session) = scope.run(|| {
                let session = DB.session()?;
                Ok::<_, Error>((session.connection()?, session))
            })?;
            assert_eq!(shop.status().in_use, 1);
            assert_is!(session.count(users::table), Err(Error::SessionEnded { .. }));
            assert_eq!(users::table.count().get_result::<i64>(&mut *guard)?, 0);
            drop(guard);
            shop.assert_at_rest();
            assert_is!(session.count(users::table), Err(Error::SessionEnded { .. }));
        }
        let mut guard = shop.context(|| DB.session()?.connection())?;
        diesel::insert_into(users::table).values(users::name.eq("Ada")).execute(&mut *guard)?;
        drop(guard);
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        // The next ones find their connections as they should be.
        shop.scope().commit_on_ok().run(|| add(&DB.session()?, "Bob"))?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn a_guard_in_a_scope_that_commits_is_an_error_and_nothing_is_committed() {
    test(|shop| {
        let kept = RefCell::new(None);
        let refused = shop.scope().commit_on_ok().run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            kept.replace(Some(session.connection()?));
            Ok::<(), Error>(())
        });
        assert_is!(refused, Err(Error::SessionBusy { .. }));
        drop(kept.take());
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_savepoint_that_ends_while_its_connection_is_lent_commits_nothing() {
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
                    false => assert_is!(ended, Err(Trouble::Session(Error::SessionBusy { .. }))),
                }
                drop(kept.take());
                assert_is!(names(&session), Err(Error::RollbackRequired { .. }));
                assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
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
            assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
            session.rollback()?;
            add(&session, "Cid")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Cid"]);
        Ok(())
    });
}

#[test]
fn a_transaction_that_ends_while_its_connection_is_lent_commits_nothing() {
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
                    false => assert_is!(ended, Err(Trouble::Session(Error::SessionBusy { .. }))),
                }
                drop(kept.take());
                assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
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
fn a_guard_keeps_an_open_session_alive() {
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
fn a_panic_inside_with_spoils_the_transaction_and_nothing_else() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let lent = line!() + 2;
            let message = panic_of(|| {
                session.with(|conn| -> QueryResult<()> {
                    diesel::insert_into(users::table).values(users::name.eq("Bob")).execute(conn)?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            let error = names(&session).expect_err("nobody knows the connection's state");
            assert!(error.is_rollback_required(), "{error}");
            assert_is!(error, Error::RollbackRequired { cause, at } if cause.contains("panic") && at.line() == lent);
            assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
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
fn a_panic_while_a_guard_lives_spoils_the_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let lent = line!() + 2;
            panic_of(|| {
                let _guard = session.connection().expect("a connection");
                panic!("on purpose");
            });
            assert_is!(session.commit(), Err(Error::RollbackRequired { cause, at })
                if cause.contains("panic") && at.line() == lent);
            session.rollback()?;
            add(&session, "Bob")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn a_panic_inside_with_inside_a_savepoint_spoils_the_whole_transaction() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            panic_of(|| session.savepoint(|session| session.with(|_| -> QueryResult<()> { panic!("on purpose") })));
            assert_is!(add(&session, "Bob"), Err(Error::RollbackRequired { .. }));
            assert_is!(session.commit(), Err(Error::RollbackRequired { .. }));
            Ok::<(), Error>(())
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}
