//! What is committed, and when.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;

for_each_database!(sqlite, postgres, any_sqlite, any_postgres =>
    refused_commit_is_returned_and_the_connection_checked_in,
);

/// A post of a user that does not exist: COMMIT refuses it.
fn audit_without_a_user() -> Result<usize> {
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
fn scope_without_a_commit_stores_nothing() {
    test(|shop| {
        shop.context(|| add(&DB.session()?, "by return"))?;
        shop.scope().run(|| add(&DB.session()?, "by a scope that commits nothing"))?;
        let by_error = shop.run(|| {
            add(&DB.session()?, "by an error")?;
            DB.app("unknown")
        });
        assert_error!(&by_error, UnknownApp);
        for commits in [false, true] {
            let message = panic_of(|| {
                let body = || -> Result<()> {
                    add(&DB.session()?, "by a panic")?;
                    panic!("on purpose")
                };
                shop.scope().run_and_commit_if(|()| commits, body)
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
fn commit_ends_one_transaction_and_the_next_one_is_separate() {
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
fn run_and_commit_commits_when_the_closure_returns_ok() {
    test(|shop| {
        let answer = shop.run(|| {
            add(&DB.session()?, "Ada")?;
            Ok::<_, Error>(42)
        })?;
        assert_eq!((answer, shop.names()), (42, vec!["Ada".into()]));
        let refused = shop.scope().run_and_commit(|| {
            add(&DB.session()?, "Bob")?;
            Err::<(), _>(Trouble::OutOfStock("tea"))
        });
        assert_is!(refused, Err(Trouble::OutOfStock("tea")));
        shop.run(|| Ok(()))?;
        shop.run(|| {
            add(&DB.session()?, "Eve")?;
            DB.session()?.rollback()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn run_and_commit_if_commits_exactly_when_it_says() {
    struct Response {
        status: u16,
    }
    test(|shop| {
        for status in [200, 204, 302, 404, 500] {
            let body = || {
                add(&DB.session()?, &status.to_string())?;
                Ok::<_, Error>(Response { status })
            };
            let response = shop.scope().run_and_commit_if(|response: &Response| response.status < 400, body)?;
            assert_eq!(response.status, status);
        }
        let body = || {
            add(&DB.session()?, "an error")?;
            Err(Trouble::OutOfStock("tea"))
        };
        let left = shop.scope().run_and_commit_if(|()| true, body);
        assert_is!(left, Err(Trouble::OutOfStock("tea")));
        assert_eq!(shop.names(), ["200", "204", "302"]);
        Ok(())
    });
}

#[test]
fn commit_if_that_panics_rolls_back() {
    test(|shop| {
        let scope = shop.scope();
        let decide = |_: &usize| panic!("cannot decide");
        let message = panic_of(|| scope.run_and_commit_if(decide, || add(&DB.session()?, "Ada")));
        assert_eq!(message, "cannot decide");
        shop.assert_at_rest();
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn scope_returns_the_error_type_of_its_closure() {
    test(|shop| {
        let own: Result<usize, Trouble> = shop.scope().run_and_commit(|| Ok(add(&DB.session()?, "Ada")?));
        assert_is!(own, Ok(1));
        let any: Result<usize, Box<dyn std::error::Error + Send + Sync>> =
            shop.scope().run_and_commit(|| Ok(add(&DB.session()?, "Ada")?));
        let any = any.expect_err("the name is taken");
        assert_is!(any.downcast_ref::<Error>(), Some(error) if error.kind() == ErrorKind::Query);
        // The error of the commit itself arrives in it too.
        let refused: Result<(), Trouble> = shop.scope().run_and_commit(|| {
            DB.session()?.before_commit(|| Err(Error::from(diesel::result::Error::NotFound)))?;
            Ok(())
        });
        assert_is!(refused, Err(Trouble::Session(error)) if error.is_not_found());
        Ok(())
    });
}

// Not on MariaDB: it checks foreign keys at the statement: there is nothing to refuse at COMMIT.
fn refused_commit_is_returned_and_the_connection_checked_in() {
    test(|shop| {
        let foreign_key = |error: &Error| matches!(kind_of(error), Some(DatabaseErrorKind::ForeignKeyViolation));
        let kept = RefCell::new(None);
        let refused = shop.run(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            post(&session, 99, "by nobody")?;
            kept.replace(Some(session));
            Ok::<(), Error>(())
        });
        assert_is!(refused, Err(error) if foreign_key(&error));
        let kept = kept.take().expect("set above");
        assert_error!(kept.count(users::table), SessionEnded);
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
fn scope_commits_several_databases_in_the_order_of_their_sessions() {
    test(|shop| {
        with_audit(shop, |audited| {
            let order = Rc::new(RefCell::new(Vec::new()));
            let note = |name| {
                let order = Rc::clone(&order);
                move || order.borrow_mut().push(name)
            };
            shop.run(|| {
                let (log, session) = (AUDIT.session()?, DB.session()?);
                session.after_commit(note("shop"))?;
                log.after_commit(note("audit"))?;
                add(&session, "Ada")?;
                audit("Bob")
            })?;
            assert_eq!(order.borrow().as_slice(), ["audit", "shop"]);
            let left: Result<()> = shop.run(|| {
                add(&DB.session()?, "Cid")?;
                audit("Dan")?;
                DB.app("unknown").map(drop)
            });
            assert_error!(&left, UnknownApp);
            assert_eq!((shop.names(), audited.names()), (vec!["Ada".into()], vec!["Bob".into()]));
            Ok(())
        })
    });
}

#[test]
fn failed_second_commit_is_a_partial_commit_that_names_both() {
    test(|shop| {
        with_audit(shop, |audited| {
            let refused = shop.run(|| {
                add(&DB.session()?, "Ada")?;
                audit("Bob")?;
                audit_without_a_user()
            });
            let error = refused.expect_err("the second database refuses");
            let text = error.to_string();
            assert!(text.starts_with("DS306") && error.code() == "DS306", "{text}");
            assert!(!text.contains("s3cret"), "{text}");
            let committed = error.committed_databases().expect("one was committed");
            assert!(committed.len() == 1 && committed[0].contains(shop.id()), "{text}");
            assert!(text.contains(audited.url().trim_start_matches("sqlite://")), "{text}");
            assert!(error.is_foreign_key_violation(), "{text}");
            assert_eq!((shop.names(), audited.names()), (vec!["Ada".into()], vec![]));
            Ok(())
        })
    });
}

#[test]
fn failed_first_commit_commits_nothing() {
    test(|shop| {
        with_audit(shop, |audited| {
            let refused = shop.run(|| {
                audit("Bob")?;
                audit_without_a_user()?;
                add(&DB.session()?, "Ada")
            });
            assert_is!(refused, Err(error)
                if matches!(kind_of(&error), Some(DatabaseErrorKind::ForeignKeyViolation)));
            assert_eq!((shop.names(), audited.names()), (vec![], vec![]));
            // A database that was only asked for its session has not been committed.
            let refused = shop.run(|| {
                DB.session()?;
                audit_without_a_user()
            });
            assert_error!(&refused, Query);
            Ok(())
        })
    });
}

#[test]
fn after_commit_hook_that_panics_does_not_undo_the_commit() {
    test(|shop| {
        let failed = shop.run(|| {
            let session = DB.session()?;
            session.after_commit(|| panic!("no mail today"))?;
            add(&session, "Ada")
        });
        assert_is!(&failed, Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("after_commit") && error.to_string().ends_with("The transaction was committed.") && error.to_string().contains("no mail today"));
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}
