//! What is committed, and when.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;

/// A post of a user who is not there: the database finds out at COMMIT.
fn audit_of_nobody() -> Result<usize> {
    AUDIT.session()?.execute(diesel::insert_into(posts::table).values((posts::user_id.eq(9), posts::title.eq("lost"))))
}

fn audit(name: &str) -> Result<usize> {
    AUDIT.session()?.execute(diesel::insert_into(users::table).values(users::name.eq(name)))
}

/// A second database of the same application.
fn with_audit(shop: &Shop<Conn>, body: impl FnOnce(&Shop<SqliteConnection>) -> Result<()>) -> Result<()> {
    let audit = Shop::open(&AUDIT, Kind::Sqlite);
    let app = AUDIT.init_app(shop.id(), Config::new(audit.url()))?;
    body(&audit)?;
    assert_eq!(app.status().in_use, 0);
    assert_eq!(audit.open_transactions(), 0);
    AUDIT.remove_app(shop.id()).map(drop)
}

#[test]
fn what_is_not_committed_is_not_there_however_it_ends() {
    test(|shop| {
        shop.context(|| add(&DB.session()?, "by return"))?;
        shop.scope().run(|| add(&DB.session()?, "by a scope without a policy"))?;
        let by_error = shop.scope().commit_on_ok().run(|| {
            add(&DB.session()?, "by an error")?;
            DB.app("unknown")
        });
        assert_is!(by_error, Err(Error::UnknownApp { .. }));
        for commits in [false, true] {
            let message = panic_of(|| {
                shop.scope().commit_if(|_: &()| commits).run(|| -> Result<()> {
                    add(&DB.session()?, "by a panic")?;
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
        }
        let session = shop.open_session()?;
        add(&session, "by drop")?;
        drop(session);
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "by remove")?;
            session.remove()?;
            add(&session, "by rollback")?;
            session.rollback()
        })?;
        let there = std::thread::scope(|threads| {
            threads.spawn(|| shop.context(|| add(&DB.session()?, "by the end of a thread"))).join()
        });
        there.expect("the thread ends")?;
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn commit_ends_one_transaction_and_the_next_one_is_by_itself() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.commit()?;
            assert_eq!(shop.names(), ["Ada"]);
            add(&session, "Bob")?;
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn commit_on_ok_commits_when_the_closure_returns_ok() {
    test(|shop| {
        let answer = shop.scope().commit_on_ok().run(|| {
            add(&DB.session()?, "Ada")?;
            Ok::<_, Error>(42)
        })?;
        assert_eq!((answer, shop.names()), (42, vec!["Ada".into()]));
        let refused = shop.scope().commit_on_ok().run(|| {
            add(&DB.session()?, "Bob")?;
            Err::<(), _>(Trouble::OutOfStock("tea"))
        });
        assert_is!(refused, Err(Trouble::OutOfStock("tea")));
        shop.scope().commit_on_ok().run(|| Ok::<(), Error>(()))?;
        shop.scope().commit_on_ok().run(|| {
            add(&DB.session()?, "Eve")?;
            DB.session()?.rollback()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn commit_if_commits_exactly_when_it_says() {
    struct Response {
        status: u16,
    }
    test(|shop| {
        for status in [200, 204, 302, 404, 500] {
            let scope = shop.scope().commit_if(|response: &Response| response.status < 400);
            let response = scope.run(|| {
                add(&DB.session()?, &status.to_string())?;
                Ok::<_, Error>(Response { status })
            })?;
            assert_eq!(response.status, status);
        }
        let left = shop.scope().commit_if(|_: &()| true).run(|| {
            add(&DB.session()?, "an error")?;
            Err(Trouble::OutOfStock("tea"))
        });
        assert_is!(left, Err(Trouble::OutOfStock("tea")));
        assert_eq!(shop.names(), ["200", "204", "302"]);
        Ok(())
    });
}

#[test]
fn a_policy_that_panics_rolls_back() {
    test(|shop| {
        let scope = shop.scope().commit_if(|_: &usize| panic!("cannot decide"));
        assert_eq!(panic_of(|| scope.run(|| add(&DB.session()?, "Ada"))), "cannot decide");
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_scope_speaks_the_error_type_of_its_closure() {
    test(|shop| {
        let own: Result<usize, Trouble> = shop.scope().commit_on_ok().run(|| Ok(add(&DB.session()?, "Ada")?));
        assert_is!(own, Ok(1));
        let any: Result<usize, Box<dyn std::error::Error + Send + Sync>> =
            shop.scope().commit_on_ok().run(|| Ok(add(&DB.session()?, "Ada")?));
        let any = any.expect_err("the name is taken");
        assert_is!(any.downcast_ref::<Error>(), Some(Error::Query { .. }));
        // The error of the commit itself arrives in it too.
        let refused: Result<(), Trouble> = shop.scope().commit_on_ok().run(|| {
            DB.session()?.before_commit(|| Err(Error::NotFound { row: None, at: std::panic::Location::caller() }))?;
            Ok(())
        });
        assert_is!(refused, Err(Trouble::Session(Error::NotFound { .. })));
        Ok(())
    });
}

#[test]
fn a_commit_that_the_database_refuses_is_returned_and_everything_is_given_back() {
    if KIND == Kind::Mariadb {
        // It checks foreign keys at the statement: there is nothing to refuse at COMMIT.
        return;
    }
    test(|shop| {
        let foreign_key = |error: &Error| matches!(kind_of(error), Some(DatabaseErrorKind::ForeignKeyViolation));
        let kept = RefCell::new(None);
        let refused = shop.scope().commit_on_ok().run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            post(&session, 99, "by nobody")?;
            kept.replace(Some(session));
            Ok::<(), Error>(())
        });
        assert_is!(refused, Err(error) if foreign_key(&error));
        let kept = kept.take().expect("set above");
        assert_is!(kept.count(users::table), Err(Error::SessionEnded { .. }));
        shop.assert_at_rest();
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Bob")?;
            post(&session, 99, "by nobody")?;
            assert_is!(session.commit(), Err(error) if foreign_key(&error));
            assert!(!session.in_transaction());
            shop.assert_at_rest();
            // As new: nothing of what was refused comes back.
            assert!(names(&session)?.is_empty());
            add(&session, "Eve")?;
            session.commit()
        })?;
        assert_eq!((shop.names(), shop.titles()), (vec!["Eve".into()], vec![]));
        Ok(())
    });
}

#[test]
fn several_databases_commit_together_in_the_order_of_their_opening() {
    test(|shop| {
        with_audit(shop, |audited| {
            let order = Rc::new(RefCell::new(Vec::new()));
            let note = |name| {
                let order = Rc::clone(&order);
                move || order.borrow_mut().push(name)
            };
            shop.scope().commit_on_ok().run(|| {
                let (log, session) = (AUDIT.session()?, DB.session()?);
                session.after_commit(note("shop"))?;
                log.after_commit(note("audit"))?;
                add(&session, "Ada")?;
                audit("Bob")
            })?;
            assert_eq!(order.borrow().as_slice(), ["audit", "shop"]);
            let left: Result<()> = shop.scope().commit_on_ok().run(|| {
                add(&DB.session()?, "Cid")?;
                audit("Dan")?;
                DB.app("unknown").map(drop)
            });
            assert_is!(left, Err(Error::UnknownApp { .. }));
            assert_eq!((shop.names(), audited.names()), (vec!["Ada".into()], vec!["Bob".into()]));
            Ok(())
        })
    });
}

#[test]
fn a_second_commit_that_fails_is_a_partial_commit_that_names_both() {
    test(|shop| {
        with_audit(shop, |audited| {
            let refused = shop.scope().commit_on_ok().run(|| {
                add(&DB.session()?, "Ada")?;
                audit("Bob")?;
                audit_of_nobody()
            });
            let error = refused.expect_err("the second database refuses");
            let text = error.to_string();
            assert!(text.starts_with("DS306") && error.code() == "DS306", "{text}");
            assert!(!text.contains("s3cret"), "{text}");
            assert_is!(error, Error::PartialCommit { committed, failed, source }
                if committed.len() == 1 && committed[0].contains(shop.id()) && failed.contains(shop.id())
                    && failed.contains(audited.url().trim_start_matches("sqlite://")) && committed[0] != failed
                    && matches!(kind_of(&source), Some(DatabaseErrorKind::ForeignKeyViolation)));
            assert_eq!((shop.names(), audited.names()), (vec!["Ada".into()], vec![]));
            Ok(())
        })
    });
}

#[test]
fn where_the_first_commit_fails_nothing_is_committed() {
    test(|shop| {
        with_audit(shop, |audited| {
            let refused = shop.scope().commit_on_ok().run(|| {
                audit("Bob")?;
                audit_of_nobody()?;
                add(&DB.session()?, "Ada")
            });
            assert_is!(refused, Err(error)
                if matches!(kind_of(&error), Some(DatabaseErrorKind::ForeignKeyViolation)));
            assert_eq!((shop.names(), audited.names()), (vec![], vec![]));
            // A database that was only asked for its session has not been committed.
            let refused = shop.scope().commit_on_ok().run(|| {
                DB.session()?;
                audit_of_nobody()
            });
            assert_is!(refused, Err(Error::Query { .. }));
            Ok(())
        })
    });
}

#[test]
fn a_hook_that_panics_after_the_commit_does_not_undo_it() {
    test(|shop| {
        let failed = shop.scope().commit_on_ok().run(|| {
            let session = DB.session()?;
            session.after_commit(|| panic!("no mail today"))?;
            add(&session, "Ada")
        });
        assert_is!(failed, Err(Error::HookFailed { hook: "after_commit", committed: true, message })
            if message == "no mail today");
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}
