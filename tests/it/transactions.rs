//! `begin`, `transaction` and `savepoint`.

use super::*;

for_each_database!(sqlite, postgres, any_sqlite, any_postgres => refused_commit_rolls_the_transaction_back);

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
            assert_error!(&refused, UnknownApp);
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
                assert_error!(&inner, UnknownApp);
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
fn savepoint_allows_to_go_on_after_a_failed_statement() {
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
                assert!(earlier_line(&error) == begun && line_of(&error) == line!() - 1, "{error}");
                assert!(error.to_string().contains("`commit` was called at"), "{error}");
                assert_is!(session.rollback(), Err(error) if error.kind() == ErrorKind::InsideTransaction && error.to_string().contains("`rollback` was called "));
                assert_is!(session.remove(), Err(error) if error.kind() == ErrorKind::InsideTransaction && error.to_string().contains("`remove` was called "));
                assert_error!(DB.session()?.commit(), InsideTransaction);
                assert_error!(session.begin(), AlreadyBegun);
                let begun = line!() + 1;
                session.savepoint(|session| {
                    assert_is!(session.commit(), Err(error)
                        if error.kind() == ErrorKind::InsideTransaction && earlier_line(&error) == begun);
                    Ok::<(), Error>(())
                })?;
                add(session, "Bob")
            })?;
            assert_eq!(shop.names(), ["Ada", "Bob"]);
            session.savepoint(|session| {
                add(session, "Cid")?;
                assert_error!(session.commit(), InsideTransaction);
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
            assert!(earlier_line(&error) == begun && line_of(&error) == line!() - 1, "{error}");
            add(&session, "Ada")?;
            assert_error!(session.begin(), AlreadyBegun);
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

// Not on MariaDB: it has no constraint that is checked at COMMIT.
fn refused_commit_rolls_the_transaction_back() {
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
fn removed_session_begins_anew() {
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
