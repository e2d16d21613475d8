//! Which application and session belong to the code that runs now.

use std::cell::RefCell;
use std::rc::Rc;

use super::*;

#[test]
fn calls_without_a_context_return_no_context() {
    test(|shop| {
        assert_error!(DB.session(), NoContext);
        assert_error!(DB.current_app(), NoContext);
        assert_error!(DB.create_all(), NoContext);
        assert_error!(DB.drop_all(), NoContext);
        let error = DB.session().unwrap_err();
        assert!(error.is_no_context());
        assert!(
            error.kind() == ErrorKind::NoContext
                && error.location().expect("a location").file().ends_with("contexts.rs")
                && error.location().expect("a location").line() == line!() - 5,
            "{error:?}"
        );
        shop.enter(|| assert_is!(DB.session(), Ok(_)));
        assert_error!(DB.session(), NoContext);
        Ok(())
    });
}

#[test]
fn error_says_how_long_a_connection_had_been_held_when_it_was_made() {
    test_alone_with(
        |config| config.max_size(1),
        |shop| {
            shop.context(|| {
                let session = DB.session()?;
                session.begin()?;
                let error = shop.context(|| DB.session()?.begin()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::WouldDeadlock, "{error}");
                let holders = error.holders().expect("holders");
                let (text, held) = (error.to_string(), holders[0].held_for());
                let status = shop.status();
                let in_status = status.holders[0].held_for();
                // The time itself is what is tested.
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!((error.to_string(), holders[0].held_for()), (text, held));
                assert_eq!(status.holders[0].held_for(), in_status);
                assert!(shop.status().holders[0].held_for() >= in_status + Duration::from_millis(20));
                session.rollback()
            })
        },
    );
}

#[test]
fn context_has_one_session() {
    test(|shop| {
        shop.context(|| {
            let (first, second) = (DB.session()?, DB.session()?);
            add(&first, "Ada")?;
            assert!(second.in_transaction());
            assert_eq!(names(&second)?, ["Ada"]);
            second.commit()?;
            assert!(!first.in_transaction());
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn session_without_a_transaction_holds_no_connection() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            assert_eq!((shop.status().open, session.in_transaction()), (0, false));
            add(&session, "Ada")?;
            assert_eq!((shop.status().in_use, session.in_transaction()), (1, true));
            assert!(shop.in_transaction_now());
            session.commit()?;
            assert_eq!((shop.status().in_use, session.in_transaction()), (0, false));
            shop.assert_at_rest();
            session.count(users::table)?;
            // MariaDB's default isolation level promises one snapshot for all reads.
            let held = usize::from(KIND == Kind::Mariadb);
            assert_eq!((shop.status().in_use, session.in_transaction()), (held, held == 1));
            session.rollback()?;
            assert_eq!((shop.status().in_use, shop.status().open), (0, 1));
            Ok(())
        })
    });
}

#[test]
fn every_context_of_an_application_begins_with_a_new_session() {
    test(|shop| {
        let kept = shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            Ok::<_, Error>(session)
        })?;
        shop.context(|| {
            let session = DB.session()?;
            assert!(!session.in_transaction());
            assert!(names(&session)?.is_empty());
            assert_error!(kept.count(users::table), SessionEnded);
            Ok(())
        })
    });
}

#[test]
fn nested_contexts_of_one_application_have_sessions_of_their_own() {
    test(|shop| {
        shop.context(|| {
            let outer = DB.session()?;
            add(&outer, "Ada")?;
            shop.context(|| {
                let inner = DB.session()?;
                assert!(!inner.in_transaction());
                assert!(names(&inner)?.is_empty());
                inner.commit()
            })?;
            assert!(outer.in_transaction());
            assert_eq!(names(&outer)?, ["Ada"]);
            assert_eq!(names(&DB.session()?)?, ["Ada"]);
            outer.commit()
        })?;
        assert_eq!(shop.names(), ["Ada"]);
        Ok(())
    });
}

