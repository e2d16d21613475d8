//! Hooks of flushes, and what a transaction's hooks are told of its rows.

use std::cell::RefCell;
use std::rc::Rc;

use diesel_session::unit_of_work::{ChangeKind, Changes, RowState};

use super::*;

thread_local! {
    static TOLD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

static HOOKED: Database<Conn> = connected()
    .before_flush(|_, _, changes| note("before_flush", changes))
    .after_flush(|_, _, changes| note("after_flush", changes))
    .before_commit_of_changes(|_, _, changes| note("before_commit_of_changes", changes))
    .after_commit_of_changes(|_, _, changes| note("after_commit_of_changes", changes))
    .after_rollback_of_changes(|_, _, changes| note("after_rollback_of_changes", changes));

fn note(hook: &str, changes: &Changes) -> Result<()> {
    let told = format!("{hook}: {}", shown(changes));
    TOLD.with(|all| all.borrow_mut().push(told));
    Ok(())
}

fn told() -> Vec<String> {
    TOLD.with(RefCell::take)
}

/// Kinds and names; new rows have no name yet.
fn shown(changes: &Changes) -> String {
    let one = |(kind, writer): (ChangeKind, &diesel_session::Tracked<Writer>)| {
        let name = writer.try_read().map_or_else(|_| "new".to_owned(), |writer| writer.name.clone());
        format!("{kind:?} {name}")
    };
    changes.of::<Writer>().map(one).collect::<Vec<_>>().join(", ")
}

/// A context of an application of the database object with hooks, on the test's database.
#[track_caller]
fn hooked(body: impl FnOnce(&Session<Conn>) -> Result<()>) {
    blog(|shop| {
        let id = crate::fixtures::unique("hooked");
        let app = HOOKED.init_app(&id, Config::new(shop.url()))?;
        let outcome = app.context(|| body(&HOOKED.session()?));
        HOOKED.remove_app(&id)?;
        outcome
    });
}

#[test]
fn changes_list_each_row_once_without_undone_savepoints() {
    hooked(|session| {
        told();
        let ada = session.add(writer("Ada"))?;
        session.flush()?;
        assert_eq!(told(), ["before_flush: Insert new", "after_flush: Insert Ada"]);
        ada.write().name = "A".into();
        session.flush()?;
        let undone = session.savepoint(|session| {
            session.add(writer("Bob"))?;
            ada.write().name = "AA".into();
            session.flush()?;
            assert_eq!(shown(&session.changes()), "Insert AA, Insert Bob");
            Err::<(), _>(Error::from(diesel::result::Error::NotFound))
        });
        assert!(undone.is_err());
        session.refresh(&ada)?;
        session.savepoint(|session| {
            session.add(writer("Eve"))?;
            Ok::<_, Error>(())
        })?;
        let gone = session.add(writer("Gone"))?;
        session.flush()?;
        session.delete(&gone)?;
        session.flush()?;
        told();
        session.commit()?;
        assert_eq!(
            told(),
            ["before_commit_of_changes: Insert A, Insert Eve", "after_commit_of_changes: Insert A, Insert Eve"]
        );
        ada.write().email = Some("a@example.org".into());
        session.flush()?;
        session.delete(&ada)?;
        session.commit()?;
        assert_eq!(told().last().map(String::as_str), Some("after_commit_of_changes: Delete A"));
        // Nothing changed, so no hook runs.
        session.commit()?;
        assert_eq!(told(), Vec::<String>::new());
        session.add(writer("Zoe"))?;
        session.flush()?;
        told();
        session.rollback()?;
        assert_eq!(told(), ["after_rollback_of_changes: Insert new"]);
        Ok(())
    });
}

#[test]
fn hooks_of_the_session_ask_for_the_changes() {
    blog(|shop| {
        inside(shop, |session| {
            let seen = Rc::new(RefCell::new(Vec::new()));
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.after_commit(move || in_hook.borrow_mut().push(shown(&inner.changes())))?;
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.before_commit(move || {
                in_hook.borrow_mut().push("before".into());
                inner.add(writer("Bob")).map(drop)
            })?;
            session.add(writer("Ada"))?;
            session.commit()?;
            assert_eq!(*seen.borrow(), ["before", "Insert Ada, Insert Bob"]);
            let (in_hook, inner) = (Rc::clone(&seen), session.clone());
            session.after_rollback(move || in_hook.borrow_mut().push(inner.changes().len().to_string()))?;
            session.add(writer("Eve"))?;
            session.flush()?;
            session.rollback()?;
            assert_eq!(seen.borrow().last().map(String::as_str), Some("1"));
            session.remove()
        })
    });
}

#[test]
fn changes_of_a_hook_are_sent_with_the_same_flush_or_the_next() {
    blog(|shop| {
        inside(shop, |session| {
            session.before_flush(|session, changes| {
                for (_, writer) in changes.of::<Writer>().filter(|(kind, _)| *kind == ChangeKind::Update) {
                    writer.update(|writer| writer.email = Some("stamped".into()));
                }
                // A query inside flushes nothing, and a flush is refused.
                session.count(writers::table)?;
                assert_error!(session.flush(), AlreadyFlushing);
                assert_error!(session.commit(), AlreadyFlushing);
                Ok(())
            })?;
            session.after_flush(|session, changes| {
                if changes.of::<Article>().next().is_none() {
                    let of: Vec<_> = changes.of::<Writer>().map(|(_, writer)| writer.key()).collect();
                    of.into_iter().try_for_each(|key| session.add(article(key, "journal")).map(drop))?;
                }
                Ok(())
            })?;
            let ada = session.add(writer("Ada"))?;
            session.flush()?;
            assert!(session.is_dirty());
            assert_eq!(titles(session)?, ["journal"]);
            ada.write().name = "A".into();
            session.commit()?;
            assert_eq!((ada.read().email.as_deref(), titles(session)?.len()), (Some("stamped"), 2));
            session.remove()
        })
    });
}

#[test]
fn hook_that_adds_rows_for_ever_is_an_error() {
    blog(|shop| {
        inside(shop, |session| {
            session.after_flush(|session, _| session.add(node(None, "more")).map(drop))?;
            session.add(node(None, "first"))?;
            let error = session.commit().expect_err("it never ends");
            assert!(
                error.kind() == ErrorKind::HookFailed
                    && error.hook() == Some("after_flush")
                    && error.to_string().ends_with("The transaction was not committed."),
                "{error}"
            );
            session.rollback()?;
            session.remove()?;
            assert_eq!(session.count(nodes::table)?, 0);
            Ok(())
        })
    });
}

#[test]
fn a_hook_that_fails_or_panics_prevents_the_flush() {
    blog(|shop| {
        inside(shop, |session| {
            session.before_flush(|_, changes| {
                if changes.of::<Writer>().next().is_some() {
                    Err(Error::from(diesel::result::Error::NotFound))
                } else {
                    Ok(())
                }
            })?;
            let ada = session.add(writer("Ada"))?;
            assert_error!(session.flush(), NotFound);
            assert_error!(session.load::<String>(writers::table.select(writers::name)), Autoflush);
            // Nothing was sent, and nothing is lost.
            session.delete(&ada)?;
            session.add(node(None, "kept"))?;
            session.commit()?;
            session.remove()?;
            session.before_flush(|_, _| panic!("on purpose"))?;
            session.add(node(None, "x"))?;
            let error = session.commit().expect_err("it panicked");
            assert!(
                error.kind() == ErrorKind::HookFailed
                    && error.hook() == Some("before_flush")
                    && error.to_string().ends_with("The transaction was not committed."),
                "{error}"
            );
            session.remove()?;
            session.after_flush(|_, _| panic!("on purpose"))?;
            session.add(node(None, "y"))?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("after_flush"));
            session.rollback()?;
            session.remove()?;
            let labels: Vec<String> = session.load(nodes::table.select(nodes::label))?;
            assert_eq!(labels, ["kept"]);
            Ok(())
        })
    });
}

