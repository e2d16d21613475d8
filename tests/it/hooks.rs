//! Hooks of commit and rollback.

use std::cell::RefCell;
use std::panic::Location;
use std::rc::Rc;

use super::*;

for_each_database!(sqlite, postgres, any_sqlite, any_postgres => refused_commit_runs_the_hooks_of_a_rollback);

/// What the hooks have logged, in order.
#[derive(Clone, Default)]
struct Told(Rc<RefCell<Vec<&'static str>>>);

impl Told {
    fn hook(&self, what: &'static str) -> impl FnOnce() + 'static {
        let told = self.clone();
        move || told.0.borrow_mut().push(what)
    }

    fn take(&self) -> Vec<&'static str> {
        self.0.take()
    }

    /// Whether no hook is left that could say anything.
    fn is_forgotten(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }
}

fn hook_all(session: &Session<Conn>, told: &Told, names: [&'static str; 3]) -> Result<()> {
    session.before_commit(told.hook(names[0]))?;
    session.after_commit(told.hook(names[1]))?;
    session.after_rollback(told.hook(names[2]))
}

#[test]
fn hooks_run_once_in_the_order_of_their_registration() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            hook_all(&session, &told, ["before 1", "after 1", "rollback 1"])?;
            hook_all(&session, &told, ["before 2", "after 2", "rollback 2"])?;
            add(&session, "Ada")?;
            assert!(told.take().is_empty());
            session.commit()?;
            assert_eq!(told.take(), ["before 1", "before 2", "after 1", "after 2"]);
            assert!(told.is_forgotten());
            add(&session, "Bob")?;
            session.commit()?;
            assert!(told.take().is_empty());
            hook_all(&session, &told, ["before 3", "after 3", "rollback 3"])?;
            hook_all(&session, &told, ["before 4", "after 4", "rollback 4"])?;
            add(&session, "Cid")?;
            session.rollback()?;
            assert_eq!(told.take(), ["rollback 3", "rollback 4"]);
            assert!(told.is_forgotten());
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn transactions_and_scopes_run_the_hooks_of_their_end() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            session.transaction(|session| {
                hook_all(session, &told, ["before", "after", "rollback"])?;
                add(session, "Ada")
            })?;
            assert_eq!(told.take(), ["before", "after"]);
            let refused = session.transaction(|session| {
                hook_all(session, &told, ["before", "after", "rollback"])?;
                add(session, "Bob")?;
                Err::<(), _>(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            assert_eq!(told.take(), ["rollback"]);
            panic_of(|| {
                session.transaction(|session| -> Result<()> {
                    hook_all(session, &told, ["before", "after", "rollback"])?;
                    panic!("on purpose")
                })
            });
            assert_eq!(told.take(), ["rollback"]);
            Ok::<(), Error>(())
        })?;
        shop.run(|| {
            hook_all(&DB.session()?, &told, ["before", "after", "rollback"])?;
            add(&DB.session()?, "Cid")
        })?;
        assert_eq!(told.take(), ["before", "after"]);
        shop.context(|| {
            hook_all(&DB.session()?, &told, ["before", "after", "rollback"])?;
            add(&DB.session()?, "Dan")
        })?;
        assert_eq!(told.take(), ["rollback"]);
        panic_of(|| {
            shop.context(|| -> Result<()> {
                hook_all(&DB.session()?, &told, ["before", "after", "rollback"])?;
                add(&DB.session()?, "Dan")?;
                panic!("on purpose")
            })
        });
        assert_eq!(told.take(), ["rollback"]);
        assert!(told.is_forgotten());
        Ok(())
    });
}

#[test]
fn hooks_of_a_savepoint_that_was_rolled_back_are_dropped() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            hook_all(&session, &told, ["before", "after", "rollback"])?;
            session.savepoint(|session| hook_all(session, &told, ["kept before", "kept after", "kept rollback"]))?;
            let refused = session.savepoint(|session| {
                hook_all(session, &told, ["lost before", "lost after", "lost rollback"])?;
                session.savepoint(|session| hook_all(session, &told, ["inner", "inner", "inner"]))?;
                Err::<(), _>(Trouble::OutOfStock("tea"))
            });
            assert_is!(refused, Err(Trouble::OutOfStock("tea")));
            panic_of(|| {
                session.savepoint(|session| -> Result<()> {
                    hook_all(session, &told, ["panicked", "panicked", "panicked"])?;
                    panic!("on purpose")
                })
            });
            assert!(told.take().is_empty());
            session.commit()?;
            assert_eq!(told.take(), ["before", "kept before", "after", "kept after"]);
            assert!(told.is_forgotten());
            Ok(())
        })
    });
}

#[test]
fn hooks_left_at_the_end_are_dropped_even_if_they_hold_the_session() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let (own, token) = (session.clone(), told.clone());
            session.after_commit(move || {
                token.hook("never")();
                drop(own);
            })?;
            session.remove()?;
            assert!(told.is_forgotten());
            let (own, token) = (session.clone(), told.clone());
            session.before_commit(move || {
                token.hook("never")();
                drop(own);
            })
        })?;
        assert!(told.is_forgotten() && told.take().is_empty());
        Ok(())
    });
}

#[test]
fn hooks_of_a_rollback_run_only_if_a_transaction_had_begun() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            hook_all(&session, &told, ["before", "after", "rollback"])?;
            session.rollback()?;
            hook_all(&session, &told, ["before", "after", "rollback"])
        })?;
        assert!(told.take().is_empty() && told.is_forgotten());
        Ok(())
    });
}

