//! `begin`, `transaction` and `savepoint`.

use super::*;

#[test]
fn a_transaction_commits_what_its_closure_did() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let answer = session.transaction(|session| {
                add(session, "Ada")?;
                assert!(session.in_transaction());
                assert!(shop.names().is_empty());
                Ok::<_, Error>(42)
            })?;
            assert_eq!((answer, session.in_transaction()), (42, false));
            assert_eq!(shop.names(), ["Ada"]);
            shop.assert_at_rest();
            Ok(())
        })
    });
}

#[test]
fn the_outermost_transaction_joins_what_had_begun_and_ends_all_of_it() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.transaction(|session| add(session, "Bob"))?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            add(&session, "Cid")?;
            let refused = session.transaction(|session| {
                add(session, "Dan")?;
                Err::<(), _>(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            assert!(!session.in_transaction());
            shop.assert_at_rest();
            add(&session, "Eve")?;
            let message = panic_of(|| {
                session.transaction(|session| -> Result<()> {
                    add(session, "Fay")?;
                    panic!("on purpose")
                })
            });
            assert_eq!((message.as_str(), session.in_transaction()), ("on purpose", false));
            shop.assert_at_rest();
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            session.commit()
        })
    });
}

#[test]
fn a_transaction_inside_another_is_a_savepoint() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.transaction(|session| {
                add(session, "Ada")?;
                session.transaction(|session| add(session, "Bob"))?;
                assert!(shop.names().is_empty());
                let refused = session.transaction(|session| {
                    add(session, "Cid")?;
                    session.savepoint(|session| add(session, "Dan"))?;
                    Err::<(), _>(Trouble::OutOfStock("tea"))
                });
                assert_is!(refused, Err(Trouble::OutOfStock("tea")));
                panic_of(|| {
                    session.transaction(|session| -> Result<()> {
                        add(session, "Eve")?;
                        panic!("on purpose")
                    })
                });
                assert_eq!(names(session)?, ["Ada", "Bob"]);
                Ok::<(), Error>(())
            })?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            Ok(())
        })
    });
}

#[test]
fn an_error_of_the_outer_closure_undoes_the_inner_ones_too() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let refused = session.transaction(|session| {
                session.transaction(|session| add(session, "Ada"))?;
                session.savepoint(|session| add(session, "Bob"))?;
                DB.app("unknown").map(drop)
            });
            assert_is!(refused, Err(Error::UnknownApp { .. }));
            session.commit()
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_savepoint_keeps_or_undoes_what_its_closure_did_and_nothing_else() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.savepoint(|session| add(session, "Bob"))?;
            let refused: Result<(), Trouble> = session.savepoint(|session| {
                add(session, "Cid")?;
                session.savepoint(|session| add(session, "Dan"))?;
                Err(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            let message = panic_of(|| {
                session.savepoint(|session| -> Result<()> {
                    add(session, "Eve")?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            assert!(session.in_transaction());
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            session.savepoint(|session| {
                let inner: Result<()> = session.savepoint(|session| {
                    add(session, "Fay")?;
                    DB.app("unknown").map(drop)
                });
                assert_is!(inner, Err(Error::UnknownApp { .. }));
                add(session, "Gil")
            })?;
            assert!(shop.names().is_empty());
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob", "Gil"]);
        Ok(())
    });
}

#[test]
fn a_savepoint_begins_the_transaction_and_commits_nothing() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.savepoint(|session| add(session, "Ada"))?;
            assert!(session.in_transaction() && shop.in_transaction_now());
            Ok::<(), Error>(())
        })?;
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_savepoint_is_how_to_go_on_after_a_statement_that_fails() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let twice = session.savepoint(|session| {
                add(session, "Bob")?;
                add(session, "Ada")
            });
            assert_is!(twice, Err(error) if error.is_unique_violation());
            assert_eq!(names(&session)?, ["Ada"]);
            add(&session, "Cid")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Cid"]);
        Ok(())
    });
}