/// What a hook does, and whether it takes away what is to be flushed.
type Prank = fn(&Session<Conn>);

const PRANKS: [Prank; 6] = [
    |session| session.rollback().expect("it is allowed"),
    |session| session.remove().expect("it is allowed"),
    |session| session.expunge_all(),
    |session| drop(session.transaction(|_| Err::<(), Error>(refusal()))),
    |session| {
        session.expunge_all();
        session.add(writer("another")).expect("it is allowed");
    },
    |session| {
        session.rollback().expect("it is allowed");
        drop(session.execute(diesel::insert_into(nodes::table).values(nodes::label.eq("by the hook"))));
    },
];

fn refusal() -> Error {
    Error::from(diesel::result::Error::NotFound)
}

/// The scopes in which a flush is part of a transaction, and in which it is one.
fn in_scopes(shop: &Shop<Conn>, body: impl Fn(&Session<Conn>) -> Result<()>) -> Result<()> {
    shop.scope().run(|| body(&DB.session()?))?;
    shop.scope().autocommit().run(|| body(&DB.session()?))
}

#[track_caller]
fn assert_taken_away(outcome: Result<()>, hook: &str) {
    match outcome {
        Err(error) if error.hook() == Some(hook) => {
            assert!(error.to_string().contains("return `Err` from the hook"), "{error}");
        }
        other => panic!("the `{hook}` hook took the rows away: {other:?}"),
    }
}