#[test]
fn an_inner_context_commits_without_the_outer_one() {
    test(|shop| {
        shop.context(|| {
            let outer = DB.session()?;
            outer.count(users::table)?;
            shop.context(|| {
                add(&DB.session()?, "Bob")?;
                DB.session()?.commit()
            })?;
            add(&outer, "Ada")?;
            outer.rollback()
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        Ok(())
    });
}

#[test]
fn the_outer_transaction_survives_however_the_inner_context_ends() {
    test(|shop| {
        shop.context(|| {
            let outer = DB.session()?;
            add(&outer, "Ada")?;
            let read = || DB.session()?.count(users::table);
            assert_eq!(shop.context(read)?, 0);
            let left: Result<()> = shop.context(|| {
                read()?;
                Err(Error::from(diesel::result::Error::NotFound))
            });
            assert_error!(&left, NotFound);
            let message = panic_of(|| {
                shop.enter(|| {
                    read().expect("it can be read");
                    panic!("on purpose")
                })
            });
            assert_eq!(message, "on purpose");
            assert_eq!(shop.status().in_use, 1);
            assert_eq!(names(&DB.session()?)?, ["Ada"]);
            add(&outer, "Bob")?;
            outer.commit()
        })?;
        assert_eq!(shop.names(), ["Ada", "Bob"]);
        Ok(())
    });
}

#[test]
fn nested_contexts_of_two_applications_do_not_touch_each_other() {
    test(|shop| {
        let other = Shop::open(&DB, KIND);
        shop.context(|| {
            add(&DB.session()?, "Ada")?;
            other.context(|| {
                assert_eq!(DB.current_app()?.id(), other.id());
                assert!(names(&DB.session()?)?.is_empty());
                add(&DB.session()?, "Bob")?;
                DB.session()?.commit()
            })?;
            assert_eq!(DB.current_app()?.id(), shop.id());
            assert_eq!(names(&DB.session()?)?, ["Ada"]);
            DB.session()?.rollback()
        })?;
        assert_eq!((shop.names(), other.names()), (vec![], vec!["Bob".to_owned()]));
        other.assert_at_rest();
        Ok(())
    });
}

#[test]
fn session_ends_with_its_context_by_return_by_question_mark_and_by_panic() {
    test(|shop| {
        let kept = RefCell::new(Vec::new());
        let begun = || {
            let session = DB.session()?;
            add(&session, "Ada")?;
            kept.borrow_mut().push(session);
            Ok::<(), Error>(())
        };
        shop.context(begun)?;
        let left: Result<()> = shop.context(|| {
            begun()?;
            DB.app("unknown")?;
            Ok(())
        });
        assert_error!(&left, UnknownApp);
        panic_of(|| {
            shop.enter(|| {
                begun().expect("a session");
                panic!("on purpose")
            })
        });
        for session in kept.take() {
            assert_error!(session.count(users::table), SessionEnded);
            assert_error!(session.begin(), SessionEnded);
            assert_error!(session.commit(), SessionEnded);
            assert_error!(session.rollback(), SessionEnded);
            assert_error!(session.connection(), SessionEnded);
            assert_error!(session.after_commit(|| ()), SessionEnded);
            assert_error!(session.savepoint(|_| Ok::<(), Error>(())), SessionEnded);
            assert_error!(session.transaction(|_| Ok::<(), Error>(())), SessionEnded);
            assert_is!(session.remove(), Ok(()));
            assert!(!session.in_transaction());
        }
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn a_hook_that_panics_at_the_end_skips_nothing() {
    test(|shop| {
        let told = Rc::new(RefCell::new(Vec::new()));
        let audit = Shop::open(&AUDIT, Kind::Sqlite);
        let log = AUDIT.init_app(shop.id(), Config::new(audit.url()))?;
        let answer = shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.after_rollback(|| panic!("on purpose"))?;
            session.after_rollback({
                let told = Rc::clone(&told);
                move || told.borrow_mut().push("later hook")
            })?;
            AUDIT.session()?.execute(diesel::insert_into(users::table).values(users::name.eq("Bob")))?;
            Ok::<_, Error>(42)
        })?;
        assert_eq!((answer, told.borrow().as_slice()), (42, ["later hook"].as_slice()));
        shop.assert_at_rest();
        assert_eq!(log.status().in_use, 0);
        audit.assert_at_rest();
        AUDIT.remove_app(shop.id())?;
        Ok(())
    });
}

#[test]
fn a_hook_at_the_end_may_open_a_session_and_leaves_nothing_with_it() {
    test(|shop| {
        let seen = Rc::new(RefCell::new(None));
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let seen = Rc::clone(&seen);
            session.after_rollback(move || {
                let session = DB.session().expect("still inside the context");
                *seen.borrow_mut() = Some(add(&session, "Bob").is_ok());
            })
        })?;
        assert_eq!(*seen.borrow(), Some(true));
        assert!(shop.names().is_empty());
        Ok(())
    });
}

#[test]
fn contexts_nest_a_hundred_deep() {
    fn descend(shop: &Shop<Conn>, depth: i64) -> Result<()> {
        shop.context(|| {
            let session = DB.session()?;
            assert!(!session.in_transaction());
            if depth < 100 {
                descend(shop, depth + 1)?;
            }
            add(&session, &depth.to_string())?;
            assert_eq!(session.count(users::table)?, 101 - depth);
            session.commit()
        })
    }
    test(|shop| {
        descend(shop, 1)?;
        assert_eq!(shop.names().len(), 100);
        Ok(())
    });
}

#[test]
fn another_thread_has_no_context_and_may_enter_the_application() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let app = DB.current_app()?;
            let seen = std::thread::scope(|threads| {
                let there = threads.spawn(|| {
                    assert_error!(DB.session(), NoContext);
                    app.context(|| names(&DB.session()?))
                });
                there.join().expect("it ends")
            })?;
            assert!(seen.is_empty());
            assert_eq!(names(&session)?, ["Ada"]);
            Ok(())
        })
    });
}