#[test]
fn inside_a_closure_the_transaction_cannot_be_ended_by_hand() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let begun = line!() + 1;
            session.transaction(|session| {
                add(session, "Ada")?;
                let error = session.commit().expect_err("it is the closure's");
                assert_is!(error, Error::InsideTransaction { operation: "commit", outer: "transaction", outer_at, at }
                    if outer_at.line() == begun && at.line() == line!() - 2);
                assert_is!(session.rollback(), Err(Error::InsideTransaction { operation: "rollback", .. }));
                assert_is!(session.remove(), Err(Error::InsideTransaction { operation: "remove", .. }));
                assert_is!(DB.session()?.commit(), Err(Error::InsideTransaction { .. }));
                assert_is!(session.begin(), Err(Error::AlreadyBegun { .. }));
                let begun = line!() + 1;
                session.savepoint(|session| {
                    assert_is!(session.commit(), Err(Error::InsideTransaction { outer: "savepoint", outer_at, .. })
                        if outer_at.line() == begun);
                    Ok::<(), Error>(())
                })?;
                add(session, "Bob")
            })?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            session.savepoint(|session| {
                add(session, "Cid")?;
                assert_is!(session.commit(), Err(Error::InsideTransaction { .. }));
                session.transaction(|session| add(session, "Dan"))
            })?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            Ok(())
        })
    });
}

#[test]
fn begin_begins_now_and_only_once() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.begin()?;
            let begun = line!() - 1;
            assert!(session.in_transaction() && shop.in_transaction_now());
            let error = session.begin().expect_err("it has begun");
            assert_is!(error, Error::AlreadyBegun { begun_at, at }
                if begun_at.line() == begun && at.line() == line!() - 2 && at.file().ends_with("transactions.rs"));
            add(&session, "Ada")?;
            assert_is!(session.begin(), Err(Error::AlreadyBegun { .. }));
            session.commit()?;
            session.begin()?;
            session.rollback()?;
            session.begin()?;
            add(&session, "Bob")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn commit_and_rollback_without_a_transaction_do_nothing() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.commit()?;
            session.rollback()?;
            session.remove()?;
            assert_eq!(shop.status().open, 0);
            Ok(())
        })
    });
}

#[test]
fn a_commit_that_is_refused_rolls_the_transaction_back() {
    if KIND == Kind::Mariadb {
        // It has no constraint that is checked at COMMIT.
        return;
    }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let refused: Result<usize, Trouble> = session.transaction(|session| {
                add(session, "Ada")?;
                Ok(post(session, 99, "by nobody")?)
            });
            assert_is!(refused, Err(Trouble::Session(error))
                if matches!(kind_of(&error), Some(DatabaseErrorKind::ForeignKeyViolation)));
            assert!(!session.in_transaction());
            shop.assert_at_rest();
            session.transaction(|session| add(session, "Bob"))?;
            assert_eq!(shop.names(), ["Bob"]);
            Ok(())
        })
    });
}

#[test]
fn an_open_session_ends_when_its_last_handle_is_dropped() {
    test(|shop| {
        let session = shop.open_session()?;
        let clone = session.clone();
        add(&session, "Ada")?;
        drop(session);
        assert_eq!(names(&clone)?, ["Ada"]);
        assert!(shop.in_transaction_now());
        drop(clone);
        shop.assert_at_rest();
        let session = shop.open_session()?;
        add(&session, "Bob")?;
        session.commit()?;
        add(&session, "Cid")?;
        // No context takes it for its own.
        shop.context(|| {
            assert!(!DB.session()?.in_transaction());
            Ok::<(), Error>(())
        })?;
        assert!(session.in_transaction());
        drop(session);
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn a_removed_session_goes_on_as_new() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.remove()?;
            session.remove()?;
            shop.assert_at_rest();
            assert!(names(&session)?.is_empty());
            add(&session, "Bob")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}