fn no_writer_is_stored(shop: &Shop<Conn>) -> bool {
    shop.ask("SELECT name AS value FROM writers").is_empty()
}

fn nothing_is_stored(shop: &Shop<Conn>) -> bool {
    shop.ask("SELECT name AS value FROM writers").is_empty() && shop.ask("SELECT label AS value FROM nodes").is_empty()
}

#[test]
fn flush_fails_if_a_hook_before_it_takes_the_rows_away() {
    blog(|shop| {
        for (number, prank) in PRANKS.into_iter().enumerate() {
            for begun in [false, true] {
                in_scopes(shop, |session| {
                    if begun {
                        session.add(node(None, "earlier"))?;
                        session.flush()?;
                    }
                    if begun && KIND != Kind::Sqlite && !session.in_transaction() {
                        // An autocommit scope has stored it.
                        session.execute(diesel::delete(nodes::table))?;
                    } else if !session.in_transaction() {
                        session.execute(diesel::delete(nodes::table))?;
                        session.commit()?;
                    }
                    session.before_flush(move |session, changes| {
                        if changes.of::<Writer>().next().is_some() {
                            prank(session);
                        }
                    })?;
                    session.add(writer("Ada"))?;
                    assert_taken_away(session.flush(), "before_flush");
                    // A commit stores nothing of what is left.
                    let _ = session.commit();
                    assert!(no_writer_is_stored(shop), "{number}");
                    session.rollback()?;
                    session.remove()?;
                    session.add(writer("Bob"))?;
                    session.commit()?;
                    assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Bob"], "{number}");
                    session.execute(diesel::delete(writers::table))?;
                    session.commit()
                })?;
            }
        }
        Ok(())
    });
}

#[test]
fn commit_fails_if_a_hook_takes_the_rows_away() {
    blog(|shop| {
        for prank in PRANKS {
            for hook in ["before_flush", "before_commit"] {
                let outcome = shop.run(|| {
                    let session = DB.session()?;
                    session.add(writer("Ada"))?;
                    match hook {
                        "before_flush" => session.before_flush(move |session, _| prank(session))?,
                        _ => session.before_commit(move || DB.session().map(|session| prank(&session)))?,
                    }
                    Ok(())
                });
                assert_taken_away(outcome, hook);
                assert!(nothing_is_stored(shop));
            }
        }
        Ok(())
    });
}

#[test]
fn hook_after_a_flush_that_rolls_it_back_fails_it() {
    blog(|shop| {
        in_scopes(shop, |session| {
            for prank in [PRANKS[0], PRANKS[1], PRANKS[3], PRANKS[5]] {
                session.after_flush(move |session, changes| {
                    if changes.of::<Writer>().next().is_some() {
                        prank(session);
                    }
                })?;
                session.add(writer("Ada"))?;
                assert_taken_away(session.flush(), "after_flush");
                let _ = session.commit();
                assert!(no_writer_is_stored(shop));
                session.rollback()?;
                session.remove()?;
            }
            Ok(())
        })
    });
}