#[test]
fn an_application_removed_inside_its_own_context_is_not_its_successor() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            let report = DB.remove_app(shop.id())?;
            assert_eq!(report.still_out.len(), 1);
            let successor = DB.init_app(shop.id(), Config::new(shop.url()))?;
            session.rollback()?;
            assert_error!(session.count(users::table), Disposed);
            assert_error!(DB.session()?.count(users::table), Disposed);
            assert_error!(shop.context(|| DB.session().map(drop)), Disposed);
            assert_error!(DB.current_app()?.open_session(), Disposed);
            successor.context(|| {
                add(&DB.session()?, "Bob")?;
                DB.session()?.commit()
            })?;
            assert_error!(DB.session()?.count(users::table), Disposed);
            Ok::<(), Error>(())
        })?;
        assert_eq!(shop.names(), ["Bob"]);
        assert!(DB.remove_app(shop.id())?.is_complete());
        Ok(())
    });
}

#[test]
fn two_databases_of_one_application_have_a_session_each_in_one_context() {
    test(|shop| {
        let (audit, twin) = (Shop::open(&AUDIT, Kind::Sqlite), Shop::open(&OTHER, KIND));
        let unknown = shop.enter(|| AUDIT.session().unwrap_err());
        assert!(
            unknown.kind() == ErrorKind::UnknownApp && unknown.app().expect("an application") == shop.id(),
            "{unknown:?}"
        );
        let audit_app = AUDIT.init_app(shop.id(), Config::new(audit.url()))?;
        OTHER.init_app(shop.id(), Config::new(twin.url()))?;
        let all = || -> Result<_> {
            let audited: Vec<String> = AUDIT.session()?.load(users::table.select(users::name))?;
            Ok((names(&DB.session()?)?, names(&OTHER.session()?)?, audited))
        };
        shop.context(|| {
            add(&DB.session()?, "Ada")?;
            AUDIT.session()?.execute(diesel::insert_into(users::table).values(users::name.eq("Bob")))?;
            add(&OTHER.session()?, "Eve")?;
            assert_eq!(all()?, (vec!["Ada".into()], vec!["Eve".into()], vec!["Bob".into()]));
            assert_eq!(OTHER.current_app()?.id(), shop.id());
            DB.session()?.commit()?;
            AUDIT.session()?.commit()
        })?;
        assert_eq!((shop.names(), twin.names(), audit.names()), (vec!["Ada".into()], vec![], vec!["Bob".into()]));
        // The same from the other side.
        audit_app.context(|| {
            assert_eq!(all()?, (vec!["Ada".into()], vec![], vec!["Bob".into()]));
            Ok::<(), Error>(())
        })?;
        AUDIT.remove_app(shop.id())?;
        OTHER.remove_app(shop.id())?;
        Ok(())
    });
}