#[test]
fn before_commit_hook_can_refuse_the_commit() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.before_commit(|| Err(Error::from(diesel::result::Error::NotFound)))?;
            session.after_commit(told.hook("after"))?;
            session.after_rollback(told.hook("rollback"))?;
            assert_error!(session.commit(), NotFound);
            assert!(session.in_transaction() && told.take().is_empty());
            session.rollback()?;
            assert_eq!(told.take(), ["rollback"]);

            add(&session, "Bob")?;
            session.before_commit(|| panic!("cannot be"))?;
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("before_commit") && error.to_string().ends_with("The transaction was not committed.") && error.to_string().contains("cannot be"));
            assert!(session.in_transaction() && shop.names().is_empty());
            session.rollback()?;

            let refused: Result<usize, Trouble> = session.transaction(|session| {
                session.before_commit(|| Err(Error::from(diesel::result::Error::NotFound)))?;
                session.after_rollback(told.hook("rollback"))?;
                Ok(add(session, "Cid")?)
            });
            assert_is!(refused, Err(Trouble::Session(error)) if error.is_not_found());
            assert!(!session.in_transaction());
            assert_eq!(told.take(), ["rollback"]);
            Ok::<(), Error>(())
        })?;
        let refused = shop.run(|| {
            let session = DB.session()?;
            session.before_commit(|| panic!("cannot be"))?;
            session.after_rollback(told.hook("rollback"))?;
            add(&session, "Dan")
        });
        assert_is!(&refused, Err(error) if error.kind() == ErrorKind::HookFailed && error.to_string().ends_with("The transaction was not committed."));
        assert_eq!(told.take(), ["rollback"]);
        assert!(shop.names().is_empty() && told.is_forgotten());
        Ok(())
    });
}

#[test]
fn before_commit_hook_may_use_the_session_and_register_hooks() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.before_commit(|| -> Result<()> {
                let session = DB.session()?;
                assert_eq!(names(&session)?, ["Ada"]);
                add(&session, "Bob")?;
                session.before_commit(|| -> Result<()> { add(&DB.session()?, "Cid").map(drop) })
            })?;
            add(&session, "Ada")?;
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob", "Cid"]);
        Ok(())
    });
}

#[test]
fn hooks_that_register_themselves_for_ever_are_an_error() {
    fn again() {
        DB.session().and_then(|session| session.before_commit(again)).expect("inside the context");
    }
    test(|shop| {
        let failed = shop.run(|| {
            DB.session()?.before_commit(again)?;
            add(&DB.session()?, "Ada")
        });
        assert_is!(&failed, Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("before_commit") && error.to_string().ends_with("The transaction was not committed."));
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn hooks_after_the_end_run_when_the_connection_is_back_and_may_begin_anew() {
    test_alone(|shop| {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let look = |commits: Option<&'static str>| {
            let (seen, app) = (Rc::clone(&seen), App::clone(shop));
            move || {
                let session = DB.session().expect("inside the context");
                seen.borrow_mut().push((app.status().in_use, session.in_transaction()));
                // A pool of one: it would have to wait if the connection were not back.
                app.context(|| DB.session().and_then(|session| session.count(users::table))).expect("a connection");
                add(&session, commits.unwrap_or("lost")).expect("the session goes on");
                if commits.is_some() {
                    session.commit().expect("it can be committed");
                }
            }
        };
        shop.context(|| {
            let session = DB.session()?;
            session.after_commit(look(Some("by the first hook")))?;
            add(&session, "Ada")?;
            session.commit()?;
            session.after_commit(look(None))?;
            add(&session, "Bob")?;
            session.commit()?;
            session.rollback()?;
            session.after_rollback(look(Some("by the last hook")))?;
            add(&session, "Cid")?;
            session.rollback()
        })?;
        assert_eq!(seen.borrow().as_slice(), [(0, false); 3]);
        assert_eq!(shop.names(), ["Ada", "by the first hook", "Bob", "by the last hook"]);
        Ok(())
    });
}

#[test]
fn panic_in_an_after_commit_hook_is_reported_as_committed_and_later_hooks_run() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            session.after_commit(|| panic!("no mail"))?;
            session.after_commit(told.hook("later"))?;
            session.after_commit(|| panic!("no fax"))?;
            add(&session, "Ada")?;
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("after_commit") && error.to_string().ends_with("The transaction was committed.") && error.to_string().contains("no mail"));
            assert_eq!(told.take(), ["later"]);
            session.after_rollback(|| panic!("no mail"))?;
            session.after_rollback(told.hook("later"))?;
            add(&session, "Bob")?;
            assert_is!(session.rollback(), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("after_rollback") && error.to_string().ends_with("The transaction was rolled back."));
            assert_eq!(told.take(), ["later"]);
            assert!(!session.in_transaction());
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

// Not on MariaDB: it has no constraint that is checked at COMMIT.
fn refused_commit_runs_the_hooks_of_a_rollback() {
    test(|shop| {
        let told = Told::default();
        shop.context(|| {
            let session = DB.session()?;
            hook_all(&session, &told, ["before", "after", "rollback"])?;
            post(&session, 99, "by nobody")?;
            assert_error!(session.commit(), Query);
            assert_eq!(told.take(), ["before", "rollback"]);
            assert!(told.is_forgotten());
            Ok(())
        })
    });
}