#[test]
fn hook_after_a_flush_may_let_go_of_what_was_sent() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.after_flush(|session, _| session.expunge_all())?;
            session.add(writer("Ada"))?;
            session.commit()?;
            assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Ada"]);
            session.remove()?;
            session.execute(diesel::delete(writers::table))?;
            session.commit()
        })
    });
}

#[test]
fn hook_that_forgets_what_was_written_fails_the_flush() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.execute(diesel::delete(writers::table))?;
            session.commit()?;
            let ada = session.add(writer("Ada"))?;
            session.commit()?;
            let ada = session.find::<Writer>(ada.read().id)?;
            session.before_flush(|session, _| session.expire_all())?;
            ada.write().name = "A".into();
            assert_taken_away(session.flush(), "before_flush");
            session.rollback()?;
            session.remove()
        })
    });
}

#[test]
fn commit_inside_a_flush_is_refused_and_a_transaction_left_open_fails_it() {
    blog(|shop| {
        in_scopes(shop, |session| {
            session.after_flush(|session, _| {
                assert_error!(session.commit(), AlreadyFlushing);
            })?;
            session.add(node(None, "kept"))?;
            session.commit()?;
            session.remove()
        })?;
        assert_eq!(shop.ask("SELECT label AS value FROM nodes"), ["kept", "kept"]);
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            session.before_flush(|session, _| session.begin())?;
            session.add(writer("Ada"))?;
            assert_is!(session.flush(), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("before_flush") && error.to_string().ends_with("The transaction was not committed."));
            assert_error!(session.commit(), RollbackRequired);
            session.rollback()?;
            session.remove()?;
            session.add(writer("Bob"))?;
            session.flush()
        })?;
        assert_eq!(shop.ask("SELECT name AS value FROM writers"), ["Bob"]);
        Ok(())
    });
}

static VETOED: Database<Conn> =
    connected().before_commit_of_changes(|_, session, _| session.rollback()).before_flush(|_, session, changes| {
        match changes.of::<Writer>().any(|(kind, _)| kind == ChangeKind::Delete) {
            true => session.rollback(),
            false => Ok(()),
        }
    });

static TENANTS: Database<Conn> = connected().before_flush(|app, _, changes| {
    // It is a full handle of the application.
    assert_eq!(app.status().waiting, 0);
    note(app.id(), changes)
});

#[test]
fn hooks_of_the_database_object_receive_the_application() {
    blog(|shop| {
        for id in [crate::fixtures::unique("tenant"), crate::fixtures::unique("tenant")] {
            let app = TENANTS.init_app(&id, Config::new(shop.url()))?;
            told();
            app.context(|| {
                let session = TENANTS.session()?;
                session.add(writer("Ada"))?;
                session.flush()?;
                session.rollback()
            })?;
            assert_eq!(told(), [format!("{id}: Insert new")]);
            // A session may outlive all handles of its application.
            let session = app.open_session()?;
            TENANTS.remove_app(&id)?;
            drop(app);
            session.add(writer("Ada"))?;
            assert_error!(session.flush(), Disposed);
            assert_eq!(told(), [format!("{id}: Insert new")]);
        }
        Ok(())
    });
}

#[test]
fn row_hooks_of_the_database_object_are_observed() {
    blog(|shop| {
        let id = crate::fixtures::unique("vetoed");
        let app = VETOED.init_app(&id, Config::new(shop.url()))?;
        let outcome = app.context(|| {
            let session = VETOED.session()?;
            session.add(writer("Ada"))?;
            assert_taken_away(session.commit(), "before_commit_of_changes");
            let ada = session.add(writer("Ada"))?;
            session.flush()?;
            session.delete(&ada)?;
            assert_taken_away(session.flush(), "before_flush");
            session.rollback()
        });
        VETOED.remove_app(&id)?;
        outcome?;
        assert!(nothing_is_stored(shop));
        Ok(())
    });
}

/// A handle to what a hook has seen.
fn seen_by(session: &Session<Conn>, seen: &Rc<RefCell<Vec<String>>>, name: &'static str) -> impl FnOnce() + 'static {
    let (session, seen) = (session.clone(), Rc::clone(seen));
    move || seen.borrow_mut().push(format!("{name}: {}", shown(&session.changes())))
}

#[test]
fn changes_are_those_of_the_present_transaction() {
    blog(|shop| {
        inside(shop, |session| {
            assert!(session.changes().is_empty());
            session.add(writer("Ada"))?;
            assert!(session.changes().is_empty(), "not flushed");
            session.flush()?;
            assert_eq!(shown(&session.changes()), "Insert Ada");
            // A savepoint that is rolled back takes its own changes only.
            let undone = session.savepoint(|session| {
                session.add(writer("Bob"))?;
                session.flush()?;
                assert_eq!(shown(&session.changes()), "Insert Ada, Insert Bob");
                Err::<(), _>(refusal())
            });
            assert!(undone.is_err());
            assert_eq!(shown(&session.changes()), "Insert Ada");
            session.commit()?;
            assert!(session.changes().is_empty(), "committed");
            session.add(writer("Eve"))?;
            assert!(session.changes().is_empty(), "not flushed");
            session.flush()?;
            assert_eq!(shown(&session.changes()), "Insert Eve");
            session.rollback()?;
            assert!(session.changes().is_empty(), "rolled back");
            session.commit()?;
            assert!(session.changes().is_empty());
            session.transaction(|session| {
                session.add(writer("Zoe"))?;
                session.flush()?;
                assert_eq!(shown(&session.changes()), "Insert Zoe");
                Ok::<(), Error>(())
            })?;
            assert!(session.changes().is_empty(), "the closure has committed");
            Ok(())
        })
    });
}

#[test]
fn changes_are_empty_again_when_the_hooks_have_run() {
    blog(|shop| {
        inside(shop, |session| {
            let seen = Rc::default();
            for commits in [true, false] {
                session.before_commit(seen_by(session, &seen, "before"))?;
                session.after_commit(seen_by(session, &seen, "after 1"))?;
                session.after_commit(seen_by(session, &seen, "after 2"))?;
                session.after_rollback(seen_by(session, &seen, "rollback 1"))?;
                session.after_rollback(seen_by(session, &seen, "rollback 2"))?;
                session.add(writer("Ada"))?;
                session.flush()?;
                if commits {
                    session.commit()?;
                    let told = ["before: Insert Ada", "after 1: Insert Ada", "after 2: Insert Ada"];
                    assert_eq!(seen.take(), told);
                } else {
                    session.rollback()?;
                    assert_eq!(seen.take(), ["rollback 1: Insert new", "rollback 2: Insert new"]);
                }
                assert!(session.changes().is_empty());
                session.execute(diesel::delete(writers::table))?;
                session.commit()?;
            }
            // A commit of nothing has nothing to show, whatever was committed before.
            session.after_commit(seen_by(session, &seen, "after"))?;
            session.commit()?;
            assert_eq!(seen.take(), ["after: "]);
            Ok(())
        })
    });
}

#[test]
fn each_hook_gets_the_changes_of_the_transaction_that_has_ended() {
    blog(|shop| {
        inside(shop, |session| {
            let seen: Rc<RefCell<Vec<String>>> = Rc::default();
            // The first hook has a transaction of its own, with changes of its own.
            let (inner, in_hook) = (session.clone(), Rc::clone(&seen));
            session.after_commit(move || {
                let mut told = in_hook.borrow_mut();
                told.push(shown(&inner.changes()));
                inner.add(writer("Bob")).expect("a session");
                inner.flush().expect("a flush");
                told.push(shown(&inner.changes()));
                inner.commit().expect("a commit");
                told.push(shown(&inner.changes()));
            })?;
            session.after_commit(seen_by(session, &seen, "second"))?;
            session.add(writer("Ada"))?;
            session.commit()?;
            assert_eq!(seen.take(), ["Insert Ada", "Insert Bob", "Insert Ada", "second: Insert Ada"]);
            assert!(session.changes().is_empty());
            // A panic of a hook leaves nothing either.
            session.after_commit(|| panic!("on purpose"))?;
            session.add(writer("Eve"))?;
            assert_is!(session.commit(), Err(error) if error.kind() == ErrorKind::HookFailed && error.to_string().ends_with("The transaction was committed."));
            assert!(session.changes().is_empty());
            session.after_rollback(|| panic!("on purpose"))?;
            session.add(writer("Eva"))?;
            session.flush()?;
            assert_is!(session.rollback(), Err(error) if error.kind() == ErrorKind::HookFailed && error.to_string().ends_with("The transaction was rolled back."));
            assert!(session.changes().is_empty());
            Ok(())
        })
    });
}

#[test]
fn flushes_of_an_autocommit_scope_leave_no_changes_outside_of_a_transaction() {
    blog(|shop| {
        shop.scope().autocommit().run(|| {
            let session = DB.session()?;
            let seen = Rc::default();
            session.after_commit(seen_by(&session, &seen, "after"))?;
            session.add(writer("Ada"))?;
            session.flush()?;
            assert!(session.changes().is_empty(), "the flush has committed");
            session.transaction(|session| {
                session.add(writer("Bob"))?;
                session.flush()?;
                assert_eq!(shown(&session.changes()), "Insert Bob");
                Ok::<(), Error>(())
            })?;
            assert_eq!(seen.take(), ["after: Insert Bob"]);
            assert!(session.changes().is_empty());
            session.begin()?;
            session.add(writer("Eve"))?;
            session.flush()?;
            assert_eq!(shown(&session.changes()), "Insert Eve");
            session.rollback()?;
            assert!(session.changes().is_empty());
            session.add(writer("Ada"))?;
            session.add(writer("Ada"))?;
            assert!(session.flush().is_err());
            assert!(session.changes().is_empty(), "the flush has rolled back");
            session.rollback()
        })
    });
}

#[test]
fn changes_of_an_earlier_transaction_reach_no_hook_of_the_database_object() {
    hooked(|session| {
        told();
        session.after_commit(|| {})?;
        session.add(writer("Ada"))?;
        session.commit()?;
        assert_eq!(told().last().map(String::as_str), Some("after_commit_of_changes: Insert Ada"));
        session.after_commit(|| {})?;
        session.execute(diesel::delete(writers::table))?;
        session.commit()?;
        assert_eq!(told(), Vec::<String>::new());
        Ok(())
    });
}

static UNWILLING: Database<Conn> = connected().after_rollback_of_changes(|_, session, changes| {
    TOLD.with(|all| all.borrow_mut().push(format!("{} / {}", shown(changes), shown(&session.changes()))));
    Err(refusal())
});

#[test]
fn rollback_and_remove_return_the_error_of_a_hook_and_have_done_their_work() {
    blog(|shop| {
        let id = crate::fixtures::unique("unwilling");
        let app = UNWILLING.init_app(&id, Config::new(shop.url()))?;
        let outcome = app.context(|| {
            told();
            let session = UNWILLING.session()?;
            for end in [Session::rollback, Session::remove] {
                let ada = session.add(writer("Ada"))?;
                session.flush()?;
                assert_is!(end(&session), Err(error) if error.kind() == ErrorKind::HookFailed && error.hook() == Some("after_rollback_of_changes") && error.to_string().ends_with("The transaction was rolled back."));
                assert_eq!(told(), ["Insert new / Insert new"]);
                assert_is!(ada.state(), RowState::Discarded | RowState::Detached);
                assert!(!session.in_transaction() && !session.is_dirty() && session.changes().is_empty());
                assert_is!(end(&session), Ok(()));
            }
            // The error of the closure matters more.
            let refused = session.transaction(|session| {
                session.add(writer("Ada"))?;
                session.flush()?;
                Err::<(), _>(refusal())
            });
            assert_error!(&refused, NotFound);
            Ok(())
        });
        UNWILLING.remove_app(&id)?;
        assert!(no_writer_is_stored(shop));
        outcome
    });
}
